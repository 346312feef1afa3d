"""Head gradients made in the forward pass == the plain formula, in float64, whatever was foretold."""

from __future__ import annotations

import pytest
import torch

from ops import head
from ops.head import _HeadLogprobs


def test_linalg_entropy_is_the_plain_one():
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 5, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    plain = torch.distributions.Categorical(logits=hidden @ weight.T / 0.7).entropy()
    for slopes in (None, torch.ones_like):
        entropy = _HeadLogprobs.apply(hidden, weight, torch.zeros(7, dtype=torch.int64), 0.7, 3, True, slopes)[1]
        torch.testing.assert_close(entropy, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("entropies", [True, False])
@pytest.mark.parametrize("foretold", ["right", "nothing", "wrong", "of another chunk's tokens"])
def test_head_gradients_equal_the_plain_formula(foretold, entropies, monkeypatch):
    """loss = sum of c * exp(log p): its slopes depend on the log-probs, each on its own."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 5, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    targets, c = torch.randint(11, (7,)), torch.randn(7, dtype=torch.float64)
    slopes = {
        "right": lambda logprobs: c * logprobs.exp(),
        "nothing": None,
        "wrong": lambda logprobs: 2.0 * c * logprobs.exp(),
        "of another chunk's tokens": lambda logprobs: c * logprobs.exp() + logprobs.sum(),
    }[foretold]
    passes, found = [], []
    honest = head._logits
    monkeypatch.setattr(head, "_logits", lambda *args: passes.append(1) or honest(*args))
    for plain in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if plain:
            logprobs = (h @ w.T / 0.7).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        else:
            logprobs, _ = _HeadLogprobs.apply(h, w, targets, 0.7, 3, entropies, slopes)
        found.append([logprobs.detach(), *torch.autograd.grad((c * logprobs.exp()).sum(), (h, w))])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    assert len(passes) == (3 if foretold == "right" else 6)  # three chunks: once each, or again in backward
