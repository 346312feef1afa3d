"""Pairs -> verdicts (`judge_pairs`), and what many verdicts say: accuracy, consistency, a majority.

Needs no model, only something that answers `chat`: a sampler of rollout.py, a server, a function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cor_prompt import Style, render
from data import Pair, swap
from reward import Letter, Rule, parse_verdict
from rollout import Chat
from runtime.errors import UserError
from runtime.seeds import derive_seed


@dataclass(frozen=True)
class Judgement:
    """One verdict. `verdict` and `winner` are letters as shown: order "BA" shows response_b as A."""

    pair_id: str
    source: str
    category: str
    meta: Mapping[str, str]
    order: Literal["AB", "BA"]
    sample: int
    verdict: Letter | None
    winner: Letter
    correct: bool
    finish_reason: Literal["stop", "length"]
    response_tokens: int
    text: str


def judge_pairs(sampler: Chat, pairs: Sequence[Pair], style: Style, *, n: int = 1, temperature: float = 0.0,
                max_tokens: int, seed: int = 0, both_orders: bool = False, rule: Rule = "eval",
                system: str | None = None, at_once: int = 256, done: Container[tuple[str, str, str]] = (),
                prompt: Callable = render, read: Callable = parse_verdict) -> Iterator[Judgement]:
    """Judge every pair n times (in both orders if asked), `at_once` verdicts a call; yields as they come. What is
    `done` (source, pair_id, order) is left out. A judge of another kind brings its own `prompt` and `read`.

    Used for held-out accuracy in training, evaluation, the judge and distillation. Seeds depend on
    (seed, pair, order) alone, so an interrupted evaluation continues with the same samples.
    """
    orders: tuple[Literal["AB", "BA"], ...] = ("AB", "BA") if both_orders else ("AB",)
    shown = [(pair if order == "AB" else swap(pair), order) for pair in pairs for order in orders
             if (pair.source, pair.pair_id, order) not in done]
    step = max(1, at_once // n)
    for start in range(0, len(shown), step):
        part = shown[start : start + step]
        conversations = [prompt(pair, style, system) for pair, _ in part]
        seeds = [derive_seed(seed, pair.source, pair.pair_id, order) for pair, order in part]
        for (pair, order), replies in zip(
            part, sampler.chat(conversations, n, temperature, max_tokens, seeds), strict=True
        ):
            for sample, reply in enumerate(replies):
                verdict = read(reply.text if rule == "official" else reply.answer, rule)
                yield Judgement(pair.pair_id, pair.source, pair.category, pair.meta, order, sample, verdict,
                                pair.winner, verdict == pair.winner, reply.finish_reason,
                                reply.response_tokens, reply.text)


def check_sampling(votes: int, temperature: float) -> None:
    """Raises UserError for votes that would all be the same, or none."""
    if votes < 1 or (votes > 1 and temperature == 0):
        raise UserError("--votes: at least 1, and several need a --temperature above 0, such as 1.0")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"--temperature {temperature}: must be 0 or more")


def named(judgement: Judgement) -> Letter | None:
    """The response a verdict stands for, whichever letter it was shown under."""
    other: dict[Letter | None, Letter | None] = {"A": "B", "B": "A", None: None}
    return judgement.verdict if judgement.order == "AB" else other[judgement.verdict]


def better(judgement: Judgement) -> Letter | None:
    """The response that is better, whichever letter it was shown under."""
    return named(replace(judgement, verdict=judgement.winner))


def majority(votes: Iterable[Letter | None]) -> Letter | None:
    """The response that most verdicts name; a tie is no verdict."""
    seen = list(votes)
    a, b = seen.count("A"), seen.count("B")
    return None if a == b else "A" if a > b else "B"


def tally(judgements: Iterable[Judgement]) -> dict[str, float]:
    """accuracy (Eq. 3), verdict rate, share of A, mean length; with both orders also consistency.

    No verdict counts as wrong. A pair is consistent when the verdicts of both orders name one response;
    with several samples per order, sample k is compared with sample k.
    """
    seen = list(judgements)
    verdicts = [j.verdict for j in seen]
    total = max(1, len(seen))
    result = {
        "accuracy": sum(j.correct for j in seen) / total,
        "verdict_rate": sum(v is not None for v in verdicts) / total,
        "share_a": verdicts.count("A") / max(1, total - verdicts.count(None)),
        "length_mean": sum(j.response_tokens for j in seen) / total,
        "count": len(seen),
    }
    shown: dict[tuple[str, str, int], dict[str, Letter | None]] = {}
    for j in seen:
        shown.setdefault((j.source, j.pair_id, j.sample), {})[j.order] = j.verdict
    both = [v for v in shown.values() if len(v) == 2]
    if both:
        result["consistency"] = sum({v["AB"], v["BA"]} == {"A", "B"} for v in both) / len(both)
    return result
