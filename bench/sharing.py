"""Shared prompts on against off, on RM-R1's lengths: the same GRPO round, each prompt once a group or once a response.

    python -m bench.sharing

Both compute the same update, as their gradient norms show.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import tyro

import grpo
from batch import Group, group_tokens
from bench.measure import Side, agree, alternate, gap, write
from bench.ours import Product, Settings
from bench.workload import LENGTHS, SHAPES, as_rollouts, make_folder, make_groups

SETTINGS = Settings(prompts=2, updates=2)


@dataclass(frozen=True)
class Config:
    out: str = "runs/bench/sharing.json"
    """where the JSON goes"""
    shape: str = "24m"
    """model, of workload.py"""
    lengths: str = "rm-r1"
    """length distribution, of workload.py"""
    repeats: int = 3
    """timed repeats of each side, after one to warm up"""
    threads: int = 1
    """torch threads"""
    budget: int = 8192
    """tokens of a micro-batch"""
    settings: Settings = SETTINGS


def apart(groups: list[Group]) -> list[Group]:
    """Every response as a group of its own, so that its prompt is computed again."""
    return [Group(g.prompt_ids, [r], None if g.advantages is None else [g.advantages[i]],
                  None if g.sampler_logprobs is None else [g.sampler_logprobs[i]])
            for g in groups for i, r in enumerate(g.responses)]


def measure(cfg: Config) -> list[dict[str, Any]]:
    torch.set_num_threads(cfg.threads)
    shape, settings = SHAPES[cfg.shape], cfg.settings
    rounds = [make_groups(shape, LENGTHS[cfg.lengths], settings.prompts, settings.group_size, k)
              for k in range(cfg.repeats + 1)]
    with tempfile.TemporaryDirectory() as folder:
        path = make_folder(shape, Path(folder))
        on, off = (Product(path, settings, cfg.budget) for _ in range(2))
    off.grpo = replace(off.grpo, mini_batch=off.grpo.mini_batch * settings.group_size,  # both count groups
                       prompts_per_step=off.grpo.prompts_per_step * settings.group_size)

    def shared(k: int, side: Side) -> None:
        on.update(as_rollouts(rounds[k]), side)

    def repeated(k: int, side: Side) -> None:
        with patch.object(grpo, "make_groups", lambda *args: apart(make(*args))):
            off.update(as_rollouts(rounds[k]), side)

    make = grpo.make_groups
    found = alternate({"shared": shared, "repeated": repeated}, cfg.repeats)
    tokens = {"shared": rounds[1:], "repeated": [apart(groups) for groups in rounds[1:]]}
    counts = {name: sum(group_tokens(g) for groups in part for g in groups) for name, part in tokens.items()}
    return [
        {"prompts": name, "tokens a round": counts[name] // cfg.repeats,
         "seconds": min(side.seconds[1:]), "median": statistics.median(side.seconds[1:]),
         "update alone": min(side.without_part().seconds[1:]), "CPU seconds": min(side.cpu[1:]),
         "agree": agree(found["shared"], found["repeated"]), "norm_gap": gap(found["shared"], found["repeated"])}
        for name, side in found.items()
    ]


def main(cfg: Config) -> None:
    rows = measure(cfg)
    shared, repeated = rows
    names = ("tokens a round", "seconds", "median", "update alone", "CPU seconds")
    rows.append({"prompts": "repeated / shared"} | {name: repeated[name] / shared[name] for name in names})
    write(rows, asdict(cfg), Path(cfg.out))


if __name__ == "__main__":
    main(tyro.cli(Config))
