"""Scores for one response or several, without pairs: the prompt, and text -> scores -> sums over samples.

After DeepSeek-GRM (arXiv 2504.02495): the model writes its own criteria, an analysis, then one whole number from
1 to 10 per response in \\boxed{}. k samples, each with the responses in another order, are summed.
The wording is this project's own.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cor_prompt import SPEAKERS, defuse, section
from data import Message, Pair, swap
from judging.verdicts import Judgement
from reward import Letter
from rollout import Reply
from runtime.errors import UserError
from runtime.seeds import derive_seed

SYSTEM = """You are an impartial judge of how well AI Chatbots served their Client. Score each response below.

1. Write the criteria that fit this request, each with a weight; by default: does it follow the instruction, \
is it useful, is it detailed enough, is it relevant.
2. Analyse every response by these criteria. Let every claim rest on what the response really says; order, length \
and names must not sway you.
3. Give each response one whole number from 1 (useless or harmful) to 10 (could not be better), in the order in \
which the responses are shown, last of all and in exactly this form: \\boxed{first, second, ...}. A single \
response gets a single number: \\boxed{number}."""


@dataclass(frozen=True)
class Scores:
    """`totals[i]`: response i's scores summed over the samples that count, each 1..10. `samples` of `asked` count:
    the others gave no readable scores, `silent` says why. `chains` are the texts of those that count."""

    totals: tuple[int, ...]
    samples: int
    asked: int
    chains: tuple[str, ...]
    silent: Mapping[str, int]


def render_scoring(context: Sequence[Message], responses: Sequence[str]) -> list[Message]:
    """Chat messages that ask for a score per response, in the order given."""
    if len(context) == 1:
        blocks = [f"[Client Question]\n{defuse(context[0]['content'])}"]
    else:
        turns = (f"{SPEAKERS[m['role']]}: {defuse(m['content'], labels=True)}" for m in context)
        blocks = [section("the Conversation", "\n".join(turns))]
    blocks += [section(f"Response {i}", defuse(text)) for i, text in enumerate(responses, 1)]
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "\n\n".join(blocks)}]


def parse_scores(text: str, count: int) -> list[int] | None:
    """`count` scores from the last box, which must stand at the end of the text; clamped to 1..10, else None.

    Far from the end it may be a quotation from a response.

    >>> parse_scores("So \\\\boxed{7, 12}", 2), parse_scores("So \\\\boxed{7}", 2), parse_scores("So 7", 1)
    ([7, 10], None, None)
    """
    end = text.rpartition("</think>")[2].rstrip()[-(80 + 4 * count) :]
    box = end.rpartition("\\boxed{")[2].partition("}")
    values = re.findall(r"[^,\s]+", box[0].strip().removeprefix("[").removesuffix("]"))
    whole = [int(value) for value in values if re.fullmatch(r"[+-]?[0-9]{1,9}", value)]
    if "\\boxed{" not in end or not box[1] or len(whole) != count or len(values) != count:
        return None
    return [min(10, max(1, value)) for value in whole]


def orders(count: int, samples: int, seed: int) -> list[list[int]]:
    """Per sample, the order in which the responses are shown."""
    shuffled = []
    for sample in range(samples):
        order = list(range(count))
        random.Random(derive_seed(seed, "order", sample)).shuffle(order)
        shuffled.append(order)
    return shuffled


def sum_scores(shown: Sequence[Sequence[int]], replies: Sequence[Reply], count: int) -> Scores:
    """Samples -> sums. `shown[k]` is the order of sample k. A chain that was cut off has no scores."""
    read, silent = [], Counter[str]()
    for order, reply in zip(shown, replies, strict=True):
        found = parse_scores(reply.text, count) if reply.finish_reason == "stop" else None
        if found is not None:
            read.append((reply.text, dict(zip(order, found, strict=True))))
        elif reply.finish_reason == "length":
            silent["cut off" if reply.response_tokens else "prompt too long"] += 1
        else:
            silent["no \\boxed{} with a number for each response"] += 1
    totals = tuple(sum(scores[i] for _, scores in read) for i in range(count))
    return Scores(totals, len(read), len(replies), tuple(text for text, _ in read), dict(silent))


# ---- scores -> judgements ------------------------------------------------------------------------------


class Scoring(Protocol):
    def score(self, context: Sequence[Message], response: str) -> float | None: ...


def judge_scalar(judge: Scoring, pairs: Iterable[Pair], both_orders: bool = False,
                 done: Container[tuple[str, str, str]] = ()) -> Iterator[Judgement]:
    """What verdicts.judge_pairs yields, from scores: the text holds both, and the verdict as its parsers read it. No
    response is seen beside another, so the second order repeats the first one's scores. Equal scores name nobody."""
    for pair in pairs:
        check(pair)
        first, second = (judge.score(pair.context, text) for text in (pair.response_a, pair.response_b))
        for order in ("AB", "BA") if both_orders else ("AB",):
            if (pair.source, pair.pair_id, order) in done:
                continue
            shown, a, b = (pair, first, second) if order == "AB" else (swap(pair), second, first)
            verdict = better(a, b)
            text = f"A {a!r} B {b!r}" + (f" [[{verdict}]]" if verdict else "")
            yield Judgement(pair.pair_id, pair.source, pair.category, pair.meta, order, 0, verdict, shown.winner,
                            verdict == shown.winner, "length" if None in (a, b) else "stop", 0, text)


def check(pair: Pair) -> None:
    if pair.messages is not None:
        raise UserError(f"pair {pair.pair_id}: a ready-made prompt holds no responses that could be scored one by one")


def better(a: float | None, b: float | None) -> Letter | None:
    """
    >>> better(0.5, -1.0), better(-2.0, -1.0), better(1.0, 1.0), better(None, 1.0), better(float("nan"), 1.0)
    ('A', 'B', None, None, None)
    """
    if a is None or b is None or not (a < b or a > b):
        return None
    return "A" if a > b else "B"
