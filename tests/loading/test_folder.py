"""Which weights a folder stands for, and what is refused: one fault each, as folders on disk have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import EOS, make_config, make_folder, make_lm, make_tokenizer

from loading.folder import context_of, context_tokens, weights_digest, why_not
from loading.tokenizer import load_tokenizer, read_generation, stop_ids
from model import load_policy
from rollout import TorchSampler, load_sampler
from runtime.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def change_config(folder: Path, name: str = "config.json", **changes) -> None:
    file = folder / name
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | changes))


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def in_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Write two shards -> the index's weight_map."""
    names, places = sorted(tensors), {}
    for k, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{k}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    return places


@pytest.fixture
def start(tmp_path):
    """A folder with trained weights, and stale ones that must not be read."""
    make_folder(tmp_path, make_lm("llama", tied=True, seed=1), tokenizer=True)
    stale = load_file(make_folder(tmp_path / "stale", make_lm("llama", tied=True, seed=2)) + "/" + WEIGHTS)
    return tmp_path, load_file(tmp_path / WEIGHTS), stale


def assert_read(folder: Path, wanted: dict[str, torch.Tensor]) -> None:
    found = dict(load_policy(str(folder)).lm.named_parameters())
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_stale_shards_beside_a_whole_file_are_leftovers(start):
    folder, trained, stale = start
    digest = weights_digest(str(folder))
    in_shards(folder, stale)
    assert_read(folder, trained)
    assert weights_digest(str(folder)) == digest


def test_the_index_says_which_files_count(start):
    folder, trained, stale = start
    (folder / WEIGHTS).unlink()
    places = in_shards(folder, trained)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    digest = weights_digest(str(folder))
    save_file(stale, folder / "backup.safetensors", metadata={"format": "pt"})
    assert_read(folder, trained)
    assert weights_digest(str(folder)) == digest
    first = folder / "model-00001-of-00002.safetensors"  # a tensor that the index looks for elsewhere is stale too
    other = next(name for name, file in places.items() if file != first.name)
    save_file(load_file(first) | {other: stale[other]}, first, metadata={"format": "pt"})
    assert_read(folder, trained)


def test_a_missing_shard_is_named(start):
    folder, trained, _ = start
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": in_shards(folder, trained)}))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: missing"):
        load_policy(str(folder))


def test_two_sets_of_weights_are_refused(start):
    """transformers reads the whole file, vLLM the index's."""
    folder, _, stale = start
    (folder / INDEX).write_text(json.dumps({"weight_map": in_shards(folder, stale)}))
    with pytest.raises(UserError, match="two sets of weights"):
        load_policy(str(folder))


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{"])
def test_an_index_that_is_none_is_refused(start, content):
    folder, *_ = start
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(content)
    with pytest.raises(UserError, match="index"):
        load_policy(str(folder))


# ---- other kinds of weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes", "gptq", "awq"])
def test_quantised_folders_are_refused_by_their_method(start, method):
    folder, *_ = start
    change_config(folder, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(UserError, match=f"quantised.*{method}"):
        load_policy(str(folder))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8, torch.int32])
def test_quantised_weights_without_a_word_in_the_config_are_refused(start, dtype):
    folder, *_ = start
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(UserError, match="quantised"):
        load_policy(str(folder))


@pytest.mark.parametrize("alone", [True, False])
def test_an_adapter_is_named(start, alone):
    folder, *_ = start
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors") if alone else None
    for read in (load_policy, weights_digest):
        with pytest.raises(UserError, match="adapter"):
            read(str(folder))


