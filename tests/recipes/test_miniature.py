"""The paper's tables in miniature: rows as commands, what is run again, what is counted."""

from __future__ import annotations

import importlib
import json
import math
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

import grpo
from cor_prompt import encode_prompt, encode_target, parse_trace, render
from judging.verdicts import Judgement
from recipes import miniature, miniature_results as mr
from recipes.miniature import ROWS, Row, Task, execute, plan
from reward import format_reward, parse_verdict
from runtime import cli, disk
from runtime.errors import UserError
from toy import probe, world
from toy.files import Build, build, build_tokenizer
from toy.world import Flaws

# ---- the rows ------------------------------------------------------------------------------------------


def commands() -> list[tuple[str, list[str]]]:
    """(row, words) of every command of seed 3."""
    tasks = plan(ROWS, [row.name for row in ROWS], 3, "runs/tables")
    return [(task.row, shlex.split(command)) for task in tasks for command in task.commands]


@pytest.mark.parametrize(("row", "words"), commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_command_is_one_that_its_script_takes(row, words):
    if words[0] != "python":
        assert words[0] in ("cat", "grep", "head", "mkdir")
        return
    name, args = (words[2], words[3:]) if words[1] == "-m" else (words[1].removesuffix(".py"), words[2:])
    if name == "toy":
        if args[0] != "serve":
            assert tyro.cli({"build": Build, "probe": probe.Probe}[args[0]], args=args[1:])
        return
    script = importlib.import_module(name)
    if name in ("eval", "evaluation.probes"):
        assert tyro.cli(getattr(script, args[0].capitalize()), args=args[1:])
    elif name == "variants.toy_forms":
        assert tyro.cli(script.Config, args=args)
    else:
        cfg = cli.parse(getattr(script, "Config", grpo.Config), getattr(script, "PRESETS", grpo.PRESETS), args)
        assert cfg.out == f"runs/tables/seed-3/{row}" and getattr(cfg, "seed", 3) == 3


def test_every_row_of_a_table_is_a_row_that_is_run():
    names = {row.name for row in ROWS}
    used = {name for entries in mr.TABLES.values() for _, name, _, _ in entries} | {name for name, _ in mr.SIZES}
    used |= {name for names in mr.DIFFERENCES for name in names[:2]}
    assert {name.removesuffix(":start") for name in used} <= names
    reinforced = {row.name for row in ROWS if any("--held-out" in c and "sft.py" not in c for c in row.commands)}
    assert {name.removesuffix(":start") for name in used if name.endswith(":start")} <= reinforced


def test_the_plan_has_a_row_after_those_it_starts_from_and_nothing_else():
    tasks = plan(ROWS, ["small-rm-r1"], 0, "r")
    assert [task.row for task in tasks] == ["world", "world-answer", "small", "small-distilled", "small-rm-r1"]
    with pytest.raises(UserError, match="no row is called nothing"):
        plan(ROWS, ["nothing"], 0, "r")
    served = [" ".join(task.commands) for seed in (0, 1, 2)
              for task in plan(ROWS, ["traces-redo", "traces-force"], seed, "r") if task.row.startswith("traces")]
    assert len({re.search("http://[^ ]+", text)[0] for text in served}) == 6  # two seeds may run at once


# ---- the toy's forms -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught() -> list:
    rng = random.Random(3)
    return [replace(p, trace=world.teach(p, rng, Flaws())) for p in world.make_pairs(400, rng, False, "p")]


@pytest.mark.parametrize(("form", "style"), [("untyped", "plain"), ("rubrics", "rubrics"), ("plain", "plain")])
def test_another_form_keeps_verdict_and_checks(taught, form, style):
    for pair in taught:
        text = world.reshape(pair, pair.trace, form, random.Random(0))
        before, after = parse_trace(pair.trace), parse_trace(text)
        assert after.type is None and after.answer == before.answer
        assert format_reward(text, style) == 1.0  # so that the cold start is not paid for leaving the form
        assert (after.rubric is None) == (form == "plain" or after.solution is not None)
        one = judgement(text, parse_verdict(text) or "A")
        assert mr.follows_checks(one) == mr.follows_checks(replace(one, text=pair.trace))


def test_a_sum_without_its_solution_by_hand(taught):
    trace = ("<type> Reasoning </type> <solution> 7 + 6 = 1 3 ; 3 + 4 + 1 = 8 ; 8 3 </solution> "
             "<eval> A 8 8 yes 1 3 no wrong ; B 8 8 yes 3 3 yes right </eval> <answer>[[B]]</answer>")
    pair, rng = replace(taught[0], winner="A"), random.Random(0)
    end = "<eval> right A 8 1 no B 8 3 yes ; total A 0 B 1 </eval> <answer>[[B]]</answer>"
    assert world.reshape(pair, trace, "plain", rng) == end
    assert world.reshape(pair, trace, "rubrics", rng) == "<rubric> right </rubric> " + end
    assert world.reshape(pair, trace, "answer", rng) == "<answer>[[A]]</answer>"  # the right letter, not the teacher's
    assert world.reshape(pair, trace, "cor", rng) == trace


def test_every_form_and_prompt_is_made_of_the_vocabulary_and_fits_the_caps(taught):
    tokenizer = build_tokenizer()
    unknown = tokenizer.convert_tokens_to_ids("<|unk|>")
    longest = {}
    for form, style, prompt in (("cor", "instruct", "judge"), ("plain", "plain", "judge {data}"),
                                ("untyped", "plain", "judge {data}"),
                                ("rubrics", "rubrics", "judge"), ("answer", "instruct", "judge")):
        texts = [replace(pair, trace=world.reshape(pair, pair.trace, form, random.Random(0))) for pair in taught[:100]]
        ids = [encode_prompt(render(pair, style, prompt), tokenizer) for pair in texts]
        targets = [encode_target(pair, tokenizer) for pair in texts]
        assert not any(unknown in row for row in ids + targets) and max(map(len, ids)) <= 64
        longest[form] = max(map(len, targets))
    assert longest == {"cor": 49, "plain": 37, "untyped": 46, "rubrics": 46, "answer": 4}
    rng = random.Random(0)
    mixed = [world.reshape(pair, pair.trace, "mixed", rng) for pair in taught]
    starts = [sum(text.startswith(tag) for text in mixed) for tag in ("<type>", "<eval>", "<answer>")]
    assert sum(starts) == len(mixed) and min(starts) > len(mixed) / 4
    assert longest["answer"] < 8 < 24 < longest["plain"] < 40 < longest["cor"] < 60


def test_worlds_of_another_form_or_size_differ_in_nothing_else(tmp_path):
    small = {"sft_pairs": 30, "rl_pairs": 20, "held_out_pairs": 20, "sft_held_out_pairs": 10}
    files = ("start/model.safetensors", "prompt.txt", "sft.jsonl", "rl.jsonl", "held_out.jsonl", "world.json")

    def world(name: str, **options: object) -> dict[str, bytes]:
        build(Build(str(tmp_path / name), **small, **options))
        return {file: (tmp_path / name / file).read_bytes() for file in files}

    cor = world("cor")
    changed = {"world.json", "sft.jsonl"}
    for form, also in (("rubrics", set()), ("plain", {"prompt.txt"}), ("answer", {"rl.jsonl"})):
        other = world(form, traces=form)
        assert {file for file in files if other[file] != cor[file]} == changed | also
    wide = world("wide", hidden=96, layers=1)
    assert {file for file in files if wide[file] != cor[file]} == {"world.json", "start/model.safetensors"}


# ---- what is run, and run again ------------------------------------------------------------------------

CHAIN = (
    Row("a", ("mkdir -p {here}", "echo seed {seed} >> {here}/out")),
    Row("b", ("mkdir -p {here}", "cat {a}/out {a}/out > {here}/out")),
    Row("c", ("mkdir -p {here}; wc -l < {b}/out > {here}/out",)),
)


def tasks_of(rows: tuple[Row, ...], root: Path, seeds: tuple[int, ...] = (0,)) -> list[Task]:
    return [task for seed in seeds for task in plan(rows, [row.name for row in rows], seed, str(root))]


def test_rows_wait_for_those_they_start_from_and_are_run_once(tmp_path, capsys):
    execute(tasks_of(CHAIN, tmp_path, (0, 1)))
    for seed in (0, 1):
        assert (tmp_path / f"seed-{seed}/c/out").read_text().strip() == "2"
        assert (tmp_path / f"seed-{seed}/a/out").read_text() == f"seed {seed}\n"
        record = json.loads((tmp_path / f"seed-{seed}/records/a.json").read_text())
        assert record["finished"] and record["wall_seconds"] >= 0 and len(record["commands"]) == 2
        assert "+ echo seed" in (tmp_path / f"seed-{seed}/logs/a.log").read_text()
    assert capsys.readouterr().out.count("seed 1 c") == 1
    execute(tasks_of(CHAIN, tmp_path, (0, 1)))
    assert capsys.readouterr().out == "" and (tmp_path / "seed-0/a/out").read_text() == "seed 0\n"


def test_a_changed_command_is_run_again_with_all_that_starts_from_it(tmp_path, capsys):
    """And in an empty folder: the command appends."""
    execute(tasks_of(CHAIN, tmp_path))
    capsys.readouterr()
    changed = (CHAIN[0], replace(CHAIN[1], commands=("mkdir -p {here}", "cat {a}/out >> {here}/out")), CHAIN[2])
    execute(tasks_of(changed, tmp_path))
    said = capsys.readouterr().out
    assert "seed 0 a" not in said and "seed 0 b" in said and (tmp_path / "seed-0/c/out").read_text().strip() == "1"
    assert "/a/out" in (log := (tmp_path / "seed-0/logs/b.log").read_text()) and log.count("cat") == 1


def test_results_are_of_all_seeds_and_of_no_row_of_other_commands(tmp_path, monkeypatch):
    monkeypatch.setattr(miniature, "RESULTS", tmp_path)
    parts = ("rows", "probes", "looks", "parameters", "seconds")
    (tmp_path / "results.json").write_text(json.dumps({part: {"else": {"0": 1}} for part in parts}))
    for chain, rows, seed in ((CHAIN, ("c",), 0), (CHAIN, ("a",), 1),
                              ((CHAIN[0], replace(CHAIN[1], commands=("true",)), CHAIN[2]), ("a",), 1)):
        monkeypatch.setattr(miniature, "ROWS", chain)
        miniature.run_rows(miniature.Run(rows, seeds=(seed,), root=str(tmp_path / "runs")))
        kept = json.loads((tmp_path / "results.json").read_text())["seconds"]
    assert {row: list(seeds) for row, seeds in kept.items()} == {"else": ["0"], "a": ["0", "1"]}


def test_a_failed_row_stops_only_what_starts_from_it_and_is_tried_again(tmp_path, capsys):
    gate = tmp_path / "gate"
    rows = (Row("x", (f"mkdir -p {{here}}; test -e {gate}",)), Row("y", ("ls {x}",)), Row("z", ("echo fine",)))
    with pytest.raises(UserError, match=r"1 rows failed \(seed 0 x\)"):
        execute(tasks_of(rows, tmp_path))
    said = capsys.readouterr().out
    assert "seed 0 x: FAILED" in said and "seed 0 z" in said and "seed 0 y" not in said
    gate.touch()
    execute(tasks_of(rows, tmp_path))
    assert "seed 0 y" in capsys.readouterr().out


def test_an_interrupt_waits_until_what_runs_has_saved_and_the_next_call_continues(tmp_path):
    script = textwrap.dedent(f"""
        from recipes.miniature import Row, execute, plan
        slow = ('mkdir -p {{here}}', '''bash -c "trap 'sleep .3; echo saved >> {{here}}/out; exit 0' TERM;'''
                '''echo x >> {{here}}/out; sleep $(cat {tmp_path}/seconds) & wait"''', 'echo next >> {{here}}/out')
        execute(plan((Row("slow", slow),), ["slow"], 0, "{tmp_path}"))
    """)
    (tmp_path / "seconds").write_text("600")
    process = subprocess.Popen([sys.executable, "-c", script], cwd=miniature.PROJECT, stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    out = tmp_path / "seed-0/slow/out"
    while not out.exists():
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in process.communicate(timeout=60)[1]
    assert not json.loads((tmp_path / "seed-0/records/slow.json").read_text())["finished"]
    assert out.read_text() == "x\nsaved\n"
    (tmp_path / "seconds").write_text("0")
    subprocess.run([sys.executable, "-c", script], cwd=miniature.PROJECT, check=True)
    assert out.read_text() == "x\nsaved\nx\nnext\n"  # the folder was kept


def test_a_change_of_the_code_below_makes_rows_run_again(tmp_path, monkeypatch):
    """At the root, in a room, or of a patch; what stands above training and judging is left out."""
    monkeypatch.setattr(miniature, "PROJECT", tmp_path)

    def changed(file: str, patch: str = "") -> bool:
        before = plan(CHAIN, ["c"], 0, "r")[-1].key
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("x = 1\n")
        return plan((replace(CHAIN[0], patch=patch), *CHAIN[1:]), ["c"], 0, "r")[-1].key != before

    assert changed("tool.py") and changed("toy/__init__.py") and changed("toy/part.py")
    assert not changed("recipes/__init__.py") and not changed("runs/mine.py") and changed("runs/mine.py", "+x")


# ---- numbers -----------------------------------------------------------------------------------------


def judgement(text: str, verdict: str = "A", winner: str = "A", **changes) -> Judgement:
    one = Judgement("held_out-0", "toy", "Chat", {}, "AB", 0, verdict, winner, verdict == winner, "stop", 9, text)
    return replace(one, **changes)


def test_an_error_is_the_larger_of_pairs_and_seeds():
    # pairs: variances 1/3 and 1/4 over 4 pairs each -> sqrt(1/12 + 1/16) / 2; seeds: |0.5 - 0.75| / 2
    assert mr.estimate([[1, 0, 1, 0], [1, 1, 1, 0]]).error == pytest.approx(math.sqrt(1 / 12 + 1 / 16) / 2)
    apart = mr.estimate([[1.0] * 50, [0.0] * 50])
    assert apart.error == pytest.approx(0.5) and not apart.clear
    for seeds, error, clear in (((0.2, 0.3, 0.1), 0.05, True), ((0.2, 0.3, 0.1), 0.11, False),
                                ((0.9, 0.9, -0.1), 0.05, False), ((0.5,), 0.0, False)):
        assert mr.Estimate(sum(seeds) / len(seeds), seeds, error).clear == clear  # two errors, and one sign


def measured(**rights: list[str]) -> dict:
    return {"rows": {name: {str(i): row_of(right) for i, right in enumerate(seeds)} for name, seeds in rights.items()}}


def row_of(right: str) -> dict:
    share = sum(map(int, right)) / len(right) / 2
    return {"overall": {"accuracy": share, "consistency": 1.0, "verdict_rate": 1.0, "length_mean": 40.0},
            "Chat": share, "Reasoning": share, "follows_checks": 1.0, "right": right}


def test_a_difference_is_taken_pair_by_pair_over_the_seeds_that_both_have():
    results = measured(low=["1" * 50] * 3, high=["2" * 50] * 3, odd=["12" * 25, "21" * 25, "10" * 25])
    assert mr.difference(results, "high", "low") == mr.Estimate(0.5, (0.5, 0.5, 0.5), 0.0)
    assert not mr.difference(results, "odd", "low").clear and mr.difference(results, "high", "gone") is None
    assert mr.gains(measured(**{"m": ["2" * 10], "m:start": ["1" * 10]}), "m").mean == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("checks", "verdict", "expected"),
    [
        ("polite A thanks yes B now no ; total A 2 B 1", "A", True),
        ("polite A thanks yes B now no ; total A 2 B 1", "B", False),
        ("total A 2 B 2", "A", None),
        ("A 8 8 yes 1 3 no wrong ; B 8 8 yes 3 3 yes right", "B", True),
        ("A 8 8 yes 1 3 no wrong ; B 8 8 yes 3 3 no wrong", "B", None),
        ("nonsense", "B", None),
        ("total A 2 B 1", None, None),
    ],
)
def test_a_verdict_is_held_against_the_chain_s_own_checks(checks, verdict, expected):
    text = f"<type> Chat </type> <eval> {checks} </eval> <answer>[[{verdict}]]</answer>"
    assert mr.follows_checks(judgement(text, verdict)) is expected


def fake_run(root: Path, name: str, seed: int, share: int) -> tuple:
    """A reinforced row as its commands leave it: 20 pairs, of which `share` are right after and half before."""
    side = root / f"seed-{seed}"
    for step, right in ((0, 10), (80, share)):
        lines = [
            judgement("", "A", "A" if i < right else "B", pair_id=f"held_out-{i}", order=order,
                      category="Chat" if i % 2 else "Reasoning")
            for i in range(20) for order in ("AB", "BA")
        ]
        text = "".join(json.dumps(vars(one)) + "\n" for one in lines)
        disk.write_whole(side / name / "rollouts" / f"step_{step:06d}.jsonl", text)
    return str(seed), side / name, {"cpu_seconds": 60.0, "wall_seconds": 90.0}


def test_runs_become_tables(tmp_path):
    done = [fake_run(tmp_path / "runs", name, seed, share) for seed in (0, 1, 2)
            for name, share in (("rm-r1", 18 + seed % 2), ("cold-cor", 11))]
    mr.collect(done, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["rows"]["rm-r1"]["0"]["right"] == "2" * 18 + "00"
    assert results["rows"]["rm-r1:start"]["2"]["overall"]["accuracy"] == 0.5
    assert set(results["seconds"]) == {"rm-r1", "cold-cor"}
    mr.write_tables(tmp_path)
    text = (tmp_path / "results.md").read_text()
    # pairs: sqrt(2 x 0.09 / 19 + 0.0475 / 19) / 3 = 0.0365; of the differences sqrt(2 x 0.24 / 19 + 0.2475 / 19) / 3
    assert "| RM-R1: distilled + RL | 0.917 ± 0.073 | 0.900 0.950 0.900 |" in text
    assert "| rm-r1 - rm-r1:start | +0.417 ± 0.130 | +0.400 +0.450 +0.400 | yes |  |" in text
    assert "| cold-start RL from nothing, 20 rounds | not run |" in text
    before = [path.read_bytes() for path in sorted(tmp_path.iterdir()) if path.is_file()]
    mr.collect(done, tmp_path)
    mr.write_tables(tmp_path)
    assert before == [path.read_bytes() for path in sorted(tmp_path.iterdir()) if path.is_file()]


# ---- the page ------------------------------------------------------------------------------------------

KEPT = json.loads((miniature.PROJECT / "recipes" / "miniature" / "results.json").read_text())
PAGE = (miniature.PROJECT / "docs" / "miniature.md").read_text(encoding="utf-8")
SHOWN = {  # how a line of the page's table begins: the rows whose accuracies it gives, in its order
    "cold-start RL (format + answer)": ("cold-plain", "cold-plain:start"),
    "+ rubrics": ("cold-rubrics",),
    "+ categorisation": ("cold-cor",),
    "RM-R1: distilled, + RL": ("rm-r1:start", "rm-r1"),
    "control: the same compute": ("longer-sft",),
    "control: distilled on a clean teacher": ("clean-teacher",),
    "answers alone": ("answer-sft", "distilled-answer-sft"),
    "an eighth of the data": ("small-answer-sft", "small-rm-r1:start", "small-rm-r1"),
    "the largest token budget": ("cap-60", "cap-8"),
}


def test_the_committed_tables_are_those_of_the_committed_numbers(tmp_path):
    shutil.copy(miniature.RESULTS / "results.json", tmp_path)
    mr.write_tables(tmp_path)
    assert (tmp_path / "results.md").read_text() == (miniature.RESULTS / "results.md").read_text()
    assert (tmp_path / "scaling.png").exists()


@pytest.mark.parametrize("begin", SHOWN)
def test_the_page_gives_the_accuracies_that_were_measured(begin):
    [line] = [line for line in PAGE.splitlines() if line.startswith(f"| {begin}")]
    assert re.findall(r"\d\.\d{3} ± \d\.\d{3}", line) == [mr.plus_minus(mr.accuracy(KEPT, row)) for row in SHOWN[begin]]


def test_the_page_gives_the_other_numbers_that_were_measured():
    [line] = [line for line in PAGE.splitlines() if line.startswith("| RL's gain")]
    assert ", ".join(f"{mr.gains(KEPT, name).mean:+.1f} %" for name, _ in mr.SIZES) in line
    [line] = [line for line in PAGE.splitlines() if line.startswith("| distilled on traces as they are")]
    rows = ("rm-r1:start", "distilled-kept", "distilled-redo", "distilled-force")
    assert ", ".join(f"{mr.accuracy(KEPT, row).mean:.3f}" for row in rows) in line
    assert mr.difference(KEPT, "cold-rubrics", "cold-plain").mean > 0
    assert mr.difference(KEPT, "cold-cor", "cold-rubrics").mean < 0


@pytest.mark.slow
def test_rows_run_from_world_to_table(tmp_path):
    rows = ("rm-r1", "cold-plain", "cap-8", "distilled-answer-sft")
    cfg = miniature.Run(rows, seeds=(0,), root=str(tmp_path), steps=2)
    miniature.run_rows(cfg)
    mr.write_tables(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["rows"]) >= {"rm-r1", "rm-r1:start", "cold-plain", "cap-8", "distilled-answer-sft"}
    assert results["parameters"]["rm-r1"] == 129_344
