"""The model in use: which of two responses is better, and the chain of rubrics that says why.

    from judge import Judge
    verdict = Judge.load("runs/grpo").pair("What is 2+2?", "4.", "5.")     # verdict.winner is "A"

    python judge.py pairs --model runs/grpo --question "What is 2+2?" --a "4." --b "5."
    python judge.py pairs --model runs/grpo --data pairs.jsonl --json > verdicts.jsonl
    some-program | python judge.py pairs --model runs/grpo --json           # a line in, a line out

A row is {"question" or "context", "response_a", "response_b"}; it needs no winner. Without a verdict, or
with as many votes for A as for B, the winner is None.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import tyro

import run
from cor_prompt import Style, Trace, parse_trace, render
from data import Message, Pair, read_pair
from reward import Letter
from rollout import Chat, Judgement, judge_pairs, load_sampler, majority, named
from run import UserError, visible


@dataclass(frozen=True)
class Chain:
    """One sample. `verdict` is the response it names; in order "BA" the text itself calls it by the other
    letter, because response_b was shown as A."""

    order: Literal["AB", "BA"]
    sample: int
    verdict: Letter | None
    finish_reason: Literal["stop", "length"]
    parts: Trace
    text: str


@dataclass(frozen=True)
class Verdict:
    """The response that most chains name (None: a tie or none), all votes, and the chains themselves."""

    winner: Letter | None
    votes: Mapping[str, int]  # {"A": 3, "B": 1, "none": 0}
    traces: tuple[Chain, ...]


class Judge:
    """A sampler with its prompt. `sampler` is anything with `chat`."""

    def __init__(self, sampler: Chat, style: Style = "instruct", system: str | None = None,
                 max_tokens: int = 2048, seed: int = 0):  # fmt: skip
        self.sampler, self.style, self.system = sampler, style, system
        self.max_tokens, self.seed = max_tokens, seed

    @classmethod
    def load(cls, path: str, dtype: str = "float32", **settings: Any) -> Judge:
        """A judge from a `from_pretrained` folder, a run folder or a hub id; `settings` as above."""
        return cls(load_sampler(path, dtype), **settings)

    def pair(self, context: str | Sequence[Message], response_a: str, response_b: str, votes: int = 1,
             temperature: float = 0.0, both_orders: bool = False) -> Verdict:  # fmt: skip
        """Which response answers the question, or the conversation that ends with the user, better?"""
        if isinstance(context, str):
            context = [{"role": "user", "content": context}]
        pair = Pair("pair", "judge", tuple(context), response_a, response_b, winner="A")  # any winner will do
        return self.pairs([pair], votes, temperature, both_orders)[0]

    def pairs(self, pairs: Sequence[Pair], votes: int = 1, temperature: float = 0.0,
              both_orders: bool = False) -> list[Verdict]:  # fmt: skip
        """A verdict for each pair; their `winner` is not looked at. Raises UserError for settings that
        cannot work."""
        if votes < 1 or (votes > 1 and temperature == 0):
            raise UserError("votes: at least 1, and several need a temperature above 0, such as 1.0")
        if not (math.isfinite(temperature) and temperature >= 0):
            raise UserError(f"temperature {temperature}: must be 0 or more")
        judgements = judge_pairs(self.sampler, pairs, self.style, n=votes, temperature=temperature,
                                 max_tokens=self.max_tokens, seed=self.seed, both_orders=both_orders,
                                 system=self.system)  # fmt: skip
        chains = votes * (2 if both_orders else 1)  # a pair's verdicts come one after the other
        return [count(islice(judgements, chains)) for _ in pairs]


def count(judgements: Iterable[Judgement]) -> Verdict:
    """All verdicts on one pair -> the majority's."""
    traces = tuple(map(chain, judgements))
    votes = [trace.verdict for trace in traces]
    return Verdict(majority(votes), {"A": votes.count("A"), "B": votes.count("B"), "none": votes.count(None)}, traces)


def chain(j: Judgement) -> Chain:
    return Chain(j.order, j.sample, named(j), j.finish_reason, parse_trace(j.text), j.text)


