"""What the steps of a run share: learning rate, progress bar, stopping, steps that are not finite."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Mapping
from typing import Protocol

from runtime import ranks
from runtime.errors import UserError


class Schedule(Protocol):
    """The fields of a training config that the learning rate depends on."""

    @property
    def lr(self) -> float: ...
    @property
    def lr_schedule(self) -> str: ...
    @property
    def lr_floor(self) -> float: ...
    @property
    def warmup_updates(self) -> int: ...
    @property
    def total_updates(self) -> int: ...


def learning_rate(update_index: int, cfg: Schedule) -> float:
    """Learning rate of optimiser step `update_index` (0-based; mini-batches, not rollout rounds).

    Linear warm-up that never starts at 0, then constant, linear or cosine down to `lr_floor * lr`.
    """
    if update_index < cfg.warmup_updates:
        return cfg.lr * (update_index + 1) / cfg.warmup_updates
    span = max(1, cfg.total_updates - cfg.warmup_updates)
    progress = min(1.0, (update_index - cfg.warmup_updates) / span)
    falloff = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[cfg.lr_schedule]
    floor = 1.0 if cfg.lr_schedule == "constant" else cfg.lr_floor
    return cfg.lr * (floor + (1.0 - floor) * falloff)


# ---- progress, stopping --------------------------------------------------------------------------------


def progress(total: int, initial: int, label: str):
    """A progress bar with the time left, on rank 0; a line every 20 s where there is no terminal."""
    from tqdm import tqdm

    quiet = not sys.stderr.isatty()
    return tqdm(total=total, initial=initial, desc=label, disable=ranks.rank() != 0,
                mininterval=20.0 if quiet else 0.2, ascii=quiet, dynamic_ncols=True)


class StopSignal:
    """Ctrl-C and SIGTERM ask for a stop at the end of the step; a second Ctrl-C stops at once."""

    def __enter__(self) -> StopSignal:
        self.asked = False
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def requested(self) -> bool:
        """True on every rank as soon as one rank was asked."""
        return any(ranks.gather(self.asked))

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


BAD_STEPS = 5  # as many in a row end a run


def count_bad(record: Mapping[str, float], before: int) -> int:
    """Steps (rounds of GRPO) in a row, this one included, in which a gradient was not finite and was not used."""
    return before + 1 if record["optim/skipped"] else 0


def stop_early(bad: int) -> None:
    """End a run whose resume state is written: KeyboardInterrupt, or UserError if it was gradients that ended it."""
    if bad < BAD_STEPS:
        raise KeyboardInterrupt
    raise UserError(
        f"{bad} steps in a row met a gradient that is not finite, and left the weights as they were: "
        "lower --lr, look at metrics.jsonl from where optim/skipped begins; the same command continues"
    )
