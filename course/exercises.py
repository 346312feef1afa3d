"""Ten changes of at most ten lines, each with its effect in the tiny world: three seeds, before and after.

    python -m course.exercises run --distilled 'runs/tables/seed-{seed}/distilled'     # after make tables
    python -m course.exercises run --only 03 --seeds 0 --steps 4 --at-once 1           # does it run?
    python -m course.exercises table                                                   # exercises.json -> .md, .png

A change is a file of course/exercises, a diff with a head that says what to do and what to expect. It is applied to
a copy of the scripts under runs/exercises/trees; both sides start from one distilled judge per seed and are rows of
recipes/miniature.py, so what is done is not repeated while commands and code stay the same.
"""

from __future__ import annotations

import json
import signal
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from course.patches import ROOT, Patch, make_tree, read_patches
from recipes import miniature
from recipes.miniature import Row
from recipes.miniature_results import Estimate, estimate, in_words, rights
from runtime.cli import start
from runtime.disk import read_jsonl, write_whole
from runtime.errors import UserError

HERE = ROOT / "course"
GRPO = miniature.rl("{distilled}", script="{tree}grpo.py", every=10)
STARTS = ("world", "distilled", "world-mixed", "mixed")  # rows of recipes/miniature.py that everything begins with
BEFORE, AFTER = "before", "changed"
EARLY = 10  # rounds
NOT_MEASURED = "Not measured yet."


@dataclass(frozen=True)
class Run:
    """Run both sides of each exercise where that is not done yet, then collect what is there."""

    only: tuple[str, ...] = ()
    """Exercises to run, such as 03 (beginnings of names); empty: all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of world, weights, data order and sampling (integers)."""
    distilled: str = ""
    """Distilled judges to start from, {seed} in the path; beside each lie its world, the judge `mixed` and
    `world-mixed`, as `make tables` leaves them. Empty: made here."""
    at_once: int = 2
    """Runs side by side, a thread each (runs)."""
    steps: int = 0
    """Cut every training run to so many steps, to see whether all commands run (steps); 0: 50 rounds."""
    root: str = "runs/exercises"
    """Folder of the copies and runs."""
    results: str = "course"
    """Folder for exercises.json, .md and .png; with --steps they go to --root."""


@dataclass(frozen=True)
class Table:
    """exercises.json -> exercises.md and exercises.png"""

    results: str = "course"
    """Folder of exercises.json."""


# ---- what is run ---------------------------------------------------------------------------------------


def sides(patch: Patch, trees: str) -> dict[str, Row]:
    """{before, changed and perhaps a third: its row}; most exercises share one row before."""
    says, own = patch.says, f"{{{patch.name}-world}}"
    line = f"{says.get('Command', GRPO)} {says.get('Options', '')}".rstrip()

    def row(name: str, changed: bool, more: str = "") -> Row:
        values = {"{tree}": f"{trees}/{patch.name}/" if changed else "", "{data}": own if changed else "{world}",
                  "{own}": own}
        return Row(name, (filled(f"{line} {more}".rstrip(), values),))

    found = {BEFORE: row("baseline" if line == GRPO else f"{patch.name}-before", False), AFTER: row(patch.name, True)}
    if "Extra" in says:
        label, more = says["Extra"].split(": ")
        found[label] = row(f"{patch.name}-extra", True, more)
    return found


def all_rows(patches: Sequence[Patch], root: str, distilled: str) -> list[Row]:
    found = {row.name: row for row in miniature.ROWS if row.name in STARTS}
    for patch in patches:
        found |= {row.name: row for row in sides(patch, f"{root}/trees").values()}
        if "World" in patch.says:
            command = patch.says["World"].replace("{tree}", f"{root}/trees/{patch.name}/")
            found[f"{patch.name}-world"] = Row(f"{patch.name}-world", (command,))
    beside = Path(distilled).parent
    places = {f"{{{name}}}": distilled if name == "distilled" else str(beside / name) for name in STARTS}
    places = places if distilled else {}
    return [Row(row.name, tuple(filled(command, places) for command in row.commands)) for row in found.values()]


def filled(command: str, places: Mapping[str, str]) -> str:
    for mark, place in places.items():
        command = command.replace(mark, place)
    return command


