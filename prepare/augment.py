"""Pairs in which one response answers another prompt, after robust reward models (arXiv 2409.13156).

What chosen responses have in common whatever the prompt - length, lists, politeness - predicts the label without a
look at the question, and a judge learns it. An added pair sets the response chosen for a prompt against one that was
chosen for another: both have those marks, and only the question tells which is better. A rule on marks alone that is
right in a share p of the rows is right in (p + a/2) / (1 + a) of them with a added pairs a row.

The paper permutes responses in more ways. Kept is the one whose label is beyond doubt. Left out: chosen against
another prompt's rejected one, where marks point to the label as they do in the rows; rejected against a stranger's,
since an unsafe or wrong answer that keeps to the subject need not be better than a stranger's; two strangers, which
are a tie, and a verdict has none; and its filter by a trained model's confidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from data import Pair, preferred, swap
from prepare.card import ADDED
from prepare.sources import fixed
from runtime.seeds import derive_seed


def augmented(pairs: Sequence[Pair], groups: Sequence[int], share: float, seed: int) -> list[Pair]:
    """round(share x rows) new pairs from one file's rows, so that no file holds another's text.

    Rows take turns in seeded order, A wins every other time. `groups[i]`: rows of one prompt, or nearly one, have the
    same. A row with a trace or a ready-made prompt takes no part; fewer pairs come where there are no strangers.
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
