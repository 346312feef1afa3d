"""R-star: which of several right chains should be learnt. ReasonGRM's second stage (arXiv 2506.16712)

    R*(r, a) = mean_i p(r_i | prompt, r_<i)  x  mean_i p(a_i | prompt, r, a_<i)      r the reasoning, a the verdict
               self-consistency                 validity

The probabilities are a model's, best the model that wrote the chains. A chain that wanders has many unlikely tokens; a
chain that goes straight to its verdict has few. These are means of probabilities, not of their logarithms, so neither
the length nor a single unlikely word decides. Only chains with the right verdict are compared. A chain is scored as it
will be learnt: without the thoughts before `</think>`, below the prompt of pass 1.

    python -m prepare.distill --data PAIRS.jsonl --model runs/zero --samples 8 --no-second-pass --rstar runs/zero
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from batch import Group, collate, plan, split
from cor_prompt import control_tokens, encode_prompt, encode_text, plain_tokenizer
from data import Message
from loading.tokenizer import load_tokenizer
from model import Policy, load_policy


def rstar(probabilities: Tensor, reasoning: int) -> float:
    """R* of one chain from its tokens' probabilities, (len,); the first `reasoning` of them are the reasoning's.

    It is 0 for a verdict without reasoning, and for reasoning without a verdict.

    >>> round(rstar(torch.tensor([0.9, 0.5, 1.0, 0.8]), 2), 4)     # 0.7 x 0.9
    0.63
    """
    if not 0 < reasoning < len(probabilities):
        return 0.0
    return (probabilities[:reasoning].mean() * probabilities[reasoning:].mean()).item()


def reasoning_tokens(trace: str, tokenizer: Any) -> int:
    """How many of a trace's tokens end before its last <answer>."""
    start = trace.rfind("<answer>")
    return sum(end <= start for _, end in plain_tokenizer(tokenizer).encode(trace, add_special_tokens=False).offsets)


@torch.no_grad()
def probabilities(policy: Policy, groups: Sequence[Group], max_tokens: int) -> list[Tensor]:
    """The probability of every token of every response, in their order; `max_tokens` a forward pass."""
    device = next(policy.parameters()).device
    one_row, pieces = device.type == "cuda", split(groups, max_tokens)
    found: dict[int, list[Tensor]] = {}
    for indices in tqdm(plan(pieces, max_tokens, one_row=one_row), "r-star"):
        values = policy(collate(pieces, indices, device, one_row)).logprobs.exp().cpu()
        parts = iter(values.split([len(ids) for i in indices for ids in pieces[i].responses]))
        found |= {i: list(islice(parts, len(pieces[i].responses))) for i in indices}
    return [part for i in range(len(pieces)) for part in found[i]]


def rank_traces(path: str, asked: Sequence[tuple[Sequence[Message], Sequence[str]]], dtype: str = "float32",
                max_tokens: int = 16384) -> list[list[float]]:
    """R* of each of the traces below each prompt, by the model at `path`."""
    tokenizer = load_tokenizer(path)
    plain, control = plain_tokenizer(tokenizer), control_tokens(tokenizer)
    policy = load_policy(path, getattr(torch, dtype)).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    groups = [Group(encode_prompt(messages, tokenizer), [encode_text(trace, plain, control) for trace in traces])
              for messages, traces in asked]
    found = iter(probabilities(policy, groups, max_tokens))
    return [[rstar(next(found), reasoning_tokens(trace, tokenizer)) for trace in traces] for _, traces in asked]
