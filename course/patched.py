"""Exercises and traps: each is a patch, applied to a scratch copy of the project, run there and recorded.

    python -m course.patched exercises                      after make tables: three seeds, before and after
    python -m course.patched exercises --only 03 --seeds 0 --steps 4      does it run?
    python -m course.patched traps                          after make tables: the tests, then 30 rounds with each fault
    python -m course.patched traps --no-train               the tests alone, a few minutes: make traps-red

An exercise (course/exercises) changes the method by at most ten lines. A trap (course/traps) puts one fault in: the
tests that its head names must fail, and must pass without it. Training runs are rows of recipes/miniature.py, so a
run is not repeated while its commands and its code stay the same. The numbers go to exercises.json and traps.json;
exercises.md and traps.md are written by hand, and tests compare their numbers with the JSON.

A patch begins like a mail: `Name: text` lines (further lines of a text are indented), a blank line, then the diff.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from course.handout import HERE, ROOT
from evaluation.tables import Grid
from recipes import miniature
from recipes.miniature import Row
from recipes.miniature_results import Estimate, estimate, rights
from runtime.cli import start
from runtime.disk import read_jsonl, write_whole
from runtime.errors import UserError
from runtime.ranks import program

LEFT_OUT = (".git", "runs", ".venv*", "__pycache__", ".*_cache", ".hypothesis", "*.part")
TABLES = "runs/tables/seed-{seed}"  # where `make tables` leaves the distilled judge, its world and what else is needed
EXERCISED, TRAPPED = Path("runs/exercises"), Path("runs/traps")  # copies of the project, and runs
EARLY = 10  # rounds
HEALTHY = "healthy"


# ---- patches -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Patch:
    """One file; `says` is its head."""

    name: str
    says: Mapping[str, str]
    diff: str

    @property
    def files(self) -> list[str]:
        return re.findall(r"^\+\+\+ b/(\S+)$", self.diff, re.MULTILINE)


def read_patches(kind: str, only: Sequence[str] = ()) -> list[Patch]:
    """The patches of course/exercises or course/traps whose names begin with one of `only`; empty: all."""
    found = []
    for path in sorted((HERE / kind).glob("*.patch")):
        head, _, diff = path.read_text(encoding="utf-8").partition("\n\n")
        says = dict(line.split(": ", 1) for line in re.sub(r"\n +", " ", head).splitlines())
        found.append(Patch(path.stem, says, diff))
    chosen = [patch for patch in found if not only or patch.name.startswith(tuple(only))]
    if not chosen:
        raise UserError(f"--only {' '.join(only)}: there are {', '.join(patch.name for patch in found)}")
    return chosen


def make_tree(folder: Path, patch: Patch | None) -> Path:
    """A fresh copy of the project with the patch applied."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    if patch:
        apply(patch, folder)
    return folder


def apply(patch: Patch, folder: Path) -> None:
    """UserError if the patch does not fit the files in `folder`."""
    # inside a repository git silently passes over paths that are not below its root: it must not find one
    apart = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
    before = [(folder / file).read_bytes() for file in patch.files]
    done = subprocess.run(["git", "apply", "-C1", "-"], input=patch.diff, cwd=folder, env=apart, text=True,
                          capture_output=True)
    if done.returncode or any((folder / f).read_bytes() == b for f, b in zip(patch.files, before, strict=True)):
        raise UserError(f"{patch.name}: does not fit the code ({done.stderr.strip() or 'nothing changed'}); adapt the "
                        "patch")


# ---- exercises -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exercises:
    """Run both sides of each exercise where that is not done yet, and record what is there."""

    only: tuple[str, ...] = ()  # exercises to run, such as 03 (beginnings of names); empty: all
    seeds: tuple[int, ...] = (0, 1, 2)  # seeds of world, weights, data order and sampling (integers)
    # cut every training run to so many steps, to see whether all commands run (steps; exercises.json then goes to
    # runs/exercises); 0: 50 rounds
    steps: int = 0


