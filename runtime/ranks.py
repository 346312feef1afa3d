"""The processes of one run: how they were called, join, leave, rank, world size, and one object from each.

Torch is imported inside functions only, so that judging over an endpoint does not need it.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

PATIENCE = 120.0  # minutes: a collective waits for the slowest rank's generation


def program() -> str:
    """How this script was called: "python grpo.py", "python -m variants.dapo"."""
    module = getattr(sys.modules["__main__"], "__spec__", None)  # None for a script
    return f"python -m {module.name.removesuffix('.__main__')}" if module else f"python {Path(sys.argv[0]).name}"


def join_ranks(timeout_minutes: float = PATIENCE) -> None:
    """Under torchrun: join the process group."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint  # imported later, it would keep the group's threads alive

    if "RANK" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))


def wait_longer(mesh: Any) -> None:
    """Give the groups of a mesh the default group's timeout; on GPUs they would have ten minutes."""
    from torch.distributed.distributed_c10d import _set_pg_timeout

    for group in mesh.get_all_groups():
        _set_pg_timeout(timedelta(minutes=PATIENCE), group)


def leave_ranks() -> None:
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def gather(value: Any) -> list[Any]:
    """One object per rank, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
