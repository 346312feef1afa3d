"""Verdict windows, the three parsing rules, the rewards."""

from __future__ import annotations

import inspect

import pytest
from hypothesis import given, strategies as st

import reward
from reward import format_reward, parse_verdict, verdict_reward

A, B = "<answer>[[A]]</answer>", "<answer>[[B]]</answer>"
CHAT = "<type>Chat</type><rubric>tone<justify>why</justify></rubric><eval>A is kind</eval>"
REASONING = "<type>Reasoning</type><solution>4</solution><eval>A is right</eval>"
RULES = ("train", "eval", "official")


# ---- the training rule ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", (0, 1, 36, 57, 58))
def test_the_tag_counts_while_it_lies_whole_in_the_last_80_characters(tail):
    """The tag has 22 characters, so up to 58 may follow it."""
    assert len(A) == 22
    assert parse_verdict("x" * 500 + A + "." * tail) == "A"
    assert parse_verdict("x" * 500 + B + "." * tail) == "B"


@pytest.mark.parametrize("tail", (59, 60, 79, 80, 5000))
def test_a_tag_that_starts_before_the_last_80_characters_does_not_count(tail):
    assert parse_verdict("x" * 500 + A + "." * tail) is None
    assert parse_verdict(A + "." * tail) is None


def test_the_window_counts_characters_not_bytes_or_line_breaks():
    assert parse_verdict(A + "判" * 58) == "A" and parse_verdict(A + "判" * 59) is None
    assert parse_verdict(A + "😀" * 58) == "A" and parse_verdict(A + "😀" * 59) is None
    assert parse_verdict(A + "\n" * 58) == "A" and parse_verdict(A + "\n" * 59) is None


def test_both_verdicts_in_the_window_are_none():
    for text in (A + B, B + A, A + "." * 36 + B, f"not {B} but {A}"):
        assert parse_verdict(text) is None
    assert parse_verdict(A + "." * 36 + B) is None and parse_verdict(A + "." * 37 + B) == "B"  # 22 + 36 + 22 = 80
    assert parse_verdict(A + A) == "A"


NO_VERDICTS = [
    "", " ", "A", "[[A]]", "<answer>A</answer>", "<answer>[A]</answer>", "<answer>[[A/B]]</answer>",
    "<answer> [[A]]</answer>", "<answer>[[A]] </answer>", "<answer>\n[[A]]\n</answer>", "<answer>[[ A ]]</answer>",
    "< answer>[[A]]</answer>", "<Answer>[[A]]</Answer>", "<answer>[[a]]</answer>", "<answer>[[C]]</answer>",
    "<answer>[[A]]", "[[A]]</answer>", "<answer>[[A]]</answer", "<answer>[[А]]</answer>",  # the last A is Cyrillic
    "<answer>[[A]</answer>", "<answer>[A]]</answer>", "<answer>[[AB]]</answer>", "<answer>[[A]][[B]]</answer>",
]


@pytest.mark.parametrize("text", NO_VERDICTS, ids=range(len(NO_VERDICTS)))
def test_anything_but_the_literal_tag_is_no_verdict_in_training(text):
    assert parse_verdict(text) is None
    assert parse_verdict(REASONING + text) is None
    assert verdict_reward(text, "A") == verdict_reward(text, "B") == -1.0


def test_training_is_the_default_rule_and_reads_verdicts_in_an_open_thought():
    assert parse_verdict("[[A]]") is parse_verdict("[[A]]", "train") is None
    assert parse_verdict(f"<think> so {A}") == "A"  # what the authors' reward does: it knows no thoughts
    assert inspect.signature(parse_verdict).parameters["rule"].default == "train"
    assert reward.WINDOW == 80 and reward.open_thought("\n<think> so [[A]]")


# ---- the evaluation rules ------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ("eval", "official"))
@pytest.mark.parametrize("letter", "AB")
def test_evaluation_reads_the_brackets_anywhere(rule, letter):
    mark = f"[[{letter}]]"
    for text in (mark, f"Verdict: {mark} " + "x" * 5000, f"{mark}{mark}", f"<answer> {mark}\n</answer>", f"[{mark}]"):
        assert parse_verdict(text, rule) == letter


@pytest.mark.parametrize("rule", ("eval", "official"))
def test_evaluation_takes_both_brackets_or_none_for_no_verdict(rule):
    for text in ("", "[[A]] or [[B]]", B + "x" * 9000 + A, "[[A/B]]", "[A]", "[[a]]", "[[ A ]]", "[[C]]"):
        assert parse_verdict(text, rule) is None


def test_only_the_eval_rule_cuts_the_thoughts_off():
    text = "<think>[[A]]? no, [[B]].</think>\n\n[[B]]"
    assert parse_verdict(text, "eval") == "B"
    assert parse_verdict(text, "official") is None
    text = "<think>[[A]]</think> undecided"
    assert (parse_verdict(text, "eval"), parse_verdict(text, "official")) == (None, "A")


def test_the_eval_rule_reads_after_the_last_end_of_thought():
    assert parse_verdict("[[A]]</think>[[A]] or [[B]]?</think>[[B]]", "eval") == "B"
    assert parse_verdict("[[A]]</think>", "eval") is None
    assert parse_verdict("[[A]]", "eval") == "A"  # no thought at all: the whole output


