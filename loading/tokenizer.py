"""The folder's tokenizer, as it was saved."""

from __future__ import annotations

from typing import Any

from loading.folder import model_folder
from runtime.errors import UserError


def load_tokenizer(path: str) -> Any:
    """The folder's fast tokenizer; UserError without a chat template or an end-of-turn token."""
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
    return tokenizer
