"""RLPR: the reward is how likely the judge itself finds the right verdict after its reasoning. arXiv 2506.18254

    r = clip( p(v | prompt, reasoning) - p(v | prompt), 0, 1 )      p(v | ...) = mean over tokens t of v of pi(t | ...)

    python -m variants.rlpr --preset tiny
    python -m variants.rlpr --preset tiny --std-beta 0 ...            every group is kept

The right verdict v replaces the sampled one, and one forward pass scores it. A sure judge then earns more than a
lucky one. The probability of v straight after the prompt is subtracted, because the reasoning did not earn it. A
rollout without a verdict earns 0. Groups with small differences are replaced by the next of the stream
(std_filter.py). The presets use clip-higher (0.2, 0.27), the mean per token and no KL, as the authors do.

Here the current policy gives p(v | prompt); the authors compute it once, before training. It shifts all rewards of a
group alike, so it matters only where the clip at 0 acts. Left out: the authors' 0.1 for format beside 0.9 r, and
their penalty on repetition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

import grpo
import model
from batch import Group, micro_batches
from cor_prompt import plain_tokenizer
from data import Pair
from reward import parse_verdict
from rollout import Rollout
from runtime import cli
from variants.std_filter import StdFilter


@dataclass(frozen=True)
class Config(grpo.Config):
    debias: bool = True  # subtract the right verdict's probability without any reasoning
    # replace groups whose rewards' deviation is below this share of its running mean; 0: keep all
    std_beta: float = 0.5


AUTHORS = {"clip_low": 0.2, "clip_high": 0.27, "kl_coef": 0.0, "agg": "token"}
PRESETS = {name: Config(**asdict(base) | AUTHORS | {"out": f"{base.out}-rlpr"}) for name, base in grpo.PRESETS.items()}


def encode_verdict(before: str, letter: str, tokenizer: Any) -> tuple[list[int], list[float]]:
    """Ids of `before` and the verdict, and per id 1.0 where it holds a part of [[letter]], else 0.0."""
    text = f"{before}<answer>[[{letter}]]</answer>"
    first = text.index(f"[[{letter}]]</answer>", len(before))
    found = plain_tokenizer(tokenizer).encode(text, add_special_tokens=False)
    return found.ids, [float(start < first + len("[[A]]") and end > first) for start, end in found.offsets]


def with_verdict(rollout: Rollout, letter: str, tokenizer: Any) -> tuple[list[int], list[float]]:
    """The sampled ids up to the verdict, then `letter`'s verdict, and which ids to score; ([], []) without a verdict.

    If a token crosses the start of the tag, the part of its text before the tag is encoded again.
    """
    if (said := parse_verdict(rollout.answer)) is None:
        return [], []
    start, kept = rollout.text.rindex(f"<answer>[[{said}]]</answer>"), len(rollout.response_ids)
    while True:
        before = tokenizer.decode(rollout.response_ids[:kept], skip_special_tokens=False)
        if len(before) <= start and rollout.text.startswith(before):
            break
        kept -= 1
    tail, weights = encode_verdict(rollout.text[len(before) : start], letter, tokenizer)
    return rollout.response_ids[:kept] + tail, [0.0] * kept + weights


def verdict_probabilities(policy: Any, groups: Sequence[Group], cfg: Config) -> Tensor:
    """(P, R): p(v | ...) of each response; sampler_logprobs say which of its tokens are v. An empty response gets 0."""
    size = len(groups[0].responses)
    total, count = torch.zeros(2, len(groups) * size, dtype=torch.float64)
    numbered = [replace(group, advantages=[float(p * size + k) for k in range(size)]) for p, group in enumerate(groups)]
    with torch.no_grad():
        for batch in micro_batches(numbered, cfg.micro_batch_tokens, next(policy.parameters()).device):
            assert batch.advantages is not None and batch.sampler_logprobs is not None
            values = policy(batch, temperature=cfg.temperature).logprobs.exp()
            place, chosen = batch.advantages.long().cpu(), batch.sampler_logprobs.double().cpu()
            total.index_add_(0, place, values.double().cpu() * chosen)
            count.index_add_(0, place, chosen)
    model.release(policy)
    return (total / count.clamp(min=1.0)).view(len(groups), size)


def rlpr_score(rollouts: Sequence[Rollout], pairs: Sequence[Pair], policy: Any, tokenizer: Any, cfg: Config) -> Tensor:
    """`Method.score`: (P, G) rewards in [0, 1]. A pair's last response is the verdict after its prompt."""
    size, groups = len(rollouts) // len(pairs), []
    for p, pair in enumerate(pairs):
        made = [with_verdict(r, pair.winner, tokenizer) for r in rollouts[p * size : (p + 1) * size]]
        made.append(encode_verdict("", pair.winner, tokenizer))
        prompt = rollouts[p * size].prompt_ids
        groups.append(Group(prompt, [ids for ids, _ in made], sampler_logprobs=[chosen for _, chosen in made]))
    found = verdict_probabilities(policy, groups, cfg)
    return (found[:, :size] - found[:, size:] * cfg.debias).clamp(0.0, 1.0)


def main() -> None:
    cfg = cli.parse(Config, PRESETS)
    groups = StdFilter(cfg.out, cfg.std_beta)
    grpo.train(cfg, grpo.Method(score=rlpr_score, keep=groups.keep, advantage=groups.advantage))


if __name__ == "__main__":
    cli.start(main)
