"""A world of toy/ for judges with prompts and verdicts of their own: the same pairs, teacher and weights.

    python -m variants.toy_forms runs/toy runs/toy-scores --form scores     # for variants/grm.py
    python -m variants.toy_forms runs/toy runs/toy-boxed --form boxed       # for variants/rrm.py

The teacher's chains stay as they are up to their verdict, which is written in the other form: a box with the two
responses' scores (1 and one more for each kept rule; a sum is right, 4, or wrong, 1), or a box with the better one's
name. Checks still call the first response A and the second B. Where the teacher's checks tie, its verdict was a coin;
its scores tie, which is wrong. The prompts become ready-made ones, so that sft.py needs to know of nothing; the words
that the tokenizer lacks take the places that it keeps free.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import variants.grm as grm
import variants.rrm as rrm
from cor_prompt import parse_trace, section
from data import load_pairs, save_pairs
from runtime import cli
from runtime.disk import read_json
from runtime.errors import UserError
from runtime.ranks import program
from toy.files import write_folder

MARKERS = [marker for i in (1, 2) for marker in section(f"Response {i}", "").split("\n\n")]
WORDS = [*MARKERS, *rrm.BOXES.values(), "\\boxed{", "}", ","]


@dataclass(frozen=True)
class Config:
    """Write a world in another form."""

    # Folder that `python -m toy build` wrote, with whole chains (--traces cor).
    world: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WORLD")]
    # Folder to write. It must be missing or empty, or hold the same.
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]
    form: Literal["scores", "boxed"] = "scores"  # How the verdict is written.


def scored(trace: str) -> str:
    """
    >>> scored("<eval> polite A here no B please yes ; total A 0 B 1 </eval> <answer>[[B]]</answer>")
    '<eval> polite A here no B please yes ; total A 0 B 1 </eval> \\\\boxed{ 1 , 2 }'
    >>> scored("<eval> A 8 8 yes 1 3 no wrong ; B 8 8 yes 3 3 yes right </eval> <answer>[[B]]</answer>")[-16:]
    ' \\\\boxed{ 1 , 4 }'
    """
    checks = (parse_trace(trace).eval or "").split(" ; ")
    total = re.fullmatch(r"total A (\d) B (\d)", checks[-1])
    scores = [int(n) + 1 for n in total.groups()] if total else [4 if c.endswith(" right") else 1 for c in checks]
    return trace.partition("<answer>")[0] + f"\\boxed{{ {scores[0]} , {scores[1]} }}"


def boxed(trace: str) -> str:
    """
    >>> boxed("<eval> ... </eval> <answer>[[B]]</answer>")
    '<eval> ... </eval> \\\\boxed{Assistant 2}'
    """
    chain, _, verdict = trace.partition("<answer>")
    return chain + rrm.BOXES["A" if verdict.startswith("[[A]]") else "B"]


def more_words(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json with WORDS in the places of unused entries; every other word keeps its id."""
    vocabulary, pattern = tokenizer["model"]["vocab"], tokenizer["pre_tokenizer"]["pattern"]
    free = sorted((word for word in vocabulary if word.startswith("<|unused_")), key=vocabulary.__getitem__)
    if len(free) < len(WORDS):
        raise UserError(f"this world's tokenizer has {len(free)} free places, and {len(WORDS)} words need one")
    for word, place in zip(WORDS, free, strict=False):
        vocabulary[word] = vocabulary.pop(place)
    pattern["Regex"] = "|".join([*map(re.escape, WORDS), pattern["Regex"]])  # whole boxes before `\boxed{`
    return tokenizer


def write(cfg: Config) -> None:
    world = Path(cfg.world)
    if not (world / "world.json").is_file():
        raise UserError(f"{world}: no world in it; `python -m toy build {world}` writes one")
    settings = read_json(world / "world.json") | {"form": cfg.form}
    if settings.get("traces", "cor") != "cor":
        raise UserError(f"{world} must hold whole chains (--traces cor); use another world")

    def fill(part: Path) -> None:
        system = cli.read_prompt(str(world / "prompt.txt"))
        prompt, ending = (grm.prompt, scored) if cfg.form == "scores" else (rrm.prompt, boxed)
        shutil.copytree(world / "start", part / "start")
        tokenizer = part / "start" / "tokenizer.json"
        tokenizer.write_text(json.dumps(more_words(read_json(tokenizer))), encoding="utf-8")
        for name in ("prompt.txt", "rl.jsonl", "held_out.jsonl"):
            shutil.copy(world / name, part / name)
        for name in ("sft.jsonl", "sft_held_out.jsonl"):
            pairs = [replace(pair, messages=tuple(prompt(pair, "instruct", system)), trace=ending(pair.trace or ""))
                     for pair in load_pairs(str(world / name))]
            (part / name).write_text(save_pairs(pairs), encoding="utf-8")

    write_folder(cfg.out, settings, fill)


if __name__ == "__main__":
    cli.start(lambda: write(tyro.cli(Config, prog=program())))
