"""Patches that say what they are, and clean copies of the project with one of them applied.

A patch begins like a mail: `Name: text` lines (continued ones are indented), a blank line, then the diff. `git apply`
and `patch -p1` pass over such a head.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("ops", "runtime", "loading", "formats", "judging", "evaluation", "prepare", "toy", "report")
LEFT_OUT = (".git", "runs", ".venv*", "__pycache__", ".*_cache", ".hypothesis", "*.part")


@dataclass(frozen=True)
class Patch:
    """One file; `says` is its head."""

    name: str
    says: Mapping[str, str]
    diff: str

    @property
    def files(self) -> list[str]:
        return re.findall(r"^\+\+\+ b/(\S+)$", self.diff, re.MULTILINE)

    @property
    def changed(self) -> int:
        """Lines added or lines taken away, whichever is more."""
        marks = re.findall(r"^([+-])(?!\+\+ b/|-- a/)", self.diff, re.MULTILINE)
        return max(marks.count("+"), marks.count("-"))


def read_patches(folder: Path) -> list[Patch]:
    found = []
    for path in sorted(folder.glob("*.patch")):
        head, _, diff = path.read_text(encoding="utf-8").partition("\n\n")
        says = dict(line.split(": ", 1) for line in re.sub(r"\n +", " ", head).splitlines())
        found.append(Patch(path.stem, says, diff))
    return found


def scripts() -> list[Path]:
    """The product's files below the root: what stands there and in its rooms."""
    places = [ROOT, *(ROOT / room for room in ROOMS)]
    return sorted(file.relative_to(ROOT) for place in places for file in place.iterdir()
                  if file.is_file() and (place != ROOT or file.suffix == ".py"))


def make_tree(folder: Path, patch: Patch | None, whole: bool = False) -> Path:
    """A fresh copy of the scripts (`whole`: of all that the tests need) with the patch applied -> its folder."""
    shutil.rmtree(folder, ignore_errors=True)
    if whole:
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    else:
        folder.mkdir(parents=True)
        for file in scripts():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, folder / file)
    if patch:
        apply(patch, folder)
    return folder


def apply(patch: Patch, folder: Path) -> None:
    """UserError if the patch does not fit the files in `folder`."""
    # inside a repository git would silently pass over paths that are not below its root: it must not find one
    apart = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
    before = [(folder / file).read_bytes() for file in patch.files]
    done = subprocess.run(["git", "apply", "-C1", "-"], input=patch.diff, cwd=folder, env=apart, text=True,
                          capture_output=True)
    if done.returncode or any((folder / f).read_bytes() == b for f, b in zip(patch.files, before, strict=True)):
        raise UserError(f"{patch.name}: does not fit ({done.stderr.strip() or 'nothing changed'}); mend the patch")
