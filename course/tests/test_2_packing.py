"""Assignment 2: who sees whom, packed rows with shared prompts, the loss of stage 1."""

from __future__ import annotations

import pytest
from checks import close, equal, holds

GROUP = [[1, 2, 3, 4], [[10, 11, 99], [20, 21, 22, 99], [30, 99]]]  # the example of batch.py's header


def whole(answer, name):
    return [line[name] for line in answer["lines"]]


@pytest.mark.visible
@pytest.mark.points("sees", 1)
def test_sees_who_sees_whom_in_one_group(ask):
    rows = ask("seen", [0] * 7, [0, 0, 1, 1, 2, 2, 3])
    expected = ["1000000", "1100000", "1110000", "1111000", "1100100", "1100110", "1100001"]
    equal("sees on response = [0, 0, 1, 1, 2, 2, 3], one group: row q, column k",
          ["".join("01"[x] for x in row) for row in rows], expected)


@pytest.mark.points("sees", 2)
def test_sees_groups_and_padding_do_not_see_each_other(ask):
    group, response = [0, 0, 0, 1, 1, 1, 1, -1, -1], [0, 1, 2, 0, 0, 1, 2, 0, 0]
    rows = ask("seen", group, response)
    expected = ["100000000", "110000000", "101000000", "000100000", "000110000", "000111000", "000110100",
                "000000010", "000000011"]
    equal(f"sees on group = {group}, response = {response}: row q, column k",
          ["".join("01"[x] for x in row) for row in rows], expected)


@pytest.mark.visible
@pytest.mark.points("_append", 3)
def test_append_the_example_of_the_header(ask):
    answer = ask("append", [[GROUP]], 10, False)
    equal("inputs", whole(answer, "inputs"), [[1, 2, 3, 4, 10, 11, 20, 21, 22, 30]])
    equal("position_ids", whole(answer, "position_ids"), [[0, 1, 2, 3, 4, 5, 4, 5, 6, 4]])
    equal("response", whole(answer, "response"), [[0, 0, 0, 0, 1, 1, 2, 2, 2, 3]])
    equal("group", whole(answer, "group"), [[0] * 10])
    equal("targets", answer["flat"]["targets"], [10, 11, 99, 20, 21, 22, 99, 30, 99])
    equal("source", answer["flat"]["source"], [3, 4, 5, 3, 6, 7, 8, 3, 9])
    equal("sequence", answer["flat"]["sequence"], [0, 0, 0, 1, 1, 1, 1, 2, 2])


@pytest.mark.points("_append", 3)
def test_append_two_groups_in_a_row_and_a_second_row(ask):
    """source counts in the flattened rows of width 8: the second row begins at 8."""
    answer = ask("append", [[[[1, 2], [[5, 6], [7, 8, 9]]], [[3], [[4, 5]]]], [[[6, 7, 8], [[9, 1]]]]], 8, False)
    equal("inputs", whole(answer, "inputs"), [[1, 2, 5, 7, 8, 3, 4], [6, 7, 8, 9]])
    equal("position_ids", whole(answer, "position_ids"), [[0, 1, 2, 2, 3, 0, 1], [0, 1, 2, 3]])
    equal("response", whole(answer, "response"), [[0, 0, 1, 2, 2, 0, 1], [0, 0, 0, 1]])
    equal("group", whole(answer, "group"), [[0] * 5 + [1] * 2, [2] * 4])
    equal("targets", answer["flat"]["targets"], [5, 6, 7, 8, 9, 4, 5, 9, 1])
    equal("source", answer["flat"]["source"], [1, 2, 1, 3, 4, 5, 6, 10, 11])
    equal("sequence", answer["flat"]["sequence"], [0, 0, 1, 1, 1, 2, 2, 3, 3])


