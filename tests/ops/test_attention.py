"""Who sees whom: the block mask against the dense one, and FlexAttention's forward against SDPA's, on the CPU.

FlexAttention has no backward on a CPU and is not compiled there: the compiled path needs a GPU and is not tested here.
"""

from __future__ import annotations

import random
import warnings

import pytest
import tiny_models
import torch
from tiny_models import make_folder, make_lm
from torch import Tensor

from batch import Group, collate
from model import load_policy
from ops.attention import BLOCK, block_mask, flex_attention, grouped_attention, visible

pytestmark = pytest.mark.numeric

SHAPES = [(0, True), (1, True), (2, True), (3, False), (4, False)]  # seed, all groups in one row
EVERY_SHAPE = pytest.mark.parametrize(("seed", "one_row"), SHAPES)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield


def made(seed: int, one_row: bool, longest: int = 90) -> tuple[Tensor, Tensor]:
    """(R, T) groups and responses of random groups, rows padded to whole tiles."""
    chance = random.Random(seed)
    groups = [Group([5] * chance.randint(1, longest),
                    [[6] * chance.randint(0, longest) + [2] for _ in range(chance.randint(1, 4))])
              for _ in range(chance.randint(2, 4))]
    batch = collate(groups, range(len(groups)), "cpu", one_row)
    short = -batch.group.shape[1] % BLOCK + BLOCK * (seed % 2)  # whole tiles, and a tile of nothing but padding
    pad = torch.nn.functional.pad
    return pad(batch.group, (0, short), value=-1), pad(batch.response, (0, short))


def dense(mask, rows: int, width: int) -> Tensor:
    """(R, 1, T, T): a block mask's rule asked about every pair."""
    row, index = torch.arange(rows)[:, None, None], torch.arange(width)
    return mask.mask_mod(row, torch.tensor(0), index[:, None], index[None, :])[:, None]


@EVERY_SHAPE
def test_T12_block_mask_and_dense_mask_are_one_rule(seed, one_row):
    group, response = made(seed, one_row)
    rows, width = group.shape
    assert width % BLOCK == 0 and (group == -1).any() and (rows == 1) == one_row
    wanted, mask = visible(group, response), block_mask(group, response)
    assert torch.equal(dense(mask, rows, width), wanted)
    assert wanted.diagonal(dim1=-2, dim2=-1).all(), "a token sees itself, padding too"
    assert not wanted.triu(1).any()
    real, other = group[:, None, :, None] != -1, group[:, None, None, :] != group[:, None, :, None]
    assert not (wanted & other).any() and (wanted & real).sum() < width * width * rows / 2


def test_T12_tiles_that_are_skipped_hold_nothing_and_full_ones_everything():
    skipped = filled = 0
    for seed, one_row in SHAPES:
        group, response = made(seed, one_row, longest=300)
        rows, width = group.shape
        mask, tiles = block_mask(group, response), width // BLOCK
        assert mask.BLOCK_SIZE == (BLOCK, BLOCK) and mask.shape == (rows, 1, width, width)
        wanted = visible(group, response).unflatten(3, (tiles, BLOCK)).unflatten(2, (tiles, BLOCK)).movedim(3, 4)
        some, every = wanted.flatten(-2).any(-1), wanted.flatten(-2).all(-1)  # (R, 1, tiles, tiles)
        kept, full = torch.zeros_like(some), torch.zeros_like(some)
        for r in range(rows):
            for q in range(tiles):
                partly = mask.kv_indices[r, 0, q, : mask.kv_num_blocks[r, 0, q]].tolist()
                wholly = mask.full_kv_indices[r, 0, q, : mask.full_kv_num_blocks[r, 0, q]].tolist()
                assert not set(partly) & set(wholly)
                kept[r, 0, q, partly + wholly] = True
                full[r, 0, q, wholly] = True
        assert torch.equal(kept, some) and torch.equal(full, every)
        skipped += int((~some & torch.ones(tiles, tiles).tril().bool()).sum())
        filled += int(every.sum())
    assert skipped > 10 and filled > 10, "tiles that causality alone would not skip, and full ones"


