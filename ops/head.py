"""Hidden states -> log-probs of the targets. The head works in chunks of tokens: the (N, V) logits never exist at once.

Backward computes each chunk's logits a second time. That costs one more matrix product and saves the memory of N x V
numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = {"cpu": 2**22, "cuda": 2**27}  # elements of (tokens, vocabulary) logits alive at once


class Scores(NamedTuple):
    """What a policy says of a micro-batch's targets. A tuple, because FSDP2 looks for tensors in tuples only."""

    logprobs: Tensor  # (N,) nats, float32 or better
    entropies: Tensor  # (N,) nats, without gradient; zeros unless they were asked for


def target_scores(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0,
                  entropy: bool = False) -> Scores:
    """(N, H) hidden states, (V, H) head -> log-probs of the (N,) targets, and entropies if asked for."""
    chunk = max(32, CHUNK[hidden.device.type] // weight.shape[0])
    return Scores(*_HeadLogprobs.apply(hidden, weight, targets, temperature, chunk, entropy))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed up and returned in float32 or better: rounding logits to bfloat16 moves log-probs by 0.04."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """(C, H), (V, H) -> (C, V)"""
    return product(hidden, weight.T).div_(temperature)


def _head_gradients(probs: Tensor, targets: Tensor, slope: Tensor, hidden: Tensor, weight: Tensor,
                    temperature: float, grad_weight: Tensor) -> Tensor:
    """One chunk: adds its part to `grad_weight` -> (C, H) gradient of hidden. `probs`, (C, V), is overwritten.

    d log p(y) / d logits = onehot(y) - softmax(logits); `slope`, (C,), is d loss / d log p(y).
    """
    grad = probs.mul_(-slope[:, None]).scatter_add_(1, targets[:, None], slope[:, None])
    grad = grad.div_(temperature).to(weight.dtype)
    if grad.dtype == grad_weight.dtype:
        grad_weight.addmm_(grad.T, hidden)
    else:
        grad_weight.add_(product(grad.T, hidden))
    return grad @ weight


class _HeadLogprobs(torch.autograd.Function):
    """Head and log-softmax, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int,
                entropy: bool) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropies = (torch.zeros(len(targets), dtype=exact, device=hidden.device) for _ in range(2))
        for part in _parts(len(targets), chunk):
            logp = torch.log_softmax(_logits(hidden[part], weight, temperature), -1)  # (C, V)
            logprobs[part] = logp.gather(1, targets[part, None])[:, 0]
            if entropy:
                entropies[part] = -torch.linalg.vecdot(logp.exp(), logp)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """`slope`: (N,) d loss / d log-prob. The head's gradient is summed over the chunks in float32 or better."""
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for part in _parts(len(targets), ctx.chunk):
            probs = torch.softmax(_logits(hidden[part], weight, ctx.temperature), -1)  # (C, V)
            grad_hidden[part] = _head_gradients(probs, targets[part], slope[part], hidden[part], weight,
                                                ctx.temperature, grad_weight)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _parts(total: int, chunk: int) -> list[slice]:
    return [slice(i, min(i + chunk, total)) for i in range(0, total, chunk)]
