"""TRL's side: its trainers as they are, with the same model, ids, micro-batch size and numbers.

Both its defaults that change the arithmetic (bfloat16, recomputed activations) are off on both sides. On a
CPU its fused head scores every position, prompts and padding too, where on a GPU it scores the responses
only; `compact` forces the GPU's way, and comparisons use that.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from batch import Group
from bench.measure import Side, timed
from bench.ours import Settings
from bench.workload import make_tokenizer, reward, tokens, words


def load(folder: str) -> Any:
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


class Rounds(TrainerCallback):
    """Times every `updates` optimiser steps as one repeat, then gives the other side its turn."""

    def __init__(self, side: Side, updates: int, count: Callable[[], int], turn: Callable[[int], None]):
        self.side, self.updates, self.count, self.turn = side, updates, count, turn

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.updates == 0:
            self.begun = self.side.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.updates == 0:
            done = state.global_step // self.updates - 1
            self.side.end(self.begun, self.count())
            self.turn(done)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "grad_norm" in logs:
            self.side.losses.append(logs["loss"])
            self.side.norms.append(logs["grad_norm"])


def _common(settings: Settings, steps: int) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(), "max_steps": steps, "learning_rate": settings.lr,
        "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "train_sampling_strategy": "sequential",
    }


def train(trainer: Any, rounds: Rounds, compact: bool, ready: Callable[[], None]) -> None:
    """TRL mixes the responses of a round over its optimiser steps; the same steps are compared here."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(rounds)
    ready()
    head = patch("trl.trainer.utils._use_triton", lambda device: True) if compact else nullcontext()
    with head, patch("trl.trainer.grpo_trainer.shuffle_sequence_dict", lambda batch: batch):
        trainer.train()


def sft(folder: str, groups: Sequence[Group], settings: Settings, rounds: int, compact: bool,
        turn: Callable[[int], None] = lambda k: None, ready: Callable[[], None] = lambda: None) -> Side:
    """`rounds` repeats on the same `groups`, `settings.sft_batch` sequences a step; `turn(k)` runs after repeat k."""
    side, lm = Side(), load(folder)
    rows = [{"input_ids": g.prompt_ids + g.responses[0], "labels": [-100] * len(g.prompt_ids) + g.responses[0]}
            for g in groups]
    batch, steps = settings.sft_batch, len(groups) // settings.sft_batch
    args = SFTConfig(
        per_device_train_batch_size=settings.rows, gradient_accumulation_steps=batch // settings.rows, max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True}, **_common(settings, rounds * steps),
    )
    trainer = SFTTrainer(lm, args, train_dataset=Dataset.from_list(rows * rounds),
                         processing_class=make_tokenizer(lm.config.vocab_size))
    train(trainer, Rounds(side, steps, lambda: tokens(groups), turn), compact, ready)
    return side


def grpo(folder: str, groups: Sequence[Group], settings: Settings, rounds: int, compact: bool,
         turn: Callable[[int], None] = lambda k: None, ready: Callable[[], None] = lambda: None,
         replay: bool = True) -> Side:
    """`rounds` rounds on the same `settings.prompts` prompts; `turn(k)` runs after round k.

    With `replay` the responses of `groups` are used (tokens: of prompts and responses), else it samples (tokens:
    sampled ones). Seconds of scoring, with `replay`, or else of sampling are `side.part`.
    """
    side, size, lm = Side(part=Side()), settings.group_size, load(folder)
    by_prompt = {words(g.prompt_ids): g for g in groups}
    made: list[list[int]] = []

    def recorded(prompts: list[str], trainer: Any) -> dict[str, Any]:
        made.clear()
        made.extend(by_prompt[p].responses[i % size] for i, p in enumerate(prompts))
        return {"prompt_ids": [by_prompt[p].prompt_ids for p in prompts], "completion_ids": list(made),
                "logprobs": None}

    def score(completion_ids: list[list[int]], **_: Any) -> list[float]:
        made[:] = completion_ids
        return [reward(ids) for ids in completion_ids]

    def count() -> int:
        return tokens(groups) if replay else sum(map(len, made))

    args = GRPOConfig(
        per_device_train_batch_size=size, num_generations=size, steps_per_generation=settings.prompts,
        gradient_accumulation_steps=settings.prompts // settings.updates, max_completion_length=settings.max_response,
        beta=settings.kl_coef, loss_type="grpo", shuffle_dataset=False, temperature=1.0,
        **_common(settings, rounds * settings.updates),
    )
    trainer = GRPOTrainer(
        lm, score, args, train_dataset=Dataset.from_list([{"prompt": p} for p in by_prompt] * rounds),
        processing_class=make_tokenizer(lm.config.vocab_size), rollout_func=recorded if replay else None,
    )
    part = "_generate_and_score_completions" if replay else "_generate"
    setattr(trainer, part, timed(getattr(trainer, part), side))
    train(trainer, Rounds(side, settings.updates, count, turn), compact, ready)
    return side


def greedy(folder: str, prompts: Sequence[list[int]], max_tokens: int) -> list[list[int]]:
    """What `generate` finds for each prompt alone at temperature 0: the sampler has to find the same."""
    lm = load(folder).eval()
    stops = set(lm.generation_config.eos_token_id)
    found = []
    for prompt in prompts:
        row = lm.generate(input_ids=torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False)[0]
        row = row[len(prompt) :].tolist()
        found.append(row[: next((i + 1 for i, token in enumerate(row) if token in stops), len(row))])
    return found
