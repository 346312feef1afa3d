"""Stage 2, RLVR: GRPO on verdicts (Eq. 9). The page of equations, then `update`, then the loop.

    1. take P pairs, sample G responses to each prompt          4. advantage = (reward - group mean) / group std
    2. reward: +1 for the right verdict, else -1                5. per mini-batch: clipped ratio + KL to the start
    3. score old and reference log-probs of the rollouts           checkpoint, one optimiser step

Deleted from PPO: the critic, the value loss, GAE, the entropy bonus, the KL in the reward, reward shaping.

    python grpo.py --preset tiny                         one process, the tiny world of toy/
    torchrun --nproc_per_node=8 grpo.py                  the paper's DeepSeek-Distilled-7B run
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import model
from batch import Batch, Group, aggregate, denominator, micro_batches
from cor_prompt import encode_prompt, render
from data import Pair, load_pairs, stream
from judging.verdicts import judge_pairs, tally
from loading.tokenizer import load_tokenizer
from model import Policy
from ops.attention import compiled_graphs
from reward import parse_verdict, verdict_reward
from rollout import Rollout, Sampler, make_engine, rollout_metrics, torch_sampler
from runtime import cli, disk, ranks, sizes, states, steps
from runtime.errors import UserError
from runtime.metrics import Clock, Metrics
from runtime.run_folder import RunFolder
from runtime.seeds import derive_seed
from runtime.steps import BAD_STEPS, StopSignal
from settings import GRPO_PRESETS as PRESETS
from settings import GRPOConfig as Config

# ---- the equations: pure tensor functions --------------------------------------------------------------


def group_advantages(rewards: Tensor, scale_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """(P, G) rewards -> (P, G) advantages: (r - mean) / (std + eps), std unbiased. Eq. 10

    A group of equal rewards (or of one) gets 0. `scale_by_std=False` is Dr. GRPO's.

    >>> group_advantages(torch.tensor([[1.0, -1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))
    tensor([[ 0.5000, -1.5000,  0.5000,  0.5000],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if not scale_by_std or rewards.shape[1] == 1:
        return centred
    return centred / (rewards.std(dim=1, keepdim=True) + eps)


def clipped_surrogate(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float,
                      clip_high: float) -> tuple[Tensor, Tensor]:
    """Per token: -min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), and whether the clip won. Eq. 9

    The log of the ratio is clamped to +-20, so that the gradient stays finite.
    """
    ratio = (logprobs - old_logprobs).clamp(-20.0, 20.0).exp()
    plain = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return -torch.minimum(plain, clipped), clipped < plain


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Per token: exp(d) - d - 1 with d = ref - policy, an unbiased KL(policy || ref), >= 0. Eq. 9

    d is clamped to +-20 before the exponential, so that its gradient stays finite; the result to 10.
    """
    d = (ref_logprobs - logprobs).clamp(-20.0, 20.0)
    return (d.exp() - d - 1.0).clamp(max=10.0)


def grpo_loss(logprobs: Tensor, batch: Batch, cfg: Config, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
    """(N,) log-probs -> scalar loss (Eq. 9) and per-token statistics, each (N,)."""
    assert batch.old_logprobs is not None and batch.ref_logprobs is not None and batch.advantages is not None
    surrogate, clipped = clipped_surrogate(logprobs, batch.old_logprobs, batch.advantages, cfg.clip_low, cfg.clip_high)
    stats = {"policy/clip_fraction": clipped.float()}
    if cfg.tis_cap and batch.sampler_logprobs is not None:  # truncated importance sampling, trainer / sampler
        weight = (batch.old_logprobs - batch.sampler_logprobs).exp()
        surrogate = surrogate * weight.clamp(max=cfg.tis_cap)
        stats["sync/tis_clip_fraction"] = (weight > cfg.tis_cap).float()
    kl = kl_k3(logprobs, batch.ref_logprobs)
    stats["policy/ref_kl"] = kl.detach()
    stats["policy/approx_kl"] = kl_k3(logprobs.detach(), batch.old_logprobs)
    return aggregate(surrogate + cfg.kl_coef * kl, batch, cfg.agg, denominator), stats


# ---- one round's update --------------------------------------------------------------------------------


def update(policy: Policy, reference: Policy, optimizer: torch.optim.Optimizer, rollouts: Sequence[Rollout],
           advantages: Tensor, cfg: Config, loss: Callable = grpo_loss, step: int = 0) -> dict[str, float]:
    """One round's optimiser steps on this rank's P * G rollouts (groups adjacent) -> metrics of all ranks. Eq. 7

    Old log-probs are real: scored before the first step moves the weights. `step` places the round in the
    learning-rate schedule.
    """
    groups, size = make_groups(rollouts, advantages), cfg.mini_batch // ranks.world_size()
    mini_batches = [groups[i : i + size] for i in range(0, len(groups), size)]
    device = next(policy.parameters()).device
    packed = [list(micro_batches(mini, cfg.micro_batch_tokens, device)) for mini in mini_batches]
    metrics = Metrics()
    score_rollouts(policy, reference, packed, cfg)  # (3)
    policy.train()
    for m, (mini, batches) in enumerate(zip(mini_batches, packed, strict=True)):
        total = max(1, sum(ranks.gather(denominator(mini, cfg.agg, cfg.max_response_tokens))))
        for batch in batches:
            logprobs, entropy = policy(batch, cfg.temperature, True, partial(token_slopes, batch, cfg, total, loss))
            if batch.old_logprobs is None:
                batch.old_logprobs = logprobs.detach()
            value, stats = loss(logprobs, batch, cfg, total)
            (value * ranks.world_size()).backward()  # FSDP averages over ranks; this makes it the sum
            record_tokens(metrics, batch, stats | {"policy/entropy": entropy})
        lr = 0.0 if cfg.compat == "official" and step == 0 else steps.learning_rate(
            step * len(mini_batches) + m, cfg)
        metrics.add_norm(model.optimizer_step(policy, optimizer, lr, cfg.max_grad_norm))  # (5)
    graphs = {"compile/graphs": compiled_graphs()} if device.type == "cuda" else {}
    return metrics.reduce() | {"optim/lr": lr} | graphs


def token_slopes(batch: Batch, cfg: Config, total: float, loss: Callable, logprobs: Tensor) -> Tensor:
    """(N,) log-probs -> (N,) d loss / d log-prob, for `Policy`; `update` takes the loss itself once all are known."""
    with torch.enable_grad():
        logprobs = logprobs.detach().requires_grad_()
        if batch.old_logprobs is None:
            batch = replace(batch, old_logprobs=logprobs.detach())
        value, _ = loss(logprobs, batch, cfg, total)
        return torch.autograd.grad(value * ranks.world_size(), logprobs)[0]


def make_groups(rollouts: Sequence[Rollout], advantages: Tensor) -> list[Group]:
    """P * G rollouts and (P, G) advantages -> P groups; ids as sampled, never tokenised again (T11)."""
    size = advantages.shape[1]
    return [
        Group(rollouts[p * size].prompt_ids, [r.response_ids for r in rollouts[p * size : (p + 1) * size]],
              row, [r.sampler_logprobs for r in rollouts[p * size : (p + 1) * size]])
        for p, row in enumerate(advantages.tolist())
    ]


def score_rollouts(policy: Policy, reference: Policy, packed: Sequence[Sequence[Batch]], cfg: Config) -> None:
    """Fill in ref_logprobs, and old_logprobs of all mini-batches but the first, whose own forward they are."""
    policy.train()  # the same mode, batches and kernels as in the update: an unchanged policy has ratio 1
    with torch.no_grad():
        for m, batches in enumerate(packed):
            for batch in batches:
                batch.ref_logprobs = reference(batch, cfg.temperature)
                batch.old_logprobs = policy(batch, cfg.temperature) if m else None
    model.release(reference)


def record_tokens(metrics: Metrics, batch: Batch, stats: dict[str, Tensor]) -> None:
    """Add per-token statistics as sums and counts; a stand-in batch (weight 0) adds nothing."""
    if not batch.weight:
        return
    assert batch.old_logprobs is not None
    if batch.sampler_logprobs is not None:
        gap = (batch.old_logprobs - batch.sampler_logprobs).abs()
        metrics.add_max("sync/logprob_diff_max", gap.max().item())
        stats = stats | {"sync/logprob_diff_mean": gap}
    for name, values in stats.items():
        metrics.add(name, values.sum().item(), values.numel())


def verdict_score(rollouts: Sequence[Rollout], pairs: Sequence[Pair], policy: Policy, tokenizer: Any,
                  cfg: Config) -> Tensor:
    """(P, G) rewards: +1 for the right verdict, else -1, nothing else. Eq. 8"""
    size = len(rollouts) // len(pairs)
    rewards = [verdict_reward(r.text, pairs[i // size].winner) for i, r in enumerate(rollouts)]
    return torch.tensor(rewards).view(len(pairs), size)


# ---- a round --------------------------------------------------------------------------------------------

REFILLS = 100  # passes over P prompts that may go by before a round is full


def collect(pairs: Sequence[Pair], start: int, sampler: Sampler, prompt_ids: Callable, score: Callable,
            keep: Callable | None, cfg: Config) -> tuple[list[Rollout], Tensor, int]:
    """Sample and score until this rank's share of P groups is full -> rollouts, (P, G) rewards, new position.

    Without `keep` that is one pass. With it, groups it refuses are replaced by the next of the stream,
    whichever rank drew them. A prompt's seed is its place in the stream, so neither ranks nor batch sizes
    change what is sampled. Raises UserError where `keep` refuses nearly everything.
    """
    size, apart, first = cfg.group_size, ranks.world_size(), start
    found: list[tuple[int, list[Rollout], Tensor]] = []  # of all ranks: place in the stream, group, its rewards
    while len(found) < cfg.prompts_per_step:
        if start - first == REFILLS * cfg.prompts_per_step:
            raise UserError(f"of {start - first} groups only {len(found)} were kept: too little is left to learn")
        places = range(start + ranks.rank(), start + cfg.prompts_per_step, apart)
        taken = stream(pairs, start, cfg.prompts_per_step, cfg.seed)[ranks.rank() :: apart]
        start += cfg.prompts_per_step
        seeds = [derive_seed(cfg.seed, "rollout", place) for place in places]
        made = sampler.generate([prompt_ids(pair) for pair in taken], size, cfg.temperature,
                                cfg.max_response_tokens, seeds)
        scored = score(made, taken)
        if keep is None:
            return made, scored, start
        kept = [(places[p], made[p * size : (p + 1) * size], scored[p].cpu())
                for p in keep(scored).nonzero()[:, 0].tolist()]
        found += sorted((group for part in ranks.gather(kept) for group in part), key=lambda group: group[0])
    mine = found[: cfg.prompts_per_step][ranks.rank() :: apart]
    return [r for _, group, _ in mine for r in group], torch.stack([rewards for *_, rewards in mine]), start


def evaluate(sampler: Sampler, held_out: Sequence[Pair], step: int, cfg: Config, system: str | None,
             prompt: Callable = render, verdict: Callable = parse_verdict) -> dict[str, float]:
    """Greedy held-out verdicts in both orders -> eval/* metrics; the traces go to rollouts/step_N.jsonl."""
    if not held_out:
        return {}
    places = range(ranks.rank(), len(held_out) + -len(held_out) % ranks.world_size(), ranks.world_size())
    mine = [held_out[place % len(held_out)] for place in places]  # equally many: ranks may share an engine
    both = all(pair.messages is None for pair in held_out)
    judged = list(judge_pairs(sampler, mine, cfg.style, max_tokens=cfg.max_response_tokens, both_orders=both,
                              rule="train", system=system, prompt=prompt, read=verdict))
    own = sum(place < len(held_out) for place in places)
    judged = [j for part in ranks.gather(judged[: own * (2 if both else 1)]) for j in part]
    if ranks.rank() == 0:
        lines = "".join(json.dumps(dataclasses.asdict(j), ensure_ascii=False) + "\n" for j in judged)
        disk.write_whole(Path(cfg.out) / "rollouts" / f"step_{step:06d}.jsonl", lines)
    return {f"eval/{name}": value for name, value in tally(judged).items()}


def load_prompts(cfg: Config, tokenizer: Any, prompt: Callable, system: str | None) -> tuple[list[Pair], Callable]:
    """Training pairs whose prompt fits, and pair -> prompt ids; says how many did not fit."""
    pairs = load_pairs(cfg.data)

    def prompt_ids(pair: Pair) -> list[int]:
        return encode_prompt(prompt(pair, cfg.style, system), tokenizer)

    fitting = [pair for pair in pairs if len(prompt_ids(pair)) <= cfg.max_prompt_tokens]
    if ranks.rank() == 0 and len(fitting) < len(pairs):
        print(f"{len(pairs) - len(fitting)} of {len(pairs)} prompts exceed --max-prompt-tokens "
              f"{cfg.max_prompt_tokens}: left out")
    if not fitting:
        raise UserError(f"{cfg.data}: no prompt fits --max-prompt-tokens {cfg.max_prompt_tokens}")
    return fitting, prompt_ids


# ---- the loop ------------------------------------------------------------------------------------------

POSITIVE = ("steps", "prompts_per_step", "group_size", "mini_batch", "temperature", "micro_batch_tokens",
            "max_response_tokens", "max_grad_norm", "eval_every", "save_every")


def train(cfg: Config, prompt: Callable = render, score: Callable = verdict_score, keep: Callable | None = None,
          advantage: Callable = group_advantages, loss: Callable = grpo_loss,
          verdict: Callable = parse_verdict) -> None:
    """Reinforce; a variant is a file that passes its own function. Continues an interrupted run.

    prompt(pair, style, system) -> messages; score(rollouts, pairs, policy, tokenizer, cfg) -> (P, G);
    keep(rewards) -> (P,) bool, groups kept, the rest refilled from the stream (None: all are kept);
    verdict(text, rule) -> A, B or None, for held-out accuracy and metrics.
    """
    cli.check_positive(cfg, *POSITIVE)
    if cfg.dry_run:
        return sizes.dry_run(cfg)
    join(cfg)
    tokenizer, system = load_tokenizer(cfg.model), cli.read_prompt(cfg.prompt_file)
    pairs, prompt_ids = load_prompts(cfg, tokenizer, prompt, system)
    held_out = load_pairs(cfg.held_out) if cfg.held_out else []
    compute = getattr(torch, cfg.compute_dtype)
    mesh = model.make_mesh(compute, cfg.shard_ranks)
    engine = make_engine(cfg, tokenizer, [prompt(pair, cfg.style, system) for pair in held_out])
    stored = torch.promote_types(compute, torch.float32)
    policy = model.load_policy(cfg.model, stored, mesh, compute, cfg.checkpointing)
    reference = model.load_policy(cfg.model, compute, mesh, compute).requires_grad_(False)
    sampler: Sampler = engine or torch_sampler(cfg, policy, tokenizer, mesh)
    optimizer = torch.optim.AdamW(policy.parameters(), cfg.lr, cfg.betas, weight_decay=cfg.weight_decay)
    folder = RunFolder(cfg.out, cfg)
    state, bad = states.resume(folder, policy, optimizer) or {"step": 0, "position": 0}, 0
    folder.rewind(state["step"])
    moments = model.HostMoments(optimizer, cfg.offload_optimizer)
    judge = partial(evaluate, sampler, held_out, cfg=cfg, system=system, prompt=prompt, verdict=verdict)
    with StopSignal() as stop, steps.progress(cfg.steps, state["step"], "grpo") as bar:
        for step in range(state["step"], cfg.steps):
            clock = Clock()
            moments.to_host()
            sampler.sync(model.gathered_weights(policy, getattr(torch, cfg.sampler_dtype)))
            clock.lap("sync")
            evaluated = judge(step) if step % cfg.eval_every == 0 else {}
            clock.lap("eval")
            rollouts, rewards, state["position"] = collect(  # (1), (2)
                pairs, state["position"], sampler, prompt_ids,
                lambda made, taken: score(made, taken, policy, tokenizer, cfg), keep, cfg)
            sampler.sleep()
            moments.to_device()
            clock.lap("generate")
            advantages = advantage(rewards, cfg.scale_by_std)  # (4)
            stats = update(policy, reference, optimizer, rollouts, advantages, cfg, loss, step)  # (3), (5)
            clock.lap("update")
            record = rollout_metrics(rollouts, rewards, verdict) | stats | evaluated | clock.times(rollouts)
            folder.log({"step": step} | record)
            show(bar, record)
            state["step"] = step + 1
            bad = steps.count_bad(record, bad)
            stopping, last = stop.requested() or bad == BAD_STEPS, step + 1 == cfg.steps
            if stopping or last or (step + 1) % cfg.save_every == 0:
                states.keep_state(folder, policy, optimizer, state)
            if stopping and not last:
                sampler.close()
                steps.stop_early(bad)
    moments.to_host()
    finish(cfg, folder, policy, tokenizer, sampler, judge)


def join(cfg: Config) -> None:
    """Meet the other ranks; UserError, before anything is written, for what cannot run here."""
    cli.check_hardware(cfg.preset)
    if cfg.preset.endswith("instruct") and not Path(cfg.model).exists():
        raise UserError(f"--preset {cfg.preset} continues stage 1, and --model {cfg.model} is not there: run "
                            "sft.py first, then pass its run folder as --model")
    ranks.join_ranks()
    _ = cfg.updates_per_step  # raises where sizes do not divide


def show(bar: Any, record: dict[str, float]) -> None:
    names = {"reward": "reward/mean", "no_verdict": "rollout/frac_no_verdict", "kl": "policy/ref_kl",
             "held_out": "eval/accuracy", "tok/s": "tokens/s"}
    bar.set_postfix({k: f"{record[v]:.3g}" for k, v in names.items() if v in record}, refresh=False)
    bar.update()


def finish(cfg: Config, folder: RunFolder, policy: Policy, tokenizer: Any, sampler: Sampler,
           judge: Callable) -> None:
    """The last sync and evaluation, and the exported model."""
    sampler.sync(model.gathered_weights(policy, getattr(torch, cfg.sampler_dtype)))
    record = judge(cfg.steps)
    folder.rewind(cfg.steps)  # a run that is repeated after its end logs its last evaluation once
    folder.log({"step": cfg.steps} | record)
    model.save_hf(policy, tokenizer, folder.path / "model")
    sampler.close()
    if ranks.rank() == 0:
        accuracy = f" (held-out accuracy {record['eval/accuracy']:.3f})" if record else ""
        print(f"trained model: {folder.path / 'model'}{accuracy}")


if __name__ == "__main__":
    cli.start(lambda: train(cli.parse(Config, PRESETS)))
