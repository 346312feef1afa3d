"""Prompt ids -> sampled responses with their log-probs (`Rollout`), and pairs -> verdicts (`judge_pairs`).

`TorchSampler` is the embedded default and needs nothing but torch: one prefill per prompt shared by its
group, a preallocated KV cache, finished rows leave the batch, and one uniform per token from a generator
of its own per sequence, so that the same rollouts come out for any batch size or number of ranks.
Judging calls nothing but `chat`. Torch is imported inside functions only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from cor_prompt import Style, encode_prompt, render
from data import Message, Pair, swap
from reward import Letter, Rule, parse_verdict
from run import derive_seed

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rollout:
    """One sampled response. Ids are kept end to end: nothing is ever tokenised again."""

    prompt_ids: list[int]
    response_ids: list[int]  # the end-of-turn token included when it was sampled
    sampler_logprobs: list[float]  # nats, after temperature, one per response id
    text: str  # our tokenizer's decode of response_ids without the final end-of-turn token
    finish_reason: Literal["stop", "length"]
    prompt_index: int  # which prompt of this call


@dataclass(frozen=True)
class Reply:
    """What a conversation got back; token counts are the sampler's."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    response_tokens: int


class Chat(Protocol):
    """All that judging needs: messages in, replies out."""

    def chat(self, conversations: Sequence[Sequence[Message]], n: int, temperature: float, max_tokens: int,
             seeds: Sequence[int]) -> list[list[Reply]]: ...  # fmt: skip


class Sampler(Chat, Protocol):
    """What training needs. One seed per prompt; the P * n rollouts keep groups adjacent."""

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None: ...
    def generate(self, prompts: Sequence[list[int]], n: int, temperature: float, max_tokens: int,
                 seeds: Sequence[int]) -> list[Rollout]: ...  # fmt: skip
    def sleep(self) -> None: ...
    def close(self) -> None: ...


# ---- the embedded sampler ------------------------------------------------------------------------------


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
        self.layers = [(keys[rows], values[rows]) for keys, values in self.layers]


