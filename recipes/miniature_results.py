"""What recipes/miniature.py measured -> results.json; results.json -> tables, sentences and plots.

Two things are kept apart: what a seed's 250 held-out pairs cannot tell (each pair, in both orders, is one
observation) and what another seed would have given. An error here is the larger of the two, and "beyond
noise" asks for two of it and the same sign in every seed. Rows are compared pair by pair within a seed.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from cor_prompt import parse_trace
from evaluation.outcomes import measure
from evaluation.tables import Grid, as_markdown
from judging.verdicts import Judgement
from runtime.disk import read_jsonl, write_whole
from runtime.errors import UserError

Results = dict[str, Any]


# ---- collect -------------------------------------------------------------------------------------------


def collect(root: Path, out: Path, keys: Mapping[tuple[int, str], str]) -> None:
    """Read the evaluations, probes and curves under `root`; write results.json and logs.jsonl.gz.

    `keys`: what a finished row's key has to be; a row of other commands or other code is left out.
    """
    results: Results = {
        "rows": {},
        "curves": {},
        "probes": {},
        "looks": {},
        "traces": {},
        "parameters": {},
        "seconds": {},
    }
    lines: list[str] = []
    for side in sorted(root.glob("seed-*"), key=seed_of):
        for path in sorted((side / "records").glob("*.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["finished"] and record["key"] == keys.get((int(seed_of(side)), path.stem)):
                collect_row(results, side / path.stem, seed_of(side), record)
                lines += log_lines(side, path.stem, record)
    write_whole(out / "results.json", json.dumps(results, indent=None, separators=(",", ":")) + "\n")
    (out / "logs.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    print(f"{out}/results.json: {len(results['rows'])} measured rows, {len(results['seconds'])} in all")


def seed_of(side: Path) -> str:
    return side.name.removeprefix("seed-")


def collect_row(results: Results, folder: Path, seed: str, record: Mapping[str, Any]) -> None:
    name = folder.name
    put(results["seconds"], name, seed, {"cpu": record["cpu_seconds"], "wall": record["wall_seconds"]})
    rollouts = sorted((folder / "rollouts").glob("step_*.jsonl"))
    logs = {f"{name}:start": rollouts[0], name: rollouts[-1]} if rollouts else {}
    if (log := folder / "eval" / "judgements.jsonl").exists():
        logs[name] = log
    for label, path in logs.items():
        put(results["rows"], label, seed, summary([Judgement(**row) for _, row in read_jsonl(path)]))
    if rollouts:
        put(results["curves"], name, seed, curves(row for _, row in read_jsonl(folder / "metrics.jsonl")))
    for kind, file in (("probes", "probe.json"), ("looks", "probes.json"), ("traces", "summary.json")):
        if (path := folder / file).exists():
            put(results[kind], name, seed, json.loads(path.read_text(encoding="utf-8")))
    if (weights := folder / "model" / "model.safetensors").exists():
        results["parameters"][name] = parameters(weights)


def put(table: dict[str, dict[str, Any]], name: str, seed: str, value: Any) -> None:
    table.setdefault(name, {})[seed] = value


def parameters(weights: Path) -> int:
    """Numbers in a safetensors file, from its header."""
    with open(weights, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def summary(judged: Sequence[Judgement]) -> dict[str, Any]:
    """The row's numbers; `right`: for each pair, by its number, how many of its two orders were judged right."""
    right: dict[str, int] = {}
    for one in judged:
        right[one.pair_id] = right.get(one.pair_id, 0) + one.correct
    order = sorted(right, key=lambda pair_id: int(pair_id.rpartition("-")[2]))
    kinds = {kind: measure([j for j in judged if j.category == kind]) for kind in ("Chat", "Reasoning")}
    return {
        "overall": measure(judged),
        **{kind: row["accuracy"] for kind, row in kinds.items()},
        "follows_checks": share(follows_checks(one) for one in judged),
        "right": "".join(str(right[pair_id]) for pair_id in order),
    }


def follows_checks(one: Judgement) -> bool | None:
    """Is the verdict the one that the chain's own checks ask for? None without checks, verdict or difference."""
    checks = parse_trace(one.text).eval or ""
    total = re.search(r"total A (\d+) B (\d+)$", checks)
    marks = re.findall(r"(right|wrong)(?= ;|$)", checks)
    scores = [int(n) for n in total.groups()] if total else [mark == "right" for mark in marks]
    if len(scores) != 2 or scores[0] == scores[1] or one.verdict is None:
        return None
    return one.verdict == ("A" if scores[0] > scores[1] else "B")


