"""What every script shares: configuration, ranks, the run folder, stopping and one-line errors.

A run folder holds `config.json`, `metrics.jsonl`, `rollouts/`, `checkpoints/`, `model/` (the exported
checkpoint) and `report.html`. Every file but the growing logs appears whole or not at all: it is written
aside and renamed. Torch is imported inside functions only, so that judging over an endpoint needs none.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

C = TypeVar("C")


class UserError(Exception):
    """Something the user can mend. `start` prints it as one line and exits with code 2."""


def start(main: Callable[[], object]) -> None:
    """Run a script: what the user can mend ends in one line and exit code 2, Ctrl-C in exit code 130."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # true, and meant
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")  # not ours to mend
    code = 0
    try:
        main()
        leave_ranks()  # not after an error: a rank must never wait for peers that may be gone
    except KeyboardInterrupt:
        print("stopped: the same command continues", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader has seen enough; keep the interpreter from flushing into the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        advice = remedy(error)
        if not advice:
            raise
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(10)  # the node's first rank most likely says the same, and torchrun then ends this one
        print("error:", " ".join(advice.split()), file=sys.stderr)
        code = 2
    if "RANK" in os.environ:  # a Gloo thread that lets go of a tensor while Python is torn down aborts the process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def remedy(error: Exception) -> str:
    """What to tell the user of an error that is no bug; empty for a bug, which keeps its traceback."""
    said = f"{error}"
    if isinstance(error, UserError):
        return said
    if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate memory" in said:
        return ("out of memory: lower --micro-batch-tokens (or --at-once of an evaluation), or --engine-memory where "
                "vLLM samples; --checkpointing and --offload-optimizer save more; the same command continues, and "
                "--dry-run N shows what a run on N GPUs needs")  # fmt: skip
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return f"{error.filename or 'a file'}: {error.strerror}; nothing is lost, the same command continues"
    if any(os.strerror(number) in said for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)):  # a library's words
        return f"{said[:200]}; nothing is lost, the same command continues"
    return ""


def parse(config: type[C], presets: Mapping[str, C], argv: list[str] | None = None) -> C:
    """Command line -> config. `--preset` is read first, so that its values are the defaults in `--help`.

    The first preset is the default one. Raises UserError for an unknown preset.
    """
    import tyro

    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=next(iter(presets)))
    name = first.parse_known_args(argv)[0].preset
    if name not in presets:
        raise UserError(f"--preset {name}: unknown; choose one of {', '.join(presets)}")
    return tyro.cli(config, default=presets[name], args=argv)


def visible(text: str) -> str:
    """Text without effect on a terminal or a page's direction: control, bidi and zero-width characters are
    spelt out; line ends and tabs stay.

    >>> visible("red \\x1b[31m" + chr(0x202E))
    'red <U+001B>[31m<U+202E>'
    """

    def spelt_out(match: re.Match[str]) -> str:
        c = match[0]
        return c if c.isprintable() or unicodedata.category(c) == "Zs" else f"<U+{ord(c):04X}>"

    return re.sub(r"[^ -~\n\t]", spelt_out, text.replace("\r\n", "\n"))


def read_prompt(path: str) -> str | None:
    """Text of --prompt-file without its last newline; None for no file."""
    if not path:
        return None
    try:
        return Path(path).read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file {path}: cannot be read ({error})") from None


