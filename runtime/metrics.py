"""Metrics of a step: sums and counts from all ranks, divided once; seconds between laps."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from runtime.ranks import gather


class Metrics:
    """Sums and counts from all ranks, divided once. A mean that is not finite is left out; `not_finite` counts them."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}
        self.maxima: dict[str, float] = {}

    def add(self, name: str, total: float, count: float = 1.0) -> None:
        s, n = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (s + float(total), n + float(count))

    def add_max(self, name: str, value: float) -> None:
        value = float(value) if math.isfinite(value) else math.inf  # max() would lose a NaN
        self.maxima[name] = max(value, self.maxima.get(name, -math.inf))

    def add_norm(self, norm: float) -> None:
        """A step's gradient norm, and whether the step was skipped for it (model.optimizer_step)."""
        self.add("optim/grad_norm", norm)
        self.add("optim/skipped", not math.isfinite(norm))

    def reduce(self) -> dict[str, float]:
        """{name: sum / count or maximum} over all ranks; a mean over a count of 0 is left out."""
        merged = Metrics()
        for sums, maxima in gather((self.sums, self.maxima)):
            for name, (total, count) in sums.items():
                merged.add(name, total, count)
            for name, value in maxima.items():
                merged.add_max(name, value)
        found = {name: total / count for name, (total, count) in merged.sums.items() if count} | merged.maxima
        finite = {name: value for name, value in found.items() if math.isfinite(value)}
        return finite | ({"not_finite": len(found) - len(finite)} if len(finite) < len(found) else {})


class Clock:
    """Seconds between laps of one step."""

    def __init__(self) -> None:
        self.began = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = max(self.last, time.perf_counter())  # a clock may be set back
        self.laps[name], self.last = now - self.last, now

    def times(self, rollouts: Sequence[Any]) -> dict[str, float]:
        """time/* in seconds (means over ranks; generate_max: the slowest) and sampled tokens/s, evaluation apart."""
        metrics, tokens = Metrics(), sum(len(r.response_ids) for r in rollouts)
        busy = self.last - self.began - self.laps.get("eval", 0.0)
        for name, seconds in (self.laps | {"step": self.last - self.began}).items():
            metrics.add(f"time/{name}", seconds)
        metrics.add_max("time/generate_max", self.laps.get("generate", 0.0))
        return metrics.reduce() | {"tokens/s": per_second(sum(gather(tokens)), busy)}


def per_second(count: float, seconds: float) -> float:
    """A rate; 0 if the clock stood still or was set back."""
    return count / seconds if seconds > 0 else 0.0
