"""What a term's specification asks of the equations, in plain Python. Not in the handout: see fixture `expected`."""

from __future__ import annotations

import math
import statistics
from typing import Any

Spec = dict[str, Any]


def advantages(spec: Spec, group: list[float], scale: bool = True, eps: float | None = None) -> list[float]:
    centred = [r - statistics.fmean(group) for r in group]
    if not scale or len(group) == 1:
        return centred
    spread = {
        "unbiased": statistics.stdev(group),
        "population": statistics.pstdev(group),
        "mean-absolute": statistics.fmean(map(abs, centred)),
    }[spec["spread"]]
    return [c / (spread + (spec["eps"] if eps is None else eps)) for c in centred]


def surrogate(spec: Spec, ratio: float, gain: float, low: float, high: float) -> list[Any]:
    """[loss, clipped, slope in log p]"""
    least, most = {
        "linear": (1 - low, 1 + high),
        "exponential": (math.exp(-low), math.exp(high)),
        "reciprocal": (1 / (1 + low), 1 + high),
    }[spec["clip"]]
    plain, held = ratio * gain, min(max(ratio, least), most) * gain
    return [-held, True, 0.0] if held < plain else [-plain, False, -plain]


def kl(spec: Spec, d: float) -> list[float]:
    """[value, slope in d]"""
    inner = max(-20.0, min(20.0, d))
    value, slope = {
        "k3": (math.exp(inner) - inner - 1, math.exp(inner) - 1),
        "k2": (inner * inner / 2, inner),
        "symmetric": (math.cosh(inner) - 1, math.sinh(inner)),
    }[spec["kl"]]
    return [10.0, 0.0] if value > 10 else [value, slope]


def divisor(spec: Spec, length: int) -> float:
    """Of a response's sum under agg "seq"."""
    return {"mean": length, "sqrt": math.sqrt(length), "floor": max(length, 4)}[spec["aggregation"]]
