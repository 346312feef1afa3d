"""The cold start's reward by hand, and that it is what `grpo.train` is given."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import grpo
from data import Pair
from reward import format_reward
from rollout import Rollout
from variants.cold_start import cold_start_reward, cold_start_score

PLAN = "<type>Reasoning</type><solution>4</solution><eval>A: 4, B: 5</eval>"
RUBRIC = "<rubric>short</rubric><eval>A is shorter</eval>"
A, B = "<answer>[[A]]</answer>", "<answer>[[B]]</answer>"


@pytest.mark.parametrize(
    ("text", "style", "if_a_wins", "if_b_wins"),
    [
        (PLAN + A, "instruct", 2.0, 1.0),
        (PLAN + B, "instruct", 1.0, 2.0),
        (RUBRIC + A, "instruct", 1.0, 0.0),  # no type: not this style's format
        (RUBRIC + A, "rubrics", 2.0, 1.0),
        (A, "rubrics", 1.0, 0.0),
        (A, "plain", 2.0, 1.0),
        (PLAN, "plain", 0.0, 0.0),  # no verdict
        (RUBRIC + A + B, "rubrics", 0.0, 0.0),  # both letters
        (RUBRIC + "<answer>[[A/B]]</answer>", "rubrics", 0.0, 0.0),
        (RUBRIC + A + "x" * 80, "rubrics", 0.0, 0.0),  # out of the training rule's window
        ("", "plain", 0.0, 0.0),
    ],
)
def test_one_for_the_format_and_one_for_the_answer(text, style, if_a_wins, if_b_wins):  # Eq. 11
    assert [cold_start_reward(text, winner, style) for winner in "AB"] == [if_a_wins, if_b_wins]


def test_scores_stand_as_prompts_by_samples_and_give_these_advantages():
    pairs = [Pair(f"p{i}", "", (), "", "", winner) for i, winner in enumerate("AB")]
    texts = [PLAN + A, PLAN + B, A, "", PLAN + A, PLAN + A, PLAN + A, PLAN + A]
    rollouts = [Rollout([1], [2], [0.0], text, "stop", i // 4) for i, text in enumerate(texts)]
    cfg = replace(grpo.PRESETS["tiny"], style="instruct")
    rewards = cold_start_score(rollouts, pairs, None, None, cfg)
    assert rewards.tolist() == [[2.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    # mean 1, unbiased deviation sqrt(2/3): (2 - 1) / 0.8165 = 1.2247; the group of ones has nothing to say
    expected = torch.tensor([[1.2247, 0.0, 0.0, -1.2247], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(grpo.group_advantages(rewards), expected, atol=1e-4, rtol=0)


def test_where_all_samples_have_the_format_advantages_are_those_of_the_verdict_reward():
    pairs = [Pair("p", "", (), "", "", "B")]
    texts = [PLAN + B, PLAN + A, PLAN + A, PLAN + B]
    assert {format_reward(text, "instruct") for text in texts} == {1.0}
    rollouts = [Rollout([1], [2], [0.0], text, "stop", 0) for text in texts]
    cold = cold_start_score(rollouts, pairs, None, None, replace(grpo.PRESETS["tiny"], style="instruct"))
    warm = grpo.verdict_score(rollouts, pairs, None, None, grpo.PRESETS["tiny"])  # type: ignore[arg-type]
    torch.testing.assert_close(grpo.group_advantages(cold), grpo.group_advantages(warm), atol=1e-5, rtol=0)
