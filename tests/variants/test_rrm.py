"""The Reward Reasoning Model's verdict and reward by hand, and texts that try to forge them."""

from __future__ import annotations

from dataclasses import replace

import pytest

import grpo
from data import Pair, swap
from judging.pointwise import render_scoring
from rollout import Rollout
from runtime.errors import UserError
from variants.rrm import SYSTEM, prompt, rrm_score, verdict

ASK = ({"role": "user", "content": "What is 2+2?"},)
PAIR = Pair("p", "s", ASK, "four", "five", "A")
ONE, TWO = "\\boxed{Assistant 1}", "\\boxed{Assistant 2}"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (ONE, "A"),
        (f"It is {TWO}.", "B"),
        (ONE + ONE, "A"),
        (ONE + TWO, None),  # both
        (f"{ONE}? No.</think>{TWO}", "B"),  # thoughts do not count
        (f"{ONE}</think>", None),
        (f"<think>{ONE} or {TWO}", None),
        (ONE + "x" * 61, "A"),  # 19 characters and 61: the last 80
        (ONE + "x" * 62, None),
        (ONE + "x" * 80 + TWO, "B"),
        ("\\boxed{Assistant 3}", None),
        ("\\boxed{Assistant 12}", None),
        ("\\boxed{ Assistant 1 }", None),
        ("\\boxed{assistant 1}", None),
        ("\\boxed{1}", None),
        ("boxed{Assistant 1}", None),
        ("<answer>[[A]]</answer>", None),
        ("Assistant 1", None),
        ("", None),
    ],
)
def test_a_verdict_is_one_name_literally_boxed_at_the_end(text, letter):
    assert verdict(text) == letter


def test_plus_and_minus_one_stand_as_prompts_by_samples():
    texts = [ONE, TWO, "", ONE + TWO] * 2
    rollouts = [Rollout([1], [2], [0.0], text, "stop", i // 4) for i, text in enumerate(texts)]
    rewards = rrm_score(rollouts, [PAIR, swap(PAIR)], None, None, grpo.PRESETS["tiny"])
    assert rewards.tolist() == [[1.0, -1.0, -1.0, -1.0], [-1.0, 1.0, -1.0, -1.0]]


def test_the_prompt_names_both_boxes_and_a_prompt_file_replaces_its_wording_alone():
    system, data = prompt(PAIR, "instruct")
    assert system["content"] == SYSTEM and ONE in SYSTEM and TWO in SYSTEM
    assert data == render_scoring(ASK, ["four", "five"])[1]
    assert prompt(PAIR, "plain", "mine") == [{"role": "system", "content": "mine"}, data]


def test_a_ready_made_prompt_is_refused():
    with pytest.raises(UserError, match="pair p"):
        prompt(replace(PAIR, messages=ASK), "instruct")
