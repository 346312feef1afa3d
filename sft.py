"""Stage 1, distillation: negative log-likelihood of the oracles' traces.

    1. a pair becomes the Chain-of-Rubrics prompt, its trace the target
    2. loss = - sum of log p(trace token) / number of trace tokens in the whole batch
    3. AdamW, cosine schedule with a floor, one epoch

The loss is on trace tokens only, the end-of-turn token included. Deleted from common practice: padding,
label masks, micro-batch means. The checkpoint with the best held-out loss is exported to OUT/model.

    python sft.py --preset tiny                          one process, the tiny world of toy.py
    torchrun --nproc_per_node=8 sft.py                   the paper's 7B distillation
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

import model
import run
import sizes
from batch import Group, aggregate, denominator, micro_batches
from cor_prompt import Style, encode_prompt, encode_target, render
from data import Pair, load_pairs, shard, stream
from model import Policy


@dataclass(frozen=True)
class Config:
    preset: str = "paper-7b"
    """named set of defaults: paper-7b, paper-14b, paper-32b, one-gpu, small, tiny"""
    model: str = "Qwen/Qwen2.5-7B-Instruct"
    """model to start from: a folder with safetensors, a run folder, or a hub id"""
    data: str = "gaotang/RM-R1-Distill-SFT"
    """pairs with traces: .jsonl, .parquet or a hub id"""
    held_out: str = ""
    """pairs with traces for the held-out loss (same formats); empty: none, the last weights are exported"""
    out: str = "runs/sft"
    """run folder to write; an interrupted run in it is continued"""
    style: Style = "instruct"
    """which prompt the judge sees (cor_prompt.py)"""
    prompt_file: str = ""
    """text file that replaces the style's fixed wording; empty: the built-in wording"""
    epochs: float = 1.0
    """passes over the data"""
    batch_size: int = 128
    """pairs per optimiser step, over all ranks"""
    max_length: int = 12288
    """tokens; a longer prompt + trace is left out and counted"""
    micro_batch_tokens: int = 16384
    """tokens per forward and backward on one rank, padding included"""
    lr: float = 5e-6
    """peak learning rate"""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """shape after the warm-up"""
    lr_floor: float = 0.1
    """last learning rate as a share of the peak"""
    warmup_ratio: float = 0.03
    """share of the optimiser steps spent warming up"""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates"""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay"""
    max_grad_norm: float = 1.0
    """gradient norm above which gradients are scaled down"""
    compute_dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """arithmetic of forward and backward; stored weights, log-probs and Adam are float32 or better"""
    shard_ranks: int = 0
    """neighbouring ranks that hold one copy of the weights (hybrid sharding); 0: all ranks hold one"""
    checkpointing: bool = True
    """recompute each layer in the backward pass: less memory, about a third more time"""
    eval_every: int = 20
    """optimiser steps between held-out losses (the last step has one too)"""
    save_every: int = 20
    """optimiser steps between resume states"""
    seed: int = 0
    """seed of the data order"""
    steps: int = 0
    """optimiser steps; 0: epochs x pairs / batch_size"""
    dry_run: int = 0
    """print what a run on this many GPUs needs, then stop; 0: train"""
    gpu_gb: float = 80.0
    """memory of one card for --dry-run, in GB (1e9 bytes)"""

    @property
    def total_updates(self) -> int:
        return self.steps

    @property
    def warmup_updates(self) -> int:
        return math.ceil(self.warmup_ratio * self.steps)


PAPER = Config()
PRESETS = {
    "paper-7b": PAPER,
    "paper-14b": replace(PAPER, preset="paper-14b", model="Qwen/Qwen2.5-14B-Instruct", lr=3e-6),
    "paper-32b": replace(PAPER, preset="paper-32b", model="Qwen/Qwen2.5-32B-Instruct", lr=2e-6),
    "one-gpu": replace(
        PAPER, preset="one-gpu", model="Qwen/Qwen2.5-0.5B-Instruct", out="runs/one-gpu/sft", batch_size=32,
        max_length=8192, micro_batch_tokens=8192, lr=1e-5,
    ),
    "small": replace(
        PAPER, preset="small", model="runs/smollm2", data="recipes/real/traces.jsonl",
        held_out="recipes/real/traces_held_out.jsonl", out="runs/real/sft",
        batch_size=5, epochs=3.0, lr=1e-4, max_length=3072, micro_batch_tokens=3072, eval_every=4,
        save_every=4, checkpointing=False,
    ),
    "tiny": replace(
        PAPER, preset="tiny", model="runs/toy/start", data="runs/toy/sft.jsonl",
        held_out="runs/toy/sft_held_out.jsonl", prompt_file="runs/toy/prompt.txt", out="runs/toy/sft",
        epochs=4.8, batch_size=16, max_length=256, micro_batch_tokens=4096, lr=4e-3,
        compute_dtype="float32", checkpointing=False, eval_every=200, save_every=400,
    ),
}  # fmt: skip


