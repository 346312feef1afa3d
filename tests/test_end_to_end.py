"""Slow: the demo's bounds for seed 0 through the commands that `make demo` runs, and one long real-sized pass."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def command(*words: object) -> str:
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_distillation_then_reinforcement_lift_held_out_accuracy(tmp_path):
    """Held out, 250 pairs in both orders: no verdicts before, .68 to .84 after stage 1, at least .87 and a gain
    of at least .08 after stage 2, consistent in at least .85; the whole solution, forced, carries the verdict."""
    world = tmp_path / "toy"
    command("-m", "toy", "build", world)
    files = ["--prompt-file", world / "prompt.txt"]

    def judged(name: str) -> dict[str, float]:
        command("eval.py", "run", "--model", world / name, "--data", world / "held_out.jsonl", *files,
                "--both-orders", "--max-tokens", 60, "--out", world / "eval" / name)
        return json.loads((world / "eval" / name / "summary.json").read_text())["overall"]

    start = judged("start")
    command("sft.py", "--preset", "tiny", "--model", world / "start", "--data", world / "sft.jsonl", *files,
            "--held-out", world / "sft_held_out.jsonl", "--out", world / "sft")
    sft = judged("sft")
    command("grpo.py", "--preset", "tiny", "--model", world / "sft", "--data", world / "rl.jsonl", *files,
            "--held-out", world / "held_out.jsonl", "--out", world / "grpo")
    grpo = judged("grpo")
    command("-m", "toy", "probe", "--model", world / "grpo", "--world", world, "--out", world / "probe" / "grpo.json")
    probe = json.loads((world / "probe" / "grpo.json").read_text())
    report = command("-m", "report", world)
    assert start["accuracy"] < 0.5
    assert 0.68 <= sft["accuracy"] <= 0.84
    assert grpo["accuracy"] >= max(0.87, sft["accuracy"] + 0.08)
    assert grpo["consistency"] >= 0.85 and grpo["verdict_rate"] >= 0.98 and 0.42 <= grpo["share_a"] <= 0.58
    assert probe["verdict_follows_a_forced_solution"]["share"] > 0.9
    assert report.rstrip().splitlines()[-1] == f"{world / 'report.html'}" and (world / "report.html").is_file()


@pytest.mark.slow
def test_a_prompt_of_2048_tokens_goes_forward_and_backward_at_a_real_size(tmp_path):
    """SmolLM2-135M's shape with random weights: 30 layers, 49,152 entries, 9 query and 3 key-value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import model
    from batch import Group, aggregate, micro_batches

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, max_position_embeddings=8192, tie_word_embeddings=True)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "m")
    policy = model.load_policy(str(tmp_path / "m"), checkpointing=True).train()
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 49152, (2048 + 2 * 24,), generator=g).tolist()
    group = Group(ids[:2048], [ids[2048:2072], ids[2072:]])
    for batch in micro_batches([group], 4096, "cpu"):
        logprobs = policy(batch).logprobs
        aggregate(-logprobs, batch, "token", 48).backward()
        assert logprobs.shape == (48,) and batch.inputs.shape == (1, 2048 + 46)
    assert -logprobs.mean().item() == pytest.approx(torch.tensor(49152.0).log().item(), abs=0.5)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in policy.parameters())
