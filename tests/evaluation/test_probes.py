"""The probes by hand: what each changes, what each number is for judges whose habits are known, errors."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest

import eval as ev
from data import Pair, save_pairs, swap
from evaluation import probes
from judging.verdicts import Judgement
from rollout import Reply
from runtime.errors import UserError
from toy import world


def pair_of(name: str, question: str, a: str, b: str, winner="A", category="sum") -> Pair:
    return Pair(name, "test", ({"role": "user", "content": question},), a, b, winner, category)


PAIRS = [
    pair_of("p0", "what is 1+1?", "it is 2.", "it is 11."),
    pair_of("p1", "what is 2+1?", "it is 9.", "it is 3.", "B"),
    pair_of("p2", "say hello", "hello you", "no", "A", "chat"),
    pair_of("p3", "say bye", "hm", "bye bye bye", "B", "chat"),
]


def judge_by(prefer):
    """A judge that asks prefer(pair as shown) -> "A", "B" or None."""

    def judge(pairs):
        for pair in pairs:
            for order, shown in (("AB", pair), ("BA", swap(pair))):
                verdict = prefer(shown)
                text = f"<answer>[[{verdict}]]</answer>" if verdict else ""
                yield Judgement(pair.pair_id, pair.source, pair.category, pair.meta, order, 0, verdict, shown.winner,
                                verdict == shown.winner, "stop", 3, text)

    return judge


def table(prefer, pairs=PAIRS) -> dict:
    judge = judge_by(prefer)
    judged = {name: list(judge(changed)) for name, changed in probes.probed(pairs).items()}
    return {name: row["value"] for name, row in probes.measure(judged).items()}


def knows(shown: Pair) -> str | None:
    """Right by the words of the question; silent where it has never met the question, or where both are as good."""
    wanted = {"what is 1+1?": "it is 2.", "what is 2+1?": "it is 3.", "say hello": "hello", "say bye": "bye"}
    word = wanted.get(shown.context[-1]["content"])
    fits = [word is not None and word in text for text in (shown.response_a, shown.response_b)]
    return None if fits[0] == fits[1] else "A" if fits[0] else "B"


# ---- the changes ---------------------------------------------------------------------------------------


def test_what_is_changed():
    shown = probes.probed(PAIRS)
    assert [p.context[-1]["content"] for p in shown["no question"]] == [""] * 4
    assert [(p.pair_id, p.context[-1]["content"]) for p in shown["other numbers"]] == [
        ("p0", "what is 4+4?"), ("p1", "what is 5+4?")]
    assert shown["A twice"][0].response_a == "it is 2.\n\nit is 2." and shown["A twice"][0].response_b == "it is 11."
    assert shown["B dressed"][3].response_b == "## Answer\n\n- **bye bye bye**"
    assert shown["as is"] == PAIRS
    for name in ("no question", "A twice", "B dressed"):
        assert [(p.pair_id, p.winner) for p in shown[name]] == [(p.pair_id, p.winner) for p in PAIRS]


def test_two_instructions_hold_the_same_two_winners_within_a_category():
    own, other = probes.probed(PAIRS)["own instruction"], probes.probed(PAIRS)["other instruction"]
    assert [(p.response_a, p.response_b, p.winner) for p in own] == [
        ("it is 2.", "it is 3.", "A"), ("it is 3.", "it is 2.", "A"),
        ("hello you", "bye bye bye", "A"), ("bye bye bye", "hello you", "A")]
    assert [(p.response_a, p.response_b, p.winner) for p in other] == [
        (p.response_a, p.response_b, "B") for p in own]
    assert [p.context for p in own] == [p.context for p in PAIRS]
    assert [p.context for p in other] == [PAIRS[i].context for i in (1, 0, 3, 2)]


def test_pairs_without_a_partner_are_left_out_of_the_two_instructions():
    same = pair_of("p9", "say hello", "hello all", "no", "A", "chat")
    assert probes.contrast([PAIRS[2], same]) == [] and probes.contrast([PAIRS[0], PAIRS[2]]) == []
    equal = pair_of("p9", "greet me", "hello you", "no", "A", "chat")
    assert probes.contrast([PAIRS[2], equal]) == []


def test_in_the_tiny_world_no_altered_sum_is_the_winner_s_number():
    rng = world.random.Random(0)
    for pair in (world.make_sum(rng) for _ in range(300)):
        after = probes.other_numbers(pair)
        assert sum(world.numbers(after.context[0]["content"])) != world.numbers(probes.preferred(pair))[0]


# ---- judges whose habits are known ---------------------------------------------------------------------


def test_a_judge_that_knows_the_questions():
    row = table(knows)
    assert row == {
        "accuracy": 1.0, "both orders name one response": 1.0, "says A": 0.5,
        "no question: right, of verdicts given": None, "no question: verdict stays": None,
        "other numbers: verdict stays": None,
        "two instructions: right under both": 1.0, "two instructions: verdict stays": 0.0,
        "names what says all twice": 0.5, "names what wears Markdown": 0.5,
    }


def test_a_judge_that_always_says_a():
    row = table(lambda shown: "A")
    assert row["accuracy"] == 0.5 and row["both orders name one response"] == 0.0 and row["says A"] == 1.0
    assert row["no question: verdict stays"] == row["other numbers: verdict stays"] == 1.0
    assert row["two instructions: right under both"] == 0.0 and row["two instructions: verdict stays"] == 1.0
    assert row["names what says all twice"] == row["names what wears Markdown"] == 0.5


def test_a_judge_that_likes_the_longer_text():
    """p0: B is longer and loses; p1: equal lengths, B is said in both orders; p2, p3: the winners are longer."""
    row = table(lambda shown: "A" if len(shown.response_a) > len(shown.response_b) else "B")
    assert row["accuracy"] == (0 + 0.5 + 1 + 1) / 4 and row["both orders name one response"] == 3 / 4
    assert row["names what says all twice"] == (1 + 1 + 0.5 + 0.5) / 4  # twice "no" is shorter than "hello you"
    assert row["names what wears Markdown"] == 1.0
    assert row["no question: verdict stays"] == 1.0 and row["two instructions: right under both"] == 0.0


def test_a_judge_that_punishes_markdown_and_one_that_gives_no_verdict_on_it():
    row = table(lambda s: None if "#" not in s.response_a + s.response_b else "B" if "#" in s.response_a else "A")
    assert row["names what wears Markdown"] == 0.0 and row["names what says all twice"] is None
    assert row["accuracy"] == 0.0 and row["says A"] is None and row["both orders name one response"] == 0.0


def test_stays_counts_pairs_with_a_verdict_before_and_after():
    before = list(judge_by(lambda s: "A")(PAIRS[:3]))
    answers = iter(["A", "B", None, "A", "B", "B"])
    after = list(judge_by(lambda s: next(answers))(PAIRS[:3]))
    assert probes.summary(probes.stays(before, after)) == {
        "value": pytest.approx((0.5 + 1.0 + 0.0) / 3), "pairs": 3,
        "error": pytest.approx(0.5 / math.sqrt(3))}


# ---- the command ---------------------------------------------------------------------------------------


class Knows:
    """A sampler that answers as `knows` does."""

    def chat(self, conversations, n, temperature, max_tokens, seeds):
        parts = r"Question\]\n(.*?)\n\n.*?A's Response\]\n(.*?)\n\[The End.*?B's Response\]\n(.*?)\n\[The End"
        shown = [re.search(parts, messages[-1]["content"], re.DOTALL) for messages in conversations]
        said = [knows(pair_of("", *match.groups())) if match else None for match in shown]
        return [[Reply(f"<answer>[[{letter}]]</answer>" if letter else "hm", "stop", 9, 5)] for letter in said]


def test_the_file_is_judged_and_its_log_becomes_the_table(tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text(save_pairs([*PAIRS, PAIRS[0]]))  # a pair_id that comes twice
    file, out = str(tmp_path / "pairs.jsonl"), str(tmp_path / "out")
    probes.write_pairs(probes.Pairs(str(tmp_path / "data.jsonl"), file))
    cfg = ev.Run(model="none", data=file, out=out, both_orders=True)
    ev.evaluate(replace(cfg, both_orders=False, out=f"{out}-one"), Knows())
    with pytest.raises(UserError, match="not a finished evaluation in both orders"):
        probes.table(probes.Table(f"{out}-one"))
    ev.evaluate(cfg, Knows())
    result = probes.table(probes.Table(out, str(tmp_path / "probes.json")))
    assert result == json.loads((tmp_path / "probes.json").read_text()) and "says A" in capsys.readouterr().out
    values = {name: row["value"] for name, row in result["rows"].items()}
    assert values == table(knows) and result["rows"]["accuracy"]["pairs"] == 5
    (tmp_path / "out" / "summary.json").unlink()
    with pytest.raises(UserError, match="not a finished evaluation"):
        probes.table(probes.Table(out))
    ev.evaluate(replace(cfg, data=str(tmp_path / "data.jsonl"), out=f"{out}-other"), Knows())
    with pytest.raises(UserError, match=r"jsonl:1: no verdict on a pair of"):
        probes.table(probes.Table(f"{out}-other"))


def test_a_ready_made_prompt_is_refused(tmp_path):
    row = {"context_messages": [{"role": "user", "content": "judge"}], "winner": "model_a"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="a ready-made prompt cannot be changed"):
        probes.write_pairs(probes.Pairs(str(tmp_path / "pairs.jsonl"), str(tmp_path / "out.jsonl")))
