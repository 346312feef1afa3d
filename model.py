"""`Policy`: load, shard (FSDP2), response-only log-probs, one optimiser step.

Weights come from safetensors alone and no code comes from a model folder. The module is built on the meta
device and filled tensor by tensor, each rank reading only its rows. `Policy` is the FSDP root:
only inside its forward are embedding and head gathered, so nothing else may use them. The head is
in ops/head.py, resume states in runtime/states.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from batch import Batch
from loading.export import save_folder
from loading.folder import model_folder, tested_config
from loading.tokenizer import read_generation
from loading.weights import read_weights
from ops.attention import FLEX, block_mask, register, spans, visible
from ops.head import Scores, target_scores
from runtime.errors import UserError
from runtime.ranks import rank, wait_longer


class Policy(nn.Module):
    """A transformers causal LM that returns the log-probs of a packed micro-batch's targets."""

    def __init__(self, lm: Any):
        super().__init__()
        self.lm = lm

    def forward(self, batch: Batch, *, temperature: float = 1.0, entropy: bool = False) -> Scores:
        """The micro-batch's targets, (N,) each: log-probs in nats and, if asked for, detached entropies. Eq. 2"""
        temperature *= getattr(self.lm.config, "logits_scaling", 1.0)  # Granite divides its logits
        return target_scores(self.hidden(batch), self.lm.lm_head.weight, batch.targets, temperature, entropy)

    def hidden(self, batch: Batch) -> Tensor:
        """(N, H): the last hidden state that predicts each target; response positions only."""
        kind = self.lm.config._attn_implementation
        seen: dict[str, Any] = {}
        if kind == "grouped" and not batch.inputs.is_cuda:  # other attention would ignore `spans`
            seen["spans"] = spans(batch.group, batch.response)
        else:
            seen["attention_mask"] = (block_mask if kind == "flex" else visible)(batch.group, batch.response)
        out = self.lm.model(input_ids=batch.inputs, position_ids=batch.position_ids, use_cache=False, **seen)
        return out.last_hidden_state.flatten(0, 1)[batch.source]


P = TypeVar("P", bound=Policy)

# ---- load, shard ---------------------------------------------------------------------------------------


def load_policy(path: str, dtype: torch.dtype = torch.float32, mesh: Any = None,
                compute_dtype: torch.dtype | None = None, checkpointing: bool = False) -> Policy:
    """Build on the meta device, shard if a mesh is given, then read the weights, each rank its own rows.

    `dtype` is how weights are stored, `compute_dtype` (sharded only) how they compute. Raises UserError for
    an untested architecture, windowed attention or missing weights.
    """
    from transformers import AutoModelForCausalLM

    folder = model_folder(path)
    policy = build_policy(Policy, AutoModelForCausalLM, tested_config(folder), dtype, mesh, compute_dtype)
    read_weights(policy.lm, folder)
    policy.lm.generation_config = read_generation(folder)
    if checkpointing:
        policy.lm.gradient_checkpointing_enable({"use_reentrant": False})
    return policy


def build_policy(kind: type[P], auto: Any, config: Any, dtype: torch.dtype, mesh: Any,
                 compute_dtype: torch.dtype | None) -> P:
    """`auto`'s model inside `kind`, made on the meta device, sharded, then given memory without weights."""
    register()
    attention = "flex" if mesh is not None and mesh.device_type in FLEX else "grouped"
    try:
        with torch.device("meta"):
            lm = auto.from_config(config, dtype=dtype, attn_implementation=attention)
    except Exception as error:
        raise UserError(f"{config.name_or_path}/config.json: no model can be built from it ({error})") from None
    policy = kind(lm)
    grow_segments()
    if mesh is not None:
        shard_model(policy, mesh, compute_dtype or dtype)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    policy.to_empty(device=device if mesh is not None else "cpu")
    if config.tie_word_embeddings and hasattr(lm, "lm_head"):  # to_empty gives each module a tensor of its own
        lm.lm_head.weight = lm.model.embed_tokens.weight
    if hasattr(scaled := lm.model.embed_tokens, "scalar_embed_scale"):  # Gemma's; no file holds it
        scaled.embed_scale.fill_(scaled.scalar_embed_scale)
    lm.model.rotary_emb = type(lm.model.rotary_emb)(config=config).to(lm.model.embed_tokens.weight.device)
    return policy


def shard_model(policy: Policy, mesh: Any, compute_dtype: torch.dtype) -> None:
    """FSDP2: every decoder layer, then the root with embedding, norm and head (a tied weight stays in one group).

    Weights stay as they are stored; forward and backward compute in `compute_dtype`, gradients are reduced
    in float32. FSDP averages over ranks: multiply the loss by the world size to get the global sum.
    """
    reduce_dtype = torch.promote_types(compute_dtype, torch.float32)
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    for layer in policy.lm.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision)


