"""walkthrough.py (cells marked `# %%`) -> walkthrough.ipynb with the outputs of a run.

    python -m course.notebook

Jupyter is not needed to write or to check a notebook: a cell is run by `exec`, its output is what it printed and the
figures it left open, and the file is JSON.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

SOURCE = Path(__file__).with_name("walkthrough.py")
NOTEBOOK = SOURCE.with_suffix(".ipynb")


class Cell(NamedTuple):
    kind: Literal["code", "markdown"]
    text: str


def read_cells(source: str) -> list[Cell]:
    """
    >>> read_cells("# %% [markdown]\\n# # Title\\n#\\n# Text.\\n\\n# %%\\nx = 1\\n\\n\\nprint(x)\\n")
    [Cell(kind='markdown', text='# Title\\n\\nText.'), Cell(kind='code', text='x = 1\\n\\n\\nprint(x)')]
    """
    cells = []
    for part in re.split(r"^# %%", source, flags=re.MULTILINE)[1:]:
        head, _, text = part.partition("\n")
        if head.strip() == "[markdown]":
            cells.append(Cell("markdown", re.sub(r"^# ?", "", text.strip(), flags=re.MULTILINE)))
        else:
            cells.append(Cell("code", text.strip()))
    return cells


class Output(NamedTuple):
    text: str
    pictures: list[str]  # PNG, base64


def run_cells(cells: list[Cell]) -> list[Output]:
    """What each code cell prints and draws, in one namespace; an error is raised as the cell raised it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    space: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for number, cell in enumerate(cells):
        out = io.StringIO()
        if cell.kind == "code":
            with contextlib.redirect_stdout(out):
                exec(compile(cell.text, f"{SOURCE.name}, cell {number}", "exec"), space)
        printed.append(Output(out.getvalue(), [as_png(plt.figure(number)) for number in plt.get_fignums()]))
        plt.close("all")
    return printed


def as_png(figure: Any) -> str:
    file = io.BytesIO()
    figure.savefig(file, dpi=80, metadata={"Software": None})
    return base64.b64encode(file.getvalue()).decode()


def as_notebook(cells: list[Cell], printed: list[Output]) -> str:
    """nbformat 4.5."""
    made: list[dict[str, Any]] = []
    for number, (cell, output) in enumerate(zip(cells, printed, strict=True)):
        made.append({"cell_type": cell.kind, "id": f"cell-{number}", "metadata": {},
                     "source": cell.text.splitlines(keepends=True)})
        if cell.kind == "code":
            stream = {"name": "stdout", "output_type": "stream", "text": output.text.splitlines(keepends=True)}
            pictures = [{"output_type": "display_data", "metadata": {}, "data": {"image/png": picture}}
                        for picture in output.pictures]
            made[-1] |= {"execution_count": sum(one["cell_type"] == "code" for one in made),
                         "outputs": [stream] * bool(output.text) + pictures}
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
              "language_info": {"name": "python"}}
    whole = {"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, ensure_ascii=False, indent=1) + "\n"


def main() -> None:
    cells = read_cells(SOURCE.read_text(encoding="utf-8"))
    NOTEBOOK.write_text(as_notebook(cells, run_cells(cells)), encoding="utf-8")


if __name__ == "__main__":
    main()
