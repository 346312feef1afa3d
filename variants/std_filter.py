"""RLPR's filter: groups whose rewards differ less than usual are replaced from the stream. arXiv 2506.18254

    keep a group if  std(r_1 .. r_G) >= beta * s        s = 0.99 s + 0.01 (mean std of the last round), from round 11

Rewards that are probabilities are never quite equal, and division by a small deviation makes small differences
large: a group of 0.998 and 0.999 would count as much as a group of 0 and 1. "Usual" is a running mean over rounds. It
starts as the mean of rounds 6 to 10 and includes refused groups. Before it has started nothing is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

import grpo
from runtime import disk, ranks, run_folder
from runtime.errors import UserError


def running_std(history: Sequence[float]) -> float:
    """Mean deviation of each round so far -> the running mean; 0 until it starts.

    >>> running_std([9.0] * 9), running_std([9.0] * 5 + [1.0, 2.0, 3.0, 4.0, 5.0])
    (0.0, 3.0)
    """
    ema = sum(history[5:10]) / 5 if len(history) >= 10 else 0.0
    for newest in history[10:]:
        ema = 0.99 * ema + 0.01 * newest
    return ema


class StdFilter:
    """`Method.keep` and `Method.advantage`. The history is in the run folder, for a run that is continued."""

    def __init__(self, out: str, beta: float):
        self.path, self.beta = Path(out) / "std.json", beta
        checkpoint = run_folder.latest_checkpoint(out)
        rounds = int(checkpoint.name.removeprefix("step_")) if checkpoint else 0
        if rounds and not self.path.exists():
            raise UserError(f"{out} holds states of a run without std.json, not of this method; use another --out")
        kept = disk.read_json(self.path) if rounds else []
        if not isinstance(kept, list) or len(kept) < rounds or not all(isinstance(one, float) for one in kept):
            raise UserError(f"{self.path}: not the deviations of {rounds} rounds; use another --out")
        self.history: list[float] = kept[:rounds]
        self.seen: list[float] = []  # deviations of this rank's groups in this round, refused ones too

    def keep(self, rewards: Tensor) -> Tensor:
        """(P, G) rewards of one pass -> (P,) bool."""
        deviations = rewards.std(dim=1)
        self.seen += deviations.tolist()
        return ~(deviations < self.beta * running_std(self.history))

    def advantage(self, rewards: Tensor, scale_by_std: bool) -> Tensor:
        """Called once a round, with the groups that were kept: GRPO's, but 0 where only rounding differs."""
        seen = [deviation for part in ranks.gather(self.seen) for deviation in part]
        self.history, self.seen = [*self.history, math.fsum(seen) / len(seen)], []
        if ranks.rank() == 0:
            disk.write_whole(self.path, json.dumps(self.history))
        flat = rewards.std(dim=1, keepdim=True) < 1e-6
        return grpo.group_advantages(rewards, scale_by_std).masked_fill(flat, 0.0)