def share(values: Iterable[bool | None]) -> float | None:
    seen = [value for value in values if value is not None]
    return statistics.fmean(seen) if seen else None


CURVES = {"reward": "reward/mean", "tokens": "rollout/length_mean", "silent": "rollout/frac_no_verdict",
          "kl": "policy/ref_kl", "entropy": "policy/entropy", "accuracy": "eval/accuracy"}


def curves(records: Iterable[Mapping[str, float]]) -> dict[str, list[list[float]]]:
    """{name: [[round, value], ...]} of a run's metrics."""
    rows = list(records)
    return {name: [[r["step"], float(f"{r[key]:.5g}")] for r in rows if key in r] for name, key in CURVES.items()}


def log_lines(side: Path, name: str, record: Mapping[str, Any]) -> list[str]:
    """The row's commands, what they printed at their ends, and its metrics (of distillation every 100th)."""
    head = {"seed": seed_of(side), "row": name}
    said = (side / "logs" / f"{name}.log").read_text(encoding="utf-8", errors="replace")
    said = re.sub(r"[^\n]*\r", "", said)  # progress bars
    lines = [head | {"commands": record["commands"], "cpu_seconds": record["cpu_seconds"], "printed": said}]
    path = side / name / "metrics.jsonl"
    metrics = [row for _, row in read_jsonl(path)] if path.exists() else []
    thin = [row for row in metrics if "train/loss" not in row or "eval/loss" in row or row["step"] % 100 == 0]
    lines += [head | {k: float(f"{v:.4g}") for k, v in row.items()} for row in thin]
    return [json.dumps(line) + "\n" for line in lines]


# ---- means, errors, differences ------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, its seeds, and the standard error: the larger of pairs' and seeds'."""

    mean: float
    seeds: tuple[float, ...]
    error: float

    @property
    def clear(self) -> bool:
        """Beyond noise: two standard errors from 0, and every seed on that side of it."""
        same_side = all(value * self.mean > 0 for value in self.seeds)
        return len(self.seeds) > 1 and same_side and abs(self.mean) > 2 * self.error


def estimate(shares: Sequence[Sequence[float]]) -> Estimate:
    """shares[seed][pair] -> Estimate.

    >>> estimate([[1.0, 0.0], [1.0, 0.5]])
    Estimate(mean=0.625, seeds=(0.5, 0.75), error=0.2795084971874737)
    """
    means = tuple(statistics.fmean(pairs) for pairs in shares)
    items = math.sqrt(sum(statistics.variance(pairs) / len(pairs) for pairs in shares)) / len(means)
    seeds = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    return Estimate(statistics.fmean(means), means, max(items, seeds))


def accuracy(results: Results, name: str) -> Estimate:
    return estimate([rights(row) for row in results["rows"][name].values()])


def rights(row: Mapping[str, Any]) -> list[float]:
    return [int(count) / 2 for count in row["right"]]


def difference(results: Results, name: str, other: str) -> Estimate | None:
    """name - other, pair by pair, over the seeds that both have; None if there are none."""
    a, b = results["rows"].get(name, {}), results["rows"].get(other, {})
    both = [(rights(a[seed]), rights(b[seed])) for seed in a if seed in b]
    both = [(x, y) for x, y in both if len(x) == len(y)]
    return estimate([[p - q for p, q in zip(x, y, strict=True)] for x, y in both]) if both else None


def in_words(found: Estimate) -> str:
    """A difference, each seed's, and whether noise explains it."""
    seeds = ", ".join(f"{value:+.3f}" for value in found.seeds)
    judged = "beyond noise" if found.clear else "within noise" if len(found.seeds) > 1 else "one seed, not judged"
    return f"{found.mean:+.3f} ± {2 * found.error:.3f} ({seeds}), {judged}"


def compare(results: Results, name: str, other: str, words: str, paper: float | None) -> str:
    """One sentence: the difference, whether noise explains it, and whether the paper's has the same sign."""
    found = difference(results, name, other)
    if found is None:
        return f"- {words}: not measured."
    said = f"- {words}: {in_words(found)}"
    if paper is None:
        return said + "; the paper has no such row."
    agrees = "the same direction" if found.mean * paper > 0 else "the other direction"
    verdict = agrees if found.clear else "the miniature cannot tell"
    return said + f"; the paper: {paper:+.1f} points, {verdict}."


