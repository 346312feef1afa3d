"""Text -> verdict -> reward. The verdict is the only thing that reinforcement learning rewards."""

from __future__ import annotations

from typing import Literal

from cor_prompt import Style, parse_trace

Rule = Literal["train", "eval", "official"]
Letter = Literal["A", "B"]

WINDOW = 80  # characters at the end of the text in which the training rule looks; the end-of-turn token is not text


def parse_verdict(text: str, rule: Rule = "train") -> Letter | None:
    """The letter whose tag occurs, once or several times; None if neither letter's tag occurs or both do.

    train:    literally <answer>[[A]]</answer> or <answer>[[B]]</answer>, wholly within the last 80 characters. Only
              these full tags count: a bare [[B]] changes nothing.
    eval:     [[A]] or [[B]] after the last </think>; without </think> in the whole text.
    official: [[A]] or [[B]] in the whole text, thoughts included, as the authors' evaluation does.

    >>> parse_verdict("<answer>[[A]]</answer>"), parse_verdict("<answer> [[A]] </answer>")
    ('A', None)
    >>> parse_verdict("<think>[[A]] or [[B]]?</think> [[B]]", "eval")
    'B'
    """
    if rule == "train":
        seen, a, b = text[-WINDOW:], "<answer>[[A]]</answer>", "<answer>[[B]]</answer>"
    else:
        seen, a, b = text if rule == "official" else text.rpartition("</think>")[2], "[[A]]", "[[B]]"
    if (a in seen) == (b in seen):
        return None
    return "A" if a in seen else "B"


def open_thought(text: str) -> bool:
    """Whether the text is a thought that has no end: where it was cut off, nothing in it is a verdict."""
    return text.lstrip().startswith("<think>") and "</think>" not in text


def verdict_reward(text: str, winner: str) -> float:
    """+1.0 for the right verdict under the training rule, -1.0 for anything else. Eq. 8"""
    if winner not in ("A", "B"):
        raise ValueError(f"winner must be 'A' or 'B', not {winner!r}")
    return 1.0 if parse_verdict(text) == winner else -1.0


def format_reward(text: str, style: Style) -> float:
    """1.0 if the chain has every part that its style asks for, else 0.0. For the cold-start ablation, Eq. 11.

    instruct: a type, then a solution (Reasoning) or a rubric (Chat), an eval and a verdict;
    rubrics: a rubric, an eval and a verdict; reasoning and plain: a verdict at the end.
    """
    trace = parse_trace(text)
    if trace.answer not in ("[[A]]", "[[B]]") or parse_verdict(text) is None:
        return 0.0
    if style in ("reasoning", "plain"):
        return 1.0
    if style == "instruct":
        plan = {"Reasoning": trace.solution, "Chat": trace.rubric}.get(trace.type or "")
    else:
        plan = trace.rubric
    return 1.0 if plan and trace.eval else 0.0
