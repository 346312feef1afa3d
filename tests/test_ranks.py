"""One process against two and four ranks, with real processes under torchrun and Gloo.

The cases of a launch run in rank_worker.py, many to a launch, because starting processes takes seconds; the tests
here compare what one process and the ranks have written. Runs compute in float64, so that they are held to 1e-9.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rank_worker
import torch
from safetensors.torch import load_file
from tiny_models import assert_close, logged
from torch import Tensor

ROOT = Path(__file__).parents[1]
LIMIT = 480  # seconds a launch may take on a busy machine; a hang (P18) ends there

# ---- launches ------------------------------------------------------------------------------------------


def torchrun(ranks: int, *command: object) -> list[str]:
    # A real launch gives a step's time to --shutdown-timeout: torchrun kills what a SIGTERM has not ended by then.
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
            "--shutdown-timeout=120", *map(str, command)]


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "PYTEST_"))}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), kept.get("PYTHONPATH", "")])
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}


class Launch:
    """A launch that is over: its folder, exit code, output, and when it ended."""

    def __init__(self, folder: Path):
        self.folder = folder
        end = json.loads((folder / "end.json").read_text()) if (folder / "end.json").exists() else {}
        self.code, self.output, self.ended = end.get("code"), end.get("output", ""), end.get("ended")

    def facts(self, name: str) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        if not path.exists():
            pytest.fail(f"{path.name} was not reached; the launch said:\n{self.output[-4000:]}")
        return json.loads(path.read_text())

    def tensors(self, name: str) -> dict[str, Tensor]:
        self.facts(name)
        return load_file(self.folder / f"{name}.safetensors")

    def metrics(self, name: str) -> list[dict[str, float]]:
        return logged(self.folder / name)


def start_ranks(root: Path, stage: str, ranks: int) -> tuple[subprocess.Popen, Any]:
    (root / stage).mkdir()
    output = open(root / stage / "output.txt", "w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - see end_ranks
    command = torchrun(ranks, ROOT / "tests" / "rank_worker.py", root, stage)
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT), output


def end_ranks(root: Path, stage: str, process: subprocess.Popen, output: Any) -> None:
    try:
        process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun takes its ranks along
        process.wait()
    output.seek(0)
    end = {"code": process.returncode, "output": output.read(), "ended": time.time()}
    (root / stage / "end.json").write_text(json.dumps(end))
    output.close()


def in_process(root: Path, stage: str) -> None:
    """The same cases in this process: the one rank that all others are held against."""
    assert "RANK" not in os.environ and not torch.distributed.is_initialized()
    rank_worker.run_stage(root, stage)


def run_fast(root: Path) -> None:
    (root / "world").mkdir()
    rank_worker.make_world(root / "world")
    two = start_ranks(root, "two", 2)
    try:
        in_process(root, "one")
    finally:
        end_ranks(root, "two", *two)
    in_process(root, "one_after_two")


def run_slow(root: Path) -> None:
    rank_worker.make_large(root / "large")
    end_ranks(root, "four", *start_ranks(root, "four", 4))
    end_ranks(root, "two_after_four", *start_ranks(root, "two_after_four", 2))
    in_process(root, "one_after_four")


def once(root: Path, name: str, build: Callable[[Path], None]) -> None:
    """`build` once for all workers of one pytest run; the others wait, and see its error too."""
    with open(root / f"{name}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = root / f"{name}.done"
        if not done.exists():
            try:
                build(root)
                done.write_text("")
            except BaseException as error:
                done.write_text(f"{type(error).__name__}: {error}")
                raise
        if done.read_text():
            pytest.fail(f"the launches of {name!r} failed: {done.read_text()}")


@pytest.fixture(scope="session")
def launched(tmp_path_factory) -> Path:
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ranks"
    root.mkdir(exist_ok=True)
    once(root, "fast", run_fast)
    return root


@pytest.fixture
def one(launched) -> Launch:
    return Launch(launched / "one")


@pytest.fixture
def two(launched) -> Launch:
    return Launch(launched / "two")


@pytest.fixture(params=["two", pytest.param("four", marks=pytest.mark.slow)])
def many(request, launched) -> Launch:
    """Two ranks, and four where slow tests run."""
    if request.param == "four":
        once(launched, "slow", run_slow)
    return Launch(launched / request.param)


@pytest.fixture
def after_four(launched) -> Path:
    once(launched, "slow", run_slow)
    return launched


# ---- comparisons ---------------------------------------------------------------------------------------


def assert_bit_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert_close(found, wanted, 0.0)


def assert_same_metrics(found: list[dict], wanted: list[dict], rel: float = 1e-6) -> None:
    assert [list(row) for row in found] == [list(row) for row in wanted]
    for mine, theirs in zip(found, wanted, strict=True):
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=rel, abs=1e-6), (name, theirs["step"])


def assert_same_run(found: Launch, wanted: Launch, name: str, reference: str) -> None:
    """Rollouts and rewards exactly, every metric (the gradient norm among them), final weights to 1e-9."""
    mine, theirs = found.facts(name), wanted.facts(reference)
    assert mine["rollouts"] == theirs["rollouts"] and mine["rewards"] == theirs["rewards"]
    assert_same_metrics(found.metrics(name), wanted.metrics(reference))
    assert_close(found.tensors(name), wanted.tensors(reference), 1e-9)


def assert_in_step(rows: list[dict], rounds: int) -> None:
    """T6, P5: what the sampler gave its tokens is what the policy gives them."""
    found = [row["sync/logprob_diff_max"] for row in rows if "sync/logprob_diff_max" in row]
    assert len(found) == rounds and max(found) < 1e-5


def start_weights(launch: Launch, tie: str) -> dict[str, Tensor]:
    return load_file(launch.folder.parent / "world" / tie / "model.safetensors")


def ranks_of(launch: Launch) -> int:
    return {"two": 2, "four": 4}[launch.folder.name]


# ---- whole runs ----------------------------------------------------------------------------------------

PLANS = [
    pytest.param(stage, tie, micro, id=f"{stage}-{tie}-{micro}", marks=[pytest.mark.slow] * (ranks == 4))
    for ranks, stage in ((2, "two"), (4, "four"))
    for tie, micro in rank_worker.PLANS[ranks]
]
EVERY_PLAN = pytest.mark.parametrize(("many", "tie", "micro"), PLANS, indirect=["many"])


@EVERY_PLAN
def test_T3_T13_P8_three_sft_steps_end_with_the_weights_of_one_process(one, many, tie, micro):
    assert_same_run(many, one, f"sft-{tie}-{micro}", f"sft-{tie}-4096")
    logged = many.metrics(f"sft-{tie}-{micro}")
    assert len(logged) == 3 and all(row["optim/grad_norm"] > 0.5 for row in logged), "the clip of 0.5 bites"
    start = start_weights(one, tie)
    assert all((many.tensors(f"sft-{tie}-{micro}")[n] != t).any() for n, t in start.items())


@EVERY_PLAN
def test_T3_T13_P8_P10_two_grpo_steps_of_two_mini_batches_equal_one_process(one, many, tie, micro):
    for agg in rank_worker.AGGS[tie]:
        name = f"grpo-{agg}-{tie}-{micro}"
        assert_same_run(many, one, name, f"grpo-{agg}-{tie}-4096")
        rows = many.metrics(name)
        assert [row["step"] for row in rows] == [0, 1, 2]
        assert rows[1]["policy/ref_kl"] > 1e-3, "the policy moved"
        rewards = [r for step in many.facts(name)["rewards"] for group in step for r in group]
        assert 0.2 < rewards.count(1.0) / len(rewards) < 0.8, "the groups had something to learn from"


def test_T13_P18_ranks_with_different_numbers_of_micro_batches_make_the_same_passes(many):
    """Skewed lengths: some rank has fewer of its own, and runs filler batches until the others are done."""
    plans = many.facts("grpo-seq-tied-60")["plans"]
    assert len(plans) == ranks_of(many)
    uneven = 0
    for counted in zip(*plans, strict=True):  # one mini-batch on every rank
        assert len({len(weights) for weights in counted}) == 1, "as many passes everywhere"
        assert any(0.0 not in weights for weights in counted), "and no more than somebody needs"
        uneven += len({sum(weights) for weights in counted}) > 1
    assert uneven


def test_T13_P18_a_rank_without_a_single_target_waits_for_the_others(one, many):
    """Prompts that fill the context get empty responses; a mini-batch gives some rank nothing else."""
    assert_same_run(many, one, "grpo-empty", "grpo-empty")
    plans = list(zip(*many.facts("grpo-empty")["plans"], strict=True))
    assert any(not any(weights) for counted in plans for weights in counted), "a rank had no target at all"
    assert any(any(any(weights) for weights in counted) for counted in plans)
    lengths = [len(r) for step in many.facts("grpo-empty")["rollouts"] for _, group in step for r in group]
    assert lengths.count(0) > 10 and max(lengths) > 3


def test_T13_held_out_loss_of_fewer_pairs_than_ranks_need(one, many):
    """Three held-out pairs: none is lost or counted twice, and a rank of four has none."""
    assert_same_run(many, one, "sft-held-out", "sft-held-out")
    assert all(row["eval/loss"] > 0 for row in many.metrics("sft-held-out"))


def test_P19_refused_groups_are_replaced_by_the_same_ones_on_any_number_of_ranks(one, many):
    assert_same_run(many, one, "grpo-keep", "grpo-keep")
    rewards = one.facts("grpo-keep")["rewards"]
    assert all(len(step) == 8 and all(len(set(group)) > 1 for group in step) for step in rewards)
    asked = [prompt for step in one.facts("grpo-keep")["rollouts"] for prompt, _ in step]
    assert len(asked) == 24, "three rounds of eight groups, however many were refused"


def test_T13_evaluation_judges_every_held_out_pair_once_in_both_orders(one, many):
    assert_same_run(many, one, "grpo-evaluated", "grpo-evaluated")
    for step in range(3):
        texts = []
        for launch in (many, one):
            path = launch.folder / "grpo-evaluated" / "rollouts" / f"step_{step:06d}.jsonl"
            texts.append(sorted(path.read_text().splitlines()))
        assert texts[0] == texts[1] and len(texts[0]) == len(set(texts[0])) == 10
    assert [row["eval/count"] for row in many.metrics("grpo-evaluated")] == [10] * 3


# ---- gradients -----------------------------------------------------------------------------------------

EVERY_TIE = pytest.mark.parametrize("tie", list(rank_worker.ARCH))


@EVERY_TIE
def test_P8_P9_gradients_are_global_sums_for_body_embedding_and_head(one, two, tie):
    """19 tokens on one rank, 7 on the other: neither FSDP's mean over ranks nor a local mean gives this gradient."""
    name = f"gradient-{tie}"
    assert two.facts(name)["tokens"] == list(rank_worker.SIZES)
    found, wanted = two.tensors(name), one.tensors(name)
    assert_close(found, wanted, 1e-10)
    head = "model.embed_tokens.weight" if tie == "tied" else "lm_head.weight"
    assert wanted[head].abs().max() > 1e-3 and wanted["model.layers.0.self_attn.q_proj.weight"].abs().max() > 1e-4
    assert two.facts(name)["nll"] == pytest.approx(one.facts(name)["nll"], rel=1e-12)


