"""What recipes/miniature.py measured -> results.json; results.json -> results.md (tables alone) and scaling.png.

docs/miniature.md says in words what came out. Two errors are kept apart: what a seed's 250 held-out pairs cannot tell
(each pair, in both orders, is one observation), and what another seed would have given. An error here is the larger
of the two, and "beyond noise" asks for twice that and the same sign in every seed. Rows are compared pair by pair
within a seed.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from cor_prompt import parse_trace
from evaluation.outcomes import measure
from evaluation.tables import Grid, as_markdown
from judging.verdicts import Judgement
from runtime.disk import read_json, read_jsonl, write_whole
from runtime.errors import UserError

Results = dict[str, Any]


# ---- collect -------------------------------------------------------------------------------------------


def collect(done: Iterable[tuple[str, Path, Mapping[str, Any]]], out: Path,
            stale: Iterable[tuple[str, str]] = ()) -> None:
    """(seed, folder, record) of all finished rows -> results.json. Rows that were never run here stay as they were;
    what is `stale` (seed, row) goes."""
    by_seed, known = ("rows", "probes", "looks", "seconds"), out / "results.json"
    results: Results = read_json(known) if known.exists() else {part: {} for part in (*by_seed, "parameters")}
    for seed, name in stale:
        for part in by_seed:
            for label in results[part].keys() & {name, f"{name}:start"}:
                results[part][label].pop(seed, None)
    for seed, folder, record in done:
        collect_row(results, folder, seed, record)
    results = {part: {label: one for label, one in found.items() if one} for part, found in results.items()}
    write_whole(known, json.dumps(results, indent=None, separators=(",", ":")) + "\n")
    print(f"{known}: {len(results['rows'])} measured rows, {len(results['seconds'])} in all")


def collect_row(results: Results, folder: Path, seed: str, record: Mapping[str, Any]) -> None:
    name = folder.name
    results["seconds"].setdefault(name, {})[seed] = {"cpu": record["cpu_seconds"], "wall": record["wall_seconds"]}
    rollouts = sorted((folder / "rollouts").glob("step_*.jsonl"))
    logs = {f"{name}:start": rollouts[0], name: rollouts[-1]} if rollouts else {}
    if (log := folder / "eval" / "judgements.jsonl").exists():
        logs[name] = log
    for label, path in logs.items():
        judged = [Judgement(**row) for _, row in read_jsonl(path)]
        results["rows"].setdefault(label, {})[seed] = summary(judged)
    for kind, file in (("probes", "probe.json"), ("looks", "probes.json")):
        if (path := folder / file).exists():
            results[kind].setdefault(name, {})[seed] = json.loads(path.read_text(encoding="utf-8"))
    if (weights := folder / "model" / "model.safetensors").exists():
        results["parameters"][name] = sum(tensor.size for tensor in load_file(weights).values())


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


def share(values: Iterable[float | None]) -> float | None:
    seen = [value for value in values if value is not None]
    return statistics.fmean(seen) if seen else None


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
    errors = [math.sqrt(statistics.variance(pairs) / len(pairs)) for pairs in shares]
    return combine([statistics.fmean(pairs) for pairs in shares], errors)


def combine(means: Sequence[float], errors: Sequence[float]) -> Estimate:
    """Each seed's mean and its own standard error -> Estimate."""
    items = math.sqrt(sum(error**2 for error in errors)) / len(means)
    seeds = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    return Estimate(statistics.fmean(means), tuple(means), max(items, seeds))


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


# ---- tables --------------------------------------------------------------------------------------------

CAPS = (8, 24, 40, 60)
SIZES = (("rm-r1-16", 16), ("rm-r1-32", 32), ("rm-r1", 64))
PROBED = ("answer-sft", "scalar", "distilled", "rm-r1", "augmented")

# what the row is called; its name in results.json (":start" before its RL); the paper's number; the rows that it is
# compared with, each with the paper's difference in points where the paper has both
Entry = tuple[str, str, str, str]

