"""The probes by hand: what each changes, what each number is for judges whose habits are known, errors, resume."""

from __future__ import annotations

import json
import math

import pytest

from data import Pair, save_pairs, swap
from evaluation import probes
from judging.verdicts import Judgement, why_silent
from runtime.errors import UserError
from toy import files, world
from toy.files import Build


def pair_of(name: str, question: str, a: str, b: str, winner="A", category="sum") -> Pair:
    return Pair(name, "test", ({"role": "user", "content": question},), a, b, winner, category)


PAIRS = [
    pair_of("p0", "what is 1+1?", "it is 2.", "it is 11."),
    pair_of("p1", "what is 2+1?", "it is 9.", "it is 3.", "B"),
    pair_of("p2", "say hello", "hello you", "no", "A", "chat"),
    pair_of("p3", "say bye", "hm", "bye bye bye", "B", "chat"),
]


def judge_by(prefer) -> probes.Judge:
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
    return {name: row["value"] for name, row in probes.measure(pairs, judged)["rows"].items()}


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
        "right if the winner is longer, less if shorter": 0.0,
        "names what says all twice": 0.5, "names what wears Markdown": 0.5,
    }


def test_a_judge_that_always_says_a():
    row = table(lambda shown: "A")
    assert row["accuracy"] == 0.5 and row["both orders name one response"] == 0.0 and row["says A"] == 1.0
    assert row["no question: verdict stays"] == row["other numbers: verdict stays"] == 1.0
    assert row["two instructions: right under both"] == 0.0 and row["two instructions: verdict stays"] == 1.0
    assert row["names what says all twice"] == row["names what wears Markdown"] == 0.5
    assert row["right if the winner is longer, less if shorter"] == 0.0


def test_a_judge_that_likes_the_longer_text():
    """p0: B is longer and loses; p1: equal lengths, B is said in both orders; p2, p3: the winners are longer."""
    row = table(lambda shown: "A" if len(shown.response_a) > len(shown.response_b) else "B")
    assert row["accuracy"] == (0 + 0.5 + 1 + 1) / 4 and row["both orders name one response"] == 3 / 4
    assert row["right if the winner is longer, less if shorter"] == 1.0
    assert row["names what says all twice"] == (1 + 1 + 0.5 + 0.5) / 4  # twice "no" is shorter than "hello you"
    assert row["names what wears Markdown"] == 1.0
    assert row["no question: verdict stays"] == 1.0 and row["two instructions: right under both"] == 0.0


def test_the_gap_between_longer_and_shorter_winners_by_hand():
    """Winners: p0 shorter, p1 equal (left out), p2 and p3 longer. Right: p0 in one order, p2 in both, p3 in neither."""
    answers = iter(["A", "A", "A", "A", "A", "B", "A", "B"])
    seen = list(judge_by(lambda s: next(answers))(PAIRS))
    assert probes.longer(PAIRS, seen) == {"value": (1 + 0) / 2 - 0.5, "error": None, "pairs": 3}
    more = [*PAIRS, pair_of("p4", "say no", "no", "never", "A", "chat")]
    answers = iter(["A", "A", "A", "A", "A", "B", "A", "B", "B", "A"])
    seen = list(judge_by(lambda s: next(answers))(more))
    found = probes.longer(more, seen)  # longer: 1 and 0, shorter: 0.5 and 0
    assert found == {"value": 0.25, "error": pytest.approx(math.sqrt(0.5**2 + 0.25**2)), "pairs": 4}


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


