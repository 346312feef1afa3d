"""What a run needs before it starts: steps, memory, disk, from the settings and config.json alone.

GB are 1e9 bytes. n parameters, s GPUs that one copy of them is spread over, c bytes of the compute dtype, L
layers, H hidden size, V vocabulary, T tokens of the largest micro-batch. Nothing here was fitted to a measured
run: the four constants below are guesses, the rest is counted. Neither torch nor a GPU is needed.

    python grpo.py --preset paper-14b-reasoning --dry-run 8 --gpu-gb 141      one run; exit code 2 if it cannot be
    python -m runtime.sizes                                                           the table of docs/scaling.md
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from runtime.cli import check_positive, start
from runtime.errors import UserError

BYTES = {"bfloat16": 2, "float32": 4}
CHUNK = 2**27  # elements of logits alive at once, head.CHUNK["cuda"]
ROWS = 256  # sequences that TorchSampler samples at once
EXPORT_FILE = 4 * 2**30  # bytes of a file of the exported model, model.save_hf
PER_NODE = 8  # GPUs that share a host's memory

CONTEXT = 2.0  # GB: CUDA context, NCCL's buffers, libraries' workspaces
AWAKE = 3.0  # GB inside the engine's share that are neither weights nor KV: CUDA graphs, its own activations
ASLEEP = 1.5  # GB of those that stay when a vLLM engine sleeps at level 2
SHARE_LIMIT = 0.95  # of the card: an engine does not start with more

PROMPT, RESPONSE = 1200, 700  # mean tokens assumed of a pair's prompt and of a response; they decide no memory

# hidden size, layers, heads, key/value heads, intermediate size, vocabulary, tied embeddings (qwen2)
SHAPES = {
    "Qwen/Qwen2.5-0.5B-Instruct": (896, 24, 14, 2, 4864, 151936, True),
    "Qwen/Qwen2.5-1.5B-Instruct": (1536, 28, 12, 2, 8960, 151936, True),
    "Qwen/Qwen2.5-3B-Instruct": (2048, 36, 16, 2, 11008, 151936, True),
    "Qwen/Qwen2.5-7B-Instruct": (3584, 28, 28, 4, 18944, 152064, False),
    "Qwen/Qwen2.5-14B-Instruct": (5120, 48, 40, 8, 13824, 152064, False),
    "Qwen/Qwen2.5-32B-Instruct": (5120, 64, 40, 8, 27648, 152064, False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (1536, 28, 12, 2, 8960, 151936, False),  # its base is tied
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": (3584, 28, 28, 4, 18944, 152064, False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": (5120, 48, 40, 8, 13824, 152064, False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": (5120, 64, 40, 8, 27648, 152064, False),
}


# ---- the model -----------------------------------------------------------------------------------------


def read_shape(path: str) -> Any:
    """Configuration of a model folder, of a run's exported model, of the paper's models or of a hub id."""
    folder = next((f for f in (Path(path) / "model", Path(path)) if (f / "config.json").is_file()), None)
    if folder is None and path in SHAPES:
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                 "intermediate_size", "vocab_size", "tie_word_embeddings")
        return SimpleNamespace(model_type="qwen2", **dict(zip(names, SHAPES[path], strict=True)))
    try:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(folder or path, trust_remote_code=False)
    except Exception as error:  # the hub client raises many kinds; each means that there is no configuration
        raise UserError(f"{path}: no model's config.json, here or on the hub ({type(error).__name__}); for a run that "
                        "has not exported yet name the model that it starts from (--model)") from None


def parameters(shape: Any) -> dict[str, int]:
    """Exact counts: embedding, head (0 if tied), layer (one of them), layers, norm (the last), total.

    A layer is q, k, v, o of H x (heads or kv heads) x head_dim, three MLP matrices H x intermediate, two norms
    of H; qwen2 adds biases to q, k, v; qwen3 a norm of head_dim to q and k. UserError for another architecture.
    """
    if shape.model_type not in ("llama", "qwen2", "qwen3"):
        raise UserError(f"{shape.model_type} is not among the tested architectures (llama, qwen2, qwen3)")
    hidden, inner = shape.hidden_size, shape.intermediate_size
    query, key = _widths(shape)
    bias = shape.model_type != "qwen2" and getattr(shape, "attention_bias", False)
    layer = 2 * hidden * query + 2 * hidden * key + 3 * hidden * inner + 2 * hidden
    layer += query + 2 * key if bias or shape.model_type == "qwen2" else 0
    layer += hidden if bias else 0
    layer += 2 * inner + hidden if getattr(shape, "mlp_bias", False) else 0
    layer += 2 * (query // shape.num_attention_heads) if shape.model_type == "qwen3" else 0
    counts = {"embedding": shape.vocab_size * hidden, "layer": layer, "layers": layer * shape.num_hidden_layers,
              "norm": hidden, "head": 0 if shape.tie_word_embeddings else shape.vocab_size * hidden}
    return counts | {"total": sum(counts.values()) - layer}


def _widths(shape: Any) -> tuple[int, int]:
    """Elements of a token's queries, and of its keys (its values are as many)."""
    dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return shape.num_attention_heads * dim, shape.num_key_value_heads * dim


