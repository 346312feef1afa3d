"""A folder of runs -> its stages: what training logged, what evaluation found. `report/` shows them.

Every reader here raises UserError for a file that is not as the scripts write it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data import Pair
from evaluation.benchmarks import load_benchmark
from evaluation.outcomes import Name, read_judgement
from evaluation.tables import curve_grid, drawn
from judging.verdicts import Judgement, better, named, tally
from runtime import disk
from runtime.errors import UserError

ORDER = ("start", "sft", "grpo")  # stages of other names come after these


@dataclass
class Stage:
    """All that is known of one stage, or of one round of its training (`step`); `verdicts` holds one sample of each
    pair and order, `votes` counts all: for response A, for B, for neither. What is not `listed` is in the browser only.
    """

    name: str
    step: int | None = None
    listed: bool = True
    metrics: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    verdicts: dict[Name, dict[str, Judgement]] = field(default_factory=dict)
    votes: dict[Name, list[int]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    data: str = ""  # file of the pairs that were judged

    @property
    def run(self) -> str:
        return self.name.removesuffix(f" step {self.step}")

    def judge(self, judgements: Sequence[Judgement]) -> None:
        for j in judgements:
            key = (j.source, j.pair_id)
            self.verdicts.setdefault(key, {}).setdefault(j.order, j)
            self.votes.setdefault(key, [0, 0, 0])[("A", "B", None).index(named(j))] += 1


def find_stages(folder: Path) -> list[Stage]:
    """Stages in order. Raises UserError if there is nothing to report on."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    stages: dict[str, Stage] = {}

    def stage(path: Path) -> Stage:
        parts = [part for part in path.relative_to(folder).parts if part != "eval"]
        name = "/".join(parts) or folder.resolve().name
        return stages.setdefault(name, Stage(name))

    for path in below(folder, "metrics.jsonl"):
        stage(path.parent).metrics = [row for _, row in disk.read_jsonl(path, torn_end_ok=True)]
        stage(path.parent).config = settings(path)
    for path in below(folder, "summary.json"):
        logs = sorted(path.parent.glob("judgements*.jsonl"))  # several processes leave a log each
        judged = [judgement for log in logs for judgement in read_log(log)]
        curve = "curve" in path.relative_to(folder).parts
        if logs and (not curve or any(j.sample for j in judged)):
            one = stage(path.parent)
            one.summary, one.listed = read_summary(path), not curve
            one.judge(judged)
            one.config = one.config or settings(path)
            one.data = str(read_object(path.parent / "config.json").get("data", ""))
    if not stages:
        raise UserError(f"{folder}: no metrics.jsonl and no summary.json in it or three levels below")
    evaluated = any(one.verdicts and one.listed for one in stages.values())
    for path in below(folder, "rollouts"):
        steps = sorted(path.glob("step_*.jsonl"))
        for step in steps:  # the tables of a run without evaluations have its first and last
            run = stage(path.parent)
            one = step_stage(run.name, step, not evaluated and step in (steps[0], steps[-1]))
            if one.verdicts != run.verdicts:  # the last round may say what the evaluation after training says
                stages[one.name] = one
    rank = {name: i for i, name in enumerate(ORDER)}
    order = {one.name: (rank.get(one.run, len(rank)), one.run) for one in stages.values()}  # an evaluation ends its run
    return sorted(stages.values(), key=lambda s: (*order[s.name], s.step is None and s.verdicts != {}, s.step or 0))


def settings(log: Path) -> dict[str, Any]:
    """The configuration beside a log, and the command (of judge.json)."""
    command = read_object(log.parent / "model" / "judge.json").get("command", "")
    return read_object(log.parent / "config.json") | {"command": command}


def below(folder: Path, name: str) -> Iterator[Path]:
    for depth in range(4):
        yield from sorted(folder.glob("*/" * depth + name))


def step_stage(name: str, path: Path, listed: bool) -> Stage:
    """The held-out verdicts of one training step as a stage of their own."""
    judged, step = read_log(path), int(re.sub(r"\D", "", path.stem) or 0)
    groups = {c: tally([j for j in judged if j.category == c]) for c in sorted({j.category for j in judged})}
    data = str(read_object(path.parent.parent / "config.json").get("held_out", ""))
    found = Stage(f"{name} step {step}", step, listed, data=data,
                  summary={"overall": tally(judged), "by_category": groups})
    found.judge(judged)
    return found


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object, {} if there is no such file."""
    if not path.is_file():
        return {}
    value = disk.read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_summary(path: Path) -> dict[str, Any]:
    value = read_object(path)
    groups = value.get("by_category", {})
    parts = [value.get("overall", {}), groups, *(groups.values() if isinstance(groups, dict) else [])]
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{path}: not a summary as eval.py writes it")
    return value


def find_curves(folder: Path) -> dict[str, dict[str, Any]]:
    """{evaluation: its curve}, as eval.py writes it."""
    found = {}
    for path in below(folder, "summary.json"):
        if curve := read_object(path).get("curve"):
            try:
                curve |= {name: str(curve[name]) for name in ("title", "xlabel", "remark", "note")}
                points = drawn(curve)
                if not all(is_number(value) for point in points for value in point) or min(e for *_, e in points) < 0:
                    raise TypeError("a point is no number")
                curve_grid(curve)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise UserError(f"{path}: its curve is not as eval.py writes it ({error})") from None
            name = "/".join(part for part in path.parent.relative_to(folder).parts if part not in ("eval", "curve"))
            found[name or folder.resolve().name] = curve
    return found


def read_log(path: Path) -> list[Judgement]:
    return [read_judgement(row, f"{path}:{number}") for number, row in disk.read_jsonl(path, torn_end_ok=True)]


def load_texts(stages: Sequence[Stage], folder: Path) -> dict[Name, Pair]:
    """The pairs that were judged, where their file is still there: at its path, in `folder`, or beside that."""
    found: dict[Name, Pair] = {}
    kinds = {key: (better(j), j.category) for s in stages for key, v in s.verdicts.items() for j in v.values()}
    for data in sorted({stage.data for stage in stages if stage.data}):
        name = Path(data).name
        for path in (Path(data), folder / name, folder.resolve().parent / name):
            with suppress(UserError, OSError):  # the file is another one by now, or this never was a file's name
                pairs = {(p.source, p.pair_id): p for p in load_benchmark("pairs", str(path))} if path.is_file() else {}
                if pairs and all(kinds.get(key) in (None, (p.winner, p.category)) for key, p in pairs.items()):
                    found |= pairs
                    break
    return found


def is_number(value: Any) -> bool:
    """A number that a table and a plot can show."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e99 < value < 1e99
