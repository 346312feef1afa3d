"""The cold start: reinforcement without distilled traces, on format and answer. Eq. 11, Table 2

    R = 1[format: every part that the prompt asks for is there] + 1[answer: the verdict is right]    in {0, 1, 2}

    python -m variants.cold_start --preset tiny --model runs/toy/start        # from nothing: hardly a 1 is ever drawn
    python -m variants.cold_start --style rubrics --model Qwen/Qwen2.5-7B-Instruct ...

A distilled judge keeps its format by itself, so stage 2 rewards the verdict alone; a model that was never shown
a chain has to be paid for writing one. `--style` says which parts are asked for: plain (a verdict after some
text), rubrics (rubric, comparison, verdict) or instruct (type, then solution or rubric, comparison, verdict).
The two indicators are independent: a broken chain with the right verdict earns 1, a whole one with the wrong
verdict too. Only differences within a group count, so that 1 shifts nothing where all samples have the format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

import grpo
from cor_prompt import Style
from data import Pair
from reward import format_reward, parse_verdict
from rollout import Rollout
from runtime import cli

PRESETS = {name: replace(base, out=f"{base.out}-cold-start") for name, base in grpo.PRESETS.items()}


def cold_start_reward(text: str, winner: str, style: Style) -> float:
    """1 for the format and 1 for the right verdict. Eq. 11

    >>> whole = "<rubric>short</rubric><eval>A is shorter</eval><answer>[[A]]</answer>"
    >>> [cold_start_reward(whole, winner, "rubrics") for winner in "AB"]
    [2.0, 1.0]
    >>> [cold_start_reward("<answer>[[A]]</answer>", winner, "rubrics") for winner in "AB"]
    [1.0, 0.0]
    """
    return format_reward(text, style) + float(parse_verdict(text) == winner)


def cold_start_score(rollouts: Sequence[Rollout], pairs: Sequence[Pair], policy: Any, tokenizer: Any,
                     cfg: grpo.Config) -> torch.Tensor:
    """`Method.score`: (P, G) rewards."""
    size = len(rollouts) // len(pairs)
    rewards = [cold_start_reward(r.answer, pairs[i // size].winner, cfg.style) for i, r in enumerate(rollouts)]
    return torch.tensor(rewards).view(len(pairs), size)


if __name__ == "__main__":
    cli.start(lambda: grpo.train(cli.parse(grpo.Config, PRESETS), grpo.Method(score=cold_start_score)))
