"""Rows in the layouts in which preference data are published -> rows in this project's own, dict to dict.

{context, response_a, response_b, winner, ...}  this project's own
{chosen, rejected, messages | prompt}           plain preferences; A/B by strict alternation
{context_messages, winner}                      the authors' published rows: a ready-made prompt
skywork   chosen, rejected: two conversations {role, content} with one prefix; source
code      input, accepted, rejected: texts
math      prompt, initial_reason_steps, full_chosen, full_rejected: texts; a response is the shared first
          steps and what follows them
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from runtime.errors import UserError

Kind = Literal["math", "code", "skywork", "pairs"]
# Skywork's sources, by the paper's Table 5
CATEGORY = {"magpie_pro_llama3.1": "reasoning", "offset_bias": "chat", "helpsteer2": "chat", "magpie_pro": "chat",
            "wildguard": "safety", "magpie_ultra": "reasoning"}


def own_row(row: dict[str, Any], where: str, index: int, stem: str) -> dict[str, Any]:
    """One row of any layout -> the fields of a `data.Pair`; UserError names the place of a row that cannot be one."""
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
                        f"or context_messages; found {', '.join(sorted(row)) or 'nothing'}")
    if winner not in ("A", "B"):
        raise UserError(f'{where}: \'winner\' must be "A" or "B", found {winner!r}')
    if not isinstance(first, str) or not isinstance(second, str):
        raise UserError(f"{where}: both responses must be texts")
    if first == second:
        raise UserError(f"{where}: the two responses are equal, so neither can be better; remove the row")
    if not context or context[-1]["role"] != "user":
        raise UserError(f"{where}: the conversation must end with a user message")
    return dict(context=context, response_a=first, response_b=second, winner=winner, **common)


def _ready_made(row: dict[str, Any], where: str, common: dict[str, Any]) -> dict[str, Any]:
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
    return dict(context=(), response_a="", response_b="", winner=winner, messages=messages, **common)


def _preference(row: dict[str, Any], where: str) -> tuple[tuple[Any, ...], str, str]:
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


def read_messages(value: Any, where: str, name: str) -> tuple[Any, ...]:
    """Checked {role, content} messages; other keys are dropped."""
    if not isinstance(value, (list, tuple)) or not value:
        raise UserError(f"{where}: '{name}' must be a list of {{role, content}} messages")
    for message in value:
        ok = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not ok or message.get("role") not in ("system", "user", "assistant"):
            raise UserError(f"{where}: '{name}' holds {str(message)[:80]!r}, not a {{role, content}} message")
    return tuple({"role": m["role"], "content": m["content"]} for m in value)


class Unusable(Exception):
    """Why a row cannot be a pair: the reason, which the card counts, and at most one detail of this row."""


def text(row: dict[str, Any], name: str) -> str:
    if row.get(name) is None:
        raise Unusable(f"no column '{name}'")
    if not isinstance(row[name], str):
        raise Unusable(f"'{name}' is not a text")
    return row[name]


def turns(row: dict[str, Any], name: str) -> list[Any]:
    if row.get(name) is None:
        raise Unusable(f"no column '{name}'")
    try:
        return list(read_messages(row[name], "", name))
    except UserError:
        raise Unusable(f"'{name}' is not a list of {{role, content}} turns with texts") from None


def conversations(kind: Kind, row: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """(chosen, rejected): the shared turns, then the response. Raises Unusable."""
    context: list[Any]
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
