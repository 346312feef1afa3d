"""A row of any known layout -> the fields of a pair, dict to dict.

A row says what was asked, gives two responses, and says which one is better. The tables below list the columns in
which data sets publish each of the three; where two columns could be meant, the row is refused and nothing is guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from os.path import commonprefix
from typing import Any

from runtime.errors import UserError

LAYOUTS = {  # what a refused row is compared with
    "this project's own": "context response_a response_b winner",
    "TRL's explicit prompt": "prompt chosen rejected",
    "TRL's implicit prompt, UltraFeedback, Skywork, hh-rlhf": "chosen rejected",
    "HelpSteer3": "context response1 response2 overall_preference",
    "HelpSteer2 preferences": "prompt response_1 response_2 preference_strength",
    "MT-bench and Arena conversations": "conversation_a conversation_b winner",
    "JudgeBench": "question response_A response_B label",
}
PROMPTS = ("context", "messages", "conversations", "conversation", "prompt", "question", "instruction", "input")
ORDERED = (("chosen", "rejected"), ("accepted", "rejected"))  # the first one is better
ENDS = {("_a", "_b"): 0, ("_A", "_B"): 0, ("_0", "_1"): 0, ("_1", "_2"): 1, ("1", "2"): 1}  # the number of the first
COMPARED = {(name + first, name + second): number for name in ("response", "answer", "output", "completion",
            "conversation") for (first, second), number in ENDS.items()} | {("a", "b"): 0, ("A", "B"): 0}
WINNERS = ("winner", "label", "preference", "preferred", "better", "choice", "better_response_id")
STRENGTHS = ("overall_preference", "preference_strength")  # below 0: the first, above 0: the second, 0: a tie
FLAGS = ("winner_model_a", "winner_model_b", "winner_tie")
ROLES = {"system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant", "model": "assistant", "bot": "assistant", "function_call": "assistant", "tool": "tool",
         "function": "tool", "observation": "tool", "ipython": "tool"}
_TIE = re.compile(r"ties?|tie \(.*\)|both[ _]?bad|both|equal|same|draw|a=b")
_WINNER = re.compile(r"(model|response|answer|output|completion|assistant)?[ _]?([ab]|[0-9])")

Row = Mapping[str, Any]
Turns = list[dict[str, str]]


class Unusable(UserError):
    """A row that cannot be a pair: the reason, which is counted, and what is particular to this row."""

    def __init__(self, reason: str, detail: str = "", where: str = ""):
        self.reason, self.detail = reason, detail
        super().__init__(f"{where}: " * bool(where) + reason + f" ({detail})" * bool(detail))


class LeftOut(Unusable):
    """A sound row that is no pair: neither response is better, or the dialogues diverge before the last turn."""


class Ambiguous(Unusable):
    """A winner that can be read in two ways. It stops a whole file: the other rows would be read in the wrong way."""


# ---- a row of any layout -------------------------------------------------------------------------------


def pair_fields(found: dict[str, Any], index: int, stem: str, turn: int, default: str | None = None) -> dict[str, Any]:
    """What `read_row` found -> the fields of a `data.Pair`; raises Unusable.

    `index` names a row without an id. `turn` counts pairs from 0: of rows with a chosen response the even ones have
    it as A. `default` is the winner of a row that names none, or a tie; then equal responses are no reason either.
    """
    names = {"pair_id": found.get("pair_id", f"{stem}-{index}"), "source": found.get("source", stem),
             **{name: found[name] for name in ("category", "meta", "trace")}}
    winner = found["winner"] if found["winner"] in ("A", "B") else default or found["winner"]
    if winner not in ("A", "B"):
        raise LeftOut("a tie") if winner else refused(found["row"], "no winner")
    if "messages" in found:
        return names | {"context": (), "response_a": "", "response_b": "", "winner": winner,
                        "messages": tuple(found["messages"])}
    context, first, second = split_sides(*found["sides"])
    if first == second and default is None:
        raise LeftOut("equal responses")
    if found["ordered"] and turn % 2:
        first, second, winner = second, first, "B"
    return names | {"context": tuple(context), "response_a": first, "response_b": second, "winner": winner}


def read_row(row: Row) -> dict[str, Any]:
    """{sides: two whole conversations, winner: A, B, tie or None, ordered: is the first always better?} or, of a
    ready-made prompt, {messages, winner}; and the row's names. Raises Unusable."""
    row = {name: value for name, value in row.items() if value is not None}  # tables fill gaps with nulls
    row = row | arena_55k(row) if all(name in row for name in FLAGS) else row
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except (UnicodeEncodeError, RecursionError):
        raise Unusable("half a surrogate pair, which is no character, or nested too deeply; repair the row") from None
    pairs = [names for names in (*ORDERED, *COMPARED) if names[0] in row and names[1] in row]
    if "context_messages" in row or ({"messages", "winner"} <= row.keys() and (not pairs or "context" in row)):
        return names_of(row) | ready_made(row)
    if "initial_reason_steps" in row:  # a response is the shared first steps and what follows them
        steps, pairs = text(row, "initial_reason_steps"), [("full_chosen", "full_rejected")]
        row = row | {name: steps + text(row, name) for name in pairs[0]}
    if len(pairs) != 1:
        raise refused(row, "two or more pairs of responses" if pairs else "one response a row: join the rows of a "
                      "prompt to pairs first" if "response" in row else "no two responses")
    names, ordered = pairs[0], pairs[0] not in COMPARED
    return names_of(row) | {"row": row, "sides": read_sides(row, *names), "ordered": ordered,
                            "winner": "A" if ordered else read_winner(row, *names)}