NEEDED = ("distilled", "world", "world-mixed", "mixed")


def placed(command: str) -> str:
    """The command with the places of what `make tables` leaves."""
    for part in NEEDED:
        command = command.replace(f"{{{part}}}", f"{TABLES}/{part}")
    return command


def sides(patch: Patch) -> dict[str, Row]:
    """{before, changed and perhaps a third: its row}; most exercises share one row before."""
    usual = miniature.rl("{distilled}", script="{tree}grpo.py", every=EARLY)
    line = f"{patch.says.get('Command', usual)} {patch.says.get('Options', '')}".rstrip()
    own = f"{{{patch.name}-world}}"

    def row(name: str, changed: bool, more: str = "") -> Row:
        tree = f"{EXERCISED}/trees/{patch.name}/" if changed else ""
        command = f"{line} {more}".rstrip().replace("{tree}", tree).replace("{data}", own if changed else "{world}")
        return Row(name, (placed(command.replace("{own}", own)),), patch.diff if changed else "")

    baseline = line == usual
    found = {"before": row("baseline" if baseline else f"{patch.name}-before", False), "changed": row(patch.name, True)}
    if "Extra" in patch.says:
        label, more = patch.says["Extra"].split(": ")
        found[label] = row(f"{patch.name}-extra", True, more)
    return found


def all_rows(patches: Sequence[Patch]) -> list[Row]:
    found = {row.name: row for patch in patches for row in sides(patch).values()}
    worlds = [Row(f"{p.name}-world", (p.says["World"].replace("{tree}", f"{EXERCISED}/trees/{p.name}/"),), p.diff)
              for p in patches if "World" in p.says]
    return [*worlds, *found.values()]


def run_exercises(cfg: Exercises) -> None:
    chosen, patches = read_patches("exercises", cfg.only), read_patches("exercises")
    for seed in cfg.seeds:
        check_tables(seed, *NEEDED)
    for patch in patches:
        make_tree(EXERCISED / "trees" / patch.name, patch)
    rows = all_rows(patches)
    wanted = [row.name for patch in chosen for row in sides(patch).values()]
    miniature.execute([task for seed in cfg.seeds
                       for task in miniature.plan(rows, wanted, seed, str(EXERCISED), cfg.steps)])
    found: dict[str, Any] = {patch.name: {} for patch in patches}
    for task in miniature.finished(rows, str(EXERCISED), cfg.steps):
        for patch in patches:
            for label in (label for label, row in sides(patch).items() if row.name == task.row):
                numbers = measured(task.folder, patch.says["Metric"])
                found[patch.name].setdefault(label, {})[str(task.seed)] = numbers
    out = EXERCISED if cfg.steps else HERE
    write_whole(out / "exercises.json", json.dumps(found, separators=(",", ":")) + "\n")
    print("\n".join(" | ".join(row) for row in overview(found, patches)))


def check_tables(seed: int, *needed: str) -> None:
    place = Path(TABLES.format(seed=seed))
    if missing := [name for name in needed if not any((place / name / end).exists() for end in ("model", "rl.jsonl"))]:
        raise UserError(f"no {', '.join(missing)} in {place}; `make tables` makes it")