@pytest.mark.parametrize(
    ("text", "reason", "tokens", "expected"),
    [
        ("<type> Chat", "length", 60, "cut off"),
        ("", "length", 0, "prompt too long"),
        ("A None B 1.0", "length", 0, "prompt too long"),
        ("A 1.0 B 1.0", "stop", 0, "equal scores"),
        ("[[A]] or [[B]]", "stop", 9, "both letters"),
        ("<answer>[[A]]</answer> and much more", "stop", 9, "letter in the wrong place"),
        ("<answer>A</answer>", "stop", 9, "verdict in another form"),
        ("[[C]]", "stop", 9, "verdict in another form"),
        ("A is better", "stop", 9, "no verdict tag"),
        ("<think>[[A]]</think> ", "stop", 9, "nothing written"),
    ],
)
def test_kinds_of_outputs_without_a_verdict(text, reason, tokens, expected):
    assert why_silent(Judgement("p", "s", "", {}, "AB", 0, None, "A", False, reason, tokens, text)) == expected


# ---- the command ---------------------------------------------------------------------------------------


def test_a_finished_probe_is_not_judged_again(tmp_path, monkeypatch, capsys):
    (tmp_path / "pairs.jsonl").write_text(save_pairs([*PAIRS, PAIRS[0]]))  # a pair_id that comes twice
    asked: list[int] = []

    def load_judge(cfg, system):
        def judge(pairs):
            asked.append(len(pairs))
            if len(asked) == 3:
                raise KeyboardInterrupt
            return judge_by(knows)(pairs)

        return judge

    monkeypatch.setattr(probes, "load_judge", load_judge)
    monkeypatch.setattr("loading.folder.weights_digest", lambda path: "weights")
    cfg = probes.Probes(model="m", data=str(tmp_path / "pairs.jsonl"), out=str(tmp_path / "out"))
    with pytest.raises(KeyboardInterrupt):
        probes.probe(cfg)
    assert asked == [5, 5, 3]
    result = probes.probe(cfg)
    assert asked[3:] == [3, 5, 5, 5, 5, 5, 5] and result["rows"]["accuracy"]["pairs"] == 5
    assert probes.probe(cfg) == result == json.loads((tmp_path / "out" / "probes.json").read_text())
    assert len(asked) == 10
    probes.show(result)
    printed = capsys.readouterr().out
    assert "accuracy" in printed and "no verdict on the pairs as they are: none" in printed
    monkeypatch.setattr("loading.folder.weights_digest", lambda path: "trained further")
    with pytest.raises(UserError, match="another configuration"):
        probes.probe(cfg)


def test_a_ready_made_prompt_is_refused(tmp_path):
    row = {"context_messages": [{"role": "user", "content": "judge"}], "winner": "model_a"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="a ready-made prompt cannot be changed"):
        probes.probe(probes.Probes(model="m", data=str(tmp_path / "pairs.jsonl"), out=str(tmp_path / "out")))


def test_both_kinds_of_judges_go_through_the_command(tmp_path):
    """An untrained model and one trained for a step: only that everything is asked and counted."""
    from variants import scalar_rm

    world = tmp_path / "world"
    files.build(Build(str(world), sft_pairs=2, rl_pairs=6, held_out_pairs=4, sft_held_out_pairs=2))
    changes = {"model": str(world / "start"), "data": str(world / "rl.jsonl"), "out": str(tmp_path / "scalar")}
    scalar_rm.train(scalar_rm.Config(**vars(scalar_rm.PRESETS["tiny"]) | changes | {"held_out": "", "steps": 1}))
    data = {"data": str(world / "held_out.jsonl")}
    scores = probes.probe(probes.Probes(model=str(tmp_path / "scalar"), out=str(tmp_path / "a"), scalar=True, **data))
    assert scores["rows"]["both orders name one response"] == {
        "value": 1.0, "error": 0.0, "pairs": 4, "verdicts": 1.0, "good": "1"}
    chains = probes.probe(probes.Probes(model=str(world / "start"), out=str(tmp_path / "b"), max_tokens=4,
                                        prompt_file=str(world / "prompt.txt"), **data))
    assert chains["rows"]["accuracy"]["pairs"] == 4
    assert sum(chains["no verdict"].values()) == round(8 * (1 - chains["rows"]["accuracy"]["verdicts"]))
