"""A scalar reward model as a judge: one number for a response to a conversation; the higher number wins.

    judge = load_scalar("runs/scalar")                 # any AutoModelForSequenceClassification with one label
    judge.score(context, response)                     # 1.37
    judgements = judge_scalar(judge.score, pairs)       # the lines that eval.py logs, for the same tables

The conversation goes through the model's own chat template with the response as the assistant's turn, and no text
in it can become a control token (cor_prompt.py). One sequence a forward, without padding: where a model reads its
number must not depend on what stands beside it. Equal scores give no verdict and count as wrong, as a missing verdict
does and as RewardBench and RM-Bench count them. Nothing that a model folder brings is executed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cor_prompt import encode_prompt
from data import Message
from loading.folder import model_folder, plain_config
from loading.tokenizer import load_tokenizer
from loading.weights import check_finite
from runtime.errors import UserError


@dataclass
class ScalarModel:
    """`score` keeps what it has computed: RM-Bench shows each response in three of its nine comparisons."""

    lm: Any
    tokenizer: Any
    context: int  # tokens that the model was made for
    known: dict[tuple[int, ...], float] = field(default_factory=dict)

    @torch.inference_mode()
    def score(self, context: Sequence[Message], response: str) -> float | None:
        """None where conversation and response are longer than the model's context."""
        ids = encode_reply(context, response, self.tokenizer)
        if len(ids) > self.context:
            return None
        if (key := tuple(ids)) not in self.known:
            inputs = torch.tensor([ids], device=next(self.lm.parameters()).device)
            self.known[key] = self.lm(input_ids=inputs).logits[0, 0].item()
        return self.known[key]


def encode_reply(context: Sequence[Message], response: str, tokenizer: Any) -> list[int]:
    """Conversation and response -> ids; the last ones are those that the template ends a turn with."""
    turns: list[Message] = [*context, {"role": "assistant", "content": response}]
    return encode_prompt(turns, tokenizer, add_generation_prompt=False)


def load_scalar(path: str, dtype: str = "float32") -> ScalarModel:
    """UserError for what transformers would load with a head of random numbers, or only by running its code."""
    from transformers import AutoModelForSequenceClassification

    folder = model_folder(path)
    config = plain_config(folder)
    if getattr(config, "auto_map", None):
        raise UserError(f"{path}: works only with code from its folder (auto_map), and that is never run")
    if not any("ForSequenceClassification" in name for name in config.architectures or []):
        raise UserError(f"{path}: no scalar reward model ({', '.join(config.architectures or ['unnamed'])}); train one "
                        "with variants/scalar_rm.py, or leave out --scalar")
    if config.num_labels != 1:
        raise UserError(f"{path}: gives {config.num_labels} numbers for a response; a scalar reward model gives one")
    try:
        lm, info = AutoModelForSequenceClassification.from_pretrained(
            folder, config=config, dtype=getattr(torch, dtype), trust_remote_code=False, use_safetensors=True,
            output_loading_info=True)
    except ValueError as error:
        raise UserError(f"{path}: no reward model of transformers ({str(error).splitlines()[0][:120]})") from None
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{path}: {len(missing)} weights are missing, {missing[0]} among them")
    for name, parameter in lm.named_parameters():
        check_finite(parameter, f"{path}: {name}")
    lm.config.use_cache = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    room = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31
    return ScalarModel(lm.eval().to(device), load_tokenizer(path), room)