@EVERY_TIE
def test_T12_flex_attention_under_fsdp_with_checkpointing_has_the_gradients_of_grouped_attention(two, tie):
    found = two.tensors(f"flex_gradient-{tie}")
    halves = [{n.removeprefix(kind): t for n, t in found.items() if n.startswith(kind)}
              for kind in ("flex.", "grouped.")]
    assert_close(*halves, 1e-9)
    assert min(float(t.abs().max()) for n, t in halves[1].items() if "weight" in n) > 1e-4
    assert two.facts(f"flex_gradient-{tie}")["graphs"] >= 1, "the attention was compiled"


@EVERY_TIE
def test_P10_the_norm_that_is_logged_and_clipped_by_is_that_of_the_whole_gradient(one, two, tie):
    found, wanted = two.facts(f"gradient-{tie}")["norm"], one.facts(f"gradient-{tie}")["norm"]
    slopes = [t for n, t in one.tensors(f"gradient-{tie}").items() if not n.startswith("after.")]
    by_hand = math.sqrt(sum((t**2).sum().item() for t in slopes))
    assert wanted == pytest.approx([by_hand], rel=1e-9) and by_hand > 0.1, "the clip of 0.05 bites"
    assert found == pytest.approx([by_hand] * 2, rel=1e-9), "the same on every rank"


