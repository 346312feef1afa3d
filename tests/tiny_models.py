"""Tiny random language models and a word-level tokenizer, built in milliseconds, for the numeric tests.

Weights are spread widely (initializer_range 0.2, vectors perturbed too), so that log-probs are far from flat
and a bias, a norm or a head that is dropped on the way shows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor

VOCAB = 48
EOS = 2
WORDS = [f"w{i}" for i in range(30)]
TOKENS = ["<unk>", "<|im_start|>", "<|im_end|>", "<pad>", "system", "user", "assistant", *WORDS]
TOKENS += [f"{a} {b}" for a, b in pairwise(WORDS)][: VOCAB - len(TOKENS)]  # never re-encoded
CONTROL = ("<|im_start|>", "<|im_end|>", "<pad>")  # unknown words give <unk>, which is no control token
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

ARCHITECTURES = ("llama", "qwen2", "qwen3")


def word_level(tokens: Sequence[str], template: str, control: Sequence[str] = (), **special: Any) -> Any:
    """A fast tokenizer of the words between blanks; the first of `tokens` is "<unk>"."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, special=True) for token in control])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = template
    return tokenizer


def make_tokenizer() -> Any:
    """Its multi-word tokens decode to text that encodes otherwise."""
    return word_level(TOKENS, TEMPLATE, CONTROL, eos_token="<|im_end|>", pad_token="<pad>")


def make_config(arch: str = "llama", tied: bool = False, **changes: Any) -> Any:
    from transformers import AutoConfig

    shape = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
        "initializer_range": 0.2, "tie_word_embeddings": tied, "bos_token_id": None, "eos_token_id": EOS,
        "pad_token_id": None,
    }
    if arch == "qwen2":
        del shape["head_dim"]
    return AutoConfig.for_model(arch, **(shape | changes))


def make_lm(
    arch: str = "llama", tied: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """A transformers causal LM in eval mode, a function of its arguments; float64 is float64 throughout."""
    from transformers import AutoModelForCausalLM

    config = make_config(arch, tied, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        with torch.no_grad():
            for parameter in lm.parameters():
                if parameter.ndim == 1:  # norms start at 1 and attention biases at 0: move them
                    parameter.add_(0.3 * torch.randn_like(parameter))
    lm = lm.to(dtype).eval()
    return exact_norms(lm) if dtype == torch.float64 else lm


def exact_norms(lm: Any) -> Any:
    """Transformers' RMSNorm computes in float32 whatever it is given; make it keep float64."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    for module in lm.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(forward, module)
    return lm


def make_folder(path: Path, lm: Any, tokenizer: bool = False, **save: Any) -> str:
    """`from_pretrained` folder of a model, by transformers' own writer."""
    lm.save_pretrained(path, **save)
    if tokenizer:
        make_tokenizer().save_pretrained(path)
    return str(path)


def make_world(folder: Path) -> Path:
    """A model of one layer with a vocabulary of 16 tokens, two of them whole verdicts, and 24 pairs."""
    verdicts = ["<answer>[[A]]</answer>", "<answer>[[B]]</answer>"]
    tokens = ["<unk>", "<|im_start|>", "<|im_end|>", "<pad>", "user", "assistant", *verdicts]
    tokens += [f"w{i}" for i in range(8)]
    shape = {"vocab_size": len(tokens), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    make_folder(folder / "start", make_lm(num_attention_heads=2, num_key_value_heads=1, **shape))
    word_level(tokens, TEMPLATE, tokens[1:4], eos_token="<|im_end|>", pad_token="<pad>").save_pretrained(
        folder / "start")
    rows = [{"context_messages": [{"role": "user", "content": f"w{i % 8} w{i // 8}"}],
             "winner": f"w{i % 5} {verdicts[i % 2]}"} for i in range(24)]
    for name, count in (("pairs", 24), ("held_out", 4)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
    return folder


def plain_logits(lm: Any, ids: list[int]) -> Tensor:
    """One sequence through transformers as it is, no mask and no cache -> (T, V) in float32 or better."""
    logits = lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits if logits.dtype == torch.float64 else logits.float()


def plain_logprobs(lm: Any, prompt: list[int], response: list[int], temperature: float = 1.0) -> Tensor:
    """(len(response),) log-probs of one response by a forward of its own: what packing has to equal."""
    if not response:
        return torch.zeros(0, dtype=next(lm.parameters()).dtype)
    logits = plain_logits(lm, prompt + response)[len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


def gradients(module: Any) -> dict[str, Tensor]:
    """Gradient of each parameter, zeros where none came; a tied weight once."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], atol: float, what: str = "") -> None:
    """The same names and dtypes, each tensor within `atol`; 0 means equal."""
    assert found.keys() == wanted.keys() and wanted
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=lambda m, n=name: f"{what} {n}: {m}")


def logged(out: Path) -> list[dict[str, Any]]:
    """The metrics of a run, without times and rates."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "tokens/"))} for row in rows]


def exported(out: Path) -> dict[str, Tensor]:
    """The weights that a run exported."""
    from safetensors.torch import load_file

    return load_file(out / "model" / "model.safetensors")
