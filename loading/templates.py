"""How a chat template treats a system message, texts, thoughts and dates."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from functools import lru_cache
from typing import Any

from runtime.errors import UserError
from runtime.ranks import rank

Messages = Sequence[Any]  # of {"role": ..., "content": ...}
DATE = "2024-07-26"  # what a template reads as today's date: the real one would change the prompt every day


def set_arguments(tokenizer: Any, arguments: Mapping[str, Any]) -> None:
    """Keep template arguments with the tokenizer; a template that asks for today's date gets a fixed one.

    UserError for an argument that the template does not use.
    """
    template = str(tokenizer.chat_template)
    dated = {"date": DATE} if "strftime_now" in template else {}
    for name in arguments:
        if name not in dated and not re.search(rf"\b{re.escape(name)}\b", template):
            raise UserError(f"--template-args {name}: the chat template of {tokenizer.name_or_path} does not use it")
    tokenizer.template_args = dated | dict(arguments)


def parse_arguments(given: Sequence[str]) -> dict[str, Any]:
    """
    >>> parse_arguments(["enable_thinking=false", "date=2025-03-01"])
    {'enable_thinking': False, 'date': '2025-03-01'}
    """
    found = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--template-args {pair}: expected name=value, such as enable_thinking=false")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def for_server(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a request that give a server's template its arguments; the date is named as Llama's templates do."""
    if not arguments:
        return {}
    dated = {"date_string": _date(arguments).strftime("%d %b %Y")} if "date" in arguments else {}
    return {"chat_template_kwargs": dated | dict(arguments)}


def _date(arguments: Mapping[str, Any]) -> date:
    try:
        return date.fromisoformat(arguments["date"])
    except (TypeError, ValueError):
        raise UserError(f"--template-args date={arguments['date']}: expected a date such as {DATE}") from None


def render_template(messages: Messages, tokenizer: Any, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    arguments = dict(getattr(tokenizer, "template_args", {}))
    if "date" in arguments:
        arguments["strftime_now"] = _date(arguments).strftime
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False,
                                                  add_generation_prompt=add_generation_prompt, **arguments)
    except TemplateError as error:
        raise UserError(f"the model's chat template refuses a conversation ({error})") from None
    return text


def skeleton(messages: Messages, tokenizer: Any, add_generation_prompt: bool) -> tuple[str, dict[str, str]]:
    """The rendered template with a sentinel in place of each text, and {sentinel: text}.

    A template may trim the blanks around a text. A sentinel contains what some templates change (quotes, `<`, line
    breaks). UserError if a sentinel does not come back exactly once: the template drops, repeats or changes that text.
    """
    if messages[0]["role"] == "system" and not _takes_system(tokenizer):
        messages = _without_system(messages)
    cores = [message["content"].strip() for message in messages]
    sentinels = [f"\ue000Text\n <&\"'{i}>\ue001" for i in range(len(messages))]
    frame = [{"role": m["role"], "content": m["content"].replace(core, sentinel) if core else m["content"]}
             for m, core, sentinel in zip(messages, cores, sentinels, strict=True)]
    rendered = render_template(frame, tokenizer, add_generation_prompt)
    for i, core in enumerate(cores):
        if core and rendered.count(sentinels[i]) != 1:
            raise UserError(f"the model's chat template drops, repeats or changes the text of message {i + 1} "
                            f"({messages[i]['role']}); use a template that shows every message once, as it is")
    return rendered, dict(zip(sentinels, cores, strict=True))


@lru_cache(maxsize=4)
def _takes_system(tokenizer: Any) -> bool:
    """Whether a system message reaches the prompt; says so once where it does not."""
    probe = [{"role": "system", "content": "\ue000"}, {"role": "user", "content": "\ue001"}]
    try:
        takes = "\ue000" in render_template(probe, tokenizer, True)
    except UserError:
        takes = False
    if not takes and rank() == 0:
        print("the chat template has no system role: the instructions open the first user turn", file=sys.stderr)
    return takes


def _without_system(messages: Messages) -> Messages:
    system, *rest = messages
    first = rest.pop(0)["content"] if rest and rest[0]["role"] == "user" else ""
    return [{"role": "user", "content": f"{system['content']}\n\n{first}".strip()}, *rest]


@lru_cache(maxsize=4)
def thought_of_prompt(tokenizer: Any) -> tuple[str, bool]:
    """(how a generation prompt opens a thought, such as "<think>\\n", or empty; whether it closes one)."""
    if not getattr(tokenizer, "chat_template", None):  # prompts that are ids from the start
        return "", False
    mark = "\ue000"
    end = render_template([{"role": "user", "content": mark}], tokenizer, True).rpartition(mark)[2]
    _, opening, after = end.rpartition("<think>")
    return ("" if not opening or "</think>" in after else opening + after), "</think>" in after
