"""Many responses, judged two at a time: a knockout, or the win rates of a round robin.

Pure functions over `compare(matches) -> outcomes`: a match (i, j) names two of `count` responses, its outcome is
i's share of the verdicts - 1 where i wins, 0 where j wins, 0.5 where nobody does. A round goes into one call, so
that a judge can answer it as one batch. After Reward Reasoning Models (arXiv 2505.14674): a knockout finds the
best in n - 1 matches, a round robin rates everybody in n(n-1)/2.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from runtime.seeds import derive_seed

Match = tuple[int, int]
Compare = Callable[[Sequence[Match]], Sequence[float]]
Text = str | tuple[str, str]  # a response, or (its prompt, the response) where several prompts share a table
Ask = Callable[[Sequence[tuple[Text, Text]]], Sequence[float]]  # -> share of verdicts for the first of each


class Table:
    """`compare` over texts: what was asked once is known, equal texts draw, and of two texts a coin of the seed
    decides which one is shown first, so that no place in the list is an advantage. `asked` counts the questions."""

    def __init__(self, texts: Sequence[Text], ask: Ask, seed: int = 0):
        self.texts, self.ask, self.seed, self.asked = texts, ask, seed, 0
        self.known: dict[tuple[Text, Text], float] = {}

    def shown(self, i: int, j: int) -> tuple[Text, Text]:
        first, second = sorted((self.texts[i], self.texts[j]), key=repr)
        return (first, second) if derive_seed(self.seed, first, second) % 2 else (second, first)

    def __call__(self, matches: Sequence[Match]) -> list[float]:
        pairs = [self.shown(i, j) for i, j in matches]
        new = [pair for pair in dict.fromkeys(pairs) if pair[0] != pair[1] and pair not in self.known]
        self.asked += len(new)
        self.known |= zip(new, self.ask(new) if new else [], strict=True)
        shares = [self.known.get(pair, 0.5) for pair in pairs]
        return [
            share if self.texts[i] == first else 1 - share
            for (i, _), (first, _), share in zip(matches, pairs, shares, strict=True)
        ]


def knockout(count: int, compare: Compare, seed: int = 0) -> list[int]:
    """How many levels each response survives; the one with the most is the best, the rest is no ranking.

    The bracket is drawn by `seed`. Where a level is odd its last one moves on without a match and plays first in
    the next. A match without a winner goes to the one that stands first, which the draw decided.
    """
    level = list(range(count))
    random.Random(derive_seed(seed, "bracket", count)).shuffle(level)
    survived = [0] * count
    while len(level) > 1:
        bye = level[len(level) // 2 * 2 :]
        matches = list(zip(level[::2], level[1::2], strict=False))
        outcomes = compare(matches)
        level = bye + [i if outcome >= 0.5 else j for (i, j), outcome in zip(matches, outcomes, strict=True)]
        for i in level:
            survived[i] += 1
    return survived


def win_rates(count: int, matches: Sequence[Match], outcomes: Sequence[float]) -> list[float]:
    """Mean outcome of each response, 0..1; 0.5 for one that met nobody.

    >>> win_rates(3, [(0, 1), (0, 2), (1, 2)], [1.0, 0.5, 1.0])
    [0.75, 0.5, 0.25]
    """
    shares: list[list[float]] = [[] for _ in range(count)]
    for (i, j), outcome in zip(matches, outcomes, strict=True):
        shares[i].append(outcome)
        shares[j].append(1 - outcome)
    return [sum(own) / len(own) if own else 0.5 for own in shares]