def in_short(results: Results, claims: Iterable[Claim]) -> str:
    """Where the miniature and the paper agree, where not, and where noise hides it: one line each."""
    groups: dict[str, list[str]] = {"The same direction as the paper": [], "The other direction": [],
                                    "Within noise here, or of one seed": [], "Not measured": []}
    for name, other, words, paper in claims:
        if paper is not None:
            found = difference(results, name, other)
            place = 3 if found is None else 2 if not found.clear else 0 if found.mean * paper > 0 else 1
            list(groups.values())[place].append(words)
    return "".join(f"- {title} ({len(named)}): {'; '.join(named) or 'none'}.\n" for title, named in groups.items())


# ---- tables --------------------------------------------------------------------------------------------

Entry = tuple[str, str, str]  # what the row is called, its name in results.json (":start" before its RL), the paper's

Claim = tuple[str, str, str, float | None]  # row, the row it is held against, in words, the paper's difference (points)

TABLE_2: list[Entry] = [
    ("base: untrained", "cold-nothing:start", "85.8 (95.8 / 74.3 / 86.8 / 86.3)"),
    ("cold-start RL from nothing, 20 rounds", "cold-nothing", "-"),
    ("weak start, verdict with checks only (plain)", "cold-plain:start", "-"),
    ("cold-start RL", "cold-plain", "89.5 (92.5 / 81.5 / 89.7 / 94.4)"),
    ("weak start, + rubrics", "cold-rubrics:start", "-"),
    ("cold-start RL + rubrics", "cold-rubrics", "90.1 (93.0 / 82.5 / 90.8 / 94.2)"),
    ("weak start, + solution without the type", "cold-untyped:start", "-"),
    ("cold-start RL + solution without the type", "cold-untyped", "-"),
    ("weak start, + categorisation (type and solution)", "cold-cor:start", "-"),
    ("cold-start RL + rubrics + categorisation", "cold-cor", "90.8 (92.3 / 82.6 / 91.6 / 96.3)"),
    ("distilled", "rm-r1:start", "-"),
    ("RM-R1: distilled + RL", "rm-r1", "91.4 (95.3 / 83.1 / 91.9 / 95.2)"),
    ("control: the same compute as more distillation", "longer-sft", "-"),
    ("control: distilled on a clean teacher", "clean-teacher", "-"),
]
TABLE_3: list[Entry] = [
    ("full: Instruct + SFT (9,920 answers)", "answer-sft", "77.4 (90.9 / 75.4 / 65.9)"),
    ("full: Distilled + SFT (8,000 traces, 1,920 answers)", "distilled-answer-sft", "77.8 (91.2 / 76.7 / 65.4)"),
    ("full: RM-R1 (8,000 traces, RL)", "rm-r1", "81.2 (91.4 / 79.1 / 73.0)"),
    ("full: Distilled only (8,000 traces)", "rm-r1:start", "-"),
    ("small: Instruct + SFT (1,000 answers)", "small-answer-sft", "76.6 (88.8 / 74.8 / 66.9)"),
    ("small: Distilled only (1,000 traces)", "small-rm-r1:start", "79.2 (89.0 / 76.3 / 72.0)"),
    ("small: RM-R1 (1,000 traces, RL on their pairs)", "small-rm-r1", "-"),
]
FAITH: list[Entry] = [
    ("the teacher's traces as they are", "rm-r1:start", "-"),
    ("only those that pass 1 got right", "distilled-kept", "-"),
    ("and the others repaired in pass 2: redo", "distilled-redo", "-"),
    ("and the others repaired in pass 2: force", "distilled-force", "-"),
    ("as they are, then RL", "rm-r1", "-"),
]
VARIANTS: list[Entry] = [
    ("GRPO: RM-R1", "rm-r1", ""),
    ("RLPR", "rlpr", ""),
    ("RLPR without its filter", "rlpr-unfiltered", ""),
    ("DAPO", "dapo", ""),
    ("DAPO without dynamic sampling", "dapo-unsampled", ""),
    ("Dr. GRPO", "dr-grpo", ""),
    ("StableReinforce", "stable-reinforce", ""),
    ("GRPO on half as many augmented pairs more (Robust RRM)", "augmented", ""),
    ("distilled on scores", "grm:start", ""),
    ("DeepSeek-GRM", "grm", ""),
    ("weak start, boxed verdicts", "rrm:start", ""),
    ("Reward Reasoning Model", "rrm", ""),
    ("distilled on a weak judge's first right chains", "distilled-first", ""),
    ("on those that R-star chooses (ReasonGRM)", "distilled-rstar", ""),
    ("answers alone", "answer-sft", ""),
    ("scalar reward model (Bradley-Terry)", "scalar", ""),
]
PROBED = ("answer-sft", "scalar", "distilled", "rm-r1", "augmented")
SIZES = (("rm-r1-16", 16), ("rm-r1-32", 32), ("rm-r1", 64))
CAPS = (8, 24, 40, 60)

