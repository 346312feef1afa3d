"""Hidden states -> log-probs of the targets, without the (N, V) logits: the language model's head in chunks of tokens.

With the slopes of the loss foretold, its gradients are made in the forward pass, while a chunk's logits are there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = {"cpu": 2**22, "cuda": 2**27}  # elements of (tokens, vocabulary) logits alive at once


def target_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, entropy: bool = False,
                    slopes: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """(N, H) hidden states, (V, H) head -> (N,) log-probs of (N,) targets in nats, float32 or better, and entropies.

    The entropies (nats) are detached, and zeros unless `entropy`. `slopes`: (N,) log-probs -> (N,) d loss / d
    log-prob, if a token's depends on no other token's log-prob. It saves a second pass, and changes nothing.
    """
    chunk = max(32, CHUNK[hidden.device.type] // weight.shape[0])
    slopes = slopes if hidden.requires_grad else None
    found: tuple[Tensor, Tensor] = _HeadLogprobs.apply(hidden, weight, targets, temperature, chunk, entropy, slopes)
    return found


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """(C, H), (V, H) -> (C, V) in float32 or better: rounding logits to bfloat16 moves log-probs by 0.04."""
    if hidden.dtype in (torch.float32, torch.float64):
        logits = hidden @ weight.T
    elif hidden.is_cuda:
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        logits = hidden.float() @ weight.float().T
    return logits.div_(temperature)


def _head_gradients(probs: Tensor, targets: Tensor, slope: Tensor, hidden: Tensor, weight: Tensor,
                    temperature: float, grad_weight: Tensor) -> Tensor:
    """One chunk, whose (C, V) probabilities are used up: adds to `grad_weight` -> (C, H) gradient of hidden.

    d log p(y) / d logits = onehot(y) - softmax(logits); `slope` is d loss / d log p(y).
    """
    grad = probs.mul_(-slope[:, None])
    grad.scatter_add_(1, targets[:, None], slope[:, None])
    grad.div_(temperature)
    grad_weight.addmm_(grad.T, hidden.to(grad_weight.dtype))
    return (grad.to(weight.dtype) @ weight).to(hidden.dtype)


class _HeadLogprobs(torch.autograd.Function):
    """Head and log-softmax in chunks of tokens; the (N, V) logits are never alive at once.

    `slopes` foretells the loss: forward then makes the gradients too, from the logits it has at hand. Where the
    loss's own slopes turn out to be others, or nothing was foretold, backward makes the logits again.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int,
                entropies: bool, slopes: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropy, told = (torch.zeros(len(targets), dtype=exact, device=hidden.device) for _ in range(3))
        gradients = _empty_gradients(hidden, weight) if slopes else None
        for part in _parts(len(targets), chunk):
            logp = torch.log_softmax(_logits(hidden[part], weight, temperature), -1)
            logprobs[part] = logp.gather(1, targets[part, None])[:, 0]
            if not (entropies or slopes):
                continue
            probs = logp.exp() if entropies else logp.exp_()
            if entropies:
                entropy[part] = -torch.linalg.vecdot(probs, logp)
            if slopes and gradients:
                told[part] = slopes(logprobs)[part]
                gradients[0][part] = _head_gradients(probs, targets[part], told[part], hidden[part], weight,
                                                     temperature, gradients[1])
        foretold = (told, gradients[0], gradients[1].to(weight.dtype)) if gradients else ()
        ctx.save_for_backward(hidden, weight, targets, *foretold)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, *foretold = ctx.saved_tensors
        if foretold and torch.allclose(slope, foretold[0], rtol=1e-5, atol=0.0):
            return foretold[1], foretold[2], *[None] * 5
        grad_hidden, grad_weight = _empty_gradients(hidden, weight)
        for part in _parts(len(targets), ctx.chunk):
            probs = torch.softmax(_logits(hidden[part], weight, ctx.temperature), -1)
            grad_hidden[part] = _head_gradients(probs, targets[part], slope[part], hidden[part], weight,
                                                ctx.temperature, grad_weight)
        return grad_hidden, grad_weight.to(weight.dtype), *[None] * 5


def _empty_gradients(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of hidden states and head; the head's is summed over the chunks, in float32 at least."""
    return torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))


def _parts(total: int, chunk: int) -> list[slice]:
    return [slice(i, min(i + chunk, total)) for i in range(0, total, chunk)]
