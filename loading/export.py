"""A trained model -> a folder that `from_pretrained` and vLLM load, whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from runtime.disk import replace_folder, write_whole


def save_folder(lm: Any, weights: dict[str, Tensor], tokenizer: Any, path: Path, dtype: str,
                shard_bytes: int = 4 * 2**30) -> None:
    """Write config, weights (on the CPU, a tied head left out), generation config and tokenizer.

    Only the rank that holds the weights calls it. `lm` is the transformers model they belong to.
    """
    from huggingface_hub import save_torch_state_dict

    aside = path.with_name(path.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_torch_state_dict(weights, aside, max_shard_size=shard_bytes, metadata={"format": "pt"})
    config = json.loads(lm.config.to_json_string(use_diff=True)) | {"dtype": dtype}
    write_whole(aside / "config.json", json.dumps(config, indent=2) + "\n")
    lm.generation_config.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    replace_folder(aside, path)
