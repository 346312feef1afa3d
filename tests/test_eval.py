"""eval.py with a sampler that is a table: resuming, counting, refusing."""

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from survival_worker import FLOAT64
from tiny_models import make_folder, make_lm

import eval as ev
from data import Pair, save_pairs
from evaluation import outcomes, tables
from evaluation.silent import NothingJudged
from judging.verdicts import Judgement
from rollout import Reply
from runtime.errors import UserError
from runtime.seeds import derive_seed

ROOT = Path(__file__).parents[1]


class Sampler:
    """Says A or B by a hash of seed and sample, and remembers what it was asked."""

    def __init__(self, act_at=None, act=None):
        self.asked, self.calls, self.act_at, self.act = [], 0, act_at, act

    def chat(self, conversations, n, temperature, max_tokens, seeds):
        self.calls += 1
        if self.calls == self.act_at:
            self.act()
        self.asked += seeds
        return [[self.reply(seed, k) for k in range(n)] for seed in seeds]

    def reply(self, seed, k):
        fate = (seed >> (3 * k)) % 8
        if fate == 0:
            return Reply("no idea, ünsicher", "length", 9, 7)
        return Reply(f"<eval>ü</eval><answer>[[{'AB'[fate % 2]}]]</answer>", "stop", 9, 3 + fate)


def make_pairs(count, **changes):
    return [
        replace(Pair(f"p{i}", "test", ({"role": "user", "content": f"question {i}"},), f"yes {i}", f"no {i}",
                     "AB"[i % 2], "Chat" if i % 3 else "Math"), **changes) for i in range(count)
    ]


def make_run(tmp_path, pairs=None, **settings):
    data = tmp_path / "pairs.jsonl"
    if not data.exists():
        data.write_text(save_pairs(pairs or make_pairs(7)), encoding="utf-8")
    settings = {"at_once": 6, "out": str(tmp_path / "out")} | settings
    return ev.Run(model="none", data=str(data), **settings)


def lines(cfg):
    return Path(cfg.out, "judgements.jsonl").read_text(encoding="utf-8").splitlines()


MODES = [{}, {"both_orders": True}, {"votes": 3, "temperature": 1.0, "both_orders": True}]


@pytest.mark.parametrize("mode", MODES)
def test_interrupted_run_equals_uninterrupted_one(tmp_path, mode):
    cfg = make_run(tmp_path, **mode)
    whole = Sampler()
    summary = ev.evaluate(cfg, whole)
    expected, text = sorted(lines(cfg)), Path(cfg.out, "summary.json").read_text()
    assert len(whole.asked) == len(set(whole.asked)) == 7 * (2 if cfg.both_orders else 1)
    assert json.loads(text) == summary
    log = Path(cfg.out, "judgements.jsonl").read_bytes()
    starts = [i + 1 for i, byte in enumerate(log) if byte == 10]
    for cut in [0, 1, starts[0] - 1, starts[0], starts[0] + 5, starts[3], starts[-2] + 40, len(log) - 1, len(log)]:
        Path(cfg.out, "judgements.jsonl").write_bytes(log[:cut])
        kept = [json.loads(line) for line in log[: log.rfind(b"\n", 0, cut) + 1].splitlines()]
        again = Sampler()
        assert ev.evaluate(cfg, again) == summary
        assert sorted(lines(cfg)) == expected
        assert Path(cfg.out, "summary.json").read_text() == text
        names = [(row["pair_id"], row["order"]) for row in kept]
        complete = {name for name in names if names.count(name) == cfg.votes}
        assert len(again.asked) == len(set(again.asked)) == len(whole.asked) - len(complete)
        everything = {(row["pair_id"], row["order"]) for row in map(json.loads, expected)}
        assert set(again.asked) == {derive_seed(0, "test", *name) for name in everything - complete}


def test_finished_evaluation_asks_nothing(tmp_path):
    cfg = make_run(tmp_path)
    ev.evaluate(cfg, Sampler())
    again = Sampler()
    ev.evaluate(cfg, again)
    config = Path(cfg.out, "config.json")
    before = {k: v for k, v in json.loads(config.read_text()).items() if k not in ("extra_body", "baseline")}
    config.write_text(json.dumps(before))  # as a version without these settings wrote it
    ev.evaluate(cfg, again)
    assert again.calls == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_waits_for_the_running_call(tmp_path, number):
    cfg = make_run(tmp_path)
    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        ev.evaluate(cfg, Sampler(1, lambda: os.kill(os.getpid(), number)))
    assert signal.getsignal(number) is handler
    assert len(lines(cfg)) == 6 and not Path(cfg.out, "summary.json").exists()
    rest = Sampler()
    assert ev.evaluate(cfg, rest)["overall"]["count"] == 7
    assert len(rest.asked) == 1


