"""The paper's numbered equations -> the function that computes each -> the tests that check it.

    python -m course.equations            writes course/equations.md

A function that computes an equation says `Eq. n` in its docstring or in a comment; a test says so on the line of its
name or in its docstring. The table is made from these words alone, and `problems` names what does not fit: a number
that the paper does not have, an equation that nothing computes, a function without a test, a test that never names
the function.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("ops", "runtime", "loading", "formats", "judging", "evaluation", "prepare", "toy", "report", "variants")

# Numbers as in arXiv 2505.02387v4.
PAPER = {
    1: ("D = {(x, y_a, y_b, l)}", "`context` is x, all its turns; `winner` is l"),
    2: ("r_θ(j | x, y_a, y_b) = Π_t r_θ(j_t | x, y_a, y_b, j_<t)", "log of each factor, at the sampler's temperature"),
    3: ("max E[1(l̂ = l)]", "measured, not trained on: accuracy over held-out pairs; no verdict counts as wrong"),
    4: ("y_trace = r ⊕ l", "a stored trace ends in its verdict; the end-of-turn token follows it"),
    5: ("D_distill = {(x, y_trace)}", "too long ones are left out and counted"),
    6: ("L = -Σ_D Σ_t log r_θ(y_t | x, y_<t)", "divided by the number of trace tokens in the batch, over all ranks"),
    7: ("max E[R(x, j)] - β KL(r_θ ‖ r_ref)", "one round of it, by way of Eq. 9; r_ref is the start checkpoint"),
    8: ("R = 1 if l̂ = l, else -1", "l̂ is read in the last 80 characters, as the authors' code does"),
    9: (
        "J = E 1/G Σ_i 1/|j_i| Σ_t min(ρ A, clip(ρ, 1-ε, 1+ε) A) - β KL",
        "a loss, so the sign is turned; two bounds for ε; KL per token by the k3 estimate; a mean over the mini-batch",
    ),
    10: ("A_i = (r_i - mean(r)) / std(r)", "unbiased std, plus 1e-6, so that equal rewards give 0"),
    11: ("R_format, R_answer: 1 or 0 each", "their sum; every part the prompt asks for makes the format"),
}
CITED = re.compile(r"\bEq\. (\d+)")
OTHERWISE = re.compile(r"\b(?!(?-i:Eq\. \d))eq(?:s|uations?)?\b\.?\s*\(?\d", re.IGNORECASE)
Place = tuple[str, str]  # file relative to the root, dotted name of a function or class
Node = ast.FunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Definition:
    """One function or class of a file, with the numbers it cites."""

    place: Place
    node: Node
    numbers: tuple[int, ...]


def definitions(path: Path) -> Iterator[Definition]:
    """Functions by all of their lines but those of functions inside them, classes by their docstring alone:
    the help of a setting may name an equation that the setting does not compute."""
    lines = path.read_text(encoding="utf-8").splitlines()
    file = str(path.relative_to(ROOT))

    def walk(node: ast.AST, prefix: str) -> Iterator[Definition]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = list(walk(child, f"{prefix}{child.name}."))
                if isinstance(child, ast.ClassDef):
                    text = ast.get_docstring(child) or ""
                else:
                    taken = {n for d in inner for n in range(d.node.lineno, (d.node.end_lineno or 0) + 1)}
                    own = range(child.lineno, (child.end_lineno or 0) + 1)
                    text = "\n".join(lines[n - 1] for n in own if n not in taken)
                numbers = tuple(sorted({int(n) for n in CITED.findall(text)}))
                yield Definition((file, prefix + child.name), child, numbers)
                yield from inner

    yield from walk(ast.parse("\n".join(lines)), "")


def named_in(test: Node, others: dict[str, Node]) -> set[str]:
    """Names that a test uses, by itself or through helpers of its own file."""
    found: set[str] = set()
    waiting, seen = [test], {test.name}
    while waiting:
        for node in ast.walk(waiting.pop()):
            name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
            found.add(name)
            if name in others and name not in seen:
                seen.add(name)
                waiting.append(others[name])
    return found


def code_files() -> list[Path]:
    return [*sorted(ROOT.glob("*.py")), *(path for room in ROOMS for path in sorted(ROOT.glob(f"{room}/*.py")))]


def read_code() -> dict[int, list[Place]]:
    """{number: what computes it}, the files a student reads first."""
    found: dict[int, list[Place]] = {number: [] for number in PAPER}
    for path in code_files():
        for one in definitions(path):
            for number in one.numbers:
                found.setdefault(number, []).append(one.place)
    return found


def test_files() -> list[Path]:
    """All but the map's own tests, which cite equations to be found wrong."""
    return [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if path.name != "test_equations.py"]


