"""The folder's tokenizer, as it was saved, and the ids that end a turn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loading.folder import model_folder
from loading.judge_file import read_judge
from loading.templates import parse_arguments, set_arguments
from runtime.disk import read_json
from runtime.errors import UserError


def load_tokenizer(path: str, template_args: Sequence[str] = ()) -> Any:
    """The folder's fast tokenizer; UserError without a chat template or an end-of-turn token.

    The template arguments of the folder's judge.json, overridden by `template_args` (name=value), go to the chat
    template whenever it is rendered.
    """
    from transformers import PreTrainedTokenizerFast

    folder = model_folder(path, weights=False)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: needs a fast tokenizer (tokenizer.json)")
    try:  # not AutoTokenizer: it may put another class's pre-tokenizer in the place of the one that was saved
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # a broken tokenizer.json raises plain Exception
        raise UserError(f"{folder}: no loadable tokenizer ({error})") from None
    if not tokenizer.chat_template:
        raise UserError(f"{folder}: no chat template; add chat_template.jinja or use a chat model")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: its tokenizer names no end-of-turn token (eos_token)")
    config, last = read_json(folder / "config.json"), max(tokenizer.get_vocab().values())
    rows = config.get("vocab_size") if isinstance(config, dict) else None
    if isinstance(rows, int) and last >= rows:
        raise UserError(f"{folder}: its tokenizer has ids up to {last} ({tokenizer.convert_ids_to_tokens(last)!r}), "
                        f"but the model has {rows} embedding rows; use the tokenizer that belongs to it")
    set_arguments(tokenizer, read_judge(str(folder)).get("template_args", {}) | parse_arguments(template_args))
    return tokenizer


def read_generation(folder: Path) -> Any:
    """GenerationConfig with the token ids of generation_config.json, or without that file of config.json.

    Its sampling settings stay out: they are the base model's, a judge is trained and sampled without them, and
    transformers refuses to save some of those that it reads.
    """
    from transformers import GenerationConfig

    file = next(f for f in (folder / "generation_config.json", folder / "config.json") if f.is_file())
    found = read_json(file)
    if not isinstance(found, dict):
        raise UserError(f"{file}: not a JSON object")
    ids = {name: found.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, listed in ids.items():
        if any(type(i) not in (int, type(None)) for i in (listed if isinstance(listed, list) else [listed])):
            raise UserError(f"{file}: {name} is {listed!r}, expected a token's number")
    return GenerationConfig(**ids)


def stop_ids(generation_config: Any, tokenizer: Any) -> set[int]:
    """End-of-turn ids: the tokenizer's and the generation config's, the same set in every sampler and in the export."""
    listed = generation_config.eos_token_id if generation_config is not None else None
    listed = listed if isinstance(listed, (list, tuple)) else [listed]
    return {i for i in (*listed, tokenizer.eos_token_id) if i is not None}
