"""Around GRPO's update: the engine, a round of rollouts with their rewards, the held-out evaluation, what is logged."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import model
import run
from cor_prompt import encode_prompt, render
from data import Message, Pair, load_pairs, stream
from metrics import Metrics
from model import Policy
from reward import parse_verdict
from rollout import Rollout, Sampler, TorchSampler, VLLMSampler, which_sampler
from settings import GRPOConfig as Config
from verdicts import judge_pairs, tally

REFILLS = 100  # passes over P prompts that may go by before a round is full


def collect(pairs: Sequence[Pair], start: int, sampler: Sampler, prompt_ids: Callable, score: Callable,
            keep: Callable | None, cfg: Config) -> tuple[list[Rollout], Tensor, int]:  # fmt: skip
    """Sample and score until this rank's share of P groups is full -> rollouts, (P, G) rewards, new position.

    Without `keep` that is one pass. With it, groups it refuses are replaced by the next of the stream,
    whichever rank drew them. A prompt's seed is its place in the stream, so neither ranks nor batch sizes
    change what is sampled. Raises UserError where `keep` refuses nearly everything.
    """
    size, ranks, first = cfg.group_size, run.world_size(), start
    found: list[tuple[int, list[Rollout], Tensor]] = []  # of all ranks: place in the stream, group, its rewards
    while len(found) < cfg.prompts_per_step:
        if start - first == REFILLS * cfg.prompts_per_step:
            raise run.UserError(f"of {start - first} groups only {len(found)} were kept: too little is left to learn")
        places = range(start + run.rank(), start + cfg.prompts_per_step, ranks)
        taken = stream(pairs, start, cfg.prompts_per_step, cfg.seed)[run.rank() :: ranks]
        start += cfg.prompts_per_step
        seeds = [run.derive_seed(cfg.seed, "rollout", place) for place in places]
        made = sampler.generate([prompt_ids(pair) for pair in taken], size, cfg.temperature,
                                cfg.max_response_tokens, seeds)  # fmt: skip
        scored = score(made, taken)
        if keep is None:
            return made, scored, start
        kept = [(places[p], made[p * size : (p + 1) * size], scored[p].cpu())
                for p in keep(scored).nonzero()[:, 0].tolist()]  # fmt: skip
        found += sorted((group for part in run.gather(kept) for group in part), key=lambda group: group[0])
    mine = found[: cfg.prompts_per_step][run.rank() :: ranks]
    return [r for _, group, _ in mine for r in group], torch.stack([rewards for *_, rewards in mine]), start


def evaluate(sampler: Sampler, held_out: Sequence[Pair], step: int, cfg: Config, system: str | None,
             prompt: Callable = render, verdict: Callable = parse_verdict) -> dict[str, float]:  # fmt: skip
    """Greedy held-out verdicts in both orders -> eval/* metrics; the traces go to rollouts/step_N.jsonl."""
    if not held_out:
        return {}
    places = range(run.rank(), len(held_out) + -len(held_out) % run.world_size(), run.world_size())
    mine = [held_out[place % len(held_out)] for place in places]  # equally many: ranks may share an engine
    both = all(pair.messages is None for pair in held_out)
    judged = list(judge_pairs(sampler, mine, cfg.style, max_tokens=cfg.max_response_tokens, both_orders=both,
                              rule="train", system=system, prompt=prompt, read=verdict))  # fmt: skip
    own = sum(place < len(held_out) for place in places)
    judged = [j for part in run.gather(judged[: own * (2 if both else 1)]) for j in part]
    if run.rank() == 0:
        lines = "".join(json.dumps(dataclasses.asdict(j), ensure_ascii=False) + "\n" for j in judged)
        run.write_whole(Path(cfg.out) / "rollouts" / f"step_{step:06d}.jsonl", lines)
    return {f"eval/{name}": value for name, value in tally(judged).items()}


def rollout_metrics(rollouts: Sequence[Rollout], rewards: Tensor,
                    verdict: Callable = parse_verdict) -> dict[str, float]:  # fmt: skip
    """What rollouts and rewards look like, over all ranks; the standard error takes a group as one observation."""
    metrics, count = Metrics(), len(rollouts)
    verdicts = [verdict(r.text, "train") for r in rollouts]
    metrics.add("reward/mean", rewards.sum().item(), rewards.numel())
    metrics.add("reward/frac_constant_groups", (rewards == rewards[:, :1]).all(1).sum().item(), len(rewards))
    metrics.add("rollout/length_mean", sum(len(r.response_ids) for r in rollouts), count)
    metrics.add("rollout/frac_truncated", sum(r.finish_reason == "length" for r in rollouts), count)
    metrics.add("rollout/frac_no_verdict", verdicts.count(None), count)
    metrics.add("rollout/frac_verdict_a", verdicts.count("A"), count - verdicts.count(None))
    means = [mean for part in run.gather(rewards.mean(1).tolist()) for mean in part]
    error = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else 0.0
    return metrics.reduce() | {"reward/se": error}


def make_engine(cfg: Config, tokenizer: Any, held_out: Sequence[list[Message]]) -> VLLMSampler | None:
    """vLLM, if it is to sample; made before the policy, because it counts on the memory that is free."""
    kind, why = which_sampler(cfg.sampler, cfg.model, cfg.tp)
    if run.rank() == 0:
        print(f"sampler: {kind} ({why})")
    if kind == "torch":
        return None
    shown = [len(encode_prompt(messages, tokenizer)) for messages in held_out]
    context = min(max([cfg.max_prompt_tokens, *shown]) + cfg.max_response_tokens, model.context_tokens(cfg.model))
    seed = run.derive_seed(cfg.seed, "engine", run.latest_checkpoint(cfg.out), run.rank() // cfg.tp)
    return VLLMSampler(cfg.model, tokenizer, cfg.sampler_dtype, context, tp=cfg.tp, memory=cfg.engine_memory, seed=seed)


def torch_sampler(cfg: Config, policy: Policy, tokenizer: Any, mesh: Any) -> TorchSampler:
    """The policy itself where one plain process trains, else a whole copy of its own that `sync` fills."""
    if mesh is None:
        return TorchSampler(policy.lm, tokenizer, shared=True)
    copy = model.load_policy(cfg.model, getattr(torch, cfg.sampler_dtype)).to(next(policy.parameters()).device)
    return TorchSampler(copy.lm, tokenizer)


def load_prompts(cfg: Config, tokenizer: Any, prompt: Callable, system: str | None) -> tuple[list[Pair], Callable]:
    """Training pairs whose prompt fits, and pair -> prompt ids; says how many did not fit."""
    pairs = load_pairs(cfg.data)

    def prompt_ids(pair: Pair) -> list[int]:
        return encode_prompt(prompt(pair, cfg.style, system), tokenizer)

    fitting = [pair for pair in pairs if len(prompt_ids(pair)) <= cfg.max_prompt_tokens]
    if run.rank() == 0 and len(fitting) < len(pairs):
        print(f"{len(pairs) - len(fitting)} of {len(pairs)} prompts exceed --max-prompt-tokens "
              f"{cfg.max_prompt_tokens}: left out")  # fmt: skip
    if not fitting:
        raise run.UserError(f"{cfg.data}: no prompt fits --max-prompt-tokens {cfg.max_prompt_tokens}")
    return fitting, prompt_ids
