"""Assignment 5: what a loss is divided by, metrics of all ranks, FSDP2 on two Gloo processes."""

from __future__ import annotations

import pytest
from checks import close, equal, holds

GROUPS = [[[1, 2, 3], [[4, 5], [6]]], [[1], [[7, 8, 9], [], [4]]]]


@pytest.mark.visible
@pytest.mark.points("loss_divisor", 2)
def test_loss_divisor_of_each_average(ask):
    groups = [[[1, 2], [[3, 4], [5, 6, 7]]]]
    for agg, expected in (("seq", 2), ("token", 5), ("const", 20)):
        equal(f"loss_divisor, agg={agg!r}, responses of 2 and 3 tokens of at most 10", ask("share", groups, agg, 10),
              expected)


@pytest.mark.points("loss_divisor", 2)
def test_loss_divisor_empty_responses_were_sampled_too(ask):
    for agg, expected in (("seq", 5), ("token", 7), ("const", 40)):
        equal(f"loss_divisor, agg={agg!r}, of {GROUPS}, at most 8", ask("share", GROUPS, agg, 8), expected)
    for agg in ("seq", "token", "const"):
        equal(f"loss_divisor, agg={agg!r}, of no group", ask("share", [], agg, 8), 0)


@pytest.mark.visible
@pytest.mark.points("Metrics.reduce", 1)
def test_metrics_reduce_one_process_divides_sums_by_counts(ask):
    got = ask("metrics", [[["loss", 6.0, 4], ["loss", 2.0, 4], ["gap", 0.25], ["gap", 0.125]]])
    equal("Metrics.reduce() on one process", got, [{"loss": 1.0, "gap": 0.25}])


@pytest.mark.points("Metrics.reduce", 2)
def test_metrics_reduce_two_ranks_add_before_they_divide(ask):
    """Rank 0 has 1 token, rank 1 has 9: the mean of the two ranks' means would be wrong."""
    got = ask("metrics", [[["loss", 5.0, 1], ["gap", 0.5]], [["loss", 9.0, 9], ["gap", 0.25]]])
    expected = {"loss": 1.4, "gap": 0.5}
    equal("Metrics.reduce() on two ranks: names", [sorted(rank) for rank in got], [sorted(expected)] * 2)
    for rank in (0, 1):
        for name, value in expected.items():
            close(f"Metrics.reduce() on rank {rank}: {name}", got[rank][name], value)


@pytest.mark.points("Metrics.reduce", 1)
def test_metrics_reduce_a_metric_that_one_rank_has_not_and_one_without_a_count(ask):
    got = ask("metrics", [[["only", 3.0, 2], ["none", 0.0, 0]], [["none", 0.0, 0], ["low", -7.0]]])
    equal("Metrics.reduce() on two ranks; a mean over nothing is left out", got, [{"only": 1.5, "low": -7.0}] * 2)


LAYERS = [[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]], [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]],
          [[1.0, -1.0], [2.0, 0.5]]]


def gradients(inputs):
    """By hand: d sum(h2 W3^T) / dW of the three weights, for one rank's inputs."""
    first, second, head = LAYERS
    grads = [[[0.0] * len(w[0]) for _ in w] for w in LAYERS]
    for x in inputs:
        h1 = [sum(w * v for w, v in zip(row, x, strict=True)) for row in first]
        h2 = [sum(w * v for w, v in zip(row, h1, strict=True)) for row in second]
        d2 = [head[0][j] + head[1][j] for j in range(2)]
        d1 = [sum(d2[j] * second[j][i] for j in range(2)) for i in range(4)]
        for grad, out, given in ((grads[2], [1.0, 1.0], h2), (grads[1], d2, h1), (grads[0], d1, x)):
            for i, o in enumerate(out):
                for j, g in enumerate(given):
                    grad[i][j] += o * g
    return grads


@pytest.mark.visible
@pytest.mark.points("shard_model", 2)
def test_shard_model_each_layer_and_the_root_are_sharded(ask):
    got = ask("sharded", LAYERS, [[[1.0, 2.0]], [[0.0, 1.0]]], "float32")
    for rank in (0, 1):
        equal(f"shard_model on rank {rank}: modules with fully_shard (the root is '')", got[rank]["roots"],
              ["", "lm.model.layers.0", "lm.model.layers.1"])
        equal(f"shard_model on rank {rank}: rows x columns held of each weight", got[rank]["rows"],
              [[2, 2], [1, 4], [1, 2]])


@pytest.mark.points("shard_model", 2)
def test_shard_model_the_gradient_is_the_mean_over_the_ranks(ask):
    """Which is why a loss is multiplied by the number of ranks."""
    inputs = [[[1.0, 2.0], [3.0, -1.0]], [[0.5, 1.0]]]
    got, mine = ask("sharded", LAYERS, inputs, "float32"), [gradients(part) for part in inputs]
    for w in range(3):
        mean = [[(a + b) / 2 for a, b in zip(*rows, strict=True)] for rows in zip(mine[0][w], mine[1][w], strict=True)]
        for rank in (0, 1):
            close(f"gradient of weight {w} on rank {rank}", got[rank]["grads"][w], mean)


@pytest.mark.points("shard_model", 2)
def test_shard_model_mixed_precision_computes_in_bfloat16_and_reduces_in_float32(ask):
    """Each rank's gradient is a bfloat16 number and their mean is none, so it was made in float32."""
    got = ask("sharded", LAYERS, [[[2.0, 2.0]], [[2.0**-8, 0.0]]], "bfloat16")
    for rank in (0, 1):
        equal(f"rank {rank}: layers and head compute in", got[rank]["computed_in"], ["torch.bfloat16"] * 3)
        equal(f"rank {rank}: weights are stored in", set(got[rank]["stored_in"]), {"torch.float32"})
        first = got[rank]["grads"][0][0][0]
        holds(f"rank {rank}: gradient of the first weight: expected {3 * (2 + 2**-8) / 2}, got {first}: are gradients "
              "reduced in float32?", abs(first - 3 * (2 + 2**-8) / 2) < 1e-6)
