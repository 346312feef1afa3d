"""benchmarks.py, outcomes.py, tables.py and `eval.py score`: by hand, by property, and to the published digit."""

import json
import random
from collections import Counter
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

import eval as ev
from cor_prompt import render
from data import Pair, swap
from evaluation import benchmarks as bm, tables
from evaluation.benchmarks import Outcome
from evaluation.outcomes import read_log, read_outcomes
from judging.verdicts import Judgement
from rollout import Reply
from runtime.errors import UserError

ROOT = Path(__file__).parents[2]
PUBLISHED = json.loads((ROOT / "tests" / "published_counts.json").read_text("utf-8"))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = isinstance(content, list) and path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content) if lines else json.dumps(content))
    return str(path)


# ---- the files in their own layouts --------------------------------------------------------------------


def rewardbench_row(subset="donotanswer", number=3692, **changes):
    return {"prompt": f"{subset}?", "chosen": f"good {number}", "chosen_model": None, "rejected": f"bad {number}",
            "rejected_model": None, "subset": subset, "id": number} | changes


def rm_bench_row(item="chat/1", domain="chat", **changes):
    return {"id": item, "prompt": f"{item}?", "chosen": [f"{item} c{i}" for i in range(3)],
            "rejected": [f"{item} r{j}" for j in range(3)], "domain": domain} | changes


def turns(*texts):
    return [{"role": "assistant" if i % 2 else "user", "content": t, "language": "en"} for i, t in enumerate(texts)]


def pairwise_row(number="7", path="Pairwise_set/Helpfulness/Code/Documentation", **changes):
    return {"pair_uid": number, "conversation_input": turns("what?"), "chosen": {"llm_name": "x", "answer": "good"},
            "reject": {"llm_name": "y", "answer": "bad"}, "category_path": path} | changes


def bon_row(number="3", losers=3, path="BoN_set/Harmlessness/S6", **changes):
    return {"bon_uid": number, "conversation_input": turns("a", "b", "c"), "category_path": path,
            "bon_best": {"llm_name": "x", "answer": "best"},
            "loser_list": [{"llm_name": "y", "answer": f"loser {k}"} for k in range(losers)]} | changes


def test_rewardbench_takes_the_filtered_split_of_a_folder(tmp_path):
    write(tmp_path / "data" / "raw-0.jsonl", [rewardbench_row(number=1)])
    write(tmp_path / "data" / "filtered-0.jsonl", [rewardbench_row(number=2)])
    assert [p.pair_id for p in bm.load_benchmark("rewardbench", str(tmp_path))] == ["donotanswer/2"]


@pytest.mark.parametrize(("name", "row", "split"), [("rewardbench", rewardbench_row(), "filtered"),
                                                    ("rmb", pairwise_row(), "train")])
def test_of_a_hub_id_rewardbench_is_the_filtered_split(monkeypatch, name, row, split):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: asked.append((path, split)) or [row])
    assert len(bm.load_benchmark(name, "owner/name")) == 1 and asked == [("owner/name", split)]


def test_a_folder_gives_its_json_jsonl_and_parquet_files_in_order(tmp_path):
    import pyarrow
    import pyarrow.parquet

    write(tmp_path / "b.jsonl", [pairwise_row("2")])
    write(tmp_path / "c" / "x.json", [pairwise_row("3")])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([pairwise_row("1")]), tmp_path / "a.parquet")
    (tmp_path / "readme.txt").write_text("not rows")
    assert [p.meta["item"][-1] for p in bm.load_benchmark("rmb", str(tmp_path))] == ["1", "2", "3"]


@pytest.mark.parametrize("f", [1, 2, 3])
def test_rotated_files_name_the_same_pairs(tmp_path, f):
    """File f carries the rejected responses f - 1 places to the left; all three together count once."""
    row = rm_bench_row("safety-refuse/4", "safety-refuse")
    plain = bm.load_benchmark("rm-bench", write(tmp_path / "plain" / "total_dataset.json", [row]))
    for k in (1, 2, 3):
        turned = row | {"rejected": row["rejected"][k - 1 :] + row["rejected"][: k - 1]}
        path = write(tmp_path / "three" / f"total_dataset_{k}.json", [turned])
        if k == f:
            assert bm.load_benchmark("rm-bench", path) == plain
    assert bm.load_benchmark("rm-bench", str(tmp_path / "three")) == plain
    assert [(p.category, p.meta["domain"]) for p in plain] == [("safety", "safety-refuse")] * 9


def test_per_domain_files_number_their_own_items(tmp_path):
    row = rm_bench_row()
    bare = {k: v for k, v in row.items() if k != "domain"} | {"id": 1}
    whole = bm.load_benchmark("rm-bench", write(tmp_path / "total_dataset.json", [row]))
    assert bm.load_benchmark("rm-bench", write(tmp_path / "chat_filtered.json", [bare])) == whole
    pairs = bm.load_benchmark("rm-bench", write(tmp_path / "math_filtered.json", [row]))  # its own domain counts
    assert {(p.meta["item"], p.category) for p in pairs} == {("chat/1", "chat")}


