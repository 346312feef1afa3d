"""What does a judge look at? One table for reasoning and scalar judges: pairs are changed, verdicts compared.

    python -m evaluation.probes pairs --data held_out.jsonl --out runs/probes/pairs.jsonl
    python eval.py run --model runs/grpo --data runs/probes/pairs.jsonl --both-orders --out runs/probes/grpo
    python -m evaluation.probes table --log runs/probes/grpo

    a probe       changes every pair (Pair -> Pair), or leaves it out; its name is the source of the changed pairs
    a measure     verdicts on the pairs as they are and as changed -> a number for each pair
    an error      the standard error over pairs: the verdicts on a pair are one observation

Question removed, numbers altered: "Reward Models Identify Consistency, Not Causality" (arXiv 2502.14619). Same
responses under two instructions: Contrast Instructions (arXiv 2309.16155). Whether a written solution causes the
verdict can be asked where solutions can be forced: `python -m toy probe`.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from json import dumps
from pathlib import Path
from typing import Any

import tyro

from data import Pair, load_pairs, preferred, save_pairs
from evaluation.outcomes import read_judgement, read_log, standard_error
from evaluation.tables import as_text, cell
from judging.verdicts import Judgement, named
from reward import Letter
from runtime import cli, disk
from runtime.errors import UserError
from runtime.ranks import program

Judged = Mapping[str, Sequence[Judgement]]  # probe -> verdicts on its pairs, in both orders
Values = Iterable[tuple[str, float]]  # pair_id, what one verdict (or two that are held together) says

# ---- pairs -> changed pairs ----------------------------------------------------------------------------


def other_numbers(pair: Pair) -> Pair:
    """Every number of the conversation ends in another digit, three further on; the responses stay as they are.

    >>> pair = Pair("", "", ({"role": "user", "content": "what is 37+48?"},), "it is 85.", "it is 75.", "A")
    >>> other_numbers(pair).context[0]["content"], other_numbers(pair).response_a
    ('what is 30+41?', 'it is 85.')
    """

    def further(number: re.Match[str]) -> str:
        return number[0][:-1] + "3456789012"[int(number[0][-1])]

    return replace(pair, context=tuple({**m, "content": re.sub("[0-9]+", further, m["content"])} for m in pair.context))


def twice(text: str) -> str:
    """Longer by nothing."""
    return f"{text}\n\n{text}"


def dressed(text: str) -> str:
    """The same words in Markdown: a heading, and each line a bullet in bold."""
    return "## Answer\n\n" + "\n".join(f"- **{line.strip()}**" for line in text.splitlines() if line.strip())


def contrast(pairs: Sequence[Pair]) -> list[tuple[Pair, Pair]]:
    """Two winners under the instruction of the first (A wins) and of the second (B wins), which is the next in its
    category with another instruction. Each is presumed to suit its own instruction better."""
    found = []
    for i, one in enumerate(pairs):
        for two in (*pairs[i + 1 :], *pairs[:i]):
            texts = preferred(one), preferred(two)
            if one.category == two.category and one.context != two.context and texts[0] != texts[1]:
                own = replace(one, response_a=texts[0], response_b=texts[1], winner="A", trace=None)
                found.append((own, replace(own, context=two.context, winner="B")))
                break
    return found


def probed(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """What the judge is shown: probe -> pairs, under the pair_ids that they have in `pairs`."""
    changed, contrasts = [(pair, other_numbers(pair)) for pair in pairs], contrast(pairs)
    found = {
        "as is": list(pairs),
        "no question": [replace(pair, context=({"role": "user", "content": ""},)) for pair in pairs],
        "other numbers": [after for before, after in changed if after != before],
        "own instruction": [own for own, _ in contrasts],
        "other instruction": [other for _, other in contrasts],
    }
    for name, change in (("twice", twice), ("dressed", dressed)):
        found[f"A {name}"] = [replace(pair, response_a=change(pair.response_a)) for pair in pairs]
        found[f"B {name}"] = [replace(pair, response_b=change(pair.response_b)) for pair in pairs]
    return found


# ---- verdicts -> a number for each pair ----------------------------------------------------------------


def right(seen: Sequence[Judgement]) -> Values:
    return [(j.pair_id, j.correct) for j in seen]


def both(before: Sequence[Judgement], after: Sequence[Judgement]) -> Iterator[tuple[Judgement, Judgement]]:
    """The verdicts on a pair in one order, as it was and as changed."""
    known = {(j.pair_id, j.order, j.sample): j for j in before}
    return ((known[key], j) for j in after if (key := (j.pair_id, j.order, j.sample)) in known)


def stays(before: Sequence[Judgement], after: Sequence[Judgement]) -> Values:
    """Is the verdict still the same? Of those that are given before and after."""
    return [(b.pair_id, b.verdict == a.verdict) for b, a in both(before, after) if b.verdict and a.verdict]


def consistent(seen: Sequence[Judgement]) -> Values:
    """Do both orders name one response? Without a verdict they do not."""
    first = {(j.pair_id, j.sample): named(j) for j in seen if j.order == "AB"}
    return [(j.pair_id, named(j) is not None and named(j) == first[j.pair_id, j.sample])
            for j in seen if j.order == "BA"]


def names(seen: Sequence[Judgement], letter: Letter) -> Values:
    """Is it this response that the verdict names, in whatever place? Of the verdicts given."""
    return [(j.pair_id, named(j) == letter) for j in seen if j.verdict]


# ---- the table -----------------------------------------------------------------------------------------


def measure(judged: Judged) -> dict[str, dict[str, Any]]:
    """name -> value, error, pairs, verdicts (share given), good."""
    plain, own, other = judged["as is"], judged["own instruction"], judged["other instruction"]
    bare, numbers = judged["no question"], judged["other numbers"]
    rows: list[tuple[str, str, Sequence[Judgement], dict[str, Any]]] = [
        ("accuracy", "1", plain, summary(right(plain))),
        ("both orders name one response", "1", plain, summary(consistent(plain))),
        ("says A", "0.5", plain, summary((j.pair_id, j.verdict == "A") for j in plain if j.verdict)),
        ("no question: right, of verdicts given", "0.5*", bare, summary(right([j for j in bare if j.verdict]))),
        ("no question: verdict stays", "0.5*", bare, summary(stays(plain, bare))),
        ("other numbers: verdict stays", "0.5*", numbers, summary(stays(plain, numbers))),
        ("two instructions: right under both", "1", other,
         summary((b.pair_id, b.correct and a.correct) for b, a in both(own, other))),
        ("two instructions: verdict stays", "0", other, summary(stays(own, other))),
    ]
    for name, what in (("twice", "names what says all twice"), ("dressed", "names what wears Markdown")):
        a, b = judged[f"A {name}"], judged[f"B {name}"]
        rows.append((what, "0.5", [*a, *b], summary([*names(a, "A"), *names(b, "B")])))
    return {name: row | {"verdicts": given(seen), "good": good} for name, good, seen, row in rows}


def given(seen: Sequence[Judgement]) -> float | None:
    return statistics.fmean(j.verdict is not None for j in seen) if seen else None


def summary(values: Values) -> dict[str, Any]:
    """Mean over pairs of the mean over a pair's verdicts.

    >>> summary([("p", 1), ("p", 0), ("q", 1), ("q", 1)])
    {'value': 0.75, 'error': 0.25, 'pairs': 2}
    """
    of_pair: dict[str, list[float]] = {}
    for pair_id, value in values:
        of_pair.setdefault(pair_id, []).append(value)
    means = [statistics.fmean(group) for group in of_pair.values()]
    return {"value": statistics.fmean(means) if means else None, "error": standard_error(means), "pairs": len(means)}


def show(rows: Mapping[str, Mapping[str, Any]]) -> None:
    columns = {"value": "value", "error": "+-", "pairs": "pairs", "verdicts": "verdicts", "good": "good"}
    shown = {name: [row[c] if c == "good" else cell(row[c]) for c in columns] for name, row in rows.items()}
    print(as_text("", [["", *columns.values()], *([name, *cells] for name, cells in shown.items())]))
    print("* where the question (the numbers) decide; verdicts: share of outputs that give one")


# ---- command line --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Write the pairs as they are and changed into one file, for eval.py run."""

    data: str  # Pairs with their winners (.jsonl, .parquet, hub id).
    out: str  # File of pairs to write (.jsonl).