TABLES: dict[str, list[Entry]] = {
    "Ablation (Table 2); the paper: RewardBench (Chat / Hard / Safety / Reasoning)": [
        ("base: untrained", "cold-nothing:start", "85.8 (95.8 / 74.3 / 86.8 / 86.3)", ""),
        ("cold-start RL from nothing, 20 rounds", "cold-nothing", "-", ""),
        ("weak start, verdict with checks only (plain)", "cold-plain:start", "-", ""),
        ("cold-start RL", "cold-plain", "89.5 (92.5 / 81.5 / 89.7 / 94.4)", "cold-plain:start +3.7"),
        ("weak start, + rubrics", "cold-rubrics:start", "-", ""),
        ("cold-start RL + rubrics", "cold-rubrics", "90.1 (93.0 / 82.5 / 90.8 / 94.2)", "cold-plain +0.6"),
        ("weak start, + solution without the type", "cold-untyped:start", "-", ""),
        ("cold-start RL + solution without the type", "cold-untyped", "-", "cold-rubrics"),
        ("weak start, + categorisation (type and solution)", "cold-cor:start", "-", ""),
        ("cold-start RL + rubrics + categorisation", "cold-cor", "90.8 (92.3 / 82.6 / 91.6 / 96.3)",
         "cold-rubrics +0.7, cold-untyped"),
        ("distilled", "rm-r1:start", "-", ""),
        ("RM-R1: distilled + RL", "rm-r1", "91.4 (95.3 / 83.1 / 91.9 / 95.2)",
         "cold-cor +0.6, rm-r1:start, longer-sft, clean-teacher"),
        ("control: the same compute as more distillation", "longer-sft", "-", "rm-r1:start"),
        ("control: distilled on a clean teacher", "clean-teacher", "-", ""),
    ],
    "SFT or reasoning (Table 3); the paper: average (RewardBench / RM-Bench / RMB)": [
        ("full: Instruct + SFT (9,920 answers)", "answer-sft", "77.4 (90.9 / 75.4 / 65.9)", "small-answer-sft +0.8"),
        ("full: Distilled + SFT (8,000 traces, 1,920 answers)", "distilled-answer-sft", "77.8 (91.2 / 76.7 / 65.4)",
         "answer-sft +0.4"),
        ("full: RM-R1 (8,000 traces, RL)", "rm-r1", "81.2 (91.4 / 79.1 / 73.0)",
         "answer-sft +3.8, distilled-answer-sft +3.4, small-rm-r1"),
        ("full: Distilled only (8,000 traces)", "rm-r1:start", "-", ""),
        ("small: Instruct + SFT (1,000 answers)", "small-answer-sft", "76.6 (88.8 / 74.8 / 66.9)", ""),
        ("small: Distilled only (1,000 traces)", "small-rm-r1:start", "79.2 (89.0 / 76.3 / 72.0)",
         "small-answer-sft +2.6"),
        ("small: RM-R1 (1,000 traces, RL on their pairs)", "small-rm-r1", "-", "small-rm-r1:start"),
    ],
    "Inference budget: the same cap in training and at test (Figure 4b)": [
        *(entry for cap in CAPS for entry in (
            (f"{cap} tokens, before RL", f"cap-{cap}:start", "-", ""),
            (f"{cap} tokens", f"cap-{cap}", "-", {60: "cap-8 +4.0", 40: "cap-40-seq"}.get(cap, "")))),
        ("40 tokens, loss averaged per response", "cap-40-seq", "-", ""),
    ],
    "Faithfulness: distilled on traces as they are, on traces repaired with the verdict in hand": [
        ("the teacher's traces as they are", "rm-r1:start", "-", ""),
        ("only those that pass 1 got right", "distilled-kept", "-", "rm-r1:start"),
        ("and the others repaired in pass 2: redo", "distilled-redo", "-", "distilled-kept"),
        ("and the others repaired in pass 2: force", "distilled-force", "-", "distilled-kept"),
        ("as they are, then RL", "rm-r1", "-", ""),
    ],
    "Variants": [
        ("GRPO: RM-R1", "rm-r1", "-", "scalar"),
        ("RLPR", "rlpr", "-", "rm-r1, rlpr-unfiltered"),
        ("RLPR without its filter", "rlpr-unfiltered", "-", "rm-r1"),
        ("DAPO", "dapo", "-", "rm-r1, dapo-unsampled"),
        ("DAPO without dynamic sampling", "dapo-unsampled", "-", "rm-r1"),
        ("Dr. GRPO", "dr-grpo", "-", "rm-r1"),
        ("StableReinforce", "stable-reinforce", "-", "rm-r1"),
        ("GRPO on half as many augmented pairs more (Robust RRM)", "augmented", "-", "rm-r1"),
        ("distilled on scores", "grm:start", "-", ""),
        ("DeepSeek-GRM", "grm", "-", "grm:start, rm-r1"),
        ("weak start, boxed verdicts", "rrm:start", "-", ""),
        ("Reward Reasoning Model", "rrm", "-", "rrm:start, cold-cor"),
        ("distilled on a weak judge's first right chains", "distilled-first", "-", ""),
        ("on those that R-star chooses (ReasonGRM)", "distilled-rstar", "-", "distilled-first"),
        ("answers alone", "answer-sft", "-", ""),
        ("scalar reward model (Bradley-Terry)", "scalar", "-", "answer-sft"),
    ],
}
DIFFERENCES = [(name, other.split(" ")[0], other.partition(" ")[2]) for entries in TABLES.values()
               for _, name, _, others in entries for other in others.split(", ") if other]

