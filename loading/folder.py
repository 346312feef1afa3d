"""A model folder on disk or on the hub: which files count, what its config says, what is refused and why."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from runtime.disk import read_json
from runtime.errors import UserError

# The families whose packed log-probs and gradients tests/loading/test_architectures.py compares with a plain forward.
# To add one, add its model_type here and run that file.
TESTED = ("llama", "qwen2", "qwen3", "mistral", "olmo2", "gemma", "smollm3", "granite")
STEADY_ROPE = ("default", "linear", "yarn", "llama3")  # the same angles whatever else is in the batch

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def model_folder(path: str, weights: bool = True) -> Path:
    """A run folder (its exported `model/`), a `from_pretrained` folder or a hub id -> a local folder.
    Without `weights` its weights need not be there, and are not fetched from the hub."""
    exported = (Path(path) / "model", Path(path) / "model.old")  # .old: the run was killed as it replaced the first
    folder = next((folder for folder in exported if folder.is_dir()), Path(path))
    if not folder.is_dir() and path.count("/") == 1 and not path.startswith((".", "/", "runs/")):
        import huggingface_hub

        try:
            wanted = ["*.json", "*.jinja", "*.txt", "*.model", *["*.safetensors"] * weights]
            folder = Path(huggingface_hub.snapshot_download(path, allow_patterns=wanted))
        except Exception as error:  # the hub client raises many kinds; each means that there is no model
            raise UserError(f"{path}: neither a folder nor a hub model within reach "
                            f"({type(error).__name__})") from None
    if weights and (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: holds an adapter (adapter_config.json), which is not applied here; merge it into "
                        "its base model and save the result, or remove its files to use the base alone")
    found = not weights or any((folder / name).is_file() for name in (WEIGHTS, INDEX))
    if not found or not (folder / "config.json").is_file():
        hint = "not a model" if folder.is_dir() else "no such folder; a run folder has a model once its stage has run"
        if (folder / "metrics.jsonl").exists():
            hint = "its run has not exported a model yet"
        elif any(folder.glob("*.bin")):
            hint = "its weights are pickled (.bin), which are never loaded; convert them to safetensors"
        raise UserError(f"{path}: {hint}; expected a folder with config.json and {WEIGHTS} or its index")
    return folder


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The files that count -> the tensors to take from each (None: all of them). Every other file is a leftover."""
    index, whole = folder / INDEX, folder / WEIGHTS
    if not index.is_file():
        return {whole: None}
    found = read_json(index)
    places = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index}: names no file for each weight (weight_map)")
    if whole.is_file() and WEIGHTS not in places.values():
        raise UserError(f"{folder}: {WEIGHTS} and the files of {INDEX} are two sets of weights, and other programs "
                        "read either; delete one of them")
    files: dict[Path, set[str] | None] = {
        folder / file: {name for name, place in places.items() if place == file}
        for file in sorted(set(places.values()))
    }
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: missing, but {INDEX} names it; download or copy the folder again")
    return files


def weights_digest(path: str) -> str:
    """16 hex digits that another training of the same model changes. Files are read side by side, each at 0.7 GB/s."""

    def digest(file: Path) -> bytes:
        with open(file, "rb") as content:
            return hashlib.file_digest(content, "blake2b").digest()

    with ThreadPoolExecutor(8) as threads:
        whole = b"".join(threads.map(digest, weight_files(model_folder(path))))
    return hashlib.blake2b(whole, digest_size=8).hexdigest()


def context_tokens(path: str) -> int:
    """Tokens of prompt and response together that the model was made for."""
    file = model_folder(path) / "config.json"
    try:
        return context_of(read_json(file))
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        raise UserError(f"{file}: names no max_position_embeddings, the tokens the model was made for") from None


def context_of(config: dict[str, Any]) -> int:
    """max_position_embeddings, multiplied where the config's rope scaling extends it.

    >>> context_of({"max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", "factor": 4.0}})
    131072
    """
    made_for = int(config["max_position_embeddings"])
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type")
    if kind == "yarn":
        return max(made_for, int((rope.get("original_max_position_embeddings") or made_for) * rope["factor"]))
    return int(made_for * rope["factor"]) if kind in ("linear", "dynamic") else made_for  # made_for has the others


def read_config(folder: Path, **changes: Any) -> Any:
    """The folder's config as transformers reads it; UserError where that fails, or would run the folder's code."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, **changes)
    except Exception as error:  # a broken config.json raises many kinds; code of its own is among them, and never run
        raise UserError(f"{folder / 'config.json'}: not an architecture of transformers "
                        f"({(str(error) or type(error).__name__).splitlines()[0]})") from None


def plain_config(folder: Path, **changes: Any) -> Any:
    """`read_config`; UserError for quantised weights, which would be read as if they were plain ones."""
    config = read_config(folder, **changes)
    if quantised := getattr(config, "quantization_config", None):
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised.quant_method
        raise UserError(f"{folder}: its weights are quantised ({getattr(method, 'value', method)}) and cannot be "
                        "trained or sampled here; use the plain checkpoint, or a server with --base-url")
    return config


def tested_config(folder: Path, **changes: Any) -> Any:
    """`plain_config`; UserError for an architecture that the tests do not know, or that packing would change."""
    config = plain_config(folder, **changes)
    if reason := why_not(config):
        raise UserError(f"{folder}: {config.model_type} {reason}. Trained and sampled here: {', '.join(TESTED)}, with "
                        "full attention; a family is added in loading/folder.py (TESTED) and proved by "
                        "tests/loading/test_architectures.py. Judging through a server (--base-url) takes any model")
    return config


def why_not(config: Any) -> str:
    """Why this architecture cannot be packed and sampled here, in words; empty if it can."""
    window, known = getattr(config, "sliding_window", None), getattr(config, "layer_types", None) or []
    rope = getattr(config, "rope_parameters", None) or {}
    if "SequenceClassification" in str(getattr(config, "architectures", "")):
        return "is a scalar reward model here, which writes no chain (eval.py run --scalar judges with it)"
    if any(getattr(config, name, None) for name in ("attn_logit_softcapping", "final_logit_softcapping")):
        return "caps its logits (softcapping), which the packed log-probs leave out"
    if any(kind != "full_attention" for kind in known) or (not known and window and window < context_of(vars(config))):
        return f"has windowed layers (a sliding window of {window} tokens)"
    if getattr(config, "use_bidirectional_attention", None):
        return "lets a token see the later ones"
    if rope.get("rope_type", "default") not in STEADY_ROPE:
        return f"scales its positions by the longest sequence in a batch ({rope['rope_type']} rope)"
    return "" if config.model_type in TESTED else "is not among the tested architectures"
