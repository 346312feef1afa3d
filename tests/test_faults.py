"""The machine fails: no space, no right to write, a damaged state, no memory, a clock that jumps.

Each command ends with exit code 2 and one line, or goes on as if nothing had been; after the cause is gone the
same command ends in the undisturbed run's folder, byte for byte (times apart). Kills are in test_survival.py,
gradients that are not finite in test_sft.py and test_run.py, servers in test_endpoint.py.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from survival_worker import FLOAT64, Server, tree
from test_survival import SIZES

from runtime import errors, run_folder, states

SCRIPTS = ("sft", "grpo", "eval")
PAGE = 4096
mounts = pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small disk: root on Linux")


@dataclass
class Command:
    """A command line, and the folder that its undisturbed run left."""

    server: Server
    script: str
    out: Path
    argv: list[str]
    whole: dict[str, str] = field(default_factory=dict)
    pages: int = 0  # that its files fill

    def __call__(self, *flags: str, patch: str = "") -> tuple[int, str]:
        patch = FLOAT64 + patch if self.script == "eval" else patch  # what is continued is asked in other batches
        order = {"script": self.script, "ranks": 1, "out": str(self.out), "argv": [*self.argv, *flags], "patch": patch}
        reply = self.server(order)
        return reply["codes"][0], reply["output"][0]

    def refused(self, *words: str, flags: tuple[str, ...] = (), patch: str = "") -> None:
        """Exit code 2, and nothing after the one line that holds these words."""
        code, said = self(*flags, patch=patch)
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(lines) == 1 and said.endswith(f"{lines[0]}\n") and "Traceback" not in said, said
        assert all(word in lines[0] for word in words) and len(lines[0]) < 1000, lines

    def continues_to_the_same_end(self) -> str:
        code, said = self()
        assert code == 0, said
        assert tree(self.out) == self.whole
        return said


@pytest.fixture(scope="module")
def command(server, verdicts, tmp_path_factory) -> Callable[[str], Command]:
    made: dict[str, Command] = {}
    out = tmp_path_factory.mktemp("disk") / "run"

    def make(script: str) -> Command:
        shutil.rmtree(out, ignore_errors=True)
        if script not in made:
            argv = ["--preset", "tiny", "--held-out", str(verdicts / "held_out.jsonl"), "--save-every", "1", "--lr",
                    "0.01", "--prompt-file", "", *SIZES.get((script, 1), "").split()]
            if script == "eval":
                argv = "run --sampler torch --max-tokens 6 --votes 3 --temperature 1 --at-once 9".split()
            where = ["--model", str(verdicts / "start"), "--data", str(verdicts / "pairs.jsonl"), "--out", str(out)]
            new = Command(server, script, out, [*argv, *where])
            code, said = new()
            assert code == 0, said
            new.whole, new.pages = tree(out), sum(-(-f.stat().st_size // PAGE) for f in out.rglob("*.*") if f.is_file())
            made[script] = new
            shutil.copytree(out, out.with_name(script))
            shutil.rmtree(out)
        return made[script]

    return make


@contextlib.contextmanager
def disk(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A disk of that size in the folder's place -> what changes its options."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], check=True)
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# ---- the disk ------------------------------------------------------------------------------------------


def test_a_state_that_cannot_be_written_says_why(tmp_path, monkeypatch):
    """torch wraps it in what is no Exception, so that it would end in a traceback."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    net = torch.nn.Linear(2, 2)
    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", full)
    with pytest.raises(OSError) as caught:
        states.save_state(tmp_path / "step_000001", net, torch.optim.AdamW(net.parameters()), {"step": 1})
    assert "the same command continues" in errors.remedy(caught.value)


@mounts
@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind, most", [("size", 200), ("nr_inodes", 60)])
def test_a_disk_may_be_full_at_any_page_and_any_file(command, script, kind, most):
    """One page or one file more each time, until the run fits."""
    job, refusals = command(script), 0
    for count in range(2 if kind == "nr_inodes" else 1, most):
        job = command(script)
        with disk(job.out.parent, f"{kind}={count * (PAGE if kind == 'size' else 1)}") as change:
            code, said = job()
            if code == 0:
                assert tree(job.out) == job.whole
                break
            errors = [line for line in said.splitlines() if line.startswith("error: ")]
            assert code == 2 and "Traceback" not in said and errors == said.splitlines()[-1:], (count, said)
            assert "No space left on device" in errors[0], (count, said)
            refusals += 1
            change(f"{kind}={2**24 if kind == 'size' else 1000}")
            job.continues_to_the_same_end()
    assert code == 0 and refusals >= 3
    print(f"\n{script}, {kind}: {refusals} ends, each continued")


