"""Traps on purpose: each fault that was met in a public implementation, one at a time, against tests and curves.

    python -m course.traps run --distilled runs/tables/seed-0/distilled     # 17 faults: tests, then 30 rounds each
    python -m course.traps run --no-run                                     # the tests alone, minutes
    python -m course.traps run --only T05 --no-run --all                    # every fast test against one fault
    python -m course.traps table                                            # traps.json -> traps.md

A fault is a file of course/traps. It is applied to a clean copy of the project under runs/traps; the tests that its
head names must then fail, and pass without it. Then the copy trains as the project would, to see what a curve says
of the fault: often nothing. Stage 2 starts from a distilled judge, whose world lies beside it; faults of stage 1
distil themselves. What was done is not repeated while fault and code stay the same.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from course.patches import ROOT, Patch, make_tree, read_patches, scripts
from runtime.cli import start
from runtime.disk import write_whole
from runtime.errors import UserError
from runtime.seeds import digest

HERE = ROOT / "course"
HEALTHY = "healthy"
IMPOSSIBLE: dict[str, str] = {}  # trap -> why no patch can show it here; every one of T1 to T17 can be shown on a CPU
GRPO = ("python {tree}/grpo.py --preset tiny --seed 0 --model {distilled} --data {world}/rl.jsonl "
        "--held-out {world}/held_out.jsonl --prompt-file {world}/prompt.txt --out {out} --steps {steps} "
        "--eval-every 10")
SFT = ("python {tree}/sft.py --preset tiny --seed 0 --model {world}/start --data {world}/sft.jsonl --held-out '' "
       "--prompt-file {world}/prompt.txt --out {out} --steps {sft_steps} && python {tree}/eval.py run --model {out} "
       "--data {world}/held_out.jsonl --prompt-file {world}/prompt.txt --both-orders --rule train --max-tokens 60 "
       "--out {out}/eval")


@dataclass(frozen=True)
class Run:
    """Break the project on purpose, run the tests that should notice, then train."""

    only: tuple[str, ...] = ()
    """Traps to run, such as T05 (beginnings of names); empty: all."""
    distilled: str = "runs/tables/seed-0/distilled"
    """Distilled judge to start from; its world lies beside it."""
    run: bool = True
    """Train with each fault, after the tests."""
    all: bool = False
    """Run the whole fast suite against each fault, not only the tests that should notice."""
    steps: int = 30
    """Rounds of reinforcement (rounds)."""
    sft_steps: int = 600
    """Steps of distillation for faults of stage 1 (steps)."""
    limit: int = 900
    """Longest time for the tests of one fault, and for its training (seconds)."""
    root: str = "runs/traps"
    """Folder of the copies and runs."""
    results: str = "course"
    """Folder for traps.json and traps.md."""


@dataclass(frozen=True)
class Table:
    """traps.json -> traps.md"""

    results: str = "course"
    """Folder of traps.json."""


def number(patch: Patch) -> str:
    """
    >>> number(Patch("T03_mean", {}, ""))
    'T3'
    """
    return f"T{int(patch.name[1:3])}"


# ---- tests and training --------------------------------------------------------------------------------


def shell(command: str, cwd: Path, limit: float) -> tuple[int, str]:
    """Exit code (124: out of time) and what was printed."""
    paths = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": paths, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(["bash", "-c", command], cwd=cwd, env=env, text=True, timeout=limit,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except subprocess.TimeoutExpired:
        return 124, "out of time"
    return done.returncode, done.stdout


def tests(tree: Path, wanted: str, whole: bool, limit: float) -> dict[str, Any]:
    """Failed tests by name, without their parameters."""
    which = '-m "not slow and not vllm"' if whole else f"-x {wanted}"
    code, said = shell(f"python -m pytest -p no:cacheprovider -q -rfE {which}", tree, limit)
    if code not in (0, 1, 124):
        raise UserError(f"pytest ended with {code} in {tree}: {said[-500:]}")
    red = re.findall(r"^(?:FAILED|ERROR) (\S+?)(?:\[.*)?(?: - .*)?$", said, re.MULTILINE)
    return {"red": sorted(set(red)) + ["out of time"] * (code == 124), "all": whole}


def train(tree: Path, kind: str, cfg: Run, out: Path) -> dict[str, Any]:
    """The training run of a copy -> its last numbers; a run that fails is a result too."""
    judge, began = Path(cfg.distilled).resolve(), time.monotonic()
    fill = {"tree": tree.resolve(), "distilled": judge, "world": judge.parent / "world", "out": out.resolve(),
            "steps": cfg.steps, "sft_steps": cfg.sft_steps}
    command = {"grpo": GRPO, "sft": SFT}[kind].format_map(fill)
    code, said = shell(f"rm -rf {out.resolve()}; {command}", ROOT, cfg.limit)
    found: dict[str, Any] = {"exit": code, "seconds": round(time.monotonic() - began)}
    if code:
        last = said.strip().splitlines()[-1]
        found["error"] = last if len(last) <= 160 else last[:160] + " ..."
    log, summary = out / "metrics.jsonl", out / "eval" / "summary.json"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for name in ("reward/mean", "train/loss", "policy/ref_kl", "sync/logprob_diff_mean"):
        if values := [row[name] for row in rows if name in row][-5:]:  # one round is noisy
            found[name] = float(f"{statistics.fmean(values):.3g}")
    accuracy = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row][-1:]
    overall = json.loads(summary.read_text())["overall"] if summary.exists() else {}
    for name, value in (("accuracy", [*accuracy, overall.get("accuracy")][0]), ("tokens", overall.get("length_mean"))):
        if value is not None:
            found[name] = round(value, 3)
    return found


def run_traps(cfg: Run) -> None:
    every = read_patches(HERE / "traps")
    chosen = [patch for patch in every if not cfg.only or patch.name.startswith(cfg.only)]
    if not chosen:
        raise UserError(f"--only {' '.join(cfg.only)}: there are {', '.join(patch.name for patch in every)}")
    if cfg.run and not (Path(cfg.distilled).parent / "world" / "rl.jsonl").exists():
        raise UserError(f"--distilled {cfg.distilled}: no world beside it; `python -m recipes.miniature run distilled "
                        "--seeds 0` makes both, --no-run does without")
    path, root = Path(cfg.results) / "traps.json", Path(cfg.root)
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def once(name: str, kind: str, key: str, make: Callable[[], dict[str, Any]]) -> None:
        entry = found.setdefault(name, {})
        if entry.get(kind, {}).get("key") != key:
            entry[kind] = make() | {"key": key}
            write_whole(path, json.dumps(found, indent=1, sort_keys=True) + "\n")
            print(f"{name}: {entry[kind]}", flush=True)

    code = digest([(ROOT / file).read_text(encoding="utf-8") for file in scripts() if file.suffix == ".py"])
    for patch in (*chosen, None):  # the whole project last: it fails nothing
        name = patch.name if patch else HEALTHY
        wanted = patch.says["Test"] if patch else " ".join(sorted({p.says["Test"] for p in chosen}))
        tree = make_tree(root / "trees" / name, patch, whole=True)
        of_tests = digest([code, patch.diff if patch else "", wanted, cfg.all])
        once(name, "tests", of_tests, lambda t=tree, w=wanted: tests(t, w, cfg.all, cfg.limit))  # type: ignore[misc]
        for kind in sorted({p.says["Run"] for p in ([patch] if patch else chosen)}) if cfg.run else ():
            of_run = digest([code, patch.diff if patch else "", cfg.steps, cfg.sft_steps])
            once(name, kind, of_run, lambda t=tree, k=kind, n=name: train(t, k, cfg, root / f"{n}-{k}"))  # type: ignore[misc]
    write_table(Path(cfg.results))
    if silent := [p.name for p in chosen if not found[p.name]["tests"]["red"]]:
        raise UserError(f"no test noticed {', '.join(silent)}")
    if found[HEALTHY]["tests"]["red"]:
        raise UserError(f"without any fault {', '.join(found[HEALTHY]['tests']['red'])} fails too")


# ---- the table -----------------------------------------------------------------------------------------


def in_words(now: Mapping[str, Any], healthy: Mapping[str, Any]) -> str:
    """The numbers of a run, each beside the healthy run's."""
    if not now:
        return "not run yet"
    parts = [f"`{now['error']}`"] if "error" in now else []
    parts += [f"{name} {now[name]:.3g} ({healthy.get(name, float('nan')):.3g})" for name in SHOWN[1:] if name in now]
    return "; ".join(parts)


