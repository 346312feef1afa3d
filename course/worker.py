"""The untrusted side of the grader: it runs a submission's functions and knows no test and no score.

grade.py starts it. It imports torch once and then forks a process for each function of each submission, because the
import takes seconds. Requests and replies are lines of JSON on stdin and stdout; no code of a submission is imported
in this process. Where the system allows it, a submission cannot reach the network, the repository with its hidden
tests and solutions, other submissions and their results, the grader's user, or the memory and pipes of this process,
and can write only into a folder that ends with its process. Its time and its files are limited, and processes that it
leaves behind are ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NEWUSER, NEWNET, NEWNS = 0x10000000, 0x40000000, 0x00020000
BIND, REC, PRIVATE, REMOUNT, READONLY = 0x1000, 0x4000, 0x40000, 0x20, 0x1
NOBODY = 65534
LONGEST = 2**22  # bytes of an answer
REPOSITORY = Path(__file__).resolve().parents[1]
# what Python needs of a system, and a submission may read
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/nix/store", "/etc", "/proc", "/sys/class", "/sys/devices",
          "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
LIBC = ctypes.CDLL(None)


# ---- what is cut off -----------------------------------------------------------------------------------


def isolate() -> dict[str, bool]:
    """Separate this process from the network and from all files but a few -> what was possible."""
    done = {"offline": False, "hidden": False, "other_user": False}
    if sys.platform == "linux":
        root, user, group = os.geteuid() == 0, os.geteuid(), os.getegid()
        if LIBC.unshare(NEWNET | NEWNS | (0 if root else NEWUSER)) == 0:
            with contextlib.suppress(OSError):  # in a user namespace files can be made by users that it knows
                for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"),
                                   ("gid_map", f"{group} {group} 1")) if not root else ():
                    Path("/proc/self", name).write_text(text)
            done["offline"], done["hidden"] = loopback_up(), hide()
        LIBC.prctl(4, 0, 0, 0, 0)  # not dumpable: a child of the same user cannot open our memory or pipes
        LIBC.prctl(36, 1, 0, 0, 0)  # what a child leaves behind becomes ours, to be ended
        done["other_user"] = root and can_drop()
    return done


def loopback_up() -> bool:
    """Switch the loopback device on: two Gloo ranks talk over it, and in a new network it is off."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            fcntl.ioctl(control, 0x8914, struct.pack("16sh22x", b"lo", 0x1 | 0x40))  # SIOCSIFFLAGS, up and running
        return True
    except OSError:
        return False


def mount(source: object, target: object, flags: int, kind: bytes | None = None, options: bytes | None = None) -> bool:
    return LIBC.mount(str(source).encode(), str(target).encode(), kind, flags, options) == 0


def read_only(target: Path) -> bool:
    kept = os.statvfs(target).f_flag & (os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC)  # a user may not take these off
    return mount("none", target, REMOUNT | BIND | READONLY | kept)


def hide() -> bool:
    """Give this process and its children a new root: the system's folders and Python's, read-only, and the current
    folder. Repositories, submissions, results, homes, /tmp and /dev/shm are not in it."""
    own = Path.cwd()
    root = own / "root"

    def show(path: str) -> bool:
        target = Path(f"{root}{path}")
        if not os.path.isabs(path) or not os.path.exists(path) or target.exists():
            return True
        if os.path.isdir(path):
            target.mkdir(parents=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        return mount(path, target, BIND | REC) and read_only(target)

    # the first of sys.path is this file's folder
    python = [sys.prefix, sys.base_prefix, *sys.path[1:], *os.environ.get("LD_LIBRARY_PATH", "").split(":")]
    inner = Path(f"{root}{own}")
    try:
        root.mkdir()
        done = (mount("none", "/", REC | PRIVATE) and mount("tmpfs", root, 0, b"tmpfs", b"mode=755")
                and all(map(show, SYSTEM))
                and (not Path(f"{root}{REPOSITORY}").exists() or mount("tmpfs", f"{root}{REPOSITORY}", 0, b"tmpfs"))
                and all(map(show, python)))
        inner.mkdir(parents=True)
        if not (done and mount(own, inner, BIND) and read_only(root)):
            return False
        os.chroot(root)
    except OSError:
        return False
    os.chdir(own)
    return not Path(__file__).exists()


def enclose(folder: str) -> None:
    """For this process alone: `folder` is empty and can be written, all else is read-only."""
    own = Path(folder).parents[1]
    if not (LIBC.unshare(NEWNS) == 0 and mount("tmpfs", folder, 0, b"tmpfs", b"size=256m,mode=777")
            and read_only(own)):
        raise OSError("no folder of its own")


def can_drop() -> bool:
    """Whether a child of root may become nobody (a container can forbid it) and can still import."""
    if not (pid := os.fork()):
        try:
            drop_user()
            files = [getattr(sys.modules[name], "__file__", None) for name in ("os", "fcntl")]  # fcntl may be built in
            os._exit(0 if all(os.access(os.path.dirname(f), os.R_OK | os.X_OK) for f in files if f) else 1)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def drop_user() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def drop_capabilities() -> None:
    """Give up the rights that could undo a mount or look into other processes; without them root is a plain user."""
    if sys.platform == "linux":
        LIBC.prctl(38, 1, 0, 0, 0)  # no new privileges
        for number in range(64):
            LIBC.prctl(24, number, 0, 0, 0)  # out of the bounding set
        LIBC.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6))


