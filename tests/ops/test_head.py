"""The head in chunks == the plain formula, in float64: log-probs, entropies, gradients."""

from __future__ import annotations

import pytest
import torch

from ops.head import _HeadLogprobs

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("entropy", [True, False])
def test_head_equals_the_plain_formula(entropy):
    """loss = sum of c * exp(log p), so that a token's slope depends on its log-prob."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 5, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    targets, c = torch.randint(11, (7,)), torch.randn(7, dtype=torch.float64)
    found = []
    for plain in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if plain:
            logits = h @ w.T / 0.7
            logprobs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
            entropies = torch.distributions.Categorical(logits=logits).entropy().detach() * entropy
        else:
            logprobs, entropies = _HeadLogprobs.apply(h, w, targets, 0.7, 3, entropy)
        found.append([logprobs.detach(), entropies, *torch.autograd.grad((c * logprobs.exp()).sum(), (h, w))])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_a_second_derivative_is_refused():
    hidden, weight = torch.randn(2, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    logprobs, _ = _HeadLogprobs.apply(hidden, weight, torch.tensor([0, 4]), 1.0, 32, False)
    (slope,) = torch.autograd.grad(logprobs.exp().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
