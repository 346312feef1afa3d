"""T10, killed: at every change that a run makes in its folder, in the middle of its writes, at random moments.

Each time the same command continues, and the whole run folder ends equal to the undisturbed run's, byte for
byte: weights, resume states, traces, and metrics but for times. survival_worker.py runs the ranks.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from survival_worker import ENVIRONMENT, PATIENCE, Server, tree

ROOT = Path(__file__).parents[1]
GRPO = "--steps 3 --prompts-per-step 4 --group-size 3 --mini-batch 2 --max-response-tokens 6 --eval-every 2"
SIZES = {
    ("sft", 1): "--steps 3 --batch-size 4 --eval-every 2",
    ("sft", 2): "--steps 2 --batch-size 4 --eval-every 1",
    ("grpo", 1): GRPO,
    ("grpo", 2): GRPO,
}


@dataclass
class Job:
    """One command line, and what its undisturbed run did and left."""

    server: Server
    script: str
    ranks: int
    out: Path
    argv: list[str]
    points: list[list[dict[str, Any]]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def run(self, kill: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        order = {"script": self.script, "ranks": self.ranks, "out": str(self.out), "argv": self.argv, "kill": kill}
        return self.server(order | more)

    def renamed(self, target: Callable[[str], bool], before: int | None = None) -> list[tuple[str, str]]:
        """(name, digest) of every folder that rank 0 put in its place before point number `before`."""
        return [(p["at"][1][1], p["whole"]) for p in self.points[0][:before] if "whole" in p and target(p["at"][1][1])]

    def check_what_is_left(self, reply: dict[str, Any], before: int | None = None, seen: dict | None = None) -> None:
        """After a kill: the exported model and the newest state are whole ones, and none was lost."""
        models = [whole for _, whole in self.renamed(lambda name: name == "model")]
        states = dict(self.renamed(lambda name: name.startswith("checkpoints/step_")))
        assert reply["model"] in (models if before is not None and self.exported(before) else [None, *models])
        newest = reply["checkpoint"]
        assert newest is None or states[f"checkpoints/{newest[0]}"] == newest[1]
        if before is not None:
            saved = self.renamed(lambda name: name.startswith("checkpoints/step_"), before)
            assert (newest and f"checkpoints/{newest[0]}") == (saved[-1][0] if saved else None)

    @property
    def steps(self) -> int:
        return int(self.argv[self.argv.index("--steps") + 1])

    def exported(self, before: int) -> bool:
        return bool(self.renamed(lambda name: name == "model", before))

    def continue_to_the_end(self) -> None:
        reply = self.run()
        assert not any(reply["codes"]), reply["output"]
        assert tree(self.out) == self.files

    def kills(self) -> list[tuple[dict[str, Any], int | None]]:
        """(kill, number of the point on rank 0) for every point, and for every write that it begins.

        What rank 0 does alone inside the folder of an exported model is the same on two ranks: left out there.
        """
        found: list[tuple[dict[str, Any], int | None]] = []
        for rank, points in enumerate(self.points):
            for number, (point, following) in enumerate(itertools.pairwise(points)):
                event, paths, times = point["at"]
                inside_model = paths[0].startswith(("model.part/", "model.old"))
                if event == "shutil.rmtree" or (self.ranks > 1 and inside_model):
                    continue
                place = number if rank == 0 else None
                if event != "os.mkdir" or times == 1:  # which rank makes a folder first is a race
                    found.append(({"rank": rank, "at": point["at"], "mode": "SIGKILL"}, place))
                for inode, (name, size) in following["sizes"].items():
                    before = point["sizes"].get(inode, [name, 0])[1]
                    own = f"shard-{2 - rank:05d}" not in name and (rank == 0 or "shard-" in name)
                    if size > before + 1 and own:
                        middle = {"bytes": (before + size) // 2, "file": name}
                        found.append(({"rank": rank, "at": point["at"], "mode": "torn"} | middle, place))
        return found


@pytest.fixture(scope="module")
def jobs(server, verdicts, tmp_path_factory) -> Callable[[str, int], Job]:
    made: dict[tuple[str, int], Job] = {}

    def make(script: str, ranks: int) -> Job:
        if (script, ranks) not in made:
            out = tmp_path_factory.mktemp("runs") / f"{script}-{ranks}"
            argv = ["--preset", "tiny", "--model", str(verdicts / "start"), "--data", str(verdicts / "pairs.jsonl"),
                    "--held-out", str(verdicts / "held_out.jsonl"), "--prompt-file", "", "--out", str(out),
                    "--save-every", "1", "--lr", "0.01", *SIZES[script, ranks].split()]
            job = Job(server, script, ranks, out, argv)
            reply = job.run(record=True)
            assert reply["codes"] == [0] * ranks, reply["output"]
            job.points, job.files, job.seconds = reply["points"], tree(out), reply["seconds"]
            made[script, ranks] = job
        shutil.rmtree(made[script, ranks].out, ignore_errors=True)
        return made[script, ranks]

    return make


def check_ends(kill: dict[str, Any], reply: dict[str, Any]) -> None:
    """The killed rank died of its kill; the other ended by itself, and says why where it could not finish."""
    killed, by = kill["rank"], signal.SIGXFSZ if kill.get("mode") == "torn" else signal.SIGKILL
    assert -reply["codes"][killed] == by, (by, kill, reply)
    check_other_ranks(reply, killed)


def check_other_ranks(reply: dict[str, Any], gone: int) -> None:
    for rank, code in enumerate(reply["codes"]):
        if rank != gone:
            assert reply["told"][rank] == ("" if reply["joined"][rank] else "SIGTERM"), reply
            assert code in (0, 1) or not reply["joined"][rank], reply
            assert code != 1 or re.search("Error|Exception", reply["output"][rank]), reply


FEW = {
    "the first configuration": lambda kill: kill["at"][1] == ["config.json.part", "config.json"],
    "the state's name": lambda kill: kill["at"][1][1:] == ["checkpoints/step_000002"],
    "the state's progress": lambda kill: kill["mode"] == "torn" and "step_000003/progress" in kill["file"],
    "the state's tensors": lambda kill: kill["mode"] == "torn" and "step_000002/shard" in kill["file"],
    "an old state": lambda kill: "remove" in kill["at"][0] and "step_000001" in kill["at"][1][0],
    "a line": lambda kill: kill["mode"] == "torn" and kill["file"] == "metrics.jsonl",
    "the model's tensors": lambda kill: kill["mode"] == "torn" and kill["file"] == "model.part/model.safetensors",
    "the model's name": lambda kill: kill["at"] == ["os.rename", ["model.part", "model"], 2],
    "the old model": lambda kill: "remove" in kill["at"][0] and "model.old" in kill["at"][1][0],
    "traces": lambda kill: kill["mode"] == "torn" and "rollouts" in kill["file"],
}


@pytest.mark.parametrize("script, ranks, few", [
    ("sft", 1, True), ("grpo", 1, True),
    *(pytest.param(script, ranks, False, marks=pytest.mark.slow) for ranks in (1, 2) for script in ("sft", "grpo")),
])
def test_T10_a_kill_at_any_change_of_the_run_folder_changes_nothing(jobs, script, ranks, few):
    job = jobs(script, ranks)
    kills = job.kills()
    if few:
        chosen = [next((k for k in kills if wanted(k[0])), None) for wanted in FEW.values()]
        kills = [kill for kill in chosen if kill][script == "grpo" :: 2]
        assert len(kills) >= 4
    began, missed, modes = time.monotonic(), [], Counter()
    for kill, place in kills:
        shutil.rmtree(job.out, ignore_errors=True)
        reply = job.run(kill)
        if not any(reply["codes"]) and ranks > 1 and kill["at"][0] == "os.mkdir":
            missed.append(kill)  # this time the other rank was the first to make it
            continue
        check_ends(kill, reply)
        torn = kill["mode"] == "torn"
        job.check_what_is_left(reply, None if place is None else place + torn)
        job.continue_to_the_end()
        modes[kill["rank"], kill["mode"]] += 1
    assert len(missed) <= 2
    print(f"\n{script} on {ranks}: {dict(modes)} missed {len(missed)} in {time.monotonic() - began:.0f} s")


def random_kills(job: Job, wanted: int, seed: int) -> Counter[str]:
    """Kill one rank at a random moment, continue, kill again ...; when a run ends all the same, begin anew."""
    rng, seen, exported, life = random.Random(seed), Counter[str](), False, job.seconds
    while seen["kills"] < wanted:
        rank = rng.randrange(job.ranks)
        kill = {"rank": rank, "after": rng.uniform(0.0, life)}
        if seen["kills"] % 3 == 2:  # most of a life is start-up: every third kill comes soon after a save begins
            kill |= {"after": rng.uniform(0.0, 0.1), "saving": True}
        reply = job.run(kill)
        exported = exported and job.out.exists()
        if not any(reply["codes"]):
            assert tree(job.out) == job.files
            seen["finished"] += 1
            life = reply["seconds"]  # other work on the machine comes and goes
            shutil.rmtree(job.out)
            exported = False
            continue
        check_ends(kill, reply)
        job.check_what_is_left(reply)
        assert reply["model"] or not exported, "the exported model is gone"
        exported = bool(reply["model"])
        moment = "mid-write" if reply["parts"] else "between writes"
        seen["kills"] += 1
        seen[moment if all(reply["joined"]) else "before the ranks met"] += 1
        seen[f"rank {rank}"] += 1
    job.continue_to_the_end()
    return seen


@pytest.mark.parametrize("wanted, seed", [(3, 0), *(pytest.param(50, s, marks=pytest.mark.slow) for s in (1, 2))])
def test_T10_kill_9_of_one_rank_at_random_moments_ends_the_job_and_changes_nothing(jobs, wanted, seed):
    began, job = time.monotonic(), jobs("grpo", 2)
    seen = random_kills(job, wanted, seed)
    print(f"\n{dict(seen)} in {time.monotonic() - began:.0f} s, undisturbed {job.seconds:.1f} s")
    if wanted > 10:
        assert min(seen[key] for key in ("before the ranks met", "mid-write", "between writes")) > 0, seen


# ---- asked to stop, unlucky order, leftovers -----------------------------------------------------------


@pytest.mark.parametrize("script, ranks, every", [
    ("grpo", 2, 4), *(pytest.param(script, 2, 1, marks=pytest.mark.slow) for script in ("sft", "grpo")),
])
@pytest.mark.parametrize("name, times", [("SIGTERM", 1), ("SIGINT", 2)])
def test_T10_a_stop_in_the_middle_of_a_save_leaves_whole_states(jobs, script, ranks, every, name, times):
    """SIGTERM ends the run after the next step, a second Ctrl-C at once."""
    job = jobs(script, ranks)
    at = [(rank, p["at"]) for rank, points in enumerate(job.points) for p in points if "step_000001" in str(p["at"])]
    saving = [(rank, at) for rank, at in at if at[0] in ("open", "os.rename")][::every]
    assert len(saving) >= (4 if every == 1 else 2)
    for rank, at in saving:
        shutil.rmtree(job.out, ignore_errors=True)
        reply = job.run({"rank": rank, "at": at, "mode": name, "times": times})
        job.check_what_is_left(reply)
        if times == 1:
            assert reply["codes"] == [0 if job.steps == 2 else 130] * ranks, reply
            assert reply["checkpoint"][0] == "step_000002" and "Traceback" not in "".join(reply["output"])
        else:  # torch wraps what is raised while it writes
            said = {130: "the same command continues", 1: "KeyboardInterrupt"}
            assert said[reply["codes"][rank]] in reply["output"][rank], reply
            check_other_ranks(reply, rank)
        job.continue_to_the_end()


@pytest.mark.slow
def test_no_rank_makes_a_states_folder_before_it_is_cleared(jobs):
    """Otherwise a third rank may see it and find it gone as it looks again, which ends the run."""
    job = jobs("grpo", 2)
    late = {"rank": 0, "at": ["shutil.rmtree", ["checkpoints/part_step_000001"], 1], "mode": "late"}
    reply = job.run(late, record=True)
    assert reply["codes"] == [0, 0] and late["at"] in [p["at"] for p in reply["points"][0]]
    assert not [p["at"] for p in reply["points"][0] if p["at"][0] == "os.rmdir" and "part_" in p["at"][1][0]]
    assert tree(job.out) == job.files


@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_T10_what_earlier_kills_left_behind_is_no_obstacle_and_goes_away(jobs, script):
    job = jobs(script, 1)
    state = ["checkpoints/part_step_000002", "checkpoints/step_000002"]
    job.run({"rank": 0, "at": ["os.rename", state, 1], "mode": "SIGKILL"})
    whole = (job.out / "checkpoints" / "part_step_000002" / "shard-00001-model-00001-of-00001.safetensors").read_bytes()
    leftovers = {
        "checkpoints/part_step_000002/shard-00004-model-00001-of-00001.safetensors": whole[:100],  # of four ranks
        "checkpoints/part_step_000003/progress.json.part": b'{"st',
        "checkpoints/part_step_000009/shard-00001-model-00001-of-00001.safetensors": whole[: len(whole) // 2],
        "checkpoints/step_000000/progress.json": b"",  # half-way through its removal
        "model.part/config.json": b"{",
        "model.part/model.safetensors": whole[:-1],
        "metrics.jsonl.part": b'{"step": 0}\n{"st',
    }
    for name, data in leftovers.items():
        (job.out / name).parent.mkdir(exist_ok=True)
        (job.out / name).write_bytes(data)
    if script == "sft":  # killed between the two renames
        os.rename(job.out / "model", job.out / "model.old")
    else:
        (job.out / "rollouts" / "step_000002.jsonl.part").write_text('{"pair')
    with open(job.out / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "train/lo')
    job.check_what_is_left(job.server({"look": str(job.out)}))
    job.continue_to_the_end()


# ---- the literal command -------------------------------------------------------------------------------


def wait_for(ready: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)


def rank_processes(launcher: int) -> list[int]:
    """Process ids in rank order."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):  # it has ended meanwhile, or only begins
            if int((process / "stat").read_text().rpartition(")")[2].split()[1]) == launcher:
                found[(process / "environ").read_bytes().split(b"\0RANK=")[1][:1]] = int(process.name)
    return [found[rank] for rank in sorted(found)]


