"""The cases of test_ranks.py as every rank runs them: `rank_worker.py FOLDER STAGE` under torchrun, or in one process.

A case trains or computes something and rank 0 writes what was seen to FOLDER/STAGE/NAME.json (facts, gathered
over the ranks) and NAME.safetensors (whole tensors in float64). The tests compare; nothing is asserted here.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny_models
import torch
import torch.distributed as dist
import torch.nn.attention.flex_attention as kernels
from safetensors.torch import save_file
from torch import Tensor

import grpo
import model
import sft
from batch import Group, micro_batches
from data import load_pairs
from loading.tokenizer import load_tokenizer
from ops import attention
from rollout import Rollout, TorchSampler
from runtime import cli, disk, ranks as runtime_ranks, states
from runtime.steps import StopSignal
from variants import rlpr, scalar_rm
from variants.std_filter import StdFilter

ARCH = {"tied": "qwen2", "untied": "qwen3"}  # qwen3 with heads of 6: on four ranks its head norms have an empty shard
AGGS = {"tied": ("seq", "token", "const"), "untied": ("seq",)}
WIDE, NARROW = 4096, 60  # micro_batch_tokens: a mini-batch in one; several, and not as many on every rank
PLANS = {1: [("tied", WIDE), ("untied", WIDE)], 2: [("tied", NARROW), ("untied", NARROW)],
         4: [("tied", NARROW), ("untied", NARROW)]}
FAULT = "the reward of rank 1 is broken"
SIZES = (19, 7)  # response tokens of rank 0 and of rank 1 (P8)


# ---- the world: two models, skewed pairs ---------------------------------------------------------------


def words(count: int, seed: int) -> str:
    return " ".join(tiny_models.WORDS[(7 * i * i + 3 * i + seed) % 30] for i in range(count))


def make_world(folder: Path) -> None:
    """Odd widths, so that shards are uneven; prompts of 5 to 140 tokens in a context of 128, so that work is skewed."""
    for name, arch in ARCH.items():
        changes = {"vocab_size": 51, "intermediate_size": 45} | ({"head_dim": 6} if arch == "qwen3" else {})
        lm = tiny_models.make_lm(arch, name == "tied", seed=3, **changes)
        tiny_models.make_folder(folder / name, lm, tokenizer=True)

    def ready(i: int, size: int, **more: str) -> dict[str, Any]:
        message = {"role": "user", "content": words(size, i)}
        return {"pair_id": f"p{i}", "context_messages": [message], "winner": "model_a"} | more

    def write(name: str, rows: Sequence[dict[str, Any]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("rl.jsonl", [ready(i, 3 + 9 * (i % 5)) for i in range(21)])
    write("full.jsonl", [ready(i, 140 if i % 3 else 6) for i in range(21)])  # 140: every response is empty
    traces = [words(2 + 11 * (i % 4), i + 1) for i in range(13)]
    write("sft.jsonl", [ready(i, 4 + 8 * (i % 3), winner=f"{t} <answer>[[A]]</answer>") for i, t in enumerate(traces)])
    write("sft_held_out.jsonl", [ready(i, 9, winner=f"{words(9, 2 * i)} <answer>[[B]]</answer>") for i in range(3)])
    question = [{"role": "user", "content": "w1 w2"}]
    write("held_out.jsonl", [
        {"pair_id": f"h{i}", "context": question, "response_a": words(2 + i, i), "response_b": words(9 - i, i + 9),
         "winner": "AB"[i % 2]} for i in range(5)])
    (folder / "prompt.txt").write_text("judge")


def sft_config(stage: Stage, name: str, **changes: Any) -> sft.Config:
    base = replace(
        sft.PRESETS["tiny"], model=str(stage.world / "tied"), data=str(stage.world / "sft.jsonl"), held_out="",
        out=str(stage.folder / name), prompt_file="", batch_size=8, steps=3, micro_batch_tokens=NARROW, lr=1e-2,
        max_grad_norm=0.5, compute_dtype="float64", eval_every=1, save_every=100)
    return replace(base, **changes)


def grpo_config(stage: Stage, name: str, **changes: Any) -> grpo.Config:
    base = replace(
        grpo.PRESETS["tiny"], model=str(stage.world / "tied"), data=str(stage.world / "rl.jsonl"), held_out="",
        out=str(stage.folder / name), prompt_file=str(stage.world / "prompt.txt"), steps=2, prompts_per_step=8,
        group_size=3, mini_batch=4, max_prompt_tokens=200, max_response_tokens=9, micro_batch_tokens=NARROW, lr=1e-2,
        lr_schedule="linear", warmup_updates=2, kl_coef=0.1, max_grad_norm=0.5, compute_dtype="float64",
        sampler_dtype="float64", save_every=100, eval_every=1)
    return replace(base, **changes)


def parity(rollouts: Sequence[Rollout], pairs: Sequence[Any], *_: Any) -> Tensor:
    """A reward that random weights earn now and then, so that the policy really moves."""
    return torch.tensor([1.0 if sum(r.response_ids) % 2 else -1.0 for r in rollouts]).view(len(pairs), -1)


# ---- what is recorded ----------------------------------------------------------------------------------


@contextlib.contextmanager
def patched(owner: Any, **names: Any) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in names}
    try:
        for name, value in names.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def exact_norms() -> Iterator[None]:
    """RMSNorm in float64 for every model that is made meanwhile (transformers' computes in float32)."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    with patched(Qwen2RMSNorm, forward=forward), patched(Qwen3RMSNorm, forward=forward):
        yield


def settle() -> None:
    """A restart in one process: rank 0 may still be renaming what the others have left behind."""
    if runtime_ranks.world_size() > 1:
        dist.barrier()


def interleave(parts: Sequence[Sequence[Any]]) -> list[Any]:
    """What ranks hold as items[rank::ranks] -> items."""
    return [item for row in itertools.zip_longest(*parts) for item in row]


class Record:
    """What a run did, seen at its seams: rollouts, rewards, micro-batches, the policy that was saved."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {"rollouts": [], "rewards": [], "stopped": False}
        self.weights: list[list[float]] = []  # of this rank: the weights of the micro-batches of each plan
        self.policy: Any = None

    @contextlib.contextmanager
    def watching(self, requested: Callable | None) -> Iterator[None]:
        update, advantages, save = grpo.update, grpo.group_advantages, states.save_state

        def seen_update(policy: Any, reference: Any, optimizer: Any, rollouts: Any, *rest: Any) -> Any:
            size = len(rollouts) // len(run_rewards[-1])
            groups = [rollouts[i : i + size] for i in range(0, len(rollouts), size)]
            mine = [[g[0].prompt_ids, [r.response_ids for r in g]] for g in groups]
            self.facts["rollouts"].append(interleave(runtime_ranks.gather(mine)))
            self.facts["rewards"].append(interleave(runtime_ranks.gather(run_rewards[-1])))
            return update(policy, reference, optimizer, rollouts, *rest)

        run_rewards: list[list[list[float]]] = []

        def seen_advantages(rewards: Tensor, scale: bool) -> Tensor:
            run_rewards.append(rewards.tolist())
            return advantages(rewards, scale)

        def seen_save(path: Path, policy: Any, optimizer: Any, progress: Any) -> None:
            self.policy = policy
            save(path, policy, optimizer, progress)

        def seen_batches(*args: Any) -> Iterator[Any]:
            made = list(micro_batches(*args))
            self.weights.append([batch.weight for batch in made])
            return iter(made)

        self.advantage = seen_advantages
        stop = {"requested": requested} if requested else {}
        with (
            patched(grpo, update=seen_update, micro_batches=seen_batches),
            patched(sft, micro_batches=seen_batches),
            patched(states, save_state=seen_save),
            patched(StopSignal, **stop),
        ):
            yield


class Stage:
    """Where one launch writes: `folder/NAME` are runs, `folder/NAME.json` and `.safetensors` what was seen."""

    def __init__(self, root: Path, name: str):
        self.root, self.name = root, name
        self.world, self.folder = root / "world", root / name

    def save(self, name: str, facts: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
        if runtime_ranks.rank() == 0:
            if tensors:
                save_file({n: t.contiguous() for n, t in tensors.items()}, self.folder / f"{name}.safetensors")
            disk.write_whole(self.folder / f"{name}.json", json.dumps(facts))
        settle()

    def train(self, name: str, cfg: Any, stop_after: int = 0, **functions: Any) -> None:
        """One `train` of sft or grpo and what was seen of it; with `stop_after` it is stopped after that many steps."""
        record, calls = Record(), itertools.count(1)
        requested = (lambda _: next(calls) == stop_after) if stop_after else None
        exact = exact_norms() if cfg.compute_dtype == "float64" else contextlib.nullcontext()
        with record.watching(requested), exact:
            try:
                if isinstance(cfg, grpo.Config):
                    functions.setdefault("score", parity)
                    grpo.train(cfg, grpo.Method(advantage=record.advantage, **functions))
                else:
                    sft.train(cfg)
            except KeyboardInterrupt:
                record.facts["stopped"] = True
            tied = record.policy.lm.lm_head.weight is record.policy.lm.model.embed_tokens.weight
            tensors = dict(model.gathered_weights(record.policy, torch.float64))
        facts = record.facts | {"tied": runtime_ranks.gather(tied), "plans": runtime_ranks.gather(record.weights)}
        self.save(name, facts, tensors)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def keep_varied(rewards: Tensor) -> Tensor:
    return (rewards != rewards[:, :1]).any(1)


# ---- runs: the same on any number of ranks -------------------------------------------------------------


def sft_run(stage: Stage, name: str, tie: str, micro: int, **changes: Any) -> None:
    changes = {"model": str(stage.world / tie), "micro_batch_tokens": micro} | changes
    stage.train(name, sft_config(stage, name, **changes))


def grpo_run(stage: Stage, name: str, agg: str, tie: str, micro: int, **changes: Any) -> None:
    keep = changes.pop("keep", None)
    changes = {"model": str(stage.world / tie), "agg": agg, "micro_batch_tokens": micro} | changes
    stage.train(name, grpo_config(stage, name, **changes), keep=keep)


def runs(ranks: int) -> dict[str, Callable[[Stage, str], None]]:
    """Whole runs. The micro-batch plan is a matter of the ranks: one process has a single plan."""
    cases: dict[str, Callable[[Stage, str], None]] = {}

    def add(name: str, function: Callable, *args: Any, **changes: Any) -> None:
        cases[name] = lambda stage, name: function(stage, name, *args, **changes)

    for tie, micro in PLANS[ranks]:
        add(f"sft-{tie}-{micro}", sft_run, tie, micro)
        for agg in AGGS[tie]:
            add(f"grpo-{agg}-{tie}-{micro}", grpo_run, agg, tie, micro)
    add("sft-held-out", sft_run, "tied", NARROW, held_out="sft_held_out.jsonl")
    add("grpo-empty", grpo_run, "token", "untied", NARROW, data="full.jsonl", tis_cap=2.0)
    add("grpo-keep", grpo_run, "seq", "tied", NARROW, keep=keep_varied, group_size=2, steps=3)
    add("grpo-evaluated", grpo_run, "seq", "tied", WIDE, held_out="held_out.jsonl")
    if ranks > 1:
        add("grpo-offload", grpo_run, "seq", "tied", NARROW, offload_optimizer=True)
    return cases


# ---- parts: gradients, sync, moments, order of calls ---------------------------------------------------


def made_groups() -> list[Group]:
    """One response per rank of two, of 19 and 7 tokens."""
    return [Group([3, 5 + r], [[3 + (5 * i + r) % 40 for i in range(size)]]) for r, size in enumerate(SIZES)]


def gradient(stage: Stage, name: str, tie: str) -> None:
    """The gradient of an uneven batch, the norm the step returns, and the weights after the clipped step."""
    with exact_norms():
        mesh = model.make_mesh(torch.float64)
        policy = model.load_policy(str(stage.world / tie), torch.float64, mesh, torch.float64)
        optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
        mine = made_groups()[runtime_ranks.rank() :: runtime_ranks.world_size()]
        cfg = sft_config(stage, name, micro_batch_tokens=10)
        nll, tokens = sft.nll_loss(policy, mine, cfg, backward=True)
        slopes = {n: whole(p.grad).clone() for n, p in policy.lm.named_parameters()}
        norm = model.optimizer_step(policy, optimizer, 1.0, 0.05)
        after = {f"after.{n}": t for n, t in model.gathered_weights(policy, torch.float64)}
    facts = {"norm": runtime_ranks.gather(norm), "tokens": runtime_ranks.gather(tokens),
             "nll": sum(runtime_ranks.gather(nll))}
    stage.save(name, facts, slopes | after)


def flex_gradient(stage: Stage, name: str, tie: str) -> None:
    """Gradients by FlexAttention as on GPUs (compiled, all groups in one row, recomputed), and by grouped SDPA."""
    shared = Group([3 + i % 20 for i in range(60)], [[5] * 40 + [2], [6] * 90 + [2], [7, 2]])
    mine = [[shared, Group([9] * 30, [[4] * 20 + [2]])], [replace(shared, responses=[[8, 2]])]][runtime_ranks.rank()]
    mesh, slopes = model.make_mesh(torch.float64), {}
    graphs = attention.compiled_graphs()
    for kind in ("grouped", "flex"):
        attention.FLEX.update({"cpu": "aot_eager"} if kind == "flex" else {})
        attention._compiled.cache_clear()
        with exact_norms(), patched(kernels, _validate_device=lambda *_: None):  # it refuses a backward on a CPU
            policy = model.load_policy(str(stage.world / tie), torch.float64, mesh, torch.float64, checkpointing=True)
            assert policy.lm.config._attn_implementation == kind
            for batch in micro_batches(mine, 256, "cpu"):
                (policy.train()(batch).logprobs * batch.targets).sum().mul(batch.weight).backward()
        slopes |= {f"{kind}.{n}": whole(p.grad).clone() for n, p in policy.lm.named_parameters()}
    del attention.FLEX["cpu"]
    attention._compiled.cache_clear()
    stage.save(name, {"graphs": attention.compiled_graphs() - graphs}, slopes)


class Engine:
    """Stands for an engine beside the trainer: asleep until `sync`, its weights garbage then; notes every call."""

    def __init__(self, cfg: grpo.Config, tokenizer: Any, note: Callable[[str], None]):
        self.copy = TorchSampler(model.load_policy(cfg.model, torch.float64).lm, tokenizer)
        self.note = note
        self.sleep_now()

    def sleep_now(self) -> None:
        self.awake = False
        with torch.no_grad():
            for parameter in self.copy.lm.parameters():
                parameter.fill_(torch.nan)

    def sync(self, weights: Any) -> None:
        self.note("sync")
        self.copy.sync(weights)
        self.awake = True

    def generate(self, *args: Any) -> Any:
        self.note("generate" if self.awake else "generate asleep")
        return self.copy.generate(*args)

    def chat(self, *args: Any) -> Any:
        self.note("chat" if self.awake else "chat asleep")
        return self.copy.chat(*args)

    def sleep(self) -> None:
        self.note("sleep")
        self.sleep_now()

    def close(self) -> None:
        self.note("close")


def engine_order(stage: Stage, name: str) -> None:
    """P20: every call of the engine and of the update, with where Adam's moments are: none, here, away."""
    events: list[str] = []
    made: list[Any] = []

    class Watched(model.HostMoments):
        def __init__(self, optimizer: Any, wanted: bool):
            super().__init__(optimizer, wanted)
            made.append(optimizer)

    def note(what: str) -> None:
        states = made[-1].state.values() if made else ()
        parts = [getattr(s["exp_avg_sq"], "_local_tensor", s["exp_avg_sq"]) for s in states]
        here = sum(p.untyped_storage().nbytes() for p in parts)
        events.append(f"{what}: {'no' if not parts else 'here' if here else 'away'}")

    cfg = grpo_config(stage, name, steps=3, held_out=str(stage.world / "held_out.jsonl"), eval_every=2,
                      offload_optimizer=True)
    update = grpo.update

    def seen(*args: Any) -> Any:
        note("update")
        return update(*args)

    diffs = []
    for stop_after in (2, 0):
        events.append("start")
        with (
            exact_norms(),
            patched(model, HostMoments=Watched),
            patched(grpo, make_engine=lambda c, t, *_: Engine(c, t, note), update=seen),
        ):
            stage.train(name, cfg, stop_after)
        made.clear()
    for row in tiny_models.logged(Path(cfg.out)):
        diffs.append(row.get("sync/logprob_diff_max"))
    stage.save(name, {"events": runtime_ranks.gather(events), "diffs": diffs})


def mixed(stage: Stage, name: str) -> None:
    """P12: the norm of a gradient in float32 and in bf16 arithmetic, and the dtypes of what the ranks send."""
    sent: dict[str, set[str]] = {"reduce": set(), "gather": set()}
    reduce, gather = dist.reduce_scatter_single, dist.all_gather_single

    def seen_reduce(output: Any, input: Any, *args: Any, **named: Any) -> Any:
        sent["reduce"].add(str(input.dtype))
        return reduce(output, input, *args, **named)

    def seen_gather(output: Any, input: Any, *args: Any, **named: Any) -> Any:
        sent["gather"].add(str(input.dtype))
        return gather(output, input, *args, **named)

    mesh, cfg = model.make_mesh(torch.bfloat16), sft_config(stage, name)
    mine = made_groups()[runtime_ranks.rank() :: runtime_ranks.world_size()]
    facts: dict[str, Any] = {}
    for label, compute in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        for kinds in sent.values():
            kinds.clear()
        with patched(dist, reduce_scatter_single=seen_reduce, all_gather_single=seen_gather):
            policy = model.load_policy(str(stage.world / "tied"), torch.float32, mesh, compute).train()
            sft.nll_loss(policy, mine, cfg, backward=True)
        norm = model.optimizer_step(policy, torch.optim.AdamW(policy.parameters()), 1e-3, 1.0)
        facts[label] = runtime_ranks.gather({"norm": norm} | {k: sorted(v) for k, v in sent.items()})
    stage.save(name, facts)


# ---- the variants --------------------------------------------------------------------------------------


def scalar_gradient(stage: Stage, name: str) -> None:
    """The gradient of the Bradley-Terry loss of five pairs, whose micro-batches differ in number between ranks."""
    folder, tokenizer = str(stage.world / "tied"), load_tokenizer(str(stage.world / "tied"))
    cfg = replace(scalar_rm.PRESETS["tiny"], model=folder, micro_batch_tokens=40)
    with exact_norms():
        mesh = model.make_mesh(torch.float64)
        scorer = scalar_rm.load_scorer(folder, torch.float64, mesh, torch.float64)
        torch.nn.init.constant_(scorer.lm.score.weight, 0.5)  # a head of zeros would give the body no gradient
        groups = scalar_rm.encode_pairs(load_pairs("held_out.jsonl"), tokenizer, cfg)
        mine = groups[runtime_ranks.rank() :: runtime_ranks.world_size()]
        loss, count = scalar_rm.bt_loss(scorer, mine, cfg, backward=True)
    slopes = {n: whole(p.grad).clone() for n, p in scorer.lm.named_parameters()}
    stage.save(name, {"loss": sum(runtime_ranks.gather(loss)), "pairs": sum(runtime_ranks.gather(count))}, slopes)


def rlpr_statistics(stage: Stage, name: str) -> None:
    """RLPR's probabilities under a sharded policy, and its filter's deviations."""
    rank, ranks = runtime_ranks.rank(), runtime_ranks.world_size()
    rewards = torch.tensor([[1.0] * 3, [1.0, 1.0, -1.0], [1.0] * 3, [1.0] * 3], dtype=torch.float64)
    groups = [Group([3, 4], [[5, 6], [7]], None, [[0.0, 1.0], [1.0]]), Group([3] * 30, [[], [8]], None, [[], [1.0]]),
              Group([9], [[5] * 9, [6]], None, [[1.0] * 9, [0.0]]), Group([4], [[], []], None, [[], []])]
    with exact_norms():
        mesh = model.make_mesh(torch.float64)
        policy = model.load_policy(str(stage.world / "tied"), torch.float64, mesh, torch.float64)
        found = {}
        for budget in (1, 12, 4096):
            cfg = replace(rlpr.PRESETS["tiny"], micro_batch_tokens=budget)
            mine = rlpr.verdict_probabilities(policy, groups[rank::ranks], cfg)
            found[str(budget)] = interleave(runtime_ranks.gather(mine.tolist()))
    std = StdFilter(str(stage.folder), 0.5)
    for scale in (1.0, 0.5):  # a pass whose groups were refused, then one that was kept
        std.keep(scale * rewards[rank::ranks])
    std.advantage(rewards[rank::ranks], True)
    stage.save(name, {"probabilities": found, "deviations": runtime_ranks.gather(std.history)})


# ---- stopping, resuming, faults ------------------------------------------------------------------------


def sft_resumed(stage: Stage, name: str) -> None:
    """Stopped after a step whose held-out loss was no better: the last pass over the weights was a scoring one."""
    changes: dict[str, Any] = {"steps": 4, "lr": 0.3, "held_out": "sft_held_out.jsonl", "micro_batch_tokens": WIDE}
    straight, cfg = (sft_config(stage, n, **changes) for n in (f"{name}-straight", name))
    stage.train(f"{name}-straight", straight)
    stage.train(f"{name}-stopped", cfg, stop_after=3)
    stage.train(name, cfg)


CHAIN = {"steps": 6, "micro_batch_tokens": NARROW, "agg": "token", "save_every": 100}


def chain(stage: Stage, name: str, begin: str, stop_after: int, **changes: Any) -> None:
    """Continue a copy of the run in `begin` (or start one) and stop after `stop_after` steps; 0: run to the end."""
    if begin and runtime_ranks.rank() == 0:
        shutil.copytree(stage.root / begin, stage.folder / name)
    settle()
    stage.train(name, grpo_config(stage, name, **CHAIN, **changes), stop_after)


def fault(stage: Stage, name: str, at: int) -> None:
    """The last of a launch: rank `at` raises while it scores the second round."""
    calls = itertools.count()

    def score(*args: Any) -> Tensor:
        if next(calls) == 1 and runtime_ranks.rank() == at:
            disk.write_whole(stage.folder / f"{name}.json", json.dumps({"at": time.time()}))
            raise RuntimeError(FAULT)
        return parity(*args)

    grpo.train(grpo_config(stage, name, save_every=1, steps=4), grpo.Method(score=score))


# ---- host memory ---------------------------------------------------------------------------------------


class Peak:
    """Anonymous memory of this process in bytes, sampled: mapped files are not in it."""

    def __enter__(self) -> Peak:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # or what an earlier case freed is filled first, unseen
        self.start = self.peak = self._now()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _now(self) -> int:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))

    def _watch(self) -> None:
        while not self.done.wait(0.001):
            self.peak = max(self.peak, self._now())

    def __exit__(self, *_: object) -> None:
        self.peak = max(self.peak, self._now())
        self.done.set()
        self.thread.join()
        self.grown = self.peak - self.start


