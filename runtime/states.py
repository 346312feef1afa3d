"""Resume states: safetensors alone, each folder whole or not at all, on any number of ranks."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from runtime.disk import read_json, replace_folder, write_whole
from runtime.errors import UserError
from runtime.ranks import gather, rank, world_size
from runtime.run_folder import RunFolder, checkpoints

FILE_BYTES = 2**30  # size of one file of a state; while it writes, a rank holds twice this in host memory


def _state(policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and Adam moments as one flat dict of tensors; moments that do not exist yet become zeros."""
    tensors: dict[str, Tensor] = {}
    if isinstance(policy, FSDPModule):
        policy.reshard()  # after a scoring pass the root's weights are still gathered copies
    for name, parameter in policy.named_parameters():
        moments = optimizer.state[parameter]
        moments.setdefault("step", torch.zeros((), device=parameter.device))  # where a fused optimiser counts
        moments.setdefault("exp_avg", torch.zeros_like(parameter.detach()))
        moments.setdefault("exp_avg_sq", torch.zeros_like(parameter.detach()))
        tensors[f"policy.{name}"] = parameter.detach()
        tensors |= {f"adam.{name}.{kind}": value for kind, value in moments.items()}
    return tensors


def save_state(path: Path, policy: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
    """Write a resume state, whole or not at all: sharded safetensors (no pickle) and `progress.json`."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.api import CheckpointException

    aside = path.with_name("part_" + path.name)
    if rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
    gather(None)  # no rank makes the folder before it is cleared
    tensors = _state(policy, optimizer)
    writer = HuggingFaceStorageWriter(str(aside), _file_numbers(tensors), save_distributed=True)
    writer.per_thread_copy_ahead = 0  # copies ahead are pinned memory, which the process keeps for good
    try:
        dcp.save(tensors, storage_writer=writer, no_dist=not torch.distributed.is_initialized())
    except CheckpointException as error:  # not an Exception, and its text is a traceback: raise its cause
        cause = next(iter(error.failures.values()))[0]
        raise cause if isinstance(cause, Exception) else error from None
    own = sorted(aside.glob(f"shard-{rank() + 1:05}-*"))  # on a shared disk only the writer sees a new file for sure
    checksums = _checksums(own, progress)
    if rank() == 0:
        write_whole(aside / "progress.json", json.dumps(progress | {"files": checksums}))
        replace_folder(aside, path)


def _file_numbers(tensors: dict[str, Tensor]) -> dict[str, int]:
    """{name: number of the file, from 1}, so that a rank's file has about FILE_BYTES; rank 0's numbers count."""
    numbers, total = {}, 0
    for name, tensor in tensors.items():
        numbers[name] = total // FILE_BYTES + 1
        total += getattr(tensor, "_local_tensor", tensor).nbytes
    return numbers


def keep_state(folder: RunFolder, policy: nn.Module, optimizer: torch.optim.Optimizer,
               progress: dict[str, Any]) -> None:
    """Write the run's resume state after `progress["step"]` steps; the last two are kept."""
    save_state(folder.checkpoint(progress["step"]), policy, optimizer, progress | folder.stamp)
    folder.prune_checkpoints()


def load_state(path: Path, policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Fill policy and optimiser from `save_state`, on the same or another number of ranks -> progress.

    UserError, before anything is filled, if a file is not as it was written.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    progress = read_json(path / "progress.json")
    known = progress.pop("files", None) if isinstance(progress, dict) else None
    found = gather(sorted(file for file in path.iterdir() if file.name != "progress.json") if rank() == 0 else [])[0]
    if known is None or known != _checksums(found[rank() :: world_size()], progress):
        raise UserError(f"{path}: damaged, its files are not as they were written")
    with torch.no_grad():
        dcp.load(_state(policy, optimizer), storage_reader=HuggingFaceStorageReader(str(path)),
                 no_dist=not torch.distributed.is_initialized())
    return progress


def _checksums(files: list[Path], progress: dict[str, Any]) -> dict[str, int]:
    """CRC-32 of the files that this rank and the others name, and of the progress."""

    def crc(file: Path) -> int:
        found = 0
        with open(file, "rb") as content:
            while block := content.read(2**24):
                found = zlib.crc32(block, found)
        return found

    parts = gather({file.name: crc(file) for file in files})
    own = {"progress.json": zlib.crc32(json.dumps(progress).encode())}
    return own | {name: found for part in parts for name, found in part.items()}


def resume(folder: RunFolder, policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Fill policy and optimiser from the newest whole resume state -> its progress; None for a new run.

    A damaged state is skipped for the one before it; UserError if all are damaged, or of another configuration.
    """
    damaged = []
    for path in checkpoints(folder.path):
        try:
            progress = load_state(path, policy, optimizer)
        except UserError as error:
            damaged.append(str(error))
            continue
        if rank() == 0:
            print("; ".join([*damaged, f"continuing from {path}"]), flush=True)
        return folder.check(progress)
    if damaged:
        raise UserError(f"{'; '.join(damaged)}: there is no earlier state; use another --out, or delete {folder.path}")
    return None