def make_mesh(compute_dtype: torch.dtype, shard_ranks: int = 0) -> Any:
    """A mesh over all ranks; also for one rank with mixed precision or a GPU. None for plain float32 on a CPU.

    With `shard_ranks` smaller than the number of ranks it is two-dimensional (hybrid sharding): that many
    neighbours hold one copy of the weights, and gradients are averaged over the copies.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if not dist.is_initialized():
        if kind == "cpu" and compute_dtype in (torch.float32, torch.float64):
            return None
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    ranks = dist.get_world_size()
    if not shard_ranks or shard_ranks >= ranks:
        return init_device_mesh(kind, (ranks,))
    if ranks % shard_ranks:
        raise UserError(f"--shard-ranks {shard_ranks} does not divide {ranks} ranks")
    mesh = init_device_mesh(kind, (ranks // shard_ranks, shard_ranks), mesh_dim_names=("copy", "shard"))
    wait_longer(mesh)
    return mesh


def grow_segments() -> None:
    """Let the allocator on a GPU lengthen its blocks: rows differ in width, and fixed blocks would leave gaps.

    It is set here, after the engine is made: as an environment variable it breaks vLLM with --tp 2 or more.
    """
    if torch.cuda.is_available() and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


# ---- weights out ---------------------------------------------------------------------------------------


def release(policy: Policy) -> None:
    """Free the gathered embedding, norm and head, which FSDP keeps after a forward that no backward follows."""
    if isinstance(policy, FSDPModule):
        policy.reshard()


def gathered_weights(policy: Policy, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) in checkpoint names: embedding, layers in order, norm, lm_head (also when tied).

    The shard is cast before it is gathered; every tensor is fresh; the order is the same on all ranks,
    because gathering is a collective.
    """
    release(policy)
    for name, parameter in policy.lm.named_parameters(remove_duplicate=False):
        tensor = parameter.detach().to(dtype, copy=True)
        yield name, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def save_hf(policy: Policy, tokenizer: Any, path: Path, dtype: torch.dtype = torch.float32,
            shard_bytes: int = 4 * 2**30, judge: Mapping[str, Any] | None = None) -> None:
    """Export a `from_pretrained` folder (safetensors, a tied head once), whole or not at all.

    Every rank takes part in the gathering; rank 0 holds the whole model in host memory and writes it.
    """
    tied, held = policy.lm.config.tie_word_embeddings, {}
    for name, tensor in gathered_weights(policy, dtype):
        if rank() == 0 and not (tied and name == "lm_head.weight"):
            held[name] = tensor.to("cpu", copy=True)  # gathered uneven rows are a view of padded ones
    if rank() == 0:
        save_folder(policy.lm, held, tokenizer, path, str(dtype).removeprefix("torch."), shard_bytes,
                    judge)


# ---- one optimiser step --------------------------------------------------------------------------------


def make_optimizer(policy: Policy, cfg: Any) -> torch.optim.AdamW:
    """AdamW with the settings of a stage, in one kernel: a single pass over memory, no temporary tensors."""
    return torch.optim.AdamW(policy.parameters(), cfg.lr, cfg.betas, weight_decay=cfg.weight_decay, fused=True)


def optimizer_step(policy: Policy, optimizer: torch.optim.Optimizer, lr: float, max_norm: float) -> float:
    """Clip the gradient to `max_norm`, take one step at `lr`, drop the gradients -> norm before clipping.

    A gradient that is not finite is dropped without a step.
    """
    total: Any = nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
    norm: float = (total.full_tensor() if hasattr(total, "full_tensor") else total).item()
    for group in optimizer.param_groups:
        group["lr"] = lr
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


class HostMoments:
    """Moves Adam's moments to host memory while the engine needs the card (`--offload-optimizer`).

    The optimiser keeps its tensors; only the memory behind them is freed and filled again.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, wanted: bool):
        self.states = optimizer.state if wanted else {}
        self.held: list[tuple[Tensor, Tensor]] = []  # this rank's part of a moment, and its place in host memory

    def to_host(self) -> None:
        if not self.held:
            moments = [state[kind] for state in self.states.values() for kind in ("exp_avg", "exp_avg_sq")]
            self.held = self._places([getattr(moment, "_local_tensor", moment) for moment in moments])
        for own, place in self.held:
            place.copy_(own)
            own.untyped_storage().resize_(0)

    @staticmethod
    def _places(parts: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """One buffer for all parts: pinning is slow, and rounds each allocation up to a power of two."""
        if not parts:
            return []
        buffer = torch.empty(sum(part.numel() for part in parts), dtype=parts[0].dtype, pin_memory=parts[0].is_cuda)
        pieces = buffer.split([part.numel() for part in parts])
        return [(part, piece.view(part.shape)) for part, piece in zip(parts, pieces, strict=True)]

    def to_device(self) -> None:
        for own, place in self.held:
            own.untyped_storage().resize_(place.nbytes)
            own.copy_(place)