@dataclass(frozen=True)
class Table:
    """Print what the verdicts on such a file say."""

    log: str  # Folder of an evaluation in both orders.
    out: str = ""  # File for the numbers (JSON).


def write_pairs(cfg: Pairs) -> None:
    pairs = [replace(pair, pair_id=f"{pair.pair_id}#{i}", trace=None) for i, pair in enumerate(load_pairs(cfg.data))]
    if ready := next((pair for pair in pairs if pair.messages is not None), None):
        raise UserError(f"pair {ready.pair_id}: a ready-made prompt cannot be changed; give pairs with responses")
    named = [replace(pair, source=name) for name, changed in probed(pairs).items() for pair in changed]
    disk.write_whole(Path(cfg.out), save_pairs(named))
    print(f"{cfg.out}: {len(named)} pairs; judge them with eval.py run --both-orders")


def table(cfg: Table) -> dict[str, Any]:
    """Print and return the numbers. Raises UserError for verdicts on other pairs, in one order, or not on all."""
    judged: dict[str, list[Judgement]] = {name: [] for name in probed([])}
    for where, row in read_log([cfg.log]):
        judgement = read_judgement(row, where)
        if judgement.source not in judged:
            raise UserError(f"{where}: no verdict on a pair of `python -m evaluation.probes pairs`")
        judged[judgement.source].append(judgement)
    if not (Path(cfg.log) / "summary.json").is_file() or {j.order for j in judged["as is"]} != {"AB", "BA"}:
        raise UserError(f"{cfg.log}: not a finished evaluation in both orders; eval.py run --both-orders continues it")
    result = {"rows": measure(judged)}
    show(result["rows"])
    if cfg.out:
        disk.write_whole(Path(cfg.out), dumps(result, indent=1) + "\n")
    return result


def main() -> None:
    cfg = tyro.extras.subcommand_cli_from_dict({"pairs": Pairs, "table": Table}, prog=program(), description=__doc__)
    write_pairs(cfg) if isinstance(cfg, Pairs) else table(cfg)


if __name__ == "__main__":
    cli.start(main)
