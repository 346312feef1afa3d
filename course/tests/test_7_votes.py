"""Assignment 7: what an experiment counts: accuracy and consistency of single verdicts, majorities of votes."""

from __future__ import annotations

import itertools
import math

import pytest
from checks import close, equal


def counted(right, wrong, silent, k):
    """By listing every subset of k votes."""
    votes = [1] * right + [-1] * wrong + [0] * silent
    chosen = list(itertools.combinations(votes, k))
    return sum(sum(some) > 0 for some in chosen) / len(chosen)


@pytest.mark.visible
@pytest.mark.points("majority_chance", 2)
def test_majority_chance_votes_that_can_be_counted_on_fingers(ask):
    cases = [[2, 2, 0, 1], [3, 1, 0, 3], [2, 1, 0, 2], [0, 3, 0, 1]]
    close(f"majority_chance(right, wrong, silent, k) of {cases}", ask("vote_chances", cases), [0.5, 1.0, 1 / 3, 0.0])


@pytest.mark.points("majority_chance", 3)
def test_majority_chance_silent_votes_ties_and_larger_numbers(ask):
    cases = [
        list(case) for case in itertools.product(range(4), range(4), range(3), range(1, 4)) if sum(case[:3]) >= case[3]
    ]
    close("majority_chance(right, wrong, silent, k) of all small cases (a tie is wrong)", ask("vote_chances", cases),
          [counted(*case) for case in cases])
    many = 1 - sum(math.comb(20, i) * math.comb(13, 9 - i) for i in range(5)) / math.comb(33, 9)
    close("majority_chance(20, 13, 0, 9)", ask("vote_chances", [[20, 13, 0, 9]]), [many])


def shown(pair, order, verdict, winner, **more):
    return {"pair_id": pair, "order": order, "verdict": verdict, "winner": winner} | more


@pytest.mark.visible
@pytest.mark.points("tally", 2)
def test_tally_no_verdict_is_wrong(ask):
    rows = [shown("p", "AB", "A", "A", response_tokens=10), shown("q", "AB", "B", "A", response_tokens=20),
            shown("r", "AB", None, "B", response_tokens=60),
            shown("s", "AB", "B", "B", response_tokens=30)]
    got, expected = ask("tallied", rows), {"accuracy": 0.5, "verdict_rate": 0.75, "share_a": 1 / 3, "length_mean": 30.0,
                                           "count": 4}
    equal("tally: names, one order each", sorted(got), sorted(expected))
    for name, value in expected.items():
        close(f"tally: {name}", got[name], value)


@pytest.mark.points("tally", 2)
def test_tally_consistency_is_one_response_named_in_both_orders(ask):
    """Letters are as shown: the same response is A in one order and B in the other. Wrong twice is consistent."""
    rows = [shown("right", "AB", "A", "A"), shown("right", "BA", "B", "B"),
            shown("wrong", "AB", "B", "A"), shown("wrong", "BA", "A", "B"),
            shown("always A", "AB", "A", "A"), shown("always A", "BA", "A", "B"),
            shown("silent once", "AB", None, "A"), shown("silent once", "BA", "B", "B"),
            shown("silent twice", "AB", None, "A"), shown("silent twice", "BA", None, "B"),
            shown("one order", "AB", "A", "A")]
    close("tally: consistency of 5 pairs in both orders", ask("tallied", rows).get("consistency"), 0.4)


@pytest.mark.points("tally", 1)
def test_tally_samples_and_sources_are_kept_apart(ask):
    rows = [shown("p", "AB", "A", "A"), shown("p", "BA", "B", "B"),
            shown("p", "AB", "B", "A", sample=1), shown("p", "BA", "B", "B", sample=1),
            shown("p", "AB", "A", "A", source="t"), shown("p", "BA", "A", "B", source="t")]
    close("tally: consistency, sample by sample and source by source", ask("tallied", rows).get("consistency"), 1 / 3)
    got = ask("tallied", [])
    close("tally of nothing: accuracy, count", [got["accuracy"], got["count"]], [0.0, 0])
    close("tally: share of A where nobody speaks", ask("tallied", [shown("p", "AB", None, "A")])["share_a"], 0.0)