@EVERY_TIE
def test_P11_T14_the_head_stays_tied_through_load_shard_step_and_export(one, many, tie):
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    for kind, micro in (("sft", 60), ("grpo-seq", 60)):
        name = f"{kind}-{tie}-{micro}"
        assert many.facts(name)["tied"] == [tie == "tied"] * ranks_of(many)
        folder = many.folder / name / "model"
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            stored = set(file.keys())
        assert ("lm_head.weight" in stored) == (tie == "untied") and "model.embed_tokens.weight" in stored
        loaded, notes = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(notes[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (tie == "tied")
        trained = {n: t.float() for n, t in many.tensors(name).items()}
        assert_bit_equal(dict(loaded.named_parameters(remove_duplicate=False)), trained)
        assert torch.equal(trained["lm_head.weight"], trained["model.embed_tokens.weight"]) == (tie == "tied")


# ---- sampler, buffers, moments, order of calls ---------------------------------------------------------


@pytest.mark.parametrize("name", ["grpo-seq-tied-60", "grpo-seq-untied-60"])
def test_T6_P5_the_sampler_is_in_step_with_the_policy_in_every_round(many, name):
    assert_in_step(many.metrics(name), 2)


def test_P21_a_run_that_moves_its_moments_ends_with_the_same_bits(many):
    assert_bit_equal(many.tensors("grpo-offload"), many.tensors("grpo-seq-tied-60"))
    assert_same_metrics(many.metrics("grpo-offload"), many.metrics("grpo-seq-tied-60"), rel=0)


def round_events(moments: str, evaluated: bool) -> list[str]:
    chat = [f"chat: {moments}"] if evaluated else []
    back = "here" if moments == "away" else moments
    return [f"sync: {moments}", *chat, f"generate: {moments}", f"sleep: {moments}", f"update: {back}"]


@pytest.mark.parametrize("ranks", ["one", "two"])
def test_P20_P21_engine_is_synced_before_it_samples_and_asleep_and_the_moments_back_before_the_update(request, ranks):
    """A fake engine whose weights are NaN until a sync; a run stopped after two rounds and continued."""
    facts = request.getfixturevalue(ranks).facts("engine")
    first = ["start", *round_events("no", True), *round_events("away", False), "close: away"]
    second = ["start", *round_events("away", True), "sync: away", "chat: away", "sleep: away", "close: away"]
    for events in facts["events"]:
        assert events == first + second
    assert facts["diffs"][-1] is None and all(diff < 1e-5 for diff in facts["diffs"][:-1])


def test_P12_bf16_compute_gathers_bf16_and_reduces_in_float32(two):
    facts = two.facts("mixed")
    for label, sent in (("f32", "torch.float32"), ("bf16", "torch.bfloat16")):
        for rank in facts[label]:
            assert rank["gather"] == [sent] and rank["reduce"] == ["torch.float32"]
    assert facts["bf16"][0]["norm"] == pytest.approx(facts["f32"][0]["norm"], rel=0.02)


# ---- the variants --------------------------------------------------------------------------------------


def test_T3_T13_the_scalar_models_gradient_is_that_of_one_process(one, two):
    found, wanted = two.facts("scalar-gradient"), one.facts("scalar-gradient")
    assert found["pairs"] == wanted["pairs"] == 5 and found["loss"] == pytest.approx(wanted["loss"], rel=1e-12)
    assert_close(two.tensors("scalar-gradient"), one.tensors("scalar-gradient"), 1e-10)
    assert one.tensors("scalar-gradient")["model.layers.0.self_attn.q_proj.weight"].abs().max() > 1e-4


def test_T13_rlprs_probabilities_and_deviations_are_those_of_one_process(one, two):
    found, wanted = two.facts("rlpr-statistics"), one.facts("rlpr-statistics")
    plain = torch.tensor(wanted["probabilities"]["4096"])
    assert plain[:2].count_nonzero() == 3 and plain[2, 0] > 0 and not plain[3].any()
    for budget in ("1", "12", "4096"):
        torch.testing.assert_close(torch.tensor(found["probabilities"][budget]), plain, rtol=0, atol=1e-10)
    assert found["deviations"] == wanted["deviations"] * 2 and len(wanted["deviations"][0]) == 1


# ---- resuming ------------------------------------------------------------------------------------------


def joined(*parts: dict[str, Any]) -> list[Any]:
    return [step for part in parts for step in part["rollouts"]]


def assert_continues(launched: Path, *stages: str) -> None:
    """Runs of a chain together did what one undisturbed process did, no prompt twice or left out."""
    straight = Launch(launched / "one")
    facts = [Launch(launched / stage.split("/")[0]).facts(stage.split("/")[1]) for stage in stages]
    assert [part["stopped"] for part in facts] == [True] * (len(facts) - 1) + [False]
    assert [len(part["rollouts"]) for part in facts] == [2] * (len(facts) - 1) + [6 - 2 * (len(facts) - 1)]
    assert joined(*facts) == straight.facts("chain")["rollouts"]
    last = Launch(launched / stages[-1].split("/")[0])
    name = stages[-1].split("/")[1]
    assert_same_metrics(last.metrics(name), straight.metrics("chain"))
    assert_close(last.tensors(name), straight.tensors("chain"), 1e-9)


def test_T10_a_run_begun_on_two_ranks_continues_on_one(launched):
    assert_continues(launched, "two/chain-2", "one_after_two/chain-2-1", "one_after_two/chain-2-1-end")


@pytest.mark.slow
def test_T10_from_two_ranks_to_one_to_four(after_four):
    assert_continues(after_four, "two/chain-2", "one_after_two/chain-2-1", "four/chain-2-1-4")


def test_T10_a_state_saved_after_a_scoring_pass_holds_the_stored_weights_and_their_moments(one, two):
    """The held-out pass of the last step leaves the root's weights gathered; they are not what must be saved."""
    for launch in (one, two):
        losses = [row["eval/loss"] for row in launch.metrics("sft-resumed-straight")]
        assert losses[2] > min(losses[:2]), "step 2 was no better, so that nothing was exported before the save"
        assert launch.facts("sft-resumed-stopped")["stopped"]
        assert launch.metrics("sft-resumed") == launch.metrics("sft-resumed-straight")
        assert_bit_equal(launch.tensors("sft-resumed"), launch.tensors("sft-resumed-straight"))


# ---- hybrid sharding -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_T13_hybrid_sharding_of_four_ranks_in_two_copies_equals_one_process(after_four):
    one, four = Launch(after_four / "one"), Launch(after_four / "four")
    assert_same_run(four, one, "hybrid", "chain")
    assert_same_run(four, one, "hybrid-sft", "sft-untied-4096")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["two", "one"])
def test_T10_a_hybrid_run_continues_on_fewer_ranks(after_four, ranks):
    last = {"two": "two_after_four/hybrid-4-2", "one": "one_after_four/hybrid-4-1"}[ranks]
    assert_continues(after_four, "four/hybrid-4", last)


def test_shard_ranks_that_do_not_divide_the_ranks_are_refused_and_more_than_there_are_mean_all(monkeypatch):
    import torch.distributed as dist

    import model
    from runtime.errors import UserError

    asked: list[tuple[int, ...]] = []

    def made(kind, shape, **names):
        asked.append(shape)
        return SimpleNamespace(get_all_groups=list)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist.device_mesh, "init_device_mesh", made)
    for ranks, wanted in ((1, (1,)), (2, (2,)), (4, (2, 2)), (8, (4, 2))):
        monkeypatch.setattr(dist, "get_world_size", lambda ranks=ranks: ranks)
        model.make_mesh(torch.float32, 2)
        assert asked.pop() == wanted
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    with pytest.raises(UserError, match="--shard-ranks 2 does not divide 3 ranks"):
        model.make_mesh(torch.float32, 2)


