"""This project against TRL's SFTTrainer and GRPOTrainer: same model, ids, precision; losses first, then time.

    python -m bench.against_trl                       a few minutes: TRL with its compact head, both vocabularies
    python -m bench.against_trl --full                beside them equal lengths, TRL as shipped, equal micro-batches

Runs in an environment that has both (`make bench`, requirements/trl.txt). Both sides alternate step by step in
one process. A row whose losses and gradient norms do not agree to 1e-4 at every step shows no ratio.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import tyro

from batch import Group
from bench.measure import ResidentPeak, Side, agree, compare, gap, write
from bench.ours import Product, Settings, micro_batch_tokens
from bench.workload import LENGTHS, SHAPES, as_rollouts, make_folder, make_groups
from runtime.cli import start
from runtime.ranks import program

SETTINGS = Settings()


@dataclass(frozen=True)
class Config:
    out: str = "runs/bench/against_trl.json"  # where the JSON goes
    # training also at equal lengths (nothing to pad), against TRL as shipped, and with micro-batches as TRL's
    full: bool = False
    repeats: int = 3  # timed repeats of each side, after one to warm up
    vocabularies: tuple[str, ...] = ("2k", "32k")  # shapes of workload.py
    # what to measure; replay: a GRPO round on given rollouts, step: a round with its sampling
    measures: tuple[str, ...] = ("sft", "replay", "step", "memory")
    settings: Settings = SETTINGS  # what both sides are given (bench/ours.py)


@dataclass(frozen=True)
class Case:
    """One comparison: model, lengths, TRL with or without its compact head, and whose micro-batch this side takes."""

    vocabulary: str
    lengths: str
    compact: bool
    equal: bool = False

    def label(self, measure: str) -> dict[str, str]:
        return {"measure": measure, "vocabulary": self.vocabulary, "lengths": self.lengths,
                "TRL": "compact head" if self.compact else "as shipped",
                "micro-batch": "as TRL's" if self.equal else "own"}

    def groups(self, settings: Settings, sft: bool) -> list[Group]:
        """The sequences of a repeat of SFT steps, or a round's prompts with their responses."""
        count, size = (settings.sft_steps * settings.sft_batch, 1) if sft else (settings.prompts, settings.group_size)
        return make_groups(SHAPES[self.vocabulary], LENGTHS[self.lengths], count, size)

    def budget(self, groups: Sequence[Group], settings: Settings) -> int:
        """Tokens of this side's micro-batch."""
        if len(groups[0].responses) == 1:
            return micro_batch_tokens(groups, settings.rows if self.equal else settings.own_sft_rows)
        return micro_batch_tokens(groups, settings.group_size if self.equal else SHAPES[self.vocabulary].rows)


def cases(cfg: Config) -> list[Case]:
    wanted = [Case(v, lengths, True) for v in cfg.vocabularies for lengths in ("ragged", "equal")]
    beside = [Case(v, "ragged", *kind) for v in cfg.vocabularies for kind in ((False, False), (True, True))]
    return wanted + beside if cfg.full else [case for case in wanted if case.lengths == "ragged"]


def row(case: Case, measure: str, ours: Side, theirs: Side, same: bool, difference: float) -> dict[str, Any]:
    """A line of the table; ratios are left out where the sides did not compute the same."""
    found: dict[str, Any] = dict(compare(ours, theirs)) if same else {}
    return case.label(measure) | {"unit": "tokens/s"} | found | {"agree": same, "norm_gap": difference}


# ---- the comparisons -----------------------------------------------------------------------------------


def compare_sft(case: Case, cfg: Config, folder: Path) -> Iterator[dict[str, Any]]:
    from bench import trl_side

    ours, groups = Side(), case.groups(cfg.settings, True)
    path = make_folder(SHAPES[case.vocabulary], folder)
    product = Product(path, cfg.settings, case.budget(groups, cfg.settings), reference=False)

    def turn(k: int) -> None:
        product.sft_repeat(groups, ours)

    theirs = trl_side.sft(path, groups, cfg.settings, cfg.repeats + 1, case.compact, turn)
    yield row(case, "SFT step", ours, theirs, agree(ours, theirs), gap(ours, theirs))


