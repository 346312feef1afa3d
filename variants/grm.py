"""DeepSeek-GRM (arXiv 2504.02495): criteria, critique and a score for each response; the order of scores is rewarded.

    R = +1 if S[best] > S[i] for every other i       n >= 2 responses: a tie is wrong
    R = -1 otherwise, or where no scores can be read

    python -m variants.grm --model runs/sft --group-size 4 --kl-coef 0.08 --lr 4e-7     # their G, KL (27B) and rate
    python -m variants.toy_forms runs/toy runs/toy-scores --form scores                 # docs/variants.md

The prompt and the reading of scores are pointwise.py's, which `eval.py run --pointwise` uses too: a chain that gives
other than n whole numbers in its last box, at its end, has none. No format reward. A pair is two responses. Left out:
items of a single response, which the paper rewards for a score that equals a label of 0 or 1.

Too-easy items, on which every sample is right, are sampled but not trained on: `keep` refills the batch from the
stream. The paper removes them once, before the training, by samples of the model it starts from. A stream that
holds nothing else never fills a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

import grpo
from cor_prompt import Style
from data import Message, Pair
from judging import pointwise
from reward import Letter, Rule
from rollout import Rollout
from runtime import cli
from runtime.errors import UserError

PRESETS = {name: replace(base, out=f"{base.out}-grm") for name, base in grpo.PRESETS.items()}


def prompt(pair: Pair, style: Style, system: str | None = None) -> list[Message]:
    """`Method.prompt`; the style has no say, --prompt-file replaces the wording."""
    if pair.messages is not None:
        raise UserError(f"pair {pair.pair_id}: a ready-made prompt asks for a verdict; scores need the two responses")
    usual, data = pointwise.render_scoring(pair.context, (pair.response_a, pair.response_b))
    return [usual if system is None else {"role": "system", "content": system}, data]


def grm_reward(scores: Sequence[int] | None, best: int) -> float:
    """
    >>> [grm_reward(scores, 0) for scores in ([7, 3], [7, 7], [3, 7], [7, 3, 8], None)]
    [1.0, -1.0, -1.0, -1.0, -1.0]
    """
    if scores is None:
        return -1.0
    return 1.0 if scores[best] > max(score for i, score in enumerate(scores) if i != best) else -1.0


def verdict(text: str, rule: Rule = "train") -> Letter | None:
    """The letter of the strictly higher score."""
    a, b = pointwise.parse_scores(text, 2) or (0, 0)
    return None if a == b else "A" if a > b else "B"


def grm_score(rollouts: Sequence[Rollout], pairs: Sequence[Pair], policy: Any, tokenizer: Any,
              cfg: grpo.Config) -> torch.Tensor:
    """`Method.score`: (P, G) rewards."""
    size = len(rollouts) // len(pairs)
    rewards = [grm_reward(pointwise.parse_scores(r.answer, 2), "AB".index(pairs[i // size].winner))
               for i, r in enumerate(rollouts)]
    return torch.tensor(rewards).view(len(pairs), size)


def not_too_easy(rewards: torch.Tensor) -> torch.Tensor:
    """`Method.keep`: (P, G) rewards -> (P,), False where all samples are right."""
    return (rewards < 0).any(dim=1)


if __name__ == "__main__":
    method = grpo.Method(prompt=prompt, score=grm_score, keep=not_too_easy, verdict=verdict)
    cli.start(lambda: grpo.train(cli.parse(grpo.Config, PRESETS), method))
