"""Comparisons whose messages name the value that was expected, and a tensor's shape."""

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


def close(what: str, got: Any, expected: Any, tolerance: float = 1e-4, hint: str = "") -> None:
    """Numbers in nested lists, within a tolerance relative and absolute. `hint` ends the message of one number."""
    if shape(got) != shape(expected):
        came = str(shape(got)) if isinstance(got, (list, int, float)) else repr(got)
        pytest.fail(f"{what}: expected shape {shape(expected)}, got {came}\n"
                    f"expected {short(expected)}\ngot      {short(got)}", pytrace=False)
    flat_got, flat_expected = list(flat(got)), list(flat(expected))
    wrong = [i for i, (g, e) in enumerate(zip(flat_got, flat_expected, strict=True)) if not near(g, e, tolerance)]
    if wrong and not isinstance(expected, list):
        pytest.fail(f"{what}: expected {expected!r}, got {got!r}\n{hint}".rstrip(), pytrace=False)
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
    """Anything that is not a tensor of floats: texts, names, calls, ids."""
    if got != expected:
        texts = isinstance(got, str) and isinstance(expected, str)
        first = f"\n{difference(got, expected)}" if texts else ""
        pytest.fail(f"{what}{first}\nexpected {expected!r}\ngot      {got!r}", pytrace=False)


def difference(got: str, expected: str) -> str:
    """Where two texts part, and how each goes on from there."""
    same = (g == e for g, e in zip(got, expected, strict=False))
    at = next((i for i, alike in enumerate(same) if not alike), min(len(got), len(expected)))
    parts = [repr(text[at : at + 40]) if text[at:] else "the end of the text" for text in (expected, got)]
    return f"first difference at character {at} (from 0): expected {parts[0]}, got {parts[1]}"


def holds(what: str, condition: bool) -> None:
    if not condition:
        pytest.fail(what, pytrace=False)