def compare_replay(case: Case, cfg: Config, folder: Path) -> Iterator[dict[str, Any]]:
    """A round on given rollouts: the update alone, the scoring passes alone (old and reference), and both."""
    from bench import trl_side

    ours, groups = Side(), case.groups(cfg.settings, False)
    path = make_folder(SHAPES[case.vocabulary], folder)
    product = Product(path, cfg.settings, case.budget(groups, cfg.settings))

    def turn(k: int) -> None:
        product.update(as_rollouts(groups), ours)

    theirs = trl_side.grpo(path, groups, cfg.settings, cfg.repeats + 1, case.compact, turn)
    same, difference = agree(ours, theirs), gap(ours, theirs)
    yield row(case, "GRPO update", ours.without_part(), theirs.without_part(), same, difference)
    yield row(case, "GRPO scoring", ours.only_part(), theirs.only_part(), same, difference)
    yield row(case, "GRPO round on given rollouts", ours, theirs, same, difference)


def compare_step(case: Case, cfg: Config, folder: Path) -> Iterator[dict[str, Any]]:
    """A whole round. Each side draws its own samples, so what must agree is what both find greedily."""
    from bench import trl_side

    ours, groups = Side(), case.groups(cfg.settings, False)
    path = make_folder(SHAPES[case.vocabulary], folder, stops=case.lengths == "ragged")
    product = Product(path, cfg.settings, case.budget(groups, cfg.settings))
    prompts = [g.prompt_ids for g in groups]
    found = product.sampler.generate(prompts, 1, 0.0, 32, range(len(prompts)))
    same = [r.response_ids for r in found] == trl_side.greedy(path, prompts, 32)

    def turn(k: int) -> None:
        seeds = range(k * len(prompts), (k + 1) * len(prompts))  # other samples in every round
        product.whole_step(prompts, seeds, ours)

    theirs = trl_side.grpo(path, groups, cfg.settings, cfg.repeats + 1, case.compact, turn, replay=False)
    yield row(case, "sampling", ours.only_part(), theirs.only_part(), same, 0.0)
    yield row(case, "whole GRPO round", ours, theirs, same, 0.0)


def compare_memory(case: Case, cfg: Config, folder: Path) -> Iterator[dict[str, Any]]:
    """Growth of resident memory over the loaded models, each side in its own process."""
    for measure in ("SFT", "GRPO"):
        sides = []
        for side in ("ours", "trl"):
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                sides.append(pool.submit(memory_of, side, measure == "SFT", case, cfg.settings, folder).result())
        ours, theirs = sides
        yield case.label(f"memory, {measure}") | {
            "unit": "MB", "ours": ours / 1e6, "theirs": theirs / 1e6, "ratio": ours / theirs,
        }


def memory_of(side: str, sft: bool, case: Case, settings: Settings, folder: Path) -> int:
    """Two repeats of one side; from its second step on it also holds Adam's moments."""
    torch.set_num_threads(1)
    groups, peaks = case.groups(settings, sft), []
    path = make_folder(SHAPES[case.vocabulary], folder)

    def ready() -> None:
        peaks.append(ResidentPeak())

    if side == "trl":
        from bench import trl_side

        run = trl_side.sft if sft else trl_side.grpo
        run(path, groups, settings, 2, case.compact, ready=ready)
    else:
        product = Product(path, settings, case.budget(groups, settings), reference=not sft)
        ready()
        for _ in range(2):
            product.sft_repeat(groups, Side()) if sft else product.update(as_rollouts(groups), Side())
    return peaks[0].growth()


# ---- the run -------------------------------------------------------------------------------------------

MEASURES: dict[str, Callable[[Case, Config, Path], Iterator[dict[str, Any]]]] = {
    "sft": compare_sft, "replay": compare_replay, "step": compare_step, "memory": compare_memory,
}


def main(cfg: Config) -> None:
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for case in cases(cfg):
        main_case = case.compact and case.lengths == "ragged" and not case.equal
        beside = ("sft", "replay", "memory") if case.equal else ("sft", "replay")
        asked = cfg.measures if main_case else [m for m in cfg.measures if m in beside]
        for measure in asked:
            with tempfile.TemporaryDirectory() as folder:
                rows += MEASURES[measure](case, cfg, Path(folder))
            write(rows, asdict(cfg), Path(cfg.out))  # what is done is kept if the run is stopped


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    start(lambda: main(tyro.cli(Config, prog=program())))