@pytest.mark.parametrize("heads", [(4, 4), (28, 4), (40, 8)], ids=["ratio 1", "ratio 7", "ratio 5"])
@pytest.mark.parametrize("scaling", [None, 0.2])
def test_flex_forward_equals_grouped_forward_for_the_heads_of_qwen(heads, scaling):
    """28 on 4 and 40 on 8 are Qwen2.5's own; keys and values keep their few heads."""
    group, response = made(1, True, longest=60)
    rows, width = group.shape
    chance = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(rows, n, width, 16, generator=chance) for n in (heads[0], heads[1], heads[1]))
    module = torch.nn.Module()
    with torch.no_grad():
        found, _ = flex_attention(module, query, key, value, block_mask(group, response), scaling)
        wanted, _ = grouped_attention(module, query, key, value, visible(group, response), scaling)
    assert found.shape == (rows, width, heads[0], 16)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    by_hand = torch.nn.functional.scaled_dot_product_attention(
        query, *(x.repeat_interleave(heads[0] // heads[1], 1) for x in (key, value)),
        attn_mask=visible(group, response), scale=scaling)
    torch.testing.assert_close(found, by_hand.transpose(1, 2), rtol=0, atol=1e-5)


GROUPS = [
    Group([1, 7, 8, 9, 10, 11], [[12, 13, 2], [20, 21, 22, 23, 24, 2], [30, 2]]),
    Group([1, 33], [[2], [14 + i % 20 for i in range(100)] + [2]]),
    Group([5, 6, 7, 8, 9, 9, 9, 9], [[40, 41, 42], []]),
    Group([3 + i % 30 for i in range(50)], [[31, 32, 2]]),
]


@pytest.mark.parametrize("arch", tiny_models.ARCHITECTURES)
def test_T12_policy_with_flex_attention_equals_policy_with_grouped_attention(tmp_path, arch):
    """The whole forward, log-probs and entropies; a row of two tiles holds all groups."""
    policy = load_policy(make_folder(tmp_path, make_lm(arch)))
    batch = collate(GROUPS, range(4), "cpu", one_row=True)
    assert batch.inputs.shape == (1, 2 * BLOCK) and policy.lm.config._attn_implementation == "grouped"
    with torch.no_grad():
        wanted = policy(batch, temperature=0.7, entropy=True)
        policy.lm.config._attn_implementation = "flex"
        calls: list[int] = []
        policy.lm.model.layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))
        for train in (False, True):
            found = policy.train(train)(batch, temperature=0.7, entropy=True)
            for mine, theirs in zip(found, wanted, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert calls == [1, 1] and wanted[0].std() > 0.5


def test_the_block_mask_is_made_once_for_all_layers(tmp_path, monkeypatch):
    import model

    policy = load_policy(make_folder(tmp_path, make_lm("llama", num_hidden_layers=3)))
    policy.lm.config._attn_implementation = "flex"
    masks: list[object] = []
    monkeypatch.setattr(model, "block_mask", lambda *args: masks.append(block_mask(*args)) or masks[-1])
    seen: list[object] = []

    def watch(module, args, kwargs):
        seen.append(kwargs["attention_mask"])

    for layer in policy.lm.model.layers:
        layer.self_attn.register_forward_pre_hook(watch, with_kwargs=True)
    with torch.no_grad():
        policy(collate(GROUPS, range(4), "cpu", one_row=True))
    assert len(masks) == 1 and len(seen) == 3 and all(mask is masks[0] for mask in seen)


@pytest.mark.parametrize("kind", ["grouped", "flex"])
def test_P1_attention_without_its_mask_raises(kind):
    """Without a mask nothing would be causal; FlexAttention takes a block mask alone."""
    function = {"grouped": grouped_attention, "flex": flex_attention}[kind]
    query = torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match="without a"):
        function(torch.nn.Module(), query, query, query, None)
    if kind == "flex":
        with pytest.raises(ValueError, match="without a block mask"):
            function(torch.nn.Module(), query, query, query, torch.ones(1, 1, 5, 5, dtype=torch.bool))
