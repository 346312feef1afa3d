"""What an exported folder says to others: transformers 4 and 5, servers, and a reader who uploads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import EOS, make_folder, make_lm, make_tokenizer

from loading.tokenizer import load_tokenizer
from model import Policy, load_policy, save_hf
from rollout import load_sampler

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}


def export(path: Path, lm, tokenizer=None) -> Path:
    save_hf(Policy(lm), tokenizer or make_tokenizer(), path / "model")
    return path / "model"


def read(file: Path) -> dict:
    return json.loads(file.read_text())


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, LLAMA3], ids=["default", "llama3"])
def test_rotary_settings_stand_where_either_version_looks(tmp_path, rope):
    config = read(export(tmp_path, make_lm(rope_parameters=rope | {"rope_theta": 5e5})) / "config.json")
    assert config["rope_parameters"] == rope | {"rope_theta": 5e5}  # version 5
    assert config["rope_theta"] == 5e5  # version 4
    assert config["rope_scaling"] == (None if rope["rope_type"] == "default" else rope)
    assert load_policy(str(tmp_path)).lm.config.rope_parameters == rope | {"rope_theta": 5e5}


def test_an_export_names_no_folder_of_this_machine(tmp_path):
    folder = make_folder(tmp_path / "start", make_lm(), tokenizer=True)
    exported = export(tmp_path, load_policy(folder).lm, load_tokenizer(folder))
    for file in exported.glob("*.json"):
        assert str(tmp_path) not in file.read_text(), file.name
    assert not {"_name_or_path", "quantization_config"} & read(exported / "config.json").keys()


def test_the_tokenizer_of_an_export_has_a_class_that_both_versions_know(tmp_path):
    """Version 4 knows no TokenizersBackend, and takes a list of extra_special_tokens for an error."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    exported = export(tmp_path, make_lm(), tokenizer)
    config = read(exported / "tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|im_start|>"]
    assert not {"extra_special_tokens", "backend", "is_local", "local_files_only"} & config.keys()
    loaded = load_tokenizer(str(exported))
    text = "<|im_start|>user w1 w2<|im_end|>"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.decode(loaded(text).input_ids, skip_special_tokens=True) == tokenizer.decode(
        tokenizer(text).input_ids, skip_special_tokens=True)


@pytest.mark.parametrize("settings", [
    {"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"max_length": 4096, "temperature": 0.9},
    {"do_sample": True, "temperature": 0.0}, {"num_return_sequences": 4, "do_sample": False}, {"pad_token_id": -1}])
def test_no_generation_setting_reaches_the_judge_or_ends_a_run_at_its_export(tmp_path, settings):
    folder = Path(make_folder(tmp_path / "start", make_lm(), tokenizer=True))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS} | settings))
    lm = load_policy(str(folder)).lm
    assert lm.generation_config.eos_token_id == EOS and not lm.generation_config.do_sample
    found = read(export(tmp_path, lm) / "generation_config.json")
    assert found["eos_token_id"] == EOS and not settings.keys() & found.keys()


def test_the_export_stops_where_our_sampler_stops(tmp_path):
    """A base model's generation settings name another end of turn than the tokenizer's template."""
    from transformers import AutoModelForCausalLM

    folder = Path(make_folder(tmp_path / "start", make_lm(seed=3), tokenizer=True))
    for name in ("generation_config.json", "config.json"):
        (folder / name).write_text(json.dumps(read(folder / name) | {"eos_token_id": 3}))
    exported = export(tmp_path, load_policy(str(folder)).lm, load_tokenizer(str(folder)))
    sampler = load_sampler(str(exported))
    assert sampler.stop_ids == {EOS, 3} == load_sampler(str(folder)).stop_ids
    assert read(exported / "config.json")["eos_token_id"] == [EOS, 3]
    theirs = AutoModelForCausalLM.from_pretrained(exported)
    with torch.no_grad():  # an end of turn soon, by either id
        for head in (sampler.lm.lm_head, theirs.lm_head):
            head.weight[EOS] += 0.5
    for start in range(7, 20):
        prompt = [1, start]
        ours = sampler.generate([prompt], 1, 0.0, 40, [0])[0].response_ids
        made = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, pad_token_id=0)
        assert made[0, 2:].tolist() == ours
