"""A judge as the reward of another model's reinforcement: a writer is trained on the judge's verdicts alone.

    make demo                                   # leaves the tiny world and a trained judge behind
    python -m recipes.judge_as_reward --judge runs/toy/grpo --out runs/writer        # one minute, one core
    python -m recipes.judge_as_reward --judge rm-r1 --base-url http://localhost:8000/v1 --out runs/writer

The question comes to the writer as it stands, the writer answers G times, `Judge.rewards` has the judge compare
the G answers with each other, and an answer's win rate is its reward. `judge_score` is all that plugs a judge into
`grpo.train`; other trainers call `Judge.rewards` themselves, or the client in reward_client.py. The mean
reward is 0.5 whatever happens, because one's win is another's loss: look at something else to see progress.

The writer first learns the form of an answer from both responses of each pair, good and bad alike. What it is
measured by, the share of a request's rules that its sentences keep, neither it nor the judge is ever told.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

import grpo
import sft
from cor_prompt import Style
from data import Message, Pair, load_pairs, save_pairs
from judge import Judge
from judging.endpoint import EndpointSampler
from rollout import Chat, Rollout, load_sampler
from runtime import cli, disk
from runtime.ranks import program
from runtime.seeds import derive_seed
from toy.world import keeps


def judge_score(judge: Judge, both_orders: bool = True) -> Callable[..., torch.Tensor]:
    """`Method.score`: (P, G) rewards, each a response's win rate in its group; add rewards of your own here."""

    def score(
        rollouts: Sequence[Rollout], pairs: Sequence[Pair], policy: Any, tokenizer: Any, cfg: Any
    ) -> torch.Tensor:
        size = len(rollouts) // len(pairs)
        texts = [rollout.text for rollout in rollouts]
        groups = [(pair.context, texts[p * size : (p + 1) * size]) for p, pair in enumerate(pairs)]
        return torch.tensor(judge.rewards(groups, both_orders=both_orders))

    return score


def the_question(pair: Pair, style: Style, system: str | None) -> list[Message]:
    """`Method.prompt`: the writer sees what was asked and nothing of the pair's responses."""
    return list(pair.context)


@dataclass(frozen=True)
class Config:
    judge: str  # the judge: a run folder, or the name it is served under
    out: str  # folder for the writer's two runs
    base_url: str = ""  # address of the judge's server; empty: load --judge here
    world: str = "runs/toy"  # folder that `python -m toy build` wrote
    steps: int = 120  # rollout rounds of reinforcement
    seed: int = 0  # seed of data order and sampling


def requests(world: Path, name: str) -> list[Pair]:
    return [pair for pair in load_pairs(str(world / f"{name}.jsonl")) if pair.category == "Chat"]


def first_writer(world: Path, out: Path, seed: int) -> None:
    """A writer in out/sft that knows the form of an answer, from good and bad ones alike."""
    asks = requests(world, "rl")
    answers = [
        {"context_messages": list(pair.context), "winner": "A", "trace": response}
        for pair in asks
        for response in (pair.response_a, pair.response_b)
    ]
    disk.write_whole(out / "answers.jsonl", "".join(json.dumps(row) + "\n" for row in answers))
    disk.write_whole(out / "asks.jsonl", save_pairs(asks))
    sft.train(replace(sft.PRESETS["tiny"], model=str(world / "start"), data=str(out / "answers.jsonl"), held_out="",
                      prompt_file="", out=str(out / "sft"), epochs=3.0, seed=seed))


def measure(writer: Chat, fresh: Sequence[Pair], seed: int) -> float:
    """The share of the rules in `write: about boat; mention red; polite.` that one answer to each new request keeps. A
    text that is no sentence of five words keeps none."""
    seeds = [derive_seed(seed, "writer", i) for i in range(len(fresh))]
    replies = writer.chat([pair.context for pair in fresh], 1, 1.0, 12, seeds)
    rules = [pair.context[-1]["content"].removeprefix("write: ").rstrip(".").split("; ") for pair in fresh]
    asked = [(rule, reply.text) for listed, [reply] in zip(rules, replies, strict=True) for rule in listed]
    return statistics.fmean(len(text.rstrip(".").split()) == 5 and keeps(rule, text)[1] for rule, text in asked)


def main(cfg: Config) -> None:
    world, out = Path(cfg.world), Path(cfg.out)
    first_writer(world, out, cfg.seed)
    system = (world / "prompt.txt").read_text().removesuffix("\n")
    sampler = EndpointSampler(cfg.base_url, cfg.judge) if cfg.base_url else load_sampler(cfg.judge)
    judge = Judge(sampler, system=system, max_tokens=60, seed=cfg.seed)
    grpo.train(replace(grpo.PRESETS["tiny"], model=str(out / "sft"), data=str(out / "asks.jsonl"), held_out="",
                       prompt_file="", out=str(out / "grpo"), steps=cfg.steps, group_size=4, max_response_tokens=12,
                       seed=cfg.seed),
               grpo.Method(prompt=the_question, score=judge_score(judge)))

    fresh = requests(world, "held_out")
    for name in ("sft", "grpo"):
        kept = measure(load_sampler(str(out / name)), fresh, cfg.seed)
        print(f"{name:5} keeps {kept:.3f} of the rules of {len(fresh)} new requests")


if __name__ == "__main__":
    cli.start(lambda: main(tyro.cli(Config, prog=program())))