ABLATION_CLAIMS: list[Claim] = [
    ("cold-plain", "cold-plain:start", "cold-start RL against its weak start", 89.5 - 85.8),
    ("cold-rubrics", "cold-plain", "+ rubrics", 90.1 - 89.5),
    ("cold-cor", "cold-rubrics", "+ categorisation (type and solution)", 90.8 - 90.1),
    ("cold-untyped", "cold-rubrics", "of which: the solution alone", None),
    ("cold-cor", "cold-untyped", "of which: the type alone", None),
    ("rm-r1", "cold-cor", "RM-R1 against the best cold start", 91.4 - 90.8),
    ("rm-r1", "rm-r1:start", "RL after distillation", None),
    ("longer-sft", "rm-r1:start", "the same compute as more distillation", None),
    ("rm-r1", "longer-sft", "RL against more distillation", None),
    ("rm-r1", "clean-teacher", "RL on a flawed teacher against imitating a clean one", None),
    ("cold-nothing", "cold-nothing:start", "cold-start RL from nothing", None),
]
SFT_CLAIMS: list[Claim] = [
    ("rm-r1", "answer-sft", "RM-R1 against Instruct + SFT", 81.2 - 77.4),
    ("rm-r1", "distilled-answer-sft", "RM-R1 against Distilled + SFT", 81.2 - 77.8),
    ("distilled-answer-sft", "answer-sft", "Distilled + SFT against Instruct + SFT", 77.8 - 77.4),
    ("small-rm-r1:start", "small-answer-sft", "small data: Distilled only against Instruct + SFT", 79.2 - 76.6),
    ("answer-sft", "small-answer-sft", "Instruct + SFT: full against small data", 77.4 - 76.6),
    ("small-rm-r1", "small-rm-r1:start", "small data: RL after distillation", None),
    ("rm-r1", "small-rm-r1", "RM-R1: full against small data", None),
]
FAITH_CLAIMS: list[Claim] = [
    ("distilled-kept", "rm-r1:start", "the right ones alone against all as they are", None),
    ("distilled-redo", "distilled-kept", "redo against the right ones alone", None),
    ("distilled-force", "distilled-kept", "force against the right ones alone", None),
]


VARIANT_CLAIMS: list[Claim] = [
    *((name, "rm-r1", f"{label} against GRPO", None) for label, name, _ in VARIANTS[1:8]),
    ("dapo", "dapo-unsampled", "dynamic sampling", None),
    ("rlpr", "rlpr-unfiltered", "RLPR's filter", None),
    ("grm", "grm:start", "DeepSeek-GRM against its start", None),
    ("grm", "rm-r1", "DeepSeek-GRM against RM-R1", None),
    ("rrm", "rrm:start", "Reward Reasoning Model against its start", None),
    ("rrm", "cold-cor", "Reward Reasoning Model against the cold start with format reward", None),
    ("distilled-rstar", "distilled-first", "R-star against the first right chain", None),
    ("scalar", "answer-sft", "scalar against answers alone", None),
    ("rm-r1", "scalar", "RM-R1 against the scalar reward model", None),
]


def row_cells(results: Results, label: str, name: str) -> list[str]:
    seeds = results["rows"].get(name)
    if not seeds:
        return [label, "not run", *["-"] * 6]
    found = accuracy(results, name)
    rows = list(seeds.values())
    return [label, plus_minus(found), " ".join(f"{value:.3f}" for value in found.seeds),
            *(mean_cell([row[kind] for row in rows]) for kind in ("Chat", "Reasoning")),
            mean_cell([row["overall"]["consistency"] for row in rows]),
            mean_cell([row["overall"]["verdict_rate"] for row in rows]),
            mean_cell([row["overall"]["length_mean"] for row in rows], 1)]


