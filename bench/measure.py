"""Clocks, peak memory, tables and JSON: what all benchmarks share.

Other work on the machine only ever adds time, so the minimum of several alternating repeats is the figure
and the median shows how noisy it was.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from evaluation.tables import as_markdown
from runtime.disk import write_whole


@dataclass
class Side:
    """One side's repeats: seconds by the clock and of CPU time, tokens done, and what it computed."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # of each optimiser step
    norms: list[float] = field(default_factory=list)
    part: Side | None = None  # seconds and CPU time of one part of each repeat (see `timed`)

    def begin(self) -> tuple[float, float]:
        if self.part is not None:
            self.part.seconds.append(0.0)
            self.part.cpu.append(0.0)
        return time.perf_counter(), time.process_time()

    def end(self, begun: tuple[float, float], tokens: int) -> None:
        self.seconds.append(time.perf_counter() - begun[0])
        self.cpu.append(time.process_time() - begun[1])
        self.tokens.append(tokens)

    def only_part(self) -> Side:
        assert self.part is not None
        return Side(self.part.seconds, self.part.cpu, self.tokens)

    def without_part(self) -> Side:
        part = self.only_part()
        return Side([s - p for s, p in zip(self.seconds, part.seconds, strict=True)],
                    [s - p for s, p in zip(self.cpu, part.cpu, strict=True)], self.tokens)

    def rates(self, warmup: int) -> list[float]:
        """Tokens per second of each repeat after the warm-up."""
        return [n / s for n, s in zip(self.tokens[warmup:], self.seconds[warmup:], strict=True)]


def timed(function: Callable, side: Side) -> Callable:
    """`function`, its time also counted as `side.part` of the repeat that is under way."""
    part = side.part or Side([0.0], [0.0])

    def run(*args: Any, **kwargs: Any) -> Any:
        began, cpu = time.perf_counter(), time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            part.seconds[-1] += time.perf_counter() - began
            part.cpu[-1] += time.process_time() - cpu

    return run


def agree(ours: Side, theirs: Side, tolerance: float = 1e-4) -> bool:
    """Loss and gradient norm of every step agree. A GRPO loss is a difference of near equal sums: there the
    tolerance is absolute."""
    return len(ours.norms) == len(theirs.norms) > 0 and all(
        abs(a - b) <= tolerance * max(abs(b), floor)
        for x, y, floor in ((ours.losses, theirs.losses, 0.1), (ours.norms, theirs.norms, 0.0))
        for a, b in zip(x, y, strict=True)
    )


def gap(ours: Side, theirs: Side) -> float:
    """Largest relative difference of any step's gradient norm."""
    return max((abs(a - b) / abs(b) for a, b in zip(ours.norms, theirs.norms, strict=False)), default=0.0)


def compare(ours: Side, theirs: Side, warmup: int = 1) -> dict[str, float]:
    """Tokens/s of both (fastest and median repeat) and their ratios; CPU seconds beside the clock's."""
    a, b = ours.rates(warmup), theirs.rates(warmup)
    cpu = [sum(s.cpu[warmup:]) / max(1, sum(s.tokens[warmup:])) for s in (ours, theirs)]
    return {
        "ours": max(a), "theirs": max(b), "ratio": max(a) / max(b),
        "ratio_median": statistics.median(a) / statistics.median(b), "ratio_cpu": cpu[1] / cpu[0],
        "repeats": len(a),
    }


# ---- memory --------------------------------------------------------------------------------------------


def peak_bytes(function: Callable[[], Any]) -> int:
    """Most bytes of tensors alive at once that `function` allocated; the same on every run, whatever the load."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


class ResidentPeak:
    """Growth of the process's resident memory from construction to its highest point since (Linux)."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self.before = self._read("VmRSS")

    def growth(self) -> int:
        return self._read("VmHWM") - self.before

    @staticmethod
    def _read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


# ---- results -------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    processors = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else [platform.processor()]
    return {"python": platform.python_version(), "torch": torch.__version__, "processor": " ".join(processors[:1]),
            "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 2)}


def write(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any], path: Path) -> None:
    """Write the JSON, with the machine and the settings that made it, and print the table: the first row's columns."""
    write_whole(path, json.dumps({"machine": machine(), "config": dict(config), "rows": list(rows)}, indent=2) + "\n")
    names = list(rows[0])
    print(as_markdown(str(path), [names, *([cell(row.get(name, "")) for name in names] for row in rows)]), flush=True)


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
