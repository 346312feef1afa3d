"""The tiny world: pairs, teacher, tokenizer and untrained model, small enough for one CPU.

    python -m toy build runs/toy                                                  # writes a folder, seconds
    python -m toy probe --model runs/toy/grpo --world runs/toy --out probe.json  # does reasoning matter?
    python -m toy serve                                                           # the teacher, for prepare/distill.py

Half the pairs ask for a sum of two numbers (Reasoning), half for a sentence that keeps three rules (Chat).
The teacher that writes the SFT traces reasons step by step and lets its verdict follow from its written
checks, but it has two systematic blind spots: it forgets the carry, and it takes everybody for polite.
Imitation copies most of both. Reinforcement on verdicts can remove them, because the teacher is right often enough
for samples to differ. This room for improvement is built in, so the gains say nothing about large models.
When the teacher is told the right verdict, as in pass 2 of distillation, it either redoes its wrong step, or keeps its
wrong reasoning and forces the verdict. `probe` measures what the second does to a judge's honesty.

Nothing but the files of this folder knows that the world is a toy: it is read like any model folder
and data file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tyro

from runtime.cli import start
from runtime.ranks import program
from toy.files import Build, build
from toy.oracle import Serve, serve
from toy.probe import Probe, probe


def main() -> None:
    commands: dict[type, Callable[..., None]] = {Build: build, Probe: probe, Serve: serve}
    configs: Any = {command.__name__.lower(): command for command in commands}
    cfg = tyro.extras.subcommand_cli_from_dict(configs, prog=program(), description=__doc__)
    commands[type(cfg)](cfg)


if __name__ == "__main__":
    start(main)