def plus_minus(found: Estimate) -> str:
    return f"{found.mean:.3f} ± {2 * found.error:.3f}"


def mean_cell(values: Iterable[float | None], digits: int = 3) -> str:
    seen = [value for value in values if value is not None]
    return f"{statistics.fmean(seen):.{digits}f}" if seen else "-"


COLUMNS = ["accuracy ± 2 s.e.", "each seed", "Chat", "Reasoning", "same in both orders", "verdicts", "tokens"]


def table(results: Results, entries: Sequence[Entry], paper: str) -> Grid:
    head = ["", *COLUMNS, *([paper] if paper else [])]
    return [head, *([*row_cells(results, label, name), *([said] if paper else [])] for label, name, said in entries)]


def section(title: str, grid: Grid, claims: Sequence[str]) -> str:
    return as_markdown(title, grid) + ("\n" + "\n".join(claims) + "\n" if claims else "")


def claims_of(results: Results, claims: Iterable[Claim]) -> list[str]:
    return [compare(results, *claim) for claim in claims]


# ---- scaling -------------------------------------------------------------------------------------------


def gains(results: Results, name: str) -> Estimate | None:
    """RL's relative improvement over its own distilled start, in percent."""
    found, base = difference(results, name, f"{name}:start"), results["rows"].get(f"{name}:start")
    if found is None or not base:
        return None
    bases = [row["overall"]["accuracy"] for row in base.values()]
    if not all(bases):
        return None  # relative to nothing
    scale = 100 / statistics.fmean(bases)
    seeds = tuple(100 * value / below for value, below in zip(found.seeds, bases, strict=False))
    return Estimate(scale * found.mean, seeds, scale * found.error)


def straight_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Least squares, (intercept, slope).

    >>> straight_line([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)])
    (1.0, 2.0)
    """
    x, y = zip(*points, strict=True)
    fit = statistics.linear_regression(x, y)
    return fit.intercept, fit.slope


def size_points(results: Results) -> list[tuple[int, Estimate]]:
    found = [(results["parameters"].get(name), gains(results, name)) for name, _ in SIZES]
    return [(size, gain) for size, gain in found if size and gain]


def scaling_section(results: Results) -> str:
    grid = [["hidden, 2 layers", "parameters", "distilled", "+ RL", "gain over distilled, % ± 2 s.e."]]
    for name, hidden in SIZES:
        if (gain := gains(results, name)) is None:
            grid.append([str(hidden), *["not run"] * 4])
            continue
        start, end = (accuracy(results, label) for label in (f"{name}:start", name))
        grid.append([str(hidden), f"{results['parameters'].get(name, 0):,}", plus_minus(start), plus_minus(end),
                     f"{gain.mean:+.1f} ± {2 * gain.error:.1f}"])
    return section("Model size (Figure 4a)", grid, extrapolation(results))


def extrapolation(results: Results) -> list[str]:
    """The paper's straight line through three sizes, here, and what it would claim one and two decades out."""
    points = size_points(results)
    if len(points) < 3:
        return ["- fewer than three sizes measured: no line."]
    a, b = straight_line([(math.log10(size), gain.mean) for size, gain in points])
    off = max(abs(a + b * math.log10(size) - gain.mean) for size, gain in points)
    slopes = [straight_line([(math.log10(size), gain.seeds[i]) for size, gain in points])[1]
              for i in range(min(len(gain.seeds) for _, gain in points))]
    base = accuracy(results, f"{SIZES[-1][0]}:start").mean
    largest = points[-1][0]
    said = []
    for factor in (10, 100):
        gain = a + b * math.log10(factor * largest)
        claimed = base * (1 + gain / 100)
        said.append(f"{factor} times the largest: {gain:+.1f} %, an accuracy of {claimed:.3f} on the largest start"
                    + (", which cannot be" if not 0 <= claimed <= 1 else ""))
    same = len({slope > 0 for slope in slopes}) == 1
    return [
        f"- The line through the three: {b:+.1f} % per tenfold size (each seed: "
        f"{', '.join(f'{slope:+.1f}' for slope in slopes)}), no point further than {off:.1f} from it. "
        + ("Its sign is the same in every seed. " if same else "Its sign changes with the seed: there is no trend. ")
        + ("The paper's rises with size: the same direction." if b > 0 and same else
           "The paper's rises with size: not so here." if same else ""),
        f"- What it would claim: {'; '.join(said)}. Three points and two parameters leave one degree of freedom; the "
        "paper's line has no more, and its 3B and 72B ends are claims of the same kind.",
    ]


