"""Safetensors files -> the parameters of a module, each rank its own rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from runtime.errors import UserError


def read_weights(lm: Any, folder: Path) -> None:
    """Fill every parameter from the safetensors files, one tensor (or this rank's rows of it) at a time."""
    from safetensors import SafetensorError, safe_open

    own = dict(lm.named_parameters())
    try:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors, torch.no_grad():
                for name in [n for n in tensors.keys() if n in own]:  # noqa: SIM118 - safe_open is no dict
                    _fill(own.pop(name), tensors.get_slice(name), f"{file}: {name}")
    except SafetensorError as error:
        raise UserError(f"{file}: not a whole safetensors file ({error})") from None
    if own:
        raise UserError(f"{folder}: {len(own)} weights are missing, {min(own)} among them")


def _fill(parameter: Any, stored: Any, where: str) -> None:
    if list(parameter.shape) != list(stored.get_shape()):
        raise UserError(f"{where} is {stored.get_shape()}, config.json asks for {list(parameter.shape)}")
    if hasattr(parameter, "to_local"):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        if shape[0]:
            parameter.to_local().copy_(stored[offset[0] : offset[0] + shape[0]])
    else:
        parameter.copy_(stored[:])
