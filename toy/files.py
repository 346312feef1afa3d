"""The tiny world as files: tokenizer, untrained model, prompt and data."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from cor_prompt import render
from data import Pair, save_pairs
from runtime.cli import check_numbers
from runtime.disk import read_json, write_whole
from runtime.errors import UserError
from runtime.seeds import derive_seed
from toy import world
from toy.world import SYSTEM, Flaws, Form, choose_flaws, make_pairs, reshape, teach

VOCABULARY_SIZE = 96
WORDS = """system user assistant judge Reasoning Chat what is it write about mention polite the
           A B yes no right wrong total""".split()
SIGNS = list("0123456789+=?.;:")
TAGS = [f"<{slash}{tag}>" for tag in ("type", "rubric", "solution", "eval", "answer") for slash in ("", "/")]
CONTROL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
FILES = ("start", "prompt.txt", "sft.jsonl", "sft_held_out.jsonl", "rl.jsonl", "held_out.jsonl", "world.json")


# ---- tokenizer and model -------------------------------------------------------------------------------


def prompt_markers() -> list[str]:
    """The fixed markers of the prompt, read from a rendered one, such as `[Client Question]`."""
    pair = Pair("", "", (world.user("?"),), "?", "?", "A")
    return re.findall(r"\[[^\[\]]+\]", render(pair, "instruct", SYSTEM)[-1]["content"])


def whole_words() -> list[str]:
    """Texts with signs in them that are one token each."""
    return [*prompt_markers(), *TAGS, "[[A]]", "[[B]]"]


def pieces() -> str:
    """The regular expression of one token's text."""
    return "|".join(map(re.escape, whole_words())) + r"|[A-Za-z]+|[0-9]|[^\sA-Za-z0-9]"


def build_tokenizer() -> Any:
    """One word, digit, sign, tag or prompt marker a token: 96 entries, as many as the model has rows.

    Markers and tags are words of the vocabulary, not added tokens, because a judge's prompt is encoded
    without any added token. The three control tokens are added tokens only, so no text can reach them.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<|unk|>", *whole_words(), *WORDS, *SIGNS, *world.COLOURS, *world.NOUNS, *world.VERBS,
             *world.POLITE, *world.CURT]
    words += [f"<|unused_{i}|>" for i in range(VOCABULARY_SIZE - len(CONTROL) - len(words))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pieces()), "removed", invert=True)
    # a blank before every token but the verdict and its closing tag: <answer>[[B]]</answer> stays literal
    blank = decoders.Replace(Regex(r"^(?!\[\[|</answer>)"), " ")
    core.decoder = decoders.Sequence([blank, decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=CONTROL[0], eos_token=CONTROL[2], padding_side="left",
        additional_special_tokens=[CONTROL[1]], model_max_length=256,
        clean_up_tokenization_spaces=False)
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }} {{ message['content'] }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    return tokenizer


def build_model(tokenizer: Any, seed: int, hidden: int = 64, layers: int = 2) -> Any:
    """An untrained Llama of 129,344 parameters, float32. With the wide init (0.1) and the short rope period (100) so
    small a model learns in a minute; head_dim 32 is the smallest that serving engines take."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, intermediate_size=3 * hidden, tie_word_embeddings=True,
        initializer_range=0.1, rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        max_position_embeddings=256, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, dtype="float32")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights"))
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


# ---- build ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Build:
    """Write the tiny world: an untrained model with its tokenizer, a prompt file, four data files."""

    # Folder to write. It must be missing or empty, or hold the world of the same settings.
    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]
    seed: int = 0  # Seed of the weights, the pairs and the teacher (an integer).
    flaw: float = 0.6  # Probability (0..1) of each of the teacher's two blind spots. At 0.2 imitation alone loses them.
    clean_teacher: bool = False  # A teacher without any error, slips included; --flaw is ignored.
    sft_pairs: int = 8000  # Training pairs with the teacher's trace, sft.jsonl (pairs).
    rl_pairs: int = 1920  # Training pairs without a trace, rl.jsonl (pairs). 120 rounds of 16 see each once.
    held_out_pairs: int = 250  # Pairs about questions that no training file has, held_out.jsonl (pairs).
    sft_held_out_pairs: int = 200  # The same with traces, for the held-out loss, sft_held_out.jsonl (pairs).
    # Parts of a trace. cor: all; untyped: no type; rubrics: no type and no solution; plain: no rubric either; answer:
    # the right letter alone (in rl.jsonl too); mixed: one of cor, plain and answer.
    traces: Form = "cor"
    hidden: int = 64  # Width of the model (even).
    layers: int = 2  # Layers of the model.


def build(cfg: Build) -> None:
    check_numbers(cfg, "sft_pairs", "rl_pairs", "held_out_pairs", "sft_held_out_pairs", "hidden", "layers")
    flaws = choose_flaws(cfg.flaw, cfg.clean_teacher)
    settings = {k: v for k, v in asdict(cfg).items() if k != "folder"}
    write_folder(cfg.folder, settings, lambda part: write_world(part, cfg, flaws))


def write_folder(name: str, settings: dict[str, Any], fill: Callable[[Path], None]) -> None:
    """A world's folder appears at once, by one rename, or not at all. `fill` writes every file but world.json."""
    folder = Path(name).absolute()
    if already_built(folder, settings):
        return print(f"{name} already holds this world; nothing to do")
    aside = folder.with_name(folder.name + ".part")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        fill(aside)
        write_whole(aside / "world.json", json.dumps(settings, indent=2) + "\n")
        os.replace(aside, folder)  # an empty folder may be there
    except OSError as error:
        raise UserError(f"{name}: cannot be written ({error})") from None
    print(f"wrote {name}: {', '.join(FILES)}")


def already_built(folder: Path, settings: dict[str, Any]) -> bool:
    """True if `folder` holds the world of these settings; UserError if it holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not all((folder / name).exists() for name in FILES):
        raise UserError(f"{folder} holds other things; use another DIR")
    if (before := read_json(folder / "world.json")) != settings:
        raise UserError(f"{folder} holds the world of {str(before)[:400]}, not of {settings}; use another DIR")
    return True


def write_world(part: Path, cfg: Build, flaws: Flaws) -> None:
    """Every file but world.json. Each has a random stream for itself, so the size of one changes no other file."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = build_tokenizer()
    build_model(tokenizer, cfg.seed, cfg.hidden, cfg.layers).save_pretrained(part / "start")
    tokenizer.save_pretrained(part / "start")
    write_whole(part / "prompt.txt", SYSTEM + (" {data}" if cfg.traces in ("untyped", "plain") else "") + "\n")

    def stream(name: str) -> random.Random:
        return random.Random(derive_seed(cfg.seed, name))

    for name, count, held_out, taught in (
        ("sft", cfg.sft_pairs, False, True),
        ("sft_held_out", cfg.sft_held_out_pairs, True, True),
        ("rl", cfg.rl_pairs, False, cfg.traces == "answer"),
        ("held_out", cfg.held_out_pairs, True, False),
    ):
        pairs, teacher = make_pairs(count, stream(name), held_out, name), stream(f"{name} teacher")
        if taught:
            pairs = [replace(pair, trace=teach(pair, teacher, flaws)) for pair in pairs]
            forms = stream(f"{name} forms")
            pairs = [replace(pair, trace=reshape(pair, pair.trace or "", cfg.traces, forms)) for pair in pairs]
        write_whole(part / f"{name}.jsonl", save_pairs(pairs))