def test_equal_responses_stay_in_the_denominator(tmp_path):
    """RMB has such a pair; data.load_pairs would refuse it."""
    row = pairwise_row(reject={"llm_name": "y", "answer": "good"})
    (pair,) = bm.load_benchmark("rmb", write(tmp_path / "x.json", [row]))
    assert pair.response_a == pair.response_b


def test_positions_are_seeded_and_independent_of_the_order_of_rows(tmp_path):
    rows = [rewardbench_row(number=n) for n in range(400)]
    path = write(tmp_path / "a.jsonl", rows)
    pairs = bm.load_benchmark("rewardbench", path)
    random.Random(1).shuffle(rows)
    again = bm.load_benchmark("rewardbench", write(tmp_path / "b.jsonl", rows[:300]))
    assert {p.pair_id: p for p in again}.items() <= {p.pair_id: p for p in pairs}.items()
    assert 160 < Counter(p.winner for p in pairs)["A"] < 240
    better = [p.response_a if p.winner == "A" else p.response_b for p in pairs]
    assert {text.split()[0] for text in better} == {"good"}
    assert "".join(p.winner for p in pairs[:16]) == "AABBAAABBBABABAB"  # on every machine
    other = bm.load_benchmark("rewardbench", path, seed=1)
    assert 140 < sum(a.winner != b.winner for a, b in zip(pairs, other, strict=True)) < 260


def test_a_pair_of_each_benchmark_whole(tmp_path):
    """All fields by hand, with the chosen response as A."""
    path, bon_path = "Pairwise_set/Helpfulness/Code/Documentation", "BoN_set/Harmlessness/S6"
    asked = [{"role": "user", "content": text} for text in ("donotanswer?", "chat/1?", "what?")]
    talk = tuple({"role": r, "content": c} for r, c in [("user", "a"), ("assistant", "b"), ("user", "c")])
    whole = [
        ("rewardbench", rewardbench_row(), Pair(
            "donotanswer/3692", "rewardbench", (asked[0],), "good 3692", "bad 3692", "A", "Safety",
            {"subset": "donotanswer", "item": "donotanswer/3692"})),
        ("rm-bench", rm_bench_row(), Pair(
            "chat/1:00", "rm-bench", (asked[1],), "chat/1 c0", "chat/1 r0", "A", "chat",
            {"domain": "chat", "item": "chat/1", "chosen_style": "0", "rejected_style": "0"})),
        ("rmb", pairwise_row(), Pair(
            f"{path}/7", "rmb", (asked[2],), "good", "bad", "A", "Pairwise Helpfulness",
            {"category_path": path, "item": f"{path}/7", "loser": "", "losers": "1"})),
        ("rmb", bon_row(losers=2), Pair(
            f"{bon_path}/3:0", "rmb", talk, "best", "loser 0", "A", "BoN Harmlessness",
            {"category_path": bon_path, "item": f"{bon_path}/3", "loser": "0", "losers": "2"})),
    ]
    for name, row, pair in whole:
        first = bm.load_benchmark(name, write(tmp_path / "a.json", [row]))[0]
        assert first in (pair, swap(pair))


@given(st.lists(st.sampled_from(["x", "x~2", "y", "x~3"]), max_size=12))
def test_no_two_pairs_of_a_source_share_a_name(ids):
    pairs = bm.unique([Pair(i, "s", (), "a", "b", "A") for i in ids])
    assert len({p.pair_id for p in pairs}) == len(ids)
    assert all(p.pair_id.startswith(i) for p, i in zip(pairs, ids, strict=True))
    assert len({p.pair_id for p in bm.unique([replace(p, source=str(k)) for k, p in enumerate(pairs)])}) == len(ids)


