"""Who sees whom, on each device: SDPA with a dense mask on CPUs, FlexAttention with a block mask on GPUs.

Both follow one rule, `sees`, and both keep grouped key and value heads as few as they are. A config's dropout
is left out: sampling, old and new log-probs must come from one distribution.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 128  # FlexAttention's tile: rows on a GPU are padded to a multiple of it


def sees(group_q: Tensor, group_k: Tensor, response_q: Tensor, response_k: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Token q sees token k <= q of its own group, where k is of the prompt (response 0) or of its own response."""
    return (group_q == group_k) & ((response_k == 0) | (response_q == response_k)) & (k <= q)


def visible(group: Tensor, response: Tensor) -> Tensor:
    """(R, T), (R, T) -> (R, 1, T, T) bool, the dense mask for SDPA. No row is empty: a token sees itself."""
    index = torch.arange(group.shape[1], device=group.device)
    return sees(group[:, :, None], group[:, None, :], response[:, :, None], response[:, None, :],
                index[:, None], index[None, :])[:, None]  # fmt: skip


def block_mask(group: Tensor, response: Tensor) -> Any:
    """(R, T), (R, T) -> the same rule as a BlockMask, which lets FlexAttention skip tiles nobody sees."""
    from torch.nn.attention.flex_attention import create_block_mask

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return sees(group[b, q], group[b, k], response[b, q], response[b, k], q, k)

    rows, width = group.shape  # compiled on a GPU: uncompiled it would make the (R, T, T) mask it is there to avoid
    make = _compiled(create_block_mask) if group.is_cuda else create_block_mask
    return make(rule, rows, None, width, width, device=group.device, BLOCK_SIZE=BLOCK)


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=True)


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process; it stands still after the warm-up."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def grouped_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                      scaling: float | None = None, **_: Any) -> tuple[Tensor, None]:  # fmt: skip
    """SDPA with a boolean mask, (rows, heads, T, dim) in, (rows, T, heads, dim) out; ValueError without a mask.

    On a CPU grouped keys and values stay as they are: the stock path repeats the whole cache at every token.
    """
    if attention_mask is None:  # transformers makes no mask for attention it does not know: nothing would be causal
        raise ValueError("attention without a mask; call Policy, or pass a 4-D boolean mask")
    few = query.device.type == "cpu"  # elsewhere a mask and grouped heads together fall back to slow kernels
    if not few:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=few
    )
    return out.transpose(1, 2), None


def flex_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
                   scaling: float | None = None, **_: Any) -> tuple[Tensor, None]:  # fmt: skip
    """FlexAttention with a block mask, shapes as in `grouped_attention`; compiled on a GPU, forward only on a CPU.

    28 query heads on 4 key heads (Qwen2.5-7B) are no power of two apart: the kernel groups them itself.
    """
    from torch.nn.attention.flex_attention import BlockMask
    from torch.nn.attention.flex_attention import flex_attention as kernel

    if not isinstance(attention_mask, BlockMask):
        raise ValueError("FlexAttention without a block mask; call Policy")
    run = _compiled(kernel) if query.is_cuda else kernel
    out = run(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


def register() -> None:
    """Make both known to transformers, as attn_implementation "grouped" and "flex"."""
    from transformers import AttentionInterface

    AttentionInterface.register("grouped", grouped_attention)
    AttentionInterface.register("flex", flex_attention)