@pytest.mark.points("_append", 1)
def test_append_empty_responses_and_responses_of_one_token(ask):
    answer = ask("append", [[[[1, 2], [[], [5], []]], [[3], [[4]]]]], 3, False)
    equal("inputs: a response's last token is never one", whole(answer, "inputs"), [[1, 2, 3]])
    equal("targets", answer["flat"]["targets"], [5, 4])
    equal("source", answer["flat"]["source"], [1, 2])
    numbers = answer["flat"]["sequence"]
    holds(f"sequence: two numbers that differ expected, got {numbers}", len(numbers) == len(set(numbers)) == 2)


@pytest.mark.points("_append", 1)
def test_append_advantages_and_log_probs_go_with_the_tokens(ask):
    answer = ask("append", [[[[1], [[5, 6], [7]]]], [[[2], [[8, 9]]]]], 3, True)
    close("advantages", answer["flat"]["advantages"], [0.0, 0.0, 1.0, 10.0, 10.0])
    close("log-probs", answer["flat"]["sampler_logprobs"], [0.0, -0.25, -0.5, 0.0, -0.25])
    without = ask("append", [[[[1], [[5, 6]]]]], 3, False)["flat"]
    equal("advantages and log-probs of a group without", without["advantages"] + without["sampler_logprobs"], [])


TOTAL = ("nll_loss(...)[0]; the sum of -log p is 3.5 here, and the stand-in for `aggregate` returns five times the "
         "sum over the divisor, so that `aggregate`'s results times the divisor add up to 5 x 3.5")
WRONG = "3.5: `aggregate`'s result is not used. 10: only the last micro-batch counts. "


@pytest.mark.visible
@pytest.mark.points("nll_loss", 1)
def test_nll_loss_the_sum_and_the_number_of_tokens(ask):
    """Log-probs are 0.5 * values; the stand-in for `aggregate` returns 5 * sum / divisor."""
    answer = ask("nll", [[-1.0, -2.0], [-4.0]], 0.5, 0, 1, False)
    close(TOTAL, answer["total"], 5 * 3.5, hint=f"{WRONG}5.833: the result is not multiplied by the divisor, 3.")
    equal("nll_loss(...)[1], this rank's trace tokens", answer["tokens"], 3.0)
    equal("gradient without backward", answer["grad"], None)


@pytest.mark.visible
@pytest.mark.points("nll_loss", 1)
def test_nll_loss_the_gradient_is_multiplied_by_the_number_of_ranks(ask):
    """Two ranks, of which the other holds no token. The stand-in for `ranks` does not average, as FSDP would."""
    answer = ask("nll", [[-1.0, -2.0], [-4.0]], 0.5, 0, 2, True)
    close("gradient, 2 ranks x 5 (the stand-in for `aggregate`) x 7 (the sum of -values) / 3 tokens", answer["grad"],
          2 * 5 * 7.0 / 3, hint="11.67: the loss is not multiplied by the ranks. 4.667: `aggregate`'s result is "
          "not used.")
    close(f"with backward and 2 ranks: {TOTAL}", answer["total"], 5 * 3.5,
          hint=f"{WRONG}5.833: the result is not multiplied by the divisor, 3. 35: it is multiplied by the ranks too.")


@pytest.mark.points("nll_loss", 3)
def test_nll_loss_the_loss_is_divided_by_the_tokens_of_all_ranks(ask):
    answer = ask("nll", [[-1.0, -2.0], [-4.0]], 0.5, 9, 2, True)
    told = answer["told"]
    equal("micro_batches' budget", [call for call in told if call[0] == "max_tokens"], [["max_tokens", 77]])
    equal("aggregate(..., agg, divisor): 3 tokens here and 9 on the other rank",
          [call for call in told if call[0] == "aggregate"], [["aggregate", "token", 12]] * 2)
    close(f"with 12 tokens on 2 ranks: {TOTAL}", answer["total"], 5 * 3.5,
          hint=f"{WRONG}1.458: the result is not multiplied by the divisor, 12. 4.375: it is multiplied by this "
               "rank's 3 tokens. 35: it is multiplied by the ranks too.")
    equal("nll_loss(...)[1], the tokens of this rank alone", answer["tokens"], 3.0)
    close("gradient, times the 2 ranks that FSDP averages over", answer["grad"], 2 * 5 * 7.0 / 12)
