"""Where the time goes: sft, GRPO update, sampling, by operation and by function of this project.

    python -m bench.hotspots --shape 32k

The shares hold under load too: they are CPU time of one thread.
"""

from __future__ import annotations

import cProfile
import pstats
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from bench.measure import Side, write
from bench.ours import Product, Settings, micro_batch_tokens
from bench.workload import LENGTHS, SHAPES, as_rollouts, make_folder, make_groups

SETTINGS = Settings()
HERE = str(Path(__file__).resolve().parent.parent)


@dataclass(frozen=True)
class Config:
    out: str = "runs/bench/hotspots.json"
    """where the JSON goes"""
    shape: str = "32k"
    """model, of workload.py"""
    lengths: str = "ragged"
    """length distribution, of workload.py"""
    top: int = 8
    """lines of each list"""
    settings: Settings = SETTINGS


def operations(work: Callable[[], Any], top: int) -> list[tuple[str, float, int]]:
    """(operation, share of CPU time, calls) of torch's operations by their own time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        work()
    events = profiler.key_averages()
    total = sum(e.self_cpu_time_total for e in events)
    best = sorted(events, key=lambda e: -e.self_cpu_time_total)[:top]
    return [(e.key, e.self_cpu_time_total / total, e.count) for e in best]


def functions(work: Callable[[], Any], top: int) -> list[tuple[str, float, int]]:
    """(file:function, share of time, calls) of this project's functions, with all that they call."""
    profiler = cProfile.Profile()
    profiler.runcall(work)
    stats = pstats.Stats(profiler)
    own = [(Path(file).name + ":" + name, spent[3] / stats.total_tt, spent[1])  # type: ignore[attr-defined]
           for (file, _, name), spent in stats.stats.items()  # type: ignore[attr-defined]
           if file.startswith(HERE) and "bench" not in file and "site-packages" not in file]
    return sorted(own, key=lambda line: -line[1])[:top]


def work_items(cfg: Config, folder: Path) -> dict[str, Callable[[], Any]]:
    shape, settings, side = SHAPES[cfg.shape], cfg.settings, Side()
    examples = make_groups(shape, LENGTHS[cfg.lengths], settings.sft_batch, 1)
    groups = make_groups(shape, LENGTHS[cfg.lengths], settings.prompts, settings.group_size)
    path = make_folder(shape, folder, stops=True)
    product = Product(path, settings, micro_batch_tokens(groups, settings.rows), vocabulary=shape.vocabulary)
    prompts, rollouts = [g.prompt_ids for g in groups], as_rollouts(groups)
    return {
        "sft": lambda: product.sft_repeat(examples, side),
        "update": lambda: product.update(rollouts, side),
        "sampling": lambda: product.sampler.generate(
            prompts, settings.group_size, 1.0, settings.max_response, range(len(prompts))
        ),
    }


def lines(name: str, by: str, found: Sequence[tuple[str, float, int]]) -> list[dict[str, Any]]:
    return [{"work": name, "by": by, "what": what, "share": share, "calls": calls} for what, share, calls in found]


def measure(cfg: Config) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, work in work_items(cfg, Path(folder)).items():
            work()
            rows += lines(name, "operation", operations(work, cfg.top))
            rows += lines(name, "function", functions(work, cfg.top))
    return rows


def main(cfg: Config) -> None:
    write(measure(cfg), asdict(cfg), Path(cfg.out))


if __name__ == "__main__":
    main(tyro.cli(Config))
