"""Preference pairs: one conversation, two candidate responses, and which of them is better.

Three row layouts are read, from JSONL, JSON, parquet or a hub data set:
  {context, response_a, response_b, winner, ...}  this project's own
  {chosen, rejected, messages | prompt}           plain preferences; A/B by strict alternation
  {context_messages, winner}                      the authors' published rows: a ready-made prompt; winner is
                                                  model_a/model_b, or the whole target text in the SFT set
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

from formats.layouts import own_row
from formats.readers import read_rows
from runtime.errors import UserError
from runtime.seeds import derive_seed

T = TypeVar("T")


class Message(TypedDict):
    role: Literal["system", "user", "assistant"]
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
    """Read pairs from a .jsonl, .json or .parquet file or a hub data set (its `train` split).

    Raises UserError naming the place and the remedy: missing file, malformed line, no winner, equal
    responses, a conversation that does not end with the user, an empty data set.
    """
    pairs = [read_pair(row, where, index, Path(source).stem) for index, (where, row) in enumerate(read_rows(source))]
    if not pairs:
        raise UserError(f"{source}: no pairs in it; expected one JSON object a line")
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


def read_pair(row: dict[str, Any], where: str, index: int, stem: str) -> Pair:
    """One row of any layout -> Pair. `index` counts rows from 0 and drives the A/B alternation."""
    return Pair(**own_row(row, where, index, stem))
