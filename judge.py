"""The model in use: which response is better, how many compare, and the chain of rubrics that says why.

    from judge import Judge
    judge = Judge.load("runs/grpo")                     # or Judge.connect("http://localhost:8000/v1", "rm-r1")
    judge.pair("What is 2+2?", "4.", "5.").winner       # "A"; .votes, .traces[0].parts.rubric
    judge.rank("What is 2+2?", ["5.", "4.", "22."]).order            # best first
    judge.group_rewards("What is 2+2?", ["5.", "4.", "4!"])          # win rates: a reward for reinforcement learning
    judge.scores("What is 2+2?", ["4."]).totals                      # 1..10 per sample, no second response needed

    python judge.py pairs --model runs/grpo --question "What is 2+2?" --a "4." --b "5."
    python judge.py pairs --model runs/grpo --data pairs.jsonl --out runs/verdicts
    some-program | python judge.py pairs --model rm-r1 --base-url http://localhost:8000/v1 --json
    python judge.py rank --model runs/grpo --question "What is 2+2?" --responses 5. 4. 22.

A row of `pairs` is {"question" or "context", "response_a", "response_b"}, one of `rank` and `score` has
"responses" instead; none needs a winner. Without a verdict, or with as many votes for A as for B, the winner is
None. With `--out` the same command continues where it stopped. Over a server neither torch nor vllm is needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import pointwise
import ranking
import run
from cor_prompt import Style, Trace, parse_trace
from data import Message, Pair
from pointwise import Scores
from reward import Letter
from rollout import EndpointSampler, load_sampler
from run import UserError, derive_seed
from verdicts import Chat, Judgement, check_sampling, judge_pairs, majority, named

Method = Literal["knockout", "bradley-terry", "elo", "win-rate"]
Check = Callable[[str | Sequence[Message], str], float]


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


@dataclass(frozen=True)
class Ranking:
    """`order`: places in the list, best first; after a knockout only the first says anything. `scores[i]` are
    ratings, win rates or levels survived, as the method has it. `comparisons` of two texts were put to the judge."""

    order: tuple[int, ...]
    scores: tuple[float, ...]
    comparisons: int


class Judge:
    """A sampler with its prompt. `sampler` is anything with `chat`; a `context` is a question or a conversation that
    ends with the user. Raises UserError for settings that cannot work."""

    def __init__(self, sampler: Chat, style: Style = "instruct", system: str | None = None,
                 max_tokens: int = 2048, seed: int = 0):  # fmt: skip
        self.sampler, self.style, self.system = sampler, style, system
        self.max_tokens, self.seed = max_tokens, seed

    @classmethod
    def load(cls, path: str, dtype: str = "float32", **settings: Any) -> Judge:
        """A judge from a `from_pretrained` folder, a run folder or a hub id; `settings` as above."""
        return cls(load_sampler(path, dtype), **settings)

    @classmethod
    def connect(cls, base_url: str, model: str, api_key_env: str = "", kept: str | None = None, concurrency: int = 8,
                **settings: Any) -> Judge:  # fmt: skip
        """A judge behind an OpenAI-compatible server; with `kept` no reply in that file is paid for again."""
        return cls(EndpointSampler(base_url, model, api_key_env, kept, concurrency), **settings)

    def pair(self, context: str | Sequence[Message], response_a: str, response_b: str, votes: int = 1,
             temperature: float = 0.0, both_orders: bool = False) -> Verdict:  # fmt: skip
        """Which of the two responses is better?"""
        pair = Pair("pair", "judge", messages(context), clean(response_a), clean(response_b), winner="A")
        return self.pairs([pair], votes, temperature, both_orders)[0]  # any winner will do

    def pairs(self, pairs: Sequence[Pair], votes: int = 1, temperature: float = 0.0,
              both_orders: bool = False) -> list[Verdict]:  # fmt: skip
        """A verdict for each pair; their `winner` is not looked at."""
        check_sampling(votes, temperature)
        judgements = judge_pairs(self.sampler, pairs, self.style, n=votes, temperature=temperature,
                                 max_tokens=self.max_tokens, seed=self.seed, both_orders=both_orders,
                                 system=self.system)  # fmt: skip
        chains = votes * (2 if both_orders else 1)  # a pair's verdicts come one after the other
        return [count(islice(judgements, chains)) for _ in pairs]

    def table(self, groups: Sequence[tuple[str | Sequence[Message], Sequence[str]]], votes: int = 1,
              temperature: float = 0.0, both_orders: bool = True) -> ranking.Table:  # fmt: skip
        """`compare` for ranking.py over the responses of all (context, responses) groups, numbered through. Samples
        depend on the texts alone, not on their places."""

        def ask(shown: Sequence[tuple[Any, Any]]) -> list[float]:
            pairs = [
                Pair(f"{derive_seed(prompt, a, b):x}", "judge", tuple(json.loads(prompt)), a, b, winner="A")
                for (prompt, a), (_, b) in shown
            ]
            return [share(verdict) for verdict in self.pairs(pairs, votes, temperature, both_orders)]

        prompts = [json.dumps(messages(context)) for context, _ in groups]
        texts = [(p, clean(text)) for p, (_, group) in zip(prompts, groups, strict=True) for text in group]
        return ranking.Table(texts, ask, self.seed)

    def rank(self, context: str | Sequence[Message], responses: Sequence[str], method: Method = "bradley-terry",
             votes: int = 1, temperature: float = 0.0, both_orders: bool = True) -> Ranking:  # fmt: skip
        """Rate by a round robin, n(n-1)/2 comparisons, or find the best by a knockout, n - 1. A comparison takes
        `votes` verdicts, twice with `both_orders`."""
        size, table = len(responses), self.table([(context, responses)], votes, temperature, both_orders)
        if size == 0:
            raise UserError("responses: none to rank")
        rate: dict[Method, Callable[..., list[float]]] = {
            "bradley-terry": ranking.bradley_terry, "elo": ranking.elo, "win-rate": ranking.win_rates}  # fmt: skip
        scores: Sequence[float]
        if method == "knockout":
            scores = ranking.knockout(size, table, self.seed)
        else:
            scores = rate[method](size, ranking.round_robin(size, table))
        return Ranking(tuple(ranking.best_first(scores)), tuple(map(float, scores)), table.asked)

    def group_rewards(self, context: str | Sequence[Message], responses: Sequence[str], checks: Sequence[Check] = (),
                      votes: int = 1, temperature: float = 0.0, both_orders: bool = True) -> list[float]:  # fmt: skip
        """A reward for each of one prompt's responses: its win rate against the others, 0..1 (0.5 where it is alone),
        plus what each check(context, response) returns, such as 1.0 if a final number is right: weigh there."""
        return self.rewards([(context, responses)], checks, votes, temperature, both_orders)[0]

    def rewards(self, groups: Sequence[tuple[str | Sequence[Message], Sequence[str]]], checks: Sequence[Check] = (),
                votes: int = 1, temperature: float = 0.0, both_orders: bool = True) -> list[list[float]]:  # fmt: skip
        """`group_rewards` of many (context, responses) groups, with one call for all their verdicts."""
        table, matches, start = self.table(groups, votes, temperature, both_orders), [], 0
        for _, responses in groups:
            matches += [(start + i, start + j) for i, j in ranking.all_pairs(len(responses))]
            start += len(responses)
        rates = iter(ranking.win_rates(start, ranking.play(matches, table)))
        return [
            [next(rates) + sum(float(check(context, response)) for check in checks) for response in responses]
            for context, responses in groups
        ]

    def scores(self, context: str | Sequence[Message], responses: Sequence[str], samples: int = 8,
               temperature: float = 0.5, scorer: Callable[[str], float] | None = None) -> Scores:  # fmt: skip
        """Whole-number scores 1..10 for one response or several, summed over samples (pointwise.py). `scorer(chain)`
        keeps the better half of the chains."""
        check_sampling(samples, temperature)
        if not responses:
            raise UserError("responses: none to score")
        shared, texts = messages(context), [clean(response) for response in responses]
        seed = derive_seed(self.seed, json.dumps(shared), *texts)
        shown = pointwise.orders(len(texts), samples, seed)
        asked = [pointwise.render_scoring(shared, [texts[i] for i in order]) for order in shown]
        seeds = [derive_seed(seed, sample) for sample in range(samples)]
        replies = self.sampler.chat(asked, 1, temperature, self.max_tokens, seeds)
        return pointwise.sum_scores(shown, [reply for [reply] in replies], len(texts), scorer)


def count(judgements: Iterable[Judgement]) -> Verdict:
    """All verdicts on one pair -> the majority's."""
    traces = tuple(map(chain, judgements))
    votes = [trace.verdict for trace in traces]
    return Verdict(majority(votes), {"A": votes.count("A"), "B": votes.count("B"), "none": votes.count(None)}, traces)


def chain(j: Judgement) -> Chain:
    return Chain(j.order, j.sample, named(j), j.finish_reason, parse_trace(j.text), j.text)


def share(verdict: Verdict) -> float:
    """A's share of the votes; a chain without a verdict is half a vote for each."""
    return (verdict.votes["A"] + 0.5 * verdict.votes["none"]) / sum(verdict.votes.values())


def messages(context: str | Sequence[Message]) -> tuple[Message, ...]:
    turns: Sequence[Message] = [{"role": "user", "content": context}] if isinstance(context, str) else context
    if not turns or turns[-1]["role"] != "user":
        raise UserError("the conversation must end with a user message")
    return tuple({"role": m["role"], "content": clean(m["content"])} for m in turns)


def clean(text: str) -> str:
    """Half a surrogate pair is no character and cannot be encoded: a question mark takes its place."""
    return text.encode(errors="replace").decode()


if __name__ == "__main__":
    from judge_rows import main

    run.start(main)
