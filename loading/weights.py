"""Safetensors files -> the parameters of a module, each rank its own rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loading.folder import weight_files
from runtime.errors import UserError

PLAIN = ("F64", "F32", "F16", "BF16")


def read_weights(lm: Any, folder: Path) -> None:
    """Fill every parameter from the files that count, one tensor (or this rank's rows of it) at a time.

    A tied weight may be stored under both of its names, if both hold the same numbers.
    """
    from safetensors import SafetensorError, safe_open

    own = dict(lm.named_parameters(remove_duplicate=False))
    filled: dict[int, str] = {}  # id of a parameter -> the name that filled it
    try:
        for file, counted in weight_files(folder).items():
            with safe_open(file, framework="pt") as tensors, torch.no_grad():
                for name in sorted(own.keys() & tensors.keys() & (own.keys() if counted is None else counted)):
                    stored, target = _rows(tensors.get_slice(name), own[name], f"{file}: {name}")
                    if first := filled.get(id(own[name])):
                        _check_tied(target, stored, f"{file}: {name}", first)
                        continue
                    target.copy_(stored)
                    check_finite(target, f"{file}: {name}")
                    filled[id(own[name])] = name
    except SafetensorError as error:
        raise UserError(f"{file}: not a whole safetensors file ({error})") from None
    if missing := sorted(name for name, parameter in own.items() if id(parameter) not in filled):
        raise UserError(f"{folder}: {len(missing)} weights are missing, {missing[0]} among them")


def _rows(stored: Any, parameter: Any, where: str) -> tuple[Tensor, Tensor]:
    """(the stored tensor, the memory to fill), both whole, or this rank's rows of a sharded parameter."""
    if stored.get_dtype() not in PLAIN:
        raise UserError(f"{where} is stored as {stored.get_dtype()}: quantised weights cannot be trained or sampled "
                        "here; use the plain checkpoint, or a server with --base-url")
    if list(parameter.shape) != list(stored.get_shape()):
        raise UserError(f"{where} is {stored.get_shape()}, config.json asks for {list(parameter.shape)}")
    if not hasattr(parameter, "to_local"):
        return stored[:], parameter
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    first = offset[0] if shape[0] else 0
    return stored[first : first + shape[0]], parameter.to_local()


def _check_tied(target: Tensor, stored: Tensor, where: str, first: str) -> None:
    if not torch.equal(target, stored.to(target)):
        raise UserError(f"{where} differs from {first}, but config.json ties them (tie_word_embeddings), and programs "
                        "disagree on which counts; set tie_word_embeddings to false, or remove one from the file")


def check_finite(weights: Tensor, where: str) -> None:
    """UserError for NaN or infinity: one pass over memory that was just filled, 0.2 s for a GB."""
    if weights.numel() and not torch.stack(torch.aminmax(weights.detach())).isfinite().all():
        raise UserError(f"{where} holds NaN or infinity; the checkpoint is damaged, take an earlier one")
