"""Grade all that test_course.py looks at, with one worker: `course_driver.py FOLDER`, results to FOLDER/NAME.json."""

from __future__ import annotations

import ast
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

from course import grade, handout
from course.handout import ROOT

HOSTILE = {  # name: (file, what is put at its end)
    "exits": ("reward.py", "import os\ndef parse_verdict(*_):\n    os._exit(0)\n"),
    "hangs": ("ops/decode.py", "def draw(*_):\n    while True:\n        pass\n"),
    "babbles": ("evaluation/outcomes.py", "def majority_chance(*_):\n    return 'x' * (2**20 + 1)\n"),
    "forges": ("grpo.py", """
import json, os, sys
FAKE = json.dumps({"score": 100, "tests": []})
for name in ("pytest", "_pytest", "grade", "conftest"):
    sys.modules.pop(name, None)
try:
    import pytest
    pytest.fail = pytest.main = lambda *_, **__: 0
except ImportError:
    pass
for descriptor in range(3, 20):
    try:
        os.write(descriptor, (FAKE + "\\n").encode())
    except OSError:
        pass
print(FAKE)
if not os.fork():
    os.setsid()
    import time
    for place in (".", "..", "../..", PLACE, "/dev/shm"):
        try:
            open(os.path.join(place, "forges.json"), "w").write(FAKE)
        except OSError:
            pass
    time.sleep(300)
def group_advantages(*_, **__):
    return None
"""),
    "copies": ("grpo.py", """
def _stolen():
    import glob
    for place in (CLASSMATE, *glob.glob("/proc/*/root" + SOURCE), SOURCE):
        try:
            text = open(place).read()
            break
        except OSError as error:
            said = error
    else:
        raise said
    text = text.split("# ---- configuration")[0].replace("from __future__ import annotations", "")
    exec(text, found := {"Config": Config})
    return found
def group_advantages(*a, **k):
    return _stolen()["group_advantages"](*a, **k)
"""),
}


class Case:
    """A plan and its clean tree; `grade` writes FOLDER/NAME.json."""

    def __init__(self, folder: Path, name: str, plan: handout.Plan, worker: grade.Worker):
        self.folder, self.plan, self.worker, self.clean = folder, plan, worker, folder / "trees" / name
        self.clean.mkdir(parents=True)
        grade.clean_tree(self.clean, plan)

    def submission(self, name: str, written: set[str]) -> Path:
        """A folder with the files of the plan, in which only `written` is written."""
        path = self.folder / "handed_in" / name
        path.mkdir(parents=True)
        for file in {f.file for f in self.plan.functions}:
            names = [name for name in self.plan.names_in(file) if name not in written]
            text = (ROOT / file).read_text(encoding="utf-8")
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            (path / file).write_text(handout.blank(text, file, names), encoding="utf-8")
        return path

    def grade(self, path: Path, **changes: object) -> None:
        results = grade.grade(path, replace(self.plan, **changes), self.worker, self.clean)
        (self.folder / f"{path.name}.json").write_text(json.dumps(results))


def main(folder: Path) -> None:
    plan = handout.read_plan()
    names = sorted(f.name for f in plan.functions)
    (folder / "work").mkdir()
    worker = grade.Worker(folder / "work")
    (folder / "guards.json").write_text(json.dumps(worker.guards))
    whole = Case(folder, "whole", plan, worker)
    whole.grade(whole.submission("full", set(names)))
    whole.grade(whole.submission("none", set()))
    for name in names:
        whole.grade(whole.submission(f"alone-{name}", {name}))
    for name, (file, text) in HOSTILE.items():
        path = whole.submission(name, set())
        text = text.replace("PLACE", repr(str(folder))).replace("SOURCE", repr(str(ROOT / "grpo.py")))
        text = text.replace("CLASSMATE", repr(str(folder / "handed_in" / "full" / "grpo.py")))
        (path / file).write_text((path / file).read_text() + "\n" + text)
        ast.parse((path / file).read_text())
        whole.grade(path, seconds=1.0 if name == "hangs" else 30.0)
    odd = whole.submission("odd", set())
    (odd / "reward.py").unlink()
    (odd / "reward.py").symlink_to(ROOT / "reward.py")
    (odd / "grpo.py").write_bytes(b"\xff\xfe")
    (odd / "batch.py").write_text("def broken(:\n")
    (odd / "ops/decode.py").write_text("#" * (2**20 + 1))
    (odd / "ops/attention.py").rename(odd / "attention.py")
    (odd / "sitecustomize.py").write_text("raise SystemExit\n")
    whole.grade(odd)
    chosen = random.Random(0).sample(names, 5)  # a lecturer's choice, of which some are written
    part = replace(plan, functions=tuple(f for f in plan.functions if f.name in chosen))
    case = Case(folder, "chosen", part, worker)
    case.grade(case.submission("chosen-full", set(chosen)))
    case.grade(case.submission("chosen-some", set(chosen[:2])))
    worker.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
