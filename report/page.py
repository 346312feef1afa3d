"""A folder of runs -> tables in the terminal, curves as PNG, and one page that loads nothing.

    python -m report runs/toy           training runs and evaluations in it, up to three levels below
    python -m report runs/grpo          one run

The page shows the result and the stages' table, then pairs, then curves. A stage NAME joins FOLDER/NAME (training)
and FOLDER/eval/NAME (evaluation). The slider goes over all evaluations: of the stages, of rounds in training
(`rollouts/`), and those of several votes in FOLDER/curve. Texts come from strangers and from models: the page's script
sets them as text, no other script may run (Content-Security-Policy), and control characters are spelled out.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from string import Template
from typing import Annotated, Any

import tyro

from data import Pair
from evaluation.outcomes import Name
from evaluation.tables import Grid, as_text, curve_grid, drawn
from judging.verdicts import Judgement, better
from report.stages import Stage, find_curves, find_stages, is_number, load_texts
from runtime import disk
from runtime.errors import printable

PANELS = (  # title, unit, {label: metric}
    ("loss", "nats per token", {"training": "train/loss", "held-out": "eval/loss"}),
    ("reward", "mean, from -1 to 1", {"reward": "reward/mean"}),
    ("held-out verdicts", "share", {"accuracy": "eval/accuracy", "consistency": "eval/consistency"}),
    ("response length", "tokens", {"training": "rollout/length_mean", "held-out": "eval/length_mean"}),
    ("KL to the checkpoint where this stage began", "nats per token", {"KL": "policy/ref_kl"}),
    ("entropy", "nats per token", {"entropy": "policy/entropy"}),
    ("clipped", "share of tokens", {"clipped": "policy/clip_fraction"}),
    ("no verdict", "share of rollouts", {"no verdict": "rollout/frac_no_verdict"}),
)
PAIRS, TRACES = 250, 3e6  # on the page at most: held-out pairs, and bytes of their traces
GREY = "#808080"  # legible on white and on black
AXES = (0.2, 0.2, 0.76, 0.67)  # of a panel: left, bottom, width, height as shares of the picture
Panel = tuple[str, str, bytes, tuple[float, float] | None]  # title, remark, PNG, first and last x
Point = tuple[float, float]


@dataclass(frozen=True)
class Config:
    # a run, an evaluation, or a folder of them; it gets report.html, and the curves in `plots`
    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]


# ---- tables --------------------------------------------------------------------------------------------


def stage_table(stages: Sequence[Stage]) -> Grid:
    kinds = sorted({kind for s in stages for kind in s.summary.get("by_category", {}) if kind})
    voted = any("vote_accuracy" in s.summary.get("overall", {}) for s in stages)
    table = [["stage", "accuracy", *(["majority"] if voted else []), *kinds, "consistency", "verdict rate",
              "tokens", "pairs", "minutes of training"]]
    for s in stages:
        overall, groups = s.summary.get("overall", {}), s.summary.get("by_category", {})
        seconds = [m["time/step"] for m in s.metrics if is_number(m.get("time/step"))]
        table.append([
            s.name, accuracy(s), *([cell(overall.get("vote_accuracy"))] if voted else []),
            *(cell(groups.get(kind, {}).get("accuracy")) for kind in kinds), cell(overall.get("consistency")),
            cell(overall.get("verdict_rate")), cell(overall.get("length_mean"), 1), cell(len(s.verdicts) or None),
            cell(sum(seconds) / 60 if seconds else None, 1)])
    return table


def accuracy(stage: Stage) -> str:
    overall = stage.summary.get("overall", {})
    return cell(overall.get("accuracy")) + (f" ± {cell(overall['accuracy_se'])}" if "accuracy_se" in overall else "")


def cell(value: Any, digits: int = 3) -> str:
    if not is_number(value):
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"


def natural(key: Name) -> tuple[str, list[str | int]]:
    """Sort key that puts pair-9 before pair-10."""
    return key[0], [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", key[1]))]


def question(pair: Pair) -> str:
    turns = pair.messages or pair.context
    return turns[0]["content"] if len(turns) == 1 else "\n\n".join(f"{m['role']}: {m['content']}" for m in turns)


# ---- curves --------------------------------------------------------------------------------------------


def draw_curves(metrics: Sequence[dict[str, Any]]) -> Iterator[Panel]:
    """Every panel that has a metric in this run, with its last values."""
    for title, unit, names in PANELS:
        found = {label: [(m["step"], m[name]) for m in metrics if is_number(m.get(name)) and is_number(m.get("step"))]
                 for label, name in names.items()}
        curves = {label: points for label, points in found.items() if points}
        if curves:
            values = [y for points in curves.values() for y in heights(points)]
            if not any(values):
                yield title, f"{unit}: 0 at each of {len(values)} steps", b"", None
                continue
            last, mean = (", ".join(f"{label} {ends(points)[-1]:.4g}" for label, points in curves.items())
                          for ends in (heights, smooth))
            width = 2 * max(half_window(points) for points in curves.values()) + 1
            smoothed = f", smoothed: {mean}; pale: each step, strong: mean over {width} steps" if width > 1 else ""
            log = title == "loss" and max(values) > 10 * min(values) > 0
            yield title, f"last: {last}{smoothed}", plot(curves, unit, log=log), edges(curves)


def draw_evaluations(curves: Mapping[str, dict[str, Any]]) -> Iterator[Panel]:
    """Each evaluation over votes or budgets; the bars are one standard error."""
    for name, curve in curves.items():
        points = [(x, y) for x, y, _ in drawn(curve)]
        image = plot({"": points}, "accuracy", curve["xlabel"], [error for *_, error in drawn(curve)])
        shown = "; even numbers before the last are not drawn: they can tie" if "drawn" in curve else ""
        yield f"{name}: {curve['title']}", f"{curve['remark']}; {curve['note']}{shown}", image, None


def edges(curves: Mapping[str, Sequence[Point]]) -> tuple[float, float]:
    """x at the left and the right end of a panel's axis: the page's script finds a step's place by them."""
    xs = [x for points in curves.values() for x, _ in points]
    margin = (max(xs) - min(xs)) * 0.03 or 0.5
    return min(xs) - margin, max(xs) + margin


