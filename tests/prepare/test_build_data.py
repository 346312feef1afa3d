"""build_data.py, formats/layouts.py, card.py: every layout, every way a row can be unusable, a card checked by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from tiny_models import make_folder, make_lm

from cor_prompt import encode_prompt, render
from data import Pair, load_pairs
from prepare import build_data, card as cards
from prepare.augment import augmented
from prepare.build_data import PRESETS, Config, alternate, assign, main
from runtime.errors import UserError

ROOT = Path(__file__).parents[2]


def user(text):
    return {"role": "user", "content": text}


def reply(text):
    return {"role": "assistant", "content": text}


def sky(n=0, source="helpsteer2", question=None, **changes):
    ask = user(question or f"Sky question {n}?")
    row = {"chosen": [ask, reply(f"sky good {n}")], "rejected": [ask, reply(f"sky bad {n}")], "source": source}
    return row | changes


def code(n=0, **changes):
    return {"input": f"Code task {n}", "accepted": f"return {n}", "rejected": f"return -{n}", "ID": n} | changes


def step(n=0, **changes):
    return {"dataset": "MATH_Rephrased", "prompt": f"Sum {n}?", "initial_reason_steps": "Step 1: add.\nStep 2:",
            "chosen": " so", "rejected": " no", "full_chosen": f" it is {n}.", "full_rejected": f" it is not {n}.",
            "answer": str(n)} | changes


def plain(n=0, **changes):
    return {"id": f"p{n}", "source": "mine", "category": "chat", "messages": [user(f"Plain question {n}?")],
            "chosen": f"plain good {n}", "rejected": f"plain bad {n}"} | changes


def write(path: Path, rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make(folder: Path, **settings):
    """Build -> ({file name: pairs}, card). Lists of rows become files."""
    for kind in ("skywork", "code", "math", "pairs"):
        if isinstance(settings.get(kind), list):
            settings[kind] = (write(folder / f"{kind}.jsonl", settings[kind]),)
    cfg = Config(out=str(folder / "out"), **({"sft_share": 0.0, "code_rows": 0} | settings))
    main(cfg)
    out = Path(cfg.out)
    return {p.name: load_pairs(str(p)) for p in out.glob("*.jsonl")}, json.loads((out / "card.json").read_text())


def better(pair: Pair) -> str:
    return pair.response_a if pair.winner == "A" else pair.response_b


# ---- layouts -------------------------------------------------------------------------------------------


def test_the_code_rows_are_those_of_the_shuffle_of_datasets(tmp_path):
    import datasets

    rows = [code(n) for n in range(50)]
    expected = datasets.Dataset.from_list(rows).shuffle(seed=42).select(range(8))["input"]
    splits, _ = make(tmp_path, code=rows, code_rows=8)
    assert [p.context[0]["content"] for p in splits["rl.jsonl"]] == list(expected)


# ---- the paper's order and letters ---------------------------------------------------------------------


def test_one_counter_runs_over_math_code_skywork_and_the_file_is_code_skywork_math(tmp_path):
    ultra = sky(9, "magpie_ultra")
    splits, _ = make(tmp_path, math=[step(n) for n in range(3)], code=[code(n) for n in range(2)],
                     skywork=[sky(0), ultra, sky(1), ultra, sky(2)], pairs=[plain(0)])
    assert list(splits) == ["rl.jsonl"]
    assert [(p.pair_id, p.winner) for p in splits["rl.jsonl"]] == [
        ("code-0", "B"), ("code-1", "A"), ("skywork-0", "B"), ("skywork-2", "A"), ("skywork-4", "B"),
        ("math-0", "A"), ("math-1", "B"), ("math-2", "A"), ("p0", "A"),
    ]
    assert all(better(p).startswith(("return ", "sky good", "Step", "plain good")) for p in splits["rl.jsonl"])
    assert not any("not" in better(p) or "-" in better(p) for p in splits["rl.jsonl"])


def test_dropped_rows_do_not_take_a_turn_of_the_counter(tmp_path):
    rows = [plain(0), plain(1, chosen=""), plain(2), plain(0), plain(3)]
    splits, _ = make(tmp_path, pairs=rows, drop_duplicates=True)
    assert [(p.pair_id, p.winner) for p in splits["rl.jsonl"]] == [("p0", "A"), ("p2", "B"), ("p3", "A")]


def test_rows_whose_letters_are_written_in_a_text_keep_them_and_do_not_count(tmp_path):
    ready = {"context_messages": [user("data")], "winner": "model_b"}
    traced = {"context": [user("Q")], "response_a": "x", "response_b": "y", "winner": "B",
              "trace": "<answer>[[B]]</answer>"}
    splits, card = make(tmp_path, pairs=[plain(0), ready, plain(1), traced, plain(2)])
    pairs = splits["rl.jsonl"]
    assert [p.winner for p in pairs] == list("ABBBA")
    assert (pairs[1].messages, pairs[3].trace) == ((user("data"),), traced["trace"])
    assert (pairs[3].response_a, pairs[3].response_b) == ("x", "y")
    assert card["signs"] == {"mine": {"rows": 3, "chosen_marker": 0.0, "rejected_marker": 0.0}}


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(str.strip)
some_pairs = st.lists(
    st.builds(
        lambda q, good, bad, source: Pair("", source, (user(q),), good, bad + good, "A"),
        texts, texts, texts, st.sampled_from("stu"),
    ), max_size=30,
).map(lambda pairs: [replace(p, pair_id=str(i)) for i, p in enumerate(pairs)])


@given(some_pairs)
def test_the_alternation_is_strict_and_changes_nothing_else(pairs):
    lettered = alternate(pairs)
    assert [p.winner for p in lettered] == ["AB"[i % 2] for i in range(len(pairs))]
    assert [better(p) for p in lettered] == [p.response_a for p in pairs]
    assert [{p.response_a, p.response_b} for p in lettered] == [{p.response_a, p.response_b} for p in pairs]


@given(some_pairs, st.data())
def test_splits_are_disjoint_complete_and_keep_groups_whole(pairs, data):
    groups = data.draw(st.lists(st.integers(0, 8), min_size=len(pairs), max_size=len(pairs)))
    sizes = {"held_out.jsonl": data.draw(st.integers(0, 9)), "to_distil.jsonl": data.draw(st.integers(0, 9))}
    names = assign(pairs, groups, sizes, seed=3)
    assert len(names) == len(pairs)
    assert len({(g, name) for g, name in zip(groups, names, strict=True)}) == len(set(groups))
    for name, size in sizes.items():
        assert names.count(name) <= size
    if len(set(groups)) == len(pairs):
        wanted, rest = [], len(pairs)
        for size in sizes.values():
            wanted.append(min(size, rest))
            rest -= wanted[-1]
        assert [names.count(name) for name in sizes] == wanted


def test_rows_of_one_prompt_are_never_in_two_files(tmp_path):
    rows = [plain(n, messages=[user(f"one{n % 25} two{n % 25} three{n % 25} four{n % 25}{'!' * (n % 3)}")])
            for n in range(100)]
    splits, card = make(tmp_path, pairs=rows, sft_share=0.3, held_out=20)
    prompts = [{p.context[0]["content"].rstrip("!") for p in pairs} for pairs in splits.values()]
    assert len(set.union(*prompts)) == sum(map(len, prompts)) == 25
    assert len(splits["held_out.jsonl"]) == 20
    other, _ = make(tmp_path / "other", pairs=rows, sft_share=0.3, held_out=20, seed=1)
    assert {p.pair_id for p in other["held_out.jsonl"]} != {p.pair_id for p in splits["held_out.jsonl"]}
    assert card["duplicates"]["same_prompts"] == 75


# ---- rows that cannot be pairs -------------------------------------------------------------------------

UNUSABLE = [  # what this room checks; tests/formats has the layouts' own reasons
    ("skywork", sky(chosen=None), "no column 'chosen'"),
    ("skywork", sky(chosen=[user(" \n"), reply("a")], rejected=[user(" \n"), reply("b")]), "empty prompt"),
    ("skywork", sky(rejected=[user("Sky question 0?"), reply(" ")]), "empty response"),
    ("math", step(initial_reason_steps=None), "no column 'initial_reason_steps'"),
    ("pairs", {"context": [user("Q")], "response_a": "x", "response_b": "y", "winner": "tie"}, "a tie"),
]


@pytest.mark.parametrize(("kind", "row", "reason"), UNUSABLE)
def test_an_unusable_row_is_dropped_counted_and_named(tmp_path, kind, row, reason):
    good = {"skywork": sky, "code": code, "math": step, "pairs": plain}[kind]
    splits, card = make(tmp_path, **{kind: [good(1), row, good(2)]})
    (found,) = card["dropped"].items()
    assert len(splits["rl.jsonl"]) == 2 and (found[0], found[1]["rows"]) == (reason, 1)
    assert found[1]["first"][0].startswith(str(tmp_path / f"{kind}.jsonl") + ":2")
    assert card["rows"] == {"read": 3, "usable": 2, "dropped": 1, "kept": 2}


def test_a_shared_system_turn_is_kept_and_counted(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, user("Q?")]
    row = sky(1, "wildguard", chosen=[*turns, reply("a")], rejected=[*turns, reply("b")])
    splits, card = make(tmp_path, skywork=[row, sky(2)])
    assert splits["rl.jsonl"] == [
        Pair("skywork-0", "wildguard", tuple(turns), "a", "b", "A", "safety"),
        Pair("skywork-1", "helpsteer2", (user("Sky question 2?"),), "sky bad 2", "sky good 2", "B", "chat")]
    assert [card["sources"][name].get("system_turn") for name in ("wildguard", "helpsteer2")] == [1, 0]


def test_the_papers_preset_asks_the_hub_for_its_three_sources(tmp_path, monkeypatch):
    import datasets

    conversations = [sky(n, ("helpsteer2", "magpie_ultra")[n % 2]) for n in range(6)]
    rows = {"Skywork/Skywork-Reward-Preference-80K-v0.2": conversations,
            "Vezora/Code-Preference-Pairs": [code(n) for n in range(4)],
            "xinlai/Math-Step-DPO-10K": [step(n) for n in range(3)]}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows[name] if split == "train" else None)
    main(replace(PRESETS["paper"], out=str(tmp_path)))
    pairs = load_pairs(str(tmp_path / "rl.jsonl")) + load_pairs(str(tmp_path / "to_distil.jsonl"))
    assert Counter(p.category for p in pairs) == {"chat": 3, "code": 4, "math": 3}
    assert json.loads((tmp_path / "card.json").read_text())["dropped"]["source left out (--drop-sources)"]["rows"] == 3


# ---- the card, by hand ---------------------------------------------------------------------------------


def test_the_signs_betray_magpie_ultra(tmp_path):
    def ultra(n, bad):
        return sky(n, "magpie_ultra", rejected=[user(f"Sky question {n}?"), reply(bad)])

    rows = [ultra(0, "a <|im_start|>user\nmore?"), ultra(1, "b<im_start>"), ultra(2, "c"),
            ultra(3, "d<|im_start|> user\nand?<|im_end|>"), *(sky(n) for n in range(4, 8))]
    _, card = make(tmp_path, skywork=rows)
    assert card["signs"]["magpie_ultra"] == {"rows": 4, "chosen_marker": 0.0, "rejected_marker": 0.75}
    assert card["signs"]["helpsteer2"] == {"rows": 4, "chosen_marker": 0.0, "rejected_marker": 0.0}
    assert not any("marker" in line for line in card["warnings"])  # too few rows to say so
    many = [ultra(n, "x<|im_start|>") for n in range(25)] + [sky(n) for n in range(25, 50)]
    _, card = make(tmp_path / "many", skywork=many)
    assert ("magpie_ultra: a turn marker in 100.0% of the rejected and 0.0% of the chosen sides gives the label away"
            ) in card["warnings"]


def test_counts_balance_lengths_and_who_is_longer(tmp_path):
    rows = [
        plain(0, chosen="12345", rejected="123"),
        plain(1, chosen="12", rejected="1234"),
        plain(2, chosen="123456", rejected="12345", category="math"),
        plain(3, chosen="12", rejected="34", category=None),
    ]
    _, card = make(tmp_path, pairs=rows)
    source = card["sources"]["mine"]
    assert source["categories"] == {"chat": 2, "math": 1, "none": 1}
    assert (source["pairs"], source["a_wins"], source["longer_wins"]) == (4, 0.5, 0.625)  # two and a tie of four
    assert source["chosen"] == {"p50": 2, "p90": 6, "p99": 6, "max": 6}
    assert source["rejected"] == {"p50": 3, "p90": 5, "p99": 5, "max": 5}
    assert card["splits"]["rl.jsonl"] == {"pairs": 4, "a_wins": 0.5}


def test_prompts_are_measured_as_the_judge_sees_them(tmp_path):
    rows = [plain(n, messages=[user("x" * 400 * n)]) for n in range(1, 11)]
    _, card = make(tmp_path, pairs=rows, style="plain", max_prompt_tokens=1000)
    fixed = sum(
        len(m["content"]) for m in render(Pair("", "", (user(""),), "plain good 1", "plain bad 1", "A"), "plain")
    )
    lengths = [(fixed + 400 * n + (2 if n == 10 else 0)) * 2 // 7 for n in range(1, 11)]
    assert card["sources"]["mine"]["prompt"] == {"p50": lengths[4], "p90": lengths[8], "p99": lengths[9],
                                                 "max": lengths[9]}
    assert card["sources"]["mine"]["over_long"] == sum(n > 1000 for n in lengths) == 3
    assert card["unit"] == "tokens estimated as characters / 3.5 (--tokenizer counts them)"


def test_a_tokenizer_counts_and_long_prompts_are_said(tmp_path, tiny_tokenizers):
    make_folder(tmp_path / "model", make_lm(num_hidden_layers=1, vocab_size=512))
    tiny_tokenizers["chatml"].save_pretrained(tmp_path / "model")
    rows = [plain(0), plain(1, messages=[user("word " * 900)])]
    splits, card = make(tmp_path / "a", pairs=rows, tokenizer=str(tmp_path / "model"), style="plain",
                        max_prompt_tokens=900)
    assert card["unit"] == f"tokens of {tmp_path / 'model'}"
    lengths = [len(encode_prompt(render(pair, "plain"), tiny_tokenizers["chatml"])) for pair in splits["rl.jsonl"]]
    assert card["sources"]["mine"]["prompt"]["max"] == max(lengths)
    assert "mine: 1 prompts are over-long: training leaves them out" in card["warnings"]


def test_repeats_and_contradictions(tmp_path):
    other = plain(0, chosen="plain bad 0", rejected="plain good 0", id="turned")
    rows = [plain(0), plain(1), plain(0), other, plain(0, chosen="a third", id="new")]
    splits, card = make(tmp_path, pairs=rows)
    assert card["duplicates"] == {"repeats": 2, "contradictions": 1, "same_prompts": 3}
    assert [p.pair_id for p in splits["rl.jsonl"]] == ["p0", "p1", "p0~2", "turned", "new"]
    splits, card = make(tmp_path / "b", pairs=rows, drop_duplicates=True)
    assert [p.pair_id for p in splits["rl.jsonl"]] == ["p0", "p1", "new"]
    assert card["dropped"]["repeats an earlier row (--drop-duplicates)"]["rows"] == 2


def test_prompts_are_the_same_if_their_words_are():
    def rows(*prompts):
        return [Pair(str(i), "s", (user(text),), "a", "b", "A") for i, text in enumerate(prompts)]

    assert cards.same_prompts(rows("Two words.", "two  WORDS!", "two other words", "?", "!", "?")) == [0, 0, 2, 3, 4, 3]
    assert cards.same_prompts([]) == []


def test_overlap_is_n_words_in_a_row_in_the_clients_turns(tmp_path):
    questions = "How do I bake a good rye bread at home?", "Why?"
    bench = [
        {"prompt": q, "chosen": "c", "rejected": "r", "subset": "hep-go", "id": i} for i, q in enumerate(questions)
    ]
    rows = [
        plain(0, messages=[user("Tell me: how do I BAKE a good, rye bread")]),
        plain(1, messages=[user("how do I bake a bad rye bread at home")]),
        plain(2, messages=[user("why")]),
        plain(3, messages=[user("why so")]),
        plain(4, messages=[user("Hm?"), reply("how do I bake a good rye bread at home"), user("Yes?")]),
        plain(5, messages=[user("how do I bake a good rye"), reply("Well"), user("And?")]),
    ]
    flags = {"rewardbench": write(tmp_path / "bench.jsonl", bench), "ngram": 7}
    splits, card = make(tmp_path, pairs=rows, **flags)
    assert card["overlap"] == {"rewardbench": {"rows": 3, "examples": [
        ["p0", "how do i bake a good rye"], ["p2", "why"], ["p5", "how do i bake a good rye"]]}}
    assert len(splits["rl.jsonl"]) == 6
    splits, card = make(tmp_path / "b", pairs=rows, drop_overlap=True, **flags)
    assert [p.pair_id for p in splits["rl.jsonl"]] == ["p1", "p3", "p4"]
    assert card["dropped"]["shares words with a benchmark (--drop-overlap)"]["first"] == ["p0", "p2", "p5"]


# ---- files ---------------------------------------------------------------------------------------------


def test_the_same_command_writes_the_same_bytes_whatever_the_hash_seed(tmp_path):
    rows = {"math": [step(n) for n in range(20)], "code": [code(n) for n in range(20)],
            "skywork": [sky(n, ("helpsteer2", "wildguard", "magpie_ultra")[n % 3]) for n in range(30)],
            "pairs": [plain(n) for n in range(10)]}
    args = [sys.executable, "-m", "prepare.build_data", "--held-out", "8", "--sft-held-out", "3"]
    for kind, those in rows.items():
        args += [f"--{kind}", write(tmp_path / f"{kind}.jsonl", those)]
    for name, seed in (("a", "1"), ("b", "2")):
        done = subprocess.run([*args, "--out", str(tmp_path / name)], cwd=ROOT, text=True, capture_output=True,
                              env=os.environ | {"PYTHONHASHSEED": seed})
        assert done.returncode == 0, done.stderr
    written = sorted(p.name for p in (tmp_path / "a").glob("[!.]*"))
    assert written == ["card.json", "config.json", "held_out.jsonl", "rl.jsonl", "to_distil.jsonl",
                       "to_distil_held_out.jsonl"]
    for name in written:
        assert name == "config.json" or (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert "70 kept; to_distil.jsonl 7, rl.jsonl 52, held_out.jsonl 8, to_distil_held_out.jsonl 3" in done.stdout
    assert "dropped 10: source left out (--drop-sources)" in done.stdout


def test_files_of_something_else_and_of_another_build_are_refused(tmp_path):
    rows = [plain(n) for n in range(6)]
    make(tmp_path, pairs=rows, held_out=2)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    make(tmp_path, pairs=rows, held_out=2)
    with pytest.raises(UserError, match=r"held_out was 2, is 3.*use another --out"):
        make(tmp_path, pairs=rows, held_out=3)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "to_distil.jsonl").write_text("precious")
    for out, message in (("toy", r"holds to_distil\.jsonl without"), ("toy/to_distil.jsonl", "is a file")):
        with pytest.raises(UserError, match=message):
            main(Config(pairs=(str(tmp_path / "pairs.jsonl"),), out=str(tmp_path / out)))
    assert (tmp_path / "toy" / "to_distil.jsonl").read_text() == "precious"


@pytest.mark.parametrize("stop", range(4))
def test_a_build_that_is_killed_leaves_whole_files_and_the_same_command_finishes_it(tmp_path, monkeypatch, stop):
    rows = [plain(n) for n in range(30)]
    whole, _ = make(tmp_path / "whole", pairs=rows, held_out=5, sft_share=0.2)
    calls = iter(range(100))

    def dying(path, content, real=build_data.write_whole):
        if next(calls) == stop:
            raise KeyboardInterrupt
        real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(build_data, "write_whole", dying)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, pairs=rows, held_out=5, sft_share=0.2)
    out = tmp_path / "out"
    assert not (out / "card.json").exists()
    assert all(load_pairs(str(out / name)) == pairs for name, pairs in whole.items() if (out / name).exists())
    assert make(tmp_path, pairs=rows, held_out=5, sft_share=0.2)[0] == whole


def test_a_split_that_is_empty_now_leaves_no_old_file(tmp_path):
    rows = [plain(n, messages=[user(f"a{n} b{n} c{n}")]) for n in range(30)]
    make(tmp_path, pairs=rows, sft_share=0.1)
    assert (tmp_path / "out" / "to_distil.jsonl").exists()
    splits, _ = make(tmp_path, pairs=rows[:2], sft_share=0.1)
    assert list(splits) == ["rl.jsonl"]


@pytest.mark.parametrize(("settings", "message"), [
    ({}, "no rows named: give --skywork, --code, --math or --pairs, or --preset paper"),
    ({"pairs": ("nowhere.jsonl",)}, r"nowhere\.jsonl: no such file"),
    ({"pairs": ("rows.jsonl",), "tokenizer": "nowhere"}, "nowhere: no such folder"),
    ({"code": ("rows.jsonl",), "code_rows": 0},
     r"--code rows\.jsonl: none of 3 rows can be used; 3: no column 'accepted', first at rows\.jsonl:1"),
    ({"pairs": ("rows.jsonl",), "sft_share": 1.5}, "--sft-share must be between 0 and 1"),
    ({"pairs": ("rows.jsonl",), "held_out": -1}, "--held-out"),
    ({"pairs": ("rows.jsonl",), "held_out": 3}, "leave nothing of 3 pairs to train on"),
    ({"pairs": ("rows.jsonl",), "ngram": 0}, "--ngram 0: must be more than 0"),
    ({"pairs": ("rows.jsonl",), "rm_bench": "rows.jsonl"}, r"rows\.jsonl:1: .*"),
])
def test_settings_that_cannot_be_are_one_line(tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    write(Path("rows.jsonl"), [plain(n) for n in range(3)])
    with pytest.raises(UserError, match=message):
        main(Config(**settings))
    assert not Path("runs").exists()


# ---- real rows -----------------------------------------------------------------------------------------


def test_all_real_files_with_the_real_benchmarks(shared, tmp_path):
    files = [
        str(p) for p in sorted(shared("prefs").glob("*.jsonl")) if p.stem not in ("real_input_300", "eval_only_pairs")
    ]
    bench = shared("benchmarks")
    flags = {"rewardbench": str(bench / "rewardbench"), "rm_bench": str(bench / "rm_bench" / "total_dataset_part.json"),
             "rmb": str(bench / "rmb")}
    splits, card = make(tmp_path, pairs=tuple(files), sft_share=0.12, held_out=200, sft_held_out=40, **flags)
    assert {name: len(pairs) for name, pairs in splits.items()} == {
        "to_distil.jsonl": 509, "rl.jsonl": 3733, "held_out.jsonl": 200, "to_distil_held_out.jsonl": 40}
    assert {name: row["rows"] for name, row in card["overlap"].items()} == {"rewardbench": 2, "rm-bench": 4, "rmb": 1}
    prompts = [{tuple((m["role"], m["content"]) for m in p.context) for p in pairs} for pairs in splits.values()]
    assert len(set.union(*prompts)) == sum(map(len, prompts))
    # benchmark items given as training rows are all found
    items = str(shared("prefs") / "eval_only_pairs.jsonl")
    with pytest.raises(UserError, match="no row is left"):
        make(tmp_path / "leak", pairs=(items,), rm_bench=str(bench / "rm_bench"), rmb=str(bench / "rmb"),
             drop_overlap=True)


# ---- pairs with a stranger -----------------------------------------------------------------------------


def test_added_pairs_set_a_chosen_response_against_one_chosen_for_another_prompt(tmp_path):
    rows = [plain(n) for n in range(40)]
    before, _ = make(tmp_path / "plain", pairs=rows, sft_share=0.25, held_out=8)
    files, card = make(tmp_path / "more", pairs=rows, sft_share=0.25, held_out=8, augment=0.5)
    assert files["held_out.jsonl"] == before["held_out.jsonl"]
    for name, count in (("to_distil.jsonl", 4), ("rl.jsonl", 12)):  # half of 8 and of 24
        assert files[name][:-count] == before[name]
        chosen = {f"mine/{pair.pair_id}": pair for pair in before[name]}  # no file holds another's text
        for place, pair in enumerate(files[name][-count:]):
            own, stranger = chosen[pair.meta["row"]], chosen[pair.meta["stranger"]]
            assert (pair.context, better(pair)) == (own.context, better(own))
            assert {pair.response_a, pair.response_b} == {better(own), better(stranger)}
            assert own.context != stranger.context and pair.winner == "AB"[place % 2]
            assert (pair.pair_id, pair.source, pair.category) == (f"mine/{own.pair_id}+0", "added (--augment)", "chat")
        assert len({pair.meta["row"] for pair in files[name][-count:]}) == count
    assert card["rows"] == {"read": 40, "usable": 40, "dropped": 0, "kept": 40, "added": 16}
    line = card["sources"]["added (--augment)"]
    assert (line["pairs"], line["a_wins"], card["splits"]["rl.jsonl"]["pairs"]) == (16, 0.5, 36)


def test_no_stranger_shares_a_prompt_or_has_an_answer_that_fits_here_too():
    def pair(name, question, good, bad):
        return Pair(name, "s", (user(question),), good, bad, "A")

    pairs = [pair("a", "2+2?", "4", "5"), pair("b", "2+2?", "four", "six"), pair("c", "3+1?", "4", "6"),
             pair("d", "2+3?", "5", "7")]
    made = augmented(pairs, [0, 0, 2, 3], 5.0, 0)
    seen = {(p.meta["row"][-1], p.meta["stranger"][-1]) for p in made}
    assert seen <= {("b", "c"), ("b", "d"), ("c", "b"), ("c", "d"), ("d", "a"), ("d", "b"), ("d", "c")}
    # a meets none: c's answer is right for it and d's is the wrong one that it knows; 3 rows a lap, 24 turns at most
    assert len(seen) > 4 and len({p.pair_id for p in made}) == len(made) == 18
    assert [p.winner for p in made[:4]] == ["A", "B", "A", "B"]


def test_rows_that_name_letters_take_no_part_and_alone_are_refused(tmp_path):
    ready = [{"context_messages": [user(f"prompt {n}")], "winner": "model_a"} for n in range(4)]
    files, card = make(tmp_path / "some", pairs=[*ready, plain(1), plain(2)], augment=1.0)
    assert card["rows"]["added"] == 2 and {p.meta["row"] for p in files["rl.jsonl"][-2:]} == {"mine/p1", "mine/p2"}
    with pytest.raises(UserError, match="no two different prompts"):
        make(tmp_path / "none", pairs=ready, augment=1.0)
    with pytest.raises(UserError, match="no two different prompts"):
        make(tmp_path / "same", pairs=[plain(1), plain(1, chosen="x", id="p9")], augment=1.0)
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--augment"):
            make(tmp_path / "wrong", pairs=[plain(1), plain(2)], augment=wrong)