def make_large(folder: Path) -> None:
    """Over 200 MB: embedding and head of 82 MB each; the embedding lies in the last file, so that it is read last."""
    from transformers import AutoModelForCausalLM

    config = tiny_models.make_config("llama", vocab_size=40_000, hidden_size=512, intermediate_size=1024,
                                     num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8,
                                     head_dim=64)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    lm.config.save_pretrained(folder)
    tensors = {n: torch.full(p.shape, 0.01) for n, p in lm.named_parameters()}
    last = {"model.embed_tokens.weight": tensors.pop("model.embed_tokens.weight")}
    save_file(tensors, folder / "a.safetensors", metadata={"format": "pt"})
    save_file(last, folder / "b.safetensors", metadata={"format": "pt"})
    places = {name: file for file, those in (("a.safetensors", tensors), ("b.safetensors", last)) for name in those}
    disk.write_whole(folder / "model.safetensors.index.json", json.dumps({"weight_map": places}))


def memory(stage: Stage, name: str) -> None:
    """T17: growth of anonymous memory while a rank loads its shard, and while it loads the whole model."""
    folder, mesh = stage.root / "large", model.make_mesh(torch.float32)
    with Peak() as sharded:
        policy = model.load_policy(str(folder), torch.float32, mesh, torch.float32)
    sizes = [p.numel() * 4 for p in policy.parameters()]
    held = sum(getattr(p, "_local_tensor", p).numel() * 4 for p in policy.parameters())
    filled = all(bool((getattr(p, "_local_tensor", p) == torch.tensor(0.01)).all()) for p in policy.parameters())
    with Peak() as plain:
        copy = model.load_policy(str(folder))  # held until the end is measured: a sample between may come too late
    del policy, copy
    facts = {"whole": sum(sizes), "largest": max(sizes), "shard": held, "filled": filled,
             "sharded": sharded.grown, "plain": plain.grown}
    stage.save(name, {"ranks": runtime_ranks.gather(facts)})


