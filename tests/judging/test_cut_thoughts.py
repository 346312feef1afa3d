"""A thought that was cut off holds no verdict under the rules of training and evaluation, sampled here or served."""

from __future__ import annotations

import pytest
import tiny_tokenizers

import grpo
from data import Pair
from judging.verdicts import judge_pairs
from rollout import Reply, as_rollout, chat_by_ids, rollout_metrics

PAIR = Pair("p", "s", ({"role": "user", "content": "q"},), "a", "b", "A")
THOUGHT = "<think>I would say <answer>[[A]]</answer>"


class Served:
    def __init__(self, text: str, finish_reason: str):
        self.reply = Reply(text, finish_reason, 9, 9)

    def chat(self, conversations, n, temperature, max_tokens, seeds):
        return [[self.reply] for _ in conversations]


@pytest.mark.parametrize("rule", ["train", "eval", "official"])
@pytest.mark.parametrize("text, finish, counts", [
    (THOUGHT, "length", False), (THOUGHT, "stop", True), (f"{THOUGHT}</think><answer>[[A]]</answer>", "length", True),
    ("B says <think> <answer>[[A]]</answer>", "length", True), ("<answer>[[A]]</answer>", "length", True)])
def test_served(rule, text, finish, counts):
    [judgement] = judge_pairs(Served(text, finish), [PAIR], "plain", max_tokens=9, rule=rule)
    assert judgement.verdict == ("A" if counts or rule == "official" else None)
    assert judgement.text == text


@pytest.mark.parametrize("name, opening", [("chatml", "<think>"), ("r1", "")])
def test_sampled_also_where_the_prompt_opened_the_thought(name, opening):
    """The R1 template ends in <think>: the response does not show it."""
    tokenizer = tiny_tokenizers.BUILDERS[name]()

    def sampled(text, stop=False):
        ids = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id] * stop
        return as_rollout([1], 0, ids, [0.0] * len(ids), {tokenizer.eos_token_id}, tokenizer)

    verdict = "so <answer>[[A]]</answer>"
    made = [sampled(f"{opening}{verdict}"), sampled(f"{opening}{verdict}", stop=True),
            sampled(f"{opening}no</think>{verdict}"), sampled(f"{opening}no</think>{verdict}", stop=True)]
    assert [r.cut_thought for r in made] == [True, False, False, False]
    assert made[0].text == f"{opening}{verdict}", "the text is what was sampled"
    rewards = grpo.verdict_score(made, [PAIR], None, tokenizer, None)
    assert rewards.tolist() == [[-1.0, 1.0, 1.0, 1.0]]
    assert rollout_metrics(made, rewards)["rollout/frac_no_verdict"] == 0.25


def test_a_reply_shows_the_thought_that_the_prompt_opened_where_it_was_cut_off():
    tokenizer = tiny_tokenizers.BUILDERS["r1"]()

    class Sampler:
        def generate(self, prompts, n, temperature, max_tokens, seeds):
            ids = tokenizer.encode("so <answer>[[A]]</answer>", add_special_tokens=False)
            return [as_rollout(prompts[0], 0, ids, [0.0] * len(ids), {tokenizer.eos_token_id}, tokenizer)]

    sampler = Sampler()
    sampler.tokenizer = tokenizer
    [[reply]] = chat_by_ids(sampler, [[{"role": "user", "content": "q"}]], 1, 0.0, 9, [0])
    assert reply.text == "<think>\nso <answer>[[A]]</answer>" and reply.answer == ""