def test_changed_configuration_data_or_prompt_is_refused(tmp_path):
    cfg = make_run(tmp_path, prompt_file=str(tmp_path / "prompt.txt"))
    (tmp_path / "prompt.txt").write_text("judge")
    ev.evaluate(cfg, Sampler())
    with pytest.raises(UserError, match="max_tokens"):
        ev.evaluate(replace(cfg, max_tokens=(5,)), Sampler())
    (tmp_path / "prompt.txt").write_text("judge well")
    with pytest.raises(UserError, match="prompt_digest"):
        ev.evaluate(cfg, Sampler())
    (tmp_path / "prompt.txt").write_text("judge")
    ev.evaluate(cfg, Sampler())
    Path(cfg.data).write_text(save_pairs(make_pairs(7, response_b="edited")))
    with pytest.raises(UserError, match="data_digest"):
        ev.evaluate(cfg, Sampler())


def test_retrained_model_is_refused(tmp_path, monkeypatch):
    cfg = replace(make_run(tmp_path), model=str(tmp_path / "model"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(ev, "make_sampler", lambda *_: Sampler())
    ev.evaluate(cfg)
    ev.evaluate(cfg)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"others!")
    with pytest.raises(UserError, match="model_digest"):
        ev.evaluate(cfg)


def test_foreign_lines_in_the_log_are_refused(tmp_path):
    cfg = make_run(tmp_path)
    ev.evaluate(cfg, Sampler())
    for line in ('{"pair_id": "p0"}\n', lines(cfg)[0].replace('"p0"', '"other"') + "\n"):
        Path(cfg.out, "judgements.jsonl").write_text(line)
        with pytest.raises(UserError, match=":1: not a verdict"):
            ev.evaluate(cfg, Sampler())


@pytest.mark.parametrize("settings", [
    {"votes": 3}, {"votes": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"limit": -1}, {"at_once": -1},
    {"max_tokens": (0,)}, {"max_tokens": (8, 8)}])
def test_settings_that_cannot_work(tmp_path, settings):
    with pytest.raises(UserError):
        ev.evaluate(make_run(tmp_path, **settings), Sampler())
    assert not (tmp_path / "out").exists()


def test_repeated_ids_are_kept_apart(tmp_path):
    pairs = make_pairs(4)
    pairs = [*pairs, replace(pairs[0], response_a="another"), replace(pairs[1], source="elsewhere")]
    cfg = make_run(tmp_path, pairs, both_orders=True)
    summary = ev.evaluate(cfg, Sampler())
    assert summary["overall"]["pairs"] == 6 and summary["overall"]["count"] == 12
    assert {json.loads(line)["pair_id"] for line in lines(cfg)} == {"p0", "p0~2", "p1", "p2", "p3"}
    again = Sampler()
    assert ev.evaluate(cfg, again) == summary and again.calls == 0


def judged(pair, order, sample, verdict, winner, category="Chat", **changes):
    one = Judgement(pair, "s", category, {}, order, sample, verdict, winner, verdict == winner, "stop", 10, "text")
    return replace(one, **changes)


def test_numbers_by_hand():
    both = [judged("a", "AB", 0, "A", "A"), judged("a", "BA", 0, "B", "B"),  # right, consistent
            judged("b", "AB", 0, "A", "B", "Math"), judged("b", "BA", 0, "A", "A", "Math"),  # always says A
            judged("c", "AB", 0, None, "B"), judged("c", "BA", 0, "A", "A", response_tokens=40)]
    summary = ev.summarise(both)
    overall = summary["overall"]
    assert overall["accuracy"] == pytest.approx(4 / 6)
    assert overall["consistency"] == pytest.approx(1 / 3)
    assert overall["verdict_rate"] == pytest.approx(5 / 6)
    assert overall["share_a"] == pytest.approx(4 / 5)
    assert overall["length_mean"] == pytest.approx(15)
    assert (overall["count"], overall["pairs"]) == (6, 3)
    # per pair 1, 1/2, 1/2: unbiased variance 1/12, over 3 pairs
    assert overall["accuracy_se"] == pytest.approx((1 / 12 / 3) ** 0.5)
    assert "vote_accuracy" not in overall
    assert summary["by_category"]["Math"]["accuracy"] == 0.5 and "accuracy_se" not in summary["by_category"]["Math"]
    assert summary["by_category"]["Chat"]["pairs"] == 2 and list(summary["by_source"]) == ["s"]


def test_majority_by_hand():
    votes = [judged("a", "AB", k, v, "A") for k, v in enumerate(["A", "A", "B"])]  # A wins 2 : 1, right
    votes += [judged("b", "AB", k, v, "A") for k, v in enumerate(["A", "B", None])]  # a tie is no verdict
    votes += [judged("c", "AB", k, v, "B") for k, v in enumerate(["B", None, None])]  # 1 : 0, right
    overall = ev.summarise(votes)["overall"]
    assert overall["vote_accuracy"] == pytest.approx(2 / 3)
    assert overall["accuracy"] == pytest.approx(4 / 9)
    # both orders vote together: AB says A, A (response a twice), BA says A, A, A (response b three times)
    mixed = [judged("d", "AB", 0, "A", "B"), judged("d", "AB", 1, "A", "B"), judged("d", "AB", 2, None, "B")]
    mixed += [judged("d", "BA", k, "A", "A") for k in range(3)]
    assert ev.summarise(mixed)["overall"]["vote_accuracy"] == 1.0


def test_table_shows_rows_and_no_escape_sequence(capsys):
    tables.print_summary(ev.summarise([judged("a", "AB", 0, "A", "A", "\x1b[31mred"), judged("b", "AB", 0, "A", "B")]))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert [line.split()[0] for line in out.splitlines() if line] == ["accuracy", "all", "<U+001B>[31mred", "Chat"]
    assert out.splitlines()[1].split() == ["all", "0.500", "0.500", "1.000", "1.000", "10.0", "2"]


# ---- curves --------------------------------------------------------------------------------------------


def test_a_curve_over_votes_is_the_mean_over_all_subsets(tmp_path):
    cfg = make_run(tmp_path, make_pairs(9), votes=5, temperature=1.0, both_orders=True)
    summary = ev.evaluate(cfg, Sampler())
    rows = list(map(json.loads, lines(cfg)))
    points = {point["x"]: point for point in summary["curve"]["points"]}
    assert list(points) == [1, 2, 3, 4, 5] and summary["curve"]["drawn"] == [1, 3, 5]
    for k, point in points.items():
        shares = {}
        for pair, order in itertools.product({row["pair_id"] for row in rows}, ("AB", "BA")):
            votes = [row for row in rows if (row["pair_id"], row["order"]) == (pair, order)]
            won = [sum(v["correct"] for v in some) > sum(not v["correct"] and v["verdict"] is not None for v in some)
                   for some in itertools.combinations(votes, k)]
            shares.setdefault(pair, []).append(statistics.fmean(won))
        means = [statistics.fmean(orders) for orders in shares.values()]
        assert point["accuracy"] == pytest.approx(statistics.fmean(means))
        assert point["accuracy_se"] == pytest.approx(statistics.stdev(means) / 3)
    assert points[1]["accuracy"] == pytest.approx(summary["overall"]["accuracy"])


class Slow:
    """Right on every pair, but only after 10 to 16 tokens; says what it was asked."""

    def __init__(self):
        self.asked = []

    def chat(self, conversations, n, temperature, max_tokens, seeds):
        self.asked += [max_tokens] * len(seeds)
        whole = [10 + int(messages[-1]["content"].partition("question ")[2][0]) for messages in conversations]
        says = ["AB"[messages[-1]["content"].index("yes") > messages[-1]["content"].index("no ")]
                for messages in conversations]
        return [[Reply(f"[[{letter}]]", "stop", 9, length) if length <= max_tokens
                 else Reply("and so on", "length", 9, max_tokens)] * n
                for letter, length in zip(says, whole, strict=True)]


def test_a_sweep_of_budgets(tmp_path, capsys):
    pairs = make_pairs(7)
    pairs = [replace(p, response_a="yes", response_b="no !", winner="A") for p in pairs]
    cfg = make_run(tmp_path, pairs, max_tokens=(8, 12, 16))
    slow = Slow()
    summary = ev.evaluate(cfg, slow)
    curve = summary["curve"]
    assert [(p["x"], p["accuracy"]) for p in curve["points"]] == [(8, 0.0), (12, pytest.approx(3 / 7)), (16, 1.0)]
    assert curve["points"][0]["verdict_rate"] == 0 and curve["points"][2]["length_mean"] == 13
    assert curve["remark"].startswith("rises by 1.000")
    assert json.loads(Path(cfg.out, "summary.json").read_text()) == summary
    tables.print_summary(summary)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "inference budget (single verdicts; pairs: 7)" and out[3].split()[:2] == ["8", "0.000"]
    # a sweep goes on where it stopped, and takes further budgets
    log = Path(cfg.out, "tokens-12", "judgements.jsonl")
    log.write_text("".join(log.read_text().splitlines(True)[:5]))
    again = Slow()
    more = ev.evaluate(replace(cfg, max_tokens=(8, 12, 16, 11)), again)
    assert again.asked == [12, 12] + [11] * 7
    assert [p for p in more["curve"]["points"] if p["x"] != 11] == curve["points"]
    with pytest.raises(UserError, match="seed"):
        ev.evaluate(replace(cfg, seed=1), again)


def test_no_curve_is_said_to_be_none():
    flat = {k: {("s", str(i)): float(i % 2) for i in range(20)} for k in (1, 3)}
    assert outcomes.curve("", "", "", flat, {})["remark"].startswith("no curve: from 1 to 3 accuracy moves by 0.000")
    noisy = {1: dict(flat[1]), 3: flat[1] | {("s", "0"): 1.0}}
    assert outcomes.curve("", "", "", noisy, {})["remark"].startswith("no curve")
    worse = {1: flat[1], 3: dict.fromkeys(flat[1], 0.0)}
    assert outcomes.curve("", "", "", worse, {})["remark"].startswith("falls by 0.500")


# ---- a model in this process, and in several ------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model two of whose words are verdicts."""
    path = tmp_path_factory.mktemp("model")
    make_folder(path, make_lm(), tokenizer=True)
    words = (path / "tokenizer.json").read_text()
    (path / "tokenizer.json").write_text(words.replace('"w28"', '"[[A]]"').replace('"w29"', '"[[B]]"'))
    return str(path)


def model_run(tmp_path, folder, **settings):
    (tmp_path / "prompt.txt").write_text("judge")
    settings = {"prompt_file": str(tmp_path / "prompt.txt"), "temperature": 1.0, "max_tokens": (9,)} | settings
    return replace(make_run(tmp_path, make_pairs(11)), model=folder, sampler="torch", **settings)


def all_lines(out):
    return sorted(line for path in Path(out).glob("judgements*.jsonl") for line in path.read_text().splitlines())


def test_the_context_caps_the_budget_and_that_is_said(tmp_path, folder, capsys):
    cfg = model_run(tmp_path, folder, max_tokens=(500,), temperature=0.0, limit=3)
    ev.evaluate(cfg)
    rows = list(map(json.loads, lines(cfg)))
    prompt = int(capsys.readouterr().out.partition("longest prompt (")[2].split()[0])
    assert {row["response_tokens"] for row in rows if row["finish_reason"] == "length"} <= {128 - prompt}
    ev.evaluate(replace(cfg, out=str(tmp_path / "short"), max_tokens=(128 - prompt,)))
    assert "longest prompt" not in capsys.readouterr().out


def test_two_processes_judge_as_one(tmp_path, folder, server, monkeypatch):
    cfg = model_run(tmp_path, folder, both_orders=True, votes=2)
    load = ev.load_sampler  # in float64: two processes make other batches
    monkeypatch.setattr(ev, "load_sampler", lambda path, dtype, *rest, **more: load(path, "float64", *rest, **more))
    summary = ev.evaluate(cfg)
    expected = all_lines(cfg.out)
    assert 0 < summary["overall"]["verdict_rate"] < 1 and len(expected) == 44

    def two(out):
        argv = ["run", "--model", folder, "--data", cfg.data, "--out", out, "--prompt-file", cfg.prompt_file,
                *"--both-orders --votes 2 --temperature 1 --max-tokens 9 --sampler torch --at-once 6".split()]
        reply = server({"script": "eval", "ranks": 2, "out": out, "argv": argv, "patch": FLOAT64})
        assert reply["codes"] == [0, 0], reply["output"]
        return "".join(reply["output"])

    out = tmp_path / "two"
    printed = two(str(out))
    assert printed.count("majority of k of 2 votes") == 1  # one process speaks
    logs = [path.read_text().splitlines(True) for path in sorted(out.glob("judgements_*.jsonl"))]
    assert list(map(len, logs)) == [24, 20] and all_lines(out) == expected
    assert json.loads((out / "summary.json").read_text()) == summary
    rows = outcomes.read_log([str(out)])
    assert len(outcomes.read_outcomes("pairs", rows)[0]) == 11
    # what is missing of two processes' logs is judged by one, and the other way round
    (out / "judgements_0.jsonl").write_text("".join(logs[0][:7]) + logs[0][7][:20])
    assert ev.evaluate(replace(cfg, out=str(out))) == summary and all_lines(out) == expected
    one = Path(cfg.out, "judgements.jsonl")
    one.write_text("".join(one.read_text().splitlines(True)[:21]))
    two(cfg.out)
    assert all_lines(cfg.out) == expected and (Path(cfg.out) / "judgements_1.jsonl").stat().st_size > 0


def test_the_engine_is_given_room_for_the_longest_prompt_and_chain(tmp_path, folder, monkeypatch):
    asked = []
    monkeypatch.setattr(ev, "which_sampler", lambda kind, *_: ("vllm", "in this test"))
    monkeypatch.setattr(ev, "load_sampler", lambda *arguments, **_: asked.append(arguments) or Sampler())
    cfg = replace(model_run(tmp_path, folder, limit=2), sampler="vllm")
    ev.evaluate(cfg)
    [(model, dtype, kind, context)] = asked
    assert (model, dtype, kind) == (folder, "float32", "vllm")
    assert 9 < context < 128  # the longest prompt and nine tokens


# ---- the command ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"max_tokens": (8, 9)}])
def test_an_evaluation_without_a_verdict_is_no_success(tmp_path, monkeypatch, capsys, settings):
    class Cut(Sampler):
        def reply(self, seed, k):
            return Reply("and so", "length", 9, 7)

    cfg = make_run(tmp_path, **settings)
    monkeypatch.setattr(ev.tyro.extras, "subcommand_cli_from_dict", lambda *_, **__: cfg)
    monkeypatch.setattr(ev, "make_sampler", lambda *_: Cut())
    monkeypatch.setattr(ev, "resolve", lambda cfg, *_: cfg)
    monkeypatch.setattr(ev.Run, "asked", lambda *_, **__: ev.Asked())
    with pytest.raises(NothingJudged, match=r"of them: cut off; raise --max-tokens") as caught:
        ev.main()
    assert caught.value.exit_code == 1 and Path(cfg.out, "summary.json").exists()
    cfg = replace(cfg, baseline=True)
    ev.main()
    assert "a baseline: none of" in capsys.readouterr().out


WHY = [("", "length", 0, "prompt too long"), ("A None B 1.0", "length", 0, "prompt too long"),
       ("<type> Chat", "length", 60, "cut off"), ("A 1.0 B 1.0", "stop", 0, "equal scores"),
       ("[[A]] or [[B]]", "stop", 9, "both letters"), ("A is better", "stop", 9, "no verdict tag"),
       ("<answer>[[A]]</answer> and much more", "stop", 9, "letter in the wrong place"),
       ("<answer>A</answer>", "stop", 9, "verdict in another form"), ("[[C]]", "stop", 9, "verdict in another form"),
       ("<think>[[A]]</think> ", "stop", 9, "nothing written"),
       ("(no reply: content filter)", "stop", 9, "no reply: content filter")]


def test_the_summary_says_why_there_is_no_verdict(capsys):
    seen = [judged(f"p{i}", "AB", 0, None, "A", text=text, finish_reason=reason, response_tokens=tokens)
            for i, (text, reason, tokens, _) in enumerate(WHY)]
    summary = ev.summarise([*seen, judged("right", "AB", 0, "A", "A")])
    assert summary["silent"] == Counter(kind for *_, kind in WHY)
    tables.print_summary(summary)
    assert "no verdict, counted as wrong: 2 prompt too long, 2 verdict in another form, 1 " in capsys.readouterr().out


def test_importing_needs_no_torch():
    code = "import sys\nimport eval\nimport judge\nfrom report import page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
