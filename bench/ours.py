"""This project's side: the bodies of `sft.train`'s and `grpo.train`'s loops, one call each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch

import grpo
import model
import sft
from batch import Group
from bench.measure import Side, timed
from bench.workload import make_tokenizer, reward, tokens
from rollout import Rollout, TorchSampler


@dataclass(frozen=True)
class Settings:
    """What both sides are given. The update does not depend on the micro-batch, so this side takes one that is
    small enough for a CPU's cache; TRL has its default of 8, and a whole group."""

    rows: int = 8  # sequences in TRL's SFT micro-batch
    # sequences in this side's SFT micro-batch (as many tokens as that many have on average); in GRPO a shape's own
    own_sft_rows: int = 2
    group_size: int = 7  # responses per prompt
    prompts: int = 4  # prompts per GRPO round
    updates: int = 2  # optimiser steps per GRPO round
    sft_batch: int = 16  # sequences per SFT step
    sft_steps: int = 4  # SFT steps per timed repeat: enough that one batch's luck with padding does not decide
    max_response: int = 128  # tokens; sampling stops there
    lr: float = 1e-5  # learning rate
    kl_coef: float = 0.001  # weight of the KL


def micro_batch_tokens(groups: Sequence[Group], rows: int) -> int:
    """As many tokens as `rows` sequences have on average, so that both sides' micro-batches hold equal work."""
    return max(1, rows * tokens(groups) // sum(len(g.responses) for g in groups))


class Product:
    """A policy, its reference, an optimiser and a sampler, made as the training scripts make them."""

    def __init__(self, folder: str, settings: Settings, budget: int, reference: bool = True):
        self.policy = model.load_policy(folder)
        self.reference = model.load_policy(folder).requires_grad_(False) if reference else None
        self.settings = settings
        shared: dict[str, Any] = {"micro_batch_tokens": budget, "lr": settings.lr, "lr_schedule": "constant",
                                  "compute_dtype": "float32", "checkpointing": False, "steps": 10**6}
        self.sft = replace(sft.Config(), warmup_ratio=0.0, **shared)
        self.grpo = replace(
            grpo.Config(), prompts_per_step=settings.prompts, group_size=settings.group_size,
            mini_batch=settings.prompts // settings.updates, max_response_tokens=settings.max_response,
            weight_decay=0.0, kl_coef=settings.kl_coef, **shared,
        )
        self.optimizer = model.make_optimizer(self.policy, self.grpo)
        self.sampler = TorchSampler(self.policy.lm, make_tokenizer(self.policy.lm.config.vocab_size), shared=True)

    def sft_repeat(self, groups: Sequence[Group], side: Side) -> None:
        """Optimiser steps on `sft_batch` sequences each; together they are one repeat."""
        begun = side.begin()
        self.policy.train()
        for start in range(0, len(groups), self.settings.sft_batch):
            batch = groups[start : start + self.settings.sft_batch]
            total, count = sft.nll_loss(self.policy, batch, self.sft, backward=True)
            norm = model.optimizer_step(self.policy, self.optimizer, self.sft.lr, self.sft.max_grad_norm)
            side.losses.append(total / count)
            side.norms.append(norm)
        side.end(begun, tokens(groups))

    def update(self, rollouts: Sequence[Rollout], side: Side) -> None:
        """Score and update on given rollouts; the scoring passes are `side.part`."""
        side.part = side.part or Side()
        begun = side.begin()
        self._update(rollouts, side)
        side.end(begun, sum(len(r.prompt_ids) + len(r.response_ids) for r in rollouts))

    def whole_step(self, prompts: Sequence[list[int]], seeds: Sequence[int], side: Side) -> None:
        """Sample, reward, score, update; tokens are the sampled ones, sampling is `side.part`."""
        side.part = side.part or Side()
        begun = side.begin()
        sample = timed(self.sampler.generate, side)
        rollouts = sample(prompts, self.settings.group_size, 1.0, self.settings.max_response, seeds)
        self._update(rollouts, Side())
        side.end(begun, sum(len(r.response_ids) for r in rollouts))

    def _update(self, rollouts: Sequence[Rollout], side: Side) -> None:
        rewards = torch.tensor([reward(r.response_ids) for r in rollouts]).view(-1, self.settings.group_size)
        advantages = grpo.group_advantages(rewards, eps=1e-4)  # TRL's eps; the product's own is 1e-6
        step = model.optimizer_step
        side.losses.append(0.0)  # the sum over the micro-batches of the step that is under way

        def recorded(logprobs: Any, batch: Any, cfg: grpo.Config, divisor: float) -> Any:
            value, stats = grpo.grpo_loss(logprobs, batch, cfg, divisor)
            side.losses[-1] += value.item()
            return value, stats

        def stepped(*args: Any) -> float:
            side.losses.append(0.0)
            side.norms.append(step(*args))
            return side.norms[-1]

        assert self.reference is not None
        with (
            patch.object(grpo, "score_rollouts", timed(grpo.score_rollouts, side)),
            patch.object(model, "optimizer_step", stepped),
        ):
            grpo.update(self.policy, self.reference, self.optimizer, rollouts, advantages, self.grpo, recorded)
        side.losses.pop()
