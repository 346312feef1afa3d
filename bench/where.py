"""Where the time of a step goes: useful floating-point operations against the machine's, and CPU time by operation.

    python -m bench.where

Useful is what no implementation can leave out: each prompt once per group, no padding, attention over the pairs that
see each other, the head on response tokens only, nothing computed twice. The machine's rate is that of large float32
matmuls, measured in turn with the update in the same process. Shares of CPU time hold under load too.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from batch import Group
from bench.measure import Side, alternate, write
from bench.ours import Product, Settings, micro_batch_tokens
from bench.workload import LENGTHS, SHAPES, Shape, as_rollouts, make_folder, make_groups

SETTINGS = Settings(prompts=2, updates=1)


@dataclass(frozen=True)
class Config:
    out: str = "runs/bench/where.json"
    """where the JSON goes"""
    shapes: tuple[str, ...] = ("24m", "78m")
    """models compared with the machine, of workload.py"""
    lengths: str = "half"
    """length distribution for these, of workload.py"""
    repeats: int = 3
    """timed updates, after one to warm up"""
    budget: int = 8192
    """tokens of a micro-batch"""
    matmul: tuple[int, ...] = (1024, 2048)
    """sizes of the square matmuls; the fastest counts"""
    profiled: str = "32k"
    """model whose operations are listed, of workload.py"""
    profiled_lengths: str = "ragged"
    """length distribution for it, of workload.py"""
    top: int = 8
    """operations listed of each kind of work"""
    settings: Settings = SETTINGS


# ---- against the machine -------------------------------------------------------------------------------


def forward_flops(shape: Shape, group: Group) -> int:
    """One forward pass over a group with its prompt shared; a backward pass is twice that.

    >>> one = Shape(vocabulary=10, hidden=4, layers=1, heads=2, kv_heads=1, intermediate=3)
    >>> forward_flops(one, Group([1, 2], [[3, 4]]))     # 3 tokens, 6 visible pairs, 2 targets
    760
    """
    head_dim = shape.hidden // shape.heads
    attention = shape.hidden * head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    layer = 2 * (attention + 3 * shape.hidden * shape.intermediate)
    prompt, rest = len(group.prompt_ids), [max(len(r) - 1, 0) for r in group.responses]
    pairs = prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in rest)
    body = shape.layers * (layer * (prompt + sum(rest)) + 4 * shape.heads * head_dim * pairs)
    return body + 2 * shape.hidden * shape.vocabulary * sum(map(len, group.responses))


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
        product = Product(make_folder(shape, Path(folder)), settings, cfg.budget)
    rates: list[float] = []

    def machine(k: int, side: Side) -> None:
        rates.extend(matmul_rate(size) for size in cfg.matmul for _ in range(5))

    def update(k: int, side: Side) -> None:
        product.update(as_rollouts(groups), side)

    whole = alternate({"machine": machine, "update": update}, cfg.repeats)["update"]
    forward, peak, alone = sum(forward_flops(shape, g) for g in groups), max(rates), whole.without_part()
    return {
        "shape": name, "parameters (M)": sum(p.numel() for p in product.policy.parameters()) / 1e6,
        "matmul GFLOP/s": peak / 1e9, "useful GFLOP": 3 * forward / 1e9, "seconds": min(alone.seconds[1:]),
        "update": 3 * forward / min(alone.seconds[1:]) / peak,
        "with reference pass": 4 * forward / min(whole.seconds[1:]) / peak,
    }


# ---- by operation --------------------------------------------------------------------------------------


def work_items(cfg: Config, folder: Path) -> dict[str, Callable[[], Any]]:
    shape, settings, side = SHAPES[cfg.profiled], cfg.settings, Side()
    examples = make_groups(shape, LENGTHS[cfg.profiled_lengths], settings.sft_batch, 1)
    groups = make_groups(shape, LENGTHS[cfg.profiled_lengths], settings.prompts, settings.group_size)
    path = make_folder(shape, folder, stops=True)
    product = Product(path, settings, micro_batch_tokens(groups, settings.rows), vocabulary=shape.vocabulary)
    prompts, rollouts = [g.prompt_ids for g in groups], as_rollouts(groups)
    return {
        "sft": lambda: product.sft_repeat(examples, side),
        "update": lambda: product.update(rollouts, side),
        "sampling": lambda: product.sampler.generate(prompts, settings.group_size, 1.0, settings.max_response,
                                                     range(len(prompts))),
    }


def operations(cfg: Config) -> list[dict[str, Any]]:
    """torch's operations by their own CPU time."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, work in work_items(cfg, Path(folder)).items():
            work()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
                work()
            events = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
            total = sum(e.self_cpu_time_total for e in events)
            rows += [{"work": name, "operation": e.key, "share": e.self_cpu_time_total / total, "calls": e.count}
                     for e in events[: cfg.top]]
    return rows


def main(cfg: Config) -> None:
    torch.set_num_threads(1)  # several threads would be compared with a matmul that scales better than they do
    out = Path(cfg.out)
    write([against_machine(name, cfg) for name in cfg.shapes], asdict(cfg), out)
    write(operations(cfg), asdict(cfg), out.with_name(f"{out.stem}-operations.json"))


if __name__ == "__main__":
    main(tyro.cli(Config))
