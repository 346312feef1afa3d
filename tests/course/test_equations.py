"""course/equations.py: the map from the paper's equations to functions and tests is whole and up to date."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

from course import equations

ROOT = Path(__file__).parents[2]
FILES = [*ROOT.glob("*.py"), *(path for room in equations.ROOMS for path in (ROOT / room).glob("*.py"))]
EXAMPLES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(FILES)
            if ">>> " in path.read_text(encoding="utf-8")]


def test_the_committed_map_is_up_to_date():
    written = (ROOT / "course" / "equations.md").read_text(encoding="utf-8")
    assert written == equations.table(), "run python -m course.equations"


def test_every_citation_fits():
    assert equations.problems() == []


def test_the_papers_eleven_equations_and_what_computes_them():
    """Read off the paper once: a renumbering here and in the code at the same time would pass every other test."""
    where = {n: {name for _, name in places} for n, places in equations.read_code().items()}
    assert where == {
        1: {"Pair"}, 2: {"Policy.forward"}, 3: {"tally"}, 4: {"encode_target"}, 5: {"encode_pairs"}, 6: {"nll_loss"},
        7: {"update"}, 8: {"verdict_reward", "verdict_score"},
        9: {"clipped_surrogate", "kl_k3", "grpo_loss", "aggregate"}, 10: {"group_advantages"},
        11: {"format_reward", "cold_start_reward"},
    }


def test_every_named_test_exists_under_its_link():
    text = (ROOT / "course" / "equations.md").read_text(encoding="utf-8")
    links = re.findall(r"\[`([\w.]+)`\]\(\.\./([\w/]+\.py)\)", text)
    assert len(links) > 30 and links.count(("test_T2_clip_in_all_four_quadrants", "tests/test_grpo.py")) == 1
    for name, file in links:
        last = name.rpartition(".")[2]
        assert re.search(rf"^ *(def|class) {last}\b", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), name


CODE = '''
class Kept:
    """Eq. 1"""

    help: int
    """Eq. 9 is named by a setting, which computes nothing."""

def outer():
    """Eq. 2"""
    def inner():
        return 1
'''
WRONG = CODE.replace("return 1", "return 1  # Eq. 3")
TESTS = '''
def made():
    return Kept()

def test_a():  # Eq. 1
    made()

def test_b():
    """Eq. 2"""
    outer()
'''


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A project of two equations; returns a function that writes a file of it."""
    monkeypatch.setattr(equations, "ROOT", tmp_path)
    monkeypatch.setattr(equations, "PAPER", {1: ("a", ""), 2: ("b", "")})
    (tmp_path / "tests").mkdir()

    def write(code=CODE, tests=TESTS):
        (tmp_path / "one.py").write_text(code)
        (tmp_path / "tests" / "test_one.py").write_text(tests)
        return equations.problems()

    return write


def test_what_is_cited_and_where(elsewhere):
    elsewhere(WRONG)
    assert equations.read_code() == {1: [("one.py", "Kept")], 2: [("one.py", "outer")], 3: [("one.py", "outer.inner")]}
    cited = equations.read_tests()
    assert set(cited) == {(1, ("tests/test_one.py", "test_a")), (2, ("tests/test_one.py", "test_b"))}
    assert "Kept" in cited[1, ("tests/test_one.py", "test_a")]  # through its helper


def test_each_misfit_is_named(elsewhere):
    assert elsewhere() == []
    assert elsewhere(WRONG) == ["one.py: outer.inner cites Eq. 3, which the paper does not have"]
    assert elsewhere(tests=TESTS.replace("Eq. 1", "")) == ["one.py: Kept cites Eq. 1, and no test of it does"]
    assert elsewhere(tests=TESTS.replace("outer()", "pass")) == [
        "one.py: outer cites Eq. 2, and no test of it does",
        "tests/test_one.py: test_b cites Eq. 2, and names nothing that computes it",
    ]
    assert "nothing in the code cites Eq. 2" in elsewhere(CODE.replace("Eq. 2", ""))
    for loose in ("eq. 2", "Equation 2", "Eqs. 1 and 2", "equation (2)"):
        assert any("write `Eq. n`" in line for line in elsewhere(f"# {loose}\n" + CODE)), loose


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_in_docstrings_hold(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed
