"""Assignment 3: the equations of GRPO, at points that can be checked with a pocket calculator."""

from __future__ import annotations

import math

import pytest
from checks import close, equal, holds


@pytest.mark.visible
@pytest.mark.points("group_advantages", 2)
def test_group_advantages_of_six_right_and_one_wrong(ask):
    rewards = [[1.0] * 6 + [-1.0], [-1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0]]
    wanted = [[0.37796] * 6 + [-2.26779], [-0.80178, -0.80178, 1.06904, 1.06904, -0.80178, 1.06904, -0.80178]]
    got = ask("advantages", rewards, {})
    close(f"group_advantages of {rewards}", got["value"], wanted)
    holds("group_advantages changed its argument in place (rewards -= ...); leave the caller's tensor alone",
          got["input_kept"])


@pytest.mark.points("group_advantages", 1)
def test_group_advantages_of_groups_without_a_difference_is_exactly_zero(ask):
    for rewards in ([[1.0] * 4, [-1.0] * 4], [[1.0], [-1.0]], [[0.7] * 3, [0.1] * 3]):
        for settings in ({}, {"scale_by_std": False}):
            close(f"group_advantages of {rewards}, {settings}, exactly", ask("advantages", rewards, settings)["value"],
                  [[0.0] * len(group) for group in rewards], tolerance=0.0)


@pytest.mark.points("group_advantages", 2)
def test_group_advantages_adds_eps_to_the_spread_or_only_subtracts_the_mean(ask):
    """Rewards so alike that eps shows."""
    rewards = [[2.0, 0.0, -1.0, 5.0]]
    close(f"group_advantages of {rewards}, scale_by_std=False",
          ask("advantages", rewards, {"scale_by_std": False})["value"], [[0.5, -1.5, -2.5, 3.5]])
    rewards = [[2e-6, -1e-6, -1e-6], [1e-3, 0.0, 0.0]]
    for settings, eps in (({}, 1e-6), ({"eps": 0.5}, 0.5)):
        small, large = 3**0.5 * 1e-6 + eps, 1e-3 / 3**0.5 + eps
        wanted = [[2e-6 / small, -1e-6 / small, -1e-6 / small], [2e-3 / 3 / large, *[-1e-3 / 3 / large] * 2]]
        got = ask("advantages", rewards, settings)["value"]
        close(f"group_advantages of {rewards}, {settings}", got, wanted, 1e-7 if settings else 1e-4)


@pytest.mark.visible
@pytest.mark.points("clipped_surrogate", 2)
def test_clipped_surrogate_inside_and_outside_the_bounds(ask):
    """A ratio inside its bounds, one above, with a gain and with a loss, and one below; low and high differ."""
    ratios, gains = [1.2, 1.5, 1.5, 0.5], [2.0, 1.0, -1.0, -1.0]
    got = ask("surrogate", [math.log(r) for r in ratios], [0.0] * 4, gains, 0.1, 0.3)
    about = f"clipped_surrogate at ratios {ratios}, advantages {gains}, clip_low 0.1, clip_high 0.3"
    close(f"{about}: loss", got["value"], [-2.4, -1.3, 1.5, 0.9])
    equal(f"{about}: clipped", got["clipped"], [False, True, False, True])


@pytest.mark.points("clipped_surrogate", 2)
def test_clipped_surrogate_in_all_four_quadrants(ask):
    ratios, gains = [1.6, 0.5, 1.6, 0.5, 1.0], [2.0, 2.0, -2.0, -2.0, 0.5]
    old = [-1.0, -2.0, -0.5, -3.0, -1.0]
    got = ask("surrogate", [o + math.log(r) for o, r in zip(old, ratios, strict=True)], old, gains, 0.2, 0.2)
    about = f"clipped_surrogate at ratios {ratios}, advantages {gains}"
    close(f"{about}: loss", got["value"], [-2.4, -1.0, 3.2, 1.6, -0.5])
    equal(f"{about}: clipped", got["clipped"], [True, False, False, True, False])
    close(f"{about}: slope in log p", got["slope"], [0.0, -1.0, 3.2, 0.0, -0.5])
    holds("clipped_surrogate changed its arguments in place; leave the caller's tensors alone", got["input_kept"])


@pytest.mark.points("clipped_surrogate", 1)
def test_clipped_surrogate_far_away_stays_finite(ask):
    """The log of the ratio is held at +-20 before exp."""
    got = ask("surrogate", [150.0, -150.0], [0.0, 0.0], [-1.0, 1.0], 0.2, 0.2)
    about = "clipped_surrogate at logs of the ratio [150, -150], advantages [-1, 1]"
    close(f"{about}: loss, exp(20) and -exp(-20)", got["value"], [math.exp(20), -math.exp(-20)])
    equal(f"{about}: clipped", got["clipped"], [False, False])
    close(f"{about}: slope in log p", got["slope"], [0.0, 0.0])


@pytest.mark.visible
@pytest.mark.points("kl_k3", 1)
def test_kl_k3_is_zero_where_both_agree_and_positive_elsewhere(ask):
    got = ask("kl", [-1.0, -1.0, -2.0], [-1.0, -2.0, -1.0])
    close("kl_k3 at d = ref - policy = 0, -1, 1", got["value"], [0.0, 0.36788, 0.71828])


@pytest.mark.points("kl_k3", 1)
def test_kl_k3_slopes(ask):
    points = [-1.5, -0.25, 0.5, 2.0]
    got = ask("kl", [0.0] * 4, points)
    close(f"kl_k3 at d = {points}", got["value"], [math.exp(d) - d - 1 for d in points])
    close(f"kl_k3 at d = {points}: slope in log p", got["slope"], [1 - math.exp(d) for d in points])


@pytest.mark.points("kl_k3", 1)
def test_kl_k3_far_away_stays_finite(ask):
    points = [150.0, -150.0, 15.0, -15.0, 2.0]
    got = ask("kl", [0.0] * 5, points)
    close(f"kl_k3 at d = {points}", got["value"], [10.0, 10.0, 10.0, 10.0, math.exp(2.0) - 3.0])
    holds(f"kl_k3 at d = {points}: slopes must be finite, got {got['slope']}",
          all(map(math.isfinite, got["slope"])))


@pytest.mark.visible
@pytest.mark.points("aggregate", 1)
def test_aggregate_three_ways_to_average(ask):
    """A response of two tokens and one of one."""
    values, sequence = [1.0, 2.0, 6.0], [0, 0, 1]
    for agg, divisor, wanted in [("seq", 2, 3.75), ("token", 3, 3.0), ("const", 20, 0.45)]:
        got = ask("one_number", values, sequence, 1.0, agg, divisor)
        close(f"aggregate({values}, sequence {sequence}, agg={agg!r}, divisor={divisor})", got["value"], wanted)


@pytest.mark.visible
@pytest.mark.points("aggregate", 1)
def test_aggregate_slopes_a_gap_and_weight_0(ask):
    """The response of number 1 is empty; a batch of weight 0 gives 0, and slopes of 0."""
    values, sequence = [1.0, 2.0, 3.0, 6.0], [0, 0, 0, 2]
    for weight in (1.0, 0.0):
        got = ask("one_number", values, sequence, weight, "seq", 3)
        about = f"aggregate({values}, sequence {sequence}, agg='seq', divisor=3), batch.weight {weight:g}"
        close(about, got["value"], weight * 8 / 3)
        close(f"{about}: slopes", got["slope"], [weight / 9] * 3 + [weight / 3])


@pytest.mark.points("aggregate", 2)
def test_aggregate_each_token_weighs_what_its_response_leaves_it(ask):
    """Numbers of responses may have gaps: empty responses have no token."""
    sequence = [0, 0, 0, 0, 0, 2, 3, 3]
    got = ask("one_number", [1.0] * 8, sequence, 1.0, "seq", 6)
    close(f"aggregate, agg='seq', sequence {sequence}: slopes", got["slope"], [1 / 30] * 5 + [1 / 6] + [1 / 12] * 2)
    for agg in ("token", "const"):
        got = ask("one_number", [1.0] * 8, sequence, 1.0, agg, 40)
        close(f"aggregate, sequence {sequence}, agg={agg!r}: slopes", got["slope"], [1 / 40] * 8)


TOKENS = {"logprobs": [-1.0, -2.0, -3.0], "old_logprobs": [-0.5, -2.5, -2.0], "ref_logprobs": [-1.5, -2.0, -2.0],
          "advantages": [1.0, 1.0, -2.0]}
SETTINGS = {"clip_low": 0.1, "clip_high": 0.3, "kl_coef": 0.5, "tis_cap": 0.0, "agg": "seq"}


STAND_INS = (
    "on stand-ins: surrogate = 2 * logprob + advantage, kl = 5 * (ref - logprob), aggregate = sum / divisor + 1"
)