SHOWN = ("exit", "reward/mean", "train/loss", "accuracy", "tokens", "policy/ref_kl", "sync/logprob_diff_mean")


def unseen(found: Mapping[str, Any], patches: Sequence[Patch]) -> str:
    """A sentence: the faults whose run ends with the healthy run's very numbers."""
    runs = [(number(patch), found.get(patch.name, {}).get(patch.says["Run"], {}),
             found.get(HEALTHY, {}).get(patch.says["Run"], {})) for patch in patches]
    done = [(name, [now.get(key) for key in SHOWN] == [well.get(key) for key in SHOWN])
            for name, now, well in runs if now and well]
    same = [name for name, equal in done if equal]
    if not done:
        return "No fault has been trained with yet."
    return (f"Of {len(done)} faults {len(same)} end with the healthy run's very numbers, to the last digit shown"
            f"{': ' if same else ''}{', '.join(same)}.")


def links(names: Sequence[str]) -> str:
    found = []
    for name in names:
        file, _, test = name.partition("::")
        found.append(f"[`{test}`](../{file})" if test else name)
    return ", ".join(found)


def write_table(folder: Path) -> None:
    path = folder / "traps.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    healthy = found.get(HEALTHY, {})
    lines = ["| | the fault | should notice | went red | expected of the curve | measured (healthy run) |",
             "|" + "---|" * 6]
    patches = read_patches(HERE / "traps")
    for patch in patches:
        entry, says = found.get(patch.name, {}), patch.says
        red = links(entry["tests"]["red"]) or "**none**" if "tests" in entry else "not run yet"
        shown = in_words(entry.get(says["Run"], {}), healthy.get(says["Run"], {}))
        lines.append(f"| [{number(patch)}](traps/{patch.name}.patch) | **{says['Title']}.** {says['Fault']} "
                     f"| {links(says['Test'].split())} | {red} | {says['Shows']} | {shown} |")
    lines += [f"| {trap} | cannot be shown here | | | | {why} |" for trap, why in IMPOSSIBLE.items()]
    write_whole(folder / "traps.md", f"""# Traps on purpose

Written by `python -m course.traps run` from course/traps and traps.json; do not edit. Each fault was met in a public
implementation (T1 to T17) and is applied alone to a clean copy of the project. The tests that should notice are run
(`-x`: they stop at the first that goes red), then the copy trains: reinforcement from the distilled judge of seed 0,
for T4 a short distillation. reward/mean, train/loss, policy/ref_kl and sync/logprob_diff_mean are means of the last
five rounds or steps, accuracy is held out, tokens is the mean length of held-out chains; one seed.

Give a student a patched copy without its name: which trap is it? The curve tells few of them.
{unseen(found, patches)}

{chr(10).join(lines)}
""")
    print(f"{folder}: traps.json, traps.md")


def main() -> None:
    cfg = tyro.extras.subcommand_cli_from_dict({"run": Run, "table": Table}, description=__doc__)
    if isinstance(cfg, Run):
        run_traps(cfg)
    else:
        write_table(Path(cfg.results))


if __name__ == "__main__":
    start(main)
