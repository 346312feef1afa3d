"""Scores -> tables for the terminal and Markdown, the published rows beside them, and plots.

Numbers come in as `eval.py score` writes them with --json: shares between 0 and 1, None where nothing was
judged. RewardBench and RM-Bench are shown in percent, RMB and other pairs as shares, as the paper does.
`published.json` holds the paper's rows in these units. Matplotlib is imported where something is drawn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from evaluation.benchmarks import DOMAINS, KINDS, LEVELS, SECTION_OF, STYLES
from evaluation.rewardbench2 import SUBSETS
from evaluation.silent import reasons
from runtime.disk import write_whole
from runtime.errors import printable

Grid = list[list[str]]  # the first row is the header
Result = Mapping[str, Any]

PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parent / "published.json").read_text("utf-8"))
PERCENT = ("rewardbench", "rm-bench", "rewardbench-2", "judgebench")
HEADLINE = {  # column -> where its number stands in the benchmark's table; the columns of published.json
    "rewardbench": {
        **{section: ("sections", section) for section in dict.fromkeys(SECTION_OF.values())},
        "average": ("overall", "average"),
        "plain accuracy": ("overall", "accuracy"),
    },
    "rm-bench": {
        **{domain.capitalize(): ("domains", domain) for domain in DOMAINS},
        **{level.capitalize(): ("levels", level) for level in LEVELS},
        "average": ("overall", "average"),
    },
    "rmb": {
        "Helpful BoN": ("parts", "BoN Helpfulness"),
        "Helpful pairs": ("parts", "Pairwise Helpfulness"),
        "Harmless BoN": ("parts", "BoN Harmlessness"),
        "Harmless pairs": ("parts", "Pairwise Harmlessness"),
        "average": ("overall", "average"),
    },
    "rewardbench-2": {**{subset: ("subsets", subset) for subset in SUBSETS}, "average": ("overall", "average")},
    "judgebench": {**{section: ("sections", section) for section in KINDS["judgebench"][1].values()},
                   "accuracy": ("overall", "accuracy")},
    "pairs": {"accuracy": ("overall", "accuracy")},
}


def number(benchmark: str, value: Any) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if benchmark in PERCENT else f"{value:.3f}"


def span(benchmark: str, interval: Any) -> str:
    return "-" if interval is None else "-".join(number(benchmark, end) for end in interval)


# ---- grids ---------------------------------------------------------------------------------------------


def all_grids(result: Result) -> list[tuple[str, Grid]]:
    """(title, grid) of everything that is printed for one benchmark."""
    name = result["benchmark"]
    details = {"rm-bench": _styles_and_domains, "rmb": _categories}.get(name, _subsets)
    return [(name, headline(result)), *details(result)]


def headline(result: Result) -> Grid:
    """One row for the log and one for its intervals, under both rules where they differ; published rows below."""
    name = result["benchmark"]
    columns = HEADLINE[name]
    grid = [["", *columns]]
    for one in filter(None, (result, result["other_rules"])):
        rules = f", {one['rules']} rules" if result["other_rules"] else ""
        grid.append([result["name"] + rules, *(number(name, one["table"][b][c]) for b, c in columns.values())])
        grid.append(["  95 % interval", *(span(name, one["intervals"][b][c]) for b, c in columns.values())])
    published = PUBLISHED.get(name, {"rows": {}})["rows"]
    return grid + [[model, *(printed(name, value) for value in values)] for model, values in published.items()]


def printed(name: str, value: float | None) -> str:
    """A published number with the digits it was printed with, never rounded again."""
    if value is None:
        return "-"
    text = f"{value:.3f}" if name == "rmb" else f"{value:.1f}"
    return text if float(text) == value else f"{value:g}"


def _subsets(result: Result) -> list[tuple[str, Grid]]:
    """A line per subset or category."""
    name = result["benchmark"]
    block = "subsets" if name.startswith("rewardbench") else "categories"
    grid = [[block, "accuracy", "95 % interval", "right", "rows"]]
    for group, share in result["table"][block].items():
        counts = result["counts"].get(f"{name}/{group}" if name == "rewardbench-2" else group, {})
        right, total = counts.get("", ("-", max((total for _, total in counts.values()), default=0)))
        section = f" ({SECTION_OF[group]})" if name == "rewardbench" else ""
        grid.append([(group or "-") + section, number(name, share), span(name, result["intervals"][block][group]),
                     right if right == "-" else f"{right:g}", f"{total:g}"])
    return [(block, grid)]


def _styles_and_domains(result: Result) -> list[tuple[str, Grid]]:
    """The matrix of styles and a line per domain."""
    table, spans = result["table"], result["intervals"]
    domains = [["domain", *LEVELS, "score", "95 % interval", "prompts"]]
    for domain in DOMAINS:
        cells = [number("rm-bench", table["domain levels"][f"{domain} {level}"]) for level in LEVELS]
        prompts = sum(max(total for _, total in slots.values())
                      for group, slots in result["counts"].items() if group.startswith(domain))
        domains.append([domain, *cells, number("rm-bench", table["domains"][domain]),
                        span("rm-bench", spans["domains"][domain]), f"{prompts:g}"])
    cells = [number("rm-bench", value) for value in table["matrix"].values()]
    styles = [["chosen \\ rejected", *STYLES], *([s, *cells[3 * i : 3 * i + 3]] for i, s in enumerate(STYLES))]
    return [("styles, mean over domains", styles), ("domains", domains)]


def _categories(result: Result) -> list[tuple[str, Grid]]:
    """A line per category with its pairs and its best-of-n items."""
    table, counts = result["table"]["categories"], result["counts"]
    names = dict.fromkeys(path.partition("/")[2] for path in sorted(table, key=lambda p: p.partition("/")[2]))
    grid = [["category", "pairs", "n", "best of n", "n"]]
    for name in names:
        cells = []
        for path in (f"Pairwise_set/{name}", f"BoN_set/{name}"):
            cells += [number("rmb", table.get(path)), f"{counts[path][''][1]:g}" if path in counts else "0"]
        grid.append([name, *cells])
    return [("categories", grid)]


# ---- text ----------------------------------------------------------------------------------------------


def as_text(title: str, grid: Grid) -> str:
    """Columns aligned, the first one to the left; nothing in a cell can steer the terminal."""
    rows = [[printable(cell[:60]).replace("\n", " ") for cell in row] for row in grid]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join([*([title, "-" * len(title)] if title else []), *lines, ""])


def as_markdown(title: str, grid: Grid) -> str:
    """For the project's own words: nothing is escaped."""
    first, *lines = (f"| {' | '.join(row)} |" for row in grid)
    return "\n".join([f"### {title}", "", first, "|---|" + "---:|" * (len(grid[0]) - 1), *lines, ""])


