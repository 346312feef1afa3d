"""The judge as the reward of TRL's GRPOTrainer, over HTTP: does a writer learn the rules that it is judged by?

    make demo                                                        # leaves the tiny world and a trained judge behind
    .venv-bench/bin/python -m bench.judge_in_trl                     # after make .venv-bench/installed; 13 minutes

As recipes/judge_as_reward.py, with TRL as the trainer: `judge.py serve` runs in another process, and the trainer
knows nothing of this project but the one file recipes/reward_client.py.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from bench.measure import write
from bench.trl_side import load
from loading.folder import model_folder
from loading.tokenizer import load_tokenizer
from recipes import reward_client
from recipes.judge_as_reward import first_writer, measure, requests
from rollout import TorchSampler
from runtime.cli import start
from runtime.ranks import program


@dataclass(frozen=True)
class Config:
    judge: str = "runs/toy/grpo"  # the judge: a run folder
    world: str = "runs/toy"  # folder that `python -m toy build` wrote
    out: str = "runs/judge_in_trl"  # folder for the writer
    rounds: int = 120  # rollout rounds: 16 requests, 4 answers each, two updates
    seed: int = 0  # seed of data order and sampling


def serve(cfg: Config) -> subprocess.Popen[str]:
    """The judge in another process; its first line says where it listens."""
    command = [sys.executable, "judge.py", "serve", "--model", cfg.judge, "--prompt-file", f"{cfg.world}/prompt.txt",
               "--max-tokens", "60", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    reward_client.URL = next(line.split()[0] for line in server.stdout if line.startswith("http"))
    return server


def train(cfg: Config, folder: str, tokenizer: Any) -> tuple[Any, list[dict[str, Any]]]:
    """The trained writer, and what the trainer logged."""
    args = GRPOConfig(
        output_dir=f"{cfg.out}/trl", max_steps=2 * cfg.rounds, per_device_train_batch_size=32, steps_per_generation=2,
        num_generations=4, max_completion_length=12, temperature=1.0, beta=0.005, loss_type="grpo",
        learning_rate=3e-4, lr_scheduler_type="linear", adam_beta2=0.99, max_grad_norm=1.0, logging_steps=20,
        save_strategy="no", report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, seed=cfg.seed,
    )
    asks = Dataset.from_list([{"prompt": list(pair.context)} for pair in requests(Path(cfg.world), "rl")])
    trainer = GRPOTrainer(load(folder), reward_client.trl_reward, args, train_dataset=asks, processing_class=tokenizer)
    trainer.train()
    return trainer.model, [row for row in trainer.state.log_history if "reward" in row]


def main(cfg: Config) -> None:
    first_writer(Path(cfg.world), Path(cfg.out), cfg.seed)
    folder = str(model_folder(f"{cfg.out}/sft"))
    tokenizer, fresh = load_tokenizer(folder), requests(Path(cfg.world), "held_out")
    kept = {"sft": measure(TorchSampler(load(folder), tokenizer), fresh, cfg.seed)}
    server = serve(cfg)
    try:
        writer, log = train(cfg, folder, tokenizer)
    finally:
        server.terminate()
    kept["trl"] = measure(TorchSampler(writer, tokenizer), fresh, cfg.seed)
    write([{"writer": name, "rules kept": share, "requests": len(fresh)} for name, share in kept.items()],
          vars(cfg) | {"log": log}, Path(cfg.out, "kept.json"))


if __name__ == "__main__":
    start(lambda: main(tyro.cli(Config, prog=program())))
