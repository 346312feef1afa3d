"""course/traps: every fault can be put in, each trap has one, and the tests that should notice exist."""

from __future__ import annotations

import ast
import re
import shutil

import pytest

from course import handout, traps
from course.patches import ROOT, apply, read_patches

PATCHES = read_patches(ROOT / "course" / "traps")
EVERY = pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)


def exists(name: str) -> bool:
    """Is there such a test, written as pytest has it?"""
    file, _, test = name.partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_there_is_a_fault_for_each_trap_or_a_reason():
    there = [traps.number(patch) for patch in PATCHES] + list(traps.IMPOSSIBLE)
    assert sorted(there, key=lambda trap: int(trap[1:])) == [f"T{n}" for n in range(1, 18)]


@EVERY
def test_a_fault_fits_is_small_and_compiles(patch, tmp_path):
    assert {"Title", "Fault", "Test", "Run", "Shows"} == set(patch.says) and patch.says["Run"] in ("grpo", "sft")
    assert 1 <= patch.changed <= 3
    for file in patch.files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    apply(patch, tmp_path)
    for file in patch.files:
        compile((tmp_path / file).read_text(encoding="utf-8"), file, "exec")


@EVERY
def test_the_tests_that_should_notice_exist(patch):
    names = patch.says["Test"].split()
    assert all(map(exists, names))
    assert any(f"test_{traps.number(patch)}_" in name for name in names), "one of them carries the trap's number"


def test_the_table_names_every_fault_and_a_test_that_exists():
    rows = re.findall(r"^\| \[(T\d+)\]\(traps/(\w+)\.patch\) \|.*$", page := (ROOT / "course" / "traps.md").read_text(),
                      re.MULTILINE)
    assert rows == [(traps.number(patch), patch.name) for patch in PATCHES]
    for line in (line for line in page.splitlines() if line.startswith("| [T")):
        named = re.findall(r"\[`([\w.]+)`\]\(\.\./([\w/]+\.py)\)", line)
        assert named and all(exists(f"{file}::{test}") for test, file in named), line
        assert not re.search(r"\*\*none\*\*|not run yet", line), "a fault that no test noticed, or that was not run"


def test_the_table_is_the_one_that_the_numbers_make(tmp_path):
    if (ROOT / "course" / "traps.json").exists():
        shutil.copy(ROOT / "course" / "traps.json", tmp_path)
    traps.write_table(tmp_path)
    assert (ROOT / "course" / "traps.md").read_text() == (tmp_path / "traps.md").read_text(), (
        "python -m course.traps table"
    )


def test_a_run_in_words():
    healthy = {"reward/mean": 0.5, "accuracy": 0.8}
    assert traps.in_words({}, healthy) == "not run yet"
    assert traps.in_words({"error": "it broke", "accuracy": 0.75}, healthy) == "`it broke`; accuracy 0.75 (0.8)"


def test_faults_that_no_number_shows_are_counted():
    runs = {"healthy": {"grpo": {"exit": 0, "accuracy": 0.9}, "sft": {"exit": 0, "tokens": 47.0}},
            PATCHES[0].name: {"grpo": {"exit": 0, "accuracy": 0.9, "seconds": 3}},
            PATCHES[1].name: {"grpo": {"exit": 0, "accuracy": 0.8}}}
    assert traps.unseen(runs, PATCHES[:3]).endswith("to the last digit shown: T1.")
    assert traps.unseen({}, PATCHES) == "No fault has been trained with yet."


def test_no_student_is_handed_a_patch_or_a_page_of_them():
    assert not any(re.search("exercise|trap|patch", file) for file in handout.read_plan().carry)
