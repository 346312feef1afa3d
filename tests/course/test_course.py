"""The course: handouts for any choice of functions, the grader on full, empty, single and hostile submissions."""

from __future__ import annotations

import ast
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from course import grade, handout

ROOT = Path(__file__).parents[2]
COURSE = ROOT / "course"
PLAN = handout.read_plan()
NAMES = sorted(f.name for f in PLAN.functions)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


# ---- handouts ------------------------------------------------------------------------------------------


@given(st.sets(st.sampled_from(NAMES)))
@settings(max_examples=8, deadline=None)
def test_any_choice_of_functions_is_blanked_and_nothing_else(tmp_path_factory, names):
    out = tmp_path_factory.mktemp("handout") / "copy"
    plan = replace(PLAN, functions=tuple(f for f in PLAN.functions if f.name in names))
    handout.make_handout(out, plan)
    for file in plan.carry:
        if file not in {f.file for f in plan.functions}:
            assert (out / file).read_bytes() == (ROOT / file).read_bytes(), file
            continue
        before, after = ast.parse(read(ROOT / file)), ast.parse(read(out / file))
        here = {f.name for f in plan.functions if f.file == file}
        assert handout.blanks(read(out / file), [f.name for f in PLAN.functions if f.file == file]) == here
        for name in here:
            old, new = handout.find(before, name), handout.find(after, name)
            assert old and new and ast.get_docstring(old) == ast.get_docstring(new)
            assert ast.dump(old.args) == ast.dump(new.args)
            assert [ast.dump(d) for d in old.decorator_list] == [ast.dump(d) for d in new.decorator_list]
            new.body = old.body
        assert ast.dump(before) == ast.dump(after), file