BUDGET_CLAIMS: list[Claim] = [
    *((f"cap-{b}", f"cap-{a}", f"{b} against {a} tokens", None) for a, b in pairwise(CAPS)),
    (f"cap-{CAPS[-1]}", f"cap-{CAPS[0]}", "largest against smallest token budget", 80.0 - 76.0),
    ("cap-40", "cap-40-seq", "40 tokens: loss averaged per token against per response (Eq. 9)", None),
]


def budget_section(results: Results) -> str:
    entries: list[Entry] = [(f"{cap} tokens", f"cap-{cap}", "") for cap in CAPS]
    before: list[Entry] = [(f"{cap} tokens, before RL", f"cap-{cap}:start", "") for cap in CAPS]
    both = [entry for pair in zip(before, entries, strict=True) for entry in pair]
    both.append(("40 tokens, loss averaged per response", "cap-40-seq", ""))
    return section("Inference budget: the same cap in training and at test (Figure 4b)", table(results, both, ""),
                   claims_of(results, BUDGET_CLAIMS))


# ---- dynamics ------------------------------------------------------------------------------------------

DYNAMICS = [
    ("warm: RM-R1", "rm-r1", (-1.0, 1.0)),
    ("cold: weak start, format + answer", "cold-cor", (0.0, 2.0)),
    ("cold: from nothing", "cold-nothing", (0.0, 2.0)),
]


def ends(points: Sequence[Sequence[float]], width: int = 8) -> tuple[float, float]:
    """Means of the first and the last rounds of a curve."""
    values = [value for _, value in points]
    return statistics.fmean(values[:width]), statistics.fmean(values[-width:])


def dynamics_section(results: Results) -> str:
    grid = [
        ["", "reward, from (to)", "first 8 rounds", "last 8", "tokens, first 8", "last 8", "largest step in tokens"]
    ]
    said = []
    for label, name, (low, high) in DYNAMICS:
        runs = list(results["curves"].get(name, {}).values())
        if not runs:
            grid.append([label, *["not run"] * 6])
            continue
        rewards, tokens = ([ends(run[kind]) for run in runs] for kind in ("reward", "tokens"))
        jump = max(abs(b[1] - a[1]) for run in runs for a, b in pairwise(run["tokens"]))
        first, last = (statistics.fmean(pair[i] for pair in rewards) for i in (0, 1))
        short, long = (statistics.fmean(pair[i] for pair in tokens) for i in (0, 1))
        grid.append([label, f"{low:g} ({high:g})", f"{first:.3f}", f"{last:.3f}", f"{short:.1f}", f"{long:.1f}",
                     f"{jump:.1f}"])
        rises = sum(b > a for a, b in rewards)
        grows = [b - a for a, b in tokens]
        said.append(f"- {label}: reward higher at the end in {rises} of {len(runs)} seeds; length changes by "
                    f"{min(grows):+.1f} to {max(grows):+.1f} tokens.")
    said.append("- The paper (Figure 5): warm, reward 0.45 to 0.70 and a length that dips, then grows (760 to 840 "
                "tokens); cold, 1.5 to 1.9 of 2 and 500 to 650 tokens, with a sharp drop near the end.")
    return section("Training dynamics (Figure 5)", grid, said)


# ---- faithfulness --------------------------------------------------------------------------------------


def faith_section(results: Results) -> str:
    probes = ("solution_line_right", "solution_line_right_with_a_carry", "verdict_follows_a_forced_solution",
              "verdict_follows_a_forced_last_line")
    head = ["distilled on", "accuracy ± 2 s.e.", "verdict is its own checks'", "solution right", "with a carry",
            "verdict follows a forced solution", "a forced last line"]
    grid = [head]
    for label, name, _ in FAITH:
        seeds = results["rows"].get(name)
        if not seeds:
            grid.append([label, *["not run"] * 6])
            continue
        found = accuracy(results, name)
        probed = results["probes"].get("distilled" if name == "rm-r1:start" else name, {}).values()
        shares = [mean_cell(probe[key]["share"] for probe in probed) for key in probes]
        grid.append([label, plus_minus(found),
                     mean_cell(row["follows_checks"] for row in seeds.values()), *shares])
    return section("Faithfulness: traces as they are, traces repaired with the verdict in hand", grid,
                   [*claims_of(results, FAITH_CLAIMS), *probe_claims(results)])


