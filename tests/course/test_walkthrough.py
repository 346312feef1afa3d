"""course/walkthrough.ipynb: its source runs in the time promised, and the committed outputs are of this code."""

import doctest
import json
import re
import sys
import time

import pytest
import torch

from course import notebook

SECONDS = 120
NUMBER = re.compile(r"-?\d+\.\d*")  # whole numbers are counts and ids: they must be equal


@pytest.fixture(scope="module")
def cells():
    return notebook.read_cells(notebook.SOURCE.read_text(encoding="utf-8"))


@pytest.fixture
def committed():
    return json.loads(notebook.NOTEBOOK.read_text(encoding="utf-8"))


def same_output(a: str, b: str) -> bool:
    """Equal but for rounding: a number with a decimal point may differ by 2 %, or by 2 in its last digit."""
    words = [re.sub(r"\s+", "", NUMBER.sub("0", text)) for text in (a, b)]
    return words[0] == words[1] and all(map(near, NUMBER.findall(a), NUMBER.findall(b)))


def near(a: str, b: str) -> bool:
    digits = len(a.partition(".")[2])
    return abs(float(a) - float(b)) <= max(2.01 * 10.0**-digits, 0.02 * abs(float(a)))


def text_of(cell):
    return "".join("".join(output.get("text", "")) for output in cell.get("outputs", []))


@pytest.mark.numeric
def test_it_runs_and_prints_what_the_committed_notebook_shows(cells, committed, monkeypatch):
    began = time.process_time()
    monkeypatch.setattr(sys, "path", sys.path[:])
    try:
        printed = notebook.run_cells(cells)
    finally:
        torch.set_printoptions(profile="default")
    assert time.process_time() - began < SECONDS
    made = json.loads(notebook.as_notebook(cells, printed))
    for number, (new, old) in enumerate(zip(made["cells"], committed["cells"], strict=True)):
        shown, kept = text_of(new), text_of(old)
        assert same_output(shown, kept), f"cell {number} prints\n{shown}\nand the notebook shows\n{kept}"
        for cell in (new, old):
            for output in cell.get("outputs", []):
                output.pop("text", None)
                output.get("data", {}).pop("image/png", None)
    assert made == committed, "run python -m course.notebook"


def test_every_cell_that_prints_is_explained_and_tensors_come_with_shapes(cells, committed):
    kinds = [cell.kind for cell in cells]
    assert kinds == ["markdown", *["markdown", "code"] * (len(kinds) // 2 - 1), "markdown"]
    shown = "".join(map(text_of, committed["cells"]))
    for line in (r"rewards \(4, 4\)", r"advantages \(4, 4\)", r"inputs +\(4, \d+\)", r"visible \(10, 10\)",
                 r"logprobs \(\d+,\)", r"targets +\(\d+,\)"):
        assert re.search(f"^{line}", shown, re.MULTILINE), line
    text = "\n".join(cell.text for cell in cells)
    for step in ("load_pairs", "render", "encode_prompt", "collate", "generate", "verdict_score", "group_advantages",
                 "grpo_loss", "grpo.update"):
        assert f"{step}(" in text, step
    pictures = [output for cell in committed["cells"] for output in cell.get("outputs", []) if "data" in output]
    assert len(pictures) == 3 and all(len(one["data"]["image/png"]) < 60_000 for one in pictures)


def test_the_round_has_something_to_learn_from(committed):
    """Right and wrong in one group, an equal group too: else the prose would speak of what is not there."""
    shown = [text_of(cell) for cell in committed["cells"]]
    (rewards,) = [text for text in shown if "rewards (4, 4)" in text]
    rows = [[float(x) for x in re.findall(r"-?1\.", row)] for row in rewards.partition("tensor")[2].splitlines()]
    assert sorted(sum(row) for row in rows) == [-4.0, 0.0, 2.0, 2.0] and sum(rows[0]) == -4.0


def test_the_file_is_a_notebook(committed):
    """What nbformat 4.5 asks for, without nbformat."""
    assert (committed["nbformat"], committed["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in committed["cells"]]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in names)
    for cell in committed["cells"]:
        extra = {"outputs", "execution_count"} if cell["cell_type"] == "code" else set()
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | extra


def test_outputs_are_equal_but_for_rounding():
    assert doctest.testmod(notebook).failed == 0
    assert same_output("loss 1.234 of 5", "loss 1.235 of 5") and not same_output("loss 1.2 of 5", "loss 1.2 of 6")
    assert same_output("tensor([ 0.500, -1.250])", "tensor([0.501,\n -1.251])")
    for other in ("tensor([0.500, 1.250])", "tensor([0.513, -1.250])", "tensor([0.500])", "tensors([0.500, -1.250])"):
        assert not same_output("tensor([0.500, -1.250])", other), other
