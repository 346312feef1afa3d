"""Does the reasoning cause the verdict? `python -m toy probe` writes a wrong solution for a judge and lets it go on."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cor_prompt import control_tokens, encode_prompt, encode_text, parse_trace, plain_tokenizer, render
from data import Pair
from evaluation.tables import as_text
from reward import parse_verdict
from rollout import TorchSampler, VLLMSampler, load_sampler
from runtime.cli import check_numbers, read_prompt
from runtime.disk import write_whole
from runtime.errors import UserError
from runtime.seeds import derive_seed
from toy.world import make_sum, numbers, write_solution


@dataclass(frozen=True)
class Probe:
    """Does the reasoning cause the verdict? Write a wrong solution for the judge and let it go on."""

    model: str  # The judge: a model folder, or a run folder that holds one.
    world: str  # Folder of the tiny world; its prompt.txt is used.
    out: str  # JSON file for the numbers.
    items: int = 200  # Held-out sums, drawn for this probe (sums).
    seed: int = 0  # Seed of the drawn sums (an integer); the judge decodes greedily.


def probe(cfg: Probe) -> None:
    check_numbers(cfg, "items")
    prompt_file = Path(cfg.world) / "prompt.txt"
    if not prompt_file.is_file():
        raise UserError(f"{prompt_file}: no such file; `python -m toy build {cfg.world}` writes it")
    rng = random.Random(derive_seed(cfg.seed, "probe"))
    sums = [make_sum(rng, held_out=True, pair_id=f"probe-{i}") for i in range(cfg.items)]
    rows = measure(load_sampler(cfg.model), sums, read_prompt(str(prompt_file)) or "")
    write_whole(Path(cfg.out), json.dumps(rows, indent=2) + "\n")
    shown = [[name.replace("_", " "), *("-" if value is None else str(value) for value in row.values())]
             for name, row in rows.items()]
    print(as_text("held-out sums, greedy", [["", "share", "n", "verdicts"], *shown]))


def measure(sampler: TorchSampler | VLLMSampler, sums: Sequence[Pair], system: str) -> dict[str, Any]:
    """{row: share, n, verdict_rate} of free generation, and of the two forced ones.

    `share` is over n: every sum, but for the forced rows the sums on which a verdict was given at all.
    """

    def mean(values: Sequence[bool]) -> float | None:
        return round(sum(values) / len(values), 4) if values else None

    def row(hits: Sequence[bool], texts: Sequence[str]) -> dict[str, Any]:
        rate = mean([parse_verdict(text) is not None for text in texts])
        return {"share": mean(hits), "n": len(hits), "verdict_rate": rate}

    free = go_on(sampler, sums, [""] * len(sums), system)
    right = [solution_is_right(text, pair) for text, pair in zip(free, sums, strict=True)]
    carry = [i for i, pair in enumerate(sums) if pair.meta["carry"] == "yes"]
    rows = {
        "verdict_right": row([parse_verdict(t) == p.winner for t, p in zip(free, sums, strict=True)], free),
        "solution_line_right": row(right, free),
        "solution_line_right_with_a_carry": row([right[i] for i in carry], [free[i] for i in carry]),
    }
    for name, whole in (("solution", True), ("last_line", False)):
        texts = go_on(sampler, sums, [forced_prefix(pair, whole) for pair in sums], system)
        verdicts = [(parse_verdict(text), pair.winner) for text, pair in zip(texts, sums, strict=True)]
        follows = [verdict != winner for verdict, winner in verdicts if verdict]
        rows[f"verdict_follows_a_forced_{name}"] = row(follows, texts)
    return rows


def forced_prefix(pair: Pair, whole: bool) -> str:
    """A chain up to `</solution>` whose result is the wrong response's number.

    whole: every line says so. Otherwise the last line alone, under working lines that are right.
    """
    a, b = numbers(pair.context[-1]["content"])
    wrong = numbers(pair.response_b if pair.winner == "A" else pair.response_a)[0]
    units, tens = a % 10 + b % 10, (a + b) // 10
    if whole:
        tens = wrong // 10
        units = 10 * min(1, max(0, tens - a // 10 - b // 10)) + wrong % 10
    solution = write_solution(a, b, units, units // 10, tens, wrong)
    return f"<type> Reasoning </type> <solution> {solution} </solution>"


def go_on(sampler: TorchSampler | VLLMSampler, pairs: Sequence[Pair], prefixes: Sequence[str],
          system: str) -> list[str]:
    """Greedy continuation of each prompt and of the beginning of its response, as text; a trace has 49 tokens."""
    tokenizer = sampler.tokenizer
    plain, control = plain_tokenizer(tokenizer), control_tokens(tokenizer)
    prompts = [
        encode_prompt(render(pair, "instruct", system), tokenizer) + encode_text(prefix, plain, control)
        for pair, prefix in zip(pairs, prefixes, strict=True)
    ]
    return [r.text for r in sampler.generate(prompts, 1, 0.0, 64, [0] * len(prompts))]


def solution_is_right(text: str, pair: Pair) -> bool:
    """Is the last line of the written solution the sum, digit by digit?"""
    last = (parse_trace(text).solution or "").rpartition(";")[2]
    return last.split() == list(str(sum(numbers(pair.context[-1]["content"]))))
