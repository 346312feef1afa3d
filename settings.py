"""The settings of both stages: every flag's meaning, default and unit, and the paper's numbers (Appendix G) as presets.

The defaults are the paper's 7B runs. `sft.py` and `grpo.py` read them from the command line (`cli.parse`).
The comment on or above a field is its --help text; a class that sets a field of `Shared` again says it again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from cor_prompt import Style
from runtime import ranks
from runtime.errors import UserError

Precision = Literal["bfloat16", "float32", "float64"]
LrSchedule = Literal["cosine", "linear", "constant"]
Agg = Literal["seq", "token", "const"]
SamplerKind = Literal["auto", "torch", "vllm"]

# ---- both stages ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shared:
    """What means the same in both stages; a stage's own class gives its defaults where they differ."""

    preset: str = ""  # named set of defaults
    model: str = ""  # model to start from: a folder with safetensors, a run folder, or a hub id
    data: str = ""  # pairs to train on: .jsonl, .parquet or a hub id
    held_out: str = ""  # pairs that are not trained on (same formats); empty: none
    out: str = ""  # run folder to write; an interrupted run in it is continued
    # which prompt the judge sees (cor_prompt.py); a judge as --model brings its own style and wording (judge.json)
    style: Style = "instruct"
    # text file that replaces the style's fixed wording; empty: the one --model was trained with, else the built-in
    prompt_file: str = ""
    # arguments of the chat template (name=value), such as enable_thinking=false; others: as --model was trained
    template_args: tuple[str, ...] = ()
    micro_batch_tokens: int = 16384  # tokens per forward and backward on one rank, padding included
    lr: float = 0.0  # peak learning rate
    lr_schedule: LrSchedule = "constant"  # shape after the warm-up, per optimiser step
    lr_floor: float = 0.1  # last learning rate as a share of the peak (not for constant)
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's decay rates
    weight_decay: float = 0.0  # AdamW's decoupled weight decay
    max_grad_norm: float = 1.0  # gradient norm above which gradients are scaled down
    # arithmetic of forward and backward; stored weights, log-probs and Adam are float32 or better
    compute_dtype: Precision = "bfloat16"
    # neighbouring ranks that hold one copy of the weights (hybrid sharding); 0: all ranks hold one
    shard_ranks: int = 0
    checkpointing: bool = True  # recompute each layer in the backward pass: less memory, about a third more time
    seed: int = 0  # seed of data order and sampling
    dry_run: int = 0  # print what a run on this many GPUs needs, then stop; 0: train
    gpu_gb: float = 80.0  # memory of one card for --dry-run, in GB (1e9 bytes)


# ---- stage 1 -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SFTConfig(Shared):
    preset: str = "paper-7b"  # named set of defaults: paper-7b, paper-14b, paper-32b, one-gpu, small, tiny
    model: str = "Qwen/Qwen2.5-7B-Instruct"  # model to start from: a folder with safetensors, a run folder, or a hub id
    data: str = "gaotang/RM-R1-Distill-SFT"  # pairs with traces: .jsonl, .parquet or a hub id
    # pairs with traces for the held-out loss (same formats); empty: none, the last weights are exported
    held_out: str = ""
    out: str = "runs/sft"  # run folder to write; an interrupted run in it is continued
    epochs: float = 1.0  # passes over the data
    batch_size: int = 128  # pairs per optimiser step, over all ranks
    max_length: int = 12288  # tokens; a longer prompt + trace is left out and counted
    lr: float = 5e-6  # peak learning rate
    lr_schedule: LrSchedule = "cosine"  # shape after the warm-up, per optimiser step
    warmup_ratio: float = 0.03  # share of the optimiser steps spent warming up
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's decay rates
    eval_every: int = 20  # optimiser steps between held-out losses (the last step has one too)
    save_every: int = 20  # optimiser steps between resume states
    steps: int = 0  # optimiser steps; 0: epochs x pairs / batch_size

    @property
    def total_updates(self) -> int:
        return self.steps

    @property
    def warmup_updates(self) -> int:
        return math.ceil(self.warmup_ratio * self.steps)


PAPER_SFT = SFTConfig()
SFT_PRESETS = {
    "paper-7b": PAPER_SFT,
    "paper-14b": replace(PAPER_SFT, preset="paper-14b", model="Qwen/Qwen2.5-14B-Instruct", lr=3e-6),
    "paper-32b": replace(PAPER_SFT, preset="paper-32b", model="Qwen/Qwen2.5-32B-Instruct", lr=2e-6),
    "one-gpu": replace(
        PAPER_SFT, preset="one-gpu", model="Qwen/Qwen2.5-0.5B-Instruct", out="runs/one-gpu/sft", batch_size=32,
        max_length=8192, micro_batch_tokens=8192, lr=1e-5,
    ),
    "small": replace(
        PAPER_SFT, preset="small", model="runs/smollm2", data="recipes/real/traces.jsonl",
        held_out="recipes/real/traces_held_out.jsonl", style="plain", prompt_file="recipes/real/prompt.txt",
        out="runs/real/sft", batch_size=8, lr=2e-4, max_length=512, micro_batch_tokens=2048, checkpointing=False,
    ),
    "tiny": replace(
        PAPER_SFT, preset="tiny", model="runs/toy/start", data="runs/toy/sft.jsonl",
        held_out="runs/toy/sft_held_out.jsonl", prompt_file="runs/toy/prompt.txt", out="runs/toy/sft",
        epochs=4.8, batch_size=16, max_length=256, micro_batch_tokens=4096, lr=4e-3,
        compute_dtype="float32", checkpointing=False, eval_every=200, save_every=400,
    ),
}


# ---- stage 2 -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GRPOConfig(Shared):
    # named set of defaults: paper-{7b,14b,32b}-{reasoning,instruct}, one-gpu, small, tiny
    preset: str = "paper-7b-reasoning"
    # start and reference checkpoint: a folder with safetensors, a run folder, or a hub id
    model: str = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    data: str = "gaotang/RM-R1-Reasoning-RLVR"  # pairs to train on: .jsonl, .parquet or a hub id
    held_out: str = ""  # pairs judged greedily in both orders every eval_every steps; empty: none
    out: str = "runs/grpo"  # run folder to write; an interrupted run in it is continued
    # which prompt the judge sees (cor_prompt.py); a judge as --model brings its own style and wording (judge.json)
    style: Style = "reasoning"
    steps: int = 71  # rollout rounds
    prompts_per_step: int = 1024  # pairs per round, over all ranks (P)
    group_size: int = 7  # responses sampled per pair (G)
    mini_batch: int = 128  # pairs per optimiser step, over all ranks; prompts_per_step / mini_batch steps a round
    temperature: float = 1.0  # softmax temperature of sampling and of every log-prob
    max_prompt_tokens: int = 4096  # tokens; a longer prompt is left out and counted
    # tokens; sampling stops there, and a response that is cut before its verdict has none
    max_response_tokens: int = 8192
    lr: float = 1e-6  # peak learning rate
    warmup_updates: int = 0  # optimiser steps of linear warm-up
    weight_decay: float = 0.01  # AdamW's decoupled weight decay
    agg: Agg = "seq"  # loss average: seq (per response, Eq. 9), token (DAPO), const (Dr. GRPO)
    scale_by_std: bool = True  # divide advantages by the group's standard deviation
    clip_low: float = 0.2  # the ratio is clipped at 1 - clip_low
    clip_high: float = 0.2  # the ratio is clipped at 1 + clip_high
    kl_coef: float = 0.001  # weight of the KL to the start checkpoint in the loss
    tis_cap: float = 0.0  # cap of the trainer/sampler importance weight; 0: no correction
    # official: the whole first round trains with learning rate 0, as the authors' schedule did
    compat: Literal["none", "official"] = "none"
    # engine of the rollouts; auto: vllm where it is installed and suits the device, else torch
    sampler: SamplerKind = "auto"
    sampler_dtype: Precision = "bfloat16"  # weights of the sampler's own copy
    # memory for the rows that the torch sampler decodes together, in GB (1e9 bytes); it decides how many they are
    decode_gb: float = 4.0
    tp: int = 1  # neighbouring ranks that share one vLLM engine (tensor parallel)
    # share of a GPU's memory that vLLM may fill while the trainer waits (--dry-run prints the largest that fits)
    engine_memory: float = 0.7
    offload_optimizer: bool = False  # keep Adam's moments in host memory while the engine samples
    eval_every: int = 10  # rounds between evaluations on held_out (and once at the end)
    save_every: int = 10  # rounds between resume states

    @property
    def updates_per_step(self) -> int:
        if self.prompts_per_step % self.mini_batch or self.mini_batch % ranks.world_size():
            raise UserError(
                f"--prompts-per-step {self.prompts_per_step}, --mini-batch {self.mini_batch} and "
                f"{ranks.world_size()} ranks: each must divide the one before"
            )
        return self.prompts_per_step // self.mini_batch

    @property
    def total_updates(self) -> int:
        return self.steps * self.updates_per_step


