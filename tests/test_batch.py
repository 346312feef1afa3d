"""Packed rows: the worked example, who sees whom, budgets, and a loss that no micro-batch plan can change."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tiny_models import EOS, gradients, make_lm, plain_logprobs
from torch import Tensor

import batch as batch_module
from batch import Batch, Group, aggregate, collate, group_tokens, loss_divisor, micro_batches, plan, split
from model import Policy
from ops.attention import visible

pytestmark = pytest.mark.numeric

repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=60)

AGGS = ("seq", "token", "const")


@st.composite
def group_lists(draw, max_groups: int = 4, filled: bool = False) -> list[Group]:
    """Groups whose advantages and log-probs tell every response and token apart; empty responses too."""
    groups, mark = [], 0.0
    for _ in range(draw(st.integers(1, max_groups))):
        prompt = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
        response = st.lists(st.integers(0, 9), min_size=int(filled), max_size=6)
        responses = draw(st.lists(response, min_size=1, max_size=5))
        advantages, logprobs = [], []
        for response in responses:
            advantages.append(mark)
            logprobs.append([mark + 0.125 * t for t in range(len(response))])
            mark += 1.0
        groups.append(Group(prompt, responses, advantages, logprobs))
    return groups


def sequences(groups: list[Group]) -> list[tuple]:
    """What must survive cutting: prompt, response, advantage and log-probs of each response with tokens, in order."""
    return [
        (g.prompt_ids, r, g.advantages[k], g.sampler_logprobs[k])
        for g in groups
        for k, r in enumerate(g.responses)
        if r
    ]


# ---- packing -------------------------------------------------------------------------------------------


def test_worked_example_of_the_header():
    a, b, c = [10, 11, 99], [20, 21, 22, 99], [30, 99]
    group = Group([1, 2, 3, 4], [a, b, c], [0.5, -0.5, 2.0], [[-1.0, -2.0, -3.0], [-4.0] * 4, [-5.0, -6.0]])
    batch = collate([group], [0], "cpu")
    assert batch.inputs.tolist() == [[1, 2, 3, 4, 10, 11, 20, 21, 22, 30]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 4, 5, 6, 4]]
    assert batch.response.tolist() == [[0, 0, 0, 0, 1, 1, 2, 2, 2, 3]]
    assert batch.group.tolist() == [[0] * 10]
    assert batch.targets.tolist() == [10, 11, 99, 20, 21, 22, 99, 30, 99]
    assert batch.source.tolist() == [3, 4, 5, 3, 6, 7, 8, 3, 9]
    assert batch.sequence.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert batch.advantages.tolist() == [0.5] * 3 + [-0.5] * 4 + [2.0] * 2
    assert batch.sampler_logprobs.tolist() == [-1, -2, -3, -4, -4, -4, -4, -5, -6]
    assert batch.weight == 1.0 and batch.old_logprobs is None and batch.ref_logprobs is None
    rows = visible(batch.group, batch.response)[0, 0].long().tolist()
    assert rows[3] == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]  # the prompt's last token
    assert rows[5] == [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]  # a1
    assert rows[8] == [1, 1, 1, 1, 0, 0, 1, 1, 1, 0]  # b2
    assert rows[9] == [1, 1, 1, 1, 0, 0, 0, 0, 0, 1]  # c0


def test_collate_builds_on_the_device_it_is_given_and_in_float32_whatever_the_default_is():
    torch.set_default_dtype(torch.float64)
    try:
        batch = collate([Group([1], [[5, 6]], [1.0], [[-1.0, -2.0]])], [0], "meta")
    finally:
        torch.set_default_dtype(torch.float32)
    tensors = {f.name: value for f in fields(batch) if isinstance(value := getattr(batch, f.name), Tensor)}
    assert len(tensors) == 9 and all(t.device.type == "meta" for t in tensors.values())
    assert collate([], [], "meta").inputs.device.type == "meta"
    real = {"advantages", "sampler_logprobs"}
    assert all(t.dtype == (torch.float32 if name in real else torch.int64) for name, t in tensors.items())
    assert all(getattr(collate([Group([1], [[5, 6]])], [0], "cpu"), name) is None for name in real)


@repeatable
@given(st.data())
def test_T12_visible_by_brute_force(data):
    rows, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    cells = st.lists(st.integers(-1, 2), min_size=rows * width, max_size=rows * width)
    group = torch.tensor(data.draw(cells)).view(rows, width)
    response = torch.tensor(data.draw(cells)).abs().view(rows, width)
    seen = visible(group, response)
    assert seen.shape == (rows, 1, width, width) and seen.dtype == torch.bool
    for r in range(rows):
        for i in range(width):
            for j in range(width):
                same = group[r, i] == group[r, j]
                open_to_i = response[r, j] == 0 or response[r, j] == response[r, i]
                assert bool(seen[r, 0, i, j]) == bool(j <= i and same and open_to_i)
            assert seen[r, 0, i].any()


@repeatable
@given(group_lists(), st.booleans())
def test_T12_each_target_sees_exactly_its_own_prefix(groups, one_row):
    """Whatever the row holds besides: what a source token sees, in order, is prompt + response so far."""
    batch = collate(groups, list(range(len(groups))), "cpu", one_row)
    assert batch.inputs.shape[0] == (1 if one_row else len(groups))
    seen, width = visible(batch.group, batch.response)[:, 0], batch.inputs.shape[1]
    wanted = [(g, k, t) for g in groups for k, r in enumerate(g.responses) for t in range(len(r))]
    assert len(wanted) == len(batch.targets) == len(batch.source) == len(batch.sequence)
    for n, (group, k, t) in enumerate(wanted):
        row, column = divmod(int(batch.source[n]), width)
        mask = seen[row, column]
        assert batch.inputs[row][mask].tolist() == group.prompt_ids + group.responses[k][:t]
        assert batch.position_ids[row][mask].tolist() == list(range(len(group.prompt_ids) + t))
        assert batch.targets[n] == group.responses[k][t]
        assert batch.advantages[n] == group.advantages[k]
        assert batch.sampler_logprobs[n] == group.sampler_logprobs[k][t]
    owners = [id(g.responses[k]) for g, k, _ in wanted]
    numbers = batch.sequence.tolist()
    assert all((owners[i] == owners[j]) == (numbers[i] == numbers[j]) for i in range(len(owners)) for j in range(i))


def test_padding_is_a_group_of_its_own():
    groups = [Group([1, 2, 3], [[4, 5, 6]]), Group([7], [[8, 9]])]
    batch = collate(groups, [0, 1], "cpu")
    assert batch.inputs.shape == (2, 5)
    assert batch.group.tolist() == [[0] * 5, [1, 1, -1, -1, -1]]
    assert batch.sequence.tolist() == [0, 0, 0, 1, 1], "responses are counted on from group to group"
    seen = visible(batch.group, batch.response)[1, 0]
    assert not seen[2:, :2].any() and not seen[:2, 2:].any()
    assert seen.any(-1).all()  # an empty row of a mask is NaN in some attention kernels
    row = collate(groups, [0, 1], "cpu", one_row=True)
    assert row.inputs.tolist() == [[1, 2, 3, 4, 5, 7, 8] + [0] * 249], "one row is whole tiles of 128, two at least"
    assert row.group.tolist() == [[0] * 5 + [1] * 2 + [-1] * 249]
    assert row.source.tolist() == [2, 3, 4, 5, 6] and row.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1] + [0] * 249]


# ---- which groups go together --------------------------------------------------------------------------


@repeatable
@given(group_lists(), st.integers(1, 30))
def test_T5_split_keeps_every_response_in_order_and_within_budget(groups, max_tokens):
    pieces = split(groups, max_tokens)
    assert sequences(pieces) == sequences(groups)
    for piece in pieces:
        assert len(piece.advantages) == len(piece.sampler_logprobs) == len(piece.responses)
        assert group_tokens(piece) <= max_tokens or len(piece.responses) == 1
        assert any(piece.responses), "a micro-batch without targets is a wasted pass"
    for left, right in pairwise(pieces):  # no cut without need
        if left.prompt_ids is right.prompt_ids:
            assert group_tokens(left) + max(len(right.responses[0]) - 1, 0) > max_tokens
    assert all(any(p is g.prompt_ids for g in groups) for p in (piece.prompt_ids for piece in pieces))


def test_split_by_hand():
    group = Group([1, 2, 3], [[1] * 4, [2] * 3, [3] * 20, [4], []], [0.0, 1.0, 2.0, 3.0, 4.0])
    pieces = split([group], 8)  # 3 + 3 + 2 = 8; 3 + 19 alone; 3 + 0 + 0
    assert [p.responses for p in pieces] == [[[1] * 4, [2] * 3], [[3] * 20], [[4], []]]
    assert [p.advantages for p in pieces] == [[0.0, 1.0], [2.0], [3.0, 4.0]]
    assert [p.sampler_logprobs for p in pieces] == [None] * 3
    assert [len(p.responses) for p in split([group], 7)] == [1, 1, 1, 2]
    assert len(split([group], 10**6)) == 1
    assert len(group.responses) == 5  # the original is as it was


@repeatable
@given(group_lists(max_groups=8, filled=True), st.integers(1, 40), st.integers(0, 5), st.booleans())
def test_plan_places_every_group_once_within_the_budget(groups, max_tokens, count, one_row):
    sizes = [group_tokens(g) for g in groups]
    batches = plan(groups, max_tokens, count, one_row)
    assert sorted(i for indices in batches for i in indices) == list(range(len(groups)))
    assert len(batches) >= count
    full = [indices for indices in batches if indices]
    assert batches[: len(full)] == full, "filler batches come last"
    assert len(batches) == max(len(full), count)
    for indices in full:
        lengths = [sizes[i] for i in indices]
        cost = sum(lengths) if one_row else len(lengths) * max(lengths)
        assert cost <= max_tokens or len(indices) == 1
        shape = collate(groups, indices, "cpu", one_row).inputs.shape
        paid = max(256, -(-cost // 128) * 128) if one_row else cost
        assert shape.numel() == paid, "the cost is what the forward really pays"
    order = [sizes[i] for indices in full for i in indices]
    assert order == sorted(order, reverse=True)  # rows of like length stand together


def test_plan_by_hand():
    groups = [Group([0] * n, [[1]]) for n in (2, 5, 3, 3)]
    assert plan(groups, 11) == [[1, 2], [3, 0]]  # 2 x 5, 2 x 3; one row would hold 5 + 3 + 3
    assert plan(groups, 13, one_row=True) == [[1, 2, 3, 0]]
    assert plan(groups, 12, one_row=True) == [[1, 2, 3], [0]]
    assert plan(groups, 1) == [[1], [2], [3], [0]]
    assert plan(groups, 10, count=4) == [[1, 2], [3, 0], [], []]
    assert plan([], 10) == [[]] and plan([], 10, count=3) == [[], [], []]


def test_T13_every_rank_makes_as_many_passes_as_the_one_that_needs_most(monkeypatch):
    monkeypatch.setattr(batch_module, "gather", lambda value: [value, 5, 0])
    made = list(micro_batches([Group([1, 2], [[3, 4]], [1.0], [[-1.0, -1.0]])], 100, "cpu"))
    assert [b.weight for b in made] == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert len(list(micro_batches([], 100, "cpu"))) == 5
    monkeypatch.setattr(batch_module, "gather", lambda value: [value])
    assert [b.weight for b in micro_batches([], 100, "cpu")] == [0.0]


def test_one_row_reaches_plan_and_collate():
    groups = [Group([1] * n, [[2, 3]]) for n in (1, 2, 6)]
    rows = [b.inputs.shape for b in micro_batches(groups, 12, "cpu", one_row=True)]
    assert rows == [(1, 256)]
    assert [b.inputs.shape for b in micro_batches(groups, 12, "cpu")] == [(1, 7), (2, 3)]


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1"])
def test_one_row_is_the_default_on_a_gpu_alone(device, monkeypatch):
    """FlexAttention skips what is not visible; SDPA pays for it. Batches are made on the device that was named."""
    monkeypatch.setattr(batch_module, "collate", lambda groups, indices, device, one_row: (device, one_row))
    assert list(micro_batches([Group([1], [[2]])], 10, device)) == [(device, device != "cpu")]
    assert list(micro_batches([Group([1], [[2]])], 10, device, one_row=False)) == [(device, False)]


# ---- per-token values -> one number --------------------------------------------------------------------


def test_aggregate_and_denominator_by_hand():  # Eq. 9
    groups = [Group([1], [[5, 6], [], [7]]), Group([2, 2], [[8, 9, 8, 9], []])]
    values = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0, 0.0, 8.0])
    batch = collate(groups, [0, 1], "cpu")
    assert [loss_divisor(groups, agg, 10) for agg in AGGS] == [5, 7, 50]
    # seq: (1.5 + 0 + 6 + 4 + 0) / 5, token: 25 / 7, const: 25 / (5 x 10)
    for agg, expected in zip(AGGS, (11.5 / 5, 25 / 7, 0.5), strict=True):
        got = aggregate(values, batch, agg, loss_divisor(groups, agg, 10))
        assert got.shape == () and math.isclose(got.item(), expected, rel_tol=1e-6), agg
    halves = [collate(groups, [i], "cpu") for i in (0, 1)]
    for agg in AGGS:  # micro-batches add up
        parts = [aggregate(v, b, agg, loss_divisor(groups, agg, 10)) for v, b in zip((values[:3], values[3:]), halves,
                                                                                   strict=True)]
        torch.testing.assert_close(sum(parts), aggregate(values, batch, agg, loss_divisor(groups, agg, 10)))


def test_empty_group_is_left_out_of_the_batch_and_counted_in_the_loss_divisor():
    groups = [Group([1], [[5, 6]]), Group([2], [[], []])]
    assert split(groups, 100) == groups[:1]
    assert [loss_divisor(groups, agg, 8) for agg in AGGS] == [3, 2, 24]


@pytest.mark.parametrize("agg", AGGS)
def test_a_filler_batch_counts_for_nothing(agg):
    batch = collate([], [], "cpu")
    assert batch.weight == 0.0 and batch.inputs.numel() == 1 and len(batch.targets) == 1
    assert batch.advantages is not None and batch.sampler_logprobs is not None  # a loss may read them
    assert collate([], [], "cpu", one_row=True).inputs.shape == (1, 256), "two whole tiles at least"
    assert collate([Group([1] * 300, [[2]])], [0], "cpu", one_row=True).inputs.shape == (1, 384)
    values = torch.tensor([123.0], requires_grad=True)
    loss = aggregate(values, batch, agg, 4)
    loss.backward()
    assert loss.item() == 0.0 and values.grad.item() == 0.0


# ---- T3: whose mean ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def double_policy() -> Policy:
    return Policy(make_lm("llama", tied=True, dtype=torch.float64))


GROUPS = [
    Group([1, 7, 8, 9], [[10, 11, EOS], [20, 21, 22, 23, EOS], [30, EOS], []], [1.0, -0.5, 0.25, 3.0]),
    Group([1, 12], [[EOS], [13, 14, 15, 16, 17, 18, EOS]], [-2.0, 0.75]),
    Group([1, 5, 5, 5, 5, 5], [[], []], [1.0, 1.0]),
]


def gradient(policy: Policy, batches: list[Batch], agg: str, total: float) -> dict[str, Tensor]:
    policy.zero_grad()
    for batch in batches:
        logprobs = policy(batch).logprobs
        per_token = batch.advantages.double() * logprobs + 0.1 * logprobs**2  # not linear, as a real loss
        aggregate(per_token, batch, agg, total).backward()
    return gradients(policy)


# ---- T1, T4, T5 ----------------------------------------------------------------------------------------


def test_T1_forward_and_loss_change_no_input(double_policy):
    batch = collate(GROUPS, [0, 1], "cpu")
    before = {f.name: v.clone() for f in fields(batch) if isinstance(v := getattr(batch, f.name), Tensor)}
    groups_before = repr(GROUPS)
    logprobs, entropy = double_policy(batch, temperature=0.7, entropy=True)
    kept = logprobs.detach().clone()
    for agg in AGGS:
        aggregate(logprobs, batch, agg, 3).backward(retain_graph=True)
    assert torch.equal(kept, logprobs)
    for name, value in before.items():
        assert torch.equal(getattr(batch, name), value), name
    values = torch.arange(len(batch.targets), dtype=torch.float32)
    aggregate(values, batch, "seq", 3)
    assert values.tolist() == list(range(len(values)))
    again, entropy_again = double_policy(batch, temperature=0.7, entropy=True)
    assert torch.equal(again, kept) and torch.equal(entropy, entropy_again)
    split(GROUPS, 5), plan(GROUPS, 5)
    assert repr(GROUPS) == groups_before


def test_T4_P15_sampled_eos_is_trained_and_eos_inside_the_prompt_is_seen(double_policy):
    """Padding is filled with id 0 here and with EOS there: no mask may come from ids."""
    prompt, response = [1, EOS, 7, 0, EOS, EOS], [EOS, 0, 8, EOS]
    groups = [Group(prompt, [response]), Group([5, 6], [[7, EOS]])]
    batch = collate(groups, [0, 1], "cpu")
    assert batch.targets.tolist() == [*response, 7, EOS], "every sampled token is a target, EOS and id 0 too"
    found = double_policy(batch).logprobs
    wanted = [plain_logprobs(double_policy.lm, g.prompt_ids, g.responses[0]) for g in groups]
    torch.testing.assert_close(found, torch.cat(wanted), rtol=0, atol=1e-10)
    for pad in (EOS, 40):  # what padding holds is of no account
        other = replace(batch, inputs=torch.where(batch.group < 0, pad, batch.inputs))
        torch.testing.assert_close(double_policy(other).logprobs, found, rtol=0, atol=1e-12)
    changed = collate([Group([1, 9, 7, 0, EOS, EOS], [response])], [0], "cpu")
    scored = double_policy(changed).logprobs
    assert (scored - found[:4]).abs().min() > 1e-6, "an EOS in the prompt is context like any token"


@pytest.mark.parametrize("agg", AGGS)
def test_T5_empty_responses_and_groups_of_one_give_no_nan(double_policy, agg):
    groups = [Group([1, 2], [[], [4, 5], []], [0.0, 1.0, 0.0]), Group([3], [[EOS]], [2.0]), Group([3], [[]], [1.0])]
    batches = list(micro_batches(groups, 3, "cpu"))
    assert sum(len(b.targets) for b in batches if b.weight) == 3
    found = gradient(double_policy, batches, agg, loss_divisor(groups, agg, 16))
    assert all(g.isfinite().all() for g in found.values())
