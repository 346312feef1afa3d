"""What a run needs before it starts: steps, memory and disk, from the settings and the model's config.json alone.

GB are 1e9 bytes. n parameters, s GPUs that share one copy of them, c bytes of the compute dtype, L layers, H hidden
size, V vocabulary, T tokens of the largest micro-batch. No GPU and no weights are needed, and nothing here was fitted
to a measured run: the constants under "guesses" are guesses, the rest is counted.

    python grpo.py --preset paper-14b-reasoning --dry-run 8 --gpu-gb 141      exit code 2 if such a run is not possible
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loading.folder import model_folder, tested_config
from runtime.cli import check_numbers
from runtime.errors import UserError

BYTES = {"bfloat16": 2, "float32": 4}
CHUNK = 2**27  # logits in memory at once, head.CHUNK["cuda"]
EXPORT_FILE = 4 * 2**30  # bytes of one file of the exported model, model.save_hf
STATE_FILE = 2**30  # bytes of one file of a resume state, states.FILE_BYTES
PER_NODE = 8  # GPUs that share a host's memory

# guesses
CONTEXT = 2.0  # GB: CUDA context, NCCL's buffers, workspaces of libraries
AWAKE = 3.0  # GB inside the engine's share that are neither weights nor KV cache: CUDA graphs, its activations
ASLEEP = 1.5  # GB that a vLLM engine keeps when it sleeps at level 2
SHARE_LIMIT = 0.95  # largest share of the card with which an engine starts

# hidden size, layers, heads, key/value heads, intermediate size, vocabulary, tied embeddings of the presets' models
WIDTHS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
          "vocab_size", "tie_word_embeddings")
QWEN2 = {
    "Qwen/Qwen2.5-0.5B-Instruct": (896, 24, 14, 2, 4864, 151936, True),
    "Qwen/Qwen2.5-1.5B-Instruct": (1536, 28, 12, 2, 8960, 151936, True),
    "Qwen/Qwen2.5-7B-Instruct": (3584, 28, 28, 4, 18944, 152064, False),
    "Qwen/Qwen2.5-14B-Instruct": (5120, 48, 40, 8, 13824, 152064, False),
    "Qwen/Qwen2.5-32B-Instruct": (5120, 64, 40, 8, 27648, 152064, False),
}
QWEN2 |= {f"deepseek-ai/DeepSeek-R1-Distill-Qwen-{size}B": QWEN2[f"Qwen/Qwen2.5-{size}B-Instruct"]
          for size in (7, 14, 32)}


# ---- the model -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that decide its memory: widths and exact numbers of parameters (head: 0 if tied)."""

    layers: int
    hidden: int
    inner: int
    vocab: int
    heads: int
    kv_heads: int
    dim: int  # of a head
    normed: int  # elements of a token that the norms of one layer read
    layer: int  # parameters of one layer
    head: int
    total: int


def read_shape(path: str) -> Shape:
    """Shape of a model folder, of a run's exported model, of a preset's model or of a hub id."""
    from transformers import AutoConfig

    if path in QWEN2 and not Path(path).is_dir():
        return shape_of(AutoConfig.for_model("qwen2", **dict(zip(WIDTHS, QWEN2[path], strict=True))))
    try:
        return shape_of(tested_config(model_folder(path, weights=False)))
    except UserError as error:
        raise UserError(f"{error}; a run without an export: name the model it starts from (--model)") from None


