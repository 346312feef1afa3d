"""Stage 2, RLVR: GRPO on verdicts (Eq. 9). The page of equations, then `update`, then the loop.

    1. take P pairs, sample G responses to each prompt          4. score old and reference log-probs of the rollouts
    2. reward: +1 for the right verdict, else -1                5. per mini-batch: clipped ratio + KL to the start
    3. advantage = (reward - group mean) / group std               checkpoint, one optimiser step

Left out of PPO: the critic, the value loss, GAE, the entropy bonus, the KL in the reward, reward shaping.

    python grpo.py --preset tiny                         one process, the tiny world of toy/
    torchrun --nproc_per_node=8 grpo.py                  the paper's DeepSeek-Distilled-7B run
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import model
from batch import Batch, Group, aggregate, loss_divisor, micro_batches
from cor_prompt import encode_prompt, render
from data import Pair, keep_fitting, load_pairs, stream
from judging.verdicts import judge_pairs, tally
from loading.judge_file import Asked, about, made_by
from loading.tokenizer import load_tokenizer
from model import Policy
from ops.attention import compiled_graphs
from reward import parse_verdict, verdict_reward
from rollout import Rollout, Sampler, make_engine, rollout_metrics, torch_sampler
from runtime import cli, disk, ranks, sizes, states, steps
from runtime.errors import UserError
from runtime.metrics import Clock, Metrics
from runtime.run_folder import RunFolder, digests
from runtime.seeds import derive_seed
from runtime.steps import StopSignal
from settings import GRPO_PRESETS as PRESETS, GRPOConfig as Config

# ---- the equations: pure tensor functions --------------------------------------------------------------


def group_advantages(rewards: Tensor, scale_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """(P, G) rewards -> (P, G) advantages: (r - mean) / (std + eps), std unbiased. Eq. 10

    `scale_by_std=False` (Dr. GRPO's) subtracts the mean and divides by nothing. Either way a group of equal rewards
    (or of one) gets exactly 0.

    >>> group_advantages(torch.tensor([[1.0, -1.0, 1.0, 1.0], [0.7, 0.7, 0.7, 0.7]]))
    tensor([[ 0.5000, -1.5000,  0.5000,  0.5000],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if scale_by_std and rewards.shape[1] > 1:
        centred = centred / (rewards.std(dim=1, keepdim=True) + eps)
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)  # (P, 1); the mean of equal numbers is rounded
    return centred.masked_fill(equal, 0.0)


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
    """Per token: exp(d) - d - 1 with d = ref - policy, >= 0: KL(policy || ref), unbiased but for the clamps. Eq. 9

    d is clamped to +-20 before the exponential, so that its gradient stays finite. The result is cut at 10, and
    beyond that its gradient is 0.
    """
    d = (ref_logprobs - logprobs).clamp(-20.0, 20.0)
    return (d.exp() - d - 1.0).clamp(max=10.0)


def grpo_loss(logprobs: Tensor, batch: Batch, cfg: Config, divisor: float) -> tuple[Tensor, dict[str, Tensor]]:
    """(N,) log-probs -> scalar loss (Eq. 9) and per-token statistics, each (N,)."""
    assert batch.ref_logprobs is not None and batch.advantages is not None
    old = old_logprobs(logprobs, batch)
    surrogate, clipped = clipped_surrogate(logprobs, old, batch.advantages, cfg.clip_low, cfg.clip_high)
    kl = kl_k3(logprobs, batch.ref_logprobs)
    stats = {"policy/clip_fraction": clipped.float(), "policy/ref_kl": kl.detach(),
             "policy/approx_kl": kl_k3(logprobs.detach(), old)}
    if batch.sampler_logprobs is not None:
        stats["sync/logprob_diff_mean"] = (old - batch.sampler_logprobs).abs()
    if cfg.tis_cap and batch.sampler_logprobs is not None:  # truncated importance sampling, trainer / sampler
        weight = (old - batch.sampler_logprobs).exp()
        surrogate = surrogate * weight.clamp(max=cfg.tis_cap)
        stats["sync/tis_clip_fraction"] = (weight > cfg.tis_cap).float()
    return aggregate(surrogate + cfg.kl_coef * kl, batch, cfg.agg, divisor), stats


def old_logprobs(logprobs: Tensor, batch: Batch) -> Tensor:
    """(N,) log-probs under the policy before this round. In the first mini-batch its weights have not changed yet."""
    return logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs


# ---- one round's update --------------------------------------------------------------------------------


def update(policy: Policy, reference: Policy, optimizer: torch.optim.Optimizer, rollouts: Sequence[Rollout],
           advantages: Tensor, cfg: Config, loss: Callable = grpo_loss, step: int = 0) -> dict[str, float]:
    """One round's optimiser steps on this rank's P * G rollouts (groups adjacent) -> metrics of all ranks. Eq. 7

    Old log-probs are computed before the first step moves the weights. `step` places the round in
    the learning-rate schedule.
    """
    groups, size = make_groups(rollouts, advantages), cfg.mini_batch // ranks.world_size()
    mini_batches = [groups[i : i + size] for i in range(0, len(groups), size)]
    device = next(policy.parameters()).device
    packed = [list(micro_batches(mini, cfg.micro_batch_tokens, device)) for mini in mini_batches]
    metrics = Metrics()
    steps.note("scoring")
    score_rollouts(policy, reference, packed, cfg)  # (4)
    for m, (mini, batches) in enumerate(zip(mini_batches, packed, strict=True)):  # (5)
        divisor = max(1, sum(ranks.gather(loss_divisor(mini, cfg.agg, cfg.max_response_tokens))))
        for batch in batches:
            scores = policy(batch, temperature=cfg.temperature, entropy=True)
            value, stats = loss(scores.logprobs, batch, cfg, divisor)
            (value * ranks.world_size()).backward()  # FSDP averages over ranks; this makes it the sum
            record_tokens(metrics, batch, stats | {"policy/entropy": scores.entropies})
        lr = steps.learning_rate(step * len(mini_batches) + m, cfg)
        lr = 0.0 if cfg.compat == "official" and step == 0 else lr
        metrics.add_norm(model.optimizer_step(policy, optimizer, lr, cfg.max_grad_norm))
        steps.note(f"updated {m + 1} of {len(mini_batches)} times")
    graphs = {"compile/graphs": compiled_graphs()} if device.type == "cuda" else {}
    return metrics.reduce() | {"optim/lr": lr} | graphs


def make_groups(rollouts: Sequence[Rollout], advantages: Tensor) -> list[Group]:
    """P * G rollouts and (P, G) advantages -> P groups. The ids are those that were sampled."""
    size = advantages.shape[1]
    groups = [rollouts[i : i + size] for i in range(0, len(rollouts), size)]
    return [Group(g[0].prompt_ids, [r.response_ids for r in g], row, [r.sampler_logprobs for r in g])
            for g, row in zip(groups, advantages.tolist(), strict=True)]


def score_rollouts(policy: Policy, reference: Policy, packed: Sequence[Sequence[Batch]], cfg: Config) -> None:
    """Fill in `ref_logprobs` of all mini-batches, and `old_logprobs` of all but the first.

    The first mini-batch gets None: its old log-probs are those of its own forward in `update`, detached.
    """
    policy.train()  # the same mode, batches and kernels as in the update: an unchanged policy has ratio 1
    with torch.no_grad():
        for m, batches in enumerate(packed):
            for batch in batches:
                batch.ref_logprobs = reference(batch, temperature=cfg.temperature).logprobs
                batch.old_logprobs = policy(batch, temperature=cfg.temperature).logprobs if m else None
    model.release(reference)


def record_tokens(metrics: Metrics, batch: Batch, stats: dict[str, Tensor]) -> None:
    """Add per-token statistics as sums and counts; a filler batch (weight 0) adds nothing."""
    if not batch.weight:
        return
    for name, values in stats.items():
        metrics.add(name, values.sum().item(), values.numel())
    if "sync/logprob_diff_mean" in stats:
        metrics.add_max("sync/logprob_diff_max", stats["sync/logprob_diff_mean"].max().item())


def verdict_score(rollouts: Sequence[Rollout], pairs: Sequence[Pair], policy: Policy, tokenizer: Any,
                  cfg: Config) -> Tensor:
    """(P, G) rewards: +1 for the right verdict, else -1, nothing else. Eq. 8"""
    size = len(rollouts) // len(pairs)
    rewards = [verdict_reward(r.answer, pairs[i // size].winner) for i, r in enumerate(rollouts)]
    return torch.tensor(rewards).view(len(pairs), size)


# ---- what a variant may change, and what a run holds ------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """The functions of the algorithm. The defaults are RM-R1's; a variant passes its own to `train`."""

    prompt: Callable = render  # (pair, style, system) -> messages
    score: Callable = verdict_score  # (rollouts, pairs, policy, tokenizer, cfg) -> (P, G) rewards
    keep: Callable | None = None  # (P, G) rewards -> (P,) bool: the other groups are replaced; None keeps all
    advantage: Callable = group_advantages  # (P, G) rewards, cfg.scale_by_std -> (P, G)
    loss: Callable = grpo_loss  # (logprobs, batch, cfg, divisor) -> scalar, per-token statistics
    verdict: Callable = parse_verdict  # (text, rule) -> A, B or None, for metrics and held-out accuracy

    def names(self) -> dict[str, str]:
        """Its own functions by file and name; a run folder compares them, so that no other method continues a run."""
        own = {name: used for name, used in vars(self).items() if used is not vars(Method())[name]}
        listed = (f"{name}: {made_by(f)}.{getattr(f, '__qualname__', '')}" for name, f in own.items())
        return {"method": ", ".join(listed) or "RM-R1"}


@dataclass(frozen=True)
class Run:
    """What the loop works with; made by `set_up`."""

    cfg: Config
    method: Method
    tokenizer: Any
    system: str | None  # the text of --prompt-file
    pairs: list[Pair]
    held_out: list[Pair]
    policy: Policy
    reference: Policy
    sampler: Sampler
    optimizer: torch.optim.Optimizer
    folder: RunFolder

    def prompt_ids(self, pair: Pair) -> list[int]:
        return encode_prompt(self.method.prompt(pair, self.cfg.style, self.system), self.tokenizer)

    def sync(self) -> None:
        """Give the sampler the policy's weights."""
        self.sampler.sync(model.gathered_weights(self.policy, getattr(torch, self.cfg.sampler_dtype)))


# ---- a round ---------------------------------------------------------------------------------------------


def collect(run: Run, position: int) -> tuple[list[Rollout], Tensor, int]:
    """Sample and score this rank's share of the stream's next P pairs -> rollouts, (P, G) rewards, new position.

    A prompt's seed is its place in the stream, so neither ranks nor batch sizes change what is sampled.
    """
    cfg, rank, world = run.cfg, ranks.rank(), ranks.world_size()
    places = range(position + rank, position + cfg.prompts_per_step, world)
    pairs = stream(run.pairs, position, cfg.prompts_per_step, cfg.seed)[rank::world]
    seeds = [derive_seed(cfg.seed, "rollout", place) for place in places]
    rollouts = run.sampler.generate([run.prompt_ids(pair) for pair in pairs], cfg.group_size, cfg.temperature,
                                    cfg.max_response_tokens, seeds)  # (1)
    rewards = run.method.score(rollouts, pairs, run.policy, run.tokenizer, cfg)  # (2)
    if getattr(rewards, "shape", None) != (len(pairs), cfg.group_size) or not rewards.isfinite().all():
        raise UserError(f"the method's score must return finite rewards (P, G), here {(len(pairs), cfg.group_size)}")
    return rollouts, rewards, position + cfg.prompts_per_step


REFILLS = 100  # a round draws at most this many times P groups


def collect_kept(run: Run, position: int) -> tuple[list[Rollout], Tensor, int]:
    """`collect`, but groups that `method.keep` refuses are replaced by the next ones of the stream.

    All ranks refill together until P groups are kept, whichever rank drew them. Raises UserError where `keep`
    refuses nearly everything.
    """
    if run.method.keep is None:
        return collect(run, position)
    size, wanted, first = run.cfg.group_size, run.cfg.prompts_per_step, position
    found: list[tuple[int, list[Rollout], Tensor]] = []  # of all ranks: place in the stream, group, its rewards
    while len(found) < wanted:
        if position - first == REFILLS * wanted:
            raise UserError(f"of {position - first} groups only {len(found)} were kept: too little is left to learn")
        place = position + ranks.rank()
        rollouts, rewards, position = collect(run, position)
        kept = [(place + p * ranks.world_size(), rollouts[p * size : (p + 1) * size], rewards[p].cpu())
                for p in run.method.keep(rewards).nonzero()[:, 0].tolist()]
        found += sorted((group for part in ranks.gather(kept) for group in part), key=lambda group: group[0])
    mine = found[:wanted][ranks.rank() :: ranks.world_size()]
    return [r for _, group, _ in mine for r in group], torch.stack([rewards for *_, rewards in mine]), position


def judge_held_out(run: Run, step: int) -> dict[str, float]:
    """Greedy held-out verdicts in both orders -> eval/* metrics; the traces go to rollouts/step_N.jsonl."""
    cfg, held_out = run.cfg, run.held_out
    if not held_out:
        return {}
    rank, world = ranks.rank(), ranks.world_size()
    count = -(-len(held_out) // world)  # the same number on every rank: ranks may share an engine
    mine = [held_out[(rank + k * world) % len(held_out)] for k in range(count)]
    own = len(held_out[rank::world])  # what `mine` holds beyond these is another rank's, and is dropped below
    both = all(pair.messages is None for pair in held_out)
    judged = list(judge_pairs(run.sampler, mine, cfg.style, max_tokens=cfg.max_response_tokens, both_orders=both,
                              rule="train", system=run.system, prompt=run.method.prompt, read=run.method.verdict))
    judged = [j for part in ranks.gather(judged[: own * (2 if both else 1)]) for j in part]
    if rank == 0:
        lines = "".join(json.dumps(dataclasses.asdict(j), ensure_ascii=False) + "\n" for j in judged)
        disk.write_whole(Path(cfg.out) / "rollouts" / f"step_{step:06d}.jsonl", lines)
    return {f"eval/{name}": value for name, value in tally(judged).items()}


# ---- the loop ------------------------------------------------------------------------------------------

POSITIVE = ("steps", "prompts_per_step", "group_size", "mini_batch", "temperature", "micro_batch_tokens",
            "max_response_tokens", "max_grad_norm", "decode_gb", "tp", "eval_every", "save_every")


def train(cfg: Config, method: Method = Method()) -> None:
    """Reinforce. An interrupted run in `cfg.out` is continued."""
    cli.check_numbers(cfg, *POSITIVE)
    if cfg.group_size == 1 and not method.advantage(torch.ones(1, 1), cfg.scale_by_std).any():
        raise UserError("--group-size 1: this method compares the responses of a group, and one alone teaches nothing")
    if cfg.dry_run:
        return sizes.dry_run(cfg)
    run = set_up(cfg, method)
    state = states.resume(run.folder, run.policy, run.optimizer) or {"step": 0, "position": 0}
    run.folder.rewind(state["step"])
    moments = model.HostMoments(run.optimizer, cfg.offload_optimizer)
    with StopSignal() as stop, steps.progress(cfg.steps, state["step"], "grpo") as bar:
        for step in range(state["step"], cfg.steps):
            clock = Clock()
            moments.to_host()
            run.sync()  # first, so that a continued run never samples from stale weights
            clock.lap("sync")
            evaluated = judge_held_out(run, step) if step % cfg.eval_every == 0 else {}
            clock.lap("eval")
            rollouts, rewards, state["position"] = collect_kept(run, state["position"])  # (1), (2)
            run.sampler.sleep()
            moments.to_device()
            clock.lap("generate")
            advantages = method.advantage(rewards, cfg.scale_by_std)  # (3)
            stats = update(run.policy, run.reference, run.optimizer, rollouts, advantages, cfg, method.loss,
                           step)  # (4), (5)
            clock.lap("update")
            record = rollout_metrics(rollouts, rewards, method.verdict) | stats | evaluated | clock.times(rollouts)
            run.folder.log({"step": step} | record)
            steps.show(bar, record, reward="reward/mean", no_verdict="rollout/frac_no_verdict", kl="policy/ref_kl",
                       held_out="eval/accuracy", speed="tokens/s")
            state["step"] = step + 1
            stopping, last = stop.after(record), step + 1 == cfg.steps
            if stopping or last or (step + 1) % cfg.save_every == 0:
                states.keep_state(run.folder, run.policy, run.optimizer, state)
            if stopping and not last:
                moments.to_host()
                run.sampler.close()
                stop.leave()
    moments.to_host()
    finish(run)


def set_up(cfg: Config, method: Method) -> Run:
    """Meet the other ranks, read data and models. UserError, before anything is written, for what cannot run here."""
    cli.check_hardware(cfg.preset)
    ranks.join_ranks()
    _ = cfg.updates_per_step  # raises where sizes do not divide
    tokenizer, system = load_tokenizer(cfg.model, cfg.template_args), cli.read_prompt(cfg.prompt_file)
    pairs = fitting_pairs(cfg, method, tokenizer, system)
    held_out = load_pairs(cfg.held_out) if cfg.held_out else []
    compute = getattr(torch, cfg.compute_dtype)
    mesh = model.make_mesh(compute, cfg.shard_ranks)
    engine = make_engine(cfg, tokenizer, [method.prompt(pair, cfg.style, system) for pair in held_out])
    policy = model.load_policy(cfg.model, torch.promote_types(compute, torch.float32), mesh, compute, cfg.checkpointing)
    reference = model.load_policy(cfg.model, compute, mesh, compute).requires_grad_(False)
    sampler: Sampler = engine or torch_sampler(cfg, policy, tokenizer, mesh)
    optimizer = model.make_optimizer(policy, cfg)
    return Run(cfg, method, tokenizer, system, pairs, held_out, policy, reference, sampler, optimizer,
               RunFolder(cfg.out, cfg, digests(cfg.model, system, data=pairs, held_out=held_out) | method.names()))


def fitting_pairs(cfg: Config, method: Method, tokenizer: Any, system: str | None) -> list[Pair]:
    """Training pairs whose prompt fits. Says what the run will use."""

    def tokens(pair: Pair) -> int:
        return len(encode_prompt(method.prompt(pair, cfg.style, system), tokenizer))

    pairs = keep_fitting(load_pairs(cfg.data), tokens, cfg.max_prompt_tokens, "--max-prompt-tokens")
    steps.announce(cfg, len(pairs))
    return pairs


def finish(run: Run) -> None:
    """The last sync and evaluation, and the exported model."""
    run.sync()
    record = judge_held_out(run, run.cfg.steps)
    run.folder.rewind(run.cfg.steps)  # a run that is repeated after its end logs its last evaluation once
    run.folder.log({"step": run.cfg.steps} | record)
    run.sampler.sleep()  # the export gathers whole float32 weights and needs the engine's memory
    judge = about(run.cfg, Asked(run.cfg.style, run.system, run.cfg.max_response_tokens),
                  run.folder.config.get("read", {}), run.method.prompt)
    model.save_hf(run.policy, run.tokenizer, run.folder.path / "model", judge=judge)
    run.sampler.close()
    if ranks.rank() == 0:
        accuracy = f" (held-out accuracy {record['eval/accuracy']:.3f})" if record else ""
        out = run.folder.path
        own = run.method.prompt is not render  # eval.py and judge.py show cor_prompt's prompt and read its verdicts
        evaluate = "" if own else (f"python eval.py run --model {out} --data {run.cfg.held_out or 'PAIRS'} --out "
                                   f"{out.parent}/eval/{out.name}; ")
        print(f"trained model: {out / 'model'}{accuracy}", f"next: {evaluate}python -m report {out}", sep="\n")


if __name__ == "__main__":
    cli.start(lambda: train(cli.parse(Config, PRESETS)))