# ---- faults --------------------------------------------------------------------------------------------


def test_a_rank_that_raises_ends_the_job_with_its_error_shown_and_nothing_saved_after(many):
    assert many.code not in (0, None), many.output[-2000:]
    raised = many.facts("fault")["at"]
    assert 0 < many.ended - raised < 120, "no waiting for the process group's timeout"
    assert f"RuntimeError: {rank_worker.FAULT}" in many.output
    assert sorted(p.name for p in (many.folder / "fault" / "checkpoints").iterdir()) == ["step_000001"]
    assert not (many.folder / "fault" / "model").exists() and len(many.metrics("fault")) == 1


# ---- host memory ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_T17_a_rank_loads_its_shard_in_the_memory_of_its_shard(after_four):
    """206 MB of weights on two ranks; the control, a plain load, holds them all."""
    slack = 32 * 2**20  # what else a process allocates: 5 to 21 MB in the runs seen
    for rank in Launch(after_four / "two_after_four").facts("memory")["ranks"]:
        assert rank["whole"] > 200e6 and rank["filled"] and rank["shard"] == rank["whole"] / 2
        bound = rank["shard"] + rank["largest"] / 2 + slack  # its rows of one tensor at a time
        assert 0.9 * rank["shard"] < rank["sharded"] < bound
        assert bound < rank["shard"] + rank["largest"], "a whole tensor read on the way would show"
        assert min(rank["plain"], 0.9 * rank["whole"]) > bound, "and so would a plain load"
