"""Assignment 4: one token from a distribution, and prompts of uneven length through the model at once."""

from __future__ import annotations

import math

import pytest
from checks import close, equal, holds

P = [0.5, 0.25, 0.125, 0.125]


def heated(probabilities, temperature):
    powers = [p ** (1 / temperature) for p in probabilities]
    return [p / sum(powers) for p in powers]


@pytest.mark.visible
@pytest.mark.points("draw", 2)
def test_draw_a_uniform_number_picks_its_slice(ask):
    uniforms = [0.1, 0.49, 0.6, 0.8, 0.9]
    got = ask("drawn", [P] * 5, 1.0, uniforms)
    equal(f"draw: ids of p = {P} at u = {uniforms}", got["ids"], [0, 0, 1, 2, 3])
    close("draw: log-probs", got["logprobs"], [math.log(P[i]) for i in (0, 0, 1, 2, 3)])


@pytest.mark.points("draw", 1)
def test_draw_logits_need_not_be_normalised(ask):
    got = ask("drawn", [P, P], 1.0, [0.6, 0.9], 3.5)
    equal("draw: ids of log p + 3.5", got["ids"], [1, 3])
    close("draw: log-probs of log p + 3.5", got["logprobs"], [math.log(0.25), math.log(0.125)])


@pytest.mark.points("draw", 1)
def test_draw_temperature_changes_the_slices_and_the_log_probs(ask):
    for temperature in (0.5, 2.0):
        hot = heated(P, temperature)
        ends = [sum(hot[: i + 1]) for i in range(4)]
        uniforms = [end - 0.01 for end in ends] + [end + 0.01 for end in ends[:3]]
        got = ask("drawn", [P] * 7, temperature, uniforms)
        equal(f"draw at temperature {temperature}, u = {uniforms}: ids", got["ids"], [0, 1, 2, 3, 1, 2, 3])
        close(f"draw at temperature {temperature}: log-probs after temperature", got["logprobs"],
              [math.log(hot[i]) for i in got["ids"]])


@pytest.mark.points("draw", 1)
def test_draw_temperature_zero_is_the_largest_logit(ask):
    rows = [[0.1, 0.2, 0.6, 0.1], [0.4, 0.3, 0.2, 0.1]]
    got = ask("drawn", rows, 0.0, [0.0, 0.99])
    equal("draw at temperature 0: ids", got["ids"], [2, 0])
    close("draw at temperature 0: log-probs at temperature 1", got["logprobs"], [math.log(0.6), math.log(0.4)])


@pytest.mark.points("draw", 1)
def test_draw_the_ends_of_the_interval_and_impossible_tokens(ask):
    """u = 0 must not pick a token without probability, and the largest u stays inside the vocabulary."""
    rows = [[0.0, 0.5, 0.5, 0.0], [0.0, 0.5, 0.5, 0.0], [0.5, 0.5, 0.0, 0.0]]
    got = ask("drawn", rows, 1.0, [0.0, 1 - 2**-24, 0.5])
    equal("draw: ids at u = 0, 1 - 2**-24 and on an edge (which belongs to the next token)", got["ids"], [1, 2, 1])


@pytest.mark.visible
@pytest.mark.points("_prefill", 3)
def test_prefill_two_prompts_of_uneven_length(ask):
    got = ask("prefill", [[5, 6, 7], [8]])
    equal("_prefill: ids, the short prompt's at the end", [got["ids"][0], got["ids"][1][2:]], [[5, 6, 7], [8]])
    equal("_prefill: positions begin at 0 with the prompt", [got["positions"][0], got["positions"][1][2:]],
          [[0, 1, 2], [0]])
    equal("_prefill returns _forward's logits, a row a prompt", got["logits"], [[7.0] * 3] * 2)


@pytest.mark.points("_prefill", 3)
def test_prefill_shows_nobody_padding_or_what_comes_later(ask):
    prompts = [[1, 2], [3, 4, 5, 6], [7, 8, 9]]
    got = ask("prefill", prompts)
    equal("_prefill: the mask is (P, 1, T, T) and boolean",
          [len(got["mask"]), len(got["mask"][0]), len(got["mask"][0][0]), got["bool"]], [3, 1, 4, True])
    for p, prompt in enumerate(prompts):
        pad = 4 - len(prompt)
        expected = [[pad <= k <= q for k in range(4)] for q in range(pad, 4)]
        equal(f"_prefill: mask of prompt {p} of {prompts}, from its first token on", got["mask"][p][0][pad:], expected)
        equal(f"_prefill: positions of prompt {p}", got["positions"][p][pad:], list(range(len(prompt))))


@pytest.mark.points("_prefill", 2)
def test_prefill_padding_has_something_to_see_and_a_position(ask):
    """A row of the mask without a True gives NaN, and a negative position is none."""
    got = ask("prefill", [[1, 2, 3, 4, 5], [9]])
    holds(
        f"_prefill: each row of the mask needs a True: {got['mask'][1][0]}", all(any(row) for row in got["mask"][1][0])
    )
    holds(f"_prefill: positions from 0 on: {got['positions'][1]}", min(got["positions"][1]) >= 0)
    equal("_prefill: shape of ids", [len(row) for row in got["ids"]], [5, 5])
