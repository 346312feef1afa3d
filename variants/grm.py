"""DeepSeek-GRM (arXiv 2504.02495): criteria, critique and a score for each response; the order of scores is rewarded.

    R = +1 if S[best] > S[i] for every other i       n >= 2 responses: a tie is wrong
    R = +1 if S[0] = label, 0 or 1                   a single response
    R = -1 otherwise, or where no scores can be read

    python -m variants.grm --model runs/sft --group-size 4 --kl-coef 0.08 --lr 4e-7     # their G, KL (27B) and rate
    python -m variants.toy_forms runs/toy runs/toy-scores --form scores                 # docs/variants.md

The prompt and the reading of scores are pointwise.py's, which `eval.py run --pointwise` uses too: a chain that gives
other than n whole numbers in its last box, at its end, has none. No format reward. A pair is two responses; a row
with {"alone": "A"} (or "B") in its meta shows that one alone, and its label is whether it won.

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

# one response has nothing to be compared with: right or not, where several are scored from 1 to 10
ALONE = (
    pointwise.SYSTEM.partition("\n3.")[0]
    + """
3. Say whether the response does what it should, last of all and in exactly this form: \\boxed{1} if it does, \
\\boxed{0} if it does not."""
)


def responses(pair: Pair) -> list[str]:
    sides = {"A": pair.response_a, "B": pair.response_b}
    alone = pair.meta.get("alone")
    if pair.messages is not None or alone not in (None, "A", "B"):
        raise UserError(f"pair {pair.pair_id}: scores need the two responses apart, and 'alone' is A or B")
    return [sides[alone]] if alone else list(sides.values())


def label(pair: Pair) -> int:
    """The best one's place; of a response alone whether it won."""
    alone = pair.meta.get("alone")
    return int(pair.winner == alone) if alone else "AB".index(pair.winner)


def prompt(pair: Pair, style: Style, system: str | None = None) -> list[Message]:
    """`Method.prompt`; the style has no say, --prompt-file replaces the wording."""
    shown = responses(pair)
    usual, data = pointwise.render_scoring(pair.context, shown)
    wording = usual["content"] if len(shown) > 1 else ALONE
    return [{"role": "system", "content": wording if system is None else system}, data]


def read_scores(text: str, count: int) -> list[int] | None:
    """
    >>> read_scores("So \\\\boxed{7, 3}", 2), read_scores("So \\\\boxed{0}", 1), read_scores("So \\\\boxed{2}", 1)
    ([7, 3], [0], None)
    """
    if count > 1:
        return pointwise.parse_scores(text, count)
    _, box, rest = text.rpartition("</think>")[2].rstrip()[-80:].rpartition("\\boxed{")
    inside, closed, _ = rest.partition("}")
    return [int(inside)] if box and closed and inside.strip() in ("0", "1") else None


def grm_reward(scores: Sequence[int] | None, label: int) -> float:
    """
    >>> [grm_reward(scores, 0) for scores in ([7, 3], [7, 7], [3, 7], [7, 3, 8], [0], [1], None)]
    [1.0, -1.0, -1.0, -1.0, 1.0, -1.0, -1.0]
    """
    if scores is None:
        return -1.0
    others = [score for i, score in enumerate(scores) if i != label]
    right = scores[label] > max(others) if len(scores) > 1 else scores[0] == label
    return 1.0 if right else -1.0


def verdict(text: str, rule: Rule = "train") -> Letter | None:
    """The letter of the strictly higher score."""
    a, b = read_scores(text, 2) or (0, 0)
    return None if a == b else "A" if a > b else "B"


def grm_score(rollouts: Sequence[Rollout], pairs: Sequence[Pair], policy: Any, tokenizer: Any,
              cfg: grpo.Config) -> torch.Tensor:
    """`Method.score`: (P, G) rewards."""
    size = len(rollouts) // len(pairs)
    asked = [pairs[i // size] for i in range(len(rollouts))]
    rewards = [grm_reward(read_scores(r.answer, len(responses(pair))), label(pair))
               for r, pair in zip(rollouts, asked, strict=True)]
    return torch.tensor(rewards).view(len(pairs), size)


def not_too_easy(rewards: torch.Tensor) -> torch.Tensor:
    """`Method.keep`: (P, G) rewards -> (P,), False where all samples are right."""
    return (rewards < 0).any(dim=1)


if __name__ == "__main__":
    method = grpo.Method(prompt=prompt, score=grm_score, keep=not_too_easy, verdict=verdict)
    cli.start(lambda: grpo.train(cli.parse(grpo.Config, PRESETS), method))