def check_positive(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be more than 0")


def check_hardware(preset: str) -> None:
    """The paper's sizes need GPUs; say so in one line instead of running out of memory an hour later."""
    import torch

    if preset.startswith("paper") and not torch.cuda.is_available():
        raise UserError(f"--preset {preset} is the paper's run and needs GPUs (the 7B: eight of 80 GB under "
                        "torchrun); this machine has none, try --preset tiny")  # fmt: skip


# ---- ranks ---------------------------------------------------------------------------------------------


def join_ranks(timeout_minutes: float = 120.0) -> None:
    """Under torchrun: join the process group. The timeout has to outlive the slowest rank's generation."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint  # imported later, it would hold on to the group past its end

    if "RANK" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))


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


# ---- configuration, seeds, schedule --------------------------------------------------------------------


class Schedule(Protocol):
    """The fields of a training config that the learning rate depends on."""

    @property
    def lr(self) -> float: ...
    @property
    def lr_schedule(self) -> str: ...
    @property
    def lr_floor(self) -> float: ...
    @property
    def warmup_updates(self) -> int: ...
    @property
    def total_updates(self) -> int: ...


def learning_rate(update_index: int, cfg: Schedule) -> float:
    """Learning rate of optimiser step `update_index` (0-based; mini-batches, not rollout rounds).

    Linear warm-up that never starts at 0, then constant, linear or cosine down to `lr_floor * lr`.
    """
    if update_index < cfg.warmup_updates:
        return cfg.lr * (update_index + 1) / cfg.warmup_updates
    span = max(1, cfg.total_updates - cfg.warmup_updates)
    progress = min(1.0, (update_index - cfg.warmup_updates) / span)
    falloff = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[cfg.lr_schedule]
    floor = 1.0 if cfg.lr_schedule == "constant" else cfg.lr_floor
    return cfg.lr * (floor + (1.0 - floor) * falloff)


def derive_seed(*parts: object) -> int:
    """A 62-bit seed from any printable parts, the same in every process (Python's `hash` is not)."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def digest(value: Any) -> str:
    """16 hex digits of anything that JSON can hold."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()


# ---- the run folder ------------------------------------------------------------------------------------


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(aside, path)


def drop_torn_end(path: Path) -> None:
    """Cut off a last line without its line end, which is what a killed process leaves in a log."""
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def read_json(path: Path) -> Any:
    """Whatever the file holds; UserError if there is none, or it is not JSON."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None


def read_jsonl(path: Path, torn_end_ok: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not blank; UserError names file and line of a bad one.

    `torn_end_ok` forgives an unfinished last line, which is what a killed process leaves in a log.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            if torn_end_ok and number == len(lines):
                return
            raise UserError(f"{path}:{number}: not one JSON object a line ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        yield number, row


def checkpoints(folder: str | Path) -> list[Path]:
    """Whole resume states of a run folder, newest first (unfinished ones carry another name)."""
    found = (Path(folder) / "checkpoints").glob("step_*")
    return sorted((path for path in found if path.name[5:].isdigit()), reverse=True)


def latest_checkpoint(folder: str | Path) -> Path | None:
    return next(iter(checkpoints(folder)), None)


WHERE = (
    "out",
    "dry_run",
    "gpu_gb",
    "tp",
    "engine_memory",
    "offload_optimizer",
    "shard_ranks",
    "checkpointing",
    "micro_batch_tokens",
    "at_once",
    "api_key_env",
    "second_api_key_env",
    "price",
    "second_price",
    "concurrency",
    "timeout",
    "retries",
)  # fmt: skip - settings of where and how fast a run computes, not of what


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
                                "use another --out")  # fmt: skip
        if rank() == 0:
            write_whole(known, json.dumps(self.config, indent=2) + "\n")
        if rank() == 0:  # what a kill left: an unfinished state, perhaps of a step that is not saved again; old ones
            for pattern in ("part_*", "step_*.old"):
                for unfinished in (self.path / "checkpoints").glob(pattern):
                    shutil.rmtree(unfinished, ignore_errors=True)
            self.prune_checkpoints()

    def log(self, record: Mapping[str, Any], name: str = "metrics.jsonl") -> None:
        if rank() == 0:
            with open(self.path / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def rewind(self, step: int, name: str = "metrics.jsonl") -> None:
        """Forget logged steps >= `step`: they are about to be run again."""
        path = self.path / name
        if rank() == 0 and path.exists():
            rows = []
            for number, row in read_jsonl(path, torn_end_ok=True):
                if type(row.get("step")) is not int:
                    raise UserError(f"{path}:{number}: names no step; remove the line, or use another --out")
                rows += [row] if row["step"] < step else []
            write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step_{step:06d}"

    def latest_checkpoint(self) -> Path | None:
        return latest_checkpoint(self.path)

    def check(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state itself; UserError if another configuration wrote it."""
        if state["config"] != self.stamp["config"]:
            raise UserError(f"{self.path}/checkpoints: written by another configuration; use another --out")
        return state

    def prune_checkpoints(self, keep: int = 2) -> None:
        if rank() == 0:
            for old in checkpoints(self.path)[keep:]:
                shutil.rmtree(old, ignore_errors=True)


# ---- progress, stopping --------------------------------------------------------------------------------


def progress(total: int, initial: int, label: str):
    """A progress bar with the time left, on rank 0; a line every 20 s where there is no terminal."""
    from tqdm import tqdm

    quiet = not sys.stderr.isatty()
    return tqdm(total=total, initial=initial, desc=label, disable=rank() != 0,
                mininterval=20.0 if quiet else 0.2, ascii=quiet, dynamic_ncols=True)  # fmt: skip


class StopSignal:
    """Ctrl-C and SIGTERM ask for a stop at the end of the step; a second Ctrl-C stops at once."""

    def __enter__(self) -> StopSignal:
        self.asked = False
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def requested(self) -> bool:
        """True on every rank as soon as one rank was asked."""
        return any(gather(self.asked))

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


BAD_STEPS = 5  # as many in a row end a run


def count_bad(record: Mapping[str, float], before: int) -> int:
    """Steps (rounds of GRPO) in a row, this one included, in which a gradient was not finite and was not used."""
    return before + 1 if record["optim/skipped"] else 0


def stop_early(bad: int) -> None:
    """End a run whose resume state is written: KeyboardInterrupt, or UserError if it was gradients that ended it."""
    if bad < BAD_STEPS:
        raise KeyboardInterrupt
    raise UserError(
        f"{bad} steps in a row met a gradient that is not finite, and left the weights as they were: "
        "lower --lr, look at metrics.jsonl from where optim/skipped begins; the same command continues"
    )
