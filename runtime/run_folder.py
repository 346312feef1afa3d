"""A run folder: `config.json`, `metrics.jsonl`, `rollouts/`, `checkpoints/`, `model/` (the export) and `report.html`.

Every file but the growing logs appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime import ranks
from runtime.disk import read_jsonl, write_whole
from runtime.errors import UserError
from runtime.seeds import derive_seed


def checkpoints(folder: str | Path) -> list[Path]:
    """Whole resume states of a run folder, newest first (unfinished ones carry another name)."""
    found = (Path(folder) / "checkpoints").glob("step_*")
    return sorted((path for path in found if path.name[5:].isdigit()), reverse=True)


def latest_checkpoint(folder: str | Path) -> Path | None:
    return next(iter(checkpoints(folder)), None)


WHERE = {  # settings of where and how fast a run computes: they may change when a run is continued
    "out", "dry_run", "gpu_gb", "tp", "engine_memory", "offload_optimizer", "shard_ranks", "checkpointing",
    "micro_batch_tokens", "at_once", "api_key_env", "second_api_key_env", "price", "second_price", "concurrency",
    "timeout", "retries",
}


class RunFolder:
    """One run's files. Only rank 0 writes; a folder that belongs to another configuration is refused."""

    def __init__(self, path: str, config: Any):
        self.path = Path(path)
        self.config = json.loads(json.dumps(dataclasses.asdict(config)))
        what = {name: value for name, value in self.config.items() if name not in WHERE}
        self.stamp = {"config": derive_seed(json.dumps(what, sort_keys=True))}
        known = self.path / "config.json"
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{path} is a file; use another --out")
        if known.exists():
            try:
                before = dict(json.loads(known.read_text(encoding="utf-8")))
            except (ValueError, TypeError, RecursionError) as error:
                raise UserError(f"{known}: not a run's configuration ({error}); use another --out") from None
            changed = [f"{k} was {before.get(k)!r}, is {v!r}" for k, v in what.items() if before.get(k) != v]
            if changed:
                raise UserError(f"{path} holds a run of another configuration ({', '.join(changed)}); "
                                "use another --out")
        if ranks.rank() == 0:
            write_whole(known, json.dumps(self.config, indent=2) + "\n")
            for pattern in ("part_*", "step_*.old"):  # a killed process leaves an unfinished state, or an old one
                for unfinished in (self.path / "checkpoints").glob(pattern):
                    shutil.rmtree(unfinished, ignore_errors=True)
            self.prune_checkpoints()

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
        if state["config"] != self.stamp["config"]:
            raise UserError(f"{self.path}/checkpoints: written by another configuration; use another --out")
        return state

    def prune_checkpoints(self, keep: int = 2) -> None:
        if ranks.rank() == 0:
            for old in checkpoints(self.path)[keep:]:
                shutil.rmtree(old, ignore_errors=True)