def measured(folder: Path, metric: str) -> dict[str, Any]:
    """right: 0, 1 or 2 of each held-out pair's verdicts, in a string; accuracy and metric: [[round, value], ...]."""
    if (votes := folder / "results.jsonl").exists():  # of judge.py
        judged = [row for _, row in read_jsonl(votes)]
        return {"right": "".join("2" if row["correct"] else "0" for row in judged),
                "accuracy": [[0, statistics.fmean(row["correct"] for row in judged)]],
                "metric": [[0, statistics.fmean(sum(row["votes"].values()) for row in judged)]]}
    logs = {int(path.stem.split("_")[1]): [row for _, row in read_jsonl(path)]
            for path in sorted((folder / "rollouts").glob("step_*.jsonl"))}
    right: dict[str, int] = {}
    for row in logs[max(logs)]:
        right[row["pair_id"]] = right.get(row["pair_id"], 0) + row["correct"]
    records = [row for _, row in read_jsonl(folder / "metrics.jsonl")]
    if metric.startswith("accuracy on "):
        kind = metric.removeprefix("accuracy on ")
        curve = [(step, statistics.fmean(row["correct"] for row in rows if row["category"] == kind))
                 for step, rows in logs.items()]
    else:
        points = [(row["step"], row[metric]) for row in records if metric in row]
        fives = [points[i : i + 5] for i in range(0, len(points), 5)]
        curve = [(five[-1][0], statistics.fmean(value for _, value in five)) for five in fives]
    accuracy = [(row["step"], row["eval/accuracy"]) for row in records if "eval/accuracy" in row]
    return {"right": "".join(map(str, right.values())), "metric": rounded(curve), "accuracy": rounded(accuracy)}


def rounded(curve: Sequence[tuple[float, float]]) -> list[list[float]]:
    return [[step, float(f"{value:.3g}")] for step, value in curve]