def saved_per_token(shape: Any, c: int) -> int:
    """Bytes that one layer keeps for its backward, per token, without checkpointing.

    The inputs of its matrices (2 H, attention output, intermediate), of SiLU and of its product (3 intermediate),
    rotated queries and keys with the values, and of each norm the float32 input and the normalised output.
    """
    query, key = _widths(shape)
    normed = 2 * shape.hidden_size + (query + key if shape.model_type == "qwen3" else 0)
    matrices = 2 * shape.hidden_size + 2 * query + 2 * key + 4 * shape.intermediate_size
    return c * matrices + (c + 4) * normed


# ---- memory of one GPU, GB -----------------------------------------------------------------------------


def training_memory(cfg: Any, shape: Any, ranks: int) -> dict[str, float]:
    """Most GB per GPU of each component while the policy trains and the engine sleeps; they add up to the peak.

    weights 4n/s, the float32 master. gradients 4n/s, and a layer's on its way there: c + 4 bytes an element.
    optimiser 8n/s. reference (stage 2) cn/s. gathered: two layers, embedding and head, c bytes. activations: cLTH of
    checkpoints and one layer's recomputation; without checkpointing every layer's. head: three float32 chunks of
    logits, the head's gradient in float32 and c, hidden states and their gradient. "adam" is what is left of 4n/s
    for the optimiser step's square roots after the memory of forward and backward is free again.
    The components' largest moments do not quite coincide, so the sum is an upper estimate.
    """
    n, c, shard, tokens = parameters(shape), BYTES[cfg.compute_dtype], cfg.shard_ranks or ranks, longest_row(cfg)
    root = n["embedding"] + n["head"]
    saved, head = saved_per_token(shape, c), shape.vocab_size * shape.hidden_size
    deep = shape.num_hidden_layers * (c * shape.hidden_size if cfg.checkpointing else saved)
    recomputed = 3 * c * shape.intermediate_size + (saved if cfg.checkpointing else 0)
    logits = min(max(32, CHUNK // shape.vocab_size), tokens) * shape.vocab_size
    parts = {
        "weights": 4 * n["total"] / shard,
        "gradients": 4 * n["total"] / shard + (c + 4) * n["layer"],
        "optimiser": 8 * n["total"] / shard,
        "reference": c * n["total"] / shard if _second_stage(cfg) else 0.0,
        "gathered": c * (2 * n["layer"] + root),
        "activations": tokens * (deep + recomputed),
        "head": 3 * 4 * logits + (4 + (c if c < 4 else 0)) * head + 2 * c * tokens * shape.hidden_size,
    }
    busy = parts["gathered"] + parts["activations"] + parts["head"]
    parts["adam"] = max(0.0, 4 * n["total"] / shard - busy)
    asleep = BYTES[cfg.sampler_dtype] * n["total"] / 1e9 if _torch_sampler(cfg) else ASLEEP
    engine = asleep if _second_stage(cfg) else 0.0
    return {name: size / 1e9 for name, size in parts.items()} | {"engine": engine, "CUDA": CONTEXT}


def sampling_memory(cfg: Any, shape: Any, ranks: int, gpu_gb: float) -> dict[str, float]:
    """Most GB per GPU of each component while the engine is awake; gradients and activations are gone.

    weights 4n/s, reference as in training, optimiser 8n/s or 0 with --offload-optimizer, sync: the largest tensor
    whole and this rank's cast of it. engine: its share of the card (vLLM's weights, KV and graphs), or for
    TorchSampler a whole copy, the KV of ROWS mean sequences and their logits (32 bytes each: `draw` is exact).
    """
    n, b, shard = parameters(shape), BYTES[cfg.sampler_dtype], cfg.shard_ranks or ranks
    training = training_memory(cfg, shape, ranks)
    if _torch_sampler(cfg):
        rows = max(cfg.group_size, ROWS // cfg.group_size * cfg.group_size)
        cache = rows * sum(mean_lengths(cfg)) * kv_bytes(shape, b)
        engine = (b * n["total"] + cache + 32 * rows * shape.vocab_size) / 1e9
    else:
        engine = cfg.engine_memory * gpu_gb
    return {"weights": training["weights"], "optimiser": 0.0 if cfg.offload_optimizer else training["optimiser"],
            "reference": training["reference"], "sync": b * n["embedding"] * (1 + 1 / shard) / 1e9,
            "engine": engine, "CUDA": CONTEXT}


def kv_bytes(shape: Any, b: int, tp: int = 1) -> int:
    """Bytes of one token's keys and values on one GPU: 2 L x kv heads / tp x head_dim x b, at least one head."""
    key = _widths(shape)[1]
    return 2 * shape.num_hidden_layers * b * max(key // shape.num_key_value_heads, key // tp)


def engine_tokens(cfg: Any, shape: Any, share: float, gpu_gb: float) -> int:
    """Tokens of KV cache that a vLLM engine of `tp` GPUs holds with this share of each card."""
    b = BYTES[cfg.sampler_dtype]
    room = share * gpu_gb - AWAKE - b * parameters(shape)["total"] / cfg.tp / 1e9
    return max(0, int(room * 1e9 / kv_bytes(shape, b, cfg.tp)))


def largest_share(cfg: Any, shape: Any, ranks: int, gpu_gb: float) -> float:
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


def storage(cfg: Any, shape: Any, ranks: int) -> dict[str, float]:
    """GB of one node's host memory and of disk.

    moments: pinned, 8n/s a GPU, with --offload-optimizer. Then either state: a resume state is written from host
    memory, each rank's 12n/s bytes once as tensors and once as the file's content; or export: rank 0 holds the
    whole float32 model, 4n, and one file of it again. disk_state: weights and two moments, 12n; disk_export: 4n.
    """
    n, here = parameters(shape)["total"], min(ranks, PER_NODE) / (cfg.shard_ranks or ranks)
    moments = 8 * n * here if _second_stage(cfg) and cfg.offload_optimizer else 0.0
    sizes = {"moments": moments, "state": 24 * n * here, "export": 4 * n + min(4 * n, EXPORT_FILE),
             "disk_state": 12 * n, "disk_export": 4 * n}
    return {name: size / 1e9 for name, size in sizes.items()}


# ---- steps ---------------------------------------------------------------------------------------------


def longest_row(cfg: Any) -> int:
    """Tokens of the largest micro-batch: the budget, or one sequence that exceeds it and stands alone."""
    return max(cfg.micro_batch_tokens, longest_sequence(cfg))


def longest_sequence(cfg: Any) -> int:
    """Tokens of the longest prompt with its response that the settings let through."""
    return cfg.max_prompt_tokens + cfg.max_response_tokens if _second_stage(cfg) else cfg.max_length


def mean_lengths(cfg: Any, prompt: int = PROMPT, response: int = RESPONSE) -> tuple[int, int]:
    """Assumed mean tokens of a prompt and a response, bounded by the settings."""
    if _second_stage(cfg):
        return min(prompt, cfg.max_prompt_tokens), min(response, cfg.max_response_tokens)
    prompt = min(prompt, cfg.max_length * prompt // (prompt + response))
    return prompt, min(response, cfg.max_length - prompt)


def micro_batch_count(groups: int, size: int, prompt: int, response: int, budget: int) -> int:
    """Micro-batches of `groups` equal groups of `size` responses: what batch.split and batch.plan would make."""
    extra = response - 1  # a response's last token is never an input
    fit = size if prompt + size * extra <= budget else max(1, (budget - prompt) // max(1, extra))
    whole, rest = divmod(size, fit)
    pieces = [prompt + fit * extra] * (groups * whole) + [prompt + rest * extra] * (groups if rest else 0)
    count = used = 0
    for tokens in pieces:  # longest first
        if not count or used + tokens > budget:
            count, used = count + 1, 0
        used += tokens
    return count


def work(cfg: Any, ranks: int, prompt: int = PROMPT, response: int = RESPONSE) -> dict[str, int]:
    """What a step (stage 1) or a round (stage 2) does, for responses and prompts of the assumed mean lengths.

    sequences, updates (optimiser steps), sampled tokens, input tokens (each prompt once for its whole group),
    micro-batches of one update on one rank, and the forward passes over micro-batches on that rank: reference,
    old log-probs of all but the first mini-batch, and the update itself.
    """
    prompt, response = mean_lengths(cfg, prompt, response)
    second = _second_stage(cfg)
    size, pairs = (cfg.group_size, cfg.prompts_per_step) if second else (1, cfg.batch_size)
    updates = cfg.prompts_per_step // cfg.mini_batch if second else 1
    micro = micro_batch_count(pairs // updates // ranks, size, prompt, response, cfg.micro_batch_tokens)
    return {
        "prompt": prompt, "response": response, "pairs": pairs, "sequences": pairs * size, "updates": updates,
        "sampled": pairs * size * response if second else 0,
        "inputs": pairs * (prompt + size * (response - 1)),
        "micro": micro, "forwards": micro * ((3 * updates - 1) if second else 1), "backwards": micro * updates,
    }


# ---- refusals ------------------------------------------------------------------------------------------


def refuse(cfg: Any, shape: Any, ranks: int) -> None:
    """UserError that names the two settings of the first pair that does not divide."""
    heads, few, inner = shape.num_attention_heads, shape.num_key_value_heads, shape.intermediate_size
    gpus, tp = _gpus(ranks), getattr(cfg, "tp", 1)
    if cfg.shard_ranks < 0:
        raise UserError(f"--shard-ranks {cfg.shard_ranks}: 0 (all of {gpus}) or a number that divides them")
    pairs = [(ranks, cfg.shard_ranks or ranks, gpus, f"--shard-ranks {cfg.shard_ranks}")]
    if _second_stage(cfg):
        mini = f"--mini-batch {cfg.mini_batch}"
        pairs += [
            (cfg.prompts_per_step, cfg.mini_batch, f"--prompts-per-step {cfg.prompts_per_step}", mini),
            (cfg.mini_batch, ranks, mini, gpus),
            (ranks, tp, gpus, f"--tp {tp}"),
            (heads, tp, f"the model's {heads} attention heads", f"--tp {tp}"),
            (inner, tp, f"the model's intermediate size {inner}", f"--tp {tp}"),
            (max(few, tp), min(few, tp), f"the model's {few} key/value heads", f"--tp {tp}"),
        ]
        if tp > 1 and _torch_sampler(cfg):
            raise UserError(f"--tp {tp} and --sampler torch: only vLLM spreads its weights over GPUs")
    else:
        pairs += [(cfg.batch_size, ranks, f"--batch-size {cfg.batch_size}", gpus)]
    for whole, part, first, second in pairs:
        if whole % part:
            raise UserError(f"{first} and {second} do not divide")


def refuse_layout(cfg: Any, shape: Any, ranks: int, gpu_gb: float) -> None:
    """UserError for a layout that does not fit: the largest component, and what would help."""
    phases = {"training": training_memory(cfg, shape, ranks)}
    if _second_stage(cfg):
        phases["sampling"] = sampling_memory(cfg, shape, ranks, gpu_gb)
    for phase, parts in phases.items():
        total, largest = sum(parts.values()), max(parts, key=lambda name: parts[name])
        if total > gpu_gb:
            raise UserError(f"{phase} needs {total:.1f} GB of {gpu_gb:g}; the largest part is the {largest} with "
                            f"{parts[largest]:.1f}. {_help(cfg, shape, ranks, gpu_gb, phase, largest)}")
    if "sampling" in phases and not _torch_sampler(cfg):
        held, needed = engine_tokens(cfg, shape, cfg.engine_memory, gpu_gb), longest_sequence(cfg)
        if held < needed:
            weights = BYTES[cfg.sampler_dtype] * parameters(shape)["total"] / cfg.tp / 1e9
            raise UserError(f"--engine-memory {cfg.engine_memory} of {gpu_gb:g} GB: beside the engine's weights with "
                            f"{weights:.1f} GB it holds {held} tokens of KV cache, one sequence has up to {needed}. "
                            f"Would help: a larger --tp (now {cfg.tp}) or --engine-memory (at most "
                            f"{largest_share(cfg, shape, ranks, gpu_gb):.2f})")


def _help(cfg: Any, shape: Any, ranks: int, gpu_gb: float, phase: str, largest: str) -> str:
    ways = ["a larger --shard-ranks" if cfg.shard_ranks not in (0, ranks) else "more GPUs"]
    if phase == "sampling" and not cfg.offload_optimizer:
        ways.append("--offload-optimizer")
    if phase == "sampling" and not _torch_sampler(cfg):
        best = largest_share(cfg, shape, ranks, gpu_gb)
        enough = engine_tokens(cfg, shape, best, gpu_gb) >= longest_sequence(cfg)
        ways.append(f"--engine-memory {best:.2f}" + ("" if enough else " with a larger --tp"))
    if largest in ("activations", "head"):
        ways.append("a smaller --micro-batch-tokens" if cfg.checkpointing else "--checkpointing")
    return "Would help: " + ", ".join(ways)


# ---- in print ------------------------------------------------------------------------------------------


def report(cfg: Any, shape: Any, ranks: int, gpu_gb: float, prompt: int = PROMPT, response: int = RESPONSE) -> str:
    """The page that --dry-run prints: steps, memory by component and phase, engine, host, disk."""
    n, size = parameters(shape), storage(cfg, shape, ranks)
    head = f"{n['head'] / 1e6:.0f}e6" if n["head"] else "tied"
    host = size["moments"] + max(size["state"], size["export"])
    return "\n".join([
        f"{cfg.preset}: {cfg.model} on {_gpus(ranks)} of {gpu_gb:g} GB (1e9 bytes); estimated, not measured",
        f"parameters  {n['total'] / 1e9:.2f}e9: {shape.num_hidden_layers} layers of {n['layer'] / 1e6:.0f}e6, "
        f"embedding {n['embedding'] / 1e6:.0f}e6, head {head}",
        *_step_lines(cfg, ranks, work(cfg, ranks, prompt, response)), "",
        *_memory_lines(cfg, shape, ranks, gpu_gb), "",
        f"host memory {host:.0f} GB a node: moments {size['moments']:.0f}, then a resume state {size['state']:.0f} or "
        f"rank 0's export {size['export']:.0f}",
        f"disk        {size['disk_state']:.0f} GB a resume state (2 kept, 3 while one is written), "
        f"{size['disk_export']:.0f} GB the exported model (twice while it is replaced)",
    ])


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}"


def _step_lines(cfg: Any, ranks: int, w: dict[str, int]) -> list[str]:
    assumed = f"{w['prompt']} prompt and {w['response']} response tokens on average (assumed)"
    if not _second_stage(cfg):
        return [f"a step      {w['pairs']} pairs, {w['pairs'] // ranks} a GPU, one optimiser step",
                f"tokens      {w['inputs']:,} a step; {assumed}",
                f"passes      {w['micro']} micro-batches of {cfg.micro_batch_tokens} tokens a GPU"]
    kind = "torch" if _torch_sampler(cfg) else f"vllm, an engine on {_gpus(cfg.tp)}"
    return [f"a round     {w['pairs']} prompts x {cfg.group_size} = {w['sequences']:,} responses ({kind}), "
            f"{w['updates']} optimiser steps of {cfg.mini_batch} prompts, {cfg.mini_batch // ranks} a GPU",
            f"tokens      {w['sampled']:,} sampled, {w['inputs']:,} in a pass over the round; {assumed}",
            f"passes      {w['micro']} micro-batches of {cfg.micro_batch_tokens} tokens an optimiser step and GPU; "
            f"{w['forwards']} forward, {w['backwards']} backward a round"]


def _memory_lines(cfg: Any, shape: Any, ranks: int, gpu_gb: float) -> list[str]:
    training = training_memory(cfg, shape, ranks)
    sampling = sampling_memory(cfg, shape, ranks, gpu_gb) if _second_stage(cfg) else {}
    phases = [phase for phase in (training, sampling) if phase]
    lines = [f"{'GB a GPU':<14}{'training':>10}" + (f"{'sampling':>10}" if sampling else "")]
    for name in dict.fromkeys([*training, *sampling]):
        if any(phase.get(name) for phase in phases):
            lines.append(f"{name:<14}" + "".join(f"{phase.get(name, 0.0):>10.1f}" for phase in phases))
    peaks = [sum(phase.values()) for phase in phases]
    fits = "fits" if max(peaks) <= gpu_gb else "DOES NOT FIT"
    lines.append(f"{'peak':<14}" + "".join(f"{peak:>10.1f}" for peak in peaks) + f"   {fits}")
    if sampling and not _torch_sampler(cfg):
        shares = (cfg.engine_memory, largest_share(cfg, shape, ranks, gpu_gb))
        tokens = [engine_tokens(cfg, shape, share, gpu_gb) for share in shares]
        lines.append(f"engine        --engine-memory {shares[0]:.2f} holds {tokens[0]:,} tokens of KV; the largest "
                     f"that fits, {shares[1]:.2f}, {tokens[1]:,}")
    return lines


def dry_run(cfg: Any) -> None:
    """Print the report for `cfg.dry_run` GPUs; UserError (exit code 2) for sizes or layouts that cannot be."""
    check_positive(cfg, "dry_run", "gpu_gb", *(("tp", "engine_memory") if _second_stage(cfg) else ()))
    shape = read_shape(cfg.model)
    refuse(cfg, shape, cfg.dry_run)
    print(report(cfg, shape, cfg.dry_run, cfg.gpu_gb))
    refuse_layout(cfg, shape, cfg.dry_run, cfg.gpu_gb)


# ---- docs/scaling.md's table --------------------------------------------------------------------------------

PAPER = SimpleNamespace(  # what of settings.PAPER_GRPO decides memory; that file imports torch
    group_size=7, max_prompt_tokens=4096, max_response_tokens=8192, micro_batch_tokens=16384, checkpointing=True,
    compute_dtype="bfloat16", sampler_dtype="bfloat16", shard_ranks=0, sampler="auto", engine_memory=0.5,
)
LAYOUTS = [("7B", 1, 8), ("14B", 2, 8), ("14B", 2, 16), ("32B", 4, 8), ("32B", 4, 32)]  # size, tp, GPUs


def table() -> str:
    """Stage 2 of the paper's three sizes in Markdown, on one node of 8 GPUs and on the paper's 2 and 4 nodes."""
    columns = [_column(*layout) for layout in LAYOUTS]
    rows = [[name] + [column[name] for column in columns] for name in columns[0]]
    head = ["GB a GPU"] + [f"{size}, {ranks} GPUs" for size, _, ranks in LAYOUTS]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _column(size: str, tp: int, ranks: int) -> dict[str, str]:
    shape = read_shape(f"deepseek-ai/DeepSeek-R1-Distill-Qwen-{size}")
    cfg = SimpleNamespace(**vars(PAPER), tp=tp, offload_optimizer=False)
    parts, held = training_memory(cfg, shape, ranks), storage(cfg, shape, ranks)
    cells = {name: f"{part:.1f}" for name, part in parts.items() if name != "adam"}
    cells["**training peak**"] = f"**{sum(parts.values()):.0f}**"
    cells["engine: tp, weights"] = f"{tp}, {2 * parameters(shape)['total'] / tp / 1e9:.1f}"
    for gpu_gb in (80.0, 141.0):
        for where in ("", ", Adam on the host"):
            cfg.offload_optimizer = bool(where)
            share = largest_share(cfg, shape, ranks, gpu_gb)
            tokens = f"{share:.2f}, {engine_tokens(cfg, shape, share, gpu_gb) // 1000}k"
            fits = sum(parts.values()) <= gpu_gb
            cells[f"{gpu_gb:g} GB: engine share, KV tokens{where}"] = tokens if fits else "training does not fit"
    cells["host GB a node"] = f"{max(held['state'], held['export']):.0f}"
    cells["disk GB: two states, export"] = f"{2 * held['disk_state']:.0f}, {held['disk_export']:.0f}"
    return cells


if __name__ == "__main__":
    start(lambda: print(table()))
