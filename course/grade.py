"""Grade submissions: `python -m course.grade SUBMISSION... --assignments 1,3,7 [--out results.json]`.

    1. a clean tree: the handout, made again from the repository
    2. from the submission only the files that hold a function of handout.toml are copied over it
    3. the hidden tests run in this process; worker.py calls the functions in other processes and returns JSON
    4. the results file is written when all processes of the submission have ended

No code of a submission runs in the process that compares, adds up and writes.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import contextlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from course import handout
from course.handout import HERE, Plan
from course.todo import Todo
from runtime.cli import start
from runtime.disk import write_whole
from runtime.errors import UserError

LARGEST = 2**20  # bytes of a submitted file


# ---- the tree ------------------------------------------------------------------------------------------


def clean_tree(tree: Path, plan: Plan) -> None:
    """The handout's sources and the questions, compiled, because a submission may not be allowed to write there."""
    handout.write_sources(tree, plan)
    (tree / "tests").mkdir()
    shutil.copy(HERE / "tests" / "questions.py", tree / "tests")
    compileall.compile_dir(tree, quiet=2)


def take(submission: Path, tree: Path, plan: Plan) -> dict[str, str]:
    """Copy the allowed files over the tree -> {file: why it was not taken}."""
    left_out = {}
    for file in dict.fromkeys(f.file for f in plan.functions):
        path = submission / file
        try:
            about = path.lstat()
            if not stat.S_ISREG(about.st_mode) or path.resolve() != submission.resolve() / file:
                raise ValueError("not a plain file")
            if about.st_size > LARGEST:
                raise ValueError(f"more than {LARGEST} bytes")
            text = path.read_bytes().decode("utf-8")
            ast.parse(text)
            (tree / file).write_text(text, encoding="utf-8")
        except FileNotFoundError:
            flat = submission / path.name  # a file of a room, handed in without its folder
            left_out[file] = "not handed in" + f"; {path.name} must be in its folder" * (flat != path and flat.exists())
        except (OSError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
            left_out[file] = f"not taken: {error}"
    return left_out


# ---- the other side ------------------------------------------------------------------------------------


class Worker:
    """worker.py as a process. One serves many submissions, which never see each other."""

    def __init__(self, root: Path):
        self.root = root
        environment = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "VIRTUAL_ENV", "LD_LIBRARY_PATH")}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root,
            env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(root)},
        )
        self.guards: dict[str, bool] = self.read()["ready"]

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the worker has ended")
        return json.loads(line)

    def call(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            return self.read()
        except (OSError, RuntimeError):
            return {"error": "the grader's worker was ended"}

    def close(self) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
            self.process.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()


# ---- the tests -----------------------------------------------------------------------------------------


@dataclass(eq=False)  # pytest keeps plugins in a set
class Grader:
    """A pytest plugin: hands the tests their plan and `ask`, and keeps what they say."""

    plan: Plan
    worker: Worker
    tree: Path
    folder: Path
    blank: set[str]
    hangs: int = 0
    tests: list[dict[str, Any]] = field(default_factory=list)

    def pytest_configure(self, config: Any) -> None:
        config.course = {f.name: f.points for f in self.plan.functions}
        config.ask = self.ask

    def ask(self, function: str, probe: str, arguments: list[Any]) -> Any:
        if function in self.blank:
            raise Todo(function)
        seconds = self.plan.seconds / (1 if self.hangs < 3 else 6)  # all may hang; Gradescope ends after 10 minutes
        reply = self.worker.call(tree=str(self.tree), folder=str(self.folder), function=function, probe=probe,
                                 arguments=arguments, seconds=seconds)
        self.hangs += reply.get("error", "").startswith("no answer within")
        if "waiting" in reply:
            raise Todo(reply["waiting"])
        if "ok" not in reply:
            pytest.fail(f"{function} was asked for {probe} and raised or did not answer:\n{reply['error']}",
                        pytrace=False)
        return reply["ok"]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        function, points = dict(report.user_properties).get("points", ("", 0.0))
        waiting = getattr(report, "waiting", "")
        passed = report.when == "call" and report.outcome == "passed"
        name = report.nodeid.partition("::")[2].removeprefix(handout.prefix(function)).replace("_", " ")
        output = f"waiting for {waiting}" if waiting else "" if passed else report.longreprtext
        entry = {"name": f"{function}: {name}", "score": points if passed else 0.0, "max_score": points,
                 "output": output, "tags": [function],
                 "visibility": "visible" if "visible" in report.keywords else self.plan.hidden,
                 "extra_data": {"function": function, "waiting": waiting}}
        if not waiting:  # Gradescope knows passed and failed alone
            entry["status"] = "passed" if passed else "failed"
        self.tests.append(entry)


def grade(submission: Path, plan: Plan, worker: Worker, clean: Path) -> dict[str, Any]:
    """One submission -> Gradescope's results."""
    began = time.monotonic()
    place = Path(tempfile.mkdtemp(dir=worker.root))
    tree, folder = place / "tree", place / "home"
    shutil.copytree(clean, tree)
    left_out = take(submission, tree, plan)
    folder.mkdir()
    for part, mode in ((worker.root, 0o711), (place, 0o755), (tree, 0o755), (folder, 0o777)):
        part.chmod(mode)  # the submission's user, where it is another, reads the tree and writes its own folder
    for part in tree.rglob("*"):  # also the copies, as the repository may be closed to all but root
        part.chmod(0o755 if part.is_dir() else 0o644)
    texts = {f.file: (tree / f.file).read_text(encoding="utf-8") for f in plan.functions}
    blank = {name for file, text in texts.items() for name in handout.blanks(text, plan.names_in(file))}
    grader = Grader(plan, worker, tree, folder, blank)
    options = ["-p", "no:cacheprovider", "-p", "no:terminal", "-c", os.devnull,
               "--rootdir", str(HERE / "tests"), "--import-mode=prepend", str(HERE / "tests")]
    os.environ.pop("PYTEST_ADDOPTS", None)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    code = pytest.main(options, plugins=[grader])
    worker.call()  # ends what is left of it
    shutil.rmtree(place, ignore_errors=True)
    expected = sum(f.points for f in plan.functions)
    if code not in (0, 1) or abs(sum(t["max_score"] for t in grader.tests) - expected) > 1e-9:
        raise UserError(f"the tests themselves did not run: pytest exit {code}, {len(grader.tests)} tests of "
                           f"{sum(t['max_score'] for t in grader.tests):g} points, {expected:g} expected")
    notes = [f"{file}: {why}; the handout's is graded" for file, why in left_out.items()] + [guards(worker.guards)]
    return {"score": sum(t["score"] for t in grader.tests), "execution_time": round(time.monotonic() - began, 2),
            "output": "\n".join(notes), "tests": grader.tests}


def guards(done: Mapping[str, bool]) -> str:
    """What a submission could reach on this machine, in one line."""
    network = "cut off" if done["offline"] else "NOT cut off (needs Linux and the right to make namespaces)"
    if done["hidden"]:
        files = "the repository, other submissions, results and homes hidden"
    elif done["other_user"] and not open_to_others(HERE):
        files = "the repository closed; other folders that all users may open (submissions?) NOT hidden"
    else:
        files = ("the hidden tests and the solutions NOT hidden (needs namespaces, or start as root and chmod -R "
                 "go-rwx the repository)")
    return f"grader: network {network}; {files}"


def open_to_others(path: Path) -> bool:
    return all(part.stat().st_mode & 0o001 for part in (path, *path.parents))


def check_folders(submissions: Iterable[Path], plan: Plan) -> None:
    """Before the first is graded: UserError where one is no folder, or is a folder of submissions."""
    def holds(folder: Path) -> bool:
        return any((folder / f.file).exists() for f in plan.functions)

    for submission in submissions:
        if not submission.is_dir():
            raise UserError(f"{submission}: no such folder")
        if not holds(submission) and sum(map(holds, submission.iterdir())) > 1:
            raise UserError(f"{submission} holds no file of the plan, but folders that do: "
                            f"did you mean {submission}/*?")


def by_function(results: Mapping[str, Any], plan: Plan) -> str:
    """The terminal's table."""
    lines = []
    for function in plan.functions:
        tests = [t for t in results["tests"] if t["extra_data"]["function"] == function.name]
        waits = sorted({t["extra_data"]["waiting"] for t in tests} - {""})
        note = f"waiting for {', '.join(waits)}" if waits else ""
        failed = [t["output"] for t in tests if t.get("status") == "failed"]
        score = sum(t["score"] for t in tests)
        lines.append(f"{score:6g} of {function.points:<4g} {function.name:<22}{note}")
        lines += ["       " + line for text in failed for line in text.strip().splitlines()]
    total = sum(f.points for f in plan.functions)
    return "\n".join([*lines, f"{results['score']:6g} of {total:g}", *filter(None, results["output"].split("\n"))])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m course.grade",
                                     description="Grade submissions (folders with the files that were written).")
    parser.add_argument("submissions", nargs="+", type=Path, metavar="SUBMISSION")
    parser.add_argument("--out", type=Path, help="results file; of several submissions a folder; default: none")
    parser.add_argument("--assignments", type=handout.numbers, help="those of the handout, such as 3 or 1,2")
    given = parser.parse_args()
    if not given.assignments:
        raise UserError("say --assignments, as in the handout (1,3,7); "
                        "what was handed out complete would earn its points")
    several, plan = len(given.submissions) > 1, handout.read_plan(given.assignments)
    check_folders(given.submissions, plan)
    with tempfile.TemporaryDirectory() as root, tempfile.TemporaryDirectory() as clean:
        clean_tree(Path(clean), plan)
        with contextlib.closing(Worker(Path(root))) as worker:
            for submission in given.submissions:
                results = grade(submission, plan, worker, Path(clean))
                print((f"==== {submission}\n" if several else "") + by_function(results, plan), flush=True)
                if given.out:
                    target = given.out / f"{submission.resolve().name}.json" if several else given.out
                    write_whole(target, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    start(main)
