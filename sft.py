"""Stage 1, distillation: negative log-likelihood of the oracles' traces.

    1. a pair becomes the Chain-of-Rubrics prompt, its trace the target
    2. loss = - sum of log p(trace token) / number of trace tokens in the whole batch
    3. AdamW, cosine schedule with a floor, one epoch

The loss is on trace tokens only, the end-of-turn token included. Unlike common practice, there is no padding,
no label mask and no mean over a micro-batch. The checkpoint with the best held-out loss is exported to OUT/model.

    python sft.py --preset tiny                          one process, the tiny world of toy/
    torchrun --nproc_per_node=8 sft.py                   the paper's 7B distillation
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

import model
from batch import Group, aggregate, group_tokens, loss_divisor, micro_batches
from cor_prompt import encode_prompt, encode_target, render
from data import Pair, keep_fitting, load_pairs, shard, stream
from loading.judge_file import Asked, about
from loading.tokenizer import load_tokenizer
from model import Policy
from runtime import cli, ranks, sizes, states, steps
from runtime.errors import UserError
from runtime.metrics import Metrics, per_second
from runtime.run_folder import RunFolder, digests
from runtime.steps import StopSignal
from settings import SFT_PRESETS as PRESETS, SFTConfig as Config


def nll_loss(policy: Policy, groups: Sequence[Group], cfg: Config, backward: bool) -> tuple[float, int]:
    """(sum of -log p over this rank's trace tokens, their number); with `backward` also their gradients. Eq. 6

    The loss is divided by the trace tokens of the whole batch on all ranks, so that neither the micro-batch
    plan nor the number of ranks changes the update. FSDP averages gradients over ranks, so `backward` is called on
    the loss times the number of ranks; the returned sum is not multiplied.
    """
    tokens = loss_divisor(groups, "token", 0)
    divisor = sum(ranks.gather(tokens))
    nll = 0.0
    with torch.set_grad_enabled(backward):
        for batch in micro_batches(groups, cfg.micro_batch_tokens, next(policy.parameters()).device):
            loss = aggregate(-policy(batch).logprobs, batch, "token", divisor)
            if backward:
                (loss * ranks.world_size()).backward()  # FSDP averages over ranks; this makes it the sum
            nll += loss.item() * divisor
    return nll, tokens


def encode_pairs(pairs: Sequence[Pair], tokenizer: Any, cfg: Config, system: str | None) -> list[Group]:
    """Prompt and trace ids of every pair that fits `max_length`; says how many did not. Eq. 5"""
    examples = []
    for pair in pairs:
        if not pair.trace:
            raise UserError(f"pair {pair.pair_id} has no trace; distillation needs a 'trace' in every row")
        prompt = encode_prompt(render(pair, cfg.style, system), tokenizer)
        examples.append(Group(prompt, [encode_target(pair, tokenizer)]))
    return keep_fitting(examples, lambda e: len(e.prompt_ids) + len(e.responses[0]), cfg.max_length, "--max-length")


def train(cfg: Config) -> None:
    """Distil; an interrupted run of the same configuration is continued from its last resume state."""
    cli.check_numbers(cfg, *POSITIVE)
    if cfg.dry_run:
        return sizes.dry_run(cfg)
    check_ranks(cfg)
    tokenizer, system = load_tokenizer(cfg.model, cfg.template_args), cli.read_prompt(cfg.prompt_file)
    examples = encode_pairs(load_pairs(cfg.data), tokenizer, cfg, system)  # (1)
    held_out = encode_pairs(load_pairs(cfg.held_out), tokenizer, cfg, system) if cfg.held_out else []
    compute = getattr(torch, cfg.compute_dtype)
    mesh, stored = model.make_mesh(compute, cfg.shard_ranks), torch.promote_types(compute, torch.float32)
    policy = model.load_policy(cfg.model, stored, mesh, compute, cfg.checkpointing)
    longest = cfg.max_length - min(len(example.prompt_ids) for example in examples)  # tokens a trace may have
    best = fit(cfg, policy, tokenizer, examples, held_out, nll_loss, Asked(cfg.style, system, longest))
    if ranks.rank() == 0:
        preset = cfg.preset + ("-instruct" if cfg.preset.startswith("paper") else "")
        print(f"distilled model: {cfg.out}/model" + (f" (held-out loss {best:.4f} nats/token)" if held_out else ""),
              f"next: python grpo.py --preset {preset} --model {cfg.out}", sep="\n")


POSITIVE = ("epochs", "batch_size", "micro_batch_tokens", "max_grad_norm", "eval_every", "save_every")


def check_ranks(cfg: Config) -> None:
    """Meet the other ranks; UserError for what cannot run here."""
    cli.check_hardware(cfg.preset)
    ranks.join_ranks()
    if cfg.batch_size % ranks.world_size():
        raise UserError(f"--batch-size {cfg.batch_size} does not divide over {ranks.world_size()} ranks")


def fit(cfg: Config, policy: Policy, tokenizer: Any, examples: Sequence[Group], held_out: Sequence[Group],
        loss: Callable, asked: Asked | None = None) -> float:
    """The loop: optimiser steps, held-out losses, resume states; exports the best model -> its held-out loss.

    loss(policy, groups, cfg, backward) -> (sum, count) of this rank. `asked` is how the exported judge is asked.
    """
    cfg = replace(cfg, steps=cfg.steps or max(1, int(cfg.epochs * len(examples) / cfg.batch_size)))
    steps.announce(cfg, len(examples))
    optimizer = model.make_optimizer(policy, cfg)
    read = digests(cfg.model, cli.read_prompt(cfg.prompt_file), data=examples, held_out=held_out)
    folder = RunFolder(cfg.out, cfg, read)
    progress = states.resume(folder, policy, optimizer) or {"step": 0, "best": math.inf}
    start, best = progress["step"], progress["best"]
    folder.rewind(start)
    with StopSignal() as stop, steps.progress(cfg.steps, start, "sft") as bar:
        for step in range(start, cfg.steps):
            began = time.perf_counter()
            batch = stream(examples, step * cfg.batch_size, cfg.batch_size, cfg.seed)
            groups = shard(batch, ranks.rank(), ranks.world_size())
            policy.train()
            metrics = Metrics()
            metrics.add("train/loss", *loss(policy, groups, cfg, backward=True))  # (2)
            lr = steps.learning_rate(step, cfg)  # (3)
            metrics.add_norm(model.optimizer_step(policy, optimizer, lr, cfg.max_grad_norm))
            last = step + 1 == cfg.steps
            if held_out and (last or (step + 1) % cfg.eval_every == 0):
                policy.eval()
                mine = held_out[ranks.rank() :: ranks.world_size()]
                metrics.add("eval/loss", *loss(policy, mine, cfg, backward=False))
            seconds = max(0.0, time.perf_counter() - began)  # a clock may be set back
            tokens = sum(map(group_tokens, batch))
            record = metrics.reduce() | {"optim/lr": lr, "tokens/s": per_second(tokens, seconds), "time/step": seconds}
            if record.get("eval/loss", math.inf) < best or (last and not held_out):
                best = record.get("eval/loss", best)
                judge = about(cfg, asked, folder.config.get("read", {})) if asked else None
                model.save_hf(policy, tokenizer, folder.path / "model", judge=judge)
            folder.log({"step": step} | record)
            steps.show(bar, record, loss="train/loss", held_out="eval/loss", speed="tokens/s")
            stopping = stop.after(record)
            if last or stopping or (step + 1) % cfg.save_every == 0:
                states.keep_state(folder, policy, optimizer, {"step": step + 1, "best": best})
            if stopping and not last:
                stop.leave()
    if held_out and math.isinf(best):
        raise UserError("no held-out loss was finite, so no model was exported; lower --lr and use another --out")
    return best


if __name__ == "__main__":
    cli.start(lambda: train(cli.parse(Config, PRESETS)))