def end(numbers: Mapping[str, Any]) -> float:
    """The metric at the end of a run: its last point, of ten the mean of the last two."""
    values = [value for _, value in numbers["metric"]]
    return statistics.fmean(values[-max(1, len(values) // 5) :])


def overview(found: Mapping[str, Any], patches: Sequence[Patch]) -> Grid:
    """Each side against the one before: accuracy pair by pair, the metric seed by seed; ± is two standard errors."""
    grid = [["", "exercise", f"accuracy after {EARLY} rounds", "at the end", "difference", "metric",
             "before -> changed"]]
    for patch in patches:
        before = found[patch.name].get("before", {})
        for label, side in found[patch.name].items():
            both = [(before[seed], side[seed]) for seed in side if seed in before]
            if label == "before" or not both:
                continue
            pairs = estimate([[y - x for x, y in zip(rights(was), rights(now), strict=True)] for was, now in both])
            known = all(early(one) is not None for two in both for one in two)
            ends = [[statistics.fmean(number(two[i]) for two in both) for i in (0, 1)]
                    for number in (lambda one: statistics.fmean(rights(one)), end)]
            grid.append([patch.name[:2].lstrip("0"), patch.says["Title"] + (f", {label}" * (label != "changed")),
                         shown(gaps(early, both)) if known else "",
                         "{:.3f} -> {:.3f}".format(*ends[0]), shown(pairs), patch.says["Metric"],
                         "{:.3g} -> {:.3g}".format(*ends[1]) + ", **beyond noise**" * gaps(end, both).clear])
    return grid


def early(numbers: Mapping[str, Any]) -> Any:
    """Held-out accuracy after EARLY rounds, while learning still goes on; None if it was not measured."""
    return dict(numbers["accuracy"]).get(EARLY)


def gaps(number: Callable[[Mapping[str, Any]], float], both: Sequence[tuple[Any, Any]]) -> Estimate:
    """The difference in each seed; a seed is one observation."""
    return estimate([[number(now) - number(was)] * 2 for was, now in both])


def shown(one: Estimate) -> str:
    return f"{one.mean:+.3f} ± {2 * one.error:.3f}{', **beyond noise**' * one.clear}"


# ---- traps ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traps:
    """Put each fault in, run the tests that should notice it, then train with it, and record what came out."""

    only: tuple[str, ...] = ()  # traps to run, such as T05 (beginnings of names); empty: all
    train: bool = True  # train with each fault after the tests; --no-train records nothing


def failed_tests(tree: Path, wanted: str, limit: float = 900.0) -> list[str]:
    """Names of the failed tests, without their parameters; pytest stops at the first."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rfE", "-x", *wanted.split()]
    try:
        done = subprocess.run(command, cwd=tree, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, timeout=limit,
                              capture_output=True)
    except subprocess.TimeoutExpired:
        return ["out of time"]
    if done.returncode not in (0, 1):
        raise UserError(f"pytest ended with {done.returncode} in {tree}: {(done.stdout + done.stderr)[-500:]}")
    return sorted(set(re.findall(r"^(?:FAILED|ERROR) (\S+?)(?:\[.*)?(?: - .*)?$", done.stdout, re.MULTILINE)))


def training(patch: Patch | None, kind: str) -> Row:
    """A run that fails is a result too: its last line says why."""
    name = patch.name if patch else HEALTHY
    tree = TRAPPED / "trees" / name
    grpo = miniature.rl("{distilled}", script=f"{tree}/grpo.py", rounds=30, every=10)
    sft = miniature.sft("{world}/start", "{world}/sft.jsonl", "--steps 600").replace("sft.py", f"{tree}/sft.py")
    sft += " && " + miniature.JUDGE.replace("eval.py", f"{tree}/eval.py")
    return Row(f"{name}-{kind}", (f"{placed({'grpo': grpo, 'sft': sft}[kind])} || echo failed",),
               patch.diff if patch else "")


def numbers(folder: Path, log: str) -> dict[str, Any]:
    """The last numbers of a run: curves as means of their last five points, because one round is noisy."""
    path, summary = folder / "metrics.jsonl", folder / "eval" / "summary.json"
    rows = [row for _, row in read_jsonl(path)] if path.exists() else []
    found: dict[str, Any] = {}
    for name in ("reward/mean", "train/loss", "policy/ref_kl", "sync/logprob_diff_mean"):
        if values := [row[name] for row in rows if name in row][-5:]:
            found[name] = float(f"{statistics.fmean(values):.3g}")
    overall = json.loads(summary.read_text())["overall"] if summary.exists() else {}
    accuracy = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row][-1:] or [overall.get("accuracy")]
    for name, value in (("accuracy", accuracy[0]), ("tokens", overall.get("length_mean"))):
        if value is not None:
            found[name] = round(value, 3)
    lines = log.strip().splitlines()
    return found | ({"error": lines[-2]} if lines[-1:] == ["failed"] else {})


def run_traps(cfg: Traps) -> None:
    chosen, path = read_patches("traps", cfg.only), HERE / "traps.json"
    if cfg.train:
        check_tables(0, "distilled", "world")
    red: dict[str, list[str]] = {}
    for patch in (*chosen, None):  # the whole project last: without a fault no test may fail
        name = patch.name if patch else HEALTHY
        tests = patch.says["Test"] if patch else " ".join(sorted({p.says["Test"] for p in chosen}))
        red[name] = failed_tests(make_tree(TRAPPED / "trees" / name, patch), tests)
        print(f"{name}: {', '.join(red[name]) or 'every test passes'}", flush=True)
    if cfg.train:
        rows = [training(patch, patch.says["Run"]) for patch in chosen]
        rows += [training(None, kind) for kind in sorted({patch.says["Run"] for patch in chosen})]
        tasks = miniature.plan(rows, [row.name for row in rows], 0, str(TRAPPED))
        miniature.execute(tasks)
        found = json.loads(path.read_text())
        for task in tasks:
            name = task.row.rpartition("-")[0]
            key = task.row if name == HEALTHY else name
            found[key] = numbers(task.folder, task.log.read_text()) | ({} if name == HEALTHY else {"red": red[name]})
            print(f"{key}: {found[key]}")
        write_whole(path, json.dumps(found, indent=1, sort_keys=True) + "\n")
    if silent := [patch.name for patch in chosen if not red[patch.name]]:
        raise UserError(f"no test noticed {', '.join(silent)}")
    if red[HEALTHY]:
        raise UserError(f"without any fault {', '.join(red[HEALTHY])} fails too")


def main() -> None:
    cfg = tyro.extras.subcommand_cli_from_dict({"exercises": Exercises, "traps": Traps}, prog=program(),
                                               description=__doc__)
    if isinstance(cfg, Exercises):
        run_exercises(cfg)
    else:
        run_traps(cfg)


if __name__ == "__main__":
    start(main)
