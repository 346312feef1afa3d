"""The licence of every pinned package, from the metadata of what is installed -> docs/licences.md.

python recipes/licences.py
"""

from __future__ import annotations

import re
from importlib.metadata import Distribution, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def pinned(path: Path = ROOT / "requirements.txt") -> dict[str, str]:
    """{name: version} of every line; ValueError for one that is not exact."""
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    found = dict(line.split("==") for line in lines if line)
    return {name.strip(): version.strip() for name, version in found.items()}


def licence(package: Distribution) -> str:
    """SPDX expression, else the classifiers, else the first words of the licence field."""
    said, classes, words = (
        package.metadata.get_all(field) or [] for field in ("License-Expression", "Classifier", "License")
    )
    named = [c.split(" :: ")[-1] for c in classes if c.startswith("License ::") and not c.endswith("OSI Approved")]
    text = next((t for t in (*said, ", ".join(named), *words) if t), "")
    return re.sub(r"\s+", " ", text.strip().split("\n")[0])[:200] or "not stated"


def table() -> str:
    head = ("# Licences of what is installed\n\nThe packages of requirements.txt and their licences as their own "
            "metadata state them, written by `python recipes/licences.py`.\n\n| package | version | licence |\n"
            "|---|---|---|\n")
    return head + "".join(f"| {name} | {v} | {licence(distribution(name))} |\n" for name, v in pinned().items())


if __name__ == "__main__":
    (ROOT / "docs" / "licences.md").write_text(table(), encoding="utf-8")