@pytest.mark.slow
def test_torchrun_ends_the_job_when_a_rank_is_killed_and_the_same_command_continues(jobs):
    """SIGTERM to rank 1; from the start again, SIGTERM to torchrun itself, kill -9 of rank 1 in a save and of rank 0
    as it exports; then on to the end."""
    job = jobs("grpo", 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master-port={port}",
               "grpo.py", *job.argv]
    saving = "checkpoints/part_step_000001"
    moments = ((1, signal.SIGTERM, saving), (None, signal.SIGTERM, saving),
               (1, signal.SIGKILL, "checkpoints/part_step_000003"), (0, signal.SIGKILL, "rollouts/step_000003.jsonl"))
    for number, (victim, how, moment) in enumerate(moments):
        if number == 1:
            shutil.rmtree(job.out)
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        wait_for(lambda process=process: len(rank_processes(process.pid)) == 2, process)
        ranks = rank_processes(process.pid)  # now: the last moment is short
        wait_for((job.out / moment).exists, process)
        os.kill(process.pid if victim is None else ranks[victim], how)
        _, said = process.communicate(timeout=PATIENCE)
        assert process.returncode != 0
        for pid in ranks:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        reply = job.server({"look": str(job.out)})
        job.check_what_is_left(reply)
        if how == signal.SIGTERM:  # the step under way was finished and saved
            assert said.count("stopped: the same command continues") == 2 and reply["checkpoint"][0] == "step_000002"
            assert victim is None or "exitcode  : 130" in said, said
        else:
            assert f"(local_rank: {victim})" in said and "Signal 9 (SIGKILL)" in said, said
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert tree(job.out) == job.files
