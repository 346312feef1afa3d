"""A folder of runs -> tables and one trace in the terminal, curves as PNG, and one self-contained HTML page.

    python -m report runs/demo          training runs, evaluations and probes below it, up to three levels
    python -m report runs/grpo          one run

A stage NAME joins FOLDER/NAME (training), FOLDER/eval/NAME (evaluation) and FOLDER/probe/NAME.json. Curves over
votes and budgets are shown wherever eval.py left one. The page's slider goes over all evaluations: of the stages, of
rounds in training (`rollouts/`), and those of several votes in FOLDER/curve, of which the tables say nothing. Texts
come from strangers and from models: on the page they are escaped or set as text, no script but its own may run
(Content-Security-Policy), nothing is loaded, and control and bidi characters are spelt out here and there.
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
from evaluation.tables import as_text, curve_grid, drawn
from judging.verdicts import Judgement
from report.stages import Key, Stage, find_curves, find_stages, is_number, load_texts
from runtime import disk
from runtime.errors import visible

PANELS = (
    ("loss", "nats per token", ("train/loss", "eval/loss")),
    ("reward", "mean, from -1 to 1", ("reward/mean",)),
    ("held-out verdicts", "share", ("eval/accuracy", "eval/consistency")),
    ("response length", "tokens", ("rollout/length_mean", "eval/length_mean")),
    ("KL to the start checkpoint", "nats per token", ("policy/ref_kl",)),
    ("entropy", "nats per token", ("policy/entropy",)),
    ("clipped", "share of tokens", ("policy/clip_fraction",)),
    ("no verdict", "share of rollouts", ("rollout/frac_no_verdict",)),
)
AXES = (0.14, 0.16, 0.83, 0.8)  # of a panel: left, bottom, width, height as shares of the picture
Panel = tuple[str, str, bytes, tuple[float, float] | None]  # title, remark, PNG, first and last x
Table = list[list[str]]  # the first row is the header


@dataclass(frozen=True)
class Config:
    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """What to report on: a run, an evaluation, or a folder of them."""
    out: str = ""
    """Page to write; empty: FOLDER/report.html. The curves go to the folder `plots` beside it."""
    pairs: int = 200
    """Held-out pairs in the page's browser, first those that the last stage changed (pairs)."""
    megabytes: float = 3.0
    """Size at which the browser takes no further pair (MB of traces)."""


# ---- tables --------------------------------------------------------------------------------------------


def stage_table(stages: Sequence[Stage]) -> Table:
    kinds = sorted({kind for s in stages for kind in s.summary.get("by_category", {}) if kind})
    voted = any("vote_accuracy" in s.summary.get("overall", {}) for s in stages)
    table = [["stage", "accuracy", *(["majority"] if voted else []), *kinds, "consistency", "verdict rate",
              "tokens", "pairs", "minutes of training"]]
    for s in stages:
        overall, groups = s.summary.get("overall", {}), s.summary.get("by_category", {})
        error = f" ± {cell(overall['accuracy_se'])}" if "accuracy_se" in overall else ""
        seconds = [m["time/step"] for m in s.metrics if is_number(m.get("time/step"))]
        table.append([
            s.name, cell(overall.get("accuracy")) + error, *([cell(overall.get("vote_accuracy"))] if voted else []),
            *(cell(groups.get(kind, {}).get("accuracy")) for kind in kinds), cell(overall.get("consistency")),
            cell(overall.get("verdict_rate")), cell(overall.get("length_mean"), 1), cell(len(s.verdicts) or None),
            cell(sum(seconds) / 60 if seconds else None, 1)])
    return table


def probe_table(stages: Sequence[Stage]) -> Table:
    probed = [s for s in stages if s.probe]
    names = list(dict.fromkeys(name for s in probed for name in s.probe))
    rows = [[name.replace("_", " "), *(cell(s.probe.get(name)) for s in probed)] for name in names]
    return [["probe", *(s.name for s in probed)], *rows] if rows else []


def cell(value: Any, digits: int = 3) -> str:
    if isinstance(value, dict):
        return f"{cell(value.get('share'))} (n {cell(value.get('n'))})"
    if not is_number(value):
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"


# ---- the terminal --------------------------------------------------------------------------------------


def print_change(stages: Sequence[Stage], texts: dict[Key, Pair]) -> None:
    """One held-out pair that the last stage judges right and the stage before it judged wrong."""
    judged = [s for s in stages if s.verdicts]
    if len(judged) < 2:
        return
    before, after = judged[-2:]
    key = next((k for k in sorted(after.verdicts, key=natural) if wrong_then_right(before, after, k)), None)
    if not key:
        return
    lines = [f"pair {key[1]}: wrong at {before.name}, right at {after.name}".replace("\n", " ")]
    if pair := texts.get(key):
        lines += indented("question", question(pair)) + indented("response A", pair.response_a)
        lines += indented("response B", pair.response_b)
    for stage in (before, after):
        judgement = stage.verdicts[key]["AB"]
        title = f"{stage.name} says {judgement.verdict or 'nothing'} (better: {judgement.winner})"
        lines += indented(title, judgement.text)
    print("\n".join(map(visible, lines)) + "\n")