# ---- the command ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Judge one pair from flags, the pairs of a file, or those that come on standard input, line by line."""

    model: str
    """The judge: a `from_pretrained` folder, a run folder or a hub id."""
    question: str | None = None
    """What was asked (text), with --a and --b."""
    a: str | None = None
    """Response A (text)."""
    b: str | None = None
    """Response B (text)."""
    data: str | None = None
    """JSONL file of pairs; without it and without --question they are read from standard input."""
    json: bool = False
    """Print one JSON line per pair."""
    style: Style = "instruct"
    """Which prompt the judge sees (cor_prompt.py)."""
    prompt_file: str = ""
    """Text file that replaces the style's fixed wording; empty: the built-in wording."""
    votes: int = 1
    """Verdicts per pair and order, of which the majority counts (samples)."""
    temperature: float = 0.0
    """Sampling temperature; 0 takes the likeliest token."""
    both_orders: bool = False
    """Show every pair in both orders and let all verdicts vote."""
    max_tokens: int = 2048
    """Longest chain (tokens)."""
    seed: int = 0
    """Seed of the samples (an integer)."""
    at_once: int = 1
    """Pairs judged together (pairs). More is faster for a file; a dialogue over pipes needs 1."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number type of the judge's weights."""


def judge_rows(cfg: Pairs, sampler: Chat | None = None) -> None:
    """Print a verdict per row as it comes. `sampler` replaces --model."""
    flags = (cfg.question, cfg.a, cfg.b)
    if any(flag is not None for flag in flags) and (None in flags or cfg.data is not None):
        raise UserError("--question, --a and --b go together, and without --data")
    if cfg.at_once < 1 or cfg.max_tokens < 1:
        raise UserError("--at-once and --max-tokens must be at least 1")
    system = run.read_prompt(cfg.prompt_file)
    render(Pair("", "", ({"role": "user", "content": ""},), "", "", "A"), cfg.style, system)  # a usable prompt file
    found = parsed(rows(cfg))
    judge = Judge(sampler or load_sampler(cfg.model, cfg.dtype), cfg.style, system, cfg.max_tokens, cfg.seed)
    while part := list(islice(found, cfg.at_once)):
        verdicts = judge.pairs([pair for pair, _ in part], cfg.votes, cfg.temperature, cfg.both_orders)
        for (pair, labelled), verdict in zip(part, verdicts, strict=True):
            correct = {"correct": verdict.winner == pair.winner} if labelled else {}
            show = as_json if cfg.json else as_text
            print(show(pair, verdict, correct), flush=True)


def rows(cfg: Pairs) -> Iterator[tuple[str, Any]]:
    """(place for error messages, row) from flags, file or standard input."""
    if cfg.question is not None:
        yield "flags", {"question": cfg.question, "response_a": cfg.a, "response_b": cfg.b}
    elif cfg.data is not None:
        yield from ((f"{cfg.data}:{number}", row) for number, row in run.read_jsonl(Path(cfg.data)))
    else:
        for number, line in enumerate(sys.stdin.buffer, 1):
            if line.strip():
                yield f"standard input:{number}", decode(line, f"standard input:{number}")


def decode(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not one JSON object a line ({error})") from None


def parsed(found: Iterable[tuple[str, Any]]) -> Iterator[tuple[Pair, bool]]:
    """(pair, does the row know its winner) of each row; a missing winner is filled in with any letter."""
    for index, (where, row) in enumerate(found):
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
        labelled = row.get("winner") is not None or "chosen" in row
        full = row if labelled else row | {"winner": "A"}
        if isinstance(asked := row.get("question", row.get("context")), str):
            full = full | {"context": [{"role": "user", "content": asked}]}
        yield read_pair(full, where, index, "pair"), labelled


def as_json(pair: Pair, verdict: Verdict, correct: dict[str, bool]) -> str:
    return json.dumps({"pair_id": pair.pair_id, "source": pair.source} | correct | asdict(verdict))


def as_text(pair: Pair, verdict: Verdict, correct: dict[str, bool]) -> str:
    """Every chain, then the verdict. Chains are indented, so that none can pass for our own lines."""
    lines = [f"==== {' '.join(visible(pair.pair_id).split())}"]
    for trace in verdict.traces:
        swapped = "" if trace.order == "AB" else ", response B shown as A"
        cut = "" if trace.finish_reason == "stop" else ", cut off" if trace.text else ", the prompt is too long"
        names = f"for response {trace.verdict}" if trace.verdict else "no verdict"
        lines.append(f"---- chain {trace.sample + 1}{swapped}{cut}: {names}")
        lines += [f"  {visible(line)}" for line in trace.text.split("\n")]
    votes = ", ".join(f"{name} {number}" for name, number in verdict.votes.items())
    right = "".join(f", {'right' if ok else 'wrong'}" for ok in correct.values())
    return "\n".join([*lines, f"==== verdict: {verdict.winner or 'none'} (votes: {votes}){right}\n"])


def main() -> None:
    judge_rows(tyro.extras.subcommand_cli_from_dict({"pairs": Pairs}))


if __name__ == "__main__":
    run.start(main)