def test_the_copy_tells_nothing(tmp_path):
    """No test of the repository with its plain twins, no notes, no hidden test, no history."""
    handout.make_handout(tmp_path / "copy", PLAN)
    there = {str(p.relative_to(tmp_path / "copy")) for p in (tmp_path / "copy").rglob("*") if p.is_file()}
    extra = {"README.md", "Makefile", "pyproject.toml", "todo.py", "tests/plan.json"}
    extra |= {f"assignments/{n}.md" for n in range(1, 8)}
    assert there == set(PLAN.carry) | extra | {f"tests/{p.name}" for p in (COURSE / "tests").glob("*.py")}
    for path in (tmp_path / "copy" / "tests").glob("test_*.py"):
        shown, whole = ast.parse(read(path)), ast.parse(read(COURSE / "tests" / path.name))
        kept = [node for node in shown.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
        assert kept and all("pytest.mark.visible" in map(ast.unparse, node.decorator_list) for node in kept)
        hidden = [node.name for node in whole.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test")
                  and node.name not in {k.name for k in kept}]
        assert hidden and not any(name in read(path) for name in hidden)
        others = {node.name for node in shown.body if isinstance(node, ast.FunctionDef)} - {k.name for k in kept}
        assert others <= {"one", "matrix", "shown", "whole"}, "a helper that computes what is expected is a twin"
    for function in PLAN.functions:
        node = handout.find(ast.parse(read(ROOT / function.file)), function.name)
        assert node is not None
        last = ast.unparse(node).splitlines()[-1].strip()
        text = ast.unparse(ast.parse(read(tmp_path / "copy" / function.file)))
        assert len(last) < 20 or last not in text, f"{function.name}: its last line stands elsewhere in the copy"


def test_a_copy_carries_all_that_its_scripts_need(tmp_path):
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"bench", "course", "recipes", "variants"}
    assert rooms == {Path(file).parts[0] for file in PLAN.carry if "/" in file}
    carried = {file.removesuffix(".py").replace("/", ".") for file in PLAN.carry if file.endswith(".py")}
    handout.make_handout(tmp_path / "copy", replace(PLAN, functions=()))
    done = subprocess.run([sys.executable, "-c", f"import {', '.join(sorted(carried))}"], cwd=tmp_path / "copy",
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_function_has_visible_and_hidden_tests_that_add_up_to_its_points():
    found: dict[str, list[tuple[float, bool]]] = {}
    for path in (COURSE / "tests").glob("test_*.py"):
        number = int(path.stem.split("_")[1])
        for node in ast.parse(read(path)).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                marks = [ast.unparse(d) for d in node.decorator_list]
                name, points = next(
                    ast.literal_eval(m.removeprefix("pytest.mark.points")) for m in marks if "points" in m
                )
                assert node.name.startswith(handout.prefix(name)), "pytest -k FUNCTION finds them"
                found.setdefault(name, []).append((points, "pytest.mark.visible" in marks))
                assert next(f.assignment for f in PLAN.functions if f.name == name) == number
    assert {f.name: f.points for f in PLAN.functions} == {n: sum(p for p, _ in tests) for n, tests in found.items()}
    assert all({seen for _, seen in tests} == {True, False} for tests in found.values())
    assert sum(f.points for f in PLAN.functions) == 100


def test_a_copy_is_never_written_over_another(tmp_path):
    (tmp_path / "mine.txt").write_text("work of a week")
    done = subprocess.run([sys.executable, "-m", "course.handout", str(tmp_path)], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 2 and "not empty" in done.stderr and len(list(tmp_path.iterdir())) == 1


# ---- the grader ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """name -> results of all that course_driver.py grades with one worker."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder, command = root / "course_graded", [sys.executable, str(ROOT / "tests" / "course_driver.py")]
    with open(root / "course_graded.lock", "w") as lock:  # the workers of pytest-xdist share one run
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            done = subprocess.run([*command, str(folder)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
                                  capture_output=True, text=True, timeout=900)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            (folder / "done").touch()
    return {path.stem: json.loads(read(path)) for path in folder.glob("*.json")} | {"folder": folder}


def scores(results) -> dict[str, float]:
    """Points by function, none left out."""
    found: dict[str, float] = {}
    for test in results["tests"]:
        name = test["extra_data"]["function"]
        found[name] = found.get(name, 0.0) + test["score"]
    assert results["score"] == sum(found.values())
    return found


def test_the_full_source_has_all_points_and_the_handout_none(graded):
    assert scores(graded["full"]) == {f.name: f.points for f in PLAN.functions}
    assert all(t["status"] == "passed" and t["output"] == "" for t in graded["full"]["tests"])
    assert scores(graded["none"]) == dict.fromkeys([f.name for f in PLAN.functions], 0.0)
    for test in graded["none"]["tests"]:
        assert test["output"] == f"waiting for {test['extra_data']['function']}" and "status" not in test


@pytest.mark.parametrize("function", PLAN.functions, ids=lambda f: f.name)
def test_each_function_alone_gains_exactly_its_points(graded, function):
    results = graded[f"alone-{function.name}"]
    assert {n: s for n, s in scores(results).items() if s} == {function.name: function.points}
    assert not [t["name"] for t in results["tests"] if t.get("status") == "failed"]


def test_any_choice_is_graded_by_itself(graded):
    full, some = scores(graded["chosen-full"]), scores(graded["chosen-some"])
    assert full == {f.name: f.points for f in PLAN.functions if f.name in full} and len(full) == 5
    assert sorted(some[name] == full[name] for name in some) == [False] * 3 + [True] * 2


@pytest.mark.parametrize(("name", "says"), [("exits", "ended without an answer"), ("hangs", "no answer within 1 sec"),
                                            ("babbles", "more than 4 MB")])
def test_a_submission_that_misbehaves_loses_its_own_points_only(graded, name, says):
    results = graded[name]
    assert results["score"] == 0 and len(results["tests"]) == len(graded["full"]["tests"])
    assert any(says in t["output"] for t in results["tests"])


def test_after_three_hangs_a_submission_gets_a_sixth_of_the_time(graded):
    waited = [float(seconds) for t in graded["hangs"]["tests"]
              for seconds in re.findall(r"no answer within (\S+) seconds", t["output"])]
    assert len(waited) > 4 and waited == pytest.approx([1, 1, 1] + [1 / 6] * (len(waited) - 3), rel=1e-3)


def test_a_submission_cannot_write_its_score(graded):
    results = graded["forges"]
    assert results["score"] == 0 and len(results["tests"]) == len(graded["full"]["tests"])
    ran = [t["output"] for t in results["tests"] if t.get("status") == "failed"]
    assert len(ran) == 3 and not (graded["folder"] / "forges.json").read_text().startswith('{"score": 100')
    if graded["guards"]["hidden"]:  # nothing stays for the next submission
        assert not [*(graded["folder"] / "work").rglob("forges.json"), *Path("/dev/shm").glob("forges.json")]


def test_a_submission_cannot_read_solutions_or_other_submissions_where_namespaces_can_be_made(graded):
    if not graded["guards"]["hidden"]:
        pytest.skip("no mount namespaces here")
    assert graded["guards"]["offline"]
    line = "grader: network cut off; the repository, other submissions, results and homes hidden"
    assert graded["full"]["output"] == line
    assert scores(graded["copies"])["group_advantages"] == 0
    assert any(re.search("No such file|Permission denied", t["output"]) for t in graded["copies"]["tests"])


def test_only_plain_files_that_parse_are_taken(graded):
    results = graded["odd"]
    assert results["score"] == 0
    for file, why in [("reward.py", "not a plain file"), ("grpo.py", "utf-8"), ("batch.py", "invalid syntax"),
                      ("ops/decode.py", "more than")]:
        assert re.search(rf"{file}: not taken: .*{why}", results["output"]), results["output"]
    assert "ops/attention.py: not handed in; attention.py must be in its folder" in results["output"]


def python_for_all(folder: Path) -> Path:
    """These packages under an interpreter that other users can read; skips where there is none."""
    packages = [Path(path) for path in sys.path if path.endswith("site-packages")]
    usual = Path(f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}")
    bases = [base for base in (Path(sys._base_executable).resolve(), usual) if base.exists()]  # type: ignore[attr-defined]
    bases = [base for base in bases if grade.open_to_others(base.resolve().parent)]
    if os.geteuid() or not shutil.which("setpriv") or not bases or not all(map(grade.open_to_others, packages)):
        pytest.skip("needs root, setpriv and an interpreter that others can read")
    subprocess.run([bases[0], "-m", "venv", "--without-pip", folder], check=True)
    [own] = folder.glob("lib/*/site-packages")
    (own / "all.pth").write_text("".join(f"{path}\n" for path in packages))
    return folder / "bin" / "python"


@pytest.mark.slow
@pytest.mark.parametrize("namespaces", [True, False])
def test_run_autograder_closes_the_repository_and_grades_as_another_user(namespaces):
    """The script that Gradescope starts, as root; one function of the submission reads the hidden tests."""
    with tempfile.TemporaryDirectory() as root:  # pytest's folder is closed to others
        place = Path(root)
        place.chmod(0o755)
        script = read(COURSE / "gradescope" / "run_autograder").replace("/autograder", root)
        script = script.replace("/opt/course/bin/python", str(python_for_all(place / "environment")))
        script = re.sub("ASSIGNMENTS=.*", "ASSIGNMENTS=1,5", script)
        left_out = shutil.ignore_patterns(".git", ".venv*", "runs", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, place / "source" / "repository", ignore=left_out)
        (place / "results").mkdir()
        handout.make_handout(place / "submission", replace(PLAN, functions=()))
        hidden = place / "source" / "repository" / "course" / "tests" / "test_1_verdict.py"
        with open(place / "submission" / "reward.py", "a") as file:
            file.write(f"\n\ndef parse_verdict(*_):\n    open({str(hidden)!r})\n")
        without = [] if namespaces else ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]
        done = subprocess.run([*without, "bash", "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        results = json.loads(read(place / "results" / "results.json"))
    assert {n: s for n, s in scores(results).items() if not s} == {"parse_verdict": 0}
    assert results["score"] == sum(f.points for f in PLAN.functions if f.assignment in (1, 5)) - 6, done.stdout
    assert any(re.search("No such file|Permission denied", t["output"]) for t in results["tests"])
    assert ("submissions, results and homes hidden" if namespaces else "the repository closed") in results["output"]


@pytest.mark.parametrize(("words", "says"), [
    ("class/one", r"say --assignments, as in the handout \(1,3,7\)"),
    ("class/one --assignments 1,9", r"no assignment 9 \(1 to 7\)"),
    ("class --assignments 1", r"class holds no file of the plan, but folders that do: did you mean class/\*\?"),
    ("class/one class/notes.txt --assignments 1", "class/notes.txt: no such folder"),
])
def test_what_would_give_wrong_points_is_refused(tmp_path, monkeypatch, words, says):
    for name in ("one", "two"):
        (tmp_path / "class" / name).mkdir(parents=True)
        (tmp_path / "class" / name / "reward.py").touch()
    (tmp_path / "class" / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["grade", *words.split()])
    with pytest.raises(grade.UserError, match=says):
        grade.main()


def test_a_handout_is_tested_and_graded_by_its_commands(tmp_path):
    """make handout, one function written, the student's tests, grade.py with a results file."""
    copy = tmp_path / "copy"
    command = ["make", "handout", f"OUT={copy}", "ASSIGNMENTS=3", f"PYTHON={sys.executable}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    own = read(copy / "grpo.py")
    start, end = own.index("    # Yours: about 2 lines", own.index("def kl_k3")), own.index('raise Todo("kl_k3")')
    body = "    d = (ref_logprobs - logprobs).clamp(-20, 20)\n    return torch.expm1(d).sub(d).clamp(max=10.0)"
    (copy / "grpo.py").write_text(own[:start] + body + own[end + len('raise Todo("kl_k3")') :])
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA"], cwd=copy,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "1 passed, 6 waiting" in done.stdout and re.search(r"1 of 1 +kl_k3", done.stdout)
    assert re.search(r"0 of 2 +group_advantages +still to be written", done.stdout)
    assert "1 of 9 seen here; 12 more points are asked by tests that you do not see" in done.stdout
    out = tmp_path / "results" / "results.json"
    done = subprocess.run([sys.executable, "-m", "course.grade", str(copy), "--assignments", "3", "--out", str(out)],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"3 of 3 +kl_k3", done.stdout), done.stdout + done.stderr
    assert json.loads(read(out))["score"] == 3
