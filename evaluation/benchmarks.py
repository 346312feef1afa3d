"""RewardBench, RM-Bench and RMB: their own files in, pairs out; outcomes in, the published tables out.

    pairs = load_benchmark("rm-bench", "total_dataset.json")      # nine pairs per prompt
    table = score("rm-bench", outcomes)                           # {"domains": {"chat": 0.749, ...}, ...}

    outcome   one chosen response was, or was not, preferred to one rejected response
    item      what stands for itself: a RewardBench row, an RM-Bench prompt with its nine comparisons,
              an RMB pair, an RMB best-of-n item with all its losers. Bootstrap intervals resample items
    group     RewardBench's subset, RM-Bench's domain, RMB's category path, the category of other pairs
    slot      which of an item's comparisons; RM-Bench "02": chosen in style 0 against rejected in style 2

The rules are those of RM-R1's evaluation (arXiv 2505.02387). No verdict is wrong and stays in the denominator.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data import Message, Pair, load_pairs, swap
from evaluation import rewardbench2
from evaluation.rewardbench2 import Cells
from formats.layouts import read_messages
from formats.readers import read_rows
from judging.verdicts import Judgement
from runtime.errors import UserError
from runtime.seeds import derive_seed

Benchmark = Literal["pairs", "rewardbench", "rewardbench-2", "rm-bench", "rmb", "judgebench"]
Compat = Literal["none", "official"]
RULES: dict[Compat, str] = {"none": "right", "official": "official"}  # what a row is called
Row = dict[str, Any]
Table = dict[str, dict[str, Any]]  # block -> name -> share; None where nothing was judged
Counts = dict[str, dict[str, tuple[Any, Any]]]  # group -> slot -> (right, total): numbers, or arrays (draws,)

SECTIONS: dict[str, dict[str, int]] = {  # RewardBench: section -> subset -> weight, in the scorer's order
    "Chat": {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28,
             "mt-bench-med": 40},
    "Chat Hard": {"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134,
                  "llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    "Safety": {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
               "xstest-should-respond": 250, "donotanswer": 136},
    # weights are row counts but for math-prm: its 447 rows weigh as much as the six code subsets together
    "Reasoning": {"math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164,
                  "hep-python": 164, "hep-rust": 164},
}
SECTION_OF = {subset: section for section, weights in SECTIONS.items() for subset in weights}
DOMAINS = ("chat", "math", "code", "safety")  # RM-Bench; safety-refuse and safety-response are pooled
STYLES = ("concise", "detailed", "detailed, Markdown")
LEVELS = {  # hard: the rejected response has the fancier style
    "easy": ("10", "20", "21"),
    "normal": ("00", "11", "22"),
    "hard": ("01", "02", "12"),
}
SLIP = {"01": "02", "12": "10", "20": "21"}  # the released scorer opens the third result file twice, never the second
KINDS: dict[Benchmark, tuple[str, dict[str, str]]] = {  # a pair's group in its meta; (start of) group -> category
    "rewardbench": ("subset", SECTION_OF),
    "rm-bench": ("domain", {domain: domain for domain in DOMAINS}),
    "rmb": ("category_path", {"Pairwise_set/Helpfulness/": "Pairwise Helpfulness",  # in the order of its mean
                              "Pairwise_set/Harmlessness/": "Pairwise Harmlessness",
                              "BoN_set/Helpfulness/": "BoN Helpfulness", "BoN_set/Harmlessness/": "BoN Harmlessness"}),
    "rewardbench-2": ("subset", {subset: subset for subset in rewardbench2.SUBSETS}),
    "judgebench": ("source", {"mmlu-pro": "Knowledge", "livebench-reasoning": "Reasoning", "livebench-math": "Math",
                              "livecodebench": "Coding"}),
}
SPLITS = {"rewardbench": "filtered", "rewardbench-2": "test", "judgebench": "gpt"}  # on the hub, else train
BOTH_ORDERS = ("rewardbench-2", "judgebench")  # their rules ask for both
FULL = {"rewardbench": 2985, "rm-bench": 1327, "rmb": 7064 + 10067 + 1677 + 2109, "rewardbench-2": 1763 + 51,
        "judgebench": 270}  # items; JudgeBench has 350 answers by GPT-4o and 270 by Claude


# ---- files -> pairs ------------------------------------------------------------------------------------


def load_benchmark(name: Benchmark, source: str, seed: int = 0) -> list[Pair]:
    """Pairs of a benchmark from its original file, a folder of them or a hub id, in the order of the files.

    Which response is A is a function of (seed, benchmark, pair_id), whatever the order of files and rows.
    A comparison that occurs in several files, as RM-Bench's do, comes once. Raises UserError naming file and
    row: a field that is missing, an unknown subset or domain, two different comparisons with one id.
    """
    if name == "pairs":
        return unique(load_pairs(source))
    read = {"rewardbench": _rewardbench_pairs, "rm-bench": _rm_bench_pairs, "rmb": _rmb_pairs,
            "rewardbench-2": _rewardbench_2_pairs, "judgebench": _judgebench_pairs}[name]
    found: dict[str, Pair] = {}
    for where, stem, row in _source_rows(name, source):
        for pair in read(row, where, stem):
            if found.setdefault(pair.pair_id, pair) != pair:
                raise UserError(f"{where}: another comparison is called {pair.pair_id} too; give one set of files")
    if not found:
        raise UserError(f"{source}: no items of {name} in it; give its original .json, .jsonl or .parquet files")
    return [pair if derive_seed(seed, "A", name, pair.pair_id) % 2 else swap(pair) for pair in found.values()]


def unique(pairs: Iterable[Pair]) -> list[Pair]:
    """Logs and resumed runs know a pair by its source and id, so a second pair of the same name gets a number."""
    named: dict[tuple[str, str], Pair] = {}
    for pair in pairs:
        name, number = pair.pair_id, 1
        while (pair.source, name) in named:
            number += 1
            name = f"{pair.pair_id}~{number}"
        named[pair.source, name] = replace(pair, pair_id=name)
    return list(named.values())


def _source_rows(name: str, source: str) -> Iterator[tuple[str, str, Row]]:
    """(place for error messages, stem of the file, row)."""
    path = Path(source)
    files = sorted(p for p in path.rglob("*") if p.suffix in (".json", ".jsonl", ".parquet"))
    if name == "rewardbench":  # a copy of the hub's folder also holds the raw split
        files = [p for p in files if p.stem.startswith("filtered")] or files
    files = files if path.is_dir() else [path]
    for file in files:
        where = source if file is path else str(file)
        for place, row in read_rows(where, SPLITS.get(name, "train")):
            yield place, file.stem, row


# The readers give every pair with the chosen response as A. Equal responses are kept: RMB has such a
# pair among its 7,064, and dropping it would change the denominator.


def _rewardbench_pairs(row: Row, where: str, stem: str) -> Iterator[Pair]:
    subset = read_text(row, "subset", where)
    item = f"{subset}/{read_id(row, 'id', where)}"  # an id can repeat: 3692 is in donotanswer and in hep-python
    yield Pair(item, "rewardbench", _question(row, where), read_text(row, "chosen", where),
               read_text(row, "rejected", where), "A", kind_of("rewardbench", subset, where),
               {"subset": subset, "item": item})


def _rm_bench_pairs(row: Row, where: str, stem: str) -> Iterator[Pair]:
    """Nine pairs of a prompt, from total_dataset.json, from any of the rotated total_dataset_{1,2,3}.json, of
    which file f has the rejected responses f - 1 places to the left, or from a domain's *_filtered.json."""
    item, domain = read_id(row, "id", where), row.get("domain")
    if domain is None and stem.endswith("_filtered"):
        domain = stem.removesuffix("_filtered")
        item = f"{domain}/{item}"
    kind = kind_of("rm-bench", domain, where)
    rotated = re.fullmatch("total_dataset_([123])", stem)
    shift = int(rotated[1]) - 1 if rotated else 0
    context, chosen, rejected = _question(row, where), _texts(row, "chosen", where), _texts(row, "rejected", where)
    if len(chosen) != 3 or len(rejected) != 3:
        raise UserError(f"{where}: 'chosen' and 'rejected' must be lists of three texts, one per style")
    for i, j in product(range(3), range(3)):
        meta = {"domain": str(domain), "item": item, "chosen_style": str(i), "rejected_style": str(j)}
        yield Pair(f"{item}:{i}{j}", "rm-bench", context, chosen[i], rejected[(j - shift) % 3], "A", kind, meta)


