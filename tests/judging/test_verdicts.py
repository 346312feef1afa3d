"""Pair -> verdict: which questions are asked with which seeds, and how verdicts are counted."""

from __future__ import annotations

import math

import pytest

from data import Pair
from judging.verdicts import Judgement, judge_pairs, tally
from rollout import Reply
from runtime.errors import UserError


def pair(number: int, winner: str = "A") -> Pair:
    return Pair(f"p{number}", "set", ({"role": "user", "content": f"question {number}"},), f"good {number}",
                f"bad {number}", winner, category="chat", meta={"subset": f"s{number}"})


class FakeChat:
    """Prefers the response that says "good", wherever it stands; says what it was asked."""

    def __init__(self, answer=None):
        self.calls: list[tuple] = []
        self.answer = answer or (lambda text, seed, sample: "A" if text.index("good") < text.index("bad") else "B")

    def chat(self, conversations, n, temperature, max_tokens, seeds):
        self.calls.append((list(conversations), n, temperature, max_tokens, list(seeds)))
        return [
            [self.reply(talk[-1]["content"], seed, sample) for sample in range(n)]
            for talk, seed in zip(conversations, seeds, strict=True)
        ]

    def reply(self, text: str, seed: int, sample: int) -> Reply:
        letter = self.answer(text, seed, sample)
        said = f"so <answer>[[{letter}]]</answer>" if letter else "no idea"
        return Reply(said, "stop" if letter else "length", len(text), 7 + sample)


def test_judge_pairs_in_one_order():
    chat, pairs = FakeChat(), [pair(0, "A"), pair(1, "B")]
    first, second = judge_pairs(chat, pairs, "instruct", max_tokens=50, seed=3)
    assert (first.pair_id, first.source, first.category, first.meta) == ("p0", "set", "chat", {"subset": "s0"})
    assert (first.order, first.sample, first.verdict, first.winner, first.correct) == ("AB", 0, "A", "A", True)
    assert (second.verdict, second.winner, second.correct) == ("A", "B", False)
    assert first.text == "so <answer>[[A]]</answer>"
    assert (first.finish_reason, first.response_tokens) == ("stop", 7)
    ((talks, n, temperature, max_tokens, _),) = chat.calls
    assert (len(talks), n, temperature, max_tokens) == (2, 1, 0.0, 50)


def test_judge_pairs_in_both_orders_gives_letters_as_shown():
    chat = FakeChat()
    judged = list(judge_pairs(chat, [pair(0, "A"), pair(1, "B")], "instruct", max_tokens=9, both_orders=True))
    assert [(j.pair_id, j.order, j.verdict, j.winner, j.correct) for j in judged] == [
        ("p0", "AB", "A", "A", True), ("p0", "BA", "B", "B", True),
        ("p1", "AB", "A", "B", False), ("p1", "BA", "B", "A", False),
    ]
    shown = [talk[-1]["content"] for talk in chat.calls[0][0]]
    assert shown[0].index("good 0") < shown[0].index("bad 0") and shown[1].index("bad 0") < shown[1].index("good 0")


def test_judge_pairs_several_samples_a_pair_and_a_missing_verdict():
    chat = FakeChat(lambda text, seed, sample: "AB"[sample % 2] if sample < 2 else None)
    judged = list(judge_pairs(chat, [pair(0)], "instruct", n=3, temperature=0.7, max_tokens=9))
    assert [(j.sample, j.verdict, j.correct) for j in judged] == [(0, "A", True), (1, "B", False), (2, None, False)]
    assert [j.response_tokens for j in judged] == [7, 8, 9] and judged[2].finish_reason == "length"
    assert chat.calls[0][1:4] == (3, 0.7, 9)