def arena_55k(row: Row) -> dict[str, Any]:
    """The columns of other layouts: three flags name the winner, what each speaker said is a JSON list in a text."""
    flags = [str(row[name]).removesuffix(".0") for name in FLAGS]
    if sorted(flags) != ["0", "0", "1"]:
        raise Unusable(f"not one of {', '.join(FLAGS)} is 1", repr(flags)[:80])
    found: dict[str, Any] = {"winner": ("A", "B", "tie")[flags.index("1")]}
    try:
        asked, *said = (json.loads(text(row, name)) for name in ("prompt", "response_a", "response_b"))
    except (ValueError, RecursionError):
        return found  # plain texts
    if not all(isinstance(turns, list) and len(turns) == len(asked) > 0 for turns in (asked, *said)):
        return found
    first, second = (alternate(zip(asked, turns, strict=True), "prompt") for turns in said)
    return found | {"prompt": None, "response_a": first, "response_b": second}


def names_of(row: Row) -> dict[str, Any]:
    """The fields that say which pair it is, where the row has them."""
    if not isinstance(meta := row.get("meta", {}), Mapping):
        raise Unusable("'meta' must be an object of texts")
    given = {"pair_id": row.get("pair_id", row.get("id")), "source": row.get("source")}
    return {name: str(value) for name, value in given.items() if value is not None} | {
        "category": str(row.get("category") or ""), "trace": text(row, "trace") if "trace" in row else None,
        "meta": {str(k): str(v) for k, v in meta.items() if v is not None}}


def ready_made(row: Row) -> dict[str, Any]:
    """The authors' published rows: a prompt as messages, the winner as model_a, model_b or inside the SFT target."""
    name, target = "context_messages" if "context_messages" in row else "messages", row.get("winner")
    messages = read_turns(row, name)
    if messages[-1]["role"] != "user":
        raise Unusable("the conversation must end with a user message")
    verdicts = re.findall(r"<answer>\[\[([AB])\]\]</answer>", target) if isinstance(target, str) else []
    winner = {"model_a": "A", "model_b": "B", "A": "A", "B": "B"}.get(str(target)) or (verdicts or [None])[-1]
    if "winner" in row and winner is None:
        raise Unusable("'winner' is neither model_a, model_b nor a target text with a verdict", repr(target)[:80])
    return {"row": row, "messages": messages, "winner": winner} | ({"trace": target} if verdicts else {})


def split_sides(first: Turns, second: Turns) -> tuple[Turns, str, str]:
    """(shared turns, first response, second response) of two whole conversations."""
    if first[-1]["role"] != "assistant" or second[-1]["role"] != "assistant":
        raise Unusable("the last turn is not the assistant's")
    if first[:-1] != second[:-1]:
        raise LeftOut("the dialogues part before the last turn")
    if len(first) == 1 or first[-2]["role"] not in ("user", "tool"):
        raise Unusable("the conversation must end with a user message before the responses")
    return first[:-1], first[-1]["content"], second[-1]["content"]


