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
from itertools import takewhile
from typing import Any

import torch
import tyro
from torch import Tensor, nn

import model
import sft
from batch import Batch, Group, group_tokens, micro_batches
from cor_prompt import Style
from data import Pair, keep_fitting, load_pairs, swap
from judging.pointwise import check
from judging.scalar import encode_reply
from loading.folder import model_folder, tested_config
from loading.tokenizer import load_tokenizer
from loading.weights import read_weights
from model import Policy, build_policy
from runtime import cli, ranks


@dataclass(frozen=True)
class Config(sft.Config):
    """sft.py's settings without those of a prompt: the model sees the conversation itself."""

    style: tyro.conf.Suppress[Style] = "instruct"
    prompt_file: tyro.conf.Suppress[str] = ""
    dry_run: tyro.conf.Suppress[int] = 0
    gpu_gb: tyro.conf.Suppress[float] = 80.0


PRESETS = {name: Config(**vars(cfg) | {"prompt_file": ""}) for name, cfg in sft.PRESETS.items()}


def pack(pair: Pair, tokenizer: Any) -> Group:
    """What both responses share as the prompt, then the winner and the loser, each with one token more: a response's
    last token is never an input (batch.py), so the state that predicts the extra token is the last real one's."""
    check(pair)
    best = pair if pair.winner == "A" else swap(pair)
    both = [encode_reply(best.context, text, tokenizer) for text in (best.response_a, best.response_b)]
    shared = [a for a, b in takewhile(lambda ids: ids[0] == ids[1], zip(*both, strict=False))]
    return Group(shared, [[*ids[len(shared) :], 0] for ids in both])


def encode_pairs(pairs: Sequence[Pair], tokenizer: Any, cfg: Config) -> list[Group]:
    """Winner and loser of every pair that fits a micro-batch; says how many do not."""
    groups = [pack(pair, tokenizer) for pair in pairs]
    most = min(cfg.max_length, cfg.micro_batch_tokens)  # a pair that is cut in two has no difference
    return keep_fitting(groups, group_tokens, most, "the lesser of --max-length and --micro-batch-tokens,")


class Scorer(Policy):
    """A transformers sequence classifier with one label that scores each response of a packed micro-batch."""

    def forward(self, batch: Batch) -> Tensor:  # type: ignore[override]
        """(S,) scores, float32 or better, read where each response's last target would be predicted."""
        last = torch.bincount(batch.sequence).cumsum(0) - 1  # (S,)
        hidden = self.hidden(batch)[last]  # (S, H)
        exact = torch.promote_types(hidden.dtype, torch.float32)  # bfloat16 would round scores by half a percent
        return hidden.to(exact) @ self.lm.score.weight.to(exact)[0]


def load_scorer(path: str, dtype: torch.dtype, mesh: Any = None, compute_dtype: torch.dtype | None = None,
                checkpointing: bool = False) -> Scorer:
    """model.load_policy with a head of zeros in the place of the language model's."""
    from transformers import AutoModelForSequenceClassification, GenerationConfig

    folder = model_folder(path)
    config = tested_config(folder, num_labels=1)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if config.pad_token_id in ends:  # transformers would take a turn's last token for padding
        config.pad_token_id = None
    scorer = build_policy(Scorer, AutoModelForSequenceClassification, config, dtype, mesh, compute_dtype)
    lm = scorer.lm
    lm.config.architectures, lm.generation_config = [type(lm).__name__], GenerationConfig()  # what save_hf writes
    read_weights(nn.ModuleDict({"model": lm.model}), folder)  # checkpoint names; the language model's head stays out
    nn.init.zeros_(lm.score.weight)
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return scorer


def pair_losses(scores: Tensor) -> Tensor:
    """(2P,) scores, each winner before its loser -> (P,); of a filler batch, which has one score, (0,)."""
    return -nn.functional.logsigmoid(scores[0::2] - scores[1::2])


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
    cli.check_numbers(cfg, *sft.POSITIVE)
    sft.check_ranks(cfg)
    tokenizer, compute = load_tokenizer(cfg.model), getattr(torch, cfg.compute_dtype)
    pairs, held_out = (encode_pairs(load_pairs(p), tokenizer, cfg) if p else [] for p in (cfg.data, cfg.held_out))
    mesh, stored = model.make_mesh(compute, cfg.shard_ranks), torch.promote_types(compute, torch.float32)
    policy = load_scorer(cfg.model, stored, mesh, compute, cfg.checkpointing)
    sft.fit(cfg, policy, tokenizer, pairs, held_out, bt_loss)
    if ranks.rank() == 0:
        print(f"trained model: {cfg.out}/model",
              f"next: python eval.py run --scalar --model {cfg.out} --data PAIRS --out DIR", sep="\n")


if __name__ == "__main__":
    cli.start(lambda: train(cli.parse(Config, PRESETS)))
