"""Knockout and win rates: by hand, and what must hold for any results."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import given, settings, strategies as st

from judging import ranking
from judging.ranking import Table, knockout, win_rates


def all_pairs(count):
    return list(combinations(range(count), 2))


def rates(count, compare):
    """Of a round robin."""
    return win_rates(count, all_pairs(count), compare(all_pairs(count)))


def stronger(strengths, calls=None):
    """A judge who never errs."""

    def compare(matches):
        if calls is not None:
            calls.append(list(matches))
        return [1.0 if strengths[i] > strengths[j] else 0.0 if strengths[i] < strengths[j] else 0.5 for i, j in matches]

    return compare


# ---- knockout ------------------------------------------------------------------------------------------


def test_knockout_by_hand(monkeypatch):
    """Bracket 0 1 2 3 4: 1 and 2 win, 4 has the bye and plays first in the next level."""
    monkeypatch.setattr(ranking.random.Random, "shuffle", lambda self, level: None)
    calls = []
    survived = knockout(5, stronger([1, 4, 5, 2, 3], calls))
    assert calls == [[(0, 1), (2, 3)], [(4, 1)], [(2, 1)]]
    assert survived == [0, 2, 3, 0, 1] and survived.index(max(survived)) == 2


def test_a_match_without_a_winner_goes_to_the_draw():
    firsts = {knockout(2, lambda matches: [0.5], seed).index(1) for seed in range(20)}
    assert firsts == {0, 1}


@given(st.integers(0, 40), st.integers(0, 1000), st.data())
def test_knockout_asks_n_minus_1_and_finds_the_best(count, seed, data):
    strengths, calls = data.draw(st.permutations(range(count))), []
    survived = knockout(count, stronger(strengths, calls), seed)
    played = [match for level in calls for match in level]
    assert len(played) == max(0, count - 1) and len({frozenset(match) for match in played}) == len(played)
    assert len(calls) == (math.ceil(math.log2(count)) if count else 0), "a level is one call"
    for level in calls:
        seats = [i for match in level for i in match]
        assert len(seats) == len(set(seats))
    if count:
        assert survived.count(max(survived)) == 1 and strengths[survived.index(max(survived))] == count - 1


def test_the_bracket_is_seeded():
    def brackets(seed):
        calls = []
        knockout(8, stronger(range(8), calls), seed)
        return calls

    assert brackets(1) == brackets(1) and len({str(brackets(seed)) for seed in range(10)}) > 5


@given(st.integers(0, 1000))
def test_nobody_has_two_byes_in_a_row(seed):
    calls = []
    knockout(13, stronger(range(13), calls), seed)
    seats = [{i for match in level for i in match} for level in calls]
    for before, after, then in zip(seats, seats[1:], seats[2:], strict=False):
        assert not (then - after - before), "someone who sat out twice"


# ---- win rates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_win_rates_of_a_round_robin(count):
    assert rates(count, stronger(range(count))) == ([0.5] if count == 1 else [i / (count - 1) for i in range(count)])


def outcomes_of(count):
    size = count * (count - 1) // 2
    return st.tuples(st.just(count), st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=size, max_size=size))


@given(st.integers(2, 7).flatmap(outcomes_of), st.data())
def test_neither_order_nor_side_nor_number_matters(drawn, data):
    count, outcomes = drawn
    results = [(i, j, outcome) for (i, j), outcome in zip(all_pairs(count), outcomes, strict=True)]
    new, rng = data.draw(st.permutations(range(count))), data.draw(st.randoms(use_true_random=False))
    turned = [(new[j], new[i], 1 - o) if rng.random() < 0.5 else (new[i], new[j], o) for i, j, o in results]
    rng.shuffle(turned)
    here, renamed = (win_rates(count, [(i, j) for i, j, _ in those], [o for *_, o in those])
                     for those in (results, turned))
    assert [renamed[new[i]] for i in range(count)] == pytest.approx(here) and sum(here) == pytest.approx(count / 2)


# ---- the table -----------------------------------------------------------------------------------------


class Asked:
    """Answers by a rule on the texts and counts what it was asked."""

    def __init__(self, rule=lambda first, second: 1.0 if first > second else 0.0):
        self.rule, self.seen, self.calls = rule, [], 0

    def __call__(self, shown):
        self.seen += shown
        self.calls += 1
        return [self.rule(*pair) for pair in shown]


def test_the_table_asks_nothing_twice():
    ask = Asked()
    table = Table(["a", "c", "b", "c"], ask)
    assert table([(0, 1), (1, 0), (0, 3), (1, 3)]) == [0.0, 1.0, 0.0, 0.5]
    assert table.asked == len(ask.seen) == ask.calls == 1, "two equal texts are one opponent, and draw"
    assert rates(4, table) == [0.0, 2.5 / 3, 1 / 3, 2.5 / 3]
    assert table.asked == len(ask.seen) == 3 and ask.calls == 2
    assert max(range(4), key=knockout(4, table).__getitem__) in (1, 3) and ask.calls == 2
    assert table([]) == [] and table([(0, 2)]) == [0.0]


@settings(max_examples=30)
@given(st.lists(st.text(max_size=3), min_size=2, max_size=6, unique=True), st.integers(0, 50), st.data())
def test_places_in_the_list_mean_nothing_even_to_a_biased_judge(texts, seed, data):
    """The judge always takes what is shown first: then the coin decides, not the numbering."""
    order = data.draw(st.permutations(range(len(texts))))
    always_first = Asked(lambda first, second: 1.0)
    here = rates(len(texts), Table(texts, always_first, seed))
    moved = [texts[i] for i in order]
    there = rates(len(texts), Table(moved, always_first, seed))
    assert [here[i] for i in order] == pytest.approx(there)


def test_the_coin_is_fair():
    table = Table([str(i) for i in range(80)], Asked(lambda first, second: 1.0))
    firsts = sum(table(all_pairs(80)))
    assert 0.46 < firsts / 3160 < 0.54