def refused(row: Row, what: str) -> Unusable:
    """What a row lacks, the columns that it has, and the known layout that comes nearest."""
    asked = set(PROMPTS) if any(name in row for name in PROMPTS) else set()
    lacks = {name: [column for column in layout.split() if column not in {*row, *asked}]
             for name, layout in LAYOUTS.items()}
    name = min(LAYOUTS, key=lambda name: len(lacks[name]) / len(LAYOUTS[name].split()))
    return Unusable(what, f"columns found: {', '.join(map(str, row))[:200] or 'none'}; nearest known layout: {name} "
                          f"({LAYOUTS[name].replace(' ', ', ')}), missing: {', '.join(lacks[name]) or 'nothing'}; "
                          "other names: prepare.build_data --columns prompt=NAME,chosen=NAME,rejected=NAME")


# ---- what was asked and answered -----------------------------------------------------------------------


def read_sides(row: Row, first: str, second: str) -> tuple[Turns, Turns]:
    """Both conversations from their first turn to the response."""
    given = {name: as_turns(row, name, "user") for name in PROMPTS if row.get(name) is not None}
    if "instruction" in given and isinstance(more := row.get("input"), str):  # the two halves of an Alpaca prompt
        given["instruction"] = [{"role": "user", "content": f"{text(row, 'instruction')}\n{more}".strip()}]
        del given["input"]
    if not given and isinstance(row[first], str) and isinstance(row[second], str):
        one, two = from_transcripts(row, first, second)
    else:
        one, two = as_turns(row, first, "assistant"), as_turns(row, second, "assistant")
    if first.startswith("conversation") and type(row.get("turn")) is int and row["turn"] > 0:  # the one that was judged
        one, two = one[: 2 * row["turn"]], two[: 2 * row["turn"]]
    whole = one[0]["role"] != "assistant"
    start = one if whole else max(given.values(), key=len, default=[])
    for name, turns in given.items():
        if turns != start[: len(turns)] and (len(turns) > 1 or turns[0] not in start):
            raise Unusable(f"'{name}' is not a part of the conversation; --columns {name}= leaves it out")
    if not start:
        raise refused(row, "no prompt")
    if row.get("tools") not in (None, "", [], "[]"):
        raise Unusable("a column 'tools', which the prompt has no place for; --columns tools= leaves it out")
    before = [{"role": "system", "content": text(row, name)} for name in ("system", "system_prompt") if row.get(name)]
    before += history_turns(row)
    if start[: len(before)] == before:
        before = []
    if before[:1] and before[0]["role"] == start[0]["role"] == "system":
        raise Unusable("two different system texts")
    before += [] if whole else start
    return before + one, before + two


def as_turns(row: Row, name: str, role: str) -> Turns:
    """A text as one turn of `role`, a message as one turn, a list of messages as it is."""
    value = row[name]
    if isinstance(value, str) and role == "user" and "preference_strength" in row:  # HelpSteer2: all turns in one text
        said = re.split(r"\n?<extra_id_1>(?:User|Assistant)\n", value)
        return [{"role": ("user", "assistant")[i % 2], "content": words} for i, words in enumerate(said)]
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return read_turns({name: value if isinstance(value, list) else [value]}, name)


def history_turns(row: Row) -> Turns:
    """Earlier turns, as messages or as [question, answer] pairs."""
    past = row.get("history") or []
    paired = isinstance(past, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in past)
    return alternate(past, "history") if paired else read_turns(row, "history")


def alternate(pairs: Iterable[Any], name: str) -> Turns:
    return [{"role": role, "content": content(said, name)} for pair in pairs
            for role, said in zip(("user", "assistant"), pair, strict=True)]


def read_messages(value: Any, where: str, name: str) -> tuple[Any, ...]:
    """Checked {role, content} messages; UserError names the place."""
    try:
        return tuple(read_turns({name: value}, name))
    except Unusable as why:
        raise UserError(f"{where}: {why}") from None


