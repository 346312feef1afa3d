"""Verdict logs and published outcome tables -> outcomes, which `benchmarks.score` turns into tables; verdicts ->
what an evaluation says of itself: accuracy with its error, consistency, curves over votes and budgets.

    rows = read_log(["runs/eval/rm-bench"])
    outcomes, remarks = read_outcomes("rm-bench", rows)
    summary = summarise(judgements)

Read are what eval.py logs (a verdict a line) and the per-sample tables of other evaluations:
  {subset, id, correct}                             RewardBench
  {domain, id, result_1, result_2, result_3}        RM-Bench: slot k of result_f is chosen style k against
                                                    rejected style (k + f - 1) % 3, the three rotated files
  {category_path, pair_uid | bon_uid, results}      RMB, a record of the authors' logs
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from evaluation import benchmarks
from evaluation.benchmarks import KINDS, Benchmark, Compat, Outcome, Row, kind_of, lead, read_id, read_text
from evaluation.silent import why_silent
from judging.verdicts import Judgement, better, majority, named, tally
from reward import Rule, parse_verdict
from runtime.disk import read_json, read_jsonl
from runtime.errors import UserError


def read_log(paths: Sequence[str]) -> list[tuple[str, Row]]:
    """(place for error messages, row) of verdict logs and outcome tables; of a folder those it holds itself."""
    rows: list[tuple[str, Row]] = []
    for path in map(Path, paths):
        files = [path]
        if path.is_dir():
            files = sorted(path.glob("judgements*.jsonl")) or sorted(path.glob("*outcomes*.jsonl"))
        if not files:
            raise UserError(f"{path}: no judgements*.jsonl and no *outcomes*.jsonl in it; name the files")
        for file in files:
            if file.suffix == ".json":
                rows += _json_log(file)
            else:
                rows += ((f"{file}:{number}", row) for number, row in read_jsonl(file, torn_end_ok=True))
    if not rows:
        raise UserError(f"{', '.join(paths) or '--log'}: no verdicts in it")
    return rows


def _json_log(path: Path) -> Iterator[tuple[str, Row]]:
    """A list of records, or those of RMB's sets: {set: records}."""
    content = read_json(path)
    parts = {"": content} if isinstance(content, list) else content
    if not isinstance(parts, dict):
        raise UserError(f"{path}: expected a list or an object, found {type(content).__name__}")
    for number, row in enumerate((row for part in parts.values() if isinstance(part, list) for row in part), 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: item {number}: expected an object, found {type(row).__name__}")
        yield f"{path}: item {number}", row


def read_outcomes(
    benchmark: Benchmark, rows: Iterable[tuple[str, Row]], rule: Rule | None = None
) -> tuple[list[Outcome], list[str]]:
    """Rows of logs or outcome tables -> outcomes, and remarks on what was found.

    A verdict or a row that comes twice counts once. Several verdicts on one pair are a vote in each order,
    a tie being wrong, and the orders are averaged. `rule` parses the logged text again; None takes the verdicts
    as logged. Raises UserError for a row that does not belong to the benchmark.
    """
    votes: dict[tuple[str, str], dict[tuple[str, int], tuple[str, Judgement]]] = {}
    found: dict[tuple[str, str, str], Outcome] = {}
    times: Counter[tuple[str, str, str]] = Counter()
    twice = changed = 0
    for where, row in rows:
        if "verdict" in row and "winner" in row:
            judgement = read_judgement(row, where, rule)
            of_pair = votes.setdefault((judgement.source, judgement.pair_id), {})
            name = judgement.order, judgement.sample
            twice += name in of_pair
            changed += of_pair.setdefault(name, (where, judgement))[1].verdict != judgement.verdict
        else:
            for outcome in _tabled(benchmark, row, where):
                if benchmark == "rmb" and outcome.slot:  # losers may have equal texts: each of them counts
                    place = where.rpartition(":")[0], outcome.item, outcome.slot
                    times[place] += 1
                    outcome = replace(outcome, slot=f"{outcome.slot} {times[place]}")
                key = outcome.group, outcome.item, outcome.slot
                twice += key in found
                changed += found.setdefault(key, outcome) != outcome
    for of_pair in votes.values():
        where = next(iter(of_pair.values()))[0]
        outcome = _judged(benchmark, [j for _, j in of_pair.values()], where)
        found.setdefault((outcome.group, outcome.item, outcome.slot), outcome)
    judged = [judgement for of_pair in votes.values() for _, judgement in of_pair.values()]
    return list(found.values()), _remarks(judged, len(votes), twice, changed)


def score_rows(benchmark: Benchmark, rows: Sequence[tuple[str, Row]], compat: Compat,
               draws: int = 1000) -> dict[str, Any]:
    """All numbers under one set of rules; the official one parses the logged texts again."""
    outcomes, remarks = read_outcomes(benchmark, rows, "official" if compat == "official" else None)
    return {
        "rules": benchmarks.RULES[compat],
        "table": benchmarks.score(benchmark, outcomes, compat),
        "intervals": benchmarks.intervals(benchmark, outcomes, compat, draws),
        "counts": benchmarks.count(outcomes),
        "remarks": remarks + benchmarks.gaps(benchmark, outcomes),
    }


def elect(judgements: Sequence[Judgement]) -> float:
    """Right or not: the majority in each order, averaged over the orders; a tie is wrong."""
    orders = {order: [j for j in judgements if j.order == order] for order in sorted({j.order for j in judgements})}
    right = [majority(j.verdict for j in group) == group[0].winner for group in orders.values()]
    return sum(right) / len(right)


def _remarks(judged: Sequence[Judgement], pairs: int, twice: int, changed: int) -> list[str]:
    silent = sum(j.verdict is None for j in judged)
    most = max(Counter((j.source, j.pair_id) for j in judged).values(), default=1)
    remarks = [f"{silent} of {len(judged)} verdicts are missing or name both: wrong"] if silent else []
    if most > 1:
        remarks.append(f"{len(judged)} verdicts on {pairs} comparisons: a vote in each order, the orders averaged")
    if twice:
        other = f", {changed} of them otherwise the second time: are these logs of one model?" if changed else ""
        remarks.append(f"{twice} verdicts came twice and count once{other}")
    return remarks


def read_judgement(row: Row, where: str, rule: Rule | None = None) -> Judgement:
    """A line of a log, under `rule` parsed again. Raises UserError for one that eval.py did not write."""
    try:
        judgement = Judgement(**row)
        texts = judgement.pair_id, judgement.source, judgement.category, judgement.text, *judgement.meta.values()
        letters = judgement.order in ("AB", "BA"), judgement.winner in ("A", "B"), judgement.verdict in ("A", "B", None)
        numbers = judgement.sample, judgement.response_tokens
        if not (all(isinstance(text, str) for text in texts) and all(letters) and isinstance(judgement.correct, bool)
                and all(type(n) is int and 0 <= n < 2**31 for n in numbers)):
            raise TypeError("a value is of another kind")
        return judgement if rule is None else replace(judgement, verdict=parse_verdict(judgement.text, rule))
    except (TypeError, AttributeError) as error:
        raise UserError(f"{where}: not a verdict as eval.py logs it ({error})") from None


def read_scores(text: str) -> tuple[float, float] | None:
    """The scores in a judgement's text, of A and B as shown, NaN where one is missing; None for a chain.

    >>> read_scores("A 0.5 B -1e-05 [[A]]"), read_scores("A 0.5 B None"), read_scores("<answer>[[A]]</answer>")
    ((0.5, -1e-05), (0.5, nan), None)
    """
    found = re.match(r"A (\S+) B (\S+)(?: \[\[[AB]\]\])?$", text.replace("None", "nan"))
    return (float(found[1]), float(found[2])) if found else None


def _judged(benchmark: Benchmark, judgements: Sequence[Judgement], where: str) -> Outcome:
    """What the verdicts on one pair say as an outcome of the benchmark's item."""
    one = judgements[0]
    meta, correct, scores = one.meta, elect(judgements), None
    if benchmark == "pairs":
        return Outcome(f"{one.source}/{one.pair_id}", one.category, "", correct, 1)
    try:
        group, item, slot, of = meta[KINDS[benchmark][0]], meta["item"], "", 1
        kind_of(benchmark, group, where)
        if benchmark == "rm-bench":
            slot, of = meta["chosen_style"] + meta["rejected_style"], 9
            if slot not in {f"{i}{j}" for i, j in product(range(3), range(3))}:
                raise UserError(f"{where}: chosen_style and rejected_style must be 0, 1 or 2")
        elif benchmark == "rmb":
            slot, of = meta["loser"], int(meta["losers"])
        elif benchmark == "judgebench":  # right if the votes of both orders for the label outnumber those against it
            correct = float(lead(judgements) == 1)
        elif benchmark == "rewardbench-2":
            slot, of, correct = f"{int(meta['first'])}-{int(meta['second'])}", int(meta["responses"]), lead(judgements)
            if (found := read_scores(one.text)) is not None:
                scores = found if one.winner == "A" else found[::-1]  # A as shown is the first response or the second
            item, group, slot = _best_of_four(group, item, slot)
    except (KeyError, ValueError) as error:
        raise UserError(f"{where}: not a verdict on {benchmark}, its meta has no {error}; judge with "
                        f"eval.py run --benchmark {benchmark}") from None
    return Outcome(item, group, slot, correct, of, scores)


def _best_of_four(subset: str, item: str, match: str) -> tuple[str, str, str]:
    """(item, group, slot) of RewardBench 2; in Ties the rows ref:7 and tied:7 are one item."""
    if subset == "Ties":
        kind, _, number = item.removeprefix("Ties/").partition(":")
        item, match = f"Ties/{int(number):09d}", f"{kind}:{match}"
    return item, f"rewardbench-2/{subset}", match


def _tabled(benchmark: Benchmark, row: Row, where: str) -> Iterator[Outcome]:
    """Outcomes of one row of a published table."""
    asked = {"rewardbench": "correct", "rm-bench": "result_1", "rmb": "results", "rewardbench-2": "scores"}
    if asked.get(benchmark) not in row:
        raise UserError(f"{where}: neither a verdict of eval.py nor a row of a {benchmark} outcome table; "
                        f"found {', '.join(sorted(row))[:80]}")
    group = read_text(row, KINDS[benchmark][0], where)
    kind_of(benchmark, group, where)
    if benchmark == "rewardbench":
        yield Outcome(f"{group}/{read_id(row, 'id', where)}", group, "", _share(row["correct"], "correct", where), 1)
    elif benchmark == "rewardbench-2":  # the scores of all responses, the right ones first
        scores, right = row["scores"], row.get("num_correct", 1)
        numbers = [s[0] if isinstance(s, list) and s else s for s in scores] if isinstance(scores, list) else []
        if type(right) is not int or not 0 < right < len(numbers) or not all(type(s) in (int, float) for s in numbers):
            raise UserError(f"{where}: 'scores' must be a list of numbers, the 'num_correct' right ones first")
        item = f"{group}/{read_id(row, 'id', where)}"
        for i, j in ((i, j) for i in range(right) for j in range(right, len(numbers)) if i == 0 or j == right):
            both = float(numbers[i]), float(numbers[j])
            yield Outcome(*_best_of_four(group, item, f"{i}-{j}"), 0.0, len(numbers), both)
    elif benchmark == "rm-bench":
        item = read_id(row, "id", where)
        for f, k in product(range(3), range(3)):
            results = row.get(name := f"result_{f + 1}")
            if not isinstance(results, list) or len(results) != 3:
                raise UserError(f"{where}: '{name}' must be three outcomes of 0 or 1")
            yield Outcome(item, group, f"{k}{(k + f) % 3}", _share(results[k], name, where), 9)
    else:  # a record of the authors' logs
        name = "bon_uid" if "bon_uid" in row else "pair_uid"
        slot = json.dumps(row.get("text_rejected")) if name == "bon_uid" else ""  # losers have no number there
        yield Outcome(f"{group}/{read_id(row, name, where)}", group, slot, _share(row["results"], "results", where))


def _share(value: Any, name: str, where: str) -> float:
    try:
        share = float(value)
    except (TypeError, ValueError, OverflowError):
        share = -1.0
    if not 0 <= share <= 1:
        raise UserError(f"{where}: '{name}' must be 0 or 1, found {str(value)[:40]!r}")
    return share


# ---- an evaluation's own numbers -----------------------------------------------------------------------

Name = tuple[str, str]  # source, pair_id


def summarise(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """What summary.json holds: a row of numbers overall, by category and by source. Matches between two responses of
    which neither is right (RewardBench 2) count in the benchmark's score alone."""
    judgements = [j for j in judgements if j.source != "rewardbench-2" or int(j.meta["first"]) < int(j.meta["right"])]
    result: dict[str, Any] = {"overall": measure(judgements)}
    for name in ("category", "source"):
        groups = sorted({getattr(j, name) for j in judgements})
        result[f"by_{name}"] = {g: measure([j for j in judgements if getattr(j, name) == g]) for g in groups}
    result["silent"] = dict(Counter(why_silent(j) for j in judgements if j.verdict is None).most_common())
    return result | ({"curve": votes_curve(judgements)} if any(j.sample for j in judgements) else {})


def measure(judgements: Sequence[Judgement]) -> dict[str, float]:
    """`tally`, the standard error of its accuracy and, with several votes, the accuracy of the majority.

    accuracy is the mean over single verdicts; its error counts a pair's verdicts as one observation, because
    they are not independent. vote_accuracy takes all votes on a pair, both orders together.
    """
    of_pair = by_pair(judgements)
    row = tally(judgements) | {"pairs": len(of_pair)}
    means = [statistics.fmean(j.correct for j in group) for group in of_pair.values()]
    if (error := standard_error(means)) is not None:
        row["accuracy_se"] = error
    if any(j.sample for j in judgements):
        right = [majority(map(named, group)) == better(group[0]) for group in of_pair.values()]
        row["vote_accuracy"] = statistics.fmean(right)
    return row


def by_pair(judgements: Iterable[Judgement]) -> dict[Name, list[Judgement]]:
    found: dict[Name, list[Judgement]] = {}
    for j in judgements:
        found.setdefault((j.source, j.pair_id), []).append(j)
    return found


def votes_curve(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Accuracy of the majority of k = 1 .. K votes: the mean over all subsets of k of a pair's K votes, in
    each order, the orders averaged. k = 1 is the mean accuracy of a single verdict. Drawn are odd k (and K): only
    even ones lose ties."""
    most = 1 + max(j.sample for j in judgements)
    values: dict[int, dict[Name, float]] = {k: {} for k in range(1, most + 1)}
    for name, group in by_pair(judgements).items():
        orders = [[j for j in group if j.order == order] for order in sorted({j.order for j in group})]
        tallies = [
            (sum(j.correct for j in votes), sum(j.verdict is None for j in votes), len(votes)) for votes in orders
        ]
        for k, of_pair in values.items():
            chances = [majority_chance(right, total - right - silent, silent, min(k, total))
                       for right, silent, total in tallies]
            of_pair[name] = sum(chances) / len(chances)
    title = f"majority of k of {most} votes"
    found = curve(title, "votes per pair", "mean over all subsets of k votes; a tie is wrong", values, {})
    return found | {"drawn": [k for k in values if k % 2 or k == most]}


def majority_chance(right: int, wrong: int, silent: int, k: int) -> float:
    """How often k of these votes, drawn without replacement, name the right response more often than the other.

    >>> majority_chance(2, 2, 0, 1), majority_chance(3, 1, 0, 3), majority_chance(1, 0, 2, 3)
    (0.5, 1.0, 1.0)
    """
    ways = sum(math.comb(right, i) * math.comb(wrong, j) * math.comb(silent, k - i - j)
               for i in range(1, k + 1) for j in range(min(i, k - i + 1)))
    return ways / math.comb(right + wrong + silent, k)


def budget_curve(judged: Mapping[int, Sequence[Judgement]]) -> dict[str, Any]:
    """Accuracy against the tokens that a chain may have, from the verdicts under each budget."""
    values = {budget: {name: statistics.fmean(j.correct for j in group) for name, group in by_pair(seen).items()}
              for budget, seen in judged.items()}
    rows = {budget: measure(seen) for budget, seen in judged.items()}
    shown = ("vote_accuracy", "consistency", "verdict_rate", "length_mean")
    more = {budget: {name: row[name] for name in shown if name in row} for budget, row in rows.items()}
    return curve("inference budget", "tokens a chain may have", "single verdicts", values, more)


def curve(title: str, xlabel: str, note: str, values: Mapping[int, Mapping[Name, float]],
          more: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """{x: {pair: share right}} -> title, axis, points and a remark that says whether there is a curve: the last
    point is held against the first pair by pair, because both are of the same pairs."""
    points = []
    for x, of_pair in sorted(values.items()):
        error = standard_error(list(of_pair.values()))
        point = {"x": x, "accuracy": statistics.fmean(of_pair.values())}
        points.append(point | ({} if error is None else {"accuracy_se": error}) | dict(more.get(x, {})))
    first, last = min(values), max(values)
    gains = [values[last][name] - values[first][name] for name in values[first]]
    gain, error = statistics.fmean(gains), standard_error(gains)
    size = f"{abs(gain):.3f}" + ("" if error is None else f" \u00b1 {error:.3f}")
    if error is None or abs(gain) <= 2 * error:
        remark = f"no curve: from {first} to {last} accuracy moves by {size}, at most two standard errors"
    else:
        remark = f"{'rises' if gain > 0 else 'falls'} by {size} from {first} to {last}"
    return {"title": title, "xlabel": xlabel, "note": note, "pairs": len(gains), "points": points, "remark": remark}


def standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
