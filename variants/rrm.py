"""Reward Reasoning Model (arXiv 2505.14674): a reasoner becomes a judge by reinforcement alone, without traces.

    R = +1 if the chain ends in \\boxed{Assistant 1} (or 2) for the response that won, else -1

    python -m variants.rrm                                     # from DeepSeek-R1-Distill-Qwen-7B, as theirs
    python -m variants.toy_forms runs/toy runs/toy-boxed --form boxed      # docs/variants.md

What differs from RM-R1's Distilled models is the prompt: rules for all requests alike, no rubric of the judge's own,
and a verdict in a box; GRPO and the reward are the same. There is always a winner, and never more than two
responses: several are compared two at a time, by a knockout or a round robin (`judge.py rank`). The wording is this
project's own. (Not to be confused with the robust reward model of arXiv 2409.13156, `--augment` of
prepare/build_data.py.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

import grpo
from cor_prompt import Style
from data import Message, Pair
from judging.pointwise import render_scoring
from reward import WINDOW, Letter, Rule
from rollout import Rollout
from runtime import cli
from runtime.errors import UserError

PRESETS = {name: replace(base, out=f"{base.out}-rrm") for name, base in grpo.PRESETS.items()}

SYSTEM = """Two AI assistants answered the same request: Assistant 1 wrote Response 1, Assistant 2 wrote Response 2. \
Decide which of them served the Client better.

- First comes whether a response does what was asked, exactly and truthfully; then how helpful, accurate and \
thorough it is.
- If the request is harmful, the safer response is the better one.
- What nobody asked for is as much a fault as what is missing.
- The order of the responses, their length and the assistants' names must not sway you.

Think it through step by step. One of the two has to win: write last of all, in exactly this form, \
\\boxed{Assistant 1} or \\boxed{Assistant 2}."""
BOXES: dict[Letter, str] = {"A": "\\boxed{Assistant 1}", "B": "\\boxed{Assistant 2}"}


def prompt(pair: Pair, style: Style, system: str | None = None) -> list[Message]:
    """`Method.prompt`; the style has no say, --prompt-file replaces the wording."""
    if pair.messages is not None:
        raise UserError(f"pair {pair.pair_id}: a ready-made prompt asks for another verdict; give the responses")
    _, data = render_scoring(pair.context, (pair.response_a, pair.response_b))
    return [{"role": "system", "content": SYSTEM if system is None else system}, data]


def verdict(text: str, rule: Rule = "train") -> Letter | None:
    """The letter if exactly one of the two boxes stands, literally, in the last 80 characters after the thoughts.

    >>> verdict("so \\\\boxed{Assistant 2}"), verdict("\\\\boxed{Assistant 1} or \\\\boxed{Assistant 2}")
    ('B', None)
    """
    end = text.rpartition("</think>")[2][-WINDOW:]
    named: list[Letter] = [letter for letter, box in BOXES.items() if box in end]
    return named[0] if len(named) == 1 else None


def rrm_score(rollouts: Sequence[Rollout], pairs: Sequence[Pair], policy: Any, tokenizer: Any,
              cfg: grpo.Config) -> torch.Tensor:
    """`Method.score`: (P, G) rewards."""
    size = len(rollouts) // len(pairs)
    rewards = [1.0 if verdict(r.answer) == pairs[i // size].winner else -1.0 for i, r in enumerate(rollouts)]
    return torch.tensor(rewards).view(len(pairs), size)


if __name__ == "__main__":
    method = grpo.Method(prompt=prompt, score=rrm_score, verdict=verdict)
    cli.start(lambda: grpo.train(cli.parse(grpo.Config, PRESETS), method))
