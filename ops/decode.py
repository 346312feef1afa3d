"""Prompt ids -> sampled ids and their log-probs, with a KV cache: what `TorchSampler` runs on.

A prompt is prefilled once for its group, and finished rows leave the batch. Each sequence has its own generator and
draws one number per token, so that any batch size and any number of ranks give the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ops.head import product


class KVCache:
    """Keys and values of every layer, (rows, kv_heads, slots, head_dim), with room to grow.

    Attention calls `update`; `used` slots hold tokens. It stands in for a transformers cache, which copies
    everything at each token.
    """

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.used = 0

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        stop = self.used + key.shape[2]
        if layer == len(self.layers):  # the prefill; the buffers are made by `keep`
            self.layers.append((key, value))
            return key, value
        keys, values = self.layers[layer]
        if stop > keys.shape[2]:
            keys, values = self.layers[layer] = (_widen(keys, stop), _widen(values, stop))
        keys[:, :, self.used : stop], values[:, :, self.used : stop] = key, value
        return keys[:, :, :stop], values[:, :, :stop]

    def keep(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be named several times (a prompt for its group)."""
        for i, (keys, values) in enumerate(self.layers):  # one layer at a time is in memory twice
            self.layers[i] = (keys[rows], values[rows])


def _widen(buffer: Tensor, slots: int) -> Tensor:
    """A copy of (rows, heads, s, dim) with at least `slots` slots; grows by half, so copies stay rare."""
    rows, heads, old, dim = buffer.shape
    wide = buffer.new_zeros(rows, heads, max(slots, old + old // 2 + 16), dim)
    wide[:, :, :old] = buffer
    return wide


def head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def group_bytes(config: Any, itemsize: int, prompt: int, n: int, max_tokens: int) -> float:
    """Memory that `decode` takes for one prompt of `prompt` tokens and its n responses, in bytes, from shapes alone.

    Counted: the cache, which grows by half; float32 logits with float64 probabilities and their sums; a layer's
    activations while the prompt goes through it.
    """
    slot = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size(config) * itemsize
    row = 1.5 * slot * (prompt + max_tokens) + 24 * config.vocab_size
    return n * row + prompt * (8 * config.hidden_size + 3 * config.intermediate_size) * itemsize


def draw(logits: Tensor, temperature: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling: logits (B, V), one uniform in [0, 1) per row (B,) -> ids (B,), logprobs (B,).

    Log-probs are in nats after temperature. Temperature 0 is argmax, with log-probs at temperature 1.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logprobs = (logits / temperature if temperature > 0 else logits).log_softmax(-1)
    if temperature > 0:
        cdf = logprobs.double().exp().cumsum(-1)
        ids = torch.searchsorted(cdf, (uniforms.double() * cdf[:, -1])[:, None], right=True)
        ids = ids.clamp(max=logits.shape[-1] - 1)
    else:
        ids = logits.argmax(-1, keepdim=True)
    return ids[:, 0], logprobs.gather(1, ids)[:, 0]


class Uniforms:
    """Row i's k-th number is a function of (its prompt's seed, its place in the group, k) and nothing else."""

    def __init__(self, seeds: Sequence[int], n: int):
        keys = [(seed, sample) for seed in seeds for sample in range(n)]
        self.generators = [np.random.Generator(np.random.Philox(key=np.array(k, np.uint64))) for k in keys]
        self.block: Any = None

    def at(self, k: int, rows: Tensor) -> Tensor:
        """(len(rows),) float32 numbers of step k; steps are asked for in order."""
        if k % 64 == 0:  # float32 draws are at most 1 - 2**-24, so u * total never rounds up to total
            self.block = torch.from_numpy(np.stack([g.random(64, np.float32) for g in self.generators]))
        return self.block[rows.cpu(), k % 64].to(rows.device)


def decode(lm: Any, prompts: Sequence[list[int]], n: int, temperature: float, max_tokens: int, seeds: Sequence[int],
           stop_ids: set[int], context: int) -> tuple[list[list[int]], list[list[float]]]:
    """Sample n responses to each prompt, all at once (B = len(prompts) * n rows) -> ids and log-probs per row.

    A prompt that fills the context of `context` tokens gets empty responses.
    """
    device = next(lm.parameters()).device
    lengths = torch.tensor([min(len(p), context) for p in prompts], device=device).repeat_interleave(n)  # (B,)
    limit = (context - lengths).clamp(min=0, max=max_tokens)  # (B,) tokens each row may have
    uniforms = Uniforms(seeds, n)
    stop = torch.tensor(sorted(stop_ids), device=device)
    rows = torch.arange(len(lengths), device=device)  # which row stands in which cache row
    done = limit == 0
    ids_of: list[list[int]] = [[] for _ in range(len(lengths))]
    logprobs_of: list[list[float]] = [[] for _ in range(len(lengths))]
    if bool(done.all()):
        return ids_of, logprobs_of
    cache = KVCache()
    logits = _prefill(lm, [p[:context] for p in prompts], cache)
    cache.keep(torch.arange(len(prompts), device=device).repeat_interleave(n))
    logits, pad = logits.repeat_interleave(n, 0), lengths.max() - lengths  # (B, V), (B,)
    # Prompts are padded on the left to the longest one, so the next token of every row has the same slot, cache.used:
    #     slot                     0    1    2    3  | 4 = cache.used at k = 0
    #     a row of 2 prompt tokens pad  pad  p0   p1 | a0      pad = 2, position of a0 = lengths + k = 2
    for k in range(max_tokens):
        ids, logprobs = draw(logits, temperature, uniforms.at(k, rows))
        for row, ended, i, p in zip(rows.tolist(), done.tolist(), ids.tolist(), logprobs.tolist(), strict=True):
            if not ended:
                ids_of[row].append(i)
                logprobs_of[row].append(p)
        done = done | torch.isin(ids, stop) | (limit <= k + 1)
        alive = int((~done).sum())
        if not alive:
            break
        if alive <= 0.75 * len(done):  # finished rows leave
            stay = (~done).nonzero()[:, 0]
            cache.keep(stay)
            rows, done, limit, lengths, pad, ids = (x[stay] for x in (rows, done, limit, lengths, pad, ids))
        slots = torch.arange(cache.used + 1, device=device)
        visible = (slots >= pad[:, None])[:, None, None]  # (B, 1, 1, slots)
        logits = _forward(lm, ids[:, None], (lengths + k)[:, None], visible, cache)
    return ids_of, logprobs_of


def _prefill(lm: Any, prompts: list[list[int]], cache: KVCache) -> Tensor:
    """Each prompt once, left-padded to the longest -> logits of its next token (P, V)."""
    device = next(lm.parameters()).device
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # (P, T)
    pad = torch.tensor([width - len(p) for p in prompts], device=device)[:, None]
    slots = torch.arange(width, device=device)
    causal = slots[None, :] <= slots[:, None]  # (T, T)
    seen = causal & (slots[None, None] >= pad[:, None]) | torch.eye(width, dtype=torch.bool, device=device)
    return _forward(lm, ids, (slots - pad).clamp(min=0), seen[:, None], cache)


def _forward(lm: Any, ids: Tensor, positions: Tensor, mask: Tensor, cache: KVCache) -> Tensor:
    """(B, T) ids and positions, (B, 1, T, slots) mask -> logits after the last token (B, V)."""
    out = lm.model(input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=False)
    cache.used += ids.shape[1]
    logits = product(out.last_hidden_state[:, -1], lm.lm_head.weight.T)
    return logits / getattr(lm.config, "logits_scaling", 1.0)  # Granite's
