"""Published rows -> pairs, and what cannot be one.

A file that cannot be read is an error. A row that cannot be a pair is dropped with a reason: published files hold
such rows, and one of them must not stop the other 70,000. formats/layouts.py knows the layouts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from data import Pair, swap
from formats.layouts import Ambiguous, LeftOut, Unusable, pair_fields, read_row, refused
from formats.readers import read_rows, stem
from prepare.card import Drop, Signs, signs
from runtime.errors import UserError

Kind = Literal["math", "code", "skywork", "pairs"]
NEEDED = {"math": "initial_reason_steps", "code": "accepted", "skywork": "chosen"}  # the column that tells a kind
SOURCE = {"math": "math_step_dpo", "code": "code_preference_pairs"}
# Skywork's sources, by the paper's Table 5
CATEGORY = {"magpie_pro_llama3.1": "reasoning", "offset_bias": "chat", "helpsteer2": "chat", "magpie_pro": "chat",
            "wildguard": "safety", "magpie_ultra": "reasoning"}


def fixed(pair: Pair) -> bool:
    """Do its texts name the letters? A ready-made prompt and a trace do."""
    return pair.messages is not None or pair.trace is not None


def read_source(kind: Kind, names: Sequence[str], left_out: Sequence[str] = (), first: int = 0,
                columns: Mapping[str, str] | None = None) -> tuple[list[Pair], list[Drop], list[Signs]]:
    """Usable rows of one kind of source as pairs with the chosen response as A, the others as drops.

    `first`: so many rows after a shuffle, as the paper took its code rows; 0 takes all in their order.
    """
    rows: list[tuple[str, str, int, dict[str, Any]]] = []
    for file in names:
        rows += [(where, stem(file), i, row) for i, (where, row) in enumerate(read_rows(file))]
    if first:  # what `datasets` does with shuffle(seed=42), without the library
        rows = [rows[i] for i in np.random.default_rng(42).permutation(len(rows))[:first]]
    pairs: list[Pair] = []
    drops: list[Drop] = []
    seen: list[Signs] = []
    for where, short, i, row in rows:
        source = SOURCE.get(kind) or str(row.get("source") or short).encode(errors="replace").decode()
        try:
            row = renamed(row, columns or {})
            if kind != "pairs" and row.get(NEEDED[kind]) is None:
                raise Unusable(f"no column '{NEEDED[kind]}'")
            found = read_row(row)
            if "sides" in found and found["trace"] is None:
                seen.append(signs(source, *(found["sides"][::-1] if found["winner"] == "B" else found["sides"])))
            if source in left_out:
                raise LeftOut("source left out (--drop-sources)")
            pairs.append(clean_pair(found, i, short, kind, source))
        except Ambiguous as why:
            raise UserError(f"{where}: {why}") from None
        except Unusable as why:
            drops.append(Drop(why.reason, source, f"{where}: {why.detail}" if why.detail else where))
    if names and not pairs:
        reasons = Counter(drop.reason for drop in drops).most_common(3) or [("it has no rows", 0)]
        raise UserError(f"--{kind} {' '.join(names)}: none of {len(rows)} rows can be used; " + "; ".join(
            f"{count}: {reason}, first at {next((d.where for d in drops if d.reason == reason), names[0])}"
            for reason, count in reasons))
    return pairs, drops, seen


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with each column of --columns under its known name; `name=` leaves a column out."""
    known = {name: value for name, value in row.items() if name not in columns.values() and name not in columns}
    for name, column in columns.items():
        if column and row.get(column) is None:
            raise refused(row, f"no column '{column}'")
        known |= {name: row[column]} if column else {}
    return known


def clean_pair(found: dict[str, Any], index: int, short: str, kind: Kind, source: str) -> Pair:
    """The pair with the chosen response as A, unless its texts name the letters. Raises Unusable."""
    pair = Pair(**pair_fields(found, index, short, 0))
    if not fixed(pair):
        pair = pair if pair.winner == "A" else swap(pair)
        if not pair.context[-1]["content"].strip():
            raise Unusable("empty prompt")
        if not pair.response_a.strip() or not pair.response_b.strip():
            raise Unusable("empty response")
    if kind != "pairs":
        row = found["row"]
        meta = {"dataset": str(row["dataset"])} if kind == "math" and row.get("dataset") else pair.meta
        pair = replace(pair, pair_id=f"{kind}-{index}", category=kind, meta=meta)
        if kind == "skywork":
            pair = replace(pair, category=str(row.get("category") or CATEGORY.get(source, "")))
    return replace(pair, source=source)
