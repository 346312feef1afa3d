"""DAPO's sampling, Dr. GRPO's settings and StableReinforce's loss and filter, by hand and as `grpo.train` gets them."""

from __future__ import annotations

import math
import runpy
import sys
from dataclasses import replace

import pytest
import torch

import grpo
from batch import Group, collate
from runtime import cli, ranks
from variants import dapo, dr_grpo
from variants.dapo import differ
from variants.stable_reinforce import filtered_advantages, stable_loss

pytestmark = pytest.mark.numeric

TINY = grpo.PRESETS["tiny"]


def changed(method: grpo.Method | None = None) -> dict:
    """The functions in which a method differs from RM-R1's."""
    usual = grpo.Method()
    return {name: own for name, own in vars(method or usual).items() if own is not getattr(usual, name)}


def given_to_train(monkeypatch, name: str, *words: str) -> dict:
    """What `python -m variants.NAME` hands to `grpo.train`."""
    given: dict = {}
    monkeypatch.setattr(grpo, "train", lambda cfg, *method: given.update(changed(*method), cfg=cfg))
    monkeypatch.setattr(sys, "argv", [name, "--preset", "tiny", *words])
    monkeypatch.delitem(sys.modules, f"variants.{name}", raising=False)
    runpy.run_module(f"variants.{name}", run_name="__main__")
    return given


# ---- DAPO ----------------------------------------------------------------------------------------------


def test_groups_of_equal_rewards_are_replaced():
    rewards = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 1.0], [-1.0, -1.0, -1.0], [-1.0, -1.0, 1.0], [0.3, 0.3, 0.4]])
    assert differ(rewards).tolist() == [False, True, False, True, True]


def test_dapo_is_four_settings_and_a_filter(monkeypatch):
    for name, cfg in dapo.PRESETS.items():
        own = {
            "clip_low": 0.2,
            "clip_high": 0.28,
            "agg": "token",
            "kl_coef": 0.0,
            "out": grpo.PRESETS[name].out + "-dapo",
        }
        assert vars(cfg) == vars(grpo.PRESETS[name]) | own
    given = given_to_train(monkeypatch, "dapo", "--clip-high", "0.3")
    assert given.pop("cfg") == replace(dapo.PRESETS["tiny"], clip_high=0.3)
    assert given.keys() == {"keep"} and given["keep"](torch.tensor([[1.0, 0.0], [1.0, 1.0]])).tolist() == [True, False]


# ---- Dr. GRPO ------------------------------------------------------------------------------------------


def test_dr_grpo_is_two_settings(monkeypatch):
    for name, cfg in dr_grpo.PRESETS.items():
        own = {"agg": "const", "scale_by_std": False, "out": grpo.PRESETS[name].out + "-dr-grpo"}
        assert vars(cfg) == vars(grpo.PRESETS[name]) | own
    given = given_to_train(monkeypatch, "dr_grpo")
    assert given == {"cfg": dr_grpo.PRESETS["tiny"]}
    flags = ["--preset", "tiny", "--agg", "const", "--no-scale-by-std", "--out", given["cfg"].out]
    assert cli.parse(grpo.Config, grpo.PRESETS, flags) == given["cfg"]


# ---- StableReinforce: the advantage filter -------------------------------------------------------------


def test_beyond_three_deviations_of_the_round_nothing_is_learnt():
    """11 of 12 right: mean 5/6, std .5528, so +.3015 and -3.317, which is left out. 9 of 10: exactly -3."""
    got = filtered_advantages(torch.tensor([[1.0] * 6, [1.0] * 5 + [-1.0]]))
    assert got.flatten().tolist() == pytest.approx([0.30151] * 11 + [0.0], abs=1e-4)
    got = filtered_advantages(torch.tensor([[1.0] * 4, [1.0, 1.0, 1.0, -1.0]]))
    assert got.flatten().tolist() == pytest.approx([0.37796] * 7 + [-2.64575], abs=1e-4)