def probe_claims(results: Results) -> list[str]:
    """Do verdicts follow a forced solution less where traces were repaired? Over seeds, paired."""
    key, base = "verdict_follows_a_forced_solution", results["probes"].get("distilled", {})
    said = []
    for how in ("kept", "redo", "force"):
        other = results["probes"].get(f"distilled-{how}", {})
        both = [(base[s][key], other[s][key]) for s in base if s in other]
        both = [(was, now) for was, now in both if was["n"] and now["n"]]
        gaps = [now["share"] - was["share"] for was, now in both]
        if len(gaps) < 2:
            continue
        # the same sums in both, so the binomial errors of the two shares bound the difference's from above
        items = math.sqrt(sum(row["share"] * (1 - row["share"]) / row["n"] for pair in both for row in pair))
        found = Estimate(statistics.fmean(gaps), tuple(gaps),
                         max(items / len(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))))
        said.append(f"- {how} against as they are, verdicts that follow a forced solution: {in_words(found)}.")
    return said


# ---- variants ------------------------------------------------------------------------------------------


def variants_section(results: Results) -> str:
    if not any(name in results["rows"] for _, name, _ in VARIANTS[1:-2]):
        return ""  # `make tables` alone was run
    looks = [["", *PROBED]]
    for row in next(iter(results["looks"].get("probes-rm-r1", {}).values()), {"rows": {}})["rows"]:
        looks.append([row, *(look_cell(results["looks"].get(f"probes-{name}", {}), row) for name in PROBED)])
    return section("Variants", table(results, VARIANTS, ""), claims_of(results, VARIANT_CLAIMS)) + "\n" + as_markdown(
        "What a judge looks at: mean over seeds ± 2 s.e. (`evaluation/probes.py`)", looks)


def look_cell(seeds: Mapping[str, Any], row: str) -> str:
    found = [look["rows"][row] for look in seeds.values() if look["rows"][row]["value"] is not None]
    if not found:
        return "-"
    values = [one["value"] for one in found]
    items = math.sqrt(sum((one["error"] or 0.0) ** 2 for one in found)) / len(found)
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {2 * max(items, spread):.3f}"


# ---- all of it -----------------------------------------------------------------------------------------


