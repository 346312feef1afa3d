"""A model folder as it lies on disk or on the hub: which folder, what its config says, a digest of its weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from runtime.disk import read_json
from runtime.errors import UserError

TESTED = ("llama", "qwen2", "qwen3")  # architectures whose packed log-probs the tests compare with a plain forward


def model_folder(path: str, weights: bool = True) -> Path:
    """A run folder (its exported `model/`), a `from_pretrained` folder or a hub id -> a local folder.
    Without `weights` its weights need not be there, and are not fetched from the hub."""
    exported = (Path(path) / "model", Path(path) / "model.old")  # .old: the run was killed as it replaced the first
    folder = next((folder for folder in exported if folder.is_dir()), Path(path))
    if not folder.is_dir() and path.count("/") == 1 and not path.startswith((".", "/")):
        import huggingface_hub

        try:
            wanted = ["*.json", "*.jinja", "*.txt", "*.model", *["*.safetensors"] * weights]
            folder = Path(huggingface_hub.snapshot_download(path, allow_patterns=wanted))
        except Exception as error:  # the hub client raises many kinds; each means that there is no model
            raise UserError(f"{path}: neither a folder nor a hub model within reach "
                            f"({type(error).__name__})") from None
    if not (folder / "config.json").is_file() or (weights and not any(folder.glob("*.safetensors"))):
        hint = "its run has not exported a model yet" if (folder / "metrics.jsonl").exists() else "not a model"
        raise UserError(f"{path}: {hint}; expected a folder with config.json and *.safetensors")
    return folder


def weights_digest(path: str) -> str:
    """16 hex digits that another training of the same model changes."""
    found = hashlib.blake2b(digest_size=8)
    for file in sorted(model_folder(path).glob("*.safetensors")):
        with open(file, "rb") as content:
            found.update(hashlib.file_digest(content, "blake2b").digest())
    return found.hexdigest()


def context_tokens(path: str) -> int:
    """Tokens of prompt and response together that the model was made for."""
    file = model_folder(path) / "config.json"
    try:
        return int(read_json(file)["max_position_embeddings"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(f"{file}: names no max_position_embeddings, the tokens the model was made for") from None


def read_config(folder: Path, **changes: Any) -> Any:
    """The folder's config as transformers reads it; UserError where that fails, or would run the folder's code."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, **changes)
    except Exception as error:  # a broken config.json raises many kinds; code of its own is among them, and never run
        raise UserError(f"{folder / 'config.json'}: not an architecture of transformers "
                        f"({(str(error) or type(error).__name__).splitlines()[0]})") from None


def tested_config(folder: Path, **changes: Any) -> Any:
    """`read_config`; UserError for an architecture that the tests do not know, or windowed attention."""
    config = read_config(folder, **changes)
    windowed = [t for t in getattr(config, "layer_types", None) or [] if t != "full_attention"]
    if config.model_type not in TESTED or windowed:
        raise UserError(f"{folder}: {config.model_type}{' with windowed layers' if windowed else ''} is not "
                        f"among the tested architectures ({', '.join(TESTED)}, full attention)")
    return config