def test_mean_and_deviation_are_the_rounds_not_the_groups():
    got = filtered_advantages(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
    assert got.tolist() == [[1.0, 1.0], [-1.0, -1.0]]  # within its group neither differs


def test_without_std_the_filter_still_counts_in_deviations():
    got = filtered_advantages(torch.tensor([[1.0] * 11 + [-1.0]]), scale_by_std=False)
    assert got[0].tolist() == pytest.approx([1 / 6] * 11 + [0.0], abs=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_T5_a_round_of_equal_rewards_has_no_advantage(value):
    assert torch.equal(filtered_advantages(torch.full((2, 3), value)), torch.zeros(2, 3))


def test_the_round_is_that_of_all_ranks(monkeypatch):
    """This rank's six are all right; the other's six hold the one that is wrong."""
    other = torch.tensor([[1.0] * 5 + [-1.0]], dtype=torch.float64)
    monkeypatch.setattr(ranks, "gather", lambda mine: [mine, other])
    got = filtered_advantages(torch.ones(1, 6))
    assert got.dtype == torch.float32 and got[0].tolist() == pytest.approx([0.30151] * 6, abs=1e-4)


# ---- StableReinforce: the pre-clip ---------------------------------------------------------------------


def stable(log_ratios: list[float], advantages: list[float], loss=stable_loss, kl_coef: float = 0.0, ref: float = 0.0):
    """Loss (mean per response of one token), its slope in log pi, and the statistics."""
    batch = collate([Group([1], [[2]] * len(log_ratios))], [0], "cpu")
    batch.old_logprobs = torch.full((len(log_ratios),), -1.0)
    batch.ref_logprobs = batch.old_logprobs + ref
    batch.advantages = torch.tensor(advantages)
    logprobs = (batch.old_logprobs + torch.tensor(log_ratios)).requires_grad_()
    value, stats = loss(logprobs, batch, replace(TINY, kl_coef=kl_coef), float(len(log_ratios)))
    value.backward()
    return value.item(), logprobs.grad, stats


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "loss", "slope"),
    [
        (math.log(500), -2.0, 1000.0, 1000.0),  # inside: as ever, PPO's clip does not hold it
        (math.log(2000), -2.0, 2000.0, 0.0),  # 1000 at most, and no gradient beyond
        (10.0, -0.5, 500.0, 0.0),
        (200.0, -1.0, 1000.0, 0.0),  # exp(200) is no float32
        (200.0, 1.0, -1.2, 0.0),
        (-200.0, 1.0, -1e-3, 0.0),  # held at 1e-3
        (math.log(0.5), 1.0, -0.5, -0.5),
        (math.log(1.5), 1.0, -1.2, 0.0),  # PPO's own clip, still there
        (math.log(0.5), -1.0, 0.8, 0.0),
        (0.0, 1.0, -1.0, -1.0),
    ],
)
def test_the_log_ratio_is_clipped_before_the_exponential(log_ratio, advantage, loss, slope):
    value, grad, stats = stable([log_ratio], [advantage])
    assert value == pytest.approx(loss, rel=1e-4) and grad.item() == pytest.approx(slope, rel=1e-3)
    assert stats["policy/pre_clip_fraction"].item() == (abs(log_ratio) > math.log(1000))


def test_inside_the_bounds_it_is_grpos_loss():
    ratios, advantages = [0.3, -0.2, 0.0, 1.5, -4.0], [1.0, -2.0, 0.5, -1.0, 2.0]
    value, grad, stats = stable(ratios, advantages, kl_coef=0.1, ref=0.4)
    plain, plain_grad, plain_stats = stable(ratios, advantages, grpo.grpo_loss, kl_coef=0.1, ref=0.4)
    assert value == pytest.approx(plain, rel=1e-5)
    torch.testing.assert_close(grad, plain_grad, atol=1e-6, rtol=1e-5)
    for name, values in plain_stats.items():
        torch.testing.assert_close(stats[name], values, atol=1e-6, rtol=1e-5)


def test_the_kl_still_pulls_at_a_token_beyond_the_bounds():
    """d = ref - log pi = -8: k3 = exp(-8) + 7, its slope 1 - exp(-8)."""
    value, grad, stats = stable([8.0], [0.0], kl_coef=0.5)
    assert value == pytest.approx(0.5 * (math.exp(-8) + 7), rel=1e-5)
    assert grad.item() == pytest.approx(0.5 * (1 - math.exp(-8)), rel=1e-5)
    assert stats["policy/ref_kl"].item() == pytest.approx(math.exp(-8) + 7, rel=1e-5)


def test_what_stable_reinforce_gives_to_train(monkeypatch):
    given = given_to_train(monkeypatch, "stable_reinforce")
    assert given.pop("cfg") == replace(TINY, out=TINY.out + "-stable")
    assert {name: function.__name__ for name, function in given.items()} == {
        "advantage": "filtered_advantages", "loss": "stable_loss"}
