"""Rows of JSONL, JSON and parquet files and of hub data sets, each with its place for error messages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.disk import read_json, read_jsonl
from runtime.errors import UserError


def read_rows(source: str, split: str = "train") -> Iterator[tuple[str, dict[str, Any]]]:
    """(place for error messages, row) of every row; `split` is the hub's, a file is read whole."""
    path = Path(source)
    if path.suffix == ".parquet" and path.is_file():
        import pyarrow
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # also of a text that is no UTF-8
            raise UserError(f"{source}: not a readable parquet file ({error})") from None
        for number, row in enumerate(rows, 1):
            yield f"{source}: row {number}", row
    elif path.suffix == ".json" and path.is_file() and path.read_bytes().lstrip()[:1] == b"[":
        for number, row in enumerate(read_json(path), 1):
            if not isinstance(row, dict):
                raise UserError(f"{source}: item {number}: expected a JSON object, found {type(row).__name__}")
            yield f"{source}: item {number}", row
    elif path.is_file():  # one object a line, which hub data sets also call .json
        for number, row in read_jsonl(path):
            yield f"{source}:{number}", row
    elif path.suffix in (".jsonl", ".json", ".parquet", ".txt") or path.exists() or source.count("/") != 1:
        raise UserError(f"{source}: no such file; give a .jsonl or .parquet file or a hub id (owner/name)")
    else:
        import datasets

        try:
            table = datasets.load_dataset(source, split=split)
        except Exception as error:  # the hub client raises many kinds; each means that there is no data
            raise UserError(f"{source}: neither a file nor a hub data set within reach ({error})") from None
        for number, row in enumerate(table, 1):
            yield f"{source}: row {number}", dict(row)