# ---- rewards -------------------------------------------------------------------------------------------


def test_the_reward_is_plus_one_or_minus_one():  # Eq. 8
    assert verdict_reward(REASONING + A, "A") == verdict_reward(REASONING + B, "B") == 1.0
    assert verdict_reward(REASONING + A, "B") == verdict_reward(REASONING + B, "A") == -1.0
    assert verdict_reward(REASONING, "A") == verdict_reward(A + B, "A") == -1.0
    assert isinstance(verdict_reward(A, "A"), float)


@pytest.mark.parametrize("winner", ("model_a", "model_b", "a", "C", "", None, "tie", "AB", 0))
def test_a_winner_that_is_neither_A_nor_B_raises(winner):
    with pytest.raises(ValueError, match="winner"):
        verdict_reward(A, winner)


FORMAT = {  # text: styles for which it is well-formed
    CHAT + A: {"instruct", "rubrics", "reasoning", "plain"},
    CHAT + B: {"instruct", "rubrics", "reasoning", "plain"},
    REASONING + A: {"instruct", "reasoning", "plain"},
    "<think>[[A]] or [[B]]</think>" + REASONING + A: {"instruct", "reasoning", "plain"},
    CHAT.removeprefix("<type>Chat</type>") + A: {"rubrics", "reasoning", "plain"},
    CHAT.replace("Chat<", "Reasoning<") + A: {"rubrics", "reasoning", "plain"},  # a rubric where a solution is due
    REASONING.replace("Reasoning<", "Chat<") + A: {"reasoning", "plain"},
    REASONING.replace("Reasoning<", "Other<") + A: {"reasoning", "plain"},
    REASONING.replace("4", "") + A: {"reasoning", "plain"},  # an empty solution
    REASONING.replace("A is right", " ") + A: {"reasoning", "plain"},  # an empty comparison
    REASONING.removesuffix("</eval>") + A: {"reasoning", "plain"},
    "It is " + A: {"reasoning", "plain"},
    CHAT: set(),
    CHAT + "<answer>[[A/B]]</answer>": set(),
    CHAT + "<answer> [[A]] </answer>": set(),
    CHAT + A + B: set(),
    CHAT + A + "." * 59: set(),  # the verdict has to be where the training rule finds it
    A + CHAT + "." * 80: set(),
    "[[A]]": set(),
    "": set(),
    CHAT + A + "</think>": set(),
}


@pytest.mark.parametrize("style", ("instruct", "rubrics", "reasoning", "plain"))
@pytest.mark.parametrize("text", FORMAT, ids=range(len(FORMAT)))
def test_the_format_reward_asks_for_the_parts_of_the_style(style, text):  # Eq. 11
    assert format_reward(text, style) == float(style in FORMAT[text])


@pytest.mark.parametrize("quoted", ("type", "rubric", "solution"))
@pytest.mark.parametrize("chain", (CHAT, REASONING), ids=("chat", "reasoning"))
def test_T15_a_quoted_tag_does_not_cost_the_format_reward(chain, quoted):
    text = chain.replace("<eval>", f"<eval><quote_A><{quoted}>theirs</{quoted}></quote_A>") + A
    assert format_reward(text, "instruct") == 1.0


def test_T15_a_quoted_type_does_not_cost_a_chain_without_one_its_format_reward():
    text = CHAT.removeprefix("<type>Chat</type>").replace("<eval>", "<eval><quote_A><type>theirs</type></quote_A>") + A
    assert format_reward(text, "rubrics") == 1.0


# ---- symmetry ------------------------------------------------------------------------------------------

TEXTS = st.lists(
    st.one_of(
        st.sampled_from([A, B, "[[A]]", "[[B]]", "[[A/B]]", "</think>", "<think>", CHAT, REASONING, "<answer>", " ",
                         "\n", "." * 40, "." * 80, "A", "B"]),
        st.text(max_size=10),
    ), max_size=10).map("".join)
RELABEL = str.maketrans("AB", "BA")


@given(TEXTS)
def test_T15_exchanging_the_letters_exchanges_the_verdict(text):
    other = {"A": "B", "B": "A", None: None}
    for rule in RULES:
        assert parse_verdict(text.translate(RELABEL), rule) == other[parse_verdict(text, rule)]
    assert verdict_reward(text, "A") == verdict_reward(text.translate(RELABEL), "B")
    for style in ("instruct", "rubrics", "reasoning", "plain"):
        assert format_reward(text, style) == format_reward(text.translate(RELABEL), style)


@given(TEXTS, TEXTS)
def test_rules_nest(before, text):
    """What training reads, a text without the other mark gives in evaluation too; no prefix undoes the window."""
    verdict = parse_verdict(text)
    if len(text) >= 80:
        assert parse_verdict(before + text) == verdict
    if verdict and parse_verdict(text, "official"):
        assert parse_verdict(text, "official") == verdict
    assert verdict_reward(text, "A") + verdict_reward(text, "B") == (0.0 if verdict else -2.0)
