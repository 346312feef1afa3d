"""Pairs in which one response answers another prompt, after robust reward models (arXiv 2409.13156).

Chosen responses have marks in common, whatever the prompt: length, lists, politeness. A judge can learn these marks
and never look at the question. An added pair sets the response that was chosen for a prompt against one that was chosen
for another prompt. Both have the marks, so only the question tells which is better. A rule on marks that is right in a
share p of the rows is right in (p + a/2) / (1 + a) of them when a pairs are added per row.

The paper makes more kinds of pairs. This one is kept because its label is beyond doubt. Left out are: a chosen response
against a rejected one of another prompt (the marks give the label away, as they do in the rows); a rejected response
against a stranger's (a wrong answer on the subject need not be better); two strangers (a tie); and the paper's filter
by a model's confidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from data import Pair, preferred, swap
from prepare.card import ADDED
from prepare.sources import fixed
from runtime.seeds import derive_seed


def augmented(pairs: Sequence[Pair], groups: Sequence[int], share: float, seed: int) -> list[Pair]:
    """round(share x rows) new pairs from the rows of one file, so that no file gets another file's text.

    Rows take turns in seeded order, and A wins every other time. Rows with the same `groups[i]` have the same prompt.
    Rows with a trace or a ready-made prompt take no part. There are fewer pairs where a row has no stranger.
    """
    rows = [i for i, pair in enumerate(pairs) if not fixed(pair)]
    rows.sort(key=lambda i: derive_seed(seed, "augment", pairs[i].source, pairs[i].pair_id))
    wanted, turns, made = round(share * len(rows)), 0, list[Pair]()
    while len(made) < wanted and turns < wanted + len(rows):
        lap, place = divmod(turns, len(rows))
        own, turns = pairs[rows[place]], turns + 1
        start = derive_seed(seed, "stranger", own.source, own.pair_id, lap)
        others = (rows[(start + step) % len(rows)] for step in range(len(rows)))
        known = {own.response_a, own.response_b}  # what answers this prompt too is no stranger
        strange = (j for j in others if groups[j] != groups[rows[place]] and preferred(pairs[j]) not in known)
        if (j := next(strange, None)) is not None:
            made.append(against(own, pairs[j], lap))
            made[-1] = made[-1] if len(made) % 2 else swap(made[-1])
    return made


def against(own: Pair, other: Pair, lap: int) -> Pair:
    """The chosen response as A, the stranger as B. The names of both rows are kept in `meta`."""
    row, stranger = (f"{pair.source}/{pair.pair_id}" for pair in (own, other))
    return replace(own, pair_id=f"{row}+{lap}", source=ADDED, winner="A", response_a=preferred(own),
                   response_b=preferred(other), meta={**own.meta, "row": row, "stranger": stranger})