def wrong_then_right(before: Stage, after: Stage, key: Key) -> bool:
    """Wrong in the file's order before, right in every order after."""
    old, new = before.verdicts.get(key, {}), after.verdicts[key]
    return "AB" in old and "AB" in new and not old["AB"].correct and all(j.correct for j in new.values())


def natural(key: Key) -> tuple[str, list[str | int]]:
    """Sort key that puts pair-9 before pair-10."""
    return key[0], [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", key[1]))]


def indented(title: str, text: str) -> list[str]:
    return [f"  {title.replace(chr(10), ' ')}:", *(f"    {line}" for line in text.split("\n"))]


def question(pair: Pair) -> str:
    turns = pair.messages or pair.context
    return turns[0]["content"] if len(turns) == 1 else "\n\n".join(f"{m['role']}: {m['content']}" for m in turns)


# ---- curves --------------------------------------------------------------------------------------------


def draw_curves(metrics: Sequence[dict[str, Any]]) -> Iterator[Panel]:
    """Every panel that has a metric in this run, with its last values."""
    for title, unit, names in PANELS:
        curves = {n: [(m["step"], m[n]) for m in metrics if is_number(m.get(n)) and is_number(m.get("step"))]
                  for n in names}
        curves = {name: points for name, points in curves.items() if points}
        if curves:
            last = ", ".join(f"{name} {points[-1][1]:.4g}" for name, points in curves.items())
            yield f"{title} ({unit})", f"last: {last}", plot(curves), edges(curves)


def draw_evaluations(curves: Mapping[str, dict[str, Any]]) -> Iterator[Panel]:
    """Each evaluation over votes or budgets, and whether there is a curve; the bars are one standard error."""
    for name, curve in curves.items():
        points = [(x, y) for x, y, _ in drawn(curve)]
        image = plot({"accuracy": points}, curve["xlabel"], [error for *_, error in drawn(curve)])
        yield f"{name}: {curve['title']} (accuracy)", f"{curve['remark']}; {curve['note']}", image, None


def edges(curves: Mapping[str, list[tuple[float, float]]]) -> tuple[float, float]:
    """x at the left and the right end of a panel's axis: the page's script finds a step's place by them."""
    xs = [x for points in curves.values() for x, _ in points]
    margin = (max(xs) - min(xs)) * 0.03 or 0.5
    return min(xs) - margin, max(xs) + margin


def plot(curves: dict[str, list[tuple[float, float]]], xlabel: str = "step", errors: Sequence[float] = ()) -> bytes:
    """One panel on a transparent ground, in greys that are legible on white and on black."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 2.9), dpi=110)
    axes = figure.add_axes(AXES, xlim=edges(curves))
    for (name, points), colour in zip(curves.items(), ("#3987e5", "#e8743b"), strict=False):
        marker = "o" if len(points) < 40 else None
        x, y = zip(*points, strict=True)
        axes.errorbar(x, y, list(errors) or None, color=colour, marker=marker, markersize=3, linewidth=1.4, capsize=2,
                      label=name)
    axes.tick_params(colors="#808080", labelsize=8)
    axes.grid(color="#808080", alpha=0.25, linewidth=0.6)
    axes.set_xlabel(xlabel, color="#808080", fontsize=8)
    for side, spine in axes.spines.items():
        spine.set(color="#808080", visible=side in ("left", "bottom"))
    if len(curves) > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor="#808080")
    buffer = BytesIO()
    figure.savefig(buffer, format="png", transparent=True, metadata={"Software": None})
    return buffer.getvalue()


# ---- the page ------------------------------------------------------------------------------------------


def browser_data(stages: Sequence[Stage], texts: dict[Key, Pair], cfg: Config) -> dict[str, Any]:
    """What the page's script shows. Only values come from outside, never a key, so nothing can pollute it."""
    judged = [s for s in stages if s.verdicts]
    last = [-1, -1, *(i for i, s in enumerate(judged) if s.listed)][-2:]
    ends = {s.run: s.metrics[-1]["step"] for s in stages if s.metrics and is_number(s.metrics[-1].get("step"))}
    keys = sorted({key for s in judged for key in s.verdicts}, key=natural)
    right = {key: [v["AB"].correct if "AB" in v else None for v in of(judged, key)] for key in keys}
    keys.sort(key=lambda key: right[key][last[0]] == right[key][last[1]])  # what the last stage changed comes first
    rows: list[dict[str, Any]] = []
    size = 0
    for key in keys[: cfg.pairs]:
        votes = [s.votes.get(key) for s in judged]
        row = browser_row(key, of(judged, key), texts.get(key)) | {"right": right[key], "votes": votes}
        size += len(json.dumps(row))
        if size > cfg.megabytes * 1e6:
            break
        rows.append(row)
    places = [[visible(s.run), ends.get(s.run) if s.step is None else s.step] for s in judged]
    return {"stages": [visible(s.name) for s in judged], "places": places, "pairs": rows, "total": len(keys),
            "accuracy": [cell(s.summary.get("overall", {}).get("accuracy")) for s in judged], "last": last,
            "axes": [AXES[0], AXES[2]]}


def of(judged: Sequence[Stage], key: Key) -> list[dict[str, Judgement]]:
    """{order: verdict} of one pair at every stage."""
    return [s.verdicts.get(key, {}) for s in judged]


def browser_row(key: Key, verdicts: Sequence[dict[str, Judgement]], pair: Pair | None) -> dict[str, Any]:
    one = next(j for v in verdicts for j in v.values())
    better = one.winner if one.order == "AB" else "A" if one.winner == "B" else "B"
    asked = [clip(text) for text in (question(pair), pair.response_a, pair.response_b)] if pair else None
    traces = [
        [{"order": j.order, "verdict": j.verdict, "right": j.correct, "cut": j.finish_reason == "length",
          "text": clip(j.text)} for _, j in sorted(v.items())] for v in verdicts
    ]
    return {"id": clip(key[1]), "kind": clip(one.category), "better": better, "asked": asked, "traces": traces}


def clip(text: str, limit: int = 12_000) -> str:
    more = f"\n[{len(text) - limit:,} characters more]" if len(text) > limit else ""
    return visible(text[:limit]) + more


def as_html(table: Table) -> str:
    """Every cell escaped; the first column names the row."""
    rows = [[escape(visible(text)) for text in row] for row in table]
    head = "".join(f'<th scope="col">{text}</th>' for text in rows[0])
    body = "".join(f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{t}</td>" for t in row[1:]) + "</tr>\n"
                   for row in rows[1:])
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n'


def as_figure(run_name: str, title: str, remark: str, png: bytes, ends: tuple[float, float] | None) -> str:
    """A panel; with `ends` the script marks the step that the slider is at."""
    linked = f' data-run="{escape(visible(run_name))}" data-from="{ends[0]}" data-to="{ends[1]}"' if ends else ""
    head, foot, source = escape(visible(title)), escape(visible(remark)), base64.b64encode(png).decode()
    return (f'<figure{linked}><figcaption>{head}</figcaption><div><img alt="{head}; {foot}" '
            f'src="data:image/png;base64,{source}"></div><small>{foot}</small></figure>\n')


def page(title: str, stages: Sequence[Stage], curves: dict[str, list[Panel]], data: Any,
         evaluated: Mapping[str, dict[str, Any]]) -> str:
    parts = ["<h2>Stages</h2>\n", as_html(stage_table(stages))]
    for name, panels in curves.items():
        figures = "".join(as_figure(name.removeprefix("Training: "), *panel) for panel in panels)
        parts.append(f'<h2>{escape(visible(name))}</h2>\n<div class="grid">\n{figures}</div>\n')
    for name, curve in evaluated.items():
        parts += [f"<h3>{escape(visible(name))}</h3>\n", as_html(curve_grid(curve))]
    if probes := probe_table(stages):
        parts += ["<h2>Probes</h2>\n", as_html(probes)]
    policy = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    content = json.dumps(data).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return TEMPLATE.substitute(title=escape(visible(title)), policy=policy, style=STYLE, body="".join(parts),
                               hidden="" if data["pairs"] else " hidden", data=content, script=SCRIPT)


HERE = Path(__file__).parent
STYLE, SCRIPT = (HERE / "report.css").read_text("utf-8"), (HERE / "report.js").read_text("utf-8")
TEMPLATE = Template((HERE / "report.template.html").read_text("utf-8"))  # what is put in is not looked through again


def report(cfg: Config) -> Path:
    """Print the tables and one trace, write the curves and the page; returns the page's path."""
    folder = Path(cfg.folder)
    out = Path(cfg.out) if cfg.out else folder / "report.html"
    stages = find_stages(folder)
    texts = load_texts(stages)
    evaluated = find_curves(folder)
    listed = [s for s in stages if s.listed]
    print(as_text("", stage_table(listed)))
    if probes := probe_table(stages):
        print(as_text("", probes))
    print_change(listed, texts)
    for name, curve in evaluated.items():
        print(as_text(visible(f"{name}: {curve['title']}"), curve_grid(curve)) + visible(curve["remark"]) + "\n")
    curves = {f"Training: {s.name}": list(draw_curves(s.metrics)) for s in stages if s.metrics}
    curves |= {"Votes and budgets": list(draw_evaluations(evaluated))} if evaluated else {}
    for name, panels in curves.items():
        for title, _, png, _ in panels:
            words = f"{name.removeprefix('Training: ')} {title.partition(' (')[0]}"
            slug = re.sub(r"[^A-Za-z0-9]+", "-", words).strip("-").lower()
            disk.write_whole(out.parent / "plots" / f"{slug}.png", png)
    disk.write_whole(out, page(f"Report: {folder.resolve().name}", listed, curves, browser_data(stages, texts, cfg),
                              evaluated))
    print(out)
    return out