@pytest.mark.visible
@pytest.mark.points("grpo_loss", 1)
def test_grpo_loss_is_surrogate_plus_kl_averaged(ask):
    """On the stand-ins of questions.whole_loss."""
    got = ask("whole_loss", TOKENS, SETTINGS, 4.0)
    equal("grpo_loss calls clipped_surrogate once, with", got["told"]["clipped_surrogate"],
          [["logprobs", "old_logprobs", "advantages", 0.1, 0.3]])
    holds(f"grpo_loss calls kl_k3(logprobs, ref_logprobs); it called kl_k3 with {got['told']['kl_k3'] or 'nothing'}",
          ["logprobs", "ref_logprobs"] in got["told"]["kl_k3"])
    equal("grpo_loss calls aggregate(surrogate + kl_coef * kl, batch, agg, divisor) once, agg and divisor",
          got["told"]["aggregate"], [["seq", 4.0]])
    per_token = [2 * p + a + 0.5 * 5 * (r - p) for p, a, r in
                 zip(TOKENS["logprobs"], TOKENS["advantages"], TOKENS["ref_logprobs"], strict=True)]
    close(f"grpo_loss(...)[0] with kl_coef 0.5, divisor 4, {STAND_INS}", got["loss"], sum(per_token) / 4 + 1)
    close(f"grpo_loss: slope in log p with kl_coef 0.5, divisor 4, {STAND_INS}", got["slope"], [(2 - 2.5) / 4] * 3)


@pytest.mark.visible
@pytest.mark.points("grpo_loss", 1)
def test_grpo_loss_statistics_are_per_token_and_detached(ask):
    """On the stand-ins of questions.whole_loss, where "clipped" is old_logprob > -1."""
    got = ask("whole_loss", TOKENS, SETTINGS, 4.0)
    equal("grpo_loss: names of its statistics", sorted(got["stats"]),
          ["policy/approx_kl", "policy/clip_fraction", "policy/ref_kl"])
    close("policy/clip_fraction, where old_logprob > -1 counts as clipped", got["stats"]["policy/clip_fraction"],
          [1.0, 0.0, 0.0])
    close(f"policy/ref_kl, {STAND_INS}", got["stats"]["policy/ref_kl"], [-2.5, 0.0, 5.0])
    close(f"policy/approx_kl, against the old log-probs, {STAND_INS}", got["stats"]["policy/approx_kl"],
          [2.5, -2.5, 5.0])
    holds(f"grpo_loss: these statistics still carry a gradient: {got['attached']}; .detach() them", not got["attached"])


@pytest.mark.points("grpo_loss", 1)
def test_grpo_loss_of_other_tokens_and_settings(ask):
    tokens = {"logprobs": [-4.0, -0.25], "old_logprobs": [-3.0, -0.5], "ref_logprobs": [-1.0, -0.75],
              "advantages": [-0.5, 3.0]}
    settings = {"clip_low": 0.25, "clip_high": 0.4, "kl_coef": 0.01, "tis_cap": 2.0, "agg": "token"}
    got = ask("whole_loss", tokens, settings, 16.0)
    equal("grpo_loss calls clipped_surrogate once, with", got["told"]["clipped_surrogate"],
          [["logprobs", "old_logprobs", "advantages", 0.25, 0.4]])
    equal("grpo_loss calls aggregate once, agg and divisor", got["told"]["aggregate"], [["token", 16.0]])
    first = ask("whole_loss", {name: tokens[name] for name in tokens if name != "old_logprobs"}, settings, 16.0)
    equal("grpo_loss of a round's first mini-batch (old_logprobs None) calls clipped_surrogate once, with",
          first["told"]["clipped_surrogate"], [["logprobs", "logprobs", "advantages", 0.25, 0.4]])
    close(f"grpo_loss(...)[0] with kl_coef 0.01, divisor 16, {STAND_INS}", got["loss"],
          (-8.5 + 2.5 + 0.05 * (3.0 - 0.5)) / 16 + 1)
    stats = {"policy/approx_kl": [5.0, -1.25], "policy/clip_fraction": [0.0, 1.0], "policy/ref_kl": [15.0, -2.5]}
    equal("names of the statistics, tis_cap 2 and no sampler_logprobs", sorted(got["stats"]), sorted(stats))
    for name, values in stats.items():
        close(name, got["stats"][name], values)


@pytest.mark.points("grpo_loss", 1)
def test_grpo_loss_with_truncated_importance_sampling(ask):
    tokens = TOKENS | {"sampler_logprobs": [-0.5 - math.log(1.5), -2.5 - math.log(4.0), -2.0 - math.log(0.25)]}
    got = ask("whole_loss", tokens, SETTINGS | {"tis_cap": 2.0, "kl_coef": 0.0}, 4.0)
    weights = [1.5, 2.0, 0.25]
    expected = [w * (2 * p + a) for w, p, a in zip(weights, TOKENS["logprobs"], TOKENS["advantages"], strict=True)]
    close(
        f"grpo_loss with tis_cap 2, weights 1.5, 4 and 0.25, kl_coef 0, {STAND_INS}", got["loss"], sum(expected) / 4 + 1
    )
    close("slopes", got["slope"], [2 * w / 4 for w in weights])
    close("sync/tis_clip_fraction", got["stats"].get("sync/tis_clip_fraction"), [0.0, 1.0, 0.0])
    close("sync/logprob_diff_mean", got["stats"].get("sync/logprob_diff_mean"), [math.log(g) for g in (1.5, 4.0, 4.0)])
