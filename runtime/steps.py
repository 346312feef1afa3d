"""What the steps of both stages share: learning rate, progress bar, stopping, gradients that are not finite."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Mapping
from typing import Any

from runtime import ranks
from runtime.errors import UserError


def learning_rate(update_index: int, cfg: Any) -> float:
    """Learning rate of optimiser step `update_index` (0-based; mini-batches, not rollout rounds).

    Linear warm-up that never starts at 0, then constant, linear or cosine down to `lr_floor * lr`.
    """
    if update_index < cfg.warmup_updates:
        return cfg.lr * (update_index + 1) / cfg.warmup_updates
    span = max(1, cfg.total_updates - cfg.warmup_updates)
    progress = min(1.0, (update_index - cfg.warmup_updates) / span)
    if cfg.lr_schedule == "constant":
        return cfg.lr
    falloff = 1.0 - progress if cfg.lr_schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return cfg.lr * (cfg.lr_floor + (1.0 - cfg.lr_floor) * falloff)


# ---- progress, stopping --------------------------------------------------------------------------------


def progress(total: int, initial: int, label: str):
    """A progress bar with the time left, on rank 0; a line every 20 s where there is no terminal."""
    from tqdm import tqdm

    quiet = not sys.stderr.isatty()
    return tqdm(total=total, initial=initial, desc=label, disable=ranks.rank() != 0,
                mininterval=20.0 if quiet else 0.2, ascii=quiet, dynamic_ncols=True)


def show(bar: Any, record: Mapping[str, float], **names: str) -> None:
    """One step further, with the metrics that the record has: label=metric."""
    bar.set_postfix({label: f"{record[name]:.3g}" for label, name in names.items() if name in record}, refresh=False)
    bar.update()


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
        """True on every rank if any rank was asked to stop."""
        return any(ranks.gather(self.asked))

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


SILENT_ROUNDS = 5  # rounds in a row without a verdict, after which a run says so
BAD_STEPS = 5  # this many in a row end a run


def count_bad(record: Mapping[str, float], before: int) -> int:
    """Steps (rounds of GRPO) in a row, this one included, that skipped a gradient because it was not finite."""
    return before + 1 if record["optim/skipped"] else 0


def count_silent(record: Mapping[str, float], before: int) -> int:
    """Rounds in a row, this one included, in which no response had a verdict; at the fifth it is said."""
    silent = before + 1 if record.get("rollout/frac_no_verdict") == 1.0 else 0
    if silent == SILENT_ROUNDS and ranks.rank() == 0:
        print(f"no response of the last {silent} rounds has a verdict, so nothing is learnt: look into rollouts/. Are "
              "the texts cut off (--max-response-tokens), or was the model taught another --style or --prompt-file?",
              file=sys.stderr, flush=True)
    return silent


def stop_early(bad: int) -> None:
    """End a run after its resume state is written: KeyboardInterrupt, or UserError if bad gradients ended it."""
    if bad < BAD_STEPS:
        raise KeyboardInterrupt
    raise UserError(
        f"{bad} steps in a row had a gradient that is not finite, and did not change the weights: lower --lr, and look "
        "in metrics.jsonl where optim/skipped begins; the same command continues"
    )
