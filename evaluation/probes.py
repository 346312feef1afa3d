"""What does a judge look at? One table for reasoning and scalar judges: pairs are changed, verdicts compared.

    python -m evaluation.probes --model runs/grpo --data held_out.jsonl --prompt-file prompt.txt --out runs/probes/grpo
    python -m evaluation.probes --model runs/scalar --scalar --data held_out.jsonl --out runs/probes/scalar

    a probe       changes every pair (Pair -> Pair), or leaves it out; the judge sees all in both orders, greedily
    a measure     verdicts on the pairs as they are and as changed -> a number for each pair
    an error      the standard error over pairs: the verdicts on a pair are one observation

Question removed, numbers altered: "Reward Models Identify Consistency, Not Causality" (arXiv 2502.14619). Same
responses under two instructions: Contrast Instructions (arXiv 2309.16155). Whether a written solution causes the
verdict can be asked where solutions can be forced: `python -m toy probe`.

`--out` gets probes.json and the judge's verdicts, a file for each probe. The same command goes on after the last
finished one.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from json import dumps
from pathlib import Path
from typing import Any

import tyro

from data import Message, Pair, preferred, save_pairs
from evaluation.benchmarks import Benchmark, load_benchmark
from evaluation.outcomes import read_judgement, standard_error
from evaluation.tables import as_text, cell
from judging.endpoint import Server
from judging.pointwise import judge_scalar
from judging.verdicts import Judgement, judge_pairs, named, why_silent
from loading.judge_file import Asked
from reward import Letter, Rule
from rollout import load_sampler
from runtime import cli, disk, seeds
from runtime.errors import UserError
from runtime.run_folder import RunFolder
from settings import SamplerKind

Judge = Callable[[Sequence[Pair]], Iterable[Judgement]]
Judged = Mapping[str, Sequence[Judgement]]  # probe -> verdicts on its pairs, in both orders
Values = Iterable[tuple[str, float]]  # pair_id, what one verdict (or two that are held together) says

# ---- pairs -> changed pairs ----------------------------------------------------------------------------


def without_question(pair: Pair) -> Pair:
    """The responses alone, below an empty question."""
    return replace(pair, context=({"role": "user", "content": ""},))


def other_numbers(pair: Pair) -> Pair:
    """Every number of the conversation ends in another digit, three further on; the responses stay as they are.

    >>> pair = Pair("", "", ({"role": "user", "content": "what is 37+48?"},), "it is 85.", "it is 75.", "A")
    >>> other_numbers(pair).context[0]["content"], other_numbers(pair).response_a
    ('what is 30+41?', 'it is 85.')
    """

    def further(number: re.Match[str]) -> str:
        return number[0][:-1] + "3456789012"[int(number[0][-1])]

    turns: list[Message] = [
        {"role": m["role"], "content": re.sub("[0-9]+", further, m["content"])} for m in pair.context
    ]
    return replace(pair, context=tuple(turns))


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
        "no question": [without_question(pair) for pair in pairs],
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
    known = {(j.pair_id, j.order): j for j in before}
    return ((known[j.pair_id, j.order], j) for j in after if (j.pair_id, j.order) in known)


def stays(before: Sequence[Judgement], after: Sequence[Judgement]) -> Values:
    """Is the verdict still the same? Of those that are given before and after."""
    return [(b.pair_id, b.verdict == a.verdict) for b, a in both(before, after) if b.verdict and a.verdict]


def right_twice(before: Sequence[Judgement], after: Sequence[Judgement]) -> Values:
    return [(b.pair_id, b.correct and a.correct) for b, a in both(before, after)]


def consistent(seen: Sequence[Judgement]) -> Values:
    """Do both orders name one response? Without a verdict they do not."""
    first = {j.pair_id: named(j) for j in seen if j.order == "AB"}
    return [(j.pair_id, named(j) is not None and named(j) == first[j.pair_id]) for j in seen if j.order == "BA"]


def names(seen: Sequence[Judgement], letter: Letter) -> Values:
    """Is it this response that the verdict names, in whatever place? Of the verdicts given."""
    return [(j.pair_id, named(j) == letter) for j in seen if j.verdict]


def longer(pairs: Sequence[Pair], seen: Sequence[Judgement]) -> dict[str, Any]:
    """Right where the winner is the longer one, less right where it is the shorter one (characters)."""
    gap = {p.pair_id: (len(p.response_a) - len(p.response_b)) * (1 if p.winner == "A" else -1) for p in pairs}
    plus = summary(right([j for j in seen if gap[j.pair_id] > 0]))
    minus = summary(right([j for j in seen if gap[j.pair_id] < 0]))
    values, errors = (plus["value"], minus["value"]), (plus["error"], minus["error"])
    return {
        "value": None if None in values else values[0] - values[1],
        "error": None if None in errors else math.hypot(*errors),
        "pairs": plus["pairs"] + minus["pairs"],
    }


# ---- the table -----------------------------------------------------------------------------------------


def measure(pairs: Sequence[Pair], judged: Judged) -> dict[str, Any]:
    """{"rows": name -> value, error, pairs, verdicts (share given), good; "no verdict": why -> count}."""
    plain, own, other = judged["as is"], judged["own instruction"], judged["other instruction"]
    bare, numbers = judged["no question"], judged["other numbers"]
    rows: list[tuple[str, str, Sequence[Judgement], dict[str, Any]]] = [
        ("accuracy", "1", plain, summary(right(plain))),
        ("both orders name one response", "1", plain, summary(consistent(plain))),
        ("says A", "0.5", plain, summary((j.pair_id, j.verdict == "A") for j in plain if j.verdict)),
        ("no question: right, of verdicts given", "0.5*", bare, summary(right([j for j in bare if j.verdict]))),
        ("no question: verdict stays", "0.5*", bare, summary(stays(plain, bare))),
        ("other numbers: verdict stays", "0.5*", numbers, summary(stays(plain, numbers))),
        ("two instructions: right under both", "1", other, summary(right_twice(own, other))),
        ("two instructions: verdict stays", "0", other, summary(stays(own, other))),
        ("right if the winner is longer, less if shorter", "0", plain, longer(pairs, plain)),
    ]
    for name, what in (("twice", "names what says all twice"), ("dressed", "names what wears Markdown")):
        a, b = judged[f"A {name}"], judged[f"B {name}"]
        rows.append((what, "0.5", [*a, *b], summary([*names(a, "A"), *names(b, "B")])))
    silent = Counter(why_silent(j) for j in plain if j.verdict is None)
    return {
        "rows": {name: row | {"verdicts": given(seen), "good": good} for name, good, seen, row in rows},
        "no verdict": dict(silent.most_common()),
    }


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


def show(result: Mapping[str, Any]) -> None:
    columns = {"value": "value", "error": "+-", "pairs": "pairs", "verdicts": "verdicts", "good": "good"}
    shown = {name: [row[c] if c == "good" else cell(row[c]) for c in columns] for name, row in result["rows"].items()}
    print(as_text("", [["", *columns.values()], *([name, *cells] for name, cells in shown.items())]))
    print("* where the question (the numbers) decide; verdicts: share of outputs that give one")
    kinds = ", ".join(f"{count} {name}" for name, count in result["no verdict"].items())
    print(f"no verdict on the pairs as they are: {kinds or 'none'}")


# ---- command line --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Probes(Server):
    """Judge pairs as they are and changed, print the table."""

    data: str
    """Pairs with their winners (.jsonl, .parquet, hub id), or a benchmark's own files (file, folder, hub id)."""
    out: str
    """Folder for probes.json and the verdicts."""
    benchmark: Benchmark = "pairs"
    """Which layout --data has."""
    scalar: bool = False
    """--model is a scalar reward model (one label)."""
    max_tokens: int = 0
    """Longest chain (tokens); 0: as the model was trained, else 2048."""
    rule: Rule = "eval"
    """Where a verdict counts: eval after the thoughts, train in the last 80 characters, official anywhere."""
    limit: int = 0
    """Probe with the first pairs of the file only (pairs); 0 is all."""
    sampler: SamplerKind = "auto"
    """What runs the model; auto: vllm where it is installed and suits the device, else torch."""
    digests: tyro.conf.Suppress[str] = ""  # of model, data and prompt file, filled in by the script