def nll_loss(policy: Policy, groups: Sequence[Group], cfg: Config, backward: bool) -> tuple[float, int]:
    """(sum of -log p over this rank's trace tokens, their number); with `backward` also their gradients. Eq. 6

    The loss is divided by the trace tokens of the whole batch on all ranks, so that neither the micro-batch
    plan nor the number of ranks changes the update (T3).
    """
    tokens = denominator(groups, "token", 0)
    total = sum(run.gather(tokens))
    nll = 0.0
    with torch.set_grad_enabled(backward):
        for batch in micro_batches(groups, cfg.micro_batch_tokens, next(policy.parameters()).device):
            slope = -batch.weight * run.world_size() / total  # the loss is linear: every token's is the same
            logprobs = policy(batch, slopes=partial(torch.full_like, fill_value=slope))
            loss = aggregate(-logprobs, batch, "token", total)
            if backward:
                (loss * run.world_size()).backward()  # FSDP averages over ranks; this makes it the sum
            nll += loss.item() * total
    return nll, tokens


def encode_pairs(pairs: Sequence[Pair], tokenizer: Any, cfg: Config, system: str | None) -> list[Group]:
    """Prompt and trace ids of every pair that fits `max_length`; says how many did not. Eq. 5"""
    examples = []
    for pair in pairs:
        if not pair.trace:
            raise run.UserError(f"pair {pair.pair_id} has no trace; distillation needs a 'trace' in every row")
        prompt = encode_prompt(render(pair, cfg.style, system), tokenizer)
        examples.append(Group(prompt, [encode_target(pair, tokenizer)]))
    fitting = [e for e in examples if len(e.prompt_ids) + len(e.responses[0]) <= cfg.max_length]
    if len(fitting) < len(examples) and run.rank() == 0:
        print(f"{len(examples) - len(fitting)} of {len(examples)} examples exceed --max-length "
              f"{cfg.max_length} tokens: left out")  # fmt: skip
    if not fitting:
        raise run.UserError(f"no example fits --max-length {cfg.max_length} tokens")
    return fitting


def train(cfg: Config) -> None:
    """Distil; continues an interrupted run of the same configuration from its last resume state."""
    run.check_positive(cfg, "epochs", "batch_size", "micro_batch_tokens", "max_grad_norm", "eval_every", "save_every")
    if cfg.dry_run:
        return sizes.dry_run(cfg)
    run.check_hardware(cfg.preset)
    run.join_ranks()
    if cfg.batch_size % run.world_size():
        raise run.UserError(f"--batch-size {cfg.batch_size} does not divide over {run.world_size()} ranks")
    tokenizer, system = model.load_tokenizer(cfg.model), run.read_prompt(cfg.prompt_file)
    examples = encode_pairs(load_pairs(cfg.data), tokenizer, cfg, system)  # (1)
    held_out = encode_pairs(load_pairs(cfg.held_out), tokenizer, cfg, system) if cfg.held_out else []
    cfg = replace(cfg, steps=cfg.steps or max(1, int(cfg.epochs * len(examples) / cfg.batch_size)))
    compute = getattr(torch, cfg.compute_dtype)
    mesh = model.make_mesh(compute, cfg.shard_ranks)
    policy = model.load_policy(cfg.model, torch.promote_types(compute, torch.float32), mesh, compute, cfg.checkpointing)
    optimizer = torch.optim.AdamW(policy.parameters(), cfg.lr, cfg.betas, weight_decay=cfg.weight_decay)
    folder = run.RunFolder(cfg.out, cfg)
    progress = model.resume(folder, policy, optimizer) or {"step": 0, "best": math.inf}
    start, best, bad = progress["step"], progress["best"], 0
    folder.rewind(start)

    with run.StopSignal() as stop, run.progress(cfg.steps, start, "sft") as bar:
        for step in range(start, cfg.steps):
            began = time.perf_counter()
            batch = stream(examples, step * cfg.batch_size, cfg.batch_size, cfg.seed)
            groups = shard(batch, run.rank(), run.world_size())
            policy.train()
            metrics = run.Metrics()
            metrics.add("train/loss", *nll_loss(policy, groups, cfg, backward=True))  # (2)
            lr = run.learning_rate(step, cfg)  # (3)
            metrics.add_norm(model.optimizer_step(policy, optimizer, lr, cfg.max_grad_norm))
            last = step + 1 == cfg.steps
            if held_out and (last or (step + 1) % cfg.eval_every == 0):
                policy.eval()
                mine = held_out[run.rank() :: run.world_size()]
                metrics.add("eval/loss", *nll_loss(policy, mine, cfg, backward=False))
            seconds = max(0.0, time.perf_counter() - began)  # a clock may be set back
            tokens = sum(len(g.prompt_ids) + len(g.responses[0]) for g in batch)
            rates = {"tokens/s": run.per_second(tokens, seconds), "time/step": seconds}
            record = metrics.reduce() | {"optim/lr": lr} | rates
            if record.get("eval/loss", math.inf) < best or (last and not held_out):
                best = record.get("eval/loss", best)
                model.save_hf(policy, tokenizer, folder.path / "model")
            folder.log({"step": step} | record)
            bar.set_postfix(
                {k: f"{record[k]:.3g}" for k in ("train/loss", "eval/loss", "tokens/s") if k in record}, refresh=False
            )
            bar.update()
            bad = run.count_bad(record, bad)
            stopping = stop.requested() or bad == run.BAD_STEPS
            if last or stopping or (step + 1) % cfg.save_every == 0:
                model.keep_state(folder, policy, optimizer, {"step": step + 1, "best": best})
            if stopping and not last:
                run.stop_early(bad)
    if run.rank() == 0:
        print(f"distilled model: {cfg.out}/model" + (f" (held-out loss {best:.4f} nats/token)" if held_out else ""))


if __name__ == "__main__":
    run.start(lambda: train(run.parse(Config, PRESETS)))