def _widen(buffer: Tensor, slots: int) -> Tensor:
    """A copy of (rows, heads, s, dim) with at least `slots` slots; grows by half, so copies stay rare."""
    rows, heads, old, dim = buffer.shape
    wide = buffer.new_zeros(rows, heads, max(slots, old + old // 2 + 16), dim)
    wide[:, :, :old] = buffer
    return wide


def draw(logits: Tensor, temperature: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling: logits (B, V), one uniform in [0, 1) per row (B,) -> ids (B,), logprobs (B,).

    Log-probs are in nats after temperature. Temperature 0 is argmax, with log-probs at temperature 1.
    """
    import torch

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
        import numpy as np

        keys = [(seed, sample) for seed in seeds for sample in range(n)]
        self.generators = [np.random.Generator(np.random.Philox(key=np.array(k, np.uint64))) for k in keys]
        self.block: Any = None

    def at(self, k: int, rows: Tensor) -> Tensor:
        """(len(rows),) float32 numbers of step k; steps are asked for in order."""
        import numpy as np
        import torch

        if k % 64 == 0:  # float32 draws are at most 1 - 2**-24, so u * total never rounds up to total
            self.block = torch.from_numpy(np.stack([g.random(64, np.float32) for g in self.generators]))
        return self.block[rows.cpu(), k % 64].to(rows.device)


class TorchSampler:
    """Samples from a transformers causal LM. With `shared=True` the LM is the trainer's own, already in step."""

    def __init__(self, lm: Any, tokenizer: Any, shared: bool = False, rows_at_once: int = 256):
        self.lm, self.tokenizer, self.shared, self.rows_at_once = lm, tokenizer, shared, rows_at_once
        self.stop_ids = stop_ids(lm.generation_config, tokenizer)
        self.context = int(lm.config.max_position_embeddings)

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy the policy's weights; raises RuntimeError if a parameter did not come."""
        import torch

        if self.shared:
            return
        own = dict(self.lm.named_parameters(remove_duplicate=False))
        missing = set(own)
        with torch.no_grad():
            for name, tensor in weights:
                own[name].copy_(tensor)
                missing.discard(name)
        if missing:
            raise RuntimeError(f"weight sync left {len(missing)} parameters behind, {min(missing)} among them")

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        pass

    def generate(self, prompts: Sequence[list[int]], n: int, temperature: float, max_tokens: int,
                 seeds: Sequence[int]) -> list[Rollout]:  # fmt: skip
        """n rollouts per prompt, groups adjacent. A prompt that fills the context gets empty responses."""
        import torch

        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        per_wave = max(1, self.rows_at_once // n)
        found: dict[int, list[Rollout]] = {}
        mode = self.lm.training
        self.lm.eval()
        try:
            with torch.inference_mode():
                for start in range(0, len(order), per_wave):
                    wave = order[start : start + per_wave]
                    made = self._wave(prompts, wave, n, temperature, max_tokens, [seeds[i] for i in wave])
                    found |= {i: made[k * n : (k + 1) * n] for k, i in enumerate(wave)}
        finally:
            self.lm.train(mode)
        return [rollout for i in range(len(prompts)) for rollout in found[i]]

    def _wave(self, prompts: Sequence[list[int]], wave: list[int], n: int, temperature: float,
              max_tokens: int, seeds: list[int]) -> list[Rollout]:  # fmt: skip
        """Sample for the prompts `wave` at once: B = len(wave) * n rows."""
        import torch

        device = next(self.lm.parameters()).device
        lengths = torch.tensor([min(len(prompts[i]), self.context) for i in wave], device=device)
        lengths = lengths.repeat_interleave(n)  # (B,)
        limit = (self.context - lengths).clamp(min=0, max=max_tokens)  # (B,) tokens each row may have
        uniforms = Uniforms(seeds, n)
        stop = torch.tensor(sorted(self.stop_ids), device=device)
        rows = torch.arange(len(lengths), device=device)  # which row of the wave stands in which cache row
        done = limit == 0
        ids_of: list[list[int]] = [[] for _ in wave for _ in range(n)]
        logprobs_of: list[list[float]] = [[] for _ in wave for _ in range(n)]
        if bool(done.all()):
            return self._finish(prompts, wave, n, ids_of, logprobs_of)
        cache = KVCache()
        logits = self._prefill([prompts[i][: self.context] for i in wave], cache)
        cache.keep(torch.arange(len(wave), device=device).repeat_interleave(n))
        logits, pad = logits.repeat_interleave(n, 0), lengths.max() - lengths  # (B, V), (B,)
        for k in range(max_tokens):
            ids, logprobs = draw(logits, temperature, uniforms.at(k, rows))
            for row, ended, i, p in zip(rows.tolist(), done.tolist(), ids.tolist(), logprobs.tolist(),
                                        strict=True):  # fmt: skip
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
            logits = self._forward(ids[:, None], (lengths + k)[:, None], (slots >= pad[:, None])[:, None, None], cache)
        return self._finish(prompts, wave, n, ids_of, logprobs_of)

    def _prefill(self, prompts: list[list[int]], cache: KVCache) -> Tensor:
        """Each prompt once, left-padded to the longest -> logits of its next token (P, V)."""
        import torch

        device = next(self.lm.parameters()).device
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # (P, T)
        pad = torch.tensor([width - len(p) for p in prompts], device=device)[:, None]
        slots = torch.arange(width, device=device)
        causal = slots[None, :] <= slots[:, None]  # (T, T)
        seen = causal & (slots[None, None] >= pad[:, None]) | torch.eye(width, dtype=torch.bool, device=device)
        return self._forward(ids, (slots - pad).clamp(min=0), seen[:, None], cache)

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: KVCache) -> Tensor:
        """(B, T) ids and positions, (B, 1, T, slots) mask -> logits after the last token (B, V)."""
        out = self.lm.model(input_ids=ids, position_ids=positions, attention_mask=mask,
                            past_key_values=cache, use_cache=False)  # fmt: skip
        cache.used += ids.shape[1]
        return self.lm.lm_head(out.last_hidden_state[:, -1])

    def _finish(self, prompts: Sequence[list[int]], wave: list[int], n: int, ids_of: list[list[int]],
                logprobs_of: list[list[float]]) -> list[Rollout]:  # fmt: skip
        rollouts = []
        for row, (ids, logprobs) in enumerate(zip(ids_of, logprobs_of, strict=True)):
            stopped = bool(ids) and ids[-1] in self.stop_ids
            text = self.tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=False)
            rollouts.append(Rollout(prompts[wave[row // n]], ids, logprobs, text,
                                    "stop" if stopped else "length", wave[row // n]))  # fmt: skip
        return rollouts

    def chat(self, conversations: Sequence[Sequence[Message]], n: int, temperature: float, max_tokens: int,
             seeds: Sequence[int]) -> list[list[Reply]]:  # fmt: skip
        """n replies per conversation."""
        prompts = [encode_prompt(messages, self.tokenizer) for messages in conversations]
        made = self.generate(prompts, n, temperature, max_tokens, seeds)
        replies = [Reply(r.text, r.finish_reason, len(r.prompt_ids), len(r.response_ids)) for r in made]
        return [replies[i * n : (i + 1) * n] for i in range(len(prompts))]


def stop_ids(generation_config: Any, tokenizer: Any) -> set[int]:
    """End-of-turn ids: the tokenizer's and the generation config's, the same set in every sampler."""
    listed = generation_config.eos_token_id if generation_config is not None else None
    listed = listed if isinstance(listed, (list, tuple)) else [listed]
    return {i for i in (*listed, tokenizer.eos_token_id) if i is not None}


def load_sampler(path: str, dtype: str = "float32") -> TorchSampler:
    """A judge from a `from_pretrained` folder, a run folder or a hub id, on the GPU where there is one."""
    import torch

    from model import load_policy, load_tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = load_policy(path, getattr(torch, dtype)).to(device)
    return TorchSampler(policy.lm, load_tokenizer(path))


# ---- the one way a pair is judged ----------------------------------------------------------------------


@dataclass(frozen=True)
class Judgement:
    """One verdict. `verdict` and `winner` are letters as shown: order "BA" shows response_b as A."""

    pair_id: str
    source: str
    category: str
    meta: Mapping[str, str]
    order: Literal["AB", "BA"]
    sample: int
    verdict: Letter | None
    winner: Letter
    correct: bool
    finish_reason: Literal["stop", "length"]
    response_tokens: int
    text: str


def judge_pairs(sampler: Chat, pairs: Sequence[Pair], style: Style, *, n: int = 1, temperature: float = 0.0,
                max_tokens: int, seed: int = 0, both_orders: bool = False, rule: Rule = "eval",
                system: str | None = None, at_once: int = 256) -> Iterator[Judgement]:  # fmt: skip
    """Judge every pair n times (in both orders if asked), `at_once` verdicts a call; yields as they come.

    Used for held-out accuracy in training, evaluation, the judge and distillation. Seeds depend on
    (seed, pair, order) alone, so an interrupted evaluation continues with the same samples.
    """
    orders: tuple[Literal["AB", "BA"], ...] = ("AB", "BA") if both_orders else ("AB",)
    shown = [(pair if order == "AB" else swap(pair), order) for pair in pairs for order in orders]
    step = max(1, at_once // n)
    for start in range(0, len(shown), step):
        part = shown[start : start + step]
        conversations = [render(pair, style, system) for pair, _ in part]
        seeds = [derive_seed(seed, pair.source, pair.pair_id, order) for pair, order in part]
        for (pair, order), replies in zip(
            part, sampler.chat(conversations, n, temperature, max_tokens, seeds), strict=True
        ):
            for sample, reply in enumerate(replies):
                verdict = parse_verdict(reply.text, rule)
                yield Judgement(pair.pair_id, pair.source, pair.category, pair.meta, order, sample, verdict,
                                pair.winner, verdict == pair.winner, reply.finish_reason,
                                reply.response_tokens, reply.text)  # fmt: skip


def named(judgement: Judgement) -> Letter | None:
    """The response a verdict stands for, whichever letter it was shown under."""
    other: dict[Letter | None, Letter | None] = {"A": "B", "B": "A", None: None}
    return judgement.verdict if judgement.order == "AB" else other[judgement.verdict]


def majority(votes: Iterable[Letter | None]) -> Letter | None:
    """The response that most verdicts name; a tie is no verdict."""
    seen = list(votes)
    a, b = seen.count("A"), seen.count("B")
    return None if a == b else "A" if a > b else "B"


def tally(judgements: Iterable[Judgement]) -> dict[str, float]:
    """accuracy, verdict rate, share of A, mean length; with both orders also consistency.

    No verdict counts as wrong. A pair is consistent when the verdicts of both orders name one response;
    with several samples per order, sample k is held against sample k.
    """
    seen = list(judgements)
    verdicts = [j.verdict for j in seen]
    total = max(1, len(seen))
    result = {
        "accuracy": sum(j.correct for j in seen) / total,
        "verdict_rate": sum(v is not None for v in verdicts) / total,
        "share_a": verdicts.count("A") / max(1, total - verdicts.count(None)),
        "length_mean": sum(j.response_tokens for j in seen) / total,
        "count": len(seen),
    }
    shown: dict[tuple[str, str, int], dict[str, Letter | None]] = {}
    for j in seen:
        shown.setdefault((j.source, j.pair_id, j.sample), {})[j.order] = j.verdict
    both = [v for v in shown.values() if len(v) == 2]
    if both:
        result["consistency"] = sum({v["AB"], v["BA"]} == {"A", "B"} for v in both) / len(both)
    return result
