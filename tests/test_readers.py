"""Every reader on spoilt files: a value, or one UserError that names the file and its line; no row is lost unsaid.

A small good file is spoilt in one place: a key dropped or renamed, a value of another kind, a byte changed, the end
cut off. What is still read has to be whole, and as many as there were rows.
"""

from __future__ import annotations

import copy
import gzip
import json
import random
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from report_files import judge, make_pairs, write_demo, write_evaluation

from data import Pair, load_pairs, save_pairs
from evaluation.benchmarks import load_benchmark
from evaluation.outcomes import read_log, score_rows, votes_curve
from judging.endpoint import Failed, read_kept, read_reply
from loading.folder import context_tokens
from loading.judge_file import how_to_ask
from loading.tokenizer import load_tokenizer
from model import load_policy
from prepare.distill import Attempt, read_attempts
from prepare.sources import read_source
from report import page as rp
from reward import parse_verdict
from rollout import Reply
from runtime.disk import read_jsonl
from runtime.errors import UserError
from runtime.run_folder import RunFolder
from runtime.states import keep_state, resume

NUMBER = count()
USER, REPLY = {"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}
PAIRS = [
    {"context": [USER], "response_a": "4", "response_b": "5", "winner": "A", "meta": {"level": 3}, "trace": "so"},
    {"messages": [USER, REPLY, USER], "chosen": "4", "rejected": "5", "source": "x", "pair_id": 7},
    {"prompt": "Why?", "chosen": "So.", "rejected": "Hm.", "category": "chat"},
    {"chosen": [USER, REPLY], "rejected": [USER, {**REPLY, "content": "5"}]},
    {"context_messages": [{"role": "system", "content": "Judge."}, USER], "winner": "model_b"},
    {"context_messages": [USER], "winner": "<eval>A</eval><answer>[[A]]</answer>"},
    {"context": [USER], "response1": "4", "response2": "5", "overall_preference": -3, "history": [["hi", "ho"]]},
    {"prompt": '["Why?"]', "response_a": '["So."]', "response_b": '["Hm."]', "winner_model_a": 1, "winner_model_b": 0,
     "winner_tie": 0},
    {"conversation_a": [USER, {**REPLY, "content": [{"type": "text", "text": "4"}]}], "turn": 1,
     "conversation_b": [USER, {**REPLY, "content": "5"}], "winner": "model_a"},
    {"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Why?\n\nAssistant: Hm."},
    {"conversations": [{"from": "human", "value": "Why?"}], "chosen": {"from": "gpt", "value": "So."},
     "rejected": {"from": "gpt", "value": "Hm."}, "system": "s"},
    {"prompt": "hi\n<extra_id_1>Assistant\nho\n<extra_id_1>User\nWhy?", "response_1": "4", "response_2": "5",
     "preference_strength": 2},
]
CSV = 'prompt,chosen,rejected,system\r\n"what is\n1+1?",2.,"3, or 4",\r\nq,2.,3.,s\r\n'
SOURCES = {
    "skywork": [{"chosen": [USER, REPLY], "rejected": [USER, {**REPLY, "content": "5"}], "source": "helpsteer2"}] * 3,
    "code": [{"input": "add", "accepted": "a + b", "rejected": "a - b"}] * 3,
    "math": [{"prompt": "1 + 1", "initial_reason_steps": "Well, ", "full_chosen": "2", "full_rejected": "3"}] * 3,
    "pairs": PAIRS,
}
DONOR = {"llm_name": "m", "answer": "good"}
RMB = {"category_path": "Pairwise_set/Helpfulness/chat/x", "conversation_input": [USER]}
BENCHMARKS: dict[Any, list[Any]] = {
    "rewardbench": [{"id": i, "subset": "donotanswer", "prompt": "p", "chosen": "c", "rejected": "r"} for i in (1, 2)],
    "rm-bench": [{"id": i, "domain": "math", "prompt": "p", "chosen": [*"abc"], "rejected": [*"def"]} for i in "xy"],
    "rmb": [RMB | {"pair_uid": "1", "chosen": DONOR, "reject": {**DONOR, "answer": "bad"}},
            RMB | {"category_path": "BoN_set/Harmlessness/x", "bon_uid": 2, "bon_best": DONOR,
                   "loser_list": [{**DONOR, "answer": "bad"}, {**DONOR, "answer": "worse"}]}],
    "rewardbench-2": [{"id": i, "subset": "Math", "prompt": "p", "chosen": ["c"], "rejected": ["r"]} for i in (1, 2)],
    "judgebench": [{"pair_id": i, "source": "mmlu-pro-law", "question": "q", "response_A": "a", "response_B": "b",
                    "label": "A>B"} for i in (1, 2)],
}
META = {"rewardbench": {"subset": "donotanswer", "item": "donotanswer/1"},
        "rm-bench": {"domain": "math", "item": "1", "chosen_style": "0", "rejected_style": "2"},
        "rmb": {"category_path": RMB["category_path"], "item": "1", "loser": "", "losers": "1"},
        "pairs": {}}
TABLED = {"rewardbench": [{"subset": "donotanswer", "id": i, "correct": i % 2} for i in range(3)],
          "rm-bench": [{"domain": "math", "id": "a"} | {f"result_{f}": [1, 0, 1] for f in (1, 2, 3)}],
          "rmb": [RMB | {"pair_uid": "1", "results": 1}]}
VALUES = [None, True, -1, 0, 2.5, 10**30, 10**400, float("inf"), float("nan"), "", "\x00", "\ud800", "x" * 5000, "A",
          [], {}, [[]], ["<answer>[[A]]</answer>"], {"A": 1}, json.loads("[" * 300 + "]" * 300)]
SMALL = [v for v in VALUES if not isinstance(v, int) or abs(v) < 9]  # sizes of a model: no hours of building


@dataclass(frozen=True)
class Settings:
    seed: int = 0


many = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
randoms = st.integers(0, 2**32).map(random.Random)


def spoil(value: Any, rng: random.Random, values: list[Any] = VALUES) -> Any:
    """A copy with one thing changed, somewhere."""
    places: list[tuple[Any, Any]] = []

    def walk(inside: Any) -> None:
        for key in list(inside) if isinstance(inside, dict) else range(len(inside)) if isinstance(inside, list) else ():
            places.append((inside, key))
            walk(inside[key])

    root = [copy.deepcopy(value)]
    walk(root)
    holder, key = rng.choice(places)
    how = rng.randrange(6)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[f"{key}_"] = holder.pop(key)
    elif how == 2:
        holder[key] = [holder[key]]
    else:
        holder[key] = rng.choice(values)
    return root[0] if root else None


def spoil_bytes(content: bytes, rng: random.Random) -> bytes:
    i, n = rng.randrange(len(content) + 1), rng.randrange(1, 9)
    new = rng.choice([b"\0", b"\xff", b"\xef\xbb\xbf", b"[" * 3000, b"{", b"}", b'"', b"\n", b"\\ud800", b"9" * 5000,
                      b"NaN"])
    return rng.choice([content[:i], content[:i] + new + content[i:], content[:i] + content[i + n :],
                       content[:i] + new[:1] + content[i + 1 :], b"", new + content])


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def written(folder: Path, content: bytes, suffix: str) -> Path:
    """A new file every time, since readers may keep what they read."""
    path = folder / f"{next(NUMBER)}{suffix}"
    path.write_bytes(content)
    return path


def attempt(read: Callable[[], Any], *names: str) -> Any:
    """What was read, or None after an error that names the place in one of these ways."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read()
        except UserError as error:
            assert any(name in f"{error}" for name in names), (names, error)
    return None


def one_row_spoilt(rows: list[Any], rng: random.Random) -> tuple[list[Any], int]:
    rows, k = copy.deepcopy(rows), rng.randrange(len(rows))
    rows[k] = spoil(rows[k], rng)
    return rows, k


def whole(pairs: list[Pair], folder: Path) -> bool:
    """Texts where texts belong: they survive the way out and in again."""
    return load_pairs(str(written(folder, save_pairs(pairs).encode(), ".jsonl"))) == pairs


# ---- pairs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", (".jsonl", ".json", ".jsonl.gz"))
@many
@given(rng=randoms)
def test_a_spoilt_row_of_pairs_is_named(tmp_path, suffix, rng):
    rows, k = one_row_spoilt(PAIRS, rng)
    content = lines(rows) if suffix != ".json" else json.dumps(rows).encode()
    path = written(tmp_path, gzip.compress(content) if suffix.endswith("gz") else content, suffix)
    place = f"{path}: item {k + 1}:" if suffix == ".json" else f"{path}:{k + 1}:"
    pairs = attempt(lambda: load_pairs(str(path)), place)  # a row may become a tie, or one of two equal responses
    assert pairs is None or (0 <= len(rows) - len(pairs) <= 1 and whole(pairs, tmp_path))


@pytest.mark.parametrize("suffix", (".jsonl", ".jsonl.gz", ".csv", ".tsv"))
@many
@given(rng=randoms)
def test_spoilt_bytes_of_pairs(tmp_path, rng, suffix):
    good = lines(PAIRS) if "json" in suffix else CSV.replace(",", "\t" if suffix == ".tsv" else ",").encode()
    content = spoil_bytes(gzip.compress(good) if suffix.endswith("gz") else good, rng)
    path = written(tmp_path, content, suffix)
    pairs = attempt(lambda: load_pairs(str(path)), f"{path}:")
    filled = [line for line in content.split(b"\n") if line.strip()]
    assert pairs is None or ((suffix != ".jsonl" or 0 <= len(filled) - len(pairs) <= 1) and whole(pairs, tmp_path))


@many
@given(rng=randoms, bytewise=st.booleans())
def test_spoilt_parquet(tmp_path, rng, bytewise):
    import pyarrow
    import pyarrow.parquet

    rows = PAIRS[:1] * 3 if bytewise else one_row_spoilt(PAIRS[:1] * 3, rng)[0]
    path = tmp_path / f"{next(NUMBER)}.parquet"
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, compression="none")
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError, AttributeError, TypeError):
        return  # no table holds such rows
    if bytewise:
        path.write_bytes(spoil_bytes(path.read_bytes(), rng))
    pairs = attempt(lambda: load_pairs(str(path)), f"{path}")
    assert pairs is None or (len(pairs) in (2, 3) and whole(pairs, tmp_path))


@pytest.mark.parametrize("kind", SOURCES)
@many
@given(rng=randoms)
def test_a_spoilt_source_row_is_a_pair_or_a_counted_drop(tmp_path, kind, rng):
    rows, k = one_row_spoilt(SOURCES[kind], rng)
    path = written(tmp_path, lines(rows), ".jsonl")
    found = attempt(lambda: read_source(kind, [str(path)]), f"{path}")
    if found:
        pairs, drops, _ = found
        assert len(pairs) + len(drops) == len(rows) and all(drop.reason for drop in drops)
        assert all(f"{path}:{k + 1}" in drop.where for drop in drops)
        assert [p.trace for p in pairs if p.trace is not None and not isinstance(p.trace, str)] == []


# ---- benchmarks, logs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHMARKS)
@many
@given(rng=randoms, bytewise=st.booleans())
def test_a_spoilt_benchmark(tmp_path, name, rng, bytewise):
    rows, k = one_row_spoilt(BENCHMARKS[name], rng)
    good = json.dumps(BENCHMARKS[name]).encode()
    path = written(tmp_path, spoil_bytes(good, rng) if bytewise else json.dumps(rows).encode(), ".json")
    pairs = attempt(lambda: load_benchmark(name, str(path)), str(path) if bytewise else f"{path}: item {k + 1}:")
    if pairs is not None and not bytewise:
        losers = sum(len(row.get("loser_list", ".")) if row.get("category_path", "").startswith("BoN") else 1
                     for row in rows)
        assert len(pairs) == {"rm-bench": 9 * len(rows), "rmb": losers}.get(name, len(rows))
    assert pairs is None or save_pairs(pairs).encode()


@pytest.mark.parametrize("name", META)
@many
@given(rng=randoms, bytewise=st.booleans(), tabled=st.booleans())
def test_a_spoilt_log(tmp_path, name, rng, bytewise, tabled):
    pair, rows = make_pairs()[0], TABLED.get(name, [])
    if not tabled or not rows:
        rows = [asdict(judge(pair, order, True, "")) | {"meta": META[name], "sample": i}
                for i in (0, 1) for order in ("AB", "BA")]
    spoilt, k = one_row_spoilt(rows, rng)
    content = spoil_bytes(lines(rows), rng) if bytewise else lines(spoilt)
    path = written(tmp_path, content, ".jsonl")

    def read() -> Any:
        found = read_log([str(path)])
        return len(found), score_rows(name, found, "official" if rng.random() < 0.5 else "none", draws=2)

    found = attempt(read, str(path) if bytewise else f"{path}:{k + 1}:")
    if found:
        filled = [line for line in content.split(b"\n") if line.strip()]
        assert found[0] == len(filled) - (not content.endswith(b"\n") and not is_json(filled[-1]))


def is_json(line: bytes) -> bool:
    try:
        return bool(json.loads(line.decode()))
    except (ValueError, RecursionError):
        return False


VERDICT = asdict(judge(make_pairs()[0], "AB", True, "")) | {"meta": META["rmb"]}
FOUND = [  # what this file's fuzzing or its making found: each once ended in a traceback, or was taken for good
    ("rewardbench", BENCHMARKS["rewardbench"][0] | {"id": "\ud800"}),
    ("rmb", BENCHMARKS["rmb"][0] | {"conversation_input": [{**USER, "content": "\ud800"}]}),
    *((read_log, VERDICT | {name: value}) for name, value in (
        ("sample", []), ("response_tokens", None), ("correct", "yes"), ("winner", None), ("winner", "C"),
        ("verdict", ["A"]), ("order", "AA"), ("pair_id", 3), ("meta", []), ("meta", {}), ("meta", {"item": 3}),
        ("extra", 1))),
    (read_log, VERDICT | {"meta": META["rmb"] | {"losers": "two"}}),
    (read_log, TABLED["rmb"][0] | {"results": 10**400}),
    (read_log, {"total": 1}),
]


@pytest.mark.parametrize("read, row", FOUND, ids=range(len(FOUND)))
def test_rows_that_once_were_a_traceback(tmp_path, read, row):
    path = str(written(tmp_path, lines([row]), ".jsonl"))
    with pytest.raises(UserError, match=":1: "):
        if read is read_log:
            score_rows("rmb", read_log([path]), "none", draws=2)
        else:
            load_benchmark(read, path)


# ---- run folders ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """{path in the folder: content} of a whole run folder, and drawing for free."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    write_demo(folder)
    votes = [judge(make_pairs()[0], "AB", right, "") for right in (True, False, True)]
    votes = [type(j)(**asdict(j) | {"sample": i}) for i, j in enumerate(votes)]
    write_evaluation(folder / "curve" / "votes", votes, folder / "held_out.jsonl")
    path = folder / "curve" / "votes" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"curve": votes_curve(votes)}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rp, "plot", lambda *_, **__: b"")
        yield {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.json*")}


@many
@given(rng=randoms, bytewise=st.booleans())
def test_a_spoilt_run_folder(demo, tmp_path, rng, bytewise, capsys):
    folder = tmp_path / str(next(NUMBER))
    victim = rng.choice(sorted(demo))
    for name, content in demo.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    content = demo[victim]
    if bytewise:
        content = spoil_bytes(content, rng)
    elif victim.suffix == ".jsonl":
        content = lines(one_row_spoilt([json.loads(line) for line in content.splitlines()], rng)[0])
    else:
        content = json.dumps(spoil(json.loads(content), rng)).encode()
    (folder / victim).write_bytes(content)
    page = attempt(lambda: rp.report(rp.Config(str(folder))), str(folder / victim))
    assert page is None or "</html>" in page.read_text(encoding="utf-8")
    assert page is not None or victim.name != "held_out.jsonl"  # the report does without
    capsys.readouterr()


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """A run folder with two resume states, as {path in it: content}, and what it takes to resume from them."""
    path = tmp_path_factory.mktemp("states")
    folder, net = RunFolder(str(path), Settings()), torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    for step in (1, 2):
        net.weight.data.fill_(step)
        net(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        folder.log({"step": step - 1, "loss": 0.5})
        keep_state(folder, net, optimizer, {"step": step, "best": 0.25})
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}, net, optimizer


@many
@given(rng=randoms, bytewise=st.booleans(), newest=st.booleans())
def test_a_spoilt_resume_state_is_used_whole_or_not_at_all(states, tmp_path, rng, bytewise, newest, capsys):
    """Spoilt in any file: the state before it, unless what was changed says the same as before (a blank)."""
    contents, net, optimizer = states
    folder = tmp_path / str(next(NUMBER))
    victim = rng.choice([name for name in sorted(contents) if f"step_00000{1 + newest}" in str(name)])
    content = spoil_bytes(contents[victim], rng)
    if not bytewise and victim.name == "progress.json":
        content = json.dumps(spoil(json.loads(contents[victim]), rng)).encode()
    for name, good in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if name == victim else good)
    found = resume(RunFolder(str(folder), Settings()), net, optimizer)
    assert found is not None and (found["step"], found["best"]) in ((1, 0.25), (2, 0.25))
    assert found["step"] == 2 if not newest else found["step"] == 1 or same_json(content, contents[victim])
    # the weights after step n: n, less one AdamW step of at most 0.002
    assert (net.weight - found["step"]).abs().max() < 0.005
    assert ("; continuing from" in capsys.readouterr().out) == (found["step"] == 1)


