"""Scores for one response or several, without pairs: the prompt, and text -> scores.

After DeepSeek-GRM (arXiv 2504.02495): the model writes its own criteria, an analysis, then one whole number from
1 to 10 per response in \\boxed{}. The wording is this project's own.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Container, Iterable, Iterator, Sequence

from cor_prompt import SPEAKERS, defuse, section
from data import Message, Pair, swap
from judging.verdicts import Judgement
from reward import Letter
from rollout import Chat
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


class Pointwise:
    """A judge as a model that gives scores: the mean over `votes` chains, without those that were cut off or have no
    readable score, NaN where all are. A response is asked about once."""

    def __init__(self, sampler: Chat, votes: int, temperature: float, max_tokens: int, seed: int):
        self.sampler, self.how, self.seed = sampler, (votes, temperature, max_tokens), seed
        self.known: dict[int, float] = {}

    def score(self, context: Sequence[Message], response: str) -> float:
        asked = render_scoring(context, [response])
        key = derive_seed(self.seed, json.dumps(asked))
        if key not in self.known:
            [replies] = self.sampler.chat([asked], *self.how, [key])
            read = [parse_scores(reply.text, 1) for reply in replies if reply.finish_reason == "stop"]
            self.known[key] = statistics.fmean(scores[0] for scores in read if scores) if any(read) else math.nan
        return self.known[key]


# ---- scores -> judgements ------------------------------------------------------------------------------


def judge_scalar(score: Callable[[Sequence[Message], str], float | None], pairs: Iterable[Pair],
                 both_orders: bool = False, done: Container[tuple[str, str, str]] = ()) -> Iterator[Judgement]:
    """What verdicts.judge_pairs yields, from scores: the text holds both, and the verdict as its parsers read it. No
    response is seen beside another, so the second order repeats the first one's scores. Equal scores: no verdict."""
    for pair in pairs:
        check(pair)
        first, second = (score(pair.context, text) for text in (pair.response_a, pair.response_b))
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
    if a is None or b is None:
        return None
    return "A" if a > b else "B" if a < b else None  # neither holds for NaN
