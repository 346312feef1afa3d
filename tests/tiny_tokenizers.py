"""Three small byte-level BPE tokenizers, trained here in milliseconds, with the chat templates that matter.

(The file must not be called tokenizers.py: pytest puts this folder first on the path, and the library of
that name would be hidden.)
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "The judge reads both answers and then writes the verdict: the first answer is better than the second.",
    "Compare the two responses criterion by criterion; the order in which they appear must not matter.",
    "think about the question, then answer the question; im start, im end, tool call, user, assistant, system",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\n\n<eval>...</eval>\n<answer>[[A]]</answer> [[B]]",
    "Größe, façade, naïve, 判断する, ответ, 😀 and other words beyond ASCII",
]

CHATML = (
    "{%- if messages[0].role == 'system' -%}"
    "{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' -}}"
    "{%- else -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if not (loop.first and message.role == 'system') -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

R1 = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{{- message.content -}}"
    "{%- elif message.role == 'user' -%}{{- '<｜User｜>' + message.content -}}"
    "{%- else -%}{{- '<｜Assistant｜>' + message.content + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<｜Assistant｜><think>\\n' -}}{%- endif -%}"
)

TRIMMING = (
    "{%- for message in messages -%}"
    "{%- set turn = '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n'"
    " + message.content | trim + '<|eot_id|>' -%}"
    "{{- bos_token + turn if loop.first else turn -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"
)


def _build(template: str, special: list[str], plain: list[str], eos: str, bos: str | None, core: Tokenizer) -> Any:
    """Train `core`, then add `special` and `plain` (added but not special) tokens and the template."""
    trainer = trainers.BpeTrainer(
        vocab_size=480, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(TEXT, trainer)
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    core.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, core.token_to_id(bos))])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos, pad_token=special[0], bos_token=bos,
        clean_up_tokenization_spaces=False)
    tokenizer.chat_template = template
    return tokenizer


def chatml() -> Any:
    """Qwen2.5-like: no BOS, NFC, a default system message, <think> and <tool_call> added but not special."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    return _build(CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<tool_call>", "<think>", "</think>"],
                  "<|im_end|>", None, core)


def r1() -> Any:
    """DeepSeek-R1-like: BOS in the template and in the post-processor, <think> opened by the prompt."""
    bos, eos = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    turns = ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]
    return _build(R1, [bos, eos], turns, eos, bos, Tokenizer(models.BPE()))


def trimming() -> Any:
    """Llama-3-like: contents are trimmed after a blank line of the template, whole words skip the merges."""
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return _build(TRIMMING, special, [], "<|eot_id|>", special[0], Tokenizer(models.BPE(ignore_merges=True)))


BUILDERS = {"chatml": chatml, "r1": r1, "trimming": trimming}