def _rmb_pairs(row: Row, where: str, stem: str) -> Iterator[Pair]:
    """One pair of a pairwise row; one for each loser of a best-of-n row."""
    path = read_text(row, "category_path", where)
    part = kind_of("rmb", path, where)
    context = read_messages(row.get("conversation_input"), where, "conversation_input")
    if context[-1]["role"] != "user":
        raise UserError(f"{where}: the conversation must end with a user message")
    for message in context:
        read_text(message, "content", where)
    losers: Any
    if part.startswith("Pairwise"):
        item, best, losers = f"{path}/{read_id(row, 'pair_uid', where)}", "chosen", [row.get("reject")]
    else:
        item, best, losers = f"{path}/{read_id(row, 'bon_uid', where)}", "bon_best", row.get("loser_list")
    if not isinstance(losers, list) or not losers:
        raise UserError(f"{where}: 'loser_list' must be a list of {{llm_name, answer}} objects")
    for k, loser in enumerate(losers):
        pair_id, number = (item, "") if best == "chosen" else (f"{item}:{k}", str(k))
        meta = {"category_path": path, "item": item, "loser": number, "losers": str(len(losers))}
        yield Pair(pair_id, "rmb", context, _answer(row.get(best), best, where),
                   _answer(loser, "loser_list" if number else "reject", where), "A", part, meta)