def read_turns(row: Row, name: str) -> Turns:
    """Messages as {role, content} or ShareGPT's {from, value}; other keys are dropped, calls of tools become text."""
    value, turns = row[name], Turns()
    if not isinstance(value, (list, tuple)) or not value:
        raise Unusable(f"'{name}' is not a list of {{role, content}} messages", repr(value)[:80])
    for message in value:
        said = message if isinstance(message, dict) else {}
        role = ROLES.get(str(said.get("role", said.get("from"))).lower())
        if role is None:
            raise Unusable(f"'{name}' holds something else than {{role, content}} messages", repr(message)[:80])
        calls = said.get("tool_calls") or said.get("function_call")
        body = said.get("content", said.get("value"))
        texts = [content(body, name)] if body or not calls else []
        texts += [json.dumps(calls, ensure_ascii=False, default=str)] if calls else []
        turns.append({"role": role, "content": "\n".join(texts)})
    return turns


def content(value: Any, name: str) -> str:
    """A text, or the texts of a message in parts."""
    parts = value if isinstance(value, list) else [value]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not texts or not all(isinstance(said, str) for said in texts):
        raise Unusable(f"'{name}' holds a message whose content is not text", repr(value)[:80])
    return "\n".join(map(str, texts))


def text(row: Row, name: str) -> str:
    if not isinstance(row.get(name), str):
        raise Unusable(f"'{name}' is not a text" if row.get(name) is not None else f"no column '{name}'")
    return str(row[name])


def from_transcripts(row: Row, first: str, second: str) -> tuple[Turns, Turns]:
    """Two texts of `Human: ... Assistant: ...`. What follows the last label that both share is the response, whatever
    stands in it; a further label in there means that the dialogues part earlier."""
    shared = commonprefix([row[first], row[second]])  # noqa: RUF071 - of texts, not of paths
    label = re.compile(r"(?:^\s*|%s)(Human|Assistant):" % (r"\n\n" if "\n\nAssistant:" in shared else r"\s"))
    found = list(label.finditer(shared))
    if not found or found[0].start() or any(m[1] != ("Human", "Assistant")[i % 2] for i, m in enumerate(found)):
        raise refused(row, "no prompt")
    answers = [row[name][found[-1].end():] for name in (first, second)]
    if len(found) % 2 or any(map(label.search, answers)):
        raise LeftOut("the dialogues part before the last turn")
    pieces = [piece.strip() for piece in label.split(shared[: found[-1].start()])]
    turns = alternate(zip(pieces[2::4], [*pieces[4::4], answers[0].strip()], strict=True), first)
    return turns, [*turns[:-1], {"role": "assistant", "content": answers[1].strip()}]


# ---- which is better -----------------------------------------------------------------------------------


def read_winner(row: Row, first: str, second: str) -> str | None:
    """A, B, tie, or None where no column says it."""
    for name in STRENGTHS:
        if name in row:
            strength = str(row[name])
            if not re.fullmatch(r"-?[0-9](\.[0-9]+)?", strength):
                raise Unusable(f"'{name}' is not a number", strength[:80])
            return "tie" if float(strength) == 0 else "A" if float(strength) < 0 else "B"
    label = next((name for name in WINNERS if name in row), None)
    return letter(row[label], label, COMPARED[first, second], first) if label else None


def letter(value: Any, name: str, number: int, first: str) -> str:
    """The winner that a label names; `number` is the number of the first response. A bare 0 or 1 beside columns that
    are called a and b counts from 0, but where another row has -1 or 0.5 it may be no index."""
    said = re.sub(r"\.0+$", "", str(value).strip().lower())
    if _TIE.fullmatch(said):
        return "tie"
    match = _WINNER.fullmatch({"a>b": "a", "b>a": "b"}.get(said, said))
    if not match:
        kind = Ambiguous if re.fullmatch("[-+.0-9e]+", said) else Unusable
        raise kind(f"'{name}' names no winner", repr(value)[:80])
    if match[2] in "ab":
        return match[2].upper()
    if (place := int(match[2]) - number) not in (0, 1) or (match[1] and first[-1].lower() == "a"):
        raise Ambiguous(f"'{name}' is {value!r}, which may count from 0 or from 1")
    return "AB"[place]
