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
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

from run import UserError, derive_seed, read_json, read_jsonl

T = TypeVar("T")


class Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Pair:
    """`context` are the shared turns, the last one the user's. `trace` is a distilled chain with its verdict
    (SFT only). `messages` is a ready-made prompt, used as it is; then context and responses are empty. Eq. 1"""

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


# ---- rows ----------------------------------------------------------------------------------------------


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


def read_pair(row: dict[str, Any], where: str, index: int, stem: str) -> Pair:
    """One row of any layout -> Pair. `index` counts rows from 0 and drives the A/B alternation."""
    row = {name: value for name, value in row.items() if value is not None}  # tables fill gaps with nulls
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds half a surrogate pair, which is no character; repair the text") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply for a row of texts") from None
    meta = row.get("meta", {})
    if not isinstance(meta, Mapping):
        raise UserError(f"{where}: 'meta' must be an object of texts")
    common: dict[str, Any] = {
        "pair_id": str(row.get("pair_id", row.get("id", f"{stem}-{index}"))),
        "source": str(row.get("source", stem)),
        "category": str(row.get("category") or ""),
        "meta": {str(k): str(v) for k, v in meta.items() if v is not None},
        "trace": row.get("trace"),
    }
    if common["trace"] is not None and not isinstance(common["trace"], str):
        raise UserError(f"{where}: 'trace' must be a text")
    if "context_messages" in row or ("messages" in row and "winner" in row and "chosen" not in row):
        return _ready_made(row, where, common)
    if "chosen" in row and "rejected" in row:
        context, chosen, rejected = _preference(row, where)
        a_wins = index % 2 == 0
        first, second = (chosen, rejected) if a_wins else (rejected, chosen)
        winner: Any = "A" if a_wins else "B"
    elif "response_a" in row and "response_b" in row:
        context = read_messages(row.get("context"), where, "context")
        first, second, winner = row["response_a"], row["response_b"], row.get("winner")
    else:
        raise UserError(f"{where}: need response_a and response_b, or chosen and rejected, "
                        f"or context_messages; found {', '.join(sorted(row)) or 'nothing'}")  # fmt: skip
    if winner not in ("A", "B"):
        raise UserError(f'{where}: \'winner\' must be "A" or "B", found {winner!r}')
    if not isinstance(first, str) or not isinstance(second, str):
        raise UserError(f"{where}: both responses must be texts")
    if first == second:
        raise UserError(f"{where}: the two responses are equal, so neither can be better; remove the row")
    if not context or context[-1]["role"] != "user":
        raise UserError(f"{where}: the conversation must end with a user message")
    return Pair(context=context, response_a=first, response_b=second, winner=winner, **common)


def _ready_made(row: dict[str, Any], where: str, common: dict[str, Any]) -> Pair:
    """The authors' layout: the prompt as messages, the winner as model_a/model_b or inside the SFT target."""
    messages = read_messages(row.get("context_messages") or row.get("messages"), where, "context_messages")
    winner: Any = {"model_a": "A", "model_b": "B", "A": "A", "B": "B"}.get(str(row.get("winner")))
    if winner is None:
        verdicts = re.findall(r"<answer>\[\[([AB])\]\]</answer>", str(row.get("winner")))
        if not verdicts or not isinstance(row["winner"], str):
            raise UserError(f"{where}: 'winner' is neither model_a/model_b nor a target text with a verdict")
        winner, common = verdicts[-1], common | {"trace": row["winner"]}
    if not messages or messages[-1]["role"] != "user":
        raise UserError(f"{where}: the conversation must end with a user message")
    return Pair(context=(), response_a="", response_b="", winner=winner, messages=messages, **common)


def _preference(row: dict[str, Any], where: str) -> tuple[tuple[Message, ...], str, str]:
    """{chosen, rejected} as texts beside `messages` or `prompt`, or as two conversations with one prefix."""
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        left, right = read_messages(chosen, where, "chosen"), read_messages(rejected, where, "rejected")
        if left[:-1] != right[:-1]:
            raise UserError(f"{where}: 'chosen' and 'rejected' are answers to different conversations")
        return left[:-1], left[-1]["content"], right[-1]["content"]
    if "prompt" in row and "messages" not in row:
        if not isinstance(row["prompt"], str):
            raise UserError(f"{where}: 'prompt' must be a text")
        return ({"role": "user", "content": row["prompt"]},), chosen, rejected
    return read_messages(row.get("messages"), where, "messages"), chosen, rejected


def read_messages(value: Any, where: str, name: str) -> tuple[Message, ...]:
    """Checked {role, content} messages; other keys are dropped."""
    if not isinstance(value, (list, tuple)) or not value:
        raise UserError(f"{where}: '{name}' must be a list of {{role, content}} messages")
    for message in value:
        ok = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not ok or message.get("role") not in ("system", "user", "assistant"):
            raise UserError(f"{where}: '{name}' holds {str(message)[:80]!r}, not a {{role, content}} message")
    return tuple({"role": m["role"], "content": m["content"]} for m in value)
