"""Command line: presets and flags -> a config; how a script starts and ends."""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from loading.folder import model_folder
from loading.judge_file import NAME, Asked, how_to_ask, read_judge_file
from runtime import ranks
from runtime.errors import UserError, remedy

C = TypeVar("C")


def start(main: Callable[[], object]) -> None:
    """Run a script. An error that the user can fix ends in one line and exit code 2, Ctrl-C in exit code 130."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # we know
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")  # vllm's own code
    code = 0
    try:
        main()
        ranks.leave_ranks()  # not after an error: a rank must never wait for peers that may be gone
    except KeyboardInterrupt:
        print("stopped: the same command continues", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader (head, less) has closed; do not flush into its pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        advice = remedy(error)
        if not advice:
            raise
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(10)  # rank 0 most likely prints the same error, and torchrun then ends this process
        print("error:", " ".join(advice.split()), file=sys.stderr)
        code = getattr(error, "exit_code", 2)
    if "RANK" in os.environ:  # a Gloo thread that frees a tensor while Python shuts down would abort the process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def parse(config: type[C], presets: Mapping[str, C], argv: list[str] | None = None) -> C:
    """Command line -> config. `--preset` is read first, so that its values are the defaults in `--help`.

    The first preset is the default one. With --data of your own no preset keeps its held-out file.
    Raises UserError for an unknown preset.
    """
    import tyro

    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=next(iter(presets)))
    name = first.parse_known_args(argv)[0].preset
    if name not in presets:
        raise UserError(f"--preset {name}: unknown; choose one of {', '.join(presets)}")
    default: Any = presets[name]
    named = {word.partition("=")[0].replace("_", "-") for word in argv}
    if "--data" in named and "--held-out" not in named and hasattr(default, "held_out"):
        default = replace(default, held_out="")  # a preset's held-out file belongs to the preset's data
    cfg: Any = tyro.cli(config, default=default, args=argv, prog=ranks.program())
    return as_trained(cfg, named) if Path(getattr(cfg, "model", "")).is_dir() and hasattr(cfg, "prompt_file") else cfg


def as_trained(cfg: Any, named: Collection[str]) -> Any:
    """The config with style and wording of the judge at `cfg.model` (its judge.json), where no flag names them."""
    there = "--prompt-file" in named or not cfg.prompt_file or Path(cfg.prompt_file).is_file()
    wording = read_prompt(cfg.prompt_file) if there else ""  # a preset's file may be missing if judge.json replaces it
    preset = Asked(cfg.style, wording, getattr(cfg, "max_tokens", 0))
    asked = how_to_ask(cfg.model, style=cfg.style if "--style" in named else None, default=preset,
                       wording=preset.wording if "--prompt-file" in named else None,
                       max_tokens=preset.max_tokens if "--max-tokens" in named else 0)
    changes = {"style": asked.style} | ({"max_tokens": asked.max_tokens} if preset.max_tokens else {})
    if asked.wording != preset.wording:
        changes["prompt_file"] = "" if asked.wording is None else str(model_folder(cfg.model, weights=False) / NAME)
    return replace(cfg, **changes)


def read_prompt(path: str) -> str | None:
    """Text of --prompt-file without its last newline, of a judge.json its wording; None for no file."""
    if not path:
        return None
    if Path(path).name == NAME:
        return read_judge_file(Path(path))["wording"]
    try:
        return Path(path).read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file {path}: cannot be read ({error})") from None


AT_MOST = {"warmup_ratio": 1.0, "lr_floor": 1.0, "engine_memory": 1.0, "betas": 1 - 1e-9}  # AdamW refuses 1


def check_numbers(config: Any, *positive: str) -> None:
    """UserError for a setting that is negative, not finite or above its limit, or is 0 and one of `positive`."""
    for name in (field.name for field in fields(config) if field.name != "seed"):
        value, most = getattr(config, name), AT_MOST.get(name, sys.float_info.max)
        for number in value if isinstance(value, tuple) else (value,):
            low = name in positive and number == 0
            if isinstance(number, (int, float)) and (low or not 0 <= number <= most):
                least = "more than 0" if name in positive else "0 or more"
                raise UserError(f"--{name.replace('_', '-')} {number}: must be {least}"
                                + (f" and at most {most:g}" if name in AT_MOST else ""))


def check_hardware(preset: str) -> None:
    """UserError for a paper preset without a GPU, instead of running out of memory an hour later."""
    import torch

    if preset.startswith("paper") and not torch.cuda.is_available():
        raise UserError(f"--preset {preset} is the paper's run and needs GPUs (the 7B: eight of 80 GB under "
                        "torchrun); this machine has none. Try --preset tiny")
