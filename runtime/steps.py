"""What the steps of both stages share: learning rate, progress bar, stopping, gradients that are not finite."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
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


# ---- what a run says -----------------------------------------------------------------------------------


def announce(cfg: Any, pairs: int) -> None:
    """Say on rank 0 what a run will use, before it starts."""
    import torch

    if ranks.rank():
        return
    if hasattr(cfg, "group_size"):
        taken, work = cfg.prompts_per_step, f"rounds of {cfg.prompts_per_step} x {cfg.group_size} responses of up to "
        work += f"{cfg.max_response_tokens} tokens"
    else:
        taken, work = cfg.batch_size, f"steps of {cfg.batch_size} of up to {cfg.max_length} tokens"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{cfg.data}: {min(pairs, cfg.steps * taken)} of {pairs} pairs, {cfg.steps} {work}; held out: "
          f"{cfg.held_out or 'none'}\n{cfg.model} on {ranks.world_size()} x {device}; results in {cfg.out}", flush=True)


_shown: dict[str, Any] = {}  # the bar of this process, and when `note` changed it


def progress(total: int, initial: int, label: str):
    """A progress bar with the time left, on rank 0; a line every 20 s where there is no terminal."""
    from tqdm import tqdm

    quiet = not sys.stderr.isatty()
    bar = tqdm(total=total, initial=initial, desc=label, disable=ranks.rank() != 0,
               mininterval=20.0 if quiet else 0.2, ascii=quiet, dynamic_ncols=True)
    _shown.update(bar=bar, label=label, at=time.monotonic())
    return bar


def note(doing: str) -> None:
    """Say in the bar what the current step is doing, as "sampled 12 of 128"; no more often than the bar is drawn."""
    if _shown and not _shown["bar"].disable and time.monotonic() - _shown["at"] >= _shown["bar"].mininterval:
        _shown["bar"].set_description(f"{_shown['label']}, {doing}")
        _shown["at"] = time.monotonic()


def show(bar: Any, record: Mapping[str, float], **names: str) -> None:
    """One step further, with the metrics that the record has: label=metric."""
    bar.set_postfix({label: f"{record[name]:.3g}" for label, name in names.items() if name in record}, refresh=False)
    bar.update()


# ---- stopping ------------------------------------------------------------------------------------------

BAD_STEPS = 5  # steps in a row without a finite gradient that end a run
SILENT_ROUNDS = 5  # rounds in a row without a single verdict, after which it is said


class StopSignal:
    """Ctrl-C and SIGTERM ask for a stop at the end of the step; a second Ctrl-C stops at once."""

    def __enter__(self) -> StopSignal:
        self.asked, self.bad, self.silent = False, 0, 0
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked and ranks.rank() == 0:  # not print(): the signal may come in the middle of another one
            os.write(2, b"\nstopping after this step; Ctrl-C again stops now\n")
        self.asked = True

    def requested(self) -> bool:
        """True on every rank if any rank was asked to stop."""
        return any(ranks.gather(self.asked))

    def after(self, record: Mapping[str, float]) -> bool:
        """Whether the run stops after this step: it was asked to, or no gradient of several steps was finite.

        Says so where no response of several rounds has a verdict: such a run learns nothing.
        """
        self.bad = self.bad + 1 if record["optim/skipped"] == 1 else 0
        self.silent = self.silent + 1 if record.get("rollout/frac_no_verdict") == 1 else 0
        if self.silent == SILENT_ROUNDS:
            self.say_silent()
        return self.requested() or self.bad == BAD_STEPS

    def say_silent(self) -> None:
        if ranks.rank() == 0:
            print(f"\nno response of {self.silent} rounds has a verdict: nothing can be learned. Does the model know "
                  "this prompt (--style, --prompt-file)? Is --max-response-tokens enough?", flush=True)

    def leave(self) -> None:
        """End a run after its resume state is written: KeyboardInterrupt, or UserError if bad gradients ended it."""
        if self.bad < BAD_STEPS:
            raise KeyboardInterrupt
        raise UserError(f"{self.bad} steps in a row had a gradient that is not finite, and did not change the "
                        "weights: lower --lr, and look in metrics.jsonl where optim/skipped begins; the same command "
                        "continues")

    def __exit__(self, *exc: object) -> None:
        if 0 < self.silent < SILENT_ROUNDS:
            self.say_silent()
        if 0 < self.bad < BAD_STEPS and ranks.rank() == 0:
            print(f"\nthe last {self.bad} steps had no finite gradient and changed nothing: lower --lr", flush=True)
        for number, handler in self.before.items():
            signal.signal(number, handler)
