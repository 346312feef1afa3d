"""The data card: what is in a set of preference pairs, what was left out, and which shortcuts it offers.

words       letters, digits and underscores, in lower case; everything else separates words
n-gram      n words in a row; a shorter text is one n-gram, which matches only the same text
repeat      a row whose turns and two responses came before, in either order
percentile  nearest rank: the smallest value with that share of the values at or below it
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

from data import Message, Pair, preferred
from evaluation.benchmarks import Benchmark

T = TypeVar("T")
ADDED = "added (--augment)"  # the source of pairs that no row was
MARKER = re.compile(r"<\|?im_start\|?>")
POINTS = (50, 90, 99, 100)
MANY = 20  # with fewer rows a share says little and raises no warning


class Drop(NamedTuple):
    reason: str
    source: str
    where: str


class Signs(NamedTuple):
    """Is there a turn marker in the chosen or the rejected side? It gives the label away to a judge that reads nothing
    else."""

    source: str
    chosen_marker: bool
    rejected_marker: bool


def signs(source: str, *sides: Sequence[Message]) -> Signs:
    return Signs(source, *(any(MARKER.search(m["content"]) for m in side) for side in sides))


# ---- texts that come twice -----------------------------------------------------------------------------


def grams(text: str, n: int) -> list[str]:
    """
    >>> grams("To be, or not!", 3), grams("To be", 3)
    (['to be or', 'be or not'], ['to be'])
    """
    words = re.findall(r"\w+", text.casefold()) or [text]
    return [" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1))]


def questions(pair: Pair) -> list[str]:
    """What the client wrote. In a ready-made prompt: everything but the system message, responses included."""
    return [m["content"] for m in pair.messages or pair.context if m["role"] == "user"]


def repeats(pairs: Sequence[Pair]) -> dict[int, int]:
    """{index of a repeat: index of the row that it repeats}."""
    first: dict[Any, int] = {}
    found = {}
    for i, pair in enumerate(pairs):
        turns = tuple((m["role"], m["content"]) for m in pair.messages or pair.context)
        before = first.setdefault((turns, frozenset((pair.response_a, pair.response_b))), i)
        if before != i:
            found[i] = before
    return found


def same_prompts(pairs: Sequence[Pair]) -> list[int]:
    """For each row the first row with the same words in its turns, whatever their case, signs and blanks."""
    first: dict[Any, int] = {}
    texts = ["\n".join(m["content"] for m in pair.messages or pair.context if m["role"] != "system") for pair in pairs]
    return [first.setdefault(tuple(re.findall(r"\w+", text.casefold())) or text, i) for i, text in enumerate(texts)]


def overlap(pairs: Sequence[Pair], others: Iterable[Pair], n: int) -> dict[int, str]:
    """{index of a row: the first n words that its questions share with a question of `others`}."""
    known = {gram for text in {q for pair in others for q in questions(pair)} for gram in grams(text, n)}
    asked = enumerate(map(questions, pairs))
    hits = {i: next((gram for q in texts for gram in grams(q, n) if gram in known), None) for i, texts in asked}
    return {i: gram for i, gram in hits.items() if gram is not None}


# ---- numbers -------------------------------------------------------------------------------------------


def percentiles(values: Sequence[int]) -> dict[str, int]:
    """
    >>> percentiles([10, 30, 20, 40])
    {'p50': 20, 'p90': 40, 'p99': 40, 'max': 40}
    """
    ranked = sorted(values)
    return {"max" if p == 100 else f"p{p}": ranked[max(0, math.ceil(p * len(ranked) / 100) - 1)] for p in POINTS}


def share(flags: Iterable[float]) -> float | None:
    seen = list(flags)
    return round(sum(seen) / len(seen), 4) if seen else None


def grouped(items: Iterable[T], name: Callable[[T], str]) -> dict[str, list[T]]:
    return {key: list(those) for key, those in groupby(sorted(items, key=name), name)}


@dataclass(frozen=True)
class Rows:
    """All usable rows, and what was found among them; indices are places in `pairs`."""

    pairs: list[Pair]
    drops: list[Drop]
    signs: list[Signs]
    lengths: list[int]  # of the prompts, in `unit`
    unit: str
    repeats: dict[int, int]
    groups: list[int]  # same_prompts()
    overlap: dict[Benchmark, dict[int, str]]


def make_card(settings: dict[str, Any], rows: Rows, kept: Sequence[Pair], lengths: Sequence[int],
              splits: Mapping[str, Sequence[Pair]]) -> dict[str, Any]:
    """The card as numbers. `kept` are the rows that are written, `lengths` their prompts'."""
    lines = grouped(zip(kept, lengths, strict=True), lambda line: line[0].source)
    limit, twice = settings["max_prompt_tokens"], rows.repeats
    added = sum(pair.source == ADDED for pair in kept)
    card: dict[str, Any] = {
        "config": settings,
        "rows": {"read": len(kept) - added + len(rows.drops), "usable": len(rows.pairs), "dropped": len(rows.drops),
                 "kept": len(kept) - added} | ({"added": added} if added else {}),
        "splits": {name: {"pairs": len(pairs), "a_wins": share(p.winner == "A" for p in pairs)}
                   for name, pairs in splits.items()},
        "sources": {name: of_source([p for p, _ in those], [n for _, n in those], limit)
                    for name, those in lines.items()},
        "dropped": of_drops(rows.drops),
        "signs": of_signs(rows.signs),
        "unit": rows.unit,
        "duplicates": {
            "repeats": len(twice),
            "contradictions": sum(preferred(rows.pairs[i]) != preferred(rows.pairs[j]) for i, j in twice.items()),
            "same_prompts": sum(i != group for i, group in enumerate(rows.groups)),
        },
        "overlap": {name: {"rows": len(hits), "examples": [[rows.pairs[i].pair_id, hits[i]] for i in list(hits)[:3]]}
                    for name, hits in rows.overlap.items()},
    }
    return card | {"warnings": warnings(card)}