# ---- an evaluation at its end --------------------------------------------------------------------------

COLUMNS = {
    "accuracy": "accuracy",
    "accuracy_se": "±",
    "vote_accuracy": "majority",
    "consistency": "consistency",
    "verdict_rate": "verdict rate",
    "share_a": "says A",
    "length_mean": "tokens",
    "count": "n",
}


def print_summary(summary: Mapping[str, Any]) -> None:
    """What eval.py run says at its end: a row for everything and one per category; a curve and whether it is one."""
    if "overall" in summary:
        kinds = summary["by_category"]  # one alone would repeat the first row
        categories = {name or "-": row for name, row in kinds.items() if len(kinds) > 1}
        print(as_text("", measures("", {"all": summary["overall"], **categories})))
        if summary.get("silent"):
            print(f"no verdict, counted as wrong: {reasons(summary['silent'])}")
        if "consistency" in summary["overall"]:
            print("accuracy: both orders averaged; consistency: share of pairs whose orders name the same response")
    if "curve" in summary:
        curve = summary["curve"]
        print(as_text(f"{curve['title']} ({curve['note']}; pairs: {curve['pairs']})", curve_grid(curve)))
        print(curve["remark"])


def curve_grid(curve: Mapping[str, Any]) -> Grid:
    return measures(curve["xlabel"], {str(point["x"]): point for point in curve["points"]})


def measures(first: str, rows: Mapping[str, Mapping[str, Any]]) -> Grid:
    """The measures that the rows have, by their names in COLUMNS."""
    shown = {name: label for name, label in COLUMNS.items() if any(name in row for row in rows.values())}
    return [[first, *shown.values()], *([name, *(cell(row.get(c)) for c in shown)] for name, row in rows.items())]


def cell(value: float | None) -> str:
    if value is None or isinstance(value, int):
        return "-" if value is None else str(value)
    return f"{value:.1f}" if value > 1 else f"{value:.3f}"


# ---- plots ---------------------------------------------------------------------------------------------


def plot_result(folder: Path, result: Result) -> None:
    """sections.png: a group of bars per column, a bar per row, and the published RM-R1 rows."""
    from matplotlib.figure import Figure

    name = result["benchmark"]
    scale = 100 if name in PERCENT else 1
    columns = {c: where for c, where in HEADLINE[name].items() if c != "plain accuracy"}
    if name == "pairs":
        columns = {kind or "-": ("categories", kind) for kind in result["table"]["categories"]}
    bars: dict[str, list[float | None]] = {}
    for one in filter(None, (result, result["other_rules"])):  # the published rows are the authors' scorer's
        own = [one["table"][b][c] for b, c in columns.values()]
        label = result["name"] + (f", {one['rules']} rules" if result["other_rules"] else "")
        bars[label] = [None if v is None else scale * v for v in own]
    for model, values in PUBLISHED.get(name, {"rows": {}})["rows"].items():
        if None not in values[: len(columns)] and not model.endswith("logs"):
            bars[model] = values[: len(columns)]
    size = max(6.0, 1.0 + 0.22 * len(columns) * (len(bars) + 1)), 3.6
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    width = 0.8 / len(bars)
    for k, (model, heights) in enumerate(bars.items()):
        at = [i - 0.4 + (k + 0.5) * width for i in range(len(columns))]
        axes.bar(at, [v or 0.0 for v in heights], width, label=printable(model), color=f"C{k % 10}")
    for i, (block, column) in enumerate(columns.values()):  # the log's own bars are the first ones
        if (ends := result["intervals"][block][column]) is not None:
            value, low, high = (scale * v for v in (result["table"][block][column], *ends))
            axes.errorbar(i - 0.4 + 0.5 * width, value, [[max(0.0, value - low)], [max(0.0, high - value)]],
                          color="black", capsize=2, linewidth=1)
    axes.set_xticks(range(len(columns)), list(map(printable, columns)), rotation=20, ha="right")
    axes.set_ylim(0.0, scale)
    axes.set_ylabel("percent right" if scale > 1 else "share right")
    axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.28), frameon=False)
    content = BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    write_whole(folder / "sections.png", content.getvalue())


def drawn(curve: Mapping[str, Any]) -> list[tuple[float, float, float]]:
    """(x, accuracy, standard error) of the points of a summary's curve that a plot shows."""
    shown = curve.get("drawn")
    return [(p["x"], p["accuracy"], p.get("accuracy_se", 0.0)) for p in curve["points"]
            if shown is None or p["x"] in shown]
