"""Outputs without a verdict: why, in words, and what to do where there is nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping

from judging.verdicts import Judgement
from runtime.errors import UserError


class NothingJudged(UserError):
    """Not one output gave a verdict: a script writes its files, says the likely cause and ends with this code."""

    exit_code = 1


def why_silent(judgement: Judgement) -> str:
    """Why an output has no verdict."""
    j, text = judgement, judgement.text.rpartition("</think>")[2]
    if j.finish_reason == "length":
        return "cut off" if j.response_tokens else "prompt too long"
    if re.fullmatch(r"A \S+ B \S+", text):  # what judging.pointwise.judge_scalar writes
        return "no readable score" if "nan" in text else "equal scores"
    if said := re.fullmatch(r"\(no reply: (.*)\)", text):  # what judging.endpoint writes
        return f"no reply: {said[1]}"
    letters = {letter for letter in "AB" if f"[[{letter}]]" in text}
    if letters:
        return "both letters" if len(letters) == 2 else "letter in the wrong place"
    if "<answer>" in text or "[[" in text:
        return "verdict in another form"
    return "no verdict tag" if text.strip() else "nothing written"


def reasons(silent: Mapping[str, int]) -> str:
    """Reasons of `why_silent` and how often each, in words."""
    return ", ".join(f"{number} {why}" for why, number in silent.items())


def likely_cause(silent: Mapping[str, int]) -> str:
    """Reasons of `why_silent` and how often each -> what to say when there is nothing else."""
    why, number = max(silent.items(), key=lambda item: item[1])
    other = "is it an untrained model, or trained with another --style or --prompt-file?"
    remedy = {"cut off": "raise --max-tokens", "prompt too long": "the model's context is too short for these pairs",
              "no reply: content filter": "this server refuses the texts", "no reply: empty": "this server sends empty "
              "texts"}.get(why, other)
    return f"none of {sum(silent.values())} outputs has a verdict; {number} of them: {why}; {remedy}"
