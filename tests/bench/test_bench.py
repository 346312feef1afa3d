"""The benchmarks run, on sizes of no interest; TRL's side is left to `make bench`."""

from __future__ import annotations

import json

import pytest

from bench import measure, scaling, where
from bench.measure import Side
from bench.ours import Product, Settings, micro_batch_tokens
from bench.workload import LENGTHS, SHAPES, as_rollouts, make_folder, make_groups, reward, tokens

TINY = Settings(rows=2, group_size=3, prompts=2, updates=1, sft_batch=4, max_response=6)


def test_product_side_measures_every_kind_of_step(tmp_path):
    groups = make_groups(SHAPES["smoke"], LENGTHS["smoke"], 2, 3)
    folder = make_folder(SHAPES["smoke"], tmp_path, stops=True)
    product = Product(folder, TINY, micro_batch_tokens(groups, TINY.rows))
    distil, update, whole = Side(), Side(), Side()
    product.sft_repeat(make_groups(SHAPES["smoke"], LENGTHS["smoke"], 4, 1), distil)
    product.update(as_rollouts(groups), update)
    product.whole_step([g.prompt_ids for g in groups], [1, 2], whole)
    assert update.tokens == [tokens(groups)] and len(update.losses) == len(update.norms) == 1
    assert distil.losses[0] == pytest.approx(4.16, abs=0.1)  # log 64: an untrained model
    for side in (update, whole):
        assert 0 < side.only_part().seconds[0] < side.seconds[0]


def test_a_ratio_needs_equal_losses_and_norms():
    side, other = Side([1.0, 1.0], [1.0, 1.0], [10, 10], [0.5], [2.0]), Side([2.0, 4.0], [2.0, 2.0], [10, 10], [0.5])
    other.norms = [2.0001]
    assert measure.agree(side, other) and measure.compare(side, other, warmup=0)["ratio"] == 2.0
    other.norms = [2.001]
    assert not measure.agree(side, other) and not measure.agree(Side(), Side())


def test_useful_flops_are_held_against_those_of_matmuls(tmp_path):
    where.main(where.Config(str(tmp_path / "where.json"), ("smoke",), "smoke", 1, matmul=(64,), settings=TINY))
    [row] = json.loads((tmp_path / "where.json").read_text())["rows"]
    assert 0 < row["update"] < 1


def test_log_prob_memory_does_not_grow_with_length_times_vocabulary():
    """Twice the targets: twice the states' gradient and the per-token values, and no more than that."""
    vocabulary, hidden = 2**15, 16
    short, long = (scaling.head_point(n, vocabulary, hidden)["peak MB"] for n in (512, 1024))
    assert long - short < 2 * 512 * 4 * (hidden + 8) / 1e6
    assert long < 1024 * vocabulary * 4 / 1e6 / 2  # half of the logits


def test_scaling_writes_both_tables(tmp_path, capsys):
    scaling.main(scaling.Config(str(tmp_path / "scaling.json"), (1, 2), (32,), (64,), hidden=32, repeats=1))
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert [row["tokens"] for row in rows] == [64 + 4 * 31, 2 * (64 + 4 * 31)] and rows[0]["peak MB"] > 0
    [row] = json.loads((tmp_path / "scaling-head.json").read_text())["rows"]
    assert row["logits MB"] == 4 * 32 * 64 / 1e6 and "to the power of" in capsys.readouterr().out


def test_reward_and_lengths_are_functions_of_the_seed():
    first, again = (make_groups(SHAPES["2k"], LENGTHS["ragged"], 3, 2, seed=5) for _ in range(2))
    assert first == again and {reward([1, 2]), reward([1, 1])} == {1.0, -1.0}
