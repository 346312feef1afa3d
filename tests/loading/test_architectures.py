"""The proof that a family belongs in `loading.folder.TESTED`: two layers of random weights, the product's ways of
computing log-probs and gradients (packed rows, a KV cache) against plain forwards by transformers.

To add a family, add its `model_type` to TESTED and run this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import gradients, make_folder, make_lm, make_tokenizer, plain_logprobs

from batch import Group, collate
from loading.folder import TESTED
from model import load_policy, save_hf
from rollout import TorchSampler

pytestmark = pytest.mark.numeric

# What a family's config can switch on and the default of a miniature leaves off.
SETTINGS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.7,
                "attention_multiplier": 0.4},
    "smollm3": {"no_rope_layers": [1, 0]},
}
GROUPS = [
    Group([3, 4, 5, 6], [[7, 8, 9], [10, 11], [12]]),
    Group([20, 21], [[22, 23, 24, 25], [26]]),
    Group([5, 6, 7, 8, 9, 9, 9, 9], [[40, 41, 42]]),
]
EVERY_FAMILY = pytest.mark.parametrize("family", TESTED)
EVERY_HEAD = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def miniature(family: str, tied: bool) -> Any:
    return make_lm(family, tied, **SETTINGS.get(family, {}))


def twin(lm: Any, temperature: float = 1.0) -> torch.Tensor:
    return torch.cat([plain_logprobs(lm, g.prompt_ids, r, temperature) for g in GROUPS for r in g.responses])


def weighed(logprobs: torch.Tensor) -> torch.Tensor:
    return (logprobs * torch.linspace(-1.0, 2.0, len(logprobs))).mean()


@EVERY_FAMILY
@EVERY_HEAD
@pytest.mark.parametrize("one_row", [False, True], ids=["rows", "one row"])
def test_packed_log_probs_and_gradients_equal_plain_forwards(tmp_path: Path, family, tied, one_row):
    lm = miniature(family, tied)
    wanted = twin(lm, temperature=0.7)
    weighed(wanted).backward()
    assert wanted.std() > 0.3
    policy = load_policy(make_folder(tmp_path, lm))
    found = policy(collate(GROUPS, [0, 1, 2], "cpu", one_row=one_row), temperature=0.7).logprobs
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    weighed(found).backward()
    for name, gradient in gradients(lm).items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(gradients(policy.lm)[name], gradient, rtol=0, atol=2e-5 * scale, msg=name)


@EVERY_FAMILY
def test_sampled_log_probs_equal_plain_forwards(tmp_path: Path, family):
    lm = miniature(family, tied=True)
    sampler = TorchSampler(load_policy(make_folder(tmp_path, lm)).lm, make_tokenizer())
    for rollout in sampler.generate([[3, 4, 5, 6], [20, 21]], 3, 0.8, 6, [1, 2]):
        wanted = plain_logprobs(lm, rollout.prompt_ids, rollout.response_ids, 0.8)
        torch.testing.assert_close(torch.tensor(rollout.sampler_logprobs), wanted, rtol=0, atol=2e-5)


@EVERY_FAMILY
@EVERY_HEAD
def test_what_is_loaded_and_exported_is_what_from_pretrained_loads(tmp_path: Path, family, tied):
    from transformers import AutoModelForCausalLM

    folder = make_folder(tmp_path / "start", miniature(family, tied))
    wanted = AutoModelForCausalLM.from_pretrained(folder)
    policy = load_policy(folder)
    save_hf(policy, make_tokenizer(), tmp_path / "model")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    buffers = dict(policy.lm.named_buffers())  # no file holds them: rotary frequencies, an embedding's scale
    assert all(torch.equal(value, buffers[name]) for name, value in wanted.named_buffers())
    with torch.no_grad():
        ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
        assert torch.equal(exported(ids).logits, wanted(ids).logits)