COLUMNS = ["", "accuracy ± 2 s.e.", "each seed", "Chat", "Reasoning", "same in both orders", "verdicts", "tokens",
           "the paper"]


def row_cells(results: Results, label: str, name: str, paper: str, _: str) -> list[str]:
    seeds = results["rows"].get(name)
    if not seeds:
        return [label, "not run", *["-"] * 6, paper]
    found, rows = accuracy(results, name), list(seeds.values())
    return [label, plus_minus(found), " ".join(f"{value:.3f}" for value in found.seeds),
            *(mean_cell([row[kind] for row in rows]) for kind in ("Chat", "Reasoning")),
            *(mean_cell([row["overall"][kind] for row in rows]) for kind in ("consistency", "verdict_rate")),
            mean_cell([row["overall"]["length_mean"] for row in rows], 1), paper]


def plus_minus(found: Estimate, sign: str = "") -> str:
    return f"{found.mean:{sign}.3f} ± {2 * found.error:.3f}"


def mean_cell(values: Iterable[float | None], digits: int = 3) -> str:
    seen = share(values)
    return "-" if seen is None else f"{seen:.{digits}f}"


def differences(results: Results) -> Grid:
    grid = [["row - the row it is compared with", "difference ± 2 s.e.", "each seed", "beyond noise",
             "the paper, points"]]
    for name, other, paper in DIFFERENCES:
        if found := difference(results, name, other):
            seeds = " ".join(f"{value:+.3f}" for value in found.seeds)
            grid.append([f"{name} - {other}", plus_minus(found, "+"), seeds, "yes" if found.clear else "no", paper])
    return grid


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


def sizes(results: Results) -> Grid:
    grid = [["hidden, 2 layers", "parameters", "distilled", "+ RL", "gain over distilled, % ± 2 s.e."]]
    for name, hidden in SIZES:
        if gain := gains(results, name):
            start, end = (plus_minus(accuracy(results, label)) for label in (f"{name}:start", name))
            grid.append([str(hidden), f"{results['parameters'].get(name, 0):,}", start, end,
                         f"{gain.mean:+.1f} ± {2 * gain.error:.1f}"])
    return grid