class Child:
    """A process that holds one submission's modules and answers questions about one function."""

    def __init__(self, tree: str, folder: str, seconds: float, done: dict[str, bool]):
        self.ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if not self.pid:
            try:
                serve(theirs, tree, folder, seconds, done)
            finally:
                os._exit(1)
        theirs.close()

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Its reply, or {"error": ...} when there is none in time; then it is ended."""
        try:
            self.ours.sendall(json.dumps(request).encode() + b"\n")
            said, deadline = b"", time.monotonic() + seconds
            while not said.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0 or not select.select([self.ours], [], [], left)[0]:
                    return self.lost(f"no answer within {seconds:g} seconds")
                part = self.ours.recv(65536)
                said += part
                if not part:
                    return self.lost("the process ended without an answer (os._exit, a signal, or out of memory?)")
                if len(said) > LONGEST:
                    return self.lost("an answer of more than 4 MB")
            reply = json.loads(said)
            known = isinstance(reply, dict) and len(reply) == 1 and set(reply) <= {"ok", "waiting", "error"}
            return reply if known else self.lost("not an answer")
        except (OSError, ValueError, RecursionError):
            return self.lost("not an answer, or the process has ended")

    def lost(self, why: str) -> dict[str, Any]:
        self.end()
        return {"error": why}

    def end(self) -> None:
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
            self.ours.close()
            self.pid = 0
            end_orphans()


def end_orphans() -> None:
    """Kill what an ended child left running, until nothing is left: it all has become ours (Linux)."""
    for _ in range(100):
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                left = [int(pid) for pid in file.read().split()]
        except OSError:
            return
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def serve(pipe: socket.socket, tree: str, folder: str, seconds: float, done: dict[str, bool]) -> None:
    """In the child: give everything up, then answer. From the first probe on the submission may do as it likes."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.dup2(pipe.detach(), 3)
    os.closerange(4, 65536)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**26, 2**26))
    resource.setrlimit(resource.RLIMIT_CPU, (int(4 * seconds) + 1, int(4 * seconds) + 1))
    resource.setrlimit(resource.RLIMIT_NPROC, (2048, 2048))
    if done["hidden"]:
        enclose(folder)
    if done["other_user"]:
        drop_user()
    drop_capabilities()
    os.environ.clear()
    os.environ.update(PATH="/usr/bin:/bin", HOME=folder, TMPDIR=folder, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1",
                      TOKENIZERS_PARALLELISM="false")
    tempfile.tempdir = folder  # what `main` found is the grader's own, closed to another user
    os.chdir(tree)
    sys.path[:0] = [tree, os.path.join(tree, "tests")]
    channel = socket.socket(fileno=3)
    for request in channel.makefile("rb"):
        reply = run_probe(json.loads(request))
        with contextlib.suppress(OSError):
            channel.sendall(reply)


def run_probe(request: dict[str, Any]) -> bytes:
    import traceback

    reply: dict[str, Any]
    try:
        questions = importlib.import_module("questions")  # the tree's

        reply = {"ok": questions.answer(request["probe"], request["arguments"])}
        said = json.dumps(reply)
    except BaseException as error:
        name = type(error).__name__
        text = "".join(traceback.format_exception(error, limit=-3))[-2000:]
        said = json.dumps({"waiting": str(error)[:80]} if name == "Todo" else {"error": text})
    return said.encode() + b"\n"


def main() -> None:
    done = isolate()
    tempfile.gettempdir()
    import torch
    import torch._dynamo  # what FSDP2 imports at its first use, in every rank
    import torch.distributed.fsdp
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    say({"ready": done})
    child, held = None, None  # one at a time, so that whatever else is left is an orphan
    for line in sys.stdin.buffer:
        request = json.loads(line)
        wanted = (request["tree"], request["function"]) if "tree" in request else None
        if child is not None and (held != wanted or not child.pid):
            child.end()
            child = None
        if wanted is None:
            say({"ok": True})
            continue
        if child is None:
            child, held = Child(request["tree"], request["folder"], request["seconds"], done), wanted
        say(child.ask({k: request[k] for k in ("probe", "arguments")}, request["seconds"]))
    if child is not None:
        child.end()


def say(reply: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
