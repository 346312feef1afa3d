"""A run folder: `config.json`, `metrics.jsonl`, `rollouts/`, `checkpoints/`, `model/` (the export) and `report.html`.

Every file but the growing logs appears whole or not at all. `.lock` keeps a second process out.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from loading.folder import weights_digest
from runtime import ranks
from runtime.disk import read_jsonl, write_whole
from runtime.errors import UserError
from runtime.seeds import digest


def checkpoints(folder: str | Path) -> list[Path]:
    """Whole resume states of a run folder, newest first (unfinished ones carry another name)."""
    found = (Path(folder) / "checkpoints").glob("step_*")
    return sorted((path for path in found if path.name[5:].isdigit()), reverse=True)


def latest_checkpoint(folder: str | Path) -> Path | None:
    return next(iter(checkpoints(folder)), None)


FREE = {  # settings that may change when a run is continued: where, how fast, how often (epochs: steps is compared)
    "out", "dry_run", "gpu_gb", "tp", "engine_memory", "offload_optimizer", "shard_ranks", "checkpointing",
    "micro_batch_tokens", "at_once", "api_key_env", "second_api_key_env", "concurrency",
    "timeout", "retries", "save_every", "eval_every", "epochs", "baseline",
}


def digests(model: str, prompt: str | None, **pairs: Sequence[Any]) -> dict[str, str]:
    """{setting: digest of what it names}: weights (without a `model`: none), prompt text, lists of pairs. Rank 0 reads,
    all ranks get them."""
    found: dict[str, str] = {}
    if ranks.rank() == 0:
        found = {"prompt_file": digest(prompt)} | ({"model": weights_digest(model)} if model else {})
        for name, some in pairs.items():
            found[name] = digest([digest([kv for kv in vars(one).items() if kv[1]]) for one in some])
    return ranks.gather(found)[0]


def lock_folder(path: Path) -> IO[str]:
    """Make the folder and keep other processes out of it. UserError if another one is there, or it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(path / ".lock", os.O_CREAT | os.O_WRONLY), "w")
    except OSError as error:
        raise UserError(f"{path} is a file, or cannot be made ({error.strerror}); use another --out") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # any other: this file system has no locks
            raise UserError(f"{path}: another process is writing this run; wait for it, or use another --out") from None
    return file


class RunFolder:
    """One run's files. Only rank 0 writes; a folder that belongs to another configuration is refused.

    `read` holds digests of what some settings name. The digests are compared; the names may differ.
    """

    def __init__(self, path: str, config: Any, read: Mapping[str, str] | None = None):
        self.path = Path(path)
        self.config = json.loads(json.dumps(dataclasses.asdict(config))) | ({"read": dict(read)} if read else {})
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        self.defaults = json.loads(json.dumps(defaults, default=str))
        self.stamp = {"config": self.config}
        known = self.path / "config.json"
        self.lock = lock_folder(self.path) if ranks.rank() == 0 else None  # held until this object or the process ends
        if known.exists():
            try:
                changed = self.changed(dict(json.loads(known.read_text(encoding="utf-8"))))
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise UserError(f"{known}: not a run's configuration ({error}); use another --out") from None
            if changed:
                raise UserError(f"{path} holds a run of another configuration ({', '.join(changed)}); "
                                "use another --out")
        if ranks.rank() == 0:
            write_whole(known, json.dumps(self.config, indent=2) + "\n")
            for pattern in ("part_*", "step_*.old"):  # a killed process leaves an unfinished state, or an old one
                for unfinished in (self.path / "checkpoints").glob(pattern):
                    shutil.rmtree(unfinished, ignore_errors=True)
            self.prune_checkpoints()

    def changed(self, before: dict[str, Any]) -> list[str]:
        """What differs from an earlier start's configuration and may not; a setting missing there had its default."""
        now, read, was = self.config, self.config.get("read", {}), self.defaults | before
        known = {"method": read.get("method")} | was.get("read", {})  # earlier runs did not record it
        free = FREE | {"read", *read}
        if now.get("lr_schedule") == "constant" and not now.get("warmup_ratio") and now["steps"] >= was["steps"]:
            free |= {"steps"}  # a longer run of this kind begins with the same steps
        return [*(f"{k} was {was[k]!r}, is {v!r}" for k, v in now.items() if k not in free and was[k] != v),
                *(f"the content of {k} has changed" for k in read if known.get(k) != read[k])]

    def log(self, record: Mapping[str, Any], name: str = "metrics.jsonl") -> None:
        if ranks.rank() == 0:
            with open(self.path / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def rewind(self, step: int, name: str = "metrics.jsonl") -> None:
        """Remove logged steps >= `step`: they are about to run again."""
        path = self.path / name
        if ranks.rank() == 0 and path.exists():
            rows = []
            for number, row in read_jsonl(path, torn_end_ok=True):
                if type(row.get("step")) is not int:
                    raise UserError(f"{path}:{number}: has no step; remove the line, or use another --out")
                rows += [row] if row["step"] < step else []
            write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step_{step:06d}"

    def check(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the state; UserError if another configuration wrote it."""
        if self.changed(state["config"]):
            raise UserError(f"{self.path}/checkpoints: written by another configuration; use another --out")
        return state

    def prune_checkpoints(self, keep: int = 2) -> None:
        if ranks.rank() == 0:
            for old in checkpoints(self.path)[keep:]:
                shutil.rmtree(old, ignore_errors=True)
