"""Preference pairs: one conversation, two candidate responses, and which of them is better.

`load_pairs` reads files and hub data sets in this project's own layout and in the published ones (formats/layouts.py;
docs/data.md in the repository describes them). Rows with a chosen and a rejected response become A and B by strict
alternation.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypedDict, TypeVar

from formats.layouts import LeftOut, Unusable, pair_fields, read_row
from formats.readers import read_rows, stem
from runtime import ranks
from runtime.errors import UserError
from runtime.seeds import derive_seed

T = TypeVar("T")


class Message(TypedDict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str


@dataclass(frozen=True)
class Pair:
    """`context` holds the shared turns; the last one is the user's. `trace` is a distilled chain with its verdict
    (SFT only). `messages` is a ready-made prompt; then context and responses are empty. Eq. 1"""

    pair_id: str
    source: str
    context: tuple[Message, ...]
    response_a: str
    response_b: str
    winner: Literal["A", "B"]
    category: str = ""
    meta: Mapping[str, str] = field(default_factory=dict)
    trace: str | None = None
    messages: tuple[Message, ...] | None = None


def preferred(pair: Pair) -> str:
    if pair.messages is not None:
        return pair.winner
    return pair.response_a if pair.winner == "A" else pair.response_b


def load_pairs(source: str) -> list[Pair]:
    """Read pairs from a .jsonl, .json, .csv, .tsv or .parquet file (also .gz) or a hub data set.

    Ties, equal responses and dialogues that diverge before the last turn are left out and counted. Raises UserError
    naming the place and the remedy: missing file, malformed line, unknown columns, no winner, nothing left.
    """
    pairs, left_out = list[Pair](), Counter[str]()
    for index, (where, row) in enumerate(read_rows(source)):
        try:
            pairs.append(read_pair(row, where, index, stem(source), len(pairs)))
        except LeftOut as why:
            left_out[why.reason] += 1
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    if not pairs:
        raise UserError(f"{source}: no pairs in it" + (f"; left out: {reasons}" if reasons else "; it has no rows"))
    if left_out and ranks.rank() == 0:
        print(f"{source}: {len(pairs)} pairs; left out: {reasons}", file=sys.stderr)
    return pairs


def save_pairs(pairs: Iterable[Pair]) -> str:
    """Pairs -> JSONL text that `load_pairs` reads back unchanged."""

    def row(pair: Pair) -> dict[str, Any]:
        left_out: dict[str, Any] = {"category": "", "meta": {}, "trace": None, "messages": None}
        if pair.messages is not None:
            left_out |= {"context": (), "response_a": "", "response_b": ""}
        return {k: v for k, v in asdict(pair).items() if k not in left_out or v != left_out[k]}

    return "".join(json.dumps(row(pair), ensure_ascii=False) + "\n" for pair in pairs)


def swap(pair: Pair) -> Pair:
    """A <-> B, the winner too. A ready-made prompt cannot be swapped (UserError)."""
    if pair.messages is not None:
        raise UserError(f"pair {pair.pair_id}: a ready-made prompt cannot be shown in the other order")
    other: Literal["A", "B"] = "B" if pair.winner == "A" else "A"
    return replace(pair, response_a=pair.response_b, response_b=pair.response_a, winner=other, trace=None)


def keep_fitting(items: Sequence[T], tokens: Callable[[T], int], limit: int, flag: str) -> list[T]:
    """Items of at most `limit` tokens; says how many are longer. UserError if none fits."""
    fitting = [item for item in items if tokens(item) <= limit]
    if not fitting:
        raise UserError(f"none of {len(items)} pairs fits {flag} {limit} tokens: raise it")
    if len(fitting) < len(items) and ranks.rank() == 0:
        print(f"{len(items) - len(fitting)} of {len(items)} pairs exceed {flag} {limit} tokens: left out")
    return fitting


def shard(items: Sequence[T], rank: int, world_size: int) -> list[T]:
    """This rank's `items[rank::world_size]`, the same length on every rank; says what it left out."""
    extra = len(items) % world_size
    if extra and rank == 0:
        print(f"{extra} of {len(items)} items left out, so that {world_size} ranks hold the same number")
    return list(items[: len(items) - extra][rank::world_size])


def stream(items: Sequence[T], start: int, count: int, seed: int) -> list[T]:
    """Items start .. start + count - 1 of an endless sequence of epochs, each a shuffle of its own.

    A pure function of its arguments, so a resumed run neither replays nor skips an item.
    """
    taken: list[T] = []
    while len(taken) < count:
        epoch, offset = divmod(start + len(taken), len(items))
        order = list(range(len(items)))
        random.Random(derive_seed(seed, "epoch", epoch)).shuffle(order)
        taken += [items[i] for i in order[offset : offset + count - len(taken)]]
    return taken


def read_pair(row: Mapping[str, Any], where: str, index: int, stem: str, turn: int,
              default: str | None = None) -> Pair:
    """One row of any layout -> Pair, as formats.layouts.pair_fields says; LeftOut or UserError with its place."""
    try:
        return Pair(**pair_fields(read_row(row), index, stem, turn, default))
    except Unusable as why:
        raise type(why)(why.reason, why.detail, where) from None