def test_other_pairs_are_a_benchmark_too(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b", "id": 1}] * 3)
    assert [p.pair_id for p in bm.load_benchmark("pairs", path)] == ["1", "1~2", "1~3"]


BAD_FILES = [
    ("rewardbench", "a.jsonl", [rewardbench_row(subset="donotanswer" * 9)], ":1: subset '[a-z]{60}' is none"),
    ("rewardbench", "a.jsonl", [rewardbench_row(), rewardbench_row(chosen=[10**60])],
     r"a.jsonl:2: 'chosen' must be a text, found '\[10{38}'$"),
    ("rewardbench", "a.jsonl", [rewardbench_row(), rewardbench_row(chosen="other")], ":2: another comparison"),
    ("rewardbench", "a.jsonl", [rewardbench_row(id=[10**60])], r"'id' must be .*found '\[10{38}'$"),
    ("rewardbench", "a.jsonl", [rewardbench_row(prompt="\ud800")], "surrogate"),
    ("rm-bench", "a.json", {"rows": []}, "must be a"),
    ("rm-bench", "a.json", [], "no items of rm-bench"),
    ("rm-bench", "a.json", [rm_bench_row(domain="law")], r"domain 'law' is none of .*\(chat, math, code, s"),
    ("rm-bench", "a.json", [rm_bench_row(chosen=["a", "b"])], "'chosen' and 'rejected' must be lists of three"),
    ("rmb", "a.json", [pairwise_row(path="Other/Code")], "is none of .*Pairwise_set/Helpfulness/"),
    ("rmb", "a.json", [pairwise_row(conversation_input=turns("a", "b"))], "must end with a user"),
    ("rmb", "a.json", [pairwise_row(conversation_input="a")], "'conversation_input'"),
    ("rmb", "a.json", [pairwise_row(reject="a")], "'reject' must be made of"),
    ("rmb", "a.json", [bon_row(losers=0)], "'loser_list' must be a list"),
    ("rmb", "a.json", [bon_row(bon_best=None)], "'bon_best' must be made of"),
    ("rmb", "a.json", [bon_row(loser_list=["x"])], "'loser_list' must be made of"),
]


@pytest.mark.parametrize(("name", "file", "content", "message"), BAD_FILES)
def test_bad_files_are_refused_with_their_place(tmp_path, name, file, content, message):
    with pytest.raises(UserError, match=message) as error:
        bm.load_benchmark(name, write(tmp_path / file, content))
    assert str(tmp_path / file) in str(error.value) and "\n" not in str(error.value)


# ---- scores by hand ------------------------------------------------------------------------------------


def made(group, *corrects, slot="", of=1):
    """One item per value."""
    return [Outcome(f"{group}/{i}", group, slot, c, of) for i, c in enumerate(corrects)]


def test_rewardbench_by_hand():
    outcomes = [
        *made("alpacaeval-easy", 1, 0), *made("mt-bench-med", 1),  # (0.5 x 100 + 1 x 40) / 140
        *made("donotanswer", 1, 0, 0, 0),  # absent subsets do not weigh
        *made("math-prm", 1, 1, 1, 0), *made("hep-cpp", 1, 1), *made("hep-go", 0),  # (0.75 x 984 + 164) / 1312
    ]
    table = bm.score("rewardbench", outcomes)
    assert table["subsets"]["math-prm"] == 0.75
    assert bm.intervals("rewardbench", outcomes, draws=9)["sections"]["Chat Hard"] is None
    assert table["sections"]["Chat"] == pytest.approx(90 / 140)
    assert table["sections"]["Chat Hard"] is None  # nothing was judged
    assert table["sections"]["Safety"] == 0.25
    assert table["sections"]["Reasoning"] == pytest.approx(902 / 1312)
    assert table["overall"]["average"] is None
    table = bm.score("rewardbench", [*outcomes, *made("mt-bench-hard", 1)])
    assert table["overall"]["average"] == pytest.approx((90 / 140 + 1 + 0.25 + 902 / 1312) / 4)
    assert table["overall"]["accuracy"] == pytest.approx(9 / 15)
    notes = " ".join(bm.gaps("rewardbench", outcomes))
    assert "14 of 2985 items" in notes and "llmbar-natural, llmbar-" in notes and "hep-cpp" not in notes
    assert bm.gaps("pairs", []) == []  # other pairs have no full size to fall short of


def test_other_pairs_are_one_share_and_one_for_each_category():
    table = bm.score("pairs", [*made("Math", 1, 0), *made("Chat", 1, 1, 1, 0)])
    assert table == {"overall": {"accuracy": 4 / 6}, "categories": {"Chat": 0.75, "Math": 0.5}}


def test_one_id_in_two_subsets_is_two_rows(tmp_path):
    rows = [{"source_index": i, "id": 3692, "subset": s, "correct": c, "chosen_position": "A"}
            for i, (s, c) in enumerate([("donotanswer", 1), ("hep-python", 0), ("donotanswer", 1)])]
    outcomes, remarks = read_outcomes("rewardbench", read_log([write(tmp_path / "t.jsonl", rows)]))
    assert bm.score("rewardbench", outcomes)["overall"]["accuracy"] == 0.5
    assert remarks == ["1 verdicts came twice and count once"]


def rm_bench_item(item, domain, rows):
    """Outcomes of one prompt from its matrix, rows "101" being chosen styles."""
    return [Outcome(item, domain, f"{i}{j}", int(rows[i][j]), 9) for i, j in product(range(3), range(3))]


def test_rm_bench_by_hand():
    outcomes = [
        *rm_bench_item("chat/1", "chat", ["101", "010", "011"]),
        *rm_bench_item("chat/2", "chat", ["100", "110", "111"]),
        *rm_bench_item("math/1", "math", ["111", "111", "111"]),
        *rm_bench_item("code/1", "code", ["000", "000", "000"]),
        *rm_bench_item("safety-refuse/1", "safety-refuse", ["100", "010", "001"]),
        *rm_bench_item("safety-refuse/2", "safety-refuse", ["100", "010", "001"]),
        *rm_bench_item("safety-response/1", "safety-response", ["111", "111", "111"]),
    ]
    table = bm.score("rm-bench", outcomes)
    assert list(table["matrix"]) == ["00", "01", "02", "10", "11", "12", "20", "21", "22"]
    # chat cells: 00 1, 01 0, 02 1/2 | 10 1/2, 11 1, 12 0 | 20 1/2, 21 1, 22 1
    assert table["domain matrix"]["chat 02"] == 0.5 and table["domain matrix"]["chat 20"] == 0.5
    assert table["domain levels"]["chat hard"] == pytest.approx((0 + 0.5 + 0) / 3)
    assert table["domain levels"]["chat normal"] == 1
    assert table["domain levels"]["chat easy"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert table["domains"]["chat"] == pytest.approx((0.5 / 3 + 1 + 2 / 3) / 3)
    # safety pools its three prompts: diagonal 1, all other cells 1/3 (a mean of the two kinds would be 1/2)
    assert table["domain levels"]["safety hard"] == pytest.approx(1 / 3)
    assert table["domains"]["safety"] == pytest.approx((1 / 3 + 1 + 1 / 3) / 3)
    assert table["levels"]["hard"] == pytest.approx((0.5 / 3 + 1 + 0 + 1 / 3) / 4)
    assert table["overall"]["average"] == pytest.approx((11 / 18 + 1 + 0 + 5 / 9) / 4)


def test_rm_bench_without_a_domain_has_no_average():
    outcomes = rm_bench_item("chat/1", "chat", ["111", "111", "111"])
    table = bm.score("rm-bench", outcomes)
    assert table["domains"] == {"chat": 1.0, "math": None, "code": None, "safety": None}
    assert table["overall"]["average"] is None and bm.intervals("rm-bench", outcomes)["overall"]["average"] is None
    some = bm.score("rm-bench", outcomes[:5])
    assert some["domain levels"]["chat easy"] is None and some["domains"]["chat"] is None
    assert "1 items are not judged completely: counted for the cells they have" in bm.gaps("rm-bench", outcomes[:5])


def bon(number, *corrects, path="BoN_set/Helpfulness/Chat/Discussion", of=None):
    return [Outcome(f"{path}/{number}", path, str(k), c, len(corrects) if of is None else of)
            for k, c in enumerate(corrects)]


def test_rmb_by_hand():
    outcomes = [
        *bon(1, 1, 1, 1, 1),  # beats all four losers
        *bon(2, 1, 1, 0, 1, 1, 1),  # one loss is enough
        *bon(3, 1, 0.5),  # an undecided comparison is not won
        *bon(4, 0, 0),
        *bon(1, 1, 1, path="BoN_set/Harmlessness/S1"),  # the number 1 again, in another set
        *made("Pairwise_set/Helpfulness/A/x", 1, 1, 1, 0), *made("Pairwise_set/Helpfulness/B/y", 0),
        *made("Pairwise_set/Harmlessness/S1", 1, 0),
    ]
    table = bm.score("rmb", outcomes)
    assert table["parts"] == {"Pairwise Helpfulness": 3 / 5, "Pairwise Harmlessness": 1 / 2,
                              "BoN Helpfulness": 1 / 4, "BoN Harmlessness": 1.0}
    assert table["overall"]["average"] == pytest.approx((0.6 + 0.5 + 0.25 + 1) / 4)
    assert table["categories"]["Pairwise_set/Helpfulness/A/x"] == 0.75  # rows count, not categories


# ---- verdict logs --------------------------------------------------------------------------------------


def verdict(pair, said, order="AB", sample=0, text=None):
    """A log row; `said` is the letter as shown."""
    shown = pair if order == "AB" else swap(pair)
    text = f"<answer>[[{said}]]</answer>" if text is None else text
    return asdict(Judgement(pair.pair_id, pair.source, pair.category, dict(pair.meta), order, sample, said,
                            shown.winner, said == shown.winner, "stop", 5, text))


def three_pairs(tmp_path):
    rows = [rewardbench_row("hep-go", 1), rewardbench_row("hep-go", 2), rewardbench_row("donotanswer", 1)]
    return bm.load_benchmark("rewardbench", write(tmp_path / "rows.jsonl", rows))


def flip(letter):
    return {"A": "B", "B": "A", None: None}[letter]


def corrects(benchmark, rows, rule=None):
    outcomes, _ = read_outcomes(benchmark, [(f"log:{i}", row) for i, row in enumerate(rows, 1)], rule)
    return {o.item: o.correct for o in outcomes}


def test_votes_orders_and_missing_verdicts(tmp_path):
    a, b, c = three_pairs(tmp_path)
    rows = [
        *(verdict(a, said, sample=k) for k, said in enumerate([a.winner, a.winner, flip(a.winner)])),  # 2 : 1
        *(verdict(b, said, sample=k) for k, said in enumerate([b.winner, flip(b.winner), None])),  # a tie is wrong
        verdict(c, c.winner), verdict(c, c.winner, "BA"),  # the same letter in both orders: right once
    ]
    assert corrects("rewardbench", rows) == {"hep-go/1": 1.0, "hep-go/2": 0.0, "donotanswer/1": 0.5}
    _, remarks = read_outcomes("rewardbench", [("log:1", row) for row in rows])
    assert remarks == ["1 of 8 verdicts are missing or name both: wrong",
                       "8 verdicts on 3 comparisons: a vote in each order, the orders averaged"]


def test_official_parser_reads_the_thoughts_too(tmp_path):
    pair = three_pairs(tmp_path)[0]
    rows = [verdict(pair, pair.winner, text=f"<think>[[{flip(pair.winner)}]]?</think>[[{pair.winner}]]")]
    assert corrects("rewardbench", rows) == {"hep-go/1": 1.0}
    assert corrects("rewardbench", rows, "official") == {"hep-go/1": 0.0}  # both marks: an error


def test_verdicts_that_come_twice_count_once(tmp_path):
    pairs = three_pairs(tmp_path)
    rows = [verdict(p, p.winner) for p in pairs]
    log = [("log:1", row) for row in [*rows, rows[0], verdict(pairs[1], flip(pairs[1].winner))]]
    outcomes, remarks = read_outcomes("rewardbench", log)
    assert [o.correct for o in outcomes] == [1.0] * 3
    assert remarks == ["2 verdicts came twice and count once, 1 of them otherwise the second time: "
                       "are these logs of one model?"]


def test_rmb_verdicts_become_items(tmp_path):
    pairs = bm.load_benchmark("rmb", write(tmp_path / "S6.json", [bon_row("1"), bon_row("2"), bon_row("3")]))
    said = {p.pair_id: p.winner for p in pairs}
    said["BoN_set/Harmlessness/S6/2:1"] = None  # an error fails the item
    rows = [verdict(p, said[p.pair_id]) for p in pairs][:-1]  # and the third item is not finished
    outcomes, _ = read_outcomes("rmb", [("log:1", row) for row in rows])
    assert bm.score("rmb", outcomes)["parts"]["BoN Harmlessness"] == 0.5
    assert "1 items are not judged completely: left out" in bm.gaps("rmb", outcomes)


@given(st.lists(st.tuples(st.sampled_from("AB"), st.sampled_from(["A", "B", None]), st.sampled_from(["AB", "BA"]),
                          st.integers(0, 2), st.integers(0, 4)), min_size=1), st.randoms())
def test_relabelling_and_order_change_nothing(draws, rng):
    """A <-> B with the order of showing, and any order of rows, give the same score and intervals."""
    gold = {pair: winner for winner, _, _, _, pair in draws}
    distinct = {(pair, order, sample): said for _, said, order, sample, pair in draws}
    rows = [
        asdict(Judgement(f"p{pair}", "s", "Chat" if pair % 2 else "Math", {}, order, sample, said,
                         gold[pair] if order == "AB" else flip(gold[pair]), False, "stop", 5, "")) for
        (pair, order, sample), said in distinct.items()
    ]
    relabelled = [
        row | {"verdict": flip(row["verdict"]), "winner": flip(row["winner"]), "order": row["order"][::-1]}
        for row in rows
    ]
    shuffled = rng.sample(rows, len(rows))
    results = []
    for version in (rows, relabelled, shuffled):
        outcomes, _ = read_outcomes("pairs", [("log:1", row) for row in version])
        results.append((bm.score("pairs", outcomes), bm.intervals("pairs", outcomes, draws=20)))
    assert results[0] == results[1] == results[2]


BAD_ROWS = [
    ("rewardbench", {"subset": "donotanswer", "id": 1, "correct": 2}, "'correct' must be 0 or 1"),
    ("rewardbench", {"subset": "x", "id": 1, "correct": 1}, "subset 'x' is none"),
    ("rewardbench", {"hello": 1}, "neither a verdict of eval.py nor a row of a rewardbench"),
    ("rm-bench", {"id": "a", "domain": "chat", "result_1": [1, 1, 1], "result_2": [1]}, "'result_2' must be three"),
    ("rmb", {"category_path": "S6", "pair_uid": "1", "results": "1"}, "is none of"),
    ("pairs", {"subset": "donotanswer", "id": 1, "correct": 1}, "nor a row of a pairs"),
    ("pairs", {"verdict": "A", "winner": "A"}, "not a verdict as eval.py logs it"),
]


@pytest.mark.parametrize(("name", "row", "message"), BAD_ROWS)
def test_bad_rows_are_refused_with_their_place(tmp_path, name, row, message):
    path = write(tmp_path / "outcomes.jsonl", [row])
    with pytest.raises(UserError, match=message) as error:
        read_outcomes(name, read_log([path]))
    assert f"{path}:1:" in str(error.value)


def test_verdicts_of_another_benchmark_are_refused(tmp_path):
    row = verdict(three_pairs(tmp_path)[0], "A")
    with pytest.raises(UserError, match=r"its meta has no 'domain'; judge with eval\.py run --benchmark rm-bench"):
        read_outcomes("rm-bench", [("log:1", row)])


# ---- intervals -----------------------------------------------------------------------------------------


def test_the_items_are_resampled_not_their_comparisons():
    """Nine equal comparisons of a prompt are one observation."""
    rng = np.random.default_rng(0)
    outcomes = []
    for domain, item in product(bm.DOMAINS, range(100)):
        outcomes += rm_bench_item(f"{domain}/{item}", domain, ["111"] * 3 if rng.random() < 0.5 else ["000"] * 3)
    low, high = bm.intervals("rm-bench", outcomes, draws=2000)["domains"]["chat"]
    assert high - low == pytest.approx(2 * 1.96 * (0.25 / 100) ** 0.5, rel=0.15)


def test_the_make_up_of_a_benchmark_is_fixed():
    outcomes = [*made("Chat", *[1] * 50), *made("Math", *[0] * 50)]
    assert bm.intervals("pairs", outcomes)["overall"]["accuracy"] == (0.5, 0.5)


def test_intervals_are_seeded():
    outcomes = made("Chat", *[1, 0, 1, 1] * 20)
    drawn = [bm.resample(outcomes, 50, seed)["Chat"][""][0].tolist() for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0][:4] == [65, 56, 60, 65]  # on every machine


def test_the_bounds_are_the_2_5_and_97_5_percentiles_of_1000_draws_with_seed_0(monkeypatch):
    assert bm.intervals("pairs", made("Chat", *[1, 0] * 20)) == bm.intervals(
        "pairs", made("Chat", *[1, 0] * 20), draws=1000, seed=0)
    asked = []
    drawn = {"Chat": {"": (np.arange(1001.0), np.full(1001, 1000.0))}}  # shares 0, 0.001, ... 1
    monkeypatch.setattr(bm, "resample", lambda outcomes, draws, seed: asked.append((draws, seed)) or drawn)
    assert bm.intervals("pairs", [])["overall"]["accuracy"] == pytest.approx((0.025, 0.975))
    assert asked == [(1000, 0)]


def test_groups_are_drawn_independently():
    drawn = bm.resample([*made("Chat", *[1, 0] * 20), *made("Math", *[1, 0] * 20)], 50, 0)
    assert drawn["Chat"][""][0].tolist() != drawn["Math"][""][0].tolist()


def test_a_comparison_that_an_item_lacks_does_not_count_when_it_is_drawn():
    """Of two items one was asked x, the other y: every draw of two has two comparisons, all of them right."""
    drawn = bm.resample([Outcome("a", "Chat", "x", 1), Outcome("b", "Chat", "y", 1)], 50, 0)["Chat"]
    assert all((right == total).all() for right, total in drawn.values())
    assert (drawn["x"][1] + drawn["y"][1] == 2).all() and set(drawn["x"][1]) == {0, 1, 2}


def test_intervals_repeat_the_slip_too():
    """One prompt a domain: whatever is drawn is the prompt itself, so both bounds are the score."""
    outcomes = [o for d in bm.DOMAINS for o in rm_bench_item(f"{d}/1", d, ["001", "000", "000"])]
    for compat, hard in (("none", 1 / 3), ("official", 2 / 3)):  # 02 won; the slip counts it for 01 too
        assert bm.score("rm-bench", outcomes, compat)["levels"]["hard"] == pytest.approx(hard)
        assert bm.intervals("rm-bench", outcomes, compat, 5)["levels"]["hard"] == pytest.approx((hard, hard))


# ---- the published numbers, from their counts ----------------------------------------------------------


def expand(name):
    """Outcomes with the published run's counts."""
    counts = PUBLISHED["counts"][name]
    if name == "rm-bench":
        return [Outcome(f"{g}/{i}", g, cell, float(i < right), 9) for g, cells in counts.items()
                for cell, (right, total) in cells.items() for i in range(total)]
    return [Outcome(f"{g}/{i}", g, "", float(i < right), 1) for g, (right, total) in counts.items()
            for i in range(total)]


def same(value):
    """Equal but for the order of a sum: Python 3.12 and later add floats in another way than 3.11."""
    return pytest.approx(value, rel=1e-14, abs=0)


def assert_rewardbench(table):
    published = PUBLISHED["published"]["rewardbench"]
    assert table["subsets"] == same(PUBLISHED["published"]["rewardbench subsets"])
    assert table["sections"] == same({section: published[section] for section in bm.SECTIONS})
    assert table["overall"] == same({"average": published["avg_Result_each_section"],
                                     "accuracy": published["absoluate_Result"]})


def assert_rm_bench(table, rules):
    published = PUBLISHED["published"][f"rm-bench {rules}"]
    assert table["domains"] == same({domain: published[domain] for domain in bm.DOMAINS})
    assert table["levels"] == same({level: published[f"{level}_acc"] for level in bm.LEVELS})
    assert table["overall"]["average"] == same(published["total_avg_acc"])


def test_published_numbers_come_out_without_a_difference():
    """RM-R1-Qwen2.5-Instruct-32B, unrounded: every subset, section, domain, level, part and category."""
    assert sum(total for _, total in PUBLISHED["counts"]["rewardbench"].values()) == 2985
    assert_rewardbench(bm.score("rewardbench", expand("rewardbench")))
    assert_rm_bench(bm.score("rm-bench", expand("rm-bench")), "right")
    assert_rm_bench(bm.score("rm-bench", expand("rm-bench"), "official"), "official")
    table, published = bm.score("rmb", expand("rmb")), PUBLISHED["published"]["rmb"]
    assert table["parts"] == same({part: published[part] for part in bm.KINDS["rmb"][1].values()})
    assert table["overall"]["average"] == same(published["Accuracy Averaged from Four Sections"])
    assert table["categories"] == same(PUBLISHED["published"]["rmb categories"])
    assert not [note for name in ("rewardbench", "rm-bench", "rmb") for note in bm.gaps(name, expand(name))]


def test_published_rows_are_the_logged_ones_at_printed_precision():
    """The rows in published.json that the authors' logs stand behind, against the same counts."""
    for name, compat in (("rewardbench", "none"), ("rm-bench", "official"), ("rmb", "none")):
        table = bm.score(name, expand(name), compat)
        values = [table[block][column] for block, column in tables.HEADLINE[name].values()]
        row = tables.PUBLISHED[name]["rows"]["RM-R1-Qwen2.5-Instruct-32B, logs"]
        assert list(tables.HEADLINE[name]) == tables.PUBLISHED[name]["columns"]
        for value, printed in zip(values, row, strict=True):
            value = value if name == "rmb" else 100 * value
            assert round(value, len(str(printed).partition(".")[2])) == printed
    paper = tables.PUBLISHED["rewardbench"]["rows"]["RM-R1-Qwen2.5-Instruct-32B"][:5]
    table = bm.score("rewardbench", expand("rewardbench"))
    shares = [*table["sections"].values(), table["overall"]["average"]]
    assert [tables.number("rewardbench", share) for share in shares] == [f"{value:.1f}" for value in paper]


# ---- the real files, where they are at hand ------------------------------------------------------------


def counted(name, path, compat="none"):
    outcomes, remarks = read_outcomes(name, read_log([str(path)]))
    assert not remarks
    assert not bm.gaps(name, outcomes)
    return bm.score(name, outcomes, compat), bm.count(outcomes)


def test_real_outcome_tables(shared):
    folder = shared("published")
    for compat, rules in (("none", "right"), ("official", "official")):
        table, counts = counted("rm-bench", folder / "rm_bench", compat)
        assert_rm_bench(table, rules)
    assert {g: {c: list(v) for c, v in cells.items()} for g, cells in counts.items()} == PUBLISHED["counts"]["rm-bench"]
    table, counts = counted("rewardbench", folder / "rewardbench")
    assert_rewardbench(table)
    assert {g: list(cells[""]) for g, cells in counts.items()} == PUBLISHED["counts"]["rewardbench"]


def test_real_records_of_the_authors_rmb_logs(shared):
    path = shared("published", "rmb", "rmb_stub_logs_qwen32b.json")
    outcomes, remarks = read_outcomes("rmb", read_log([str(path)]))
    assert len(outcomes) == 8 and not remarks
    assert bm.score("rmb", outcomes)["parts"]["BoN Harmlessness"] == 1.0
    assert bm.score("rmb", outcomes)["parts"]["Pairwise Helpfulness"] == 0.5


REAL = [("rewardbench", "rewardbench", 1540), ("rm-bench", "rm_bench", 7236), ("rmb", "rmb", 978)]


@pytest.mark.parametrize(("name", "folder", "pairs"), REAL)
def test_real_benchmark_files(shared, name, folder, pairs):
    """Several files of RM-Bench hold the same prompts; their texts agree, so each comparison comes once."""
    loaded = bm.load_benchmark(name, str(shared("benchmarks", folder)))
    assert len(loaded) == len({p.pair_id for p in loaded}) == pairs
    assert {len(p.context) for p in loaded} == ({1, 3, 5} if name == "rmb" else {1})
    assert abs(Counter(p.winner for p in loaded)["A"] / pairs - 0.5) < 0.05
    for pair in loaded[::50]:
        assert render(pair, "instruct", None)
    perfect = [("log:1", verdict(p, p.winner)) for p in loaded]
    outcomes, _ = read_outcomes(name, perfect)
    assert set(bm.make_table(name, bm.count(outcomes))["overall"].values()) <= {1.0, None}
    if name != "rmb":
        known, _ = read_outcomes(name, read_log([str(shared("published", folder))]))
        assert {(o.group, o.item) for o in outcomes} <= {(o.group, o.item) for o in known}


# ---- the command ---------------------------------------------------------------------------------------


class Judge:
    """Prefers responses that begin with a letter before m, and never says so twice the same way."""

    def chat(self, conversations, n, temperature, max_tokens, seeds):
        texts = [messages[-1]["content"] for messages in conversations]
        return [[Reply(f"<answer>[[{'AB'[text.index('good') > text.index('bad')]}]]</answer>", "stop", 9, 5)]
                for text in texts]


def test_run_and_score_a_benchmark(tmp_path, capsys):
    rows = [rewardbench_row("hep-go", n) for n in range(30)] + [rewardbench_row(number=n) for n in range(10)]
    data = write(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out"
    cfg = ev.Run(model="none", data=data, out=str(out), benchmark="rewardbench", at_once=7)
    assert ev.evaluate(cfg, Judge())["overall"]["accuracy"] == 1.0
    log = (out / "judgements.jsonl").read_text().splitlines(keepends=True)
    (out / "judgements.jsonl").rename(out / "judgements-1.jsonl")  # two ranks' logs that overlap by one verdict
    (out / "judgements-1.jsonl").write_text("".join(log[:21]))
    (out / "judgements-2.jsonl").write_text("".join(log[20:]) + '{"torn')
    settings = {"json": str(tmp_path / "s.json"), "plots": str(tmp_path / "plots")}
    result = ev.score(ev.Score("rewardbench", (str(out),), name="a\x1b[31m", **settings))
    shown = capsys.readouterr().out
    assert result["table"]["subsets"] == {"donotanswer": 1.0, "hep-go": 1.0} and result["other_rules"] is None
    assert result["table"]["overall"] == {"average": None, "accuracy": 1.0}
    assert "note: 1 verdicts came twice and count once" in shown and "note: 40 of 2985 items" in shown
    assert json.loads((tmp_path / "s.json").read_text()) == json.loads(json.dumps(result))
    assert shown.splitlines()[3].split() == ["a<U+001B>[31m", "-", "-", "100.0", "100.0", "-", "100.0"]
    assert "\x1b" not in shown and "RM-R1-Qwen2.5-Instruct-32B" in shown
    assert (tmp_path / "plots" / "sections.png").read_bytes().startswith(b"\x89PNG")


def rm_bench_log(tmp_path):
    rows = [{"id": f"{d}/{i}", "domain": d, "result_1": [1, 1, 1], "result_2": [0, 0, i % 2], "result_3": [1, 0, 1]}
            for d in bm.DOMAINS for i in range(4)]
    return write(tmp_path / "rmbench_outcomes.jsonl", rows)


def test_both_rules_are_shown_where_they_differ(tmp_path, capsys):
    log = rm_bench_log(tmp_path)
    right = ev.score(ev.Score("rm-bench", (log,)))
    # 01 and 12 lost, 02 won: hard 1/3; 10 lost, 21 won, 20 half: easy 1/2
    assert right["table"]["levels"] == {"easy": pytest.approx(0.5), "normal": 1.0, "hard": pytest.approx(1 / 3)}
    assert right["remarks"] == ["16 of 1327 items: not to be held against published numbers"]
    # with the slip 01 is 02 (won), 12 is 10 (lost), 20 is 21 (won): hard 2/3, easy 2/3
    official = right["other_rules"]
    assert official["table"]["levels"] == {"easy": pytest.approx(2 / 3), "normal": 1.0, "hard": pytest.approx(2 / 3)}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[3:7:2]] == ["this log, right rules", "this log, official rules"]
    at = lines.index("styles, mean over domains")
    assert [line.split()[-3:] for line in lines[at + 3 : at + 6]] == [  # result_2 holds 01, 12 and 20
        ["100.0", "0.0", "100.0"], ["0.0", "100.0", "0.0"], ["50.0", "100.0", "100.0"]]


def test_logs_that_are_not_there(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    for log, message in (("nowhere.jsonl", "no such file"), (".", "name the files"),
                         ("empty.jsonl", "no verdicts in it")):
        with pytest.raises(UserError, match=message):
            ev.score(ev.Score("pairs", (str(tmp_path / log),)))