def half_window(points: Sequence[Point]) -> int:
    """Neighbours on each side that smoothing takes; 0 for a curve of few points."""
    return min(10, len(points) // 30)


def heights(points: Sequence[Point]) -> list[float]:
    return [y for _, y in points]


def smooth(points: Sequence[Point]) -> list[float]:
    """The mean of every value and its neighbours.

    >>> smooth([(i, i % 2) for i in range(30)])[:3]
    [0.5, 0.3333333333333333, 0.6666666666666666]
    """
    k, values = half_window(points), heights(points)
    windows = [values[max(0, i - k) : i + k + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def plot(curves: Mapping[str, Sequence[Point]], ylabel: str = "", xlabel: str = "step",
         errors: Sequence[float] = (), log: bool = False) -> bytes:
    """One panel on a transparent ground. It is shown at half its size, where 8.5 points are 12 pixels."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(3.5, 2.4), dpi=200)
    axes = figure.add_axes(AXES)
    for (label, points), colour in zip(curves.items(), ("#3987e5", "#e8743b"), strict=False):
        x = [x for x, _ in points]
        if half_window(points):
            axes.plot(x, heights(points), color=colour, alpha=0.35, linewidth=0.7)
        axes.errorbar(x, smooth(points), list(errors) or None, color=colour, marker="o" if len(points) < 30 else None,
                      markersize=3, linewidth=1.3, capsize=2, label=label)
    axes.tick_params(colors=GREY, labelsize=8.5)
    if errors:  # budgets double
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [f"{tick:g}" for tick in x])
        axes.minorticks_off()
    else:
        axes.set_xlim(*edges(curves))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_yscale("log" if log else "linear")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
    axes.set_xlabel(xlabel, color=GREY, fontsize=8.5)
    axes.set_ylabel(ylabel, color=GREY, fontsize=8.5)
    for side, spine in axes.spines.items():
        spine.set(color=GREY, visible=side in ("left", "bottom"))
    if len(curves) > 1:
        axes.legend(fontsize=8.5, frameon=False, labelcolor=GREY, ncols=2, loc="lower left", bbox_to_anchor=(0, 0.98))
    buffer = BytesIO()
    figure.savefig(buffer, format="png", transparent=True, metadata={"Software": None})
    return buffer.getvalue()


# ---- the page ------------------------------------------------------------------------------------------


def browser_data(stages: Sequence[Stage], texts: dict[Name, Pair]) -> dict[str, Any]:
    """What the page's script shows. Only values come from outside, never a key, so nothing can pollute it."""
    judged = [s for s in stages if s.verdicts]
    listed = [i for i, s in enumerate(judged) if s.listed]
    last = [-1, -1, *listed][-2:]
    ends = {s.run: s.metrics[-1]["step"] for s in stages if s.metrics and is_number(s.metrics[-1].get("step"))}
    keys = sorted({key for s in judged for key in s.verdicts}, key=natural)
    verdicts = {key: [s.verdicts.get(key, {}) for s in judged] for key in keys}
    right = {key: [bool(v) and all(j.correct for j in v.values()) for v in verdicts[key]] for key in keys}
    keys.sort(key=lambda key: right[key][last[0]] == right[key][last[1]])  # what the last stage changed comes first
    rows: list[dict[str, Any]] = []
    size = 0
    for key in keys[:PAIRS]:
        row = browser_row(key, verdicts[key], texts.get(key)) | {"votes": [s.votes.get(key) for s in judged]}
        size += len(json.dumps(row))
        if size > TRACES:
            break
        rows.append(row)
    places = [[printable(s.run), ends.get(s.run) if s.step is None else s.step] for s in judged]
    return {"stages": [printable(s.name) for s in judged], "places": places, "pairs": rows, "total": len(keys),
            "accuracy": [accuracy(s) for s in judged], "listed": listed,
            "missing": sorted({printable(s.data) for s in judged if s.verdicts.keys() - texts.keys()}),
            "axes": [AXES[0], AXES[2]]}


def browser_row(key: Name, verdicts: Sequence[dict[str, Judgement]], pair: Pair | None) -> dict[str, Any]:
    one = next(j for v in verdicts for j in v.values())
    asked = [clip(text) for text in (question(pair), pair.response_a, pair.response_b)] if pair else None
    traces = [
        [{"order": j.order, "verdict": j.verdict, "right": j.correct, "cut": j.finish_reason == "length",
          "text": clip(j.text)} for _, j in sorted(v.items())] for v in verdicts
    ]
    return {"id": clip(key[1]), "kind": clip(one.category), "better": better(one), "asked": asked, "traces": traces}


def clip(text: str, limit: int = 12_000) -> str:
    more = f"\n[{len(text) - limit:,} characters more]" if len(text) > limit else ""
    return printable(text[:limit]) + more


def runs(stages: Sequence[Stage]) -> list[list[str]]:
    """Of each training run name, model, steps, pairs per step, data and command; of a folder without one, what was
    judged."""
    return [[printable(str(value)) for value in (
        s.name, s.config.get("model"), sum("time/step" in m for m in s.metrics),
        s.config.get("batch_size", s.config.get("prompts_per_step", "?")), s.config.get("data"),
        s.config.get("command", ""))] for s in [s for s in stages if s.metrics] or stages]


def page(title: str, data: Any) -> str:
    policy = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    content = json.dumps(data).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return TEMPLATE.substitute(title=escape(printable(title)), policy=policy, style=STYLE, data=content, script=SCRIPT,
                               hidden="" if data["pairs"] else " hidden")


HERE = Path(__file__).parent
STYLE, SCRIPT = (HERE / "report.css").read_text("utf-8"), (HERE / "report.js").read_text("utf-8")
TEMPLATE = Template((HERE / "report.template.html").read_text("utf-8"))  # what is put in is not looked through again


def report(cfg: Config) -> Path:
    """Print the tables, write the curves and the page; returns the page's path."""
    folder = Path(cfg.folder)
    out = folder / "report.html"
    stages = find_stages(folder)
    texts = load_texts(stages, folder)
    evaluated = find_curves(folder)
    listed = [s for s in stages if s.listed]
    print(as_text("", stage_table(listed)))
    curves = {f"Training: {s.name}": list(draw_curves(s.metrics)) for s in stages if s.metrics}
    curves |= {"Votes and budgets": list(draw_evaluations(evaluated))} if evaluated else {}
    for name, panels in curves.items():
        for title, _, png, _ in panels:
            slug = re.sub(r"[^A-Za-z0-9]+", "-", f"{name.removeprefix('Training: ')} {title}").strip("-").lower()
            if png:
                disk.write_whole(folder / "plots" / f"{slug}.png", png)
    tables = {"": stage_table(listed), **{name: curve_grid(curve) for name, curve in evaluated.items()}}
    data = browser_data(stages, texts) | {
        "runs": runs(listed), "tables": [
            [printable(name), [list(map(printable, row)) for row in table]] for name, table in tables.items()],
        "curves": [[printable(name), [[printable(title), printable(remark), base64.b64encode(png).decode(), ends]
                                       for title, remark, png, ends in panels]] for name, panels in curves.items()]}
    disk.write_whole(out, page(f"Report: {folder.resolve().name}", data))
    print(out)
    return out
