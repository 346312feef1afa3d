"""The pairs of recipes/real: what their page says of them is true of every row."""

from data import load_pairs
from recipes.relevance import OUT, shared

FILES = ("traces", "pairs", "traces_held_out", "held_out")


def right_and_wrong(pair):
    return (pair.response_a, pair.response_b) if pair.winner == "A" else (pair.response_b, pair.response_a)


def test_the_right_response_alone_repeats_a_word_of_the_question():
    for pair in (pair for name in FILES for pair in load_pairs(str(OUT / f"{name}.jsonl"))):
        question, (right, wrong) = pair.context[0]["content"], right_and_wrong(pair)
        assert shared(question, right) and not shared(question, wrong), pair.pair_id


def test_no_question_or_response_that_is_learnt_is_held_out():
    learnt, held_out = (
        {text for name in names for pair in load_pairs(str(OUT / f"{name}.jsonl"))
         for text in (pair.context[0]["content"], pair.response_a, pair.response_b)}
        for names in (("traces", "pairs"), ("held_out",)))
    assert len(held_out) > 180 and not learnt & held_out


def test_a_trace_quotes_what_is_there_and_ends_with_the_winner():
    for pair in (pair for name in ("traces", "traces_held_out") for pair in load_pairs(str(OUT / f"{name}.jsonl"))):
        question, seen = pair.context[0]["content"], pair.trace.lower()
        right, _ = right_and_wrong(pair)
        assert shared(question, right)[0] in seen and ": none." in seen
        assert pair.trace.endswith(f"<answer>[[{pair.winner}]]</answer>")