def shape_of(config: Any) -> Shape:
    """The model is built on the meta device, without memory, and counted."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    layer, heads, hidden = lm.model.layers[0], config.num_attention_heads, config.hidden_size
    kv_heads, dim = config.num_key_value_heads, getattr(config, "head_dim", None) or hidden // heads
    normed = hidden * sum("norm" in name for name, _ in layer.named_children())
    normed += dim * (heads + kv_heads) if hasattr(layer.self_attn, "q_norm") else 0
    sizes = [sum(p.numel() for p in module.parameters()) for module in (layer, lm.get_output_embeddings(), lm)]
    sizes[1] *= not config.tie_word_embeddings
    return Shape(config.num_hidden_layers, hidden, config.intermediate_size, config.vocab_size, heads, kv_heads, dim,
                 normed, *sizes)


def saved_per_token(shape: Shape, c: int) -> int:
    """Bytes that one layer keeps for its backward pass, per token, without checkpointing.

    The inputs of its matrices (2 H, attention output, intermediate), of SiLU and of its product (3 intermediate),
    rotated queries and keys with the values, and of each norm the float32 input and the normalised output.
    """
    matrices = 2 * shape.hidden + 2 * shape.dim * (shape.heads + shape.kv_heads) + 4 * shape.inner
    return c * matrices + (c + 4) * shape.normed


# ---- memory of one GPU, GB -----------------------------------------------------------------------------


def training_memory(cfg: Any, shape: Shape, ranks: int) -> dict[str, float]:
    """GB per GPU of each component at the peak of training, while the engine sleeps; they add up to the peak.

    Always there: weights 4n/s (the float32 master), optimiser 8n/s, reference cn/s (stage 2), gradients 4n/s, the
    gathered embedding and head, cLTH of checkpoints (without checkpointing what every layer keeps). The peak is the
    larger of two moments. The last layer's backward: two gathered layers, a layer's float32 gradient before it is
    reduced, what the layer keeps, two gradients of the intermediate, the head's gradient. The head's backward: three
    float32 chunks of logits (or one, its gradient in c, and the product of both that is added to the head's gradient),
    the head's gradient in float32 and c, hidden states and their gradient.
    """
    n, c, shard, tokens = shape.total, BYTES[cfg.compute_dtype], cfg.shard_ranks or ranks, longest_row(cfg)
    saved, head, hidden = saved_per_token(shape, c), shape.vocab * shape.hidden, c * tokens * shape.hidden
    kept = hidden * shape.layers if cfg.checkpointing else tokens * saved * shape.layers
    recomputed = tokens * (2 * c * shape.inner + (saved if cfg.checkpointing else 0))
    logits = min(max(32, CHUNK // shape.vocab), tokens) * shape.vocab
    root = c * (head + shape.head)
    layer_backward = {
        "gradients": 4 * n / shard + 4 * shape.layer, "gathered": root + 2 * c * shape.layer,
        "activations": kept + recomputed, "head": c * head + hidden}
    softmax, cast = 12 * logits, c * head  # three float32 chunks; the finished gradient in the compute dtype
    added = (4 + c) * logits + (4 * head if c < 4 else 0)  # a chunk, its gradient, and the product that is added
    head_backward = {
        "gradients": 4 * n / shard, "gathered": root, "activations": kept,
        "head": 4 * head + max(softmax, added, cast) + 2 * hidden}
    peak = max(layer_backward, head_backward, key=lambda parts: sum(parts.values()))
    parts = {"weights": 4 * n / shard, "optimiser": 8 * n / shard,
             "reference": c * n / shard if _second_stage(cfg) else 0.0} | peak
    asleep = BYTES[cfg.sampler_dtype] * n / 1e9 if _torch_sampler(cfg) else ASLEEP
    engine = asleep if _second_stage(cfg) else 0.0
    return {name: size / 1e9 for name, size in parts.items()} | {"engine": engine, "CUDA": CONTEXT}


def sampling_memory(cfg: Any, shape: Shape, ranks: int, gpu_gb: float) -> dict[str, float]:
    """Most GB per GPU of each component while the engine is awake; there are no gradients and no activations.

    weights 4n/s, reference as in training, optimiser 8n/s or 0 with --offload-optimizer, sync: the largest tensor
    whole and this rank's cast of it. engine: its share of the card (vLLM's weights, KV cache and graphs), or for
    TorchSampler a whole copy and --decode-gb.
    """
    b, shard = BYTES[cfg.sampler_dtype], cfg.shard_ranks or ranks
    training = training_memory(cfg, shape, ranks)
    if _torch_sampler(cfg):
        engine = b * shape.total / 1e9 + cfg.decode_gb
    else:
        engine = cfg.engine_memory * gpu_gb
    return {"weights": training["weights"], "optimiser": 0.0 if cfg.offload_optimizer else training["optimiser"],
            "reference": training["reference"], "sync": b * shape.vocab * shape.hidden * (1 + 1 / shard) / 1e9,
            "engine": engine, "CUDA": CONTEXT}


def kv_bytes(shape: Shape, b: int, tp: int = 1) -> int:
    """Bytes of one token's keys and values on one GPU: 2 L x kv heads / tp x head_dim x b, at least one head."""
    return 2 * shape.layers * b * shape.dim * max(1, shape.kv_heads // tp)


def engine_tokens(cfg: Any, shape: Shape, share: float, gpu_gb: float) -> int:
    """Tokens of KV cache that a vLLM engine of `tp` GPUs holds with this share of each card."""
    b = BYTES[cfg.sampler_dtype]
    room = share * gpu_gb - AWAKE - b * shape.total / cfg.tp / 1e9
    return max(0, int(room * 1e9 / kv_bytes(shape, b, cfg.tp)))


def largest_share(cfg: Any, shape: Shape, ranks: int, gpu_gb: float) -> float:
    """Largest --engine-memory (share of the card, rounded down to 0.01) that fits beside the rest when sampling."""
    parts = sampling_memory(cfg, shape, ranks, gpu_gb)
    free = (gpu_gb - sum(parts.values()) + parts["engine"]) / gpu_gb
    return min(SHARE_LIMIT, max(0.0, math.floor(100 * free + 1e-9) / 100))


def _second_stage(cfg: Any) -> bool:
    return hasattr(cfg, "group_size")


def _torch_sampler(cfg: Any) -> bool:
    """`auto` counts as vllm: a dry run is about GPUs."""
    return getattr(cfg, "sampler", "") == "torch"


# ---- host memory and disk ------------------------------------------------------------------------------


def storage(cfg: Any, shape: Shape, ranks: int) -> dict[str, float]:
    """GB of one node's host memory.

    moments: 8n/s a GPU with --offload-optimizer; pinned memory is rounded up to a power of two. Then either state:
    each rank of the node writes its part of a resume state file by file, and holds a file's tensors and its content;
    or export: rank 0 holds the whole float32 model, 4n, and one file of it again.
    """
    n, here = shape.total, min(ranks, PER_NODE)
    part = n / (cfg.shard_ranks or ranks)
    largest = 4 * shape.vocab * shape.hidden / (cfg.shard_ranks or ranks)  # a file ends after the tensor that fills it
    sizes = {"moments": here * 2 ** math.ceil(math.log2(8 * part)) if getattr(cfg, "offload_optimizer", False) else 0,
             "state": 2 * here * min(12 * part, STATE_FILE + largest), "export": 4 * n + min(4 * n, EXPORT_FILE)}
    return {name: size / 1e9 for name, size in sizes.items()}


def longest_row(cfg: Any) -> int:
    """Tokens of the largest micro-batch: the budget, or one sequence that exceeds it and stands alone."""
    return max(cfg.micro_batch_tokens, longest_sequence(cfg))


def longest_sequence(cfg: Any) -> int:
    """Tokens of the longest prompt with its response that the settings let through."""
    return cfg.max_prompt_tokens + cfg.max_response_tokens if _second_stage(cfg) else cfg.max_length


# ---- refusals ------------------------------------------------------------------------------------------


def refuse(cfg: Any, shape: Shape, ranks: int) -> None:
    """UserError that names the first two settings that do not divide."""
    gpus, tp = f"{ranks} GPUs", getattr(cfg, "tp", 1)
    pairs = [(ranks, cfg.shard_ranks or ranks, gpus, f"--shard-ranks {cfg.shard_ranks}")]
    if _second_stage(cfg):
        mini, few = f"--mini-batch {cfg.mini_batch}", shape.kv_heads
        pairs += [
            (cfg.prompts_per_step, cfg.mini_batch, f"--prompts-per-step {cfg.prompts_per_step}", mini),
            (cfg.mini_batch, ranks, mini, gpus),
            (ranks, tp, gpus, f"--tp {tp}"),
            (shape.heads, tp, f"the model's {shape.heads} attention heads", f"--tp {tp}"),
            (shape.inner, tp, f"the model's intermediate size {shape.inner}", f"--tp {tp}"),
            (max(few, tp), min(few, tp), f"the model's {few} key/value heads", f"--tp {tp}"),
        ]
        if tp > 1 and _torch_sampler(cfg):
            raise UserError(f"--tp {tp} and --sampler torch: only vLLM spreads its weights over GPUs")
    else:
        pairs += [(cfg.batch_size, ranks, f"--batch-size {cfg.batch_size}", gpus)]
    for whole, part, first, second in pairs:
        if part < 0 or whole % part:
            raise UserError(f"{first} and {second} do not divide")


HELP = {
    "training": "more GPUs, a larger --shard-ranks, a smaller --micro-batch-tokens, --checkpointing",
    "sampling": "more GPUs, a larger --shard-ranks, a smaller --engine-memory with a larger --tp, --offload-optimizer",
}


def refuse_layout(cfg: Any, shape: Shape, ranks: int, gpu_gb: float) -> None:
    """UserError for a layout that does not fit: the largest component, and what would help."""
    for phase, parts in _phases(cfg, shape, ranks, gpu_gb).items():
        if (total := sum(parts.values())) > gpu_gb:
            size, largest = max((gb, name) for name, gb in parts.items())
            raise UserError(f"{phase} needs {total:.1f} GB of {gpu_gb:g}; the largest part is the {largest} with "
                            f"{size:.1f}. Would help: {HELP[phase]}")
    if _second_stage(cfg) and not _torch_sampler(cfg):
        held, needed = engine_tokens(cfg, shape, cfg.engine_memory, gpu_gb), longest_sequence(cfg)
        if held < needed:
            weights = BYTES[cfg.sampler_dtype] * shape.total / cfg.tp / 1e9
            raise UserError(f"--engine-memory {cfg.engine_memory} of {gpu_gb:g} GB: beside the engine's weights with "
                            f"{weights:.1f} GB it holds {held} tokens of KV cache, one sequence has up to {needed}. "
                            f"Would help: a larger --tp (now {cfg.tp}) or --engine-memory (at most "
                            f"{largest_share(cfg, shape, ranks, gpu_gb):.2f})")


def _phases(cfg: Any, shape: Shape, ranks: int, gpu_gb: float) -> dict[str, dict[str, float]]:
    sampling = {"sampling": sampling_memory(cfg, shape, ranks, gpu_gb)} if _second_stage(cfg) else {}
    return {"training": training_memory(cfg, shape, ranks)} | sampling


# ---- the report -----------------------------------------------------------------------------------------


def report(cfg: Any, shape: Shape, ranks: int, gpu_gb: float) -> str:
    """What --dry-run prints: parameters, work of a step, memory by component and phase, engine, host, disk."""
    size, phases = storage(cfg, shape, ranks), _phases(cfg, shape, ranks, gpu_gb)
    pairs, mini = (cfg.prompts_per_step, cfg.mini_batch) if _second_stage(cfg) else (cfg.batch_size, cfg.batch_size)
    responses = f" x {cfg.group_size} responses" if _second_stage(cfg) else ""
    names = dict.fromkeys(name for parts in phases.values() for name in parts)
    table = {name: [parts.get(name, 0.0) for parts in phases.values()] for name in names}
    table["peak"] = [sum(parts.values()) for parts in phases.values()]
    lines = [f"{cfg.preset}: {cfg.model} on {ranks} x {gpu_gb:g} GB (1e9 bytes); estimated, not measured",
             f"parameters  {shape.total / 1e9:.2f}e9 in {shape.layers} layers",
             f"a step      {pairs} pairs{responses}, {pairs // mini} optimiser steps of {mini // ranks} pairs a GPU",
             "", f"{'GB a GPU':<14}" + "".join(f"{phase:>10}" for phase in phases)]
    lines += [f"{name:<14}" + "".join(f"{gb:>10.1f}" for gb in row) for name, row in table.items() if any(row)]
    lines[-1] += "   fits" if max(table["peak"]) <= gpu_gb else "   DOES NOT FIT"
    if _second_stage(cfg) and not _torch_sampler(cfg):
        best = largest_share(cfg, shape, ranks, gpu_gb)
        held, most = (engine_tokens(cfg, shape, share, gpu_gb) for share in (cfg.engine_memory, best))
        lines.append(f"engine        --engine-memory {cfg.engine_memory:.2f} holds {held:,} tokens of KV; the largest "
                     f"that fits, {best:.2f}, {most:,}")
    host = size["moments"] + max(size["state"], size["export"])
    lines += ["", f"host memory {host:.0f} GB a node: moments {size['moments']:.0f}, then a resume state "
              f"{size['state']:.0f} or rank 0's export {size['export']:.0f}",
              f"disk        {12e-9 * shape.total:.0f} GB a resume state (2 kept, 3 while one is written), "
              f"{4e-9 * shape.total:.0f} GB the exported model (twice while it is replaced)"]
    return "\n".join(lines)


def dry_run(cfg: Any) -> None:
    """Print the report for `cfg.dry_run` GPUs; UserError (exit code 2) for sizes or layouts that are not possible."""
    check_numbers(cfg, "dry_run", "gpu_gb", *(("tp", "engine_memory") if _second_stage(cfg) else ()))
    shape = read_shape(cfg.model)
    refuse(cfg, shape, cfg.dry_run)
    print(report(cfg, shape, cfg.dry_run, cfg.gpu_gb))
    refuse_layout(cfg, shape, cfg.dry_run, cfg.gpu_gb)
