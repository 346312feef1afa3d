"""The repository's own files -> a student's copy: chosen functions keep signature, decorators and docstring only.

    python course/handout.py OUT                          all functions of handout.toml blank (make handout OUT=...)
    python course/handout.py OUT --assignments 3          only those of assignment 3, the rest as it runs
    python course/handout.py OUT --term 2026-autumn       with this term's specification
    python course/handout.py OUT --solved                 the same specification, nothing blank: the lecturer's key

There is no second copy of any function: a term's specification is a list of edits to the running source.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import random
import shutil
import sys
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


class HandoutError(Exception):
    """Something in handout.toml, or a source that it no longer fits; printed as one line."""


@dataclass(frozen=True)
class Function:
    """`name` as in the source; a method is Class.method."""

    name: str
    file: str
    assignment: int
    points: float


@dataclass(frozen=True)
class Plan:
    functions: tuple[Function, ...]
    carry: tuple[str, ...]
    variations: tuple[Mapping[str, Any], ...]
    term: str
    vary: tuple[str, ...]
    seconds: float
    hidden: str

    @property
    def names(self) -> frozenset[str]:
        return frozenset(f.name for f in self.functions)


def read_plan(path: Path = HERE / "handout.toml", term: str | None = None,
              assignments: Collection[int] | None = None, names: Collection[str] | None = None) -> Plan:
    """handout.toml, cut down to some assignments or names if asked."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    known = [Function(**entry) for entry in table["function"]]
    if twice := {f.name for f in known if [g.name for g in known].count(f.name) > 1}:
        raise HandoutError(f"{path}: {', '.join(sorted(twice))} twice; names must differ")
    if strange := set(names or ()) - {f.name for f in known}:
        raise HandoutError(f"{path}: no function {', '.join(sorted(strange))}")
    chosen = tuple(f for f in known if (assignments is None or f.assignment in assignments)
                   and (names is None or f.name in names))
    return Plan(chosen, tuple(table["carry"]), tuple(table["variation"]), table["term"] if term is None else term,
                tuple(table["vary"]), table["seconds"], table["hidden"])


# ---- this term's specification -------------------------------------------------------------------------


def options(plan: Plan) -> dict[str, Mapping[str, Any]]:
    """{variation: the option that this term draws}; empty without a term."""
    if not plan.term:
        return {}
    return {
        v["name"]: random.Random(f"{plan.term}/{v['name']}").choice(v["option"])
        for v in plan.variations
        if v["name"] in plan.vary
    }


def specification(plan: Plan) -> dict[str, Any]:
    """{variation: value}, what the tests compute their expected values from."""
    return {v["name"]: v["published"] for v in plan.variations} | {k: o["value"] for k, o in options(plan).items()}


def edited(text: str, file: str, plan: Plan) -> str:
    """The source under this term's specification."""
    for name, option in options(plan).items():
        for where, old, new in option["edits"]:
            if where != file:
                continue
            if text.count(old) != 1:
                raise HandoutError(f"variation {name} = {option['value']}: {file} has {text.count(old)} times {old!r}")
            text = text.replace(old, new)
    return text


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
            raise HandoutError(f"{file}: {name}: no function of that name with a docstring")
        docstring, body = node.body[0], node.body[1:]
        if not body:
            raise HandoutError(f"{file}: {name} has no body to blank")
        spans.append((docstring.end_lineno or 0, node.end_lineno or 0, docstring.col_offset, name))
    for start, end, indent, name in sorted(spans, reverse=True):
        count = sum(bool(line.strip()) for line in lines[start:end])
        hint = (f"# Yours: about {count} line{'s' if count > 1 else ''} in place of these.",
                "from todo import Todo", "", f'raise Todo("{name}")')
        lines[start:end] = [" " * indent + line + "\n" if line else "\n" for line in hint]
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
    text = without(text, lambda node, _: node.name.startswith("test_") and not _is_visible(node))
    return without(text, lambda node, used: not node.name.startswith("test_") and node.name not in used)


def without(text: str, unwanted: Callable[[ast.FunctionDef, set[str]], bool]) -> str:
    """The text without the functions for which `unwanted(function, names in use)` says so."""
    lines, tree = text.splitlines(keepends=True), ast.parse(text)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in reversed(tree.body):
        if isinstance(node, ast.FunctionDef) and unwanted(node, used):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            del lines[first - 1 : node.end_lineno]
    text = "".join(lines).rstrip() + "\n"
    while "\n\n\n\n" in text:
        text = text.replace("\n\n\n\n", "\n\n\n")
    return text