def test_pickled_weights_alone_are_named(start):
    folder, *_ = start
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"\.bin.*safetensors"):
        load_policy(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(start, value):
    folder, *_ = start
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(folder, lambda tensors: tensors[name][3].fill_(value))
    with pytest.raises(UserError, match=rf"{name}.*NaN or infinity"):
        load_policy(str(folder))


def test_a_scalar_model_with_nan_is_named(tmp_path):
    from transformers import AutoModelForSequenceClassification

    from judging.scalar import load_scalar

    AutoModelForSequenceClassification.from_config(make_config("llama", num_labels=1)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    load_scalar(str(tmp_path))
    change_weights(tmp_path, lambda tensors: tensors["score.weight"].fill_(float("nan")))
    with pytest.raises(UserError, match=r"score\.weight.*NaN"):
        load_scalar(str(tmp_path))
    change_config(tmp_path, quantization_config={"quant_method": "fp8"})
    with pytest.raises(UserError, match="quantised"):
        load_scalar(str(tmp_path))


# ---- a stored head that the config ties ----------------------------------------------------------------


def test_a_stored_head_that_equals_the_embedding_is_the_embedding(start):
    folder, trained, _ = start
    change_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert_read(folder, trained)


def test_a_stored_head_of_its_own_is_refused_where_the_config_ties_it(start):
    """transformers 5 uses it, 4 and vLLM do not."""
    folder, *_ = start
    change_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 0.5}))
    with pytest.raises(UserError, match="tie_word_embeddings"):
        load_policy(str(folder))
    change_config(folder, tie_word_embeddings=False)  # the remedy that the message names
    lm = load_policy(str(folder)).lm
    torch.testing.assert_close(lm.lm_head.weight, lm.model.embed_tokens.weight + 0.5)


# ---- tokenizer, ends of turns, context -----------------------------------------------------------------


def test_more_token_ids_than_embedding_rows_are_refused(start):
    folder, *_ = start
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="48 embedding rows"):
        load_tokenizer(str(folder))


def test_without_generation_settings_the_config_says_where_a_turn_ends(start):
    folder, *_ = start
    (folder / "generation_config.json").unlink()
    change_config(folder, eos_token_id=[EOS, 9])
    assert stop_ids(read_generation(folder), make_tokenizer()) == {EOS, 9}
    assert load_sampler(str(folder)).stop_ids == {EOS, 9}


@pytest.mark.parametrize("eos", ["<|im_end|>", [True], {"id": 3}, 2.5])
def test_an_end_of_turn_that_is_no_number_is_refused(start, eos):
    folder, *_ = start
    change_config(folder, "generation_config.json", eos_token_id=eos)
    with pytest.raises(UserError, match="eos_token_id"):
        load_policy(str(folder))


@pytest.mark.parametrize("rope, wanted", [
    (None, 128), ({"rope_type": "default"}, 128), ({"type": "linear", "factor": 2.0}, 256),
    ({"rope_type": "yarn", "factor": 4.0}, 512),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 96}, 384),
    ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}, 128)])
def test_rope_scaling_extends_the_context(rope, wanted):
    for name in ("rope_scaling", "rope_parameters"):
        assert context_of({"max_position_embeddings": 128, name: rope}) == wanted


def test_the_extended_context_is_the_samplers_too(tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4}
    folder = make_folder(tmp_path, make_lm("llama", rope_parameters=rope), tokenizer=True)
    assert context_tokens(folder) == 512
    assert TorchSampler(load_policy(folder).lm, make_tokenizer()).context == 512


# ---- architectures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, reason", [
    ({"arch": "mistral", "sliding_window": 64}, "sliding window"),
    ({"arch": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "sliding window"),
    ({"arch": "gemma2"}, "softcapping"), ({"arch": "mixtral"}, "not among the tested"),
    ({"arch": "qwen3_moe"}, "not among the tested"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic rope"),
    ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0, "rope_theta": 1e4, "short_factor": [1.0] * 4,
                          "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}}, "longrope"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "scalar reward model"),
    ({"arch": "gpt_neox"}, "not among the tested")])
def test_what_packing_would_change_is_refused_with_the_reason(tmp_path, changes, reason):
    make_config(**({"arch": "llama"} | changes)).save_pretrained(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=f"{reason}.*test_architectures"):
        load_policy(str(tmp_path))


def test_a_window_as_long_as_the_context_is_not_in_force():
    assert why_not(make_config("mistral", sliding_window=128)) == ""