@mounts
@pytest.mark.parametrize("script", ["grpo", "eval"])
def test_a_disk_that_became_read_only_ends_in_one_line(command, script):
    """A new folder and a finished one; the finished one is left as it is."""
    job = command(script)
    with disk(job.out.parent, "size=16m,ro") as change:
        job.refused("Read-only file system")
        change("rw")
        job.continues_to_the_same_end()
        change("ro")
        job.refused("Read-only file system")
        assert tree(job.out) == job.whole
        change("rw")
        job.continues_to_the_same_end()


# ---- what lies in the folder ---------------------------------------------------------------------------


def damage(state: Path, how: str) -> None:
    tensors = next(state.glob("*.safetensors"))
    if how == "cut":
        os.truncate(tensors, tensors.stat().st_size // 2)
    elif how == "flipped":
        content = bytearray(tensors.read_bytes())
        content[-5] ^= 1
        tensors.write_bytes(content)
    elif how == "gone":
        tensors.unlink()
    else:
        (state / "progress.json").write_text('{"step": 3, "be')


@pytest.mark.parametrize("script, how", [
    ("sft", "flipped"), ("sft", "gone"), ("grpo", "cut"), ("grpo", "half a line")])
def test_T10_a_damaged_state_costs_a_step_and_no_bit(command, script, how):
    job = command(script)
    shutil.copytree(job.out.with_name(script), job.out)
    states = run_folder.checkpoints(job.out)
    damage(states[0], how)
    assert [state.name for state in states] == ["step_000003", "step_000002"] and tree(job.out) != job.whole
    said = job.continues_to_the_same_end()
    assert f"{states[0]}" in said and f"continuing from {states[1]}" in said
    for state in states:
        damage(state, how)
    job.refused("no earlier state", str(states[1]))


@pytest.mark.parametrize("script, flag, value, said", [
    ("sft", "--weight-decay", "0.5", "weight_decay was 0.0, is 0.5"),
    ("grpo", "--kl-coef", "0.5", "kl_coef was 0.005, is 0.5"), ("eval", "--seed", "5", "seed was 0, is 5"),
])
def test_a_changed_setting_is_refused_by_its_name_and_nothing_is_written(command, script, flag, value, said):
    job = command(script)
    shutil.copytree(job.out.with_name(script), job.out)
    job.refused(said, "use another --out", flags=(flag, value))
    assert tree(job.out) == job.whole


# ---- memory --------------------------------------------------------------------------------------------


OUT_OF_MEMORY = """
import grpo
import torch
calls, honest = iter(range(100)), grpo.Policy.forward
def forward(self, *args, **more):
    if torch.is_grad_enabled() and next(calls) == 3:  # the second round's second mini-batch
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    return honest(self, *args, **more)
grpo.Policy.forward = forward
"""


def test_memory_that_runs_out_in_a_micro_batch_ends_in_advice_and_the_same_command_continues(command):
    job = command("grpo")
    job.refused("out of memory: lower --micro-batch-tokens", "the same command continues", patch=OUT_OF_MEMORY)
    assert run_folder.latest_checkpoint(job.out).name == "step_000001"
    kept = shutil.copytree(job.out, job.out.with_name("stopped"))
    job.continues_to_the_same_end()
    shutil.rmtree(job.out)
    kept.rename(job.out)
    code, said = job("--micro-batch-tokens", "64")  # what the advice says is no change of configuration
    assert code == 0 and (job.out / "model").exists(), said


# ---- clocks --------------------------------------------------------------------------------------------


CLOCK = """
import itertools, time, tqdm.std
year = 365.25 * 86_400
times = itertools.accumulate(itertools.cycle([0.0, 0.0, year, -3 * year, 0.5, -1e-9, 2 * year]), initial=1e9)
clock = lambda: next(times)
time.time = time.perf_counter = tqdm.std.time = clock
time.time_ns = time.perf_counter_ns = lambda: int(1e9 * clock())
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_clocks_that_stand_still_or_jump_by_years_change_nothing_but_times(command, script):
    job = command(script)
    code, said = job(patch=CLOCK)
    assert code == 0, said
    assert tree(job.out) == job.whole
    if script != "eval":
        rows = [json.loads(line) for line in (job.out / "metrics.jsonl").read_text().splitlines()]
        times = [value for row in rows for name, value in row.items() if name.startswith(("time/", "tokens/s"))]
        assert len(times) >= 6 and all(math.isfinite(value) and value >= 0 for value in times), rows
