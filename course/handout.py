"""The repository's own files -> a student's copy: chosen functions keep signature, decorators and docstring only.

    python -m course.handout OUT                          all functions of handout.toml blank (make handout OUT=...)
    python -m course.handout OUT --assignments 3          only those of assignment 3; the others are complete

There is no second copy of any function: what a student writes is cut out of the running source.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from runtime.cli import start
from runtime.errors import UserError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


@dataclass(frozen=True)
class Function:
    """`name` as in the source; a method is Class.method."""

    name: str
    file: str
    assignment: int
    points: float


@dataclass(frozen=True)
class Plan:
    """What is handed out and graded: handout.toml, or a part of it."""

    functions: tuple[Function, ...]
    carry: tuple[str, ...]
    seconds: float
    hidden: str

    def names_in(self, file: str) -> list[str]:
        return [f.name for f in self.functions if f.file == file]


def numbers(text: str) -> set[int]:
    """--assignments 1,3"""
    return {int(part) for part in text.split(",")}


@cache
def untracked() -> frozenset[Path]:
    """Files of the working tree that git does not track: solutions and notes of a lecturer. None without git or outside
    a clone: a repository around a plain copy tracks nothing of it."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return frozenset()
    listed = subprocess.run(["git", "ls-files", "--others", "-z"], cwd=ROOT, capture_output=True, text=True)
    return frozenset(ROOT / name for name in listed.stdout.split("\0") if name)


def read_plan(assignments: Collection[int] | None = None) -> Plan:
    """handout.toml, cut down to some assignments if asked."""
    path = HERE / "handout.toml"
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    known = [Function(**entry) for entry in table["function"]]
    if twice := {f.name for f in known if [g.name for g in known].count(f.name) > 1}:
        raise UserError(f"{path}: {', '.join(sorted(twice))} twice; names must differ")
    there = sorted({f.assignment for f in known})
    if missing := sorted(set(assignments or ()) - set(there)):
        raise UserError(f"no assignment {', '.join(map(str, missing))} ({there[0]} to {there[-1]})")
    chosen = tuple(f for f in known if assignments is None or f.assignment in assignments)
    carry = tuple(str(file.relative_to(ROOT)) for pattern in table["carry"] for file in sorted(ROOT.glob(pattern))
                  if file.is_file() and file not in untracked())
    if outside := {f.file for f in known} - set(carry):
        raise UserError(f"{path}: {', '.join(sorted(outside))} has a function and is not carried")
    return Plan(chosen, carry, table["seconds"], table["hidden"])


# ---- blanks --------------------------------------------------------------------------------------------


def find(tree: ast.Module, name: str) -> ast.FunctionDef | None:
    """The function or Class.method of that name; of several the last, as Python has it."""
    body: Sequence[ast.stmt] = tree.body
    *classes, last = name.split(".")
    for part in classes:
        found = [node for node in body if isinstance(node, ast.ClassDef) and node.name == part]
        body = found[-1].body if found else []
    functions = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == last]
    return functions[-1] if functions else None


def blank(text: str, file: str, names: Iterable[str]) -> str:
    """The source with the bodies of `names` gone: signature, decorators and docstring stay."""
    lines, tree = text.splitlines(keepends=True), ast.parse(text)
    spans = []
    for name in names:
        node = find(tree, name)
        if node is None or not ast.get_docstring(node):
            raise UserError(f"{file}: {name}: no function of that name with a docstring")
        docstring, body = node.body[0], node.body[1:]
        if not body:
            raise UserError(f"{file}: {name} has no body to blank")
        spans.append((docstring.end_lineno or 0, node.end_lineno or 0, docstring.col_offset, name))
    for first, end, indent, name in sorted(spans, reverse=True):
        count = sum(bool(line.strip()) for line in lines[first:end])
        hint = (f"# Yours: about {count} line{'s' if count > 1 else ''} in place of these.",
                "from todo import Todo", "", f'raise Todo("{name}")')
        lines[first:end] = [" " * indent + line + "\n" if line else "\n" for line in hint]
    return "".join(lines)


