"""Who sees whom, on each device: SDPA with a dense mask on CPUs, FlexAttention with a block mask on GPUs.

Both follow one rule, `sees`. Neither repeats grouped key and value heads. Dropout is left out: sampling, old and
new log-probs must come from one distribution.
"""

from __future__ import annotations

from functools import cache
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 128  # FlexAttention's tile: rows for it are padded to a multiple of it, at least two tiles
FLEX = {"cuda": "inductor"}  # devices that use FlexAttention -> the backend of torch.compile that it needs there


def sees(group_q: Tensor, group_k: Tensor, response_q: Tensor, response_k: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Token q sees token k <= q of its own group, where k is of the prompt (response 0) or of its own response."""
    return (group_q == group_k) & ((response_k == 0) | (response_q == response_k)) & (k <= q)


def visible(group: Tensor, response: Tensor) -> Tensor:
    """(R, T), (R, T) -> (R, 1, T, T) bool, the dense mask for SDPA. No row is empty: a token sees itself."""
    index = torch.arange(group.shape[1], device=group.device)
    return sees(group[:, :, None], group[:, None, :], response[:, :, None], response[:, None, :],
                index[:, None], index[None, :])[:, None]


GroupSpans = tuple[int, list[tuple[int, Tensor]]]  # prompt length; (length, mask) of each response


def spans(group: Tensor, response: Tensor) -> list[list[GroupSpans]]:
    """(R, T), (R, T) -> the same rule as lengths: each row's groups, a prompt and its responses, in order.

    A response's mask is (length, prompt + length). A prompt and its only response are one causal text, and padding
    is a group without responses: neither needs a mask. On a CPU this saves what a dense mask computes and throws away.
    """
    rows = []
    for row in torch.stack([group, response], 2):
        runs, lengths = torch.unique_consecutive(row, dim=0, return_counts=True)
        groups: list[GroupSpans] = []
        for _, members in groupby(zip(runs[:, 0].tolist(), lengths.tolist(), strict=True), itemgetter(0)):
            prompt, *own = [n for _, n in members]
            masks = [(n, torch.ones(n, prompt + n, dtype=torch.bool).tril(prompt)) for n in own]
            groups.append((prompt, masks) if len(own) > 1 else (prompt + sum(own), []))
        rows.append(groups)
    return rows


@torch.no_grad()  # compiled once, not again for training
def block_mask(group: Tensor, response: Tensor) -> Any:
    """(R, T), (R, T) -> the same rule as a BlockMask, which lets FlexAttention skip tiles nobody sees."""
    from torch.nn.attention.flex_attention import create_block_mask

    group, response = group.int(), response.int()  # int32, because the kernels read them: half as many registers

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return sees(group[b, q], group[b, k], response[b, q], response[b, k], q, k)

    rows, width = group.shape
    make = _compiled(create_block_mask, group.device.type)
    return make(rule, rows, None, width, width, device=group.device, BLOCK_SIZE=BLOCK)


@cache
def _compiled(function: Any, device: str) -> Any:
    """Compiled where FlexAttention is used. Elsewhere the function itself, which builds the whole (R, T, T) mask or
    scores in memory.

    `fullgraph`: after too many graphs an error; without it the same function would go on uncompiled, in silence.
    """
    if device not in FLEX:
        return function
    return torch.compile(function, dynamic=True, fullgraph=True, backend=FLEX[device])


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process; it stands still after the warm-up."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def grouped_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                      scaling: float | None = None, spans: list | None = None,
                      **_: Any) -> tuple[Tensor, None]:
    """SDPA with a boolean mask or spans, (rows, heads, T, dim) in, (rows, T, heads, dim) out; ValueError if both
    are missing.

    On a CPU grouped keys and values stay as they are: the stock path repeats the whole cache at every token.
    """
    if spans is not None:
        return _by_spans(query, key, value, spans, scaling).transpose(1, 2), None
    if attention_mask is None:  # transformers builds none for our attention, and nothing would be causal
        raise ValueError("attention without a mask; call Policy, or pass a 4-D boolean mask")
    few = query.device.type == "cpu"  # elsewhere a mask and grouped heads together fall back to slow kernels
    if not few:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=few
    )
    return out.transpose(1, 2), None


def _by_spans(query: Tensor, key: Tensor, value: Tensor, spans: list[list[GroupSpans]],
              scaling: float | None) -> Tensor:
    """A prompt sees itself, a response sees its prompt and itself: one small attention each, in the row's order."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                                          scale=scaling, enable_gqa=True)

    rows = []
    for r, groups in enumerate(spans):
        lengths = [n for prompt, responses in groups for n in (prompt, *(n for n, _ in responses))]
        pieces = zip(*(x[r : r + 1].split(lengths, dim=2) for x in (query, key, value)), strict=True)
        out = []
        for _, responses in groups:
            q, prompt_k, prompt_v = next(pieces)
            out.append(attend(q, prompt_k, prompt_v, None))
            for _, mask in responses:
                q, k, v = next(pieces)
                out.append(attend(q, torch.cat([prompt_k, k], 2), torch.cat([prompt_v, v], 2), mask))
        rows.append(torch.cat(out, 2))
    return torch.cat(rows)


def flex_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
                   scaling: float | None = None, **_: Any) -> tuple[Tensor, None]:
    """FlexAttention with a block mask, shapes as in `grouped_attention`.

    28 query heads on 4 key heads (Qwen2.5-7B) are no power of two apart: the kernel groups them itself.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention as kernel

    if not isinstance(attention_mask, BlockMask):
        raise ValueError("FlexAttention without a block mask; call Policy")
    out = _compiled(kernel, query.device.type)(
        query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=True,
        kernel_options={"IS_DIVISIBLE": query.shape[2] % BLOCK == 0})
    return out.transpose(1, 2), None


def register() -> None:
    """Make both known to transformers, as attn_implementation "grouped" and "flex"."""
    from transformers import AttentionInterface

    AttentionInterface.register("grouped", grouped_attention)
    AttentionInterface.register("flex", flex_attention)
