"""A trained model -> a folder that `from_pretrained` (transformers 4.57 and 5) and vLLM load, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from loading.judge_file import NAME, card
from loading.tokenizer import stop_ids
from runtime.disk import read_json, replace_folder, write_whole


def save_folder(lm: Any, weights: dict[str, Tensor], tokenizer: Any, path: Path, dtype: str,
                shard_bytes: int = 4 * 2**30, judge: Mapping[str, Any] | None = None) -> None:
    """Write config, weights (on the CPU, a tied head left out), end-of-turn ids and tokenizer; judge.json and a
    model card if `judge` says how it is asked.

    Only the rank that holds the weights calls it. `lm` is the transformers model they belong to.
    """
    from huggingface_hub import save_torch_state_dict
    from transformers import GenerationConfig

    aside = path.with_name(path.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_torch_state_dict(weights, aside, max_shard_size=shard_bytes, metadata={"format": "pt"})
    stops: Any = sorted(stop_ids(lm.generation_config, tokenizer))  # `generate` and servers stop where our samplers do
    stops = stops if len(stops) > 1 else stops[0]
    config = json.loads(lm.config.to_json_string(use_diff=True))
    config |= _rope_of_version_4(config) | {"dtype": dtype, "eos_token_id": stops}
    _write(aside / "config.json", config)
    pad = lm.generation_config.pad_token_id
    GenerationConfig(bos_token_id=lm.generation_config.bos_token_id, eos_token_id=stops,
                     pad_token_id=pad if pad is not None and pad >= 0 else None).save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    _write(aside / "tokenizer_config.json", _of_both_versions(read_json(aside / "tokenizer_config.json")))
    if judge:
        judge = {**judge, "template_args": dict(getattr(tokenizer, "template_args", {}))}
        _write(aside / NAME, judge)
        write_whole(aside / "README.md", card(judge))
    replace_folder(aside, path)


def _rope_of_version_4(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings under the names that transformers 4 reads; version 5 reads `rope_parameters`."""
    rope = dict(config.get("rope_parameters") or {})
    flat = {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    return flat | {"rope_scaling": None if rope.get("rope_type", "default") == "default" else rope} if flat else {}


def _of_both_versions(config: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json without what only version 5 knows, or what only held on this machine."""
    for name in ("backend", "is_local", "local_files_only", "name_or_path"):
        config.pop(name, None)
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config | {"tokenizer_class": "PreTrainedTokenizerFast"}


def _write(file: Path, content: Mapping[str, Any]) -> None:
    write_whole(file, json.dumps(content, indent=2) + "\n")