def probes(results: Results) -> Grid:
    """Shares of solutions that are right, and of verdicts that follow what is put into the judge's mouth."""
    keys = ("solution_line_right", "solution_line_right_with_a_carry", "verdict_follows_a_forced_solution",
            "verdict_follows_a_forced_last_line")
    grid = [["", "verdict is its own checks'", *(key.replace("_", " ") for key in keys)]]
    for name, seeds in results["probes"].items():
        judged = results["rows"]["rm-r1:start" if name == "distilled" else name]  # `rm-r1` starts from `distilled`
        checks = mean_cell(row["follows_checks"] for row in judged.values())
        grid.append([name, checks, *(mean_cell(probe[key]["share"] for probe in seeds.values()) for key in keys)])
    return grid


def looks(results: Results) -> Grid:
    """What a judge looks at: mean over seeds ± 2 s.e. (evaluation/probes.py)."""
    found = {name: results["looks"][f"probes-{name}"] for name in PROBED if f"probes-{name}" in results["looks"]}
    rows = next(iter(next(iter(found.values())).values()))["rows"] if found else {}
    return [["", *found], *([row, *(look_cell(seeds, row) for seeds in found.values())] for row in rows)]


def look_cell(seeds: Mapping[str, Any], row: str) -> str:
    found = [look["rows"][row] for look in seeds.values() if look["rows"][row]["value"] is not None]
    if not found:
        return "-"
    return plus_minus(combine([one["value"] for one in found], [one["error"] or 0.0 for one in found]))


def write_tables(folder: Path) -> None:
    try:
        results: Results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/results.json: cannot be read ({error}); `make tables` writes it") from None
    grids = {title: [COLUMNS, *(row_cells(results, *entry) for entry in entries)] for title, entries in TABLES.items()}
    grids |= {"Model size (Figure 4a)": sizes(results), "Differences": differences(results),
              "Faithfulness, probed (`python -m toy probe`)": probes(results),
              "What a judge looks at (`python -m evaluation.probes`)": looks(results)}
    cpu = sum(cell["cpu"] for seeds in results["seconds"].values() for cell in seeds.values())
    head = ("# The paper's tables in the tiny world\n\nWritten by `python -m recipes.miniature table` from "
            "results.json; [docs/miniature.md](../../docs/miniature.md) says what the columns mean and what came out. "
            f"{cpu / 60:.0f} CPU-minutes in all.\n")
    write_whole(folder / "results.md", "\n".join([head, *(as_markdown(*one) for one in grids.items())]))
    grown = [gain for name, _ in SIZES if (gain := gains(results, name))]
    if len(grown) == len(SIZES) and all(f"cap-{cap}" in results["rows"] for cap in CAPS):
        draw(results, grown, folder / "scaling.png")
    print(f"{folder}/results.md")


def draw(results: Results, grown: Sequence[Estimate], path: Path) -> None:
    """The paper's Figure 4: the gain over size, with a straight line continued, and accuracy over token budget."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", dpi=110)
    sizes = [results["parameters"][name] for name, _ in SIZES]
    slope, begin = statistics.linear_regression([math.log10(size) for size in sizes], [gain.mean for gain in grown])
    reach = [sizes[0] / 2, 10 * sizes[-1]]
    left.errorbar(sizes, [gain.mean for gain in grown], [2 * gain.error for gain in grown], fmt="o", capsize=2)
    left.plot(reach, [begin + slope * math.log10(x) for x in reach], "--", color="C1", label="straight line, continued")
    left.axvspan(sizes[-1], reach[1], alpha=0.08)
    left.legend(fontsize=8, frameon=False)
    left.set(xscale="log", xlabel="parameters", ylabel="gain of RL over its start, %")
    found = [accuracy(results, f"cap-{cap}") for cap in CAPS]
    right.errorbar(CAPS, [one.mean for one in found], [2 * one.error for one in found], fmt="o-", capsize=2)
    right.set(xlabel="token budget, in training and at test", ylabel="held-out accuracy")
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