PAPER_GRPO = GRPOConfig()


def _paper(size: str, family: str, lr: float) -> GRPOConfig:
    """Appendix G; Instruct models start from their own stage 1 and leave its rows out."""
    name, memory = f"paper-{size}-{family}", 0.7 if size == "7b" else 0.5  # larger models leave less
    if family == "reasoning":
        return replace(PAPER_GRPO, preset=name, model=f"deepseek-ai/DeepSeek-R1-Distill-Qwen-{size.upper()}", lr=lr,
                       engine_memory=memory)
    return replace(PAPER_GRPO, preset=name, model="runs/sft", data="gaotang/RM-R1-after-Distill-RLVR",
                   style="instruct", steps=62, lr=lr, engine_memory=memory)


GRPO_PRESETS = {
    "paper-7b-reasoning": PAPER_GRPO,
    "paper-14b-reasoning": _paper("14b", "reasoning", 1e-6),
    "paper-32b-reasoning": _paper("32b", "reasoning", 8e-7),
    "paper-7b-instruct": _paper("7b", "instruct", 1e-6),
    "paper-14b-instruct": _paper("14b", "instruct", 7e-7),
    "paper-32b-instruct": _paper("32b", "instruct", 5e-7),
    "one-gpu": replace(
        PAPER_GRPO, preset="one-gpu", model="runs/one-gpu/sft", data="gaotang/RM-R1-after-Distill-RLVR",
        out="runs/one-gpu/grpo", style="instruct", steps=200, prompts_per_step=64, mini_batch=16,
        max_response_tokens=2048, micro_batch_tokens=8192, engine_memory=0.4,
    ),
    "small": replace(
        PAPER_GRPO, preset="small", model="runs/real/sft", data="recipes/real/pairs.jsonl", out="runs/real/grpo",
        style="plain", prompt_file="recipes/real/prompt.txt", steps=32, prompts_per_step=8, group_size=8,
        mini_batch=4, max_prompt_tokens=256, max_response_tokens=48, micro_batch_tokens=2048, lr=3e-5,
        lr_schedule="linear", warmup_updates=2, sampler="torch", sampler_dtype="float32", checkpointing=False,
    ),
    "tiny": replace(
        PAPER_GRPO, preset="tiny", model="runs/toy/sft", data="runs/toy/rl.jsonl", held_out="runs/toy/held_out.jsonl",
        prompt_file="runs/toy/prompt.txt", out="runs/toy/grpo", style="instruct", steps=120,
        prompts_per_step=16, group_size=8, mini_batch=8, max_prompt_tokens=64, max_response_tokens=60,
        micro_batch_tokens=4096, lr=3e-4, lr_schedule="linear", warmup_updates=5, betas=(0.9, 0.99),
        weight_decay=0.0, kl_coef=0.005, compute_dtype="float32", sampler="torch", sampler_dtype="float32",
        checkpointing=False, eval_every=20, save_every=20,
    ),
}