def test_judge_pairs_seeds_depend_on_nothing_but_seed_pair_and_order():
    def seeds(pairs, **options):
        chat = FakeChat()
        judged = list(judge_pairs(chat, pairs, "instruct", max_tokens=9, **options))
        flat = [s for call in chat.calls for s in call[4]]
        n = options.get("n", 1)
        return {(j.pair_id, j.order): flat[i // n] for i, j in enumerate(judged)}

    whole = seeds([pair(i) for i in range(5)], both_orders=True, seed=1)
    assert len(set(whole.values())) == 10, "no two questions share a seed"
    rest = seeds([pair(i) for i in (4, 2)], both_orders=True, seed=1, n=2, at_once=2)
    assert rest == {k: v for k, v in whole.items() if k[0] in ("p4", "p2")}
    assert seeds([pair(3)], seed=1) == {("p3", "AB"): whole["p3", "AB"]}
    assert not set(seeds([pair(i) for i in range(5)], both_orders=True, seed=2).values()) & set(whole.values())


@pytest.mark.parametrize(("n", "at_once", "wanted"), [(1, 4, [4, 4, 2]), (3, 6, [2] * 5), (3, 2, [1] * 10),
                                                      (1, 256, [10])])
def test_judge_pairs_asks_for_at_once_verdicts_a_call(n, at_once, wanted):
    chat = FakeChat()
    judged = judge_pairs(chat, [pair(i) for i in range(5)], "instruct", n=n, max_tokens=9, both_orders=True,
                         at_once=at_once)
    next(judged)
    assert len(chat.calls) == 1, "verdicts come as they are made"
    list(judged)
    assert [len(call[0]) for call in chat.calls] == wanted


def test_judge_pairs_passes_the_rule_the_style_and_the_wording_on():
    chat = FakeChat()
    chat.reply = lambda text, seed, sample: Reply("[[A]] it is", "stop", 1, 2)
    assert next(judge_pairs(chat, [pair(0)], "instruct", max_tokens=9)).verdict == "A"
    assert next(judge_pairs(chat, [pair(0)], "instruct", max_tokens=9, rule="train")).verdict is None
    next(judge_pairs(chat, [pair(0)], "reasoning", max_tokens=9, system="Judge: {data} Now."))
    (message,) = chat.calls[-1][0][0]
    assert message["content"].startswith("Judge: ") and message["content"].endswith(" Now.")


def test_T15_a_ready_made_prompt_has_no_other_order():
    ready = Pair("r", "set", (), "", "", "A", messages=({"role": "user", "content": "good bad"},))
    assert next(judge_pairs(FakeChat(), [ready], "instruct", max_tokens=9)).correct
    with pytest.raises(UserError):
        list(judge_pairs(FakeChat(), [ready], "instruct", max_tokens=9, both_orders=True))


# ---- tally ---------------------------------------------------------------------------------------------


def judgement(number: int, order: str, verdict: str | None, winner: str, sample: int = 0, tokens: int = 10):
    return Judgement(f"p{number}", "set", "", {}, order, sample, verdict, winner, verdict == winner, "stop", tokens, "")


def test_tally_by_hand():  # Eq. 3
    seen = [
        judgement(0, "AB", "A", "A", tokens=4), judgement(0, "BA", "B", "B", tokens=8),  # consistent and right
        judgement(1, "AB", "A", "B"), judgement(1, "BA", "A", "A"),  # always A
        judgement(2, "AB", None, "A"), judgement(2, "BA", "B", "B"),  # one verdict is missing
        judgement(3, "AB", "B", "A"), judgement(3, "BA", "A", "B"),  # consistent and wrong
    ]
    got = tally(seen)
    assert got["count"] == 8 and got["accuracy"] == 4 / 8
    assert got["verdict_rate"] == 7 / 8 and got["share_a"] == 4 / 7
    assert got["length_mean"] == (4 + 8 + 60) / 8
    assert got["consistency"] == 2 / 4


def test_tally_without_verdicts_without_orders_and_without_anything():
    none = tally([judgement(0, "AB", None, "A"), judgement(0, "BA", None, "B")])
    assert (none["accuracy"], none["verdict_rate"], none["share_a"], none["consistency"]) == (0, 0, 0, 0)
    one = tally([judgement(0, "AB", "A", "A"), judgement(1, "AB", "B", "A")])
    assert "consistency" not in one and one["accuracy"] == 0.5 and one["share_a"] == 0.5
    empty = tally([])
    assert empty["count"] == 0 and all(math.isfinite(v) for v in empty.values()) and "consistency" not in empty


def test_tally_holds_sample_k_against_sample_k_of_the_same_source():
    seen = [
        judgement(0, "AB", "A", "A", 0), judgement(0, "AB", "B", "A", 1),
        judgement(0, "BA", "B", "B", 0), judgement(0, "BA", "B", "B", 1),
    ]
    assert tally(seen)["consistency"] == 0.5
    other = Judgement("p0", "other", "", {}, "BA", 0, "B", "B", True, "stop", 1, "")
    assert "consistency" not in tally([judgement(0, "AB", "A", "A"), other])