def of_source(pairs: Sequence[Pair], lengths: Sequence[int], limit: int) -> dict[str, Any]:
    """One source's line: `lengths` are its prompts' in tokens; responses are measured in characters."""
    open_ = [p for p in pairs if p.messages is None]
    good = [len(preferred(p)) for p in open_]
    bad = [len(p.response_a) + len(p.response_b) - n for p, n in zip(open_, good, strict=True)]
    return {
        "categories": Counter(p.category or "none" for p in pairs),
        "pairs": len(pairs),
        "a_wins": share(p.winner == "A" for p in pairs),
        "longer_wins": share((1 + (g > b) - (g < b)) / 2 for g, b in zip(good, bad, strict=True)),
        "system_turn": sum(p.context[:1] != () and p.context[0]["role"] == "system" for p in pairs),
        "over_long": sum(n > limit for n in lengths),
        "prompt": percentiles(lengths),
        "chosen": percentiles(good) if good else None,
        "rejected": percentiles(bad) if bad else None,
    }


def of_drops(drops: Sequence[Drop]) -> dict[str, Any]:
    """reason -> rows, by source, the places of the first three; most frequent reason first."""
    reasons = sorted(grouped(drops, lambda d: d.reason).items(), key=lambda item: -len(item[1]))
    return {reason: {"rows": len(those), "sources": Counter(d.source for d in those),
                     "first": [d.where for d in those[:3]]} for reason, those in reasons}


def of_signs(seen: Sequence[Signs]) -> dict[str, Any]:
    names = Signs._fields[1:]
    return {source: {"rows": len(those)} | {name: share(getattr(s, name) for s in those) for name in names}
            for source, those in grouped(seen, lambda s: s.source).items()}


def warnings(card: Mapping[str, Any]) -> list[str]:
    """What a reader should look at before training on this."""
    found = []
    for source, row in card["signs"].items():
        good, bad = row["chosen_marker"], row["rejected_marker"]
        if row["rows"] >= MANY and abs(good - bad) >= 0.05:
            found.append(f"{source}: a turn marker in {bad:.1%} of the rejected and {good:.1%} of the chosen sides "
                         "gives the label away")
    for source, row in card["sources"].items():
        longer, limit = row["longer_wins"], max(0.1, 1.5 / math.sqrt(row["pairs"]))  # 10 points and 3 standard errors
        if longer is not None and abs(longer - 0.5) >= limit:
            found.append(f"{source}: the longer response wins in {longer:.1%} of the pairs")
        if row["over_long"]:
            found.append(f"{source}: {row['over_long']} prompts are over-long: training leaves them out")
    twice = card["duplicates"]
    if twice["repeats"] and not card["config"]["drop_duplicates"]:
        found.append(f"{twice['repeats']} rows repeat an earlier one and weigh more for it (--drop-duplicates)")
    if twice["contradictions"]:
        found.append(f"{twice['contradictions']} repeated pairs carry the opposite label: one of each two is wrong")
    for name, row in card["overlap"].items():
        if row["rows"]:
            found.append(f"{name}: {row['rows']} rows share {card['config']['ngram']} words in a row with its "
                         "questions; read the examples in the card (--drop-overlap takes them out)")
    if not card["overlap"]:
        found.append("not compared with any benchmark (--rewardbench, --rm-bench, --rmb)")
    return found
