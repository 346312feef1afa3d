"""Rows in, pairs out: our own layout, bad input in one line, swapping, sharding, the endless stream."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from data import Pair, keep_fitting, load_pairs, preferred, save_pairs, shard, stream, swap
from runtime.errors import UserError

USER, REPLY = {"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}
OWN = {"context": [USER], "response_a": "4", "response_b": "5", "winner": "A"}
PLAIN = {"messages": [USER], "chosen": "4", "rejected": "5"}
READY = {"context_messages": [{"role": "system", "content": "Judge."}, USER], "winner": "model_b"}


def write(folder: Path, rows: list[dict] | str | bytes, name: str = "rows.jsonl") -> str:
    """Rows, text or bytes -> path of a file that holds them."""
    path = folder / name
    if isinstance(rows, list):
        rows = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    return str(path)


def load(folder: Path, *rows: dict) -> list[Pair]:
    return load_pairs(write(folder, list(rows)))


# ---- layouts -------------------------------------------------------------------------------------------


def test_the_projects_own_layout(tmp_path):  # Eq. 1
    row = OWN | {"pair_id": "x7", "source": "made up", "category": "math", "meta": {"level": 3}, "trace": "because",
                 "unknown": [1]}
    full, bare = load(tmp_path, row, OWN)
    assert full == Pair("x7", "made up", (USER,), "4", "5", "A", "math", {"level": "3"}, "because", None)
    assert bare == Pair("rows-1", "rows", (USER,), "4", "5", "A", "", {}, None, None)


def test_plain_preferences_alternate_strictly_between_A_and_B(tmp_path):
    rows = [PLAIN | {"chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(7)]
    pairs = load(tmp_path, *rows)
    assert [p.winner for p in pairs] == list("ABABABA")
    for i, pair in enumerate(pairs):
        good, bad = (pair.response_a, pair.response_b)[:: 1 if pair.winner == "A" else -1]
        assert (good, bad) == (f"good {i}", f"bad {i}")
        assert pair.context == (USER,)


def test_a_row_without_pair_id_is_called_by_its_id_and_empty_meta_values_are_dropped(tmp_path):
    numbered, both = load(tmp_path, OWN | {"id": 17, "meta": {"a": None, "b": 0}}, OWN | {"id": 17, "pair_id": "x"})
    assert (numbered.pair_id, numbered.meta, both.pair_id) == ("17", {"b": "0"}, "x")


def test_published_rows_are_ready_made_prompts(tmp_path):
    a, b = load(tmp_path, READY | {"winner": "model_a"}, READY)
    assert (a.winner, b.winner) == ("A", "B")
    assert b.messages == tuple(READY["context_messages"])
    assert (b.context, b.response_a, b.response_b, b.trace) == ((), "", "", None)
    c, d, plain = load(tmp_path, {"messages": [USER], "winner": "A"}, READY | {"winner": "B"}, PLAIN | {"winner": "B"})
    assert (c.winner, c.messages, d.winner) == ("A", (USER,), "B")
    assert plain.messages is None and plain.winner == "A"  # beside chosen and rejected a winner says nothing
    assert save_pairs([c]) == ('{"pair_id": "rows-0", "source": "rows", "winner": "A", '
                               '"messages": [{"role": "user", "content": "What is 2 + 2?"}]}\n')
    assert (preferred(c), preferred(plain), preferred(swap(plain))) == ("A", "4", "4")


def test_published_distillation_rows_hold_the_target_in_the_winner_column(tmp_path):
    target = "<eval>At first [[A]] and <answer>[[A]]</answer>, but</eval>\n\n<answer>[[B]]</answer>"
    (pair,) = load(tmp_path, READY | {"winner": target})
    assert (pair.winner, pair.trace) == ("B", target)  # the last verdict is the target's
    (pair,) = load(tmp_path, READY | {"winner": "so <answer>[[A]]</answer>"})
    assert (pair.winner, pair.trace) == ("A", "so <answer>[[A]]</answer>")


@pytest.mark.parametrize("winner", ("no verdict", "[[A]]", "<answer>[[A/B]]</answer>", None, "", "model_c", 1,
                                    ["<answer>[[A]]</answer>"]))
def test_a_ready_made_row_without_a_winner_is_refused(tmp_path, winner):
    with pytest.raises(UserError, match=r"rows\.jsonl:2: .*winner"):
        load(tmp_path, READY, READY | {"winner": winner})


def test_parquet_fills_columns_that_some_rows_lack_with_nulls(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [OWN | {"category": "math", "trace": "t", "pair_id": "x", "source": "s", "meta": {"level": "3"}}, OWN]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    full, bare = load_pairs(str(tmp_path / "rows.parquet"))
    assert (full.pair_id, full.source, full.meta) == ("x", "s", {"level": "3"})
    assert (bare.category, bare.trace) == ("", None)
    assert (bare.pair_id, bare.source) == ("rows-1", "rows")


# ---- bad input -----------------------------------------------------------------------------------------

BAD_ROWS = {  # tests/formats/test_layouts.py has more
    "no layout": ({"question": "Hi", "also": 1}, "no two responses"),
    "an empty object": ({}, "no two responses .*columns found: none"),
    "no winner": ({k: v for k, v in OWN.items() if k != "winner"}, "no winner"),
    "response a number": (OWN | {"response_a": 4}, "'response_a'"),
    "no context": ({k: v for k, v in OWN.items() if k != "context"}, "no prompt"),
    "a message that is a long text": (OWN | {"context": ["x" * 999]}, "'context' holds .*'x{70,79}"),
    "ends with the assistant": (OWN | {"context": [USER, REPLY]}, "end with a user message"),
    "ready-made ends with the assistant": (READY | {"context_messages": [USER, REPLY]}, "end with a user message"),
    "an empty rejected conversation": ({"chosen": [USER, REPLY], "rejected": []}, "'rejected'"),
    "trace a number": (OWN | {"trace": 1}, "'trace'"),
    "meta a list": (OWN | {"meta": ["x"]}, "'meta'"),
    "half a surrogate pair": (OWN | {"response_a": "\ud83d"}, "surrogate"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_gives_one_line_with_file_line_and_cause(tmp_path, name):
    row, cause = BAD_ROWS[name]
    with pytest.raises(UserError, match=cause) as caught:
        load_pairs(write(tmp_path, "\n" + json.dumps(OWN) + "\n" + json.dumps(row) + "\n"))
    assert f"{tmp_path / 'rows.jsonl'}:3: " in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_blank_lines_CRLF_and_a_missing_last_line_break_are_harmless(tmp_path):
    line = json.dumps(OWN | {"pair_id": "x"})
    expected = load_pairs(write(tmp_path, f"{line}\n{line}\n"))
    for text in ("{0}\r\n{0}\r\n", "\n\n{0}\n \t\n{0}\n\n", "{0}\n{0}", "\r\n{0}\r\n\r\n{0}"):
        text = text.replace("{0}", line)
        assert load_pairs(write(tmp_path, text)) == expected


def test_line_separators_inside_texts_do_not_end_a_line(tmp_path):
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\rg\nh"
    lines = json.dumps(OWN | {"response_a": text}, ensure_ascii=False)
    (pair,) = load_pairs(write(tmp_path, lines))
    assert pair.response_a == text


@pytest.mark.parametrize("text", ("", "\n", "\n \r\n\t\n"))
def test_a_file_without_rows_is_refused(tmp_path, text):
    with pytest.raises(UserError, match=r"rows\.jsonl: no pairs.*no rows"):
        load_pairs(write(tmp_path, text))


def test_paths_that_are_no_files_are_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "owner" / "folder").mkdir(parents=True)
    for source in (str(tmp_path), "folder.jsonl", "owner/folder", "missing.jsonl", "runs/toy/missing.jsonl",
                   "runs/missing.parquet", "runs/missing.jsonl", "runs/missing.json", "runs/missing.txt",
                   "", ".", "a", "a/b/c"):
        with pytest.raises(UserError, match=r"no such file; .*or a hub id"):
            load_pairs(source)


# ---- the hub -------------------------------------------------------------------------------------------


def test_without_a_network_a_hub_id_is_an_error_of_one_line():
    with pytest.raises(UserError, match="no-such-owner/no-such-data: neither a file nor a hub data set") as caught:
        load_pairs("no-such-owner/no-such-data")
    assert "\n" not in str(caught.value)


def test_a_row_nested_beyond_reason_is_one_line(monkeypatch):
    import datasets

    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: [PLAIN, PLAIN | {"x": deep}])
    with pytest.raises(UserError, match=r"owner/name: row 2: .*nested too deeply"):
        load_pairs("owner/name")


# ---- saving --------------------------------------------------------------------------------------------

TEXT = st.text(max_size=30)
NAMES = st.text(min_size=1, max_size=10)
CONTEXTS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": TEXT}), max_size=4
).map(lambda turns: (*turns, {"role": "user", "content": "last"}))
SHARED = {
    "pair_id": NAMES, "source": NAMES, "winner": st.sampled_from("AB"), "category": TEXT,
    "meta": st.dictionaries(TEXT, TEXT, max_size=3), "trace": st.none() | st.text(min_size=1, max_size=30),
}
RESPONSES = st.lists(TEXT, min_size=2, max_size=2, unique=True)  # an empty answer is a real one
PAIRS = st.builds(
    lambda texts, **rest: Pair(response_a=texts[0], response_b=texts[1], **rest),
    texts=RESPONSES,
    context=CONTEXTS,
    **SHARED,
) | st.builds(Pair, context=st.just(()), response_a=st.just(""), response_b=st.just(""), messages=CONTEXTS, **SHARED)


@given(pairs=st.lists(PAIRS, min_size=1, max_size=4))
def test_saved_pairs_load_unchanged(tmp_path_factory, pairs):
    path = write(tmp_path_factory.getbasetemp(), save_pairs(pairs), "round_trip.jsonl")
    assert load_pairs(path) == pairs


def test_saving_is_readable_text_without_defaults():
    text = save_pairs([Pair("p", "s", (USER,), "é", "判", "A")])
    assert json.loads(text) == {"pair_id": "p", "source": "s", "context": [USER], "response_a": "é", "response_b": "判",
                                "winner": "A"}
    assert text.endswith("}\n") and "判" in text
    assert save_pairs([]) == ""


# ---- swapping, sharding, streaming ---------------------------------------------------------------------


def test_T15_swap_exchanges_responses_and_winner_and_forgets_the_trace():
    pair = Pair("p", "s", (USER,), "4", "5", "A", "math", {"k": "v"}, trace="A is right")
    swapped = swap(pair)
    assert swapped == Pair("p", "s", (USER,), "5", "4", "B", "math", {"k": "v"}, None)
    assert pair.trace == "A is right" and pair.winner == "A"


@given(PAIRS.filter(lambda pair: pair.messages is None))
def test_T15_swapping_twice_changes_nothing_but_the_trace(pair):
    assert swap(swap(pair)) == replace(pair, trace=None)
    assert swap(pair) != pair


def test_a_ready_made_prompt_cannot_be_swapped(tmp_path):
    (pair,) = load(tmp_path, READY)
    with pytest.raises(UserError, match=r"rows-0.*other order"):
        swap(pair)


@given(st.integers(0, 50), st.integers(1, 9))
def test_T13_shards_are_equally_long_and_disjoint_and_leave_out_less_than_one_round(count, ranks):
    items = list(range(count))
    shards = [shard(items, rank, ranks) for rank in range(ranks)]
    assert {len(s) for s in shards} == {count // ranks}
    assert sorted(item for mine in shards for item in mine) == items[: count - count % ranks]
    for rank, mine in enumerate(shards):
        assert mine == items[: count - count % ranks][rank::ranks]


def test_sharding_says_once_what_it_left_out(capsys):
    said = []
    for rank in range(3):
        shard(list("abcdefgh"), rank, 3)
        said.append(capsys.readouterr().out)
    assert said == ["2 of 8 items left out, so that 3 ranks hold the same number\n", "", ""]
    shard(list("abcdef"), 0, 3)
    assert capsys.readouterr().out == ""


@given(st.integers(1, 12), st.integers(0, 60), st.integers(0, 40), st.integers(0, 3))
def test_T10_the_stream_goes_on_wherever_it_was_left(length, start, count, seed):
    items = list(range(length))
    long = stream(items, 0, start + count, seed)
    assert stream(items, start, count, seed) == long[start:]
    assert len(long) == start + count and items == list(range(length))


@given(st.integers(1, 20), st.integers(0, 5), st.integers(0, 5))
def test_T10_every_epoch_shows_each_item_once(length, epoch, seed):
    shown = stream(range(length), epoch * length, length, seed)
    assert Counter(shown) == Counter(range(length))


def test_epochs_and_seeds_are_shuffled_differently_and_the_same_everywhere():
    items = list(range(100))
    orders = [tuple(stream(items, epoch * 100, 100, seed)) for epoch in range(5) for seed in range(5)]
    assert len(set(orders)) == 25 and tuple(items) not in orders
    assert stream(items, 7, 30, 3) == stream(items, 7, 30, 3)
    assert stream(items, 7, 0, 3) == []
    assert stream(list("abcdefgh"), 0, 10, 0) == list(FIRST_TEN)


FIRST_TEN = "ceagbdfhca"  # what every machine and Python must draw


def test_what_fits_exactly_stays_and_the_rest_is_counted(capsys):
    assert keep_fitting(["a", "bb"], len, 2, "") == ["a", "bb"] == keep_fitting(["a", "bb", "ccc"], len, 2, "--max")
    assert capsys.readouterr().out == "1 of 3 pairs exceed --max 2 tokens: left out\n", "and nothing of the first"
