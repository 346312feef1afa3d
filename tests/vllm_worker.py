"""Runs inside a process of its own, because a vLLM engine wants one. Prints one JSON object: what it measured.

python tests/vllm_worker.py engine FOLDER ARCH TIED      log-probs, seeds, edges, three updates
python tests/vllm_worker.py half FOLDER                  bfloat16 as on a GPU: a mesh of one rank, no seed a request
python tests/vllm_worker.py train OUT MODEL DATA TP TYPE a GRPO run that is stopped in its second round
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tiny_models import make_folder, make_lm

import grpo
import model
from batch import Group, micro_batches
from loading.tokenizer import load_tokenizer
from rollout import VLLMSampler
from runtime import ranks, run_folder
from runtime.seeds import derive_seed

SHAPE = {"hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 2048}
CONTEXT = 300
SHARED = [1 + i % 30 for i in range(270)]  # longer than two cache blocks of 128


def gaps(policy, rollouts, temperature: float = 1.0) -> torch.Tensor:
    """|sampler's - trainer's| log-prob of all tokens of these rollouts."""
    groups = [Group(r.prompt_ids, [r.response_ids], None, [r.sampler_logprobs]) for r in rollouts]
    with torch.no_grad():
        return torch.cat([(policy(b, temperature=temperature).logprobs - b.sampler_logprobs).abs() * b.weight
                          for b in micro_batches(groups, 4096, "cpu")])


def gap(policy, rollouts, temperature: float = 1.0) -> float:
    return float(gaps(policy, rollouts, temperature).max())


def mean_gap(policy, rollouts) -> float:
    return float(gaps(policy, rollouts).mean())


def engine(folder: str, arch: str, tied: bool) -> dict:
    head = {"head_dim": 32} if arch != "qwen2" else {}
    make_folder(Path(folder), make_lm(arch, tied, **(SHAPE | head)), tokenizer=True)
    tokenizer = load_tokenizer(folder)
    sampler = VLLMSampler(folder, tokenizer, "float32", CONTEXT, seed=3)
    policy = model.load_policy(folder)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-2, weight_decay=0.0)
    prompts, seeds = [SHARED, [5, 6, 7], SHARED[:200] + [9]], [derive_seed("vllm", i) for i in range(3)]

    def ask(temperature: float = 1.0, n: int = 4, tokens: int = 20, some=(0, 1, 2)):
        return sampler.generate([prompts[i] for i in some], n, temperature, tokens, [seeds[i] for i in some])

    found: dict = {"unsynced": gap(policy, ask()), "before": [], "after": []}
    sampler.sync(model.gathered_weights(policy, torch.float32))
    found["synced"] = gap(policy, ask())
    for _ in range(3):
        groups = [Group(r.prompt_ids, [r.response_ids]) for r in ask()]
        for batch in micro_batches(groups, 4096, "cpu"):
            (-policy(batch).logprobs.mean()).backward()
        model.optimizer_step(policy, optimizer, 1e-2, 1.0)
        found["before"].append(gap(policy, ask()))  # the engine has not heard of the update
        sampler.sync(model.gathered_weights(policy, torch.float32))
        found["after"].append(gap(policy, ask()))
    found["cooler"] = gap(policy, ask(0.7), 0.7)
    again, alone = ask(), ask(some=(2,))
    found["repeats"] = ask() == again
    found["alone"] = [r.response_ids for r in alone] == [r.response_ids for r in again[8:]]
    found["groups_differ"] = len({tuple(r.response_ids) for r in again[4:8]})
    greedy = ask(0.0, 3)
    found["greedy"] = gap(policy, greedy), len({tuple(r.response_ids) for r in greedy[3:6]})
    edge = sampler.generate([[5] * n for n in (CONTEXT, CONTEXT - 1, CONTEXT + 9)], 2, 1.0, 8, [1, 2, 3])
    found["edge"] = [(len(r.response_ids), r.finish_reason, len(r.sampler_logprobs)) for r in edge]
    stops = sampler.generate([[5, 6, 7]] * 40, 8, 1.0, 60, [derive_seed("stop", i) for i in range(40)])
    ended = [r for r in stops if r.finish_reason == "stop"]
    eos = tokenizer.eos_token_id
    found["stopped"] = [len(ended), sum(r.response_ids[-1] == eos and eos not in r.response_ids[:-1] for r in ended)]
    said = [r.response_ids[:-1] if r.finish_reason == "stop" else r.response_ids for r in stops]
    found["text"] = [r.text for r in stops] == [tokenizer.decode(ids, skip_special_tokens=False) for ids in said]
    sampler.close()
    return found


def half(folder: str) -> dict:
    """bfloat16 weights and a process group of one rank, as one process with a GPU has it."""
    make_folder(Path(folder), make_lm("qwen2", True, **SHAPE), tokenizer=True)
    mesh = model.make_mesh(torch.bfloat16)
    sampler = VLLMSampler(folder, load_tokenizer(folder), "bfloat16", CONTEXT, seed=3)
    policy = model.load_policy(folder, torch.float32, mesh, torch.bfloat16)
    prompts, seeds = [SHARED[: 200 + i] for i in range(24)], [derive_seed("half", i) for i in range(24)]
    found: dict = {"unsynced": mean_gap(policy, sampler.generate(prompts, 1, 1.0, 8, seeds))}
    sampler.sync(model.gathered_weights(policy, torch.bfloat16))
    found["synced"] = mean_gap(policy, sampler.generate(prompts, 1, 1.0, 8, seeds))  # more tokens than a step may have
    first = sampler.generate(prompts[:1], 64, 1.0, 1, seeds[:1])
    steps = torch.tensor([r.sampler_logprobs[0] - first[0].sampler_logprobs[0] for r in first]).double() * 2**12
    found["on_grid"] = float(((steps - steps.round()).abs() < 0.02).double().mean())
    found["tokens"] = len({r.response_ids[0] for r in first})
    sampler.seed_each = False
    one, again = (sampler.generate(prompts, 2, 1.0, 8, seeds) for _ in range(2))
    other = sampler.generate(prompts, 2, 1.0, 8, [seed + 1 for seed in seeds])
    found["repeats"], found["synced_without_seeds"] = one == again, mean_gap(policy, one)
    found["same"] = sum(a.response_ids == b.response_ids for a, b in zip(one, other, strict=True)) / len(one)
    sampler.close()
    return found


def train(out: str, folder: str, data: str, tp: str = "1", dtype: str = "float32") -> dict:
    """Two mini-batches a round, a large learning rate, SIGTERM in the second round of the first call."""
    cfg = replace(grpo.PRESETS["tiny"], model=folder, data=data, held_out=data, prompt_file="", out=out, steps=4,
                  prompts_per_step=4, group_size=4, mini_batch=2, max_prompt_tokens=1800, max_response_tokens=12,
                  lr=1e-2, lr_schedule="constant", warmup_updates=0, sampler="vllm", tp=int(tp), save_every=1,
                  eval_every=3, compute_dtype=dtype, sampler_dtype=dtype)
    rounds: list[float] = []
    fresh = run_folder.latest_checkpoint(out) is None

    def score(rollouts, pairs, policy, tokenizer, cfg):
        rounds.append(gap(policy, rollouts))
        if fresh and len(rounds) == 2:
            os.kill(os.getpid(), signal.SIGTERM)  # the round is finished and saved first
        return torch.tensor([float(len(r.response_ids) % 3) for r in rollouts]).view(len(pairs), -1)

    stopped = False
    try:
        grpo.train(cfg, grpo.Method(score=score))
    except KeyboardInterrupt:
        stopped = True
    ranks.leave_ranks()
    return {"stopped": stopped, "gaps": rounds}


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    result = {"engine": lambda folder, arch, tied: engine(folder, arch, tied == "tied"), "half": half,
              "train": train}[what](*words)
    sys.stdout.flush()
    os.write(1, f"\nRESULT {json.dumps(result)}\n".encode())  # whole: another rank writes to the same pipe
