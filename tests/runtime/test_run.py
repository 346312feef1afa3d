"""The shared machinery: schedule, seeds, whole files, run folders, metrics, signals, exit codes, presets."""

from __future__ import annotations

import errno
import json
import math
import os
import pkgutil
import re
import signal
import subprocess
import sys
import time
import unicodedata
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro
from hypothesis import given, strategies as st

from runtime import cli, errors, run_folder, steps
from runtime.disk import read_jsonl, write_whole
from runtime.errors import UserError
from runtime.metrics import Clock, Metrics
from runtime.run_folder import RunFolder
from runtime.seeds import derive_seed
from runtime.steps import StopSignal, learning_rate
from settings import SFTConfig

ROOT = Path(__file__).resolve().parents[2]
SEED_ROLLOUT = 2868571795335789245  # of (0, "rollout", 0)


LARGE = SFTConfig(preset="large", model="runs/start", data="pairs.jsonl", lr=2e-3, warmup_ratio=1 / 3, steps=12)
CONSTANT = replace(LARGE, lr_schedule="constant", warmup_ratio=0.0, steps=4)


def python(code: str, *, wait: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that finds the project's files."""
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=wait, env=env)


# ---- learning rate -------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule, index, expected", [
    ("cosine", 0, 0.5e-3), ("cosine", 1, 1.0e-3), ("cosine", 3, 2e-3),  # warm-up: (i + 1) / 4
    ("cosine", 4, 2e-3),  # progress 0
    ("cosine", 8, 2e-3 * (0.1 + 0.9 * 0.5)),  # half way
    ("cosine", 10, 2e-3 * (0.1 + 0.9 * 0.146446609)),  # (1 + cos(3 pi / 4)) / 2
    ("cosine", 12, 2e-4), ("cosine", 13, 2e-4), ("cosine", 10**9, 2e-4),
    ("linear", 3, 2e-3), ("linear", 4, 2e-3), ("linear", 8, 1.1e-3), ("linear", 10, 6.5e-4), ("linear", 12, 2e-4),
    ("linear", 99, 2e-4),
    ("constant", 0, 0.5e-3), ("constant", 3, 2e-3), ("constant", 4, 2e-3), ("constant", 12, 2e-3),
    ("constant", 99, 2e-3),
])
def test_learning_rate_by_hand(schedule, index, expected):
    assert learning_rate(index, replace(LARGE, lr_schedule=schedule)) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("schedule", ("constant", "linear", "cosine"))
def test_without_warm_up_the_first_update_has_the_full_rate(schedule):
    """The authors' schedule multiplies by step / max(1, warm-up), so their whole first round trains with 0."""
    assert learning_rate(0, replace(LARGE, lr_schedule=schedule, warmup_ratio=0.0)) == 2e-3


# ---- seeds ---------------------------------------------------------------------------------------------


def test_seeds_are_the_same_on_every_machine_for_ever():
    assert derive_seed(0, "rollout", 0) == SEED_ROLLOUT and derive_seed("é") == 848503001091917490
    code = "from runtime import seeds; print(seeds.derive_seed(0, 'rollout', 0))"
    assert {int(python(code, PYTHONHASHSEED=h).stdout) for h in ("1", "2")} == {SEED_ROLLOUT}


def test_seeds_of_neighbours_are_distinct_spread_and_of_62_bits():
    seeds = [derive_seed(seed, "rollout", place) for seed in range(20) for place in range(500)]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**62 for s in seeds)
    assert not {s + 1 for s in seeds} & set(seeds)  # an engine that adds a sample index meets no other seed
    assert derive_seed(1, 2) != derive_seed(2, 1) and derive_seed(12) != derive_seed(1, 2)
    assert derive_seed("\ud800") != derive_seed("\ud801")  # from a broken file


# ---- whole files and JSON lines ------------------------------------------------------------------------


def test_a_write_that_fails_in_the_middle_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "made" / "file.txt"
    write_whole(path, "é 判\u2028\n")
    assert path.read_bytes().decode("utf-8") == "é 判\u2028\n"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "x" * 100_000 + "\ud800")
    assert path.read_text() == "old"

    write_whole(path, "new")
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


