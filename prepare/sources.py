"""Rows of preference data in the layouts in which they are published -> pairs, and what cannot be one.

    skywork   chosen, rejected: two conversations {role, content} with one prefix; source
    code      input, accepted, rejected: texts
    math      prompt, initial_reason_steps, full_chosen, full_rejected: texts; a response is the shared first
              steps and what follows them
    pairs     what data.load_pairs reads: plain {chosen, rejected}, the authors' ready-made prompts, our own rows

A file that cannot be read is an error; a row that cannot be a pair is dropped with a reason, since real files
hold such rows and one of them must not stop the other 70,000.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from card import Drop, Signs, signs, watch
from data import Message, Pair, read_messages, read_pair, read_rows, save_pairs
from run import UserError

Kind = Literal["math", "code", "skywork", "pairs"]
# Skywork's sources, by the paper's Table 5
CATEGORY = {"magpie_pro_llama3.1": "reasoning", "offset_bias": "chat", "helpsteer2": "chat", "magpie_pro": "chat",
            "wildguard": "safety", "magpie_ultra": "reasoning"}  # fmt: skip


class Unusable(Exception):
    """Why a row cannot be a pair: the reason, which the card counts, and at most one detail of this row."""


def text(row: dict[str, Any], name: str) -> str:
    if row.get(name) is None:
        raise Unusable(f"no column '{name}'")
    if not isinstance(row[name], str):
        raise Unusable(f"'{name}' is not a text")
    return row[name]


def turns(row: dict[str, Any], name: str) -> list[Message]:
    if row.get(name) is None:
        raise Unusable(f"no column '{name}'")
    try:
        return list(read_messages(row[name], "", name))
    except UserError:
        raise Unusable(f"'{name}' is not a list of {{role, content}} turns with texts") from None


def conversations(kind: Kind, row: dict[str, Any]) -> tuple[list[Message], list[Message]]:
    """(chosen, rejected): the shared turns, then the response. Raises Unusable."""
    context: list[Message]
    if kind == "skywork" or isinstance(row.get("chosen"), list):
        return turns(row, "chosen"), turns(row, "rejected")
    if kind == "code":
        context = [{"role": "user", "content": text(row, "input")}]
        good, bad = text(row, "accepted"), text(row, "rejected")
    elif kind == "math":  # an unfinished solution has nothing after the shared steps: kept, as in the paper
        context, steps = [{"role": "user", "content": text(row, "prompt")}], text(row, "initial_reason_steps")
        good, bad = steps + text(row, "full_chosen"), steps + text(row, "full_rejected")
    elif "response_a" in row or "response_b" in row:
        if row.get("winner") not in ("A", "B"):
            raise Unusable("'winner' is neither A nor B")
        sides = [text(row, "response_a"), text(row, "response_b")]
        context, (good, bad) = turns(row, "context"), sides if row["winner"] == "A" else sides[::-1]
    else:
        good, bad = text(row, "chosen"), text(row, "rejected")
        plain = "prompt" in row and "messages" not in row
        context = [{"role": "user", "content": text(row, "prompt")}] if plain else turns(row, "messages")
    return [*context, {"role": "assistant", "content": good}], [*context, {"role": "assistant", "content": bad}]


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


def describe(kind: Kind, row: dict[str, Any], stem: str) -> tuple[str, str, dict[str, str]]:
    """(source, category, meta) of a row."""
    if kind == "code":
        return "code_preference_pairs", "code", {}
    if kind == "math":
        return "math_step_dpo", "math", {"dataset": str(row["dataset"])} if row.get("dataset") else {}
    source = str(row.get("source") or stem).encode(errors="replace").decode()  # a drop's source is written too
    meta = row["meta"] if isinstance(row.get("meta"), dict) else {}
    category = str(row.get("category") or (CATEGORY.get(source, "") if kind == "skywork" else ""))
    return source, category, {str(k): str(v) for k, v in meta.items() if v is not None}


def lettered(row: dict[str, Any]) -> bool:
    """A row with a trace or a ready-made prompt, whose text speaks of A and B."""
    return "trace" in row or "context_messages" in row or ("chosen" not in row and {"messages", "winner"} <= row.keys())


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
                        f"first at {place}. Do these rows belong to another flag (--help)?")  # fmt: skip
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
