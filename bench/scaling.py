"""Time and memory against tokens, vocabulary and group size, and a plot.

    python -m bench.scaling

What has to hold: time grows linearly in tokens; the log-probs' memory does not grow with length x vocabulary
(a (tokens, vocabulary) table never exists: its size is shown beside the peak).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
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


@dataclass(frozen=True)
class Config:
    out: str = "runs/bench/scaling.json"
    """where the JSON goes; the plot stands beside it"""
    prompts: tuple[int, ...] = (4, 8, 16, 32)
    """prompts of a round, for time against tokens"""
    groups: tuple[int, ...] = (1, 2, 4, 8, 16)
    """group sizes, at 8 prompts"""
    targets: tuple[int, ...] = (512, 1024, 2048, 4096)
    """response tokens, for the log-probs' memory"""
    vocabularies: tuple[int, ...] = (2048, 8192, 32768)
    """for the log-probs' memory, and for time at 8 prompts"""
    hidden: int = 128
    """model width"""
    repeats: int = 3
    """timed repeats, after one to warm up; the fastest counts"""


LENGTHS = Lengths(64, 32, 0.0)  # equal: padding would blur the slope


def shape(cfg: Config, vocabulary: int = 2048) -> Shape:
    return Shape(vocabulary, hidden=cfg.hidden, layers=2, intermediate=3 * cfg.hidden)


def point(cfg: Config, prompts: int = 8, group_size: int = 4, vocabulary: int = 2048) -> dict[str, Any]:
    """One GRPO update on given rollouts: tokens through the model, seconds, peak bytes of tensors."""
    settings = Settings(prompts=prompts, updates=1, group_size=group_size)
    groups = make_groups(shape(cfg, vocabulary), LENGTHS, prompts, group_size)
    with tempfile.TemporaryDirectory() as folder:
        product = Product(make_folder(shape(cfg, vocabulary), Path(folder)), settings, budget=2048)
    side = Side()
    for _ in range(cfg.repeats + 1):
        product.update(as_rollouts(groups), side)
    return {"prompts": prompts, "group size": group_size, "vocabulary": vocabulary,
            "tokens": sum(map(group_tokens, groups)), "seconds": min(side.seconds[1:]),
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


def exponent(rows: Sequence[dict[str, Any]], x: str, y: str) -> float:
    """Slope of log y over log x, least squares: 1 is linear."""
    points = torch.tensor([[row[x], row[y]] for row in rows], dtype=torch.float64).log()
    points = points - points.mean(0)
    return float((points[:, 0] * points[:, 1]).sum() / points[:, 0].square().sum())


def measure(cfg: Config) -> dict[str, list[dict[str, Any]]]:
    torch.set_num_threads(1)
    return {
        "tokens": [point(cfg, prompts=n) for n in cfg.prompts],
        "vocabulary": [point(cfg, vocabulary=v) for v in cfg.vocabularies],
        "group size": [point(cfg, group_size=g) for g in cfg.groups],
        "head": [head_point(n, v, cfg.hidden) for v in cfg.vocabularies for n in cfg.targets],
    }


def plot(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(11, 6), constrained_layout=True)
    for axis, name in zip(axes.flat, ("tokens", "group size", "vocabulary"), strict=False):
        seconds = [row["seconds"] for row in found[name]]
        axis.plot([row[name] for row in found[name]], seconds, "o-")
        axis.set(xlabel=name, ylabel="seconds", title=f"an update against {name}", ylim=(0, 1.1 * max(seconds)))
    memory = [row["peak MB"] for row in found["tokens"]]
    axes[1, 0].plot([row["tokens"] for row in found["tokens"]], memory, "o-")
    axes[1, 0].set(xlabel="tokens", ylabel="MB", title="an update's peak", ylim=(0, 1.1 * max(memory)))
    for v in dict.fromkeys(row["vocabulary"] for row in found["head"]):
        rows = [row for row in found["head"] if row["vocabulary"] == v]
        x = [row["targets"] for row in rows]
        line = axes[1, 1].plot(x, [row["peak MB"] for row in rows], "o-", label=f"vocabulary {v:,}")
        axes[1, 1].plot(x, [row["logits MB"] for row in rows], ":", color=line[0].get_color())
    axes[1, 1].set(xlabel="response tokens", ylabel="MB", yscale="log", title="log-probs, gradients (dotted: logits)")
    axes[1, 1].legend(fontsize=8)
    axes[1, 2].axis("off")
    figure.savefig(path, dpi=120)


def main(cfg: Config) -> None:
    found = measure(cfg)
    rows = [{"against": name} | row for name, part in found.items() for row in part]
    columns = ["against", *dict.fromkeys(k for row in rows for k in row if k != "against")]
    write([{c: row.get(c, "") for c in columns} for row in rows], asdict(cfg), Path(cfg.out))
    plot(found, Path(cfg.out).with_suffix(".png"))
    print(f"seconds grow with tokens to the power of {exponent(found['tokens'], 'tokens', 'seconds'):.2f}")


if __name__ == "__main__":
    main(tyro.cli(Config))
