"""Useful floating-point operations of an update against those that the machine can do.

    python -m bench.where

Useful is what no implementation can leave out: each prompt once per group, no padding, attention over the pairs that
see each other, the head on response tokens only, nothing computed twice. The machine's rate is that of large float32
matmuls, measured in turn with the update in the same process.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from bench.measure import Side, write
from bench.ours import Product, Settings
from bench.workload import LENGTHS, SHAPES, as_rollouts, forward_flops, make_folder, make_groups
from runtime.cli import start
from runtime.ranks import program

SETTINGS = Settings(prompts=2, updates=1)


@dataclass(frozen=True)
class Config:
    out: str = "runs/bench/where.json"  # where the JSON goes
    shapes: tuple[str, ...] = ("24m", "78m")  # models compared with the machine, of workload.py
    lengths: str = "half"  # length distribution for these, of workload.py
    repeats: int = 3  # timed updates, after one to warm up
    matmul: tuple[int, ...] = (1024, 2048)  # sizes of the square matmuls; the fastest counts
    settings: Settings = SETTINGS


def matmul_rate(size: int) -> float:
    """Floating-point operations per second of one square float32 matmul."""
    a, b, out = (torch.ones(size, size) for _ in range(3))
    began = time.perf_counter()
    torch.mm(a, b, out=out)
    return 2 * size**3 / (time.perf_counter() - began)


def against_machine(name: str, cfg: Config) -> dict[str, Any]:
    shape, settings = SHAPES[name], cfg.settings
    groups = make_groups(shape, LENGTHS[cfg.lengths], settings.prompts, settings.group_size)
    with tempfile.TemporaryDirectory() as folder:
        product = Product(make_folder(shape, Path(folder)), settings, budget=8192)
    rates, whole = [], Side()
    for _ in range(cfg.repeats + 1):
        rates += [matmul_rate(size) for size in cfg.matmul for _ in range(5)]
        product.update(as_rollouts(groups), whole)
    forward, peak, alone = sum(forward_flops(shape, g) for g in groups), max(rates), whole.without_part()
    return {
        "shape": name, "parameters (M)": sum(p.numel() for p in product.policy.parameters()) / 1e6,
        "matmul GFLOP/s": peak / 1e9, "useful GFLOP": 3 * forward / 1e9, "seconds": min(alone.seconds[1:]),
        "update": 3 * forward / min(alone.seconds[1:]) / peak,
        "with reference pass": 4 * forward / min(whole.seconds[1:]) / peak,
    }


def main(cfg: Config) -> None:
    torch.set_num_threads(1)  # several threads would be compared with a matmul that scales better than they do
    write([against_machine(name, cfg) for name in cfg.shapes], asdict(cfg), Path(cfg.out))


if __name__ == "__main__":
    start(lambda: main(tyro.cli(Config, prog=program())))