def same_json(one: bytes, other: bytes) -> bool:
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return one == other  # of tensors


@many
@given(rng=randoms, bytewise=st.booleans())
def test_a_spoilt_configuration_or_metrics_file_of_a_run(states, tmp_path, rng, bytewise):
    contents = states[0]
    before: list[Any] = []
    folder, victim = tmp_path / str(next(NUMBER)), rng.choice(["config.json", "metrics.jsonl"])
    folder.mkdir()
    spoilt = {name: contents[Path(name)] for name in ("config.json", "metrics.jsonl")}
    if bytewise:
        spoilt[victim] = spoil_bytes(spoilt[victim], rng)
    else:
        rows = [json.loads(line) for line in contents[Path(victim)].splitlines()] if victim[0] == "m" else [{"seed": 0}]
        spoilt[victim] = lines(one_row_spoilt(rows, rng)[0])
    for name, content in spoilt.items():
        (folder / name).write_bytes(content)

    def read() -> bool:
        run_folder = RunFolder(str(folder), Settings())
        before.extend(row for _, row in read_jsonl(folder / "metrics.jsonl", torn_end_ok=True))
        run_folder.rewind(2)
        return True

    known = attempt(read, str(folder / victim), "holds a run of another configuration")
    after = (folder / "metrics.jsonl").read_bytes()
    assert after == (lines([row for row in before if row["step"] < 2]) if known else spoilt["metrics.jsonl"])


