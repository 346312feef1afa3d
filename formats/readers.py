"""Rows of files and of hub data sets, each with its place for error messages.

A file's name says how it is read: .jsonl, .json (a list, or one object a line), .csv, .tsv, .parquet; any of them may
be compressed (.gz). `owner/name:config/split` is a hub data set; config and split may be left out.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.disk import parse_json, parse_jsonl
from runtime.errors import UserError

Rows = Iterator[tuple[str, dict[str, Any]]]
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz")
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](?:role|content|from|value)['"]\s*:""")


def read_rows(source: str, split: str = "train") -> Rows:
    """(place for error messages, row) of every row; `split` is the hub's where `source` names none."""
    path = Path(source)
    if path.is_file():
        yield from _file_rows(path, source)
    elif path.suffix in SUFFIXES or path.exists() or source.partition(":")[0].count("/") != 1:
        raise UserError(f"{source}: no such file; give one, or a hub id (owner/name:config/split)")
    else:
        import datasets

        name, _, rest = source.partition(":")
        config, _, wanted = rest.partition("/")
        try:
            table = datasets.load_dataset(name, *[config] * bool(config), split=wanted or split)
        except Exception as error:  # the hub client raises many kinds; each means that there is no data
            raise UserError(f"{source}: neither a file nor a hub data set (owner/name:config/split) within reach "
                            f"({error})") from None
        for number, row in enumerate(table, 1):
            yield f"{source}: row {number}", dict(row)


def stem(source: str) -> str:
    """The short name of a source, from which rows without a name get theirs."""
    return Path((source if Path(source).is_file() else source.partition(":")[0]).removesuffix(".gz")).stem


def _file_rows(path: Path, source: str) -> Rows:
    content, suffix = path.read_bytes(), path.suffix
    if suffix == ".gz":
        try:
            content, suffix = gzip.decompress(content), Path(path.stem).suffix
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{source}: not a whole gzip file ({error})") from None
    content = content.removeprefix(b"\xef\xbb\xbf")  # the mark that some editors and spreadsheets write
    if suffix == ".parquet":
        yield from _parquet_rows(content, source)
    elif suffix in (".csv", ".tsv"):
        yield from _table_rows(content, source, "," if suffix == ".csv" else "\t")
    elif suffix == ".json" and content.lstrip()[:1] == b"[":
        for number, row in enumerate(parse_json(content, source), 1):
            if not isinstance(row, dict):
                raise UserError(f"{source}: item {number}: expected a JSON object, found {type(row).__name__}")
            yield f"{source}: item {number}", row
    else:  # one object a line, which hub data sets also call .json
        for number, row in parse_jsonl(content, source):
            yield f"{source}:{number}", row


def _parquet_rows(content: bytes, source: str) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # also of a text that is no UTF-8
        raise UserError(f"{source}: not a readable parquet file ({error})") from None
    for number, row in enumerate(rows, 1):
        yield f"{source}: row {number}", row


def _table_rows(content: bytes, source: str, delimiter: str) -> Rows:
    """Rows of a CSV or TSV file with a header. An empty cell is a missing value, as in other tables."""
    csv.field_size_limit(max(len(content), csv.field_size_limit()))  # it holds for the whole process: never lower it
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8"), newline=""), delimiter=delimiter, strict=True)
        names = reader.fieldnames or []
        for row in reader:
            where = f"{source}:{reader.line_num}"
            if None in row or None in row.values() or len(set(names)) < len(names):
                raise UserError(f"{where}: needs one cell for each of the {len(names)} names of the header, none twice")
            if any(map(_MESSAGES.match, row.values())):
                raise UserError(f"{where}: a cell holds a list of messages; write such a table as JSONL or parquet")
            yield where, {name: text for name, text in row.items() if text}
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{source}: not a readable table ({error})") from None
