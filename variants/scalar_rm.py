"""The baseline: a Bradley-Terry scalar reward model, one linear head on the last token's hidden state.

    P(winner beats loser) = sigmoid(r(x, winner) - r(x, loser))     r(x, y) = w . h(last token of x and y)
    loss = - sum of log P / number of pairs in the whole batch

    python -m variants.scalar_rm --preset tiny --data PAIRS --held-out PAIRS --out runs/scalar

The loop is sft.py's; encoding, head and loss are here. Of a pair its winner is used, not its trace. OUT/model is what
transformers calls an AutoModelForSequenceClassification; `eval.py run --scalar` judges with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from torch import Tensor

import model
import sft
from batch import Group, group_tokens, micro_batches
from cor_prompt import Style
from data import Pair, keep_fitting, load_pairs
from judging.scalar import Scorer, load_scorer, pack
from loading.tokenizer import load_tokenizer
from runtime import cli, ranks


@dataclass(frozen=True)
class Config(sft.Config):
    """sft.py's settings without those of a prompt: the model sees the conversation itself."""

    style: tyro.conf.Suppress[Style] = "instruct"
    prompt_file: tyro.conf.Suppress[str] = ""
    dry_run: tyro.conf.Suppress[int] = 0
    gpu_gb: tyro.conf.Suppress[float] = 80.0


PRESETS = {name: Config(**vars(cfg) | {"prompt_file": ""}) for name, cfg in sft.PRESETS.items()}


def encode_pairs(pairs: Sequence[Pair], tokenizer: Any, cfg: Config) -> list[Group]:
    """Winner and loser of every pair that fits a micro-batch; says how many do not."""
    groups = [pack(pair, tokenizer) for pair in pairs]
    most = min(cfg.max_length, cfg.micro_batch_tokens)  # a pair that is cut in two has no difference
    return keep_fitting(groups, group_tokens, most, "the lesser of --max-length and --micro-batch-tokens,")


def pair_losses(scores: Tensor) -> Tensor:
    """(2P,) scores, each winner before its loser -> (P,); of a filler batch, which has one score, (0,)."""
    return -torch.nn.functional.logsigmoid(scores[0::2] - scores[1::2])


def bt_loss(policy: Scorer, groups: Sequence[Group], cfg: Config, backward: bool) -> tuple[float, int]:
    """(sum of this rank's pair losses, pairs); with `backward` the gradients of their mean over all ranks."""
    total, mean = sum(ranks.gather(len(groups))), 0.0
    with torch.set_grad_enabled(backward):
        for batch in micro_batches(groups, cfg.micro_batch_tokens, next(policy.parameters()).device):
            loss = pair_losses(policy(batch)).sum() / total
            if backward:
                (loss * ranks.world_size()).backward()  # FSDP averages over ranks; this makes it the sum
            mean += loss.item()
    return mean * total, len(groups)


def train(cfg: Config) -> None:
    """sft.py's loop with another model, encoding and loss."""
    cli.check_positive(cfg, *sft.POSITIVE)
    sft.check_ranks(cfg)
    tokenizer, compute = load_tokenizer(cfg.model), getattr(torch, cfg.compute_dtype)
    pairs, held_out = (encode_pairs(load_pairs(p), tokenizer, cfg) if p else [] for p in (cfg.data, cfg.held_out))
    mesh, stored = model.make_mesh(compute, cfg.shard_ranks), torch.promote_types(compute, torch.float32)
    policy = load_scorer(cfg.model, stored, mesh, compute, cfg.checkpointing)
    sft.fit(cfg, policy, tokenizer, pairs, held_out, bt_loss)


if __name__ == "__main__":
    cli.start(lambda: train(cli.parse(Config, PRESETS)))