def check_starts(cfg: Run) -> None:
    for seed in cfg.seeds if cfg.distilled else ():
        judge = Path(cfg.distilled.format(seed=seed))
        if not all((place / "model").is_dir() for place in (judge, judge.parent / "mixed")):
            raise UserError(f"--distilled: {judge} is no finished judge with another, mixed, beside it")
        if not all((judge.parent / world / "rl.jsonl").exists() for world in ("world", "world-mixed")):
            raise UserError(f"--distilled: {judge} has not its worlds, world and world-mixed, beside it")


def run_exercises(cfg: Run) -> None:
    patches = read_patches(HERE / "exercises")
    chosen = [patch for patch in patches if not cfg.only or patch.name.startswith(cfg.only)]
    if not chosen or cfg.at_once < 1 or cfg.steps < 0 or not cfg.seeds:
        raise UserError("--only: the beginning of a name in course/exercises; --at-once at least 1, --steps at least "
                        "0, --seeds one seed or more")
    check_starts(cfg)
    for patch in patches:
        make_tree(Path(cfg.root, "trees", patch.name), patch)
    rows = all_rows(patches, cfg.root, cfg.distilled)
    wanted = [row.name for patch in chosen for row in sides(patch, f"{cfg.root}/trees").values()]
    tasks = [task for seed in cfg.seeds for task in miniature.plan(rows, wanted, seed, cfg.root, cfg.steps)]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    miniature.execute(tasks, cfg.at_once)
    out = Path(cfg.root if cfg.steps else cfg.results)
    collect(cfg, patches, rows, out)
    write_table(out)


# ---- what is measured ----------------------------------------------------------------------------------


def collect(cfg: Run, patches: Sequence[Patch], rows: Sequence[Row], out: Path) -> None:
    """{exercise: {side: {seed: numbers}}} of all finished runs, not only of those just made."""
    found: dict[str, Any] = {patch.name: {} for patch in patches}
    for seed in sorted(int(side.name.removeprefix("seed-")) for side in Path(cfg.root).glob("seed-*")):
        tasks = {t.row: t for t in miniature.plan(rows, [r.name for r in rows], seed, cfg.root, cfg.steps)}
        for patch in patches:
            for label, row in sides(patch, f"{cfg.root}/trees").items():
                if tasks[row.name].load():
                    numbers = measured(tasks[row.name].folder, patch.says["Metric"])
                    found[patch.name].setdefault(label, {})[str(seed)] = numbers
    write_whole(out / "exercises.json", json.dumps(found, separators=(",", ":")) + "\n")


def measured(folder: Path, metric: str) -> dict[str, Any]:
    """right: 0, 1 or 2 of each held-out pair's verdicts, in a string; accuracy and metric: [[round, value], ...]."""
    if (votes := folder / "results.jsonl").exists():  # of judge.py
        judged = [row for _, row in read_jsonl(votes)]
        chains = statistics.fmean(sum(row["votes"].values()) for row in judged)
        share = statistics.fmean(row["correct"] for row in judged)
        right = "".join("2" if row["correct"] else "0" for row in judged)
        return {"right": right, "accuracy": [[0, share]], "metric": [[0, chains]]}
    logs = {int(path.stem.split("_")[1]): [row for _, row in read_jsonl(path)]
            for path in sorted((folder / "rollouts").glob("step_*.jsonl"))}
    last: dict[str, int] = {}
    for row in logs[max(logs)]:
        last[row["pair_id"]] = last.get(row["pair_id"], 0) + row["correct"]
    records = [row for _, row in read_jsonl(folder / "metrics.jsonl")]
    if metric.startswith("accuracy on "):
        kind = metric.removeprefix("accuracy on ")
        curve = [[step, statistics.fmean(row["correct"] for row in rows if row["category"] == kind)]
                 for step, rows in logs.items()]
    else:
        points = [(row["step"], row[metric]) for row in records if metric in row]
        fives = [points[i : i + 5] for i in range(0, len(points), 5)]
        curve = [[five[-1][0], statistics.fmean(value for _, value in five)] for five in fives]
    state = max((folder / "checkpoints").glob("step_*/progress.json"))
    drawn = json.loads(state.read_text(encoding="utf-8"))["position"]
    accuracy = [[row["step"], row["eval/accuracy"]] for row in records if "eval/accuracy" in row]
    return {"right": "".join(map(str, last.values())), "pairs drawn": drawn, "metric": short(curve),
            "accuracy": short(accuracy)}


def short(curve: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[step, float(f"{value:.3g}")] for step, value in curve]


