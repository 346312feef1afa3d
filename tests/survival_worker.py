"""A fork server for the kill tests: it imports torch once and forks the ranks of one run after another.

One order a line on stdin, one reply a line on stdout, both JSON. Each rank runs a script's own main program in
a process of its own, with an audit hook that sees every change which Python is about to make in the run folder
(made, opened for writing, renamed, removed): a point. `kill` names one of them ("at": what, paths, which time),
or a moment:

    {"rank": 0, "at": ["os.rename", ["model.part", "model"], 1], "mode": "SIGKILL"}   dead instead of the change
    {"rank": 0, "at": [...], "mode": "torn", "bytes": 40}    the change, then dead where a file outgrows 40 bytes
    {"rank": 0, "at": [...], "mode": "SIGTERM", "times": 1}  a signal just before the change
    {"rank": 0, "at": [...], "mode": "late"}                 a pause before the change
    {"rank": 1, "after": 0.8}                                SIGKILL from outside, 0.8 s after the start
    {"rank": 1, "after": 0.01, "saving": true}               the same, 0.01 s after a resume state was begun

`patch` is Python that runs before the main program: a clock that jumps, memory that runs out.

When a rank dies, the others have to end by themselves. Only one that has not joined its peers yet is told to
(SIGTERM), as torchrun would tell it: there it waits for them for two hours.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink",
           "shutil.rmtree")
PATIENCE = 60.0  # seconds in which a rank whose peer died has to end; it takes a moment on an idle machine
LIMIT = 240.0  # seconds a whole run may take; it takes two or three
FLOAT64 = """
import eval
load = eval.load_sampler
eval.load_sampler = lambda path, dtype, *rest, **more: load(path, "float64", *rest, **more)
"""  # a patch: in float32 the batch that a prompt is in could, by its rounding, change what is sampled


def digest(path: Path) -> str:
    """Of a file, or of a folder's names and contents. Left out: times and speeds in a metrics file, and the order of
    the entries in a safetensors header, which is a random one, with the checksums that it changes."""
    if path.is_dir():
        return hashlib.sha256(json.dumps(tree(path)).encode()).hexdigest()[:16]
    data = path.read_bytes()
    if path.name == "metrics.jsonl":
        rows = [json.loads(line) for line in data.splitlines()]
        rows = [{k: v for k, v in row.items() if not k.startswith(("time/", "tokens/"))} for row in rows]
        data = json.dumps(rows).encode()
    elif path.name == "progress.json" and data.endswith(b"}"):  # whole
        data = json.dumps({k: v for k, v in json.loads(data).items() if k != "files"}).encode()
    elif path.suffix == ".safetensors" and len(data) > 8 + (length := int.from_bytes(data[:8], "little")):
        data = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True).encode() + data[8 + length :]
    return hashlib.sha256(data).hexdigest()[:16]


def tree(folder: Path) -> dict[str, str]:
    """{path inside the folder: digest}; folders are listed too, so that an empty one left behind shows."""
    found = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): "folder" if p.is_dir() else digest(p) for p in found}


class Watch:
    """Counts the points of one rank, notes what is whole when it is renamed, and dies where it is told to."""

    def __init__(self, folder: Path, kill: dict[str, Any], record: bool):
        self.folder, self.kill, self.record = folder, kill, record
        self.points: list[dict[str, Any]] = []
        self.times: Counter[str] = Counter()
        self.busy = False

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in CHANGES or self.busy:
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        self.busy = True
        try:
            paths = [self.inside(args, 0, event)] + ([self.inside(args, 1, event)] if event == "os.rename" else [])
            if any(paths):
                self.point(event, [path or "outside" for path in paths])
        finally:
            self.busy = False

    def inside(self, args: tuple[Any, ...], place: int, event: str) -> str | None:
        """The path in the run folder; removals name theirs relative to an open folder."""
        if isinstance(args[place], int):
            return None
        at = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.rename": 2 + place}.get(event)
        anchor = os.readlink(f"/proc/self/fd/{args[at]}") if at and args[at] not in (-1, None) else os.getcwd()
        path = os.path.normpath(os.path.join(anchor, os.fsdecode(args[place])))
        return os.path.relpath(path, self.folder) if Path(path).is_relative_to(self.folder) else None

    def point(self, event: str, paths: list[str]) -> None:
        key = json.dumps([event, paths])
        self.times[key] += 1
        at = [event, paths, self.times[key]]
        if self.record:
            entry = {"at": at, "sizes": self.sizes()}
            if event == "os.rename" and (source := self.folder / paths[0]).is_dir():
                entry["whole"] = digest(source)
            self.points.append(entry)
        if self.kill.get("at") != at:
            return
        if self.kill["mode"] == "torn":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it otherwise
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.kill["bytes"], self.kill["bytes"]))
        elif self.kill["mode"] == "late":
            time.sleep(0.3)
        else:
            for _ in range(self.kill.get("times", 1)):
                os.kill(os.getpid(), signal.Signals[self.kill["mode"]])

    def sizes(self) -> dict[str, list[Any]]:
        """{inode: [name, bytes]} of every file now: what grew between two points was written between them."""
        found = {}
        for top, _, names in os.walk(self.folder):
            for name in names:
                try:
                    stat = os.stat(os.path.join(top, name))
                except FileNotFoundError:  # the other rank was quicker
                    continue
                found[str(stat.st_ino)] = [os.path.relpath(os.path.join(top, name), self.folder), stat.st_size]
        return found


def be_rank(order: dict[str, Any], rank: int, port: int, out: int, status: int) -> None:
    """A forked child: the script's main program as torchrun would start it. Never returns."""
    code, leave = 1, os._exit
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # die with the server
        os.dup2(out, 1), os.dup2(out, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        if order["ranks"] > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(order["ranks"]),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        from runtime import cli, ranks

        script = importlib.import_module(order["script"])
        join, mine = ranks.join_ranks, order.get("kill") or {}

        def join_and_say_so(**more: Any) -> None:
            join(**more)
            os.write(status, b"joined\n")

        ranks.join_ranks = join_and_say_so
        record = order.get("record", False)
        watch = Watch(Path(order["out"]), mine if mine.get("rank") == rank else {}, record)
        if record or watch.kill.get("at"):
            sys.addaudithook(watch)
        sys.argv = [order["script"] + ".py", *order["argv"]]
        os._exit = sys.exit  # cli.start leaves at once under torchrun; here there is more to say
        try:
            exec(order.get("patch", ""), {})  # a fault of the machine
            cli.start(getattr(script, "main", None) or (lambda: script.train(cli.parse(script.Config, script.PRESETS))))
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
        watch.busy = True
        if record:
            end = {"at": ["end", [], 1], "sizes": watch.sizes()}
            os.write(status, b"points " + json.dumps([*watch.points, end]).encode() + b"\n")
        os.write(status, b"modules " + json.dumps([*sys.modules]).encode() + b"\n")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        leave(code)


class Rank:
    """The server's side of one child."""

    def __init__(self, pid: int, out: int, status: int):
        self.pid, self.pipes = pid, {out: b"", status: b""}
        self.out, self.status = out, status
        self.open = {out, status}
        self.code: int | None = None  # minus the signal, if one ended it
        self.ended = 0.0
        self.told = ""

    def read(self, pipe: int) -> None:
        chunk = os.read(pipe, 1 << 16)
        self.pipes[pipe] += chunk
        if not chunk:
            self.open.discard(pipe)
            os.close(pipe)
        if not self.open and self.code is None:
            _, state = os.waitpid(self.pid, 0)
            self.code, self.ended = os.waitstatus_to_exitcode(state), time.monotonic()

    def signal(self, number: signal.Signals) -> None:
        if self.code is None:
            self.told = number.name
            os.kill(self.pid, number)

    def said(self, word: bytes) -> list[bytes]:
        return [line[len(word) :].strip() for line in self.pipes[self.status].splitlines() if line.startswith(word)]


def run_ranks(order: dict[str, Any]) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert len(os.listdir("/proc/self/task")) == 1, "forking is safe from a process of one thread only"
    ranks, began = [], time.monotonic()
    for number in range(order["ranks"]):
        (out, out_end), (status, status_end) = os.pipe(), os.pipe()
        if not (pid := os.fork()):
            be_rank(order, number, port, out_end, status_end)
        os.close(out_end), os.close(status_end)
        ranks.append(Rank(pid, out, status))
    kill = order.get("kill") or {}
    at = began + kill["after"] if "after" in kill and "saving" not in kill else None
    died: float | None = None
    while any(rank.code is None for rank in ranks):
        if "saving" in kill and any(Path(order["out"], "checkpoints").glob("part_*")):
            at = time.monotonic() + kill["after"]
            del kill["saving"]
        wait = 0.002 if "saving" in kill else 0.5 if at is None else max(0.0, min(0.5, at - time.monotonic()))
        for pipe in select.select([p for rank in ranks for p in rank.open], [], [], wait)[0]:
            next(rank for rank in ranks if pipe in rank.open).read(pipe)
        now = time.monotonic()
        if at is not None and now >= at:
            ranks[kill["rank"]].signal(signal.SIGKILL)
            at = None
        failed = [rank for rank in ranks if rank.code]
        if failed and died is None:
            died = min(rank.ended for rank in failed)
        for rank in ranks:
            if died is not None and not rank.said(b"joined") and not rank.told:
                rank.signal(signal.SIGTERM)
            elif now > (began + LIMIT if died is None else died + PATIENCE):
                rank.signal(signal.SIGKILL)
    reply: dict[str, Any] = {
        "codes": [rank.code for rank in ranks],
        "told": [rank.told for rank in ranks],
        "joined": [bool(rank.said(b"joined")) for rank in ranks],
        "lagged": max(rank.ended for rank in ranks) - min(rank.ended for rank in ranks),
        "seconds": time.monotonic() - began,
        "output": [rank.pipes[rank.out].decode(errors="replace") for rank in ranks],
    }
    if order.get("record"):
        reply["points"] = [json.loads(said[0]) if (said := rank.said(b"points")) else [] for rank in ranks]
    for name in {name for rank in ranks for said in rank.said(b"modules") for name in json.loads(said)}:
        if name not in sys.modules:  # what a rank imported on the way: the next one finds it here
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    return reply | what_is_there(Path(order["out"]))


def what_is_there(out: Path) -> dict[str, Any]:
    """What the next command finds: the exported model, the newest resume state, unfinished ones."""
    from runtime import run_folder
    from runtime.errors import UserError

    newest = run_folder.latest_checkpoint(out)
    try:
        from loading.folder import model_folder

        exported = digest(model_folder(str(out)))
    except UserError:
        exported = None
    parts = sorted(str(p.relative_to(out)) for p in out.rglob("*") if "part" in p.name or p.suffix == ".old")
    return {"model": exported, "checkpoint": [newest.name, digest(newest)] if newest else None, "parts": parts}


ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


class Server:
    """The other side: starts this file as a process, sends it orders and reads its replies."""

    def __init__(self, **environment: str) -> None:
        self.process = subprocess.Popen([sys.executable, __file__], cwd=Path(__file__).parents[1], text=True,
                                        env=ENVIRONMENT | environment, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def __call__(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def main() -> None:
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    import torch

    torch.set_num_threads(1)
    import grpo  # noqa: F401
    import sft  # noqa: F401
    from ops import attention

    attention.register()
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(what_is_there(Path(order["look"])) if "look" in order else run_ranks(order)), flush=True)


if __name__ == "__main__":
    main()
