"""Files and folders that appear whole or not at all; JSON and JSONL with the place of what is wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.errors import UserError


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(aside, path)


def replace_folder(aside: Path, path: Path) -> None:
    """Put a finished folder in its place; at every moment the old or the new one is whole, as `path` or `path.old`."""
    old = path.with_name(path.name + ".old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
    os.rename(aside, path)
    shutil.rmtree(old, ignore_errors=True)


def drop_torn_end(path: Path) -> None:
    """Cut off a last line without its line end, which is what a killed process leaves in a log."""
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def read_json(path: Path) -> Any:
    """Whatever the file holds; UserError if there is none, or it is not JSON."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None


def read_jsonl(path: Path, torn_end_ok: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not blank; UserError names file and line of a bad one.

    `torn_end_ok` forgives an unfinished last line, which is what a killed process leaves in a log.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            if torn_end_ok and number == len(lines):
                return
            raise UserError(f"{path}:{number}: not one JSON object a line ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        yield number, row
