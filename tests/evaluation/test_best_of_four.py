"""RewardBench 2 and JudgeBench: rows, who is asked, scores by hand; --limit over subsets; equal losers of RMB."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import asdict

import numpy as np
import pytest

import eval as ev
from data import swap
from evaluation import benchmarks as bm, rewardbench2 as rb2
from evaluation.outcomes import read_outcomes
from judging.verdicts import Judgement
from rollout import Reply
from runtime.errors import UserError


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def four(number, subset="Math", good="good"):
    return {"id": str(number), "prompt": f"question {number}?", "subset": subset, "chosen": [f"{good} {number}"],
            "rejected": [f"bad {number} {k}" for k in range(3)], "num_correct": 1, "total_completions": 4}


def several(kind, number, right, wrong):
    return {"id": f"{kind}:{number}", "prompt": f"name one {kind} {number}", "subset": "Ties",
            "chosen": [f"good {k}" for k in range(right)], "rejected": [f"bad {k}" for k in range(wrong)]}


class Reads:
    """Judges by the responses that the prompt shows: rank(text) is the strength; equal strengths give no verdict."""

    def __init__(self, rank):
        self.rank, self.seen = rank, []

    def chat(self, conversations, n, temperature, max_tokens, seeds):
        shown = [[re.search(rf"Chatbot {x}'s Response\]\n(.*?)\n\[The End", c[-1]["content"], re.S)[1] for x in "AB"]
                 for c in conversations]
        self.seen += shown
        return [[Reply(f"[[{'A' if self.rank(a) > self.rank(b) else 'B'}]]" if self.rank(a) != self.rank(b) else "hm",
                       "stop", 9, 5)] for a, b in shown]


def run(tmp_path, rows, sampler, benchmark="rewardbench-2", **settings):
    cfg = ev.Run(model="m", data=write(tmp_path / "rows.jsonl", rows), out=str(tmp_path / "out"), benchmark=benchmark,
                 **settings)
    summary = ev.evaluate(cfg, sampler)
    return summary, ev.score(ev.Score(benchmark=benchmark, log=(cfg.out,)))["table"]


def test_a_judge_plays_knockouts_in_both_orders_and_is_not_asked_about_ties(tmp_path, capsys):
    rows = [*(four(n) for n in range(6)), four(9, "Focus", good="weak"), several("tied", 1, 2, 2)]
    rank = {"good": 3, "weak": 0}
    sampler = Reads(lambda text: rank.get(text.split()[0], 1 + int(text[-1]) / 9))
    summary, table = run(tmp_path, rows, sampler, at_once=5)
    assert table["subsets"] == {"Factuality": None, "Precise IF": None, "Math": 1.0, "Safety": None, "Focus": 0.0,
                                "Ties": None}
    assert table["overall"]["average"] is None and "question" not in json.dumps(table)
    # two matches and the final for those who win, two for the weak one; each in both orders
    assert len(sampler.seen) == 2 * (6 * 3 + 2)
    assert {(b, a) for a, b in sampler.seen} == {(a, b) for a, b in sampler.seen}
    assert summary["overall"]["count"] == 2 * (6 * 2 + 1), "matches between rejected responses are no accuracy"
    again = Reads(sampler.rank)
    assert run(tmp_path, rows, again, at_once=5)[0] == summary and not again.seen
    assert "-" in capsys.readouterr().out


def test_a_knockout_goes_on_where_it_stopped(tmp_path):
    rows = [several("tied", n, 2, 2) for n in range(9)]
    tied = bm.load_benchmark("rewardbench-2", write(tmp_path / "ties.jsonl", rows))
    assert tied and not bm.due("rewardbench-2", tied, [])
    rows = [four(n) for n in range(4)]
    whole, table = run(tmp_path, rows, Reads(lambda text: text.startswith("good")))
    log = tmp_path / "out" / "judgements.jsonl"
    log.write_text("".join(log.read_text().splitlines(True)[:7]))
    assert run(tmp_path, rows, rest := Reads(lambda text: text.startswith("good"))) == (whole, table)
    assert len(rest.seen) == 4 * 3 * 2 - 7, "a pair whose second order was lost is asked in that order alone"


def test_without_verdicts_the_draw_decides():
    wins = [rb2.champion(dict.fromkeys(rb2.matches(1, 4), 0.5), 4, str(item))[0] for item in range(400)]
    assert 70 < sum(wins) < 130
    votes = [Judgement("p", "s", "", {}, "AB", 0, said, "A", False, "stop", 5, "") for said in ("A", "B", None)]
    assert [bm.lead(seen) for seen in (votes, votes[2:], votes[:1], votes[1:])] == [0.5, 0.5, 1.0, 0.0]


def test_an_unfinished_knockout_is_left_out_and_said():
    pairs = {("0", "1"): 1.0, ("2", "3"): 0.0}
    outcomes = [bm.Outcome("Math/1", "rewardbench-2/Math", "-".join(m), share, 4) for m, share in pairs.items()]
    assert bm.score("rewardbench-2", outcomes)["subsets"]["Math"] is None
    ties = [bm.Outcome("Ties/1", "rewardbench-2/Ties", "ref:0-1", 0.0, 2, (1.0, 0.0))]
    needs = "Ties, and so the average, needs scores: eval.py run --scalar or --pointwise"
    partial = "1 items are not judged completely: left out"
    assert bm.gaps("rewardbench-2", outcomes)[1:] == [needs, partial]
    assert bm.gaps("rewardbench-2", [*outcomes, *ties])[1:] == [partial]


def test_margins_are_added_in_the_order_of_the_prompts_as_the_authors_add_them():
    """To the last digit; the shares of other slots in the order of the log."""
    rng = random.Random(0)
    known = {f"Ties/{n:09d}": (([rng.random()], [0.0]), ([rng.random(), rng.random()], [0.0])) for n in range(400)}
    outcomes = [bm.Outcome(item, "rewardbench-2/Ties", slot, 0.0, 2, (score, 0.0))
                for item, (ref, tied) in rng.sample(sorted(known.items()), 400)
                for slot, score in (("ref:0-1", ref[0][0]), ("tied:0-2", tied[0][0]), ("tied:1-2", tied[0][1]))]
    right, total = bm.count(outcomes)["rewardbench-2/Ties"]["margin"]
    assert right == np.sum([rb2.ties(*both)["margin"][0] for both in known.values()]) and total == 400
    shares = [rng.random() for _ in range(400)]
    listed = [bm.Outcome(f"x/{i}", "x", "", share) for i, share in enumerate(shares)]
    assert bm.count(listed)["x"][""] == (sum(shares), 400)


class Known:
    """A scalar model."""

    def __init__(self, score_of):
        self.score_of = score_of

    def score(self, context, response):
        return self.score_of(context[-1]["content"], response)


def test_scores_share_a_point_among_the_highest_and_rate_ties(tmp_path):
    """Math: alone at the top, one of two, beaten. Ties: the right ones differ by 1, the gaps are 2 (ref) and 3."""
    rows = [four(1), four(2), four(3), several("ref", 7, 1, 2), several("tied", 7, 2, 3)]
    tops = {"bad 2 1": 5.0, "bad 3 2": 6.0, "good 0": 4.0, "good 1": 5.0, "bad 0": 1.0, "bad 1": 1.0, "bad 2": 0.0}

    def score(prompt, text):
        if "ref" in prompt and text == "bad 1":
            return 2.0
        return tops.get(text, 5.0 if text.startswith("good") else 0.0)

    _, table = run(tmp_path, rows, Known(score), scalar=True)
    assert table["subsets"]["Math"] == pytest.approx((1 + 0.5 + 0) / 3)
    margin = math.tanh(2 / 1 - 1)
    assert table["ties"] == pytest.approx({"tied": 1, "ref": 1, "preferred": 1, "hard": 1, "margin": margin})
    assert table["subsets"]["Ties"] == pytest.approx(0.3 + 0.3 + 0.2 + 0.2 + 0.01 * margin)


def test_a_prompt_that_is_too_long_for_a_scalar_model_is_wrong(tmp_path):
    _, table = run(tmp_path, [four(1), four(2)], Known(lambda p, text: None if text == "bad 1 2" else len(text)),
                   scalar=True)
    assert table["subsets"]["Math"] == 0.0
    both = Known(lambda p, text: None if text == "bad 1 2" else 9.0 if "good" in text else 1.0)
    (tmp_path / "b").mkdir()
    assert run(tmp_path / "b", [four(1), four(2)], both, scalar=True)[1]["subsets"]["Math"] == 0.5


@pytest.mark.parametrize(("ref", "tied", "cells"), [
    (([1.0], [0.0]), None, {"ref": (1.0, 1.0)}),
    (([1.0], [1.0]), None, {"ref": (0.0, 1.0)}),
    # spread 0: infinitely far apart, but for a gap of 0, which counts as 0
    (([1.0], [0.0]), ([2.0, 2.0], [0.0]),
     {"ref": (1.0, 1.0), "tied": (1.0, 1.0), "preferred": (1.0, 1.0), "hard": (1.0, 1.0), "margin": (1.0, 1.0)}),
    (([1.0], [1.0]), ([2.0, 2.0], [0.0]),
     {"ref": (0.0, 1.0), "tied": (1.0, 1.0), "preferred": (1.0, 1.0), "hard": (0.0, 1.0), "margin": (0.0, 1.0)}),
    (([1.0], [0.5]), ([4.0, 2.0], [1.0]),  # gaps 0.5 and 1, spread 2
     {"ref": (1.0, 1.0), "tied": (1.0, 1.0), "preferred": (0.0, 1.0), "hard": (0.0, 1.0),
      "margin": (pytest.approx(math.tanh(-0.75)), 1.0)}),
])
def test_ties_by_hand(ref, tied, cells):
    assert rb2.ties(ref, tied) == cells


def test_a_table_of_scores_is_read_too(tmp_path):
    rows = [{"subset": subset, "id": "1", "scores": [2.0, 1.0, 0.0, 2.0]} for subset in rb2.SUBSETS[:5]]
    rows += [{"subset": "Ties", "id": f"{kind}:3", "scores": [[3.0], [2.5], [1.0]], "num_correct": right}
             for kind, right in (("ref", 1), ("tied", 2))]
    result = ev.score(ev.Score(benchmark="rewardbench-2", log=(write(tmp_path / "outcomes.jsonl", rows),)))
    assert result["table"]["subsets"]["Focus"] == 0.5 and result["table"]["overall"]["average"] is not None
    for scores in ([], [1.0], ["a", 1.0], 3):
        with pytest.raises(UserError, match="'scores' must be"):
            read_outcomes("rewardbench-2", [("x:1", rows[0] | {"scores": scores})])


@pytest.mark.parametrize(("row", "words"), [
    (four(1) | {"subset": "Chat"}, "is none of rewardbench-2's"), (four(1) | {"chosen": []}, "'chosen' must be"),
    (four(1) | {"chosen": ["a", "b"]}, "only Ties has several"), (several("both", 1, 2, 2), "'both:1'$"),
    (several("x" * 99, 1, 2, 2), "must be ref: or tied: and a number, found 'x{40}'$")])
def test_rows_that_are_none(tmp_path, row, words):
    with pytest.raises(UserError, match=words):
        bm.load_benchmark("rewardbench-2", write(tmp_path / "rows.jsonl", [row]))


def test_a_judge_of_single_responses_fills_the_whole_table(tmp_path):
    """--pointwise: the mean of the chains that can be read, once for each response."""

    class Boxes:
        asked = 0

        def chat(self, conversations, n, temperature, max_tokens, seeds):
            self.asked += n * len(conversations)
            return [[Reply("\\boxed{9}" if "good" in c[-1]["content"] else "\\boxed{3}", "stop", 9, 5)] * n
                    for c in conversations]

    boxes = Boxes()
    rows = [*(four(1, subset) for subset in rb2.SUBSETS[:5]), several("ref", 1, 1, 2), several("tied", 1, 2, 2)]
    _, table = run(tmp_path, rows, boxes, pointwise=True, votes=2, temperature=1.0)
    assert table["subsets"]["Factuality"] == 1.0 and table["overall"]["average"] == pytest.approx((5 + 1.01) / 6)
    assert boxes.asked == 2 * (4 + 3 + 4), "equal questions and responses are asked once"


def test_scores_that_cannot_be_read_are_wrong_and_said(tmp_path):
    class Mute:
        def chat(self, conversations, n, temperature, max_tokens, seeds):
            texts = ["hm" if "good" in c[-1]["content"] else "\\boxed{3}" for c in conversations]
            return [[Reply(text, "stop", 9, 5)] for text in texts]

    summary, table = run(tmp_path, [four(1)], Mute(), pointwise=True)
    assert table["subsets"]["Math"] == 0.0 and summary["silent"] == {"no readable score": 3}


# ---- JudgeBench, RMB, limits ---------------------------------------------------------------------------


def judgebench_row(number, source="mmlu-pro-law", label="A>B"):
    return {"pair_id": f"p{number}", "source": source, "question": f"q{number}?", "response_A": "good" if label == "A>B"
            else "bad", "response_B": "bad" if label == "A>B" else "good", "label": label}


def test_judgebench_counts_the_votes_of_both_orders(tmp_path):
    """p0 right twice, p1 right once and silent, p2 right once and wrong once, p3 silent, p4 wrong once."""
    rows = [judgebench_row(n, label="AB"[n % 2] + ">" + "BA"[n % 2]) for n in range(5)]
    rows += [judgebench_row(5, "livecodebench")]
    pairs = bm.load_benchmark("judgebench", write(tmp_path / "rows.jsonl", rows))
    said = {"p0": "++", "p1": "+0", "p2": "+-", "p3": "00", "p4": "-0", "p5": "++"}
    log = []
    for pair in pairs:
        assert {pair.response_a, pair.response_b} == {"good", "bad"} and pair.source == "judgebench"
        assert (pair.response_a == "good") == (pair.winner == "A")
        for order, vote in zip(("AB", "BA"), said[pair.pair_id], strict=True):
            shown = pair if order == "AB" else swap(pair)
            verdict = {"+": shown.winner, "-": swap(shown).winner, "0": None}[vote]
            log.append(("log:1", asdict(Judgement(pair.pair_id, pair.source, pair.category, dict(pair.meta), order, 0,
                                                  verdict, shown.winner, vote == "+", "stop", 5, ""))))
    table = bm.score("judgebench", read_outcomes("judgebench", log)[0])
    assert table["sections"] == {"Knowledge": 2 / 5, "Reasoning": None, "Math": None, "Coding": 1.0}
    assert table["overall"]["accuracy"] == 3 / 6
    with pytest.raises(UserError, match=r"'label' must be A>B or B>A, found 'x{40}'$"):
        bm.load_benchmark("judgebench", write(tmp_path / "bad.jsonl", [judgebench_row(1) | {"label": "x" * 99}]))


def test_judgebench_is_run_in_both_orders(tmp_path):
    sampler = Reads(lambda text: text == "good")
    _, table = run(tmp_path, [judgebench_row(n) for n in range(3)], sampler, "judgebench")
    assert len(sampler.seen) == 6 and table["overall"]["accuracy"] == 1.0


def test_losers_with_equal_texts_all_count_in_whatever_order_they_come():
    path = "BoN_set/Harmlessness/S1"
    rows = [{"category_path": path, "bon_uid": "1", "results": right, "text_rejected": text}
            for right, text in (("1", "a"), ("0", "a"), ("1", "b"))]
    for listed in (rows, rows[::-1]):
        outcomes, remarks = read_outcomes("rmb", [(f"log.json: item {i}", row) for i, row in enumerate(listed)])
        table = bm.score("rmb", outcomes)
        assert table["parts"]["BoN Harmlessness"] == 0.0
        assert not remarks
    twice = [(f"{file}:{i}", row) for file in ("one.json", "two.json") for i, row in enumerate(rows)]
    assert read_outcomes("rmb", twice)[1] == ["3 verdicts came twice and count once"]


def test_a_limit_is_spread_over_the_subsets_in_whole_items(tmp_path):
    rows = [four(n, "Math") for n in range(60)] + [four(n, "Focus") for n in range(20)] + [four(1, "Safety")]
    pairs = bm.load_benchmark("rewardbench-2", write(tmp_path / "rows.jsonl", rows))
    taken = bm.take("rewardbench-2", pairs, 48)
    items = {subset: len({p.meta["item"] for p in taken if p.meta["subset"] == subset}) for subset in
             ("Math", "Focus", "Safety")}
    assert items == {"Math": 6, "Focus": 2, "Safety": 1} and len(taken) == 6 * 9
    assert bm.take("rewardbench-2", pairs, 0) == bm.take("rewardbench-2", pairs, 10_000) == pairs
    assert bm.take("pairs", pairs, 5) == pairs[:5] and len(bm.take("rewardbench-2", pairs, 1)) == 3 * 6