def load_judge(cfg: Probes, asked: Asked) -> Judge:
    if cfg.scalar:
        from judging.scalar import load_scalar

        model = load_scalar(cfg.model, cfg.dtype)
        return lambda pairs: judge_scalar(model, pairs, both_orders=True)
    kept = Path(cfg.out, "replies.jsonl")
    sampler: Any = (cfg.connect(kept, asked) if cfg.base_url else
                    load_sampler(cfg.model, cfg.dtype, cfg.sampler, template_args=cfg.template_args))
    return lambda pairs: judge_pairs(sampler, pairs, asked.style, max_tokens=asked.max_tokens, both_orders=True,
                                     temperature=cfg.sampling_temperature(), rule=cfg.rule, system=asked.wording)


def probe(cfg: Probes) -> dict[str, Any]:
    """Judge what is not judged yet, probe by probe; write and return the numbers."""
    pairs = load_benchmark(cfg.benchmark, cfg.data)[: cfg.limit or None]
    if ready := next((pair for pair in pairs if pair.messages is not None), None):
        raise UserError(f"pair {ready.pair_id}: a ready-made prompt cannot be changed; give pairs with responses")
    pairs = [replace(pair, pair_id=f"{pair.pair_id}#{i}", trace=None) for i, pair in enumerate(pairs)]
    asked, weights = cfg.asked(cfg.max_tokens, loads=not cfg.scalar), ""
    if not cfg.base_url:
        from loading.folder import weights_digest

        weights = weights_digest(cfg.model)
    cfg = replace(cfg, style=asked.style, max_tokens=asked.max_tokens, template_args=asked.flags(),
                  digests=seeds.digest([weights, save_pairs(pairs), asked.wording]))
    folder, judge, judged = RunFolder(cfg.out, cfg).path, None, {}
    for name, changed in probed(pairs).items():
        log = folder / f"{name.replace(' ', '_')}.jsonl"
        if not log.exists():
            judge = judge or load_judge(cfg, asked)
            disk.write_whole(log, "".join(dumps(asdict(j)) + "\n" for j in judge(changed)))
        judged[name] = [read_judgement(row, f"{log}:{number}") for number, row in disk.read_jsonl(log)]
    result = measure(pairs, judged)
    disk.write_whole(folder / "probes.json", dumps(result, indent=1) + "\n")
    return result


def main() -> None:
    show(probe(tyro.cli(Probes, description=__doc__)))


if __name__ == "__main__":
    cli.start(main)