# ---- what an oracle or a server said -------------------------------------------------------------------


REPLY_ROWS = [{"key": key, "reply": asdict(Reply("so", "stop", 3, 1))} for key in "xy"]
CHAINS = [asdict(Attempt("s", "p", k, "", "stop", 3, 2, "so")) for k in (0, 1)]
ANSWER = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "so"}, "finish_reason": "stop"}],
          "usage": {"prompt_tokens": 3, "completion_tokens": 4}}


@many
@given(rng=randoms, bytewise=st.booleans(), chains=st.booleans())
def test_spoilt_logs_of_replies_and_of_chains(tmp_path, rng, bytewise, chains):
    rows, k = one_row_spoilt(CHAINS if chains else REPLY_ROWS, rng)
    good = lines(CHAINS if chains else REPLY_ROWS)
    path = written(tmp_path, spoil_bytes(good, rng) if bytewise else lines(rows), ".jsonl")
    pair = Pair("p", "s", (), "a", "b", "A")
    read = (lambda: read_attempts(path, [pair], 2)["s", "p"]) if chains else (lambda: [*read_kept(path).values()])
    found = attempt(read, f"{path}:{k + 1}:" if not bytewise else f"{path}:")
    filled = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    assert found is None or len(found) == len(filled)
    for one in found or []:
        assert isinstance(one.text, str) and one.response_tokens >= 0 and parse_verdict(one.text) in ("A", "B", None)