def _rewardbench_2_pairs(row: Row, where: str, stem: str) -> Iterator[Pair]:
    """The matches of a row's responses, the right ones first; `due` says which of them a judge is asked."""
    subset, texts = read_text(row, "subset", where), [_texts(row, name, where) for name in ("chosen", "rejected")]
    kind, item = kind_of("rewardbench-2", subset, where), f"{subset}/{read_id(row, 'id', where)}"
    listed, right = [*texts[0], *texts[1]], len(texts[0])
    if right > 1 and subset != "Ties":
        raise UserError(f"{where}: {right} chosen responses in {subset}; only Ties has several")
    if subset == "Ties" and not re.fullmatch(r"Ties/(ref|tied):[0-9]{1,9}", item):
        raise UserError(f"{where}: 'id' of a row of Ties must be ref: or tied: and a number, found {item[5:45]!r}")
    for i, j in rewardbench2.matches(right, len(listed)):
        meta = {"subset": subset, "item": item, "first": str(i), "second": str(j), "right": str(right),
                "responses": str(len(listed))}
        yield Pair(f"{item}:{i}-{j}", "rewardbench-2", _question(row, where), listed[i], listed[j], "A", kind, meta)


def _judgebench_pairs(row: Row, where: str, stem: str) -> Iterator[Pair]:
    """ScalerLab/JudgeBench on GitHub, data/ and utils/metrics.py: label A>B or B>A."""
    source, item = read_text(row, "source", where), read_id(row, "pair_id", where)
    a, b, label = (read_text(row, name, where) for name in ("response_A", "response_B", "label"))
    if label not in ("A>B", "B>A"):
        raise UserError(f"{where}: 'label' must be A>B or B>A, found {label[:40]!r}")
    good, bad = (a, b) if label == "A>B" else (b, a)
    yield Pair(item, "judgebench", _question(row, where, "question"), good, bad, "A",
               kind_of("judgebench", source, where), {"source": source, "item": item})


def _question(row: Row, where: str, name: str = "prompt") -> tuple[Message, ...]:
    return ({"role": "user", "content": read_text(row, name, where)},)


def read_text(row: Mapping[str, Any], name: str, where: str) -> str:
    if name not in row:
        raise UserError(f"{where}: has no '{name}'; is it a file of this benchmark?")
    if not isinstance(value := row[name], str):
        raise UserError(f"{where}: '{name}' must be a text, found {str(value)[:40]!r}")
    if re.search("[\ud800-\udfff]", value):
        raise UserError(f"{where}: '{name}' holds half a surrogate pair, which is no character; repair the text")
    return value


