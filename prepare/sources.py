"""Published rows -> pairs, and what cannot be one.

A file that cannot be read is an error; a row that cannot be a pair is dropped with a reason, since real files
hold such rows and one of them must not stop the other 70,000. Layouts are formats/layouts.py's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data import Message, Pair, read_pair, save_pairs
from formats.layouts import Kind, Unusable, conversations, describe, lettered
from formats.readers import read_rows
from prepare.card import Drop, Signs, signs, watch
from runtime.errors import UserError


def make_pair(chosen: Sequence[Message], rejected: Sequence[Message], **names: Any) -> Pair:
    """The chosen response as A. Raises Unusable with the first reason why the two are not a pair."""
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("chosen and rejected differ before the response")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Unusable("the last turn is not the assistant's")
    if len(chosen) == 1 or chosen[-2]["role"] != "user":
        raise Unusable("the last shared turn is not the user's")
    good, bad = chosen[-1]["content"], rejected[-1]["content"]
    if not chosen[-2]["content"].strip():
        raise Unusable("empty prompt")
    if not good.strip() or not bad.strip():
        raise Unusable("empty response")
    if good == bad:
        raise Unusable("equal responses")
    return Pair(context=tuple(chosen[:-1]), response_a=good, response_b=bad, winner="A", **names)


def fixed(pair: Pair) -> bool:
    """Its letters are part of a text: a ready-made prompt or a trace names them."""
    return pair.messages is not None or pair.trace is not None


def read_source(
    kind: Kind, names: Sequence[str], left_out: Sequence[str] = (), first: int = 0, seed: int = 42
) -> tuple[list[Pair], list[Drop], list[Signs]]:
    """Usable rows of one kind of source as pairs with the chosen response as A, the others as drops.

    `first`: so many rows after a shuffle with `seed`, as the paper took its code rows; 0 takes all as they stand.
    """
    rows: list[tuple[str, str, int, dict[str, Any]]] = []
    for file in names:
        rows += [(where, Path(file).stem, i, row) for i, (where, row) in enumerate(read_rows(file))]
    if first:  # what the shuffle of `datasets` does, without the library
        rows = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:first]]
    pairs: list[Pair] = []
    drops: list[Drop] = []
    seen: list[Signs] = []
    for where, stem, i, row in watch(rows, f"clean {kind}"):
        row = {name: value for name, value in row.items() if value is not None}  # tables fill gaps with nulls
        source, category, meta = describe(kind, row, stem)
        try:
            talk = None if lettered(row) else conversations(kind, row)
            if talk:
                seen.append(signs(source, *talk))
            if source in left_out:
                raise Unusable("source left out (--drop-sources)")
            if talk:
                number = f"{kind}-{i}" if kind != "pairs" else str(row.get("pair_id", row.get("id", f"{stem}-{i}")))
                pair = make_pair(*talk, pair_id=number, source=source, category=category, meta=meta)
            else:
                pair = ready_made(row, where, i, stem)
            pairs.append(encodable(pair))
        except Unusable as why:
            drops.append(Drop(why.args[0], source, (where, *why.args[1:])[-1]))
    if rows and not pairs:
        reason, count = Counter(d.reason for d in drops).most_common(1)[0]
        place = next(d.where for d in drops if d.reason == reason)
        raise UserError(f"--{kind} {' '.join(names)}: none of {len(rows)} rows can be used; {count}: {reason}, the "
                        f"first at {place}. Do these rows belong to another flag (--help)?")
    return pairs, drops, seen


def ready_made(row: dict[str, Any], where: str, index: int, stem: str) -> Pair:
    try:
        return read_pair(row, where, index, stem)
    except UserError as error:
        raise Unusable("not a ready-made prompt or a pair with a trace", str(error)) from None


def encodable(pair: Pair) -> Pair:
    try:
        save_pairs([pair]).encode()
    except UnicodeEncodeError:
        raise Unusable("half a surrogate pair, which is no character") from None
    return pair