def expectations(text: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """{call: value} of every `expected("equation", literals ...)` in a visible test."""
    place = importlib.util.spec_from_file_location("twins", HERE / "tests" / "twins.py")
    assert place and place.loader
    twins = importlib.util.module_from_spec(place)
    place.loader.exec_module(twins)
    calls = [[ast.literal_eval(argument) for argument in node.args] for node in ast.walk(ast.parse(text))
             if isinstance(node, ast.Call) and ast.unparse(node.func) == "expected"]
    return {json.dumps(call): getattr(twins, call[0])(spec, *call[1:]) for call in calls}


def prefix(function: str) -> str:
    """How the names of its tests begin, so that `pytest -k` finds them: Metrics.reduce -> test_metrics_reduce_"""
    return f"test_{function.strip('_').replace('.', '_').lower()}_"


def points_shown(text: str) -> dict[str, float]:
    """{function: points} of the visible tests in a test file."""
    shown: dict[str, float] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and _is_visible(node):
            marks = [d for d in node.decorator_list if isinstance(d, ast.Call)]
            name, points = next(map(ast.literal_eval, m.args) for m in marks if "points" in ast.unparse(m.func))
            shown[name] = shown.get(name, 0.0) + points
    return shown


def _is_visible(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator) == "pytest.mark.visible" for decorator in node.decorator_list)


# ---- the copy ------------------------------------------------------------------------------------------


def write_sources(out: Path, plan: Plan, solved: bool = False) -> None:
    """The carried files under this term's specification, chosen bodies blank."""
    for file in plan.carry:
        path = out / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".py":
            shutil.copy(ROOT / file, path)
            continue
        text = edited((ROOT / file).read_text(encoding="utf-8"), file, plan)
        names = [f.name for f in plan.functions if f.file == file and not solved]
        path.write_text(blank(text, file, names), encoding="utf-8")
    shutil.copy(HERE / "todo.py", out)
    if outside := {f.file for f in plan.functions} - set(plan.carry):
        raise HandoutError(f"handout.toml: {', '.join(sorted(outside))} has a function and is not carried")


def write_tests(out: Path, plan: Plan) -> None:
    """The visible tests, what they share, the specification they follow, and the values they expect under it."""
    tests, spec = out / "tests", specification(plan)
    tests.mkdir()
    for name in ("conftest.py", "checks.py", "questions.py"):
        shutil.copy(HERE / "tests" / name, tests)
    expected: dict[str, Any] = {}
    shown: dict[str, float] = {}
    for source in sorted((HERE / "tests").glob("test_*.py")):
        if int(source.stem.split("_")[1]) in {f.assignment for f in plan.functions}:
            text = only_visible(source.read_text(encoding="utf-8"))
            expected |= expectations(text, spec)
            shown |= points_shown(text)
            (tests / source.name).write_text(text, encoding="utf-8")
    about = {"spec": spec, "points": {f.name: f.points for f in plan.functions}, "visible": shown, "expected": expected}
    (tests / "plan.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def write_pages(out: Path, plan: Plan) -> None:
    """README with this term's specification and the table of functions; the assignments' pages, edited for the term."""
    of = {v["name"]: v["assignment"] for v in plan.variations}
    says = [f"- assignment {of[name]}: {option['says']}" for name, option in options(plan).items()]
    rows = [f"| {f.assignment} | `{f.file}` | `{f.name}` | {f.points:g} |" for f in plan.functions]
    readme = (HERE / "student" / "README.md").read_text(encoding="utf-8")
    readme = readme.replace("{specification}", "\n".join(says) or "- as in the paper and in the docstrings")
    (out / "README.md").write_text(readme.replace("{functions}", "\n".join(rows)), encoding="utf-8")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(HERE / "student" / name, out)
    (out / "assignments").mkdir()
    for number in sorted({f.assignment for f in plan.functions}):
        page = f"assignments/{number}.md"
        (out / page).write_text(edited((HERE / page).read_text(encoding="utf-8"), page, plan), encoding="utf-8")


def make_handout(out: Path, plan: Plan, solved: bool = False) -> None:
    if out.exists() and any(out.iterdir()):
        raise HandoutError(f"{out} is not empty; give a folder that is new")
    out.mkdir(parents=True, exist_ok=True)
    write_sources(out, plan, solved)
    write_tests(out, plan)
    write_pages(out, plan)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write a student's copy.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--term", help="draws the specification; default: handout.toml's")
    parser.add_argument("--assignments", help="blank only these, such as 3 or 1,2; default: all")
    parser.add_argument("--solved", action="store_true", help="blank nothing: the key")
    given = parser.parse_args(argv)
    try:
        wanted = {int(part) for part in given.assignments.split(",")} if given.assignments else None
        plan = read_plan(term=given.term, assignments=wanted)
        make_handout(given.out, plan, given.solved)
    except (HandoutError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{given.out}: {len(plan.functions)} functions, {sum(f.points for f in plan.functions):g} points, "
          f"specification {specification(plan)}")
    if not plan.term:
        print("note: no term, so this is the published specification and a public copy earns every point")
    return 0


if __name__ == "__main__":
    sys.exit(main())