def read_tests() -> dict[tuple[int, Place], set[str]]:
    """{(number, test): names it uses} of every test that cites an equation."""
    found: dict[tuple[int, Place], set[str]] = {}
    for path in test_files():
        every = list(definitions(path))
        helpers: dict[str, Node] = {d.place[1]: d.node for d in every}
        for one in every:
            if one.place[1].startswith("test_"):
                found |= {(number, one.place): named_in(one.node, helpers) for number in one.numbers}
    return found


def vouch(number: int, place: Place, tests: dict[tuple[int, Place], set[str]]) -> list[Place]:
    """Tests that cite the equation and name the function; for a method its class, for a call goes by that."""
    name = place[1].split(".")[0]
    return [test for (cited, test), names in tests.items() if cited == number and name in names]


def problems() -> list[str]:
    """What does not fit, a sentence each; [] if the map is whole."""
    code, tests = read_code(), read_tests()
    found = [f"{file}: {name} cites Eq. {n}, which the paper does not have"
             for n in code if n not in PAPER for file, name in code[n]]
    found += [f"nothing in the code cites Eq. {n}" for n in PAPER if not code[n]]
    for n in PAPER:
        found += [f"{file}: {name} cites Eq. {n}, and no test of it does" for file, name in code[n]
                  if not vouch(n, (file, name), tests)]
    vouched = {(n, test) for n in code for place in code[n] for test in vouch(n, place, tests)}
    found += [f"{file}: {name} cites Eq. {n}, and names nothing that computes it"
              for n, (file, name) in tests if (n, (file, name)) not in vouched]
    for path in [*code_files(), *test_files()]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if match := OTHERWISE.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: write `Eq. n`, not {match[0]!r}")
    return found


def table() -> str:
    """course/equations.md: a row for each function."""
    code, tests = read_code(), read_tests()
    rows = [
        "| Eq. | the paper | computed by | held by | how it is read here |",
        "|" + "---|" * 5,
    ]
    for n, (formula, remark) in PAPER.items():
        first, last = (str(n), f"`{formula}`".replace("|", "\\|")), remark
        for file, name in code[n]:
            held = ", ".join(f"[`{test}`](../{path})" for path, test in vouch(n, (file, name), tests))
            where = f"[`{file.removesuffix('.py').replace('/', '.')}.{name}`](../{file})"
            rows.append(f"| {first[0]} | {first[1]} | {where} | {held} | {last} |")
            first, last = ("", ""), ""
    return f"""# Equations

All numbered equations of [arXiv 2505.02387](https://arxiv.org/abs/2505.02387) (version 4), what computes each, and
the tests that hold it. Made by `python -m course.equations` from the words `Eq. n` in the code and in the tests.

{chr(10).join(rows)}

x: the prompt; y_a, y_b: the responses; l: the label; j: the judgement, which holds the verdict l̂; r_θ: the policy;
ρ: its probability of a token over that of the policy that sampled it; A: the advantage; j_i: one of a group of G
judgements, r_i its reward; r ⊕ l: an oracle's reasoning and then the label. Formulas are shortened.
"""


if __name__ == "__main__":
    if found := problems():
        sys.exit("\n".join(found))
    (ROOT / "course" / "equations.md").write_text(table(), encoding="utf-8")
