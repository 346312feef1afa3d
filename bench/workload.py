"""What is measured: random models as folders, named length distributions, the same ids for every side.

Random weights and random ids cost what trained ones cost, as long as the lengths are right; nothing here
depends on a download.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from batch import Group
from rollout import Rollout

PAD, EOS = 0, 1


@dataclass(frozen=True)
class Shape:
    """A Qwen2 model; `tied` as in the small Qwen2.5 models. `rows`: sequences in this side's GRPO micro-batch, where a
    group is about that much, its prompt being there once; a large head pays for more."""

    vocabulary: int
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 688
    tied: bool = False
    rows: int = 4


SHAPES = {
    "2k": Shape(2048),
    "32k": Shape(32768, rows=7),
    "24m": Shape(16384, hidden=384, layers=8, heads=6, intermediate=1536, tied=True),
    "78m": Shape(24576, hidden=640, layers=12, heads=10, intermediate=2176, tied=True),
    "smoke": Shape(64, hidden=32, layers=2, intermediate=48),
}


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and responses: log-normal around a median, cut at both ends (spread 0: all equal)."""

    prompt: int
    response: int
    spread: float
    shortest: float = 0.4  # of the median
    longest: float = 3.0

    def draw(self, median: int, count: int, rng: random.Random) -> list[int]:
        """`count` lengths: the distribution's quantiles in random order, so that few of them stand for many."""
        places = [NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]
        rng.shuffle(places)
        return [max(2, round(median * min(max(math.exp(self.spread * z), self.shortest), self.longest)))
                for z in places]


LENGTHS = {
    "ragged": Lengths(120, 90, 0.5),
    "equal": Lengths(135, 102, 0.0),
    "rm-r1": Lengths(850, 700, 0.2, shortest=0.7, longest=1.4),  # prompts 600 to 1,200, responses 490 to 980
    "half": Lengths(450, 300, 0.2, shortest=0.7, longest=1.4),
    "smoke": Lengths(8, 6, 0.3),
}


def make_groups(shape: Shape, lengths: Lengths, prompts: int, group_size: int, seed: int = 0) -> list[Group]:
    """`prompts` groups of random ids. Ids under 1/64 of the vocabulary are kept back for padding and stops."""
    rng, first = random.Random(seed), stop_count(shape)

    def ids(length: int) -> list[int]:
        return [rng.randrange(first, shape.vocabulary) for _ in range(length)]

    asked = lengths.draw(lengths.prompt, prompts, rng)
    said = iter(lengths.draw(lengths.response, prompts * group_size, rng))
    return [Group(ids(length), [ids(next(said)) for _ in range(group_size)]) for length in asked]


def stop_count(shape: Shape) -> int:
    """A random model ends a response with probability 1/64 per token if this many ids are stops."""
    return max(3, shape.vocabulary // 64)


def tokens(groups: Sequence[Group]) -> int:
    """Real tokens as a trainer that shares nothing sees them: every response with its prompt."""
    return sum(len(g.prompt_ids) + len(r) for g in groups for r in g.responses)


def reward(ids: Sequence[int]) -> float:
    """A verdict's stand-in, which both sides can compute from ids alone."""
    return 1.0 if sum(ids) % 2 else -1.0


def as_rollouts(groups: Sequence[Group]) -> list[Rollout]:
    return [Rollout(g.prompt_ids, r, [0.0] * len(r), "", "length", i)
            for i, g in enumerate(groups) for r in g.responses]


def forward_flops(shape: Shape, group: Group) -> int:
    """One forward pass over a group with its prompt shared; a backward pass is twice that.

    >>> one = Shape(vocabulary=10, hidden=4, layers=1, heads=2, kv_heads=1, intermediate=3)
    >>> forward_flops(one, Group([1, 2], [[3, 4]]))     # 3 tokens, 6 visible pairs, 2 targets
    760
    """
    head_dim = shape.hidden // shape.heads
    attention = shape.hidden * head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    layer = 2 * (attention + 3 * shape.hidden * shape.intermediate)
    prompt, rest = len(group.prompt_ids), [max(len(r) - 1, 0) for r in group.responses]
    pairs = prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in rest)
    body = shape.layers * (layer * (prompt + sum(rest)) + 4 * shape.heads * head_dim * pairs)
    return body + 2 * shape.hidden * shape.vocabulary * sum(map(len, group.responses))


def make_folder(shape: Shape, path: Path, stops: bool = False, seed: int = 0) -> str:
    """A `from_pretrained` folder with a word-level tokenizer. With `stops` many ids end a response, so that
    lengths are ragged (geometric, mean 64) as a trained model's are; without, all run to the limit."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    config = AutoConfig.for_model(
        "qwen2", vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, intermediate_size=shape.intermediate,
        max_position_embeddings=8192, tie_word_embeddings=shape.tied, bos_token_id=None, eos_token_id=EOS,
        pad_token_id=PAD,
    )
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lm.generation_config.eos_token_id = list(range(1, stop_count(shape))) if stops else [EOS]
    lm.save_pretrained(path)
    make_tokenizer(shape.vocabulary).save_pretrained(path)
    return str(path)


def make_tokenizer(vocabulary: int) -> Any:
    """Token i is the word `i`, so that ids survive a trainer that wants text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({str(i): i for i in range(vocabulary)}, unk_token=str(PAD)))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=str(PAD), eos_token=str(EOS))


def words(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))
