"""Attention by spans == attention with the dense mask, outputs and gradients, in float64."""

from __future__ import annotations

import pytest
import torch

from batch import Group, collate
from ops.attention import grouped_attention, spans, visible

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("one_row", [False, True])
def test_spans_equal_the_dense_mask(one_row):
    groups = [Group([1, 2, 3], [[4, 5, 6], [7], [8, 9]]), Group([1] * 5, [[2] * 4, [3] * 7, []]), Group([1], [[2]])]
    batch = collate(groups, [0, 1, 2], "cpu", one_row)
    torch.manual_seed(0)
    rows, width = batch.inputs.shape
    q, k, v = (torch.randn(rows, h, width, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    real = (batch.group >= 0)[:, :, None, None]  # nobody reads what padding computes
    found = []
    for kind in ({"spans": spans(batch.group, batch.response)}, {}):
        mask = None if kind else visible(batch.group, batch.response)
        out = torch.where(real, grouped_attention(torch.nn.Module(), q, k, v, mask, **kind)[0], 0.0)
        found.append([out, *torch.autograd.grad((out * out.detach().cos()).sum(), (q, k, v))])
    for ours, dense in zip(*found, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-12)