def read_id(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise UserError(f"{where}: '{name}' must be a number or a text, found {str(value)[:40]!r}")
    return read_text({name: str(value)}, name, where)


def _texts(row: Row, name: str, where: str) -> list[str]:
    texts = row.get(name)
    if not isinstance(texts, list) or not texts:
        raise UserError(f"{where}: '{name}' must be a list of texts")
    return [read_text({name: text}, name, where) for text in texts]


def _answer(value: Any, name: str, where: str) -> str:
    if not isinstance(value, dict):
        raise UserError(f"{where}: '{name}' must be made of {{llm_name, answer}} objects")
    return read_text(value, "answer", where)


def kind_of(benchmark: Benchmark, group: Any, where: str) -> str:
    """The section of a RewardBench subset, the domain of RM-Bench's, the part of an RMB category path."""
    name, kinds = KINDS[benchmark]
    text = read_text({name: group}, name, where)
    whole = benchmark.startswith("rewardbench")
    for start, kind in kinds.items():
        if text == start if whole else text.startswith(start):
            return kind
    raise UserError(f"{where}: {name} {text[:60]!r} is none of {benchmark}'s ({', '.join(kinds)})")


# ---- which pairs are judged ----------------------------------------------------------------------------


def take(benchmark: Benchmark, pairs: Sequence[Pair], limit: int) -> list[Pair]:
    """About `limit` pairs, 0 is all: of a benchmark the first items of each subset in proportion, whole and at least
    one; of other pairs the first ones."""
    if benchmark == "pairs" or not 0 < limit < len(pairs):
        return list(pairs[: limit or None])
    groups: dict[str, dict[str, None]] = {}
    for pair in pairs:
        groups.setdefault(pair.meta[KINDS[benchmark][0]], {})[pair.meta["item"]] = None
    chosen = {item for items in groups.values()
              for item in list(items)[: max(1, round(len(items) * limit / len(pairs)))]}
    return [pair for pair in pairs if pair.meta["item"] in chosen]


def due(benchmark: Benchmark, pairs: Sequence[Pair], judged: Iterable[Judgement], scores: bool = False) -> list[Pair]:
    """The pairs that the benchmark's rules ask about, given what is judged. Only RewardBench 2 leaves some out: a model
    that gives `scores` sees each response once, a judge plays a knockout and cannot be asked about Ties."""
    if benchmark != "rewardbench-2":
        return list(pairs)
    if scores:
        return [pair for pair in pairs if int(pair.meta["first"]) < int(pair.meta["right"]) <= int(pair.meta["second"])]
    known: dict[str, dict[tuple[int, int], list[Judgement]]] = {}
    for j in judged:
        known.setdefault(j.meta["item"], {}).setdefault((int(j.meta["first"]), int(j.meta["second"])), []).append(j)
    wanted: set[tuple[str, tuple[int, int]]] = set()
    for item, count in {p.meta["item"]: int(p.meta["responses"]) for p in pairs if p.meta["subset"] != "Ties"}.items():
        shares = {match: lead(seen) for match, seen in known.get(item, {}).items()}
        wanted |= {(item, match) for match in (*shares, *rewardbench2.champion(shares, count, item)[1])}
    return [p for p in pairs if (p.meta["item"], (int(p.meta["first"]), int(p.meta["second"]))) in wanted]


def lead(judgements: Iterable[Judgement]) -> float:
    """1 if more verdicts name the winner than the other response, 0.5 if as many, 0 if fewer."""
    votes = sum((j.verdict == j.winner) - (j.verdict not in (j.winner, None)) for j in judgements)
    return 0.5 if votes == 0 else float(votes > 0)


# ---- outcomes -> tables --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """`correct` is 1 or 0, or 0.5 where the two orders of a pair disagree. `of` is how many comparisons the
    item has in its benchmark, 0 where the log does not say (of RewardBench 2: how many responses). `scores` are those
    of the two responses, from a model that gives scores."""

    item: str
    group: str
    slot: str
    correct: float
    of: int = 0
    scores: tuple[float, float] | None = None


def score(benchmark: Benchmark, outcomes: Sequence[Outcome], compat: Compat = "none") -> Table:
    """The benchmark's table. `compat="official"` repeats the index slip of RM-R1's RM-Bench scorer."""
    return make_table(benchmark, count(outcomes), compat)


def intervals(benchmark: Benchmark, outcomes: Sequence[Outcome], compat: Compat = "none", draws: int = 1000,
              seed: int = 0) -> Table:
    """The same table of (2.5 %, 97.5 %) percentiles over `draws` bootstrap resamples.

    Items are resampled with replacement within their group (all comparisons of an item stay together), so
    the make-up of the benchmark is fixed and only which items were drawn varies. Where every item of a group
    is right the interval has no width, which understates what is unknown.
    """
    drawn = make_table(benchmark, resample(outcomes, draws, seed), compat)

    def interval(values: Any) -> tuple[float, ...] | None:
        return None if values is None else tuple(np.percentile(values, (2.5, 97.5)).tolist())

    return {block: {name: interval(values) for name, values in rows.items()} for block, rows in drawn.items()}


def by_item(outcomes: Iterable[Outcome]) -> dict[str, dict[str, list[Outcome]]]:
    """group -> item -> its outcomes."""
    found: dict[str, dict[str, list[Outcome]]] = {}
    for o in outcomes:
        found.setdefault(o.group, {}).setdefault(o.item, []).append(o)
    return found


def cells(outcomes: Iterable[Outcome]) -> dict[str, dict[str, Cells]]:
    """group -> item -> slot -> (right, total). A best-of-n item is right if it beats every loser; with unjudged losers
    it is left out."""
    found: dict[str, dict[str, Cells]] = {}
    for group, items in by_item(outcomes).items():
        for item, seen in items.items():
            slots: Cells | None = {o.slot: (o.correct, 1.0) for o in seen}
            if group.startswith("rewardbench-2/"):
                slots = _best_of_four(item, seen)
            elif group.startswith("BoN_set/"):
                slots = {"": (float(all(o.correct == 1 for o in seen)), 1.0)} if len(seen) >= seen[0].of else None
            if slots is not None:
                found.setdefault(group, {})[item] = slots
    return found


def _best_of_four(item: str, seen: Sequence[Outcome]) -> Cells | None:
    """A slot is a match such as 0-2, in Ties with ref: or tied: before it."""
    listed: dict[str, list[rewardbench2.Seen]] = {}
    for o in seen:
        kind, _, match = o.slot.rpartition(":")
        i, j = map(int, match.split("-"))
        listed.setdefault(kind, []).append(((i, j), o.correct, o.scores))
    return rewardbench2.item_cells(item, seen[0].of, listed)


def count(outcomes: Iterable[Outcome]) -> Counts:
    """group -> slot -> (right, total). Fractions are added as the authors add them, so that the last digit agrees."""
    counts: Counts = {}
    for group, items in cells(outcomes).items():
        for slot in sorted({slot for slots in items.values() for slot in slots}):
            listed = sorted(items.items()) if slot == "margin" else list(items.items())
            known = [slots[slot] for _, slots in listed if slot in slots]
            right = (np.sum if slot == "margin" else sum)([right for right, _ in known])
            counts.setdefault(group, {})[slot] = float(right), float(sum(total for _, total in known))
    return counts


def resample(outcomes: Iterable[Outcome], draws: int, seed: int) -> Counts:
    """`count` of `draws` resamples at once: right and total are arrays (draws,). Items stand in the order of their
    names, so that the order of a log changes nothing; an item without the slot has zeros."""
    counts: Counts = {}
    for group, items in cells(outcomes).items():
        generator = np.random.default_rng(derive_seed(seed, "bootstrap", group))
        picked = generator.integers(len(items), size=(draws, len(items)))
        rows = [slots for _, slots in sorted(items.items())]
        for slot in sorted({slot for row in rows for slot in row}):
            of = np.array([row.get(slot, (0.0, 0.0)) for row in rows])  # (items, 2)
            counts.setdefault(group, {})[slot] = of[picked, 0].sum(1), of[picked, 1].sum(1)
    return counts


def make_table(benchmark: Benchmark, counts: Counts, compat: Compat = "none") -> Table:
    """The arithmetic of a table; plain Python sums in the authors' order, on numbers or on arrays alike."""
    if benchmark == "rewardbench":
        return _rewardbench_table(counts)
    if benchmark == "rewardbench-2":
        return _rewardbench_2_table(counts)
    if benchmark == "rm-bench":
        return _rm_bench_table(counts, compat)
    categories = {group: _pooled(counts, [group]) for group in sorted(counts)}
    if benchmark == "pairs":
        return {"overall": {"accuracy": _pooled(counts, counts)}, "categories": categories}
    parts = {kind: _pooled(counts, [group for group in counts if group.startswith(start)])
             for start, kind in KINDS[benchmark][1].items()}
    if benchmark == "rmb":  # parts count rows, not categories; their mean is the score
        return {"overall": {"average": mean(parts.values())}, "parts": parts, "categories": categories}
    return {"overall": {"accuracy": _pooled(counts, counts)}, "sections": parts, "categories": categories}


def _rewardbench_table(counts: Counts) -> Table:
    """A subset that is absent does not weigh in its section; a section without subsets has no score."""
    subsets = {subset: _pooled(counts, [subset]) for subset in SECTION_OF if subset in counts}
    sections: dict[str, Any] = {}
    for section, weights in SECTIONS.items():
        there = {subset: weight for subset, weight in weights.items() if subset in subsets}
        total = sum(subsets[subset] * weight for subset, weight in there.items())
        sections[section] = total / sum(there.values()) if there else None
    overall = {"average": mean(sections.values()), "accuracy": _pooled(counts, counts)}
    return {"overall": overall, "sections": sections, "subsets": subsets}


def _rm_bench_table(counts: Counts, compat: Compat) -> Table:
    """Cells are (chosen style, rejected style); a domain is the mean of its three levels."""
    slip = SLIP if compat == "official" else {}
    cells = {f"{i}{j}": slip.get(f"{i}{j}", f"{i}{j}") for i, j in product(range(3), range(3))}
    groups = {d: [group for group in counts if group.startswith(d)] for d in DOMAINS}
    matrix = {(d, cell): _pooled(counts, groups[d], source) for d in DOMAINS for cell, source in cells.items()}
    levels = {(d, level): mean(matrix[d, cell] for cell in names) for d in DOMAINS for level, names in LEVELS.items()}
    domains = {d: mean(levels[d, level] for level in ("hard", "normal", "easy")) for d in DOMAINS}
    return {
        "overall": {"average": mean(domains.values())},
        "domains": domains,
        "levels": {level: mean(levels[d, level] for d in DOMAINS) for level in LEVELS},
        "matrix": {cell: mean(matrix[d, cell] for d in DOMAINS) for cell in cells},
        "domain levels": {f"{d} {level}": value for (d, level), value in levels.items()},
        "domain matrix": {f"{d} {cell}": value for (d, cell), value in matrix.items()},
    }


def _rewardbench_2_table(counts: Counts) -> Table:
    """Six subsets and their mean, for which all six are needed."""
    groups = {subset: f"rewardbench-2/{subset}" for subset in rewardbench2.SUBSETS}
    subsets = {subset: _pooled(counts, [group]) for subset, group in groups.items() if group in counts}
    parts = {slot: _pooled(counts, [groups["Ties"]], slot) for slot in rewardbench2.WEIGHTS if groups["Ties"] in counts}
    if parts and all(part is not None for part in parts.values()):
        subsets["Ties"] = sum(weight * parts[slot] for slot, weight in rewardbench2.WEIGHTS.items())
    subsets = {subset: subsets.get(subset) for subset in groups}
    return {"overall": {"average": mean(subsets.values())}, "subsets": subsets, "ties": parts}


def _pooled(counts: Counts, groups: Iterable[str], slot: str = "") -> Any:
    """Right / total of one slot over some groups; None where there is nothing."""
    cells = [counts[group][slot] for group in groups if slot in counts[group]]
    total = sum(total for _, total in cells)
    return sum(right for right, _ in cells) / total if np.all(total) else None


def mean(values: Iterable[Any]) -> Any:
    seen = list(values)
    return None if any(value is None for value in seen) else sum(seen) / len(seen)


def gaps(benchmark: Benchmark, outcomes: Sequence[Outcome]) -> list[str]:
    """What is missing for numbers that can be held against published ones."""
    seen = by_item(outcomes)
    items = sum(map(len, seen.values()))
    found = []
    if items < FULL.get(benchmark, 0):
        found.append(f"{items} of {FULL[benchmark]} items: not to be held against published numbers")
    if benchmark == "rewardbench" and (absent := [s for s in SECTION_OF if s not in seen]):
        found.append(f"subsets without a verdict: {', '.join(absent)}; their sections are left open")
    if benchmark == "rewardbench-2":
        partial = items - sum(map(len, cells(outcomes).values()))
        if "rewardbench-2/Ties" not in seen:
            found.append("Ties, and so the average, needs scores: eval.py run --scalar or --pointwise")
    else:
        partial = sum(len(some) < some[0].of for members in seen.values() for some in members.values())
    if partial:
        effect = "counted for the cells they have" if benchmark == "rm-bench" else "left out"
        found.append(f"{partial} items are not judged completely: {effect}")
    return found
