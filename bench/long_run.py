"""Thousands of rounds in one process: does memory, time or the run folder grow without bound?

    python -m bench.long_run --model runs/toy/sft --world runs/toy

Every --every rounds: resident memory, open files, threads, and the bytes in the run folder by what they are. The first
--warm-up rounds, in which caches fill, do not count. Linux (/proc). Ctrl-C ends it early, with what was seen so far.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import tyro

import grpo
from evaluation import tables
from runtime import cli, disk
from runtime.errors import UserError
from runtime.run_folder import RunFolder


@dataclass(frozen=True)
class Config:
    model: str = "runs/toy/sft"
    """distilled checkpoint to start from: a folder or a run folder"""
    world: str = "runs/toy"
    """folder of the tiny world (python -m toy build)"""
    out: str = "runs/bench/long_run.json"
    """where the JSON goes; the run folder stands beside it and is removed at the end"""
    rounds: int = 2000
    """GRPO rounds of the tiny preset"""
    every: int = 50
    """rounds between two samples"""
    warm_up: int = 200
    """rounds that growth is not counted in"""
    prompts: int = 16
    """pairs a round, an even number, in two updates"""
    eval_every: int = 20
    """rounds between two evaluations"""


def sample(rounds: int, folder: Path) -> dict[str, Any]:
    """What the process and its run folder hold now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    sizes = {"metrics": 0, "rollouts": 0, "checkpoints": 0}
    for file in folder.rglob("*"):
        top = file.relative_to(folder).parts[0].removesuffix(".jsonl")
        if top in sizes and file.is_file():
            sizes[top] += file.stat().st_size
    return {"round": rounds, "MB": pages * os.sysconf("SC_PAGE_SIZE") / 1e6, "files": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")), "objects": len(gc.get_objects())} | sizes


def watched(cfg: Config, folder: Path) -> tuple[list[dict[str, Any]], list[float]]:
    """Run, to its end or to Ctrl-C -> (samples, seconds of each round without its evaluation)."""
    samples: list[dict[str, Any]] = []
    seconds: list[float] = []
    honest: Callable = RunFolder.log

    def log(self: RunFolder, record: dict[str, Any], name: str = "metrics.jsonl") -> None:
        honest(self, record, name)
        if "time/step" not in record:  # the last evaluation
            return
        seconds.append(record["time/step"] - record["time/eval"])
        if (record["step"] + 1) % cfg.every == 0:
            samples.append(sample(record["step"] + 1, folder))

    world = Path(cfg.world)
    settings = replace(grpo.PRESETS["tiny"], model=cfg.model, data=str(world / "rl.jsonl"), steps=cfg.rounds,
                       held_out=str(world / "held_out.jsonl"), prompt_file=str(world / "prompt.txt"),
                       prompts_per_step=cfg.prompts, mini_batch=cfg.prompts // 2,
                       eval_every=cfg.eval_every, out=str(folder))
    with mock.patch.object(RunFolder, "log", log), contextlib.suppress(KeyboardInterrupt):
        grpo.train(settings)
    return samples, seconds


def findings(samples: Sequence[dict[str, Any]], seconds: Sequence[float], warm_up: int) -> dict[str, float]:
    """Growth from the first sample after the warm-up to the last; the median round of the first and last quarter."""
    counted = [one for one in samples if one["round"] >= warm_up] or list(samples)
    first, last, rest = counted[0], counted[-1], seconds[warm_up if len(seconds) > 4 * warm_up else 0 :]
    quarters = [statistics.median(part) for part in (rest[: len(rest) // 4], rest[-(len(rest) // 4) :])]
    rounds = last["round"] - first["round"] or 1
    return {
        "rounds": last["round"],
        "MB after the warm-up": round(first["MB"], 1),
        "MB at the end": round(last["MB"], 1),
        "memory growth, %": round(100 * (last["MB"] / first["MB"] - 1), 2),
        "objects a round": round((last["objects"] - first["objects"]) / rounds, 2),
        "open files, more": last["files"] - first["files"],
        "threads, more": last["threads"] - first["threads"],
        "seconds a round, first quarter": round(quarters[0], 4),
        "seconds a round, last quarter": round(quarters[1], 4),
        "metrics, bytes a round": round((last["metrics"] - first["metrics"]) / rounds, 1),
        "rollouts, bytes a round": round((last["rollouts"] - first["rollouts"]) / rounds, 1),
        "checkpoints, bytes more": last["checkpoints"] - first["checkpoints"],
    }


def main(cfg: Config) -> None:
    if cfg.rounds < 2 * cfg.every or cfg.rounds < 4:
        raise UserError("--rounds: at least two samples (--every) and four rounds are needed")
    path, began = Path(cfg.out), time.monotonic()
    folder = path.with_suffix(".run")
    shutil.rmtree(folder, ignore_errors=True)
    samples, seconds = watched(cfg, folder)
    if len(samples) < 2:
        raise UserError("stopped before there were two samples")
    found = findings(samples, seconds, cfg.warm_up) | {"minutes": round((time.monotonic() - began) / 60, 1)}
    disk.write_whole(path, json.dumps({"found": found, "samples": samples}, indent=1) + "\n")
    shutil.rmtree(folder)
    head = list(samples[0])
    rows = [[f"{one[name]:,.1f}" if name == "MB" else f"{one[name]:,}" for name in head] for one in samples]
    print(tables.as_text("samples", [head, *rows[:: max(1, len(rows) // 20)]]))
    print(tables.as_text("growth", [["", "value"], *([name, str(value)] for name, value in found.items())]))
    print(path)


if __name__ == "__main__":
    cli.start(lambda: main(tyro.cli(Config)))