# ---- stages --------------------------------------------------------------------------------------------


def parts(*functions: Callable) -> dict[str, Callable[[Stage, str], None]]:
    cases: dict[str, Callable[[Stage, str], None]] = {}
    for tie in ARCH:
        for part in functions:
            cases[f"{part.__name__}-{tie}"] = lambda stage, name, part=part, tie=tie: part(stage, name, tie)
    return cases


def stage_cases(name: str) -> dict[str, Callable[[Stage, str], None]]:
    """The cases of a launch in order; a later launch continues runs of an earlier one."""
    variants = {"scalar-gradient": scalar_gradient, "rlpr-statistics": rlpr_statistics}
    if name == "two":
        return {
            "chain-2": lambda s, n: chain(s, n, "", 2),
            **runs(2),
            **parts(gradient, flex_gradient),
            "mixed": mixed,
            **variants,
            "engine": engine_order,
            "sft-resumed": sft_resumed,
            "fault": lambda s, n: fault(s, n, 1),
        }
    if name == "one":
        return {
            **runs(1),
            **parts(gradient),
            **variants,
            "engine": engine_order,
            "chain": lambda s, n: chain(s, n, "", 0),
            "sft-resumed": sft_resumed,
        }
    if name == "one_after_two":
        return {
            "chain-2-1": lambda s, n: chain(s, n, "two/chain-2", 2),
            "chain-2-1-end": lambda s, n: chain(s, n, "one_after_two/chain-2-1", 0),
        }
    if name == "four":
        return {
            **runs(4),
            "chain-2-1-4": lambda s, n: chain(s, n, "one_after_two/chain-2-1", 0),
            "hybrid": lambda s, n: chain(s, n, "", 0, shard_ranks=2),
            "hybrid-4": lambda s, n: chain(s, n, "", 2, shard_ranks=2),
            "hybrid-sft": lambda s, n: sft_run(s, n, "untied", NARROW, shard_ranks=2),
            "fault": lambda s, n: fault(s, n, 0),
        }
    if name == "two_after_four":
        return {"memory": memory, "hybrid-4-2": lambda s, n: chain(s, n, "four/hybrid-4", 0, shard_ranks=2)}
    assert name == "one_after_four"
    return {"hybrid-4-1": lambda s, n: chain(s, n, "four/hybrid-4", 0, shard_ranks=2)}


def run_stage(root: Path, name: str) -> None:
    stage = Stage(root, name)
    stage.folder.mkdir(exist_ok=True)
    here = os.getcwd()
    os.chdir(stage.world)  # data sets are named without their folder
    try:
        runtime_ranks.join_ranks()
        for case, function in stage_cases(name).items():
            began = time.perf_counter()
            function(stage, case)
            if runtime_ranks.rank() == 0:
                print(f"{name} {case}: {time.perf_counter() - began:.2f} s", flush=True)
    finally:
        os.chdir(here)


if __name__ == "__main__":
    torch.set_num_threads(1)
    cli.start(lambda: run_stage(Path(sys.argv[1]), sys.argv[2]))