def test_read_jsonl_numbers_lines_from_one_and_skips_blank_ones(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'\n{"a": 1}\r\n \t\n{"a": "x\xe2\x80\xa8y"}')
    assert list(read_jsonl(path)) == [(2, {"a": 1}), (4, {"a": "x\u2028y"})]
    path.write_bytes(b"")
    assert list(read_jsonl(path)) == []
    with pytest.raises(UserError, match="no such file"):
        list(read_jsonl(tmp_path))


@pytest.mark.parametrize("bad", (b'{"a": ', b"[1]", b"null", b'"hello"', b"{} {}", b"hello", b"\xff", b"{'a': 1}",
                                 "{}".encode("utf-16"), b"\0", b"[" * 200_000), ids=lambda bad: f"{bad[:9]}")
def test_read_jsonl_names_file_and_line_of_a_bad_one(tmp_path, bad):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + bad + b'\n{"a": 2}\n')
    rows = read_jsonl(path)
    assert next(rows) == (1, {"a": 1})
    with pytest.raises(UserError) as caught:
        next(rows)
    assert str(caught.value).startswith(f"{path}:3: ") and "\n" not in str(caught.value)


def test_T10_only_an_unfinished_last_line_is_forgiven_and_only_when_asked(tmp_path):
    path, whole, row = tmp_path / "log.jsonl", '{"step": 1, "text": "é判"}\n'.encode(), {"step": 1, "text": "é判"}
    for cut in range(1, len(whole) - 1):  # also in the middle of a character
        path.write_bytes(whole + whole[:cut])
        assert list(read_jsonl(path, torn_end_ok=True)) == [(1, row)]
        with pytest.raises(UserError, match=r"log\.jsonl:2: "):
            list(read_jsonl(path))
    path.write_bytes(whole + whole[:-1])  # only the line break is missing
    assert list(read_jsonl(path, torn_end_ok=True)) == [(1, row), (2, row)]
    for torn in (whole[:9] + b"\n" + whole, whole + whole[:9] + b"\n"):  # a bad line that was finished
        path.write_bytes(torn)
        with pytest.raises(UserError):
            list(read_jsonl(path, torn_end_ok=True))


# ---- the run folder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, words", [
    ({"lr_schedule": "linear"}, "lr_schedule was 'cosine', is 'linear'"), ({"betas": (0.9, 0.999)}, "betas was"),
    ({"lr": 1.0, "batch_size": 13}, "batch_size was 128, is 13"),
])
def test_a_run_folder_of_another_configuration_is_refused_and_the_setting_named(tmp_path, change, words):
    RunFolder(str(tmp_path), LARGE)
    before = (tmp_path / "config.json").read_bytes()
    assert json.loads(before)["lr"] == 2e-3
    with pytest.raises(UserError) as caught:
        RunFolder(str(tmp_path), replace(LARGE, **change))
    assert words in str(caught.value) and "--out" in str(caught.value)
    assert all(name in str(caught.value) for name in change) and "warmup" not in str(caught.value)
    assert (tmp_path / "config.json").read_bytes() == before


READ = {"data": "1" * 16, "model": "2" * 16}


def test_what_was_read_is_compared_not_where_it_lay(tmp_path):
    """Places, speeds and save_every may change; the content may not, nor may a setting."""
    cfg = CONSTANT
    state = {"step": 1} | RunFolder(str(tmp_path), cfg, READ).stamp
    moved = replace(cfg, data="elsewhere.jsonl", model="runs/moved", save_every=5, eval_every=7, micro_batch_tokens=9)
    assert RunFolder(str(tmp_path), moved, READ).check(state) == state
    for other, read, word in ((cfg, READ | {"data": "3" * 16}, "data"), (cfg, READ | {"model": "3" * 16}, "model"),
                              (replace(moved, lr=1.0), READ, "lr was")):
        with pytest.raises(UserError, match=f"another configuration.*{word}"):
            RunFolder(str(tmp_path), other, read)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="another configuration"):
        RunFolder(str(tmp_path), cfg, READ | {"data": "3" * 16}).check(state)