def end(numbers: Mapping[str, Any]) -> float:
    """The metric at the end of a run: its last point, of ten the mean of the last two."""
    values = [value for _, value in numbers["metric"]]
    return statistics.fmean(values[-max(1, len(values) // 5) :])


@dataclass(frozen=True)
class Compared:
    """One side against the one before: held-out accuracy pair by pair, the metric seed by seed."""

    accuracies: tuple[float, float]
    accuracy: Estimate
    levels: tuple[float, float]
    metric: Estimate
    early: Estimate | None  # of accuracy after EARLY rounds, where learning still goes on
    drawn: tuple[float, float]


def compared(sides: Mapping[str, Any], label: str) -> Compared | None:
    """None where no seed has both."""
    seeds = [seed for seed in sides.get(label, {}) if seed in sides.get(BEFORE, {})]
    if not seeds:
        return None
    befores, nows = ([sides[side][seed] for seed in seeds] for side in (BEFORE, label))

    def of_both(number: Callable[[Mapping[str, Any]], float]) -> tuple[float, float]:
        return statistics.fmean(map(number, befores)), statistics.fmean(map(number, nows))

    def gaps(number: Callable[[Mapping[str, Any]], float]) -> Estimate:
        found = [number(now) - number(before) for before, now in zip(befores, nows, strict=True)]
        error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else 0.0
        return Estimate(statistics.fmean(found), tuple(found), error)

    pairs = [[y - x for x, y in zip(rights(before), rights(now), strict=True)]
             for before, now in zip(befores, nows, strict=True)]
    known = all(EARLY in dict(one["accuracy"]) for one in (*befores, *nows))
    return Compared(of_both(lambda one: statistics.fmean(rights(one))), estimate(pairs), of_both(end), gaps(end),
                    gaps(lambda one: dict(one["accuracy"])[EARLY]) if known else None,
                    of_both(lambda one: one.get("pairs drawn", 0)))


def verdict(sides: Mapping[str, Any], label: str, metric: str) -> list[str]:
    """What `label` changed against `before`, in sentences."""
    if (found := compared(sides, label)) is None:
        return [f"- {label}: {NOT_MEASURED}"]
    gaps = ", ".join(f"{gap:+.3g}" for gap in found.metric.seeds)
    said = [f"- {label}, held-out accuracy: {in_words(found.accuracy)}",
            f"- {label}, {metric}: {found.levels[0]:.3g} -> {found.levels[1]:.3g}, {found.metric.mean:+.3g} ± "
            f"{2 * found.metric.error:.2g} ({gaps}), {judged(found.metric)}"]
    if found.early:
        said.insert(0, f"- {label}, held-out accuracy after {EARLY} rounds: {in_words(found.early)}")
    before, now = found.drawn
    return said + ([f"- {label}, pairs drawn: {before:.0f} -> {now:.0f}"] if before != now else [])


def judged(found: Estimate) -> str:
    return "one seed, not judged" if len(found.seeds) == 1 else "beyond noise" if found.clear else "within noise"


# ---- the page and the plot -----------------------------------------------------------------------------


def section(patch: Patch, sides: Mapping[str, Any]) -> str:
    says, metric = patch.says, patch.says["Metric"]
    labels = [label for label in sides if label != BEFORE] if BEFORE in sides else []
    lines = [line for label in labels for line in verdict(sides, label, metric)] or [NOT_MEASURED]
    found = f"*Came out.* {says['Found']}\n\n" if labels and "Found" in says else ""
    return f"""## {patch.name[:2].lstrip("0")}. {says["Title"]}

{says["Change"]} ([solution](exercises/{patch.name}.patch), {patch.changed} line{"s" * (patch.changed > 1)})

*Where.* {says["Where"]}

*Expect.* {says["Expect"]}

*Measured.* The metric is {metric}.

{chr(10).join(lines)}

{found}*Question.* {says["Question"]}
"""


def overview(found: Mapping[str, Any], patches: Sequence[Patch]) -> str:
    """All of them in one table, and how many differences are more than noise."""

    def difference(one: Estimate | None) -> str:
        return f"{one.mean:+.3f} ± {2 * one.error:.3f}{', **beyond noise**' * one.clear}" if one else ""

    rows, estimates = [], list[tuple[Estimate | None, Estimate, Estimate]]()
    for patch in patches:
        sides = found.get(patch.name, {})
        for label in (label for label in sides if label != BEFORE):
            if (one := compared(sides, label)) is None:
                continue
            estimates.append((one.early, one.accuracy, one.metric))
            name = patch.says["Title"] + (f", {label}" if label != AFTER else "")
            levels = "{:.3g} -> {:.3g}".format(*one.levels) + ", **beyond noise**" * one.metric.clear
            rows.append((patch.name[:2].lstrip("0"), name, difference(one.early),
                         "{:.3f} -> {:.3f}".format(*one.accuracies), difference(one.accuracy), patch.says["Metric"],
                         levels))
    head = ("", "exercise", f"accuracy after {EARLY} rounds", "at the end", "difference", "metric", "before -> changed")
    table = "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
    early, last, metric = (sum(one.clear for one in column if one) for column in zip(*estimates, strict=True))
    return f"""{table}

Beyond noise are {early} differences of accuracy after {EARLY} rounds, {last} at the end and {metric} of the metric,
which most changes set by themselves. Of so many comparisons one or the other is so by chance."""


def write_table(folder: Path) -> None:
    path = folder / "exercises.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    patches = read_patches(HERE / "exercises")
    text = "\n".join(section(patch, found.get(patch.name, {})) for patch in patches)
    shown = f"![both sides, each seed](exercises.png)\n\n{overview(found, patches)}"
    write_whole(folder / "exercises.md", f"""# Ten changes of at most ten lines

Written by `python -m course.exercises` from course/exercises and exercises.json; do not edit. For lecturers: the
patches are the solutions. Both sides start from the same distilled judge and train 50 rounds in the tiny world.
Accuracy is greedy over 250 held-out pairs in both orders, differences are taken pair by pair within a seed; ± is two
standard errors, the larger of the pairs' and the seeds'. A metric is its mean over the last ten rounds, ± of the
seeds alone, as for accuracy after {EARLY} rounds. "Beyond noise": more than that, and every seed on one side; three
seeds make a rough error. Left in the plot held-out accuracy, right the metric, over rounds: thin lines are seeds,
thick ones their means.

{shown if any(found.values()) else NOT_MEASURED}

{text}""")
    if any(found.values()):
        draw(found, patches, folder / "exercises.png")
    print(f"{folder}: exercises.md")


def draw(found: Mapping[str, Any], patches: Sequence[Patch], path: Path) -> None:
    import io

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    figure, axes = plt.subplots(5, 4, figsize=(13, 12), layout="constrained", dpi=100)
    for patch, left, right in zip(patches, axes.flat[::2], axes.flat[1::2], strict=True):
        for colour, (label, seeds) in enumerate(found.get(patch.name, {}).items()):
            for axis, kind in ((left, "accuracy"), (right, "metric")):
                plot(axis, [numbers[kind] for numbers in seeds.values()], label, f"C{colour}")
        left.set_title(f"{patch.name[:2].lstrip('0')}. {patch.says['Title']}", fontsize=9, loc="left")
        right.set_title(patch.says["Metric"], fontsize=9, loc="left")
        left.set_ylabel("held-out accuracy", fontsize=8)
        for axis in (left, right):
            axis.grid(alpha=0.3)
            axis.tick_params(labelsize=8)
        if found.get(patch.name):
            left.legend(fontsize=7)
    figure.supxlabel("rounds (8: seeds)", fontsize=9)
    whole = io.BytesIO()
    figure.savefig(whole)
    plt.close(figure)
    small = io.BytesIO()  # 64 colours: a third of the size
    Image.open(whole).convert("RGB").quantize(64).save(small, "png", optimize=True)
    path.write_bytes(small.getvalue())


def plot(axis: Any, curves: Sequence[Sequence[Sequence[float]]], label: str, colour: str) -> None:
    """Each seed a thin line and their mean a thick one; of runs with a single number a point at each seed."""
    if len(curves[0]) == 1:
        axis.plot(range(len(curves)), [curve[0][1] for curve in curves], "o", color=colour, label=label)
        axis.set_xticks(range(len(curves)), [f"seed {i}" for i in range(len(curves))])
        return
    for curve in curves:
        axis.plot(*zip(*curve, strict=True), color=colour, alpha=0.4, linewidth=0.8)
    mean = [[points[0][0], statistics.fmean(value for _, value in points)] for points in zip(*curves, strict=False)]
    axis.plot(*zip(*mean, strict=True), color=colour, linewidth=2, label=label)


def main() -> None:
    cfg = tyro.extras.subcommand_cli_from_dict({"run": Run, "table": Table}, description=__doc__)
    if isinstance(cfg, Run):
        run_exercises(cfg)
    else:
        write_table(Path(cfg.results))


if __name__ == "__main__":
    start(main)
