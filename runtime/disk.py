"""Files and folders that appear whole or not at all; JSON and JSONL readers that name file and line of an error."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.errors import UserError


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old or the new content, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(aside, path)


def replace_folder(aside: Path, path: Path) -> None:
    """Move a finished folder to `path`. At every moment the old or the new one is whole, as `path` or `path.old`."""
    old = path.with_name(path.name + ".old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
    os.rename(aside, path)
    shutil.rmtree(old, ignore_errors=True)


def drop_torn_end(path: Path) -> None:
    """Remove an unfinished last line, which a killed process leaves in a log."""
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def read_json(path: Path) -> Any:
    """Whatever the file holds; UserError if there is none, or it is not JSON."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return parse_json(path.read_bytes(), path)


def parse_json(content: bytes, name: str | Path) -> Any:
    """As `read_json`, for content that is already read; `name` is the file's, for the error message."""
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not JSON ({error})") from None


def read_jsonl(path: Path, torn_end_ok: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not blank; UserError names file and line of an error.

    With `torn_end_ok` an unfinished last line is skipped: a killed process leaves one in a log.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return parse_jsonl(path.read_bytes(), path, torn_end_ok)


def parse_jsonl(content: bytes, name: str | Path, torn_end_ok: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `read_jsonl`, for content that is already read; `name` is the file's, for the error messages."""
    lines = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            if torn_end_ok and number == len(lines):
                return
            raise UserError(f"{name}:{number}: not a JSON object on one line ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{name}:{number}: expected a JSON object, found {type(row).__name__}")
        yield number, row