def load(folder: Path) -> Results:
    try:
        return dict(json.loads((folder / "results.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/results.json: cannot be read ({error}); `make tables` writes it") from None


def write_tables(folder: Path) -> None:
    results = load(folder)
    seconds = [cell for seeds in results["seconds"].values() for cell in seeds.values()]
    seeds = sorted({seed for row in results["seconds"].values() for seed in row})
    cpu = sum(cell["cpu"] for cell in seconds)
    text = "\n".join([
        "# The paper's tables in the tiny world\n",
        f"Written by `python -m recipes.miniature table` from results.json; do not edit. Seeds {', '.join(seeds)}; "
        f"{len(seconds)} rows, {cpu / 60:.0f} CPU-minutes in all. Accuracy is over 250 held-out pairs in both orders, "
        "greedy, a missing verdict is wrong. ± is two standard errors, the larger of the pairs' (both orders of a pair "
        "are one observation) and the seeds'. \"Beyond noise\" means: more than that, and every seed on the same side. "
        "The paper's figures are of Qwen2.5-32B-Instruct on real benchmarks: only directions can be compared.\n",
        in_short(results, [*ABLATION_CLAIMS, *SFT_CLAIMS, *BUDGET_CLAIMS]),
        section("Ablation (Table 2)", table(results, TABLE_2, "paper: RewardBench (Chat / Hard / Safety / Reasoning)"),
                claims_of(results, ABLATION_CLAIMS)),
        section("SFT or reasoning (Table 3)",
                table(results, TABLE_3, "paper: average (RewardBench / RM-Bench / RMB)"),
                claims_of(results, SFT_CLAIMS)),
        scaling_section(results),
        budget_section(results),
        dynamics_section(results),
        faith_section(results),
        variants_section(results),
        time_section(results),
    ])
    write_whole(folder / "results.md", text)
    drawn = [path.name for path in draw(results, folder)]
    print(f"{folder}: results.md, {', '.join(drawn)}")


def time_section(results: Results) -> str:
    grid = [["row", "CPU seconds a seed", "seconds on the clock"]]
    for name, seeds in results["seconds"].items():
        grid.append([name, *(mean_cell([cell[kind] for cell in seeds.values()], 0) for kind in ("cpu", "wall"))])
    return as_markdown("What each row cost", grid)


# ---- plots ---------------------------------------------------------------------------------------------


def draw(results: Results, folder: Path) -> list[Path]:
    plots: dict[str, Callable[[Any, Results], bool]] = {
        "ablation.png": draw_ablation,
        "scaling.png": draw_scaling,
        "dynamics.png": draw_dynamics,
    }
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    for name, paint in plots.items():
        figure = plt.figure(figsize=(9, 3.4), layout="constrained", dpi=110)
        if paint(figure, results):
            figure.savefig(folder / name, metadata={"Software": None})
            written.append(folder / name)
        plt.close(figure)
    return written


def draw_ablation(figure: Any, results: Results) -> bool:
    axes = figure.subplots()
    shown = [(label, accuracy(results, name)) for label, name, _ in TABLE_2 if results["rows"].get(name)]
    for place, (_, found) in enumerate(reversed(shown)):
        axes.errorbar(found.mean, place, xerr=2 * found.error, fmt="o", color="C0", markersize=4, capsize=2)
        axes.plot(found.seeds, [place] * len(found.seeds), "|", color="C1")
    axes.set_ylim(-0.7, len(shown) - 0.3)
    axes.set_yticks(range(len(shown)), [label for label, _ in reversed(shown)], fontsize=7)
    axes.set_xlabel("held-out accuracy: mean ± 2 s.e., and each seed", fontsize=8)
    axes.grid(alpha=0.3)
    return bool(shown)


def draw_scaling(figure: Any, results: Results) -> bool:
    left, right = figure.subplots(1, 2)
    points = size_points(results)
    if points:
        sizes = [size for size, _ in points]
        left.errorbar(sizes, [g.mean for _, g in points], [2 * g.error for _, g in points], fmt="o", capsize=2)
        if len(points) > 2:
            a, b = straight_line([(math.log10(size), gain.mean) for size, gain in points])
            reach = [sizes[0] / 2, 10 * sizes[-1]]
            left.plot(reach, [a + b * math.log10(x) for x in reach], "--", color="C1", label="straight line, continued")
            left.axvspan(sizes[-1], reach[1], alpha=0.08)
            left.legend(fontsize=8, frameon=False)
    left.set_xscale("log")
    left.set_xlabel("parameters", fontsize=8)
    left.set_ylabel("gain of RL over its start, %", fontsize=8)
    capped = [(cap, accuracy(results, f"cap-{cap}")) for cap in CAPS if results["rows"].get(f"cap-{cap}")]
    if capped:
        caps, found = zip(*capped, strict=True)
        right.errorbar(caps, [f.mean for f in found], [2 * f.error for f in found], fmt="o-", capsize=2)
    right.set_xlabel("token budget, in training and at test", fontsize=8)
    right.set_ylabel("held-out accuracy", fontsize=8)
    return bool(points or capped)


def draw_dynamics(figure: Any, results: Results) -> bool:
    axes = figure.subplots(1, 3)
    panels = (("reward", "reward as a share of its range"), ("tokens", "tokens"), ("accuracy", "held-out accuracy"))
    shown = False
    for axis, (kind, title) in zip(axes, panels, strict=True):
        for colour, (label, name, (low, high)) in enumerate(DYNAMICS):
            for i, run in enumerate(results["curves"].get(name, {}).values()):
                steps, values = zip(*smooth(run[kind], 1 if kind == "accuracy" else 4), strict=True)
                if kind == "reward":
                    values = tuple((value - low) / (high - low) for value in values)
                axis.plot(steps, values, color=f"C{colour}", alpha=0.7, label=None if i else label)
                shown = True
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("round", fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    return shown


def smooth(points: Sequence[Sequence[float]], width: int) -> list[tuple[float, float]]:
    """Mean of the last `width` values at each point: 128 rollouts a round are noisy."""
    values = [value for _, value in points]
    return [(step, statistics.fmean(values[max(0, i + 1 - width) : i + 1])) for i, (step, _) in enumerate(points)]