@pytest.mark.parametrize("change, allowed", [
    ({"steps": 8}, True), ({"steps": 3}, False), ({"steps": 8, "lr_schedule": "linear"}, False),
    ({"steps": 8, "warmup_ratio": 0.5}, False),
])
def test_a_run_of_a_constant_schedule_may_become_longer(tmp_path, change, allowed):
    RunFolder(str(tmp_path), CONSTANT)
    with nullcontext() if allowed else pytest.raises(UserError, match="steps was 4"):
        RunFolder(str(tmp_path), replace(CONSTANT, **change))
        assert json.loads((tmp_path / "config.json").read_text())["steps"] == 8


def test_a_setting_that_is_newer_than_the_run_had_its_default(tmp_path):
    old = {k: v for k, v in asdict(CONSTANT).items() if k != "max_length"}
    (tmp_path / "config.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match="max_length was 12288"):
        RunFolder(str(tmp_path), replace(CONSTANT, max_length=8))
    RunFolder(str(tmp_path), CONSTANT)


def test_digests_follow_the_content(tmp_path):
    def write(content: bytes) -> Path:
        (tmp_path / "model.safetensors").write_bytes(content)
        (tmp_path / "config.json").write_text("{}")
        return tmp_path

    first = run_folder.digests(str(write(b"weights")), "prompt", data=[LARGE], held_out=[])
    assert first == run_folder.digests(str(write(b"weights")), "prompt", data=[LARGE], held_out=[])
    other = run_folder.digests(str(write(b"others")), None, data=[CONSTANT], held_out=[LARGE])
    assert set(first) == {"model", "prompt_file", "data", "held_out"}
    assert all(first[name] != other[name] for name in first)


@pytest.mark.parametrize("text", ("not JSON", "", "[1]"))
def test_a_run_folder_whose_configuration_cannot_be_read_is_refused_in_a_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config"):
        RunFolder(str(tmp_path), LARGE)
    for path in ("config.json", "config.json/below"):
        with pytest.raises(UserError, match="is a file"):
            RunFolder(str(tmp_path / path), LARGE)
    assert (tmp_path / "config.json").read_text() == text


def test_two_processes_do_not_write_one_run(tmp_path):
    code = f"from runtime.run_folder import *; lock = lock_folder(Path({str(tmp_path)!r})); print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="another process is writing this run"):
            RunFolder(str(tmp_path), LARGE)
        other.kill()
    RunFolder(str(tmp_path), LARGE)  # a process that is killed leaves no lock


@pytest.mark.parametrize("bad", [{"lr": math.nan}, {"lr": -1.0}, {"betas": (1.5, 0.9)}, {"weight_decay": math.inf},
                                 {"steps": -3}, {"warmup_ratio": 2.0}, {"epochs": 0.0}])
def test_a_number_that_cannot_be_is_refused_by_its_flag(bad):
    with pytest.raises(UserError, match=f"^--{next(iter(bad)).replace('_', '-')} .*: must be "):
        cli.check_numbers(replace(LARGE, **bad), "epochs")
    cli.check_numbers(LARGE, "epochs")


def test_the_two_newest_whole_checkpoints_are_kept(tmp_path, monkeypatch):
    folder = RunFolder(str(tmp_path), LARGE)
    assert run_folder.latest_checkpoint(tmp_path) is None
    for name in ("step_000009", "step_000010", "step_000100", "part_step_000111", "step_000112.part", "step_old"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert run_folder.latest_checkpoint(tmp_path) == folder.checkpoint(100)
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "1")  # which writes nothing and removes nothing
        folder.prune_checkpoints()
        folder.log({"step": 0})
        assert folder.checkpoint(9).exists() and not (tmp_path / "metrics.jsonl").exists()
    folder.prune_checkpoints()
    assert not folder.checkpoint(9).exists() and folder.checkpoint(10).exists()
    assert len(list((tmp_path / "checkpoints").iterdir())) == 5
    RunFolder(str(tmp_path), LARGE)  # the next start removes what a kill left
    assert not (tmp_path / "checkpoints" / "part_step_000111").exists()


def test_T10_rewinding_forgets_the_steps_that_run_again(tmp_path):
    folder = RunFolder(str(tmp_path), LARGE)
    folder.rewind(3)  # no log yet
    for step in range(6):
        folder.log({"step": step, "loss": step / 3, "text": "é"})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    folder.rewind(4)
    assert [row for _, row in read_jsonl(tmp_path / "metrics.jsonl")] == [
        {"step": s, "loss": s / 3, "text": "é"} for s in range(4)]
    folder.log({"step": 4})
    assert [row["step"] for _, row in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    folder.rewind(0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


# ---- metrics and time ----------------------------------------------------------------------------------


def test_T9_metrics_are_sums_over_counts_divided_once():
    metrics = Metrics()
    metrics.add("loss", 10.0, 4)
    metrics.add("loss", 2.0, 2)  # not the last one (1.0), not the mean of means (1.75)
    metrics.add("nothing", 0.0, 0)
    metrics.add("once", 3)
    metrics.add("zero", 0.0, 5)
    metrics.add_max("slowest", 1.0)
    metrics.add_max("slowest", -2.0)
    metrics.add_max("negative", -2.0)
    assert metrics.reduce() == {"loss": 2.0, "once": 3.0, "zero": 0.0, "slowest": 1.0, "negative": -2.0}
    assert metrics.reduce() == metrics.reduce()  # reading does not change them
    assert Metrics().reduce() == {}


def test_what_is_not_finite_is_counted_and_leaves_the_others_alone():
    metrics = Metrics()
    for value in (1.0, math.nan):
        metrics.add("loss", value, 2)
    metrics.add("norm", 3.0)
    metrics.add_max("gap", math.nan)
    metrics.add_max("gap", 1.0)
    assert metrics.reduce() == {"norm": 3.0, "not_finite": 2}


def test_a_clock_measures_laps_and_tokens_per_second(monkeypatch):
    now = iter([100.0, 102.0, 105.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = Clock()
    clock.lap("generate")
    clock.lap("update")
    rollouts = [SimpleNamespace(response_ids=[1] * 7), SimpleNamespace(response_ids=[1] * 3)]
    assert clock.times(rollouts) == {"time/generate": 2.0, "time/update": 3.0, "time/step": 5.0,
                                     "time/generate_max": 2.0, "tokens/s": 2.0}


# ---- stopping ------------------------------------------------------------------------------------------


def test_a_real_SIGTERM_asks_for_a_stop_and_the_old_handlers_come_back():
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with StopSignal() as stop:
        assert stop.requested() is False
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested() is True
        os.kill(os.getpid(), signal.SIGTERM)  # again: still only asked
        assert stop.requested() is True
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
    with StopSignal() as stop:
        assert stop.requested() is False


def test_a_second_Ctrl_C_stops_at_once(capfd):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested() is True and "Ctrl-C again stops now" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


# ---- scripts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raises, code, said", [
    ("UserError('data: a\\n  b\\n\\nc')", 2, "error: data: a b c"),
    ("OSError(28, 'No space left on device', 'runs/x/metrics.jsonl')", 2, "error: runs/x/metrics.jsonl: No space left"),
    ("ZeroDivisionError", 1, "Traceback"),
    ("KeyboardInterrupt", 130, "stopped: the same command continues"),
])
def test_what_the_user_can_fix_is_one_line_and_a_bug_keeps_its_traceback(raises, code, said):
    done = python(f"""from runtime import cli
from runtime.errors import UserError
def main(): raise {raises}
cli.start(main)""")
    assert (done.returncode, done.stdout) == (code, "") and done.stderr.startswith(said)
    assert (done.stderr.count("\n") == 1) == (code != 1)


def test_under_torchrun_the_interpreter_is_not_torn_down():
    code = """import atexit
from runtime import cli
atexit.register(print, 'torn down')
cli.start(lambda: print('done'))"""
    assert python(code).stdout == "done\ntorn down\n"
    assert python(code, RANK="0", WORLD_SIZE="1").stdout == "done\n"


def test_importing_the_shared_files_needs_neither_torch_nor_transformers():
    files = "cli, disk, errors, metrics, ranks, run_folder, seeds, steps"  # of runtime/
    code = f"from runtime import {files}\nimport data, cor_prompt, reward, sys\n"
    code += "print([m for m in ('torch', 'transformers', 'datasets', 'tyro') "
    assert python(code + "if m in sys.modules])").stdout == "[]\n"


PRESETS = {"large": LARGE, "tiny": replace(LARGE, preset="tiny", lr=0.5, steps=3)}


@pytest.mark.parametrize("argv", (["--preset", "tiny"], ["--preset=tiny"]))
def test_a_preset_gives_the_defaults_and_flags_override_them(argv):
    assert cli.parse(SFTConfig, PRESETS, []) == LARGE  # the first one
    assert cli.parse(SFTConfig, PRESETS, argv) == PRESETS["tiny"]
    expected = replace(PRESETS["tiny"], lr=0.25, lr_schedule="linear")
    assert cli.parse(SFTConfig, PRESETS, [*argv, "--lr", "0.25", "--lr-schedule", "linear"]) == expected
    assert cli.parse(SFTConfig, PRESETS, ["--lr", "0.25", "--lr-schedule", "linear", *argv]) == expected


@pytest.mark.parametrize(("argv", "held_out"), [
    ([], "ours.jsonl"), (["--data", "mine.jsonl"], ""), (["--data=mine.jsonl"], ""),
    (["--data", "mine.jsonl", "--held-out", "ours.jsonl"], "ours.jsonl"),
    (["--data", "mine.jsonl", "--held_out=other.jsonl"], "other.jsonl")])
def test_with_data_of_ones_own_no_preset_keeps_its_held_out_file(argv, held_out):
    preset = SFTConfig(data="ours_train.jsonl", held_out="ours.jsonl")
    assert cli.parse(SFTConfig, {"tiny": preset}, argv).held_out == held_out


def test_help_shows_the_presets_values_and_an_unknown_preset_its_choices(capsys):
    with pytest.raises(UserError, match="--preset huge: unknown; choose one of large, tiny"):
        cli.parse(SFTConfig, PRESETS, ["--preset", "huge", "--lr", "1"])
    with pytest.raises(SystemExit) as caught:
        cli.parse(SFTConfig, PRESETS, ["--preset", "tiny", "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and "0.5" in text and "learning rate" in text and "0.002" not in text


FLAGS = """settings:SFTConfig settings:GRPOConfig eval:Run eval:Score judge:Pairs judge:Rank judge:Serve
           prepare.build_data:Config prepare.distill:Config toy.files:Build toy.probe:Probe toy.oracle:Serve"""


@pytest.mark.parametrize("name", FLAGS.split())
def test_every_flag_has_a_help_text_of_its_own(name, capsys, monkeypatch):
    """A comment above a field would also count for the next one, and a field set again in a subclass needs its own."""
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        tyro.cli(pkgutil.resolve_name(name), args=["--help"])
    text = capsys.readouterr().out
    said = re.findall(r"  ([^\s(-].*?) \((?:default: .*|required)\)\W*$", text, re.MULTILINE)
    assert len(said) == len(set(said)) == len(re.findall(r"\(default: |\(required\)", text)) > 2


def test_the_papers_sizes_are_refused_without_a_GPU(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"--preset paper-7b.*GPU"):
        cli.check_hardware("paper-7b")
    cli.check_hardware("tiny")


def test_a_prompt_file_is_read_without_its_last_line_break(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("Judge 判.\n\n{data}\n\n", encoding="utf-8")
    assert cli.read_prompt(str(path)) == "Judge 判.\n\n{data}\n"
    assert cli.read_prompt("") is None
    path.write_bytes(b"\xff\xfe")
    for bad in (path, tmp_path, tmp_path / "none.txt"):
        with pytest.raises(UserError, match=r"--prompt-file .*cannot be read"):
            cli.read_prompt(str(bad))


@given(st.text(st.characters(exclude_categories=())))
def test_T15_visible_text_controls_nothing(text):
    """Strangers' texts reach terminals and reports: no escape sequence, no direction mark, no lone surrogate."""
    shown = errors.printable(text)
    assert not {unicodedata.category(c) for c in shown if c not in "\n\t"} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    shown.encode("utf-8")
    assert errors.printable(shown) == shown
    if text.isprintable():
        assert shown == text
    assert shown.count("\n") == text.count("\n")


def test_the_groups_of_a_mesh_wait_as_long_as_the_whole_group():
    code = """import torch
import torch.distributed as dist
from types import SimpleNamespace
from runtime import ranks
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
group = dist.new_group([0])
ranks.wait_longer(SimpleNamespace(get_all_groups=lambda: [group]))
print(group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 60 * ranks.PATIENCE)"""
    assert python(code).stdout == "True\n"


# ---- faults --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "advice"), [
    (PermissionError(errno.EACCES, "Permission denied", "runs/x"), "runs/x: Permission denied; nothing is lost"),
    (OSError(errno.EROFS, "Read-only file system", "runs/x"), "Read-only file system"),
    (RuntimeError("I/O error: No space left on device (os error 28)"), "No space left on device"),
    (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you tried"), "--micro-batch-tokens"),
    (torch.OutOfMemoryError("CUDA out of memory"), "--micro-batch-tokens"),
    (RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:139"), "--engine-memory"),
    (ValueError("Free memory on device cuda:0 (10.1/79.1 GiB) on startup is less than desired"), "--engine-memory"),
])
def test_what_the_machine_lacks_has_a_remedy(error, advice):
    assert advice in errors.remedy(error) and "same command continues" in errors.remedy(error)


def test_a_kernel_that_does_not_fit_the_card_has_a_remedy_and_a_bug_has_none():
    error = RuntimeError("No valid triton configs. OutOfResources: out of resource: shared memory, Required: 131072")
    assert "--compute-dtype bfloat16" in errors.remedy(error)
    assert errors.remedy(FileNotFoundError(errno.ENOENT, "no", "f")) == errors.remedy(KeyError("x")) == ""


def test_bad_steps_in_a_row_are_counted_and_end_a_run(capsys):
    with StopSignal() as stop:
        assert not stop.after({"optim/skipped": 1.0})
    assert "the last 1 steps had no finite gradient" in capsys.readouterr().out
    with StopSignal() as stop:
        for skipped in (*[0.5] * 9, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0):  # 0.5: a round that also learned
            assert not stop.after({"optim/skipped": skipped})
        with pytest.raises(KeyboardInterrupt):
            stop.leave()
        assert stop.after({"optim/skipped": 1.0})
        with pytest.raises(errors.UserError, match="not finite"):
            stop.leave()


def test_rounds_without_a_verdict_are_said_once(capsys):
    with StopSignal() as stop:
        for share in (1.0, 1.0, 1.0, 1.0, 0.9, *[1.0] * 4):
            assert not stop.after({"optim/skipped": 0.0, "rollout/frac_no_verdict": share})
        assert capsys.readouterr().out == ""
        for _ in range(5):
            stop.after({"optim/skipped": 0.0, "rollout/frac_no_verdict": 1.0})
    assert capsys.readouterr().out.count("verdict") == 1


def test_the_bar_says_what_a_step_is_doing(monkeypatch, capsys):
    with steps.progress(3, 0, "grpo") as bar:
        steps.note("sampled 1 of 8")  # too early
        later = time.monotonic() + 60
        monkeypatch.setattr(time, "monotonic", lambda: later)
        steps.note("sampled 4 of 8")
        assert bar.desc.startswith("grpo, sampled 4 of 8")
    assert "sampled 4 of 8" in (said := capsys.readouterr().err) and "sampled 1" not in said


def test_what_a_run_will_use_is_said_first(capsys):
    cfg = SimpleNamespace(steps=3, prompts_per_step=4, group_size=2, max_response_tokens=60, data="a.jsonl", model="m",
                          held_out="", out="runs/x")
    steps.announce(cfg, 48)
    said = capsys.readouterr().out
    for words in ("a.jsonl: 12 of 48 pairs, 3 rounds of 4 x 2 responses of up to 60 tokens", "m on 1 x", "in runs/x"):
        assert words in said
