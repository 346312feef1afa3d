"""judge.json: how a model is asked and where it came from, written beside its weights and read wherever it is used."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import indent
from typing import Any

from loading.folder import model_folder
from loading.templates import parse_arguments
from runtime.disk import read_json
from runtime.errors import UserError
from runtime.ranks import program, rank

NAME = "judge.json"
KINDS: dict[str, Any] = {"style": str, "wording": (str, type(None)), "max_tokens": int, "template_args": dict}


@dataclass(frozen=True)
class Asked:
    """How a judge is asked; the defaults are for a model without judge.json."""

    style: Any = "instruct"  # a Style of cor_prompt.py
    wording: str | None = None  # None: the style's built-in wording
    max_tokens: int = 2048  # longest response
    template_args: Mapping[str, Any] = field(default_factory=dict)

    def flags(self) -> tuple[str, ...]:
        """The template arguments as --template-args gives them."""
        return tuple(f"{name}={json.dumps(value)}" for name, value in self.template_args.items())


def how_to_ask(model: str, *, style: Any = None, wording: str | None = None, max_tokens: int = 0,
               template_args: Sequence[str] = (), served: bool = False, default: Asked | None = None) -> Asked:
    """What the model's judge.json says, or without it `default`, except for what is given.

    Says what differs from the file, or that there is none.
    """
    if not served:
        say_unfinished(model)
    known = read_judge(model, served)
    given: dict[str, Any] = {"style": style, "wording": wording, "max_tokens": max_tokens}
    given = {name: value for name, value in given.items() if value or value == ""}  # a wording may be empty
    arguments = parse_arguments(template_args)
    if not known:
        asked = replace(default or Asked(), **given, template_args=arguments)
        whose = ("the wording of --prompt-file" if asked.wording is not None else
                 "the built-in wording (RM-R1's own checkpoints were trained with their authors' wording: "
                 "docs/judge.md has the command that gets it)")
        _say(f"{model} has no {NAME}: style {asked.style}, {whose}")
        return asked
    if known.get("prompt", "cor_prompt") != "cor_prompt":
        _say(f"{model} was trained with the prompt of {known['prompt']}.py and is shown another one here")
    known = {name: known[name] for name in KINDS}
    given["template_args"] = known["template_args"] | arguments
    for name, flag in (("style", "--style"), ("wording", "--prompt-file"), ("template_args", "--template-args")):
        if given.get(name, known[name]) != known[name]:
            _say(f"{flag}: {model} was trained with another one, as its {NAME} says; the flag counts")
    if given.get("style", known["style"]) != known["style"]:
        given.setdefault("wording", None)  # the model's wording is of its own style
    return Asked(**known | given)


def read_judge(model: str, served: bool = False) -> dict[str, Any]:
    """What judge.json says, {} without one. A served model has one if its name is a folder here."""
    if served and not Path(model).is_dir():
        return {}
    try:
        file = model_folder(model, weights=False) / NAME
    except UserError:
        if not served:
            raise
        return {}  # a folder that only has the served model's name
    return read_judge_file(file) if file.is_file() else {}


def read_judge_file(file: Path) -> dict[str, Any]:
    known: dict[str, Any] = read_json(file)
    for name, kind in KINDS.items():
        if not isinstance(known, dict) or name not in known or not isinstance(known[name], kind):
            raise UserError(f"{file}: {name!r} is missing or of another kind; remove the file, and choose by flags")
    if known["max_tokens"] < 1:
        raise UserError(f"{file}: max_tokens is {known['max_tokens']}, expected the tokens of the longest response")
    return known


def say_unfinished(run: str) -> None:
    """One line if a run folder's exported model is not its last one."""
    try:
        steps = read_json(Path(run, "config.json"))["steps"]
        lines = Path(run, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        done = json.loads(lines[-1])["step"] + 1
    except (UserError, OSError, ValueError, LookupError, TypeError):
        return
    if done < steps:
        _say(f"{run}: its run is not finished ({done} of {steps} steps); this is the model that it has exported so far")


def _say(line: str) -> None:
    if rank() == 0:
        print(line, file=sys.stderr, flush=True)


def made_by(function: Any) -> str:
    """The file of a function, without its suffix; of a partial or another callable object its type."""
    code = getattr(function, "__code__", None)
    return Path(code.co_filename).stem if code else type(function).__name__


def about(cfg: Any, asked: Asked, read: Mapping[str, str], prompt: Any = None) -> dict[str, Any]:
    """What judge.json says of a model that `cfg` trains; its template arguments are added from the tokenizer.

    `read` holds digests of what was read, `prompt` is the function that makes the messages, if it is not cor_prompt's.
    """
    command = f"{program()} {shlex.join(sys.argv[1:])}"
    return {"style": asked.style, "wording": asked.wording, "max_tokens": asked.max_tokens,
            "prompt": made_by(prompt) if prompt else "cor_prompt",
            "trained_by": type(cfg).__name__.removesuffix("Config"), "base": cfg.model, "data": cfg.data,
            "digests": dict(read), "command": command}


def card(judge: Mapping[str, Any]) -> str:
    """README.md of an export, which is its page once the folder is uploaded."""
    base, prompt = judge["base"], judge["prompt"]
    on_hub = f"base_model: {base}\n" if base.count("/") == 1 and not Path(base).exists() else ""
    verdict = "Its last words are `<answer>[[A]]</answer>` or `<answer>[[B]]</answer>`."
    verdict = verdict if prompt == "cor_prompt" else f"Prompt and verdict are those of `{prompt}.py`."
    wording = indent(judge["wording"] or "(the built-in one of its style)", "    ")
    return f"""---
library_name: transformers
{on_hub}---
# A judge that reasons before it names the better response

Trained by {judge["trained_by"]} from `{base}` on `{judge["data"]}`:

    {judge["command"]}

`{NAME}` says how it is asked, and `judge.py` reads it there: style `{judge["style"]}`, at most
{judge["max_tokens"]} tokens, template arguments `{json.dumps(judge["template_args"])}`. {verdict} The wording:

{wording}
"""
