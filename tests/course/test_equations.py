"""course/equations.md: every equation has its function and its tests, and they say so."""

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "course" / "equations.md").read_text(encoding="utf-8")
ROOMS = ("ops", "runtime", "loading", "formats", "judging", "evaluation", "prepare", "toy", "report", "variants")
FILES = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))]
EXAMPLES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(FILES)
            if ">>> " in path.read_text(encoding="utf-8")]


def rows() -> list[tuple[int, list[tuple[str, Path]], list[tuple[str, Path]]]]:
    """(equation, [(function, file)], [(test, file)]) of each row of the table; an empty number repeats the last."""
    found, number = [], 0
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]
        if len(cells) == 7 and cells[3].startswith("["):
            number = int(cells[1] or number)
            linked = [[(name.rpartition(".")[2], ROOT / file) for name, file in
                       re.findall(r"\[`([\w.]+)`\]\(\.\./([\w/]+\.py)\)", cell)] for cell in cells[3:5]]
            found.append((number, *linked))
    return found


def source(name: str, file: Path) -> str:
    """The lines of a function or class, with the comment on its first line."""
    text = file.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])
    raise AssertionError(f"{file}: no {name}")


def test_every_function_and_test_of_the_map_names_its_equation():
    assert sorted({number for number, *_ in rows()}) == list(range(1, 12)) and len(rows()) >= 16
    for number, functions, tests in rows():
        assert functions and tests, number
        for name, file in functions + tests:
            assert re.search(rf"\bEq\. {number}\b", source(name, file)), f"{name} in {file} does not name Eq. {number}"


def test_every_function_that_names_an_equation_is_in_the_map():
    """Settings and modules may name an equation that they do not compute; functions may not."""
    mapped = {(number, name) for number, functions, _ in rows() for name, _ in functions}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                for number in re.findall(r"\bEq\. (\d+)", ast.get_docstring(node) or ""):
                    assert (int(number), node.name) in mapped, f"{file}: {node.name} cites Eq. {number}"


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_in_docstrings_hold(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed
