"""How much of the machine a GRPO update uses: useful floating-point operations over what matmuls alone reach.

    python -m bench.flops

Useful is what no implementation can leave out: each prompt once per group, no padding, attention over the pairs
that see each other, the head on response tokens only, nothing recomputed. The machine's rate is that of large
float32 matmuls, measured in turn with the update in the same process.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from batch import Group
from bench.measure import Side, alternate, write
from bench.ours import Product, Settings
from bench.workload import LENGTHS, SHAPES, Shape, as_rollouts, make_folder, make_groups

SETTINGS = Settings(prompts=2, updates=1)


@dataclass(frozen=True)
class Config:
    out: str = "runs/bench/flops.json"
    """where the JSON goes"""
    shapes: tuple[str, ...] = ("24m", "78m")
    """models, of workload.py"""
    lengths: str = "half"
    """length distribution, of workload.py"""
    repeats: int = 3
    """timed updates, after one to warm up"""
    budget: int = 8192
    """tokens of a micro-batch"""
    matmul: tuple[int, ...] = (1024, 2048)
    """sizes of the square matmuls; the fastest counts"""
    settings: Settings = SETTINGS


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


def plain_layers(product: Product, groups: Sequence[Group], side: Side) -> None:
    """Forward and backward of the layers alone on unbroken causal rows as long as the groups: what the
    framework itself reaches."""
    from batch import collate
    from ops.attention import visible

    product.policy.zero_grad()
    for i in range(len(groups)):
        batch = collate(groups, [i], "cpu")
        mask = visible(batch.group, batch.response)
        begun = side.begin()
        hidden = product.policy.lm.model(input_ids=batch.inputs, position_ids=batch.position_ids, attention_mask=mask,
                                         use_cache=False).last_hidden_state
        hidden.backward(torch.ones_like(hidden))
        side.end(begun, batch.inputs.numel())
    product.policy.zero_grad()


def measure(name: str, cfg: Config) -> dict[str, Any]:
    torch.set_num_threads(1)  # several threads would be held against a matmul that scales better than they do
    shape, settings = SHAPES[name], cfg.settings
    groups = make_groups(shape, LENGTHS[cfg.lengths], settings.prompts, settings.group_size)
    with tempfile.TemporaryDirectory() as folder:
        product = Product(make_folder(shape, Path(folder)), settings, cfg.budget)
    rates: list[float] = []

    def machine(k: int, side: Side) -> None:
        rates.extend(matmul_rate(size) for size in cfg.matmul for _ in range(5))

    def layers(k: int, side: Side) -> None:
        plain_layers(product, groups, side)

    def update(k: int, side: Side) -> None:
        product.update(as_rollouts(groups), side)

    found = alternate({"machine": machine, "layers": layers, "update": update}, cfg.repeats)
    forward, peak = sum(forward_flops(shape, g) for g in groups), max(rates)
    head = sum(2 * shape.hidden * shape.vocabulary * len(r) for g in groups for r in g.responses)
    n = len(groups)
    times = [sum(found["layers"].seconds[k * n : (k + 1) * n]) for k in range(1, cfg.repeats + 1)]
    alone, whole = found["update"].without_part(), found["update"]
    return {
        "shape": name, "parameters (M)": sum(p.numel() for p in product.policy.parameters()) / 1e6,
        "matmul GFLOP/s": peak / 1e9, "useful GFLOP": 3 * forward / 1e9, "seconds": min(alone.seconds[1:]),
        "update": 3 * forward / min(alone.seconds[1:]) / peak,
        "with reference pass": 4 * forward / min(whole.seconds[1:]) / peak,
        "layers alone": 3 * (forward - head) / min(times) / peak,
    }


def main(cfg: Config) -> None:
    write([measure(name, cfg) for name in cfg.shapes], asdict(cfg), Path(cfg.out))


if __name__ == "__main__":
    main(tyro.cli(Config))
