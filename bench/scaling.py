"""Time and memory of an update against tokens; memory of the log-probs against tokens and vocabulary.

    python -m bench.scaling

What has to hold: time grows linearly in tokens; the log-probs' memory does not grow with length x vocabulary
(a (tokens, vocabulary) table never exists: its size is shown beside the peak).
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from batch import group_tokens
from bench.measure import Side, peak_bytes, write
from bench.ours import Product, Settings
from bench.workload import Lengths, Shape, as_rollouts, make_folder, make_groups
from ops.head import target_scores
from runtime.cli import start
from runtime.ranks import program


@dataclass(frozen=True)
class Config:
    out: str = "runs/bench/scaling.json"  # where the JSON goes
    prompts: tuple[int, ...] = (4, 8, 16, 32)  # prompts of a round, for time against tokens
    targets: tuple[int, ...] = (512, 1024, 2048, 4096)  # response tokens, for the log-probs' memory
    vocabularies: tuple[int, ...] = (2048, 8192, 32768)  # for the log-probs' memory
    hidden: int = 128  # model width
    repeats: int = 3  # timed repeats, after one to warm up; the fastest counts


LENGTHS = Lengths(64, 32, 0.0)  # equal: padding would blur the slope


def point(cfg: Config, prompts: int, group_size: int = 4) -> dict[str, Any]:
    """One GRPO update on given rollouts: tokens through the model, seconds, peak bytes of tensors."""
    shape = Shape(2048, hidden=cfg.hidden, layers=2, intermediate=3 * cfg.hidden)
    settings = Settings(prompts=prompts, updates=1, group_size=group_size)
    groups = make_groups(shape, LENGTHS, prompts, group_size)
    with tempfile.TemporaryDirectory() as folder:
        product = Product(make_folder(shape, Path(folder)), settings, budget=2048)
    side = Side()
    for _ in range(cfg.repeats + 1):
        product.update(as_rollouts(groups), side)
    return {"prompts": prompts, "tokens": sum(map(group_tokens, groups)), "seconds": min(side.seconds[1:]),
            "median": statistics.median(side.seconds[1:]),
            "peak MB": peak_bytes(lambda: product.update(as_rollouts(groups), side)) / 1e6}


def head_point(targets: int, vocabulary: int, hidden: int) -> dict[str, Any]:
    """Log-probs of N targets and their gradients: seconds, peak bytes, and what the (N, V) logits would take."""
    torch.manual_seed(0)
    states = torch.randn(targets, hidden, requires_grad=True)
    weight = torch.randn(vocabulary, hidden, requires_grad=True)
    ids = torch.randint(vocabulary, (targets,))
    seconds = 0.0

    def run() -> None:
        nonlocal seconds
        began = time.perf_counter()
        target_scores(states, weight, ids).logprobs.sum().backward()
        seconds = time.perf_counter() - began

    run()
    states.grad = weight.grad = None
    return {"targets": targets, "vocabulary": vocabulary, "peak MB": peak_bytes(run) / 1e6,
            "gradients MB": 4 * hidden * (vocabulary + targets) / 1e6, "logits MB": 4 * targets * vocabulary / 1e6,
            "seconds": seconds}


def main(cfg: Config) -> None:
    torch.set_num_threads(1)
    out, updates = Path(cfg.out), [point(cfg, n) for n in cfg.prompts]
    write(updates, asdict(cfg), out)
    logs = [[math.log(row[name]) for row in updates] for name in ("tokens", "seconds")]
    print(f"seconds grow with tokens to the power of {statistics.linear_regression(*logs).slope:.2f}")
    heads = [head_point(n, v, cfg.hidden) for v in cfg.vocabularies for n in cfg.targets]
    write(heads, asdict(cfg), out.with_name(f"{out.stem}-head.json"))


if __name__ == "__main__":
    start(lambda: main(tyro.cli(Config, prog=program())))