def blanks(text: str, names: Iterable[str]) -> set[str]:
    """Which bodies are still the ones that `blank` wrote: nothing but docstring, import and raise."""
    tree, found = ast.parse(text), set()
    for name in names:
        node = find(tree, name)
        if node and len(node.body) == 3 and ast.unparse(node.body[-1]) == f"raise Todo('{name}')":
            found.add(name)
    return found


def only_visible(text: str) -> str:
    """A test file without its hidden tests, and without the helpers that these alone call."""
    def hidden(node: ast.FunctionDef, _: set[str]) -> bool:
        return node.name.startswith("test_") and "pytest.mark.visible" not in map(ast.unparse, node.decorator_list)

    text = without(text, hidden)
    return without(text, lambda node, used: not node.name.startswith("test_") and node.name not in used)


def without(text: str, unwanted: Callable[[ast.FunctionDef, set[str]], bool]) -> str:
    """The text without the functions for which `unwanted(function, names in use)` says so."""
    lines, tree = text.splitlines(keepends=True), ast.parse(text)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in reversed(tree.body):
        if isinstance(node, ast.FunctionDef) and unwanted(node, used):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            del lines[first - 1 : node.end_lineno]
    return re.sub(r"\n{4,}", "\n\n\n", "".join(lines).rstrip() + "\n")


def prefix(function: str) -> str:
    """How the names of its tests begin, so that `pytest -k` finds them: Metrics.reduce -> test_metrics_reduce_"""
    return f"test_{function.strip('_').replace('.', '_').lower()}_"


# ---- the copy ------------------------------------------------------------------------------------------


def write_sources(out: Path, plan: Plan) -> None:
    """The carried files, with the chosen bodies blank."""
    for file in plan.carry:
        path = out / file
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, path)
        if names := plan.names_in(file):
            path.write_text(blank(path.read_text(encoding="utf-8"), file, names), encoding="utf-8")
    shutil.copy(HERE / "todo.py", out)


def write_tests(out: Path, plan: Plan) -> None:
    """The visible tests, what they share, and the points."""
    tests = out / "tests"
    tests.mkdir()
    for name in ("conftest.py", "checks.py", "questions.py"):
        shutil.copy(HERE / "tests" / name, tests)
    for source in sorted((HERE / "tests").glob("test_*.py")):
        if int(source.stem.split("_")[1]) in {f.assignment for f in plan.functions}:
            (tests / source.name).write_text(only_visible(source.read_text(encoding="utf-8")), encoding="utf-8")
    points = {f.name: f.points for f in plan.functions}
    (tests / "plan.json").write_text(json.dumps(points, indent=2) + "\n", encoding="utf-8")


def write_pages(out: Path, plan: Plan) -> None:
    """README with the table of functions, and the pages of the assignments."""
    rows = [f"| {f.assignment} | `{f.file}` | `{f.name}` | {f.points:g} |" for f in plan.functions]
    readme = (HERE / "student" / "README.md").read_text(encoding="utf-8")
    (out / "README.md").write_text(readme.replace("{functions}", "\n".join(rows)), encoding="utf-8")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(HERE / "student" / name, out)
    (out / "assignments").mkdir()
    for number in sorted({f.assignment for f in plan.functions}):
        shutil.copy(HERE / "assignments" / f"{number}.md", out / "assignments")


def make_handout(out: Path, plan: Plan) -> None:
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give a folder that is new")
    out.mkdir(parents=True, exist_ok=True)
    write_sources(out, plan)
    write_tests(out, plan)
    write_pages(out, plan)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m course.handout", description="Write a student's copy.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--assignments", type=numbers, help="blank only these, such as 3 or 1,2; default: all")
    given = parser.parse_args()
    plan = read_plan(given.assignments)
    make_handout(given.out, plan)
    print(f"{given.out}: {len(plan.functions)} functions, {sum(f.points for f in plan.functions):g} points")


if __name__ == "__main__":
    start(main)