@many
@given(rng=randoms, bytewise=st.booleans())
def test_a_spoilt_answer_of_a_server(rng, bytewise):
    body = spoil_bytes(json.dumps(ANSWER).encode(), rng) if bytewise else json.dumps(spoil(ANSWER, rng)).encode()
    try:
        one = read_reply(body)
    except Failed as failed:
        assert str(failed)  # asked again, or said in one line
        return
    assert isinstance(one.text, str) and one.finish_reason in ("stop", "length")
    assert all(type(n) is int and n >= 0 for n in (one.prompt_tokens, one.response_tokens))


# ---- models --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    import tiny_models

    folder = tmp_path_factory.mktemp("model")
    tiny_models.make_folder(folder, tiny_models.make_lm(num_hidden_layers=1), tokenizer=True)
    judge = {"style": "plain", "wording": "Judge. {data}", "max_tokens": 9, "template_args": {"messages": 1}}
    (folder / "judge.json").write_text(json.dumps(judge))
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("name", ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                                  "tokenizer_config.json", "chat_template.jinja", "judge.json"))
@settings(many, max_examples=many.max_examples // 4)
@given(rng=randoms, bytewise=st.booleans())
def test_a_spoilt_model_folder(model, tmp_path, name, rng, bytewise):
    folder = tmp_path / str(next(NUMBER))
    folder.mkdir()
    for file, content in model.items():
        (folder / file).write_bytes(content)
    good = model[name]
    if bytewise or not name.endswith(".json"):
        (folder / name).write_bytes(spoil_bytes(good, rng))
    else:
        (folder / name).write_text(json.dumps(spoil(json.loads(good), rng, SMALL)))
    read = load_tokenizer if "t" in name[:1] or name.startswith("chat") else load_policy
    attempt(lambda: read(str(folder)), str(folder))
    attempt(lambda: context_tokens(str(folder)), str(folder))
    attempt(lambda: how_to_ask(str(folder)), str(folder))
