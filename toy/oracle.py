"""The tiny world's teacher as an oracle behind an OpenAI-compatible endpoint: `python -m toy serve`, for distill.py.

When it is told the right verdict, as in pass 2 of distillation, it either redoes its wrong step, or keeps its wrong
reasoning and forces the verdict. toy/probe.py measures what the second does to a judge's honesty.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data import Message, Pair
from judging import serving
from runtime.errors import UserError
from runtime.seeds import derive_seed
from toy.files import pieces
from toy.world import CLEAN, Flaws, teach, user


@dataclass(frozen=True)
class Serve:
    """Answer an OpenAI-compatible endpoint as the teacher; with the verdict in the prompt, repair the chain."""

    port: int = 8377  # Port on this machine, 127.0.0.1; 0 takes a free one. The address is printed.
    # Seed of the teacher's slips (an integer). A reply depends on it, the prompt and the request's seed alone.
    seed: int = 0
    # What it does when told the verdict: redo takes every step again without errors; force keeps the failed chain and
    # replaces its verdict.
    repair: Literal["redo", "force"] = "redo"


_PROMPT = re.compile(
    r"\[Client Question\]\n(.*)\n\n\[The Start of Chatbot A's Response\]\n(.*)\n\[The End of Chatbot A's Response\]"
    r"\n\n\[The Start of Chatbot B's Response\]\n(.*)\n\[The End of Chatbot B's Response\](.*)", re.DOTALL)
_TOLD = re.compile(r"\s*\[The Start of [^\]]+\]\n(.*)\n\[The End of [^\]]+\].*<answer>\[\[([AB])\]\]</answer>",
                   re.DOTALL)


def answer(messages: Sequence[Message], rng: random.Random, cfg: Serve) -> str:
    """The oracle's chain for a rendered prompt of this world; ValueError for any other prompt.

    In pass 2 the pair is followed by the failed judgement, in a section, and by the verdict.
    """
    found = _PROMPT.fullmatch(messages[-1]["content"])
    if not found:
        raise ValueError("no pair of the tiny world in the last message")
    question, first, second, rest = found.groups()
    category = "Reasoning" if question.startswith("what is") else "Chat"
    pair = Pair("", "toy", (user(question),), first, second, "A", category)  # its winner is not looked at
    told = _TOLD.match(rest)
    try:
        if told:
            return repair(pair, told[1], told[2], cfg.repair)
        return teach(pair, rng, Flaws())
    except (ValueError, IndexError, KeyError):
        raise ValueError("a question or response that this world does not have") from None


def repair(pair: Pair, failed: str, verdict: str, kind: Literal["redo", "force"]) -> str:
    """A chain by a teacher who knows the verdict. A forced verdict does not follow from the checks above it. A redone
    one does, and does not obey a wrong label."""
    if kind == "redo":
        return teach(pair, random.Random(0), CLEAN)
    kept, tag, _ = failed.rpartition("<answer>")
    return f"{kept if tag else failed + ' '}<answer>[[{verdict}]]</answer>"


def completion(body: dict[str, Any], cfg: Serve) -> dict[str, Any]:
    """A chat request -> a chat completion; tokens are the tiny tokenizer's. ValueError for what cannot be answered."""
    messages, limit = body["messages"], body.get("max_tokens") or body.get("max_completion_tokens") or 256
    if body.get("n", 1) != 1:
        raise ValueError("one reply a request")
    token = re.compile(pieces())
    text = answer(messages, random.Random(derive_seed(cfg.seed, json.dumps(messages), body.get("seed"), 0)), cfg)
    ends = [match.end() for match in token.finditer(text)]
    cut = len(ends) >= limit  # the end of turn is a token too
    message = {"role": "assistant", "content": text[: ends[limit - 1]] if cut else text}
    choices = [{"index": 0, "message": message, "finish_reason": "length" if cut else "stop"}]
    written = limit if cut else len(ends) + 1
    asked = sum(3 + len(token.findall(m["content"])) for m in messages) + 2  # a message's role and two control tokens
    usage = {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written}
    return {"id": "toy", "object": "chat.completion", "created": 0, "model": body.get("model", ""),
            "choices": choices, "usage": usage}


def make_server(cfg: Serve) -> serving.Server:
    def reply(path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path != "/v1/chat/completions":
            raise serving.Refused(404, "only /v1/chat/completions is here")
        try:
            return completion(body, cfg)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"{type(error).__name__}: {error}") from None

    return serving.Server(reply, "127.0.0.1", cfg.port)


def serve(cfg: Serve) -> None:
    with make_server(cfg) as server:
        print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
        server.serve_forever()
