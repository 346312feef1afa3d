"""Comparisons whose messages name the shape and the value that were expected."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest


def shape(value: Any) -> tuple[int, ...]:
    """The shape of nested lists, as of a tensor; () for a number. Uneven lists count as far as they are even."""
    if not isinstance(value, list):
        return ()
    inner = {shape(part) for part in value}
    return (len(value), *(inner.pop() if len(inner) == 1 else ()))


def close(what: str, got: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Numbers in nested lists, within a tolerance relative and absolute."""
    if shape(got) != shape(expected):
        pytest.fail(f"{what}: expected shape {shape(expected)}, got {shape(got)}\n"
                    f"expected {short(expected)}\ngot      {short(got)}", pytrace=False)
    flat_got, flat_expected = list(flat(got)), list(flat(expected))
    wrong = [i for i, (g, e) in enumerate(zip(flat_got, flat_expected, strict=True)) if not near(g, e, tolerance)]
    if wrong and not isinstance(expected, list):
        pytest.fail(f"{what}: expected {expected!r}, got {got!r}", pytrace=False)
    if wrong:
        pytest.fail(f"{what}, shape {shape(expected)}: {len(wrong)} of {len(flat_expected)} values differ, the first "
                    f"at {wrong[0]}: expected {flat_expected[wrong[0]]!r}, got {flat_got[wrong[0]]!r}\n"
                    f"expected {short(expected)}\ngot      {short(got)}", pytrace=False)


def near(got: Any, expected: Any, tolerance: float) -> bool:
    if isinstance(got, bool) != isinstance(expected, bool):  # True is no 1.0 where numbers were asked for
        return False
    numbers = all(isinstance(x, (int, float)) for x in (got, expected))
    return math.isclose(got, expected, rel_tol=tolerance, abs_tol=tolerance) if numbers else got == expected


def flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for part in value:
            yield from flat(part)
    else:
        yield value


def short(value: Any) -> str:
    def rounded(part: Any) -> Any:
        if isinstance(part, list):
            return [rounded(inner) for inner in part]
        return float(f"{part:.5g}") if isinstance(part, float) else part

    text = repr(rounded(value))
    return text if len(text) < 600 else text[:600] + " ..."


def equal(what: str, got: Any, expected: Any) -> None:
    if got != expected:
        about = f", shape {shape(expected)}" if isinstance(expected, list) else ""
        pytest.fail(f"{what}{about}\nexpected {expected!r}\ngot      {got!r}", pytrace=False)


def holds(what: str, condition: bool) -> None:
    if not condition:
        pytest.fail(what, pytrace=False)
