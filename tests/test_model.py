"""`Policy` against a plain forward per sequence; loading, exporting, resuming, one optimiser step."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny_models
import tiny_tokenizers
import torch
from tiny_models import (
    ARCHITECTURES,
    EOS,
    assert_close,
    gradients,
    make_folder,
    make_lm,
    make_tokenizer,
    plain_logprobs,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import model
from batch import Batch, Group, collate
from loading.tokenizer import load_tokenizer
from model import Policy, gathered_weights, load_policy, optimizer_step, save_hf
from ops import head
from runtime import states
from runtime.errors import UserError
from runtime.states import load_state, save_state

pytestmark = pytest.mark.numeric

GROUPS = [
    Group([1, 7, 8, 9, 10, 11], [[12, 13, EOS], [20, 21, 22, 23, 24, EOS], [30, EOS]]),
    Group([1, 33], [[EOS], [14, 15, 16, 17, 18, 19, 20, EOS]]),
    Group([5, 6, 7, 8, 9, 9, 9, 9, 9, 9, 9], [[40, 41, 42]]),
]
CUT = [
    Group(GROUPS[0].prompt_ids, GROUPS[0].responses[:1]),
    Group(GROUPS[0].prompt_ids, GROUPS[0].responses[1:]),
    *GROUPS[1:],
]

EVERY_MODEL = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
EVERY_ARCH = pytest.mark.parametrize("arch", ARCHITECTURES)


def weighed(logprobs: Tensor) -> Tensor:
    """A scalar in which every token has a weight of its own."""
    return (logprobs * torch.linspace(-1.0, 2.0, len(logprobs)).to(logprobs)).mean()


def twin(lm, temperature: float = 1.0) -> Tensor:
    """(N,) log-probs of GROUPS, one plain forward per sequence."""
    return torch.cat([plain_logprobs(lm, g.prompt_ids, r, temperature) for g in GROUPS for r in g.responses])


def bits(module: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, non-persistent buffers too."""
    return {n: t.detach().clone() for n, t in [*module.named_parameters(), *module.named_buffers()]}


def assert_bit_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert_close(found, wanted, 0.0)


# ---- T12: packed rows equal one forward per sequence ---------------------------------------------------


def packings() -> dict[str, Batch]:
    """All of GROUPS in ways that keep the order of the targets."""
    return {
        "one group a row": collate(GROUPS, [0, 1, 2], "cpu"),
        "all in one row": collate(GROUPS, [0, 1, 2], "cpu", one_row=True),
        "a group cut in two, rows": collate(CUT, [0, 1, 2, 3], "cpu"),
        "a group cut in two, one row": collate(CUT, [0, 1, 2, 3], "cpu", one_row=True),
    }


@EVERY_MODEL
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
def test_T12_P1_P2_packed_rows_equal_one_forward_per_sequence(tmp_path, tied, train, checkpointing):
    """One architecture, whose attention has biases; tests/loading/test_architectures.py has the others."""
    lm = make_lm("qwen2", tied)
    assert (lm.lm_head.weight is lm.model.embed_tokens.weight) == tied
    assert lm.model.layers[0].self_attn.q_proj.bias.abs().min() > 0
    wanted = twin(lm)
    weighed(wanted).backward()
    wanted_gradients = gradients(lm)
    assert wanted.std() > 0.5 and max(g.abs().max() for g in wanted_gradients.values()) > 1e-2

    policy = load_policy(make_folder(tmp_path, lm), checkpointing=checkpointing).train(train)
    assert policy.lm.model.gradient_checkpointing == checkpointing
    for name, batch in packings().items():
        policy.zero_grad()
        found = policy(batch).logprobs
        assert found.dtype == torch.float32 and found.shape == batch.targets.shape
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        weighed(found).backward()
        assert_close(gradients(policy.lm), wanted_gradients, 1e-5, name)


@EVERY_ARCH
def test_T12_in_float64_to_ten_digits(arch):  # Eq. 2
    lm = make_lm(arch, tied=True, dtype=torch.float64)
    wanted = twin(lm, 0.7)
    for batch in packings().values():
        torch.testing.assert_close(Policy(lm)(batch, temperature=0.7).logprobs, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mask", [None, "ones", "padded"])
def test_P1_a_loaded_model_called_in_the_plain_way_is_causal_or_refuses(tmp_path, mask):
    """Without a mask or with a 2-D one, as any other code calls a transformers model: never silently another model."""
    lm = make_lm("llama")
    loaded = load_policy(make_folder(tmp_path, lm)).lm.eval()
    ids = torch.tensor([[7, 8, 9, 10, 11, 12], [3, 3, 14, 15, 16, 17]])
    given = {None: None, "ones": torch.ones_like(ids), "padded": (ids != 3).long()}[mask]
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3] if mask == "padded" else [0, 1, 2, 3, 4, 5]])
    inputs = {"input_ids": ids, "attention_mask": given, "position_ids": positions, "use_cache": False}
    try:
        found = loaded(**inputs).logits
    except (ValueError, RuntimeError):
        return
    real = given.bool() if mask == "padded" else torch.ones_like(ids).bool()
    torch.testing.assert_close(found[real], lm(**inputs).logits[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
def test_T12_P2_the_forward_makes_no_cache(tmp_path, checkpointing):
    """A cache costs memory, switches packed detection off, and is dropped with a log line under recomputation."""
    policy = load_policy(make_folder(tmp_path, make_lm("llama")), checkpointing=checkpointing)
    made: list[object] = []
    policy.lm.model.register_forward_hook(lambda module, args, out: made.append(out.past_key_values))
    for train in (False, True):
        policy.train(train)(collate(GROUPS, [0, 1, 2], "cpu"))
    assert made == [None, None]


def test_P16_attention_dropout_of_a_config_reaches_neither_old_nor_new_log_probs(tmp_path):
    lm = make_lm("llama")
    plain = twin(lm)
    lm.config.attention_dropout = 0.1
    policy = load_policy(make_folder(tmp_path, lm)).train()
    batch = collate(GROUPS, [0, 1, 2], "cpu")
    first, second = policy(batch).logprobs, policy(batch).logprobs
    assert torch.equal(first, second), "the ratio of the first update is exactly 1"
    torch.testing.assert_close(first, plain, rtol=0, atol=1e-5)


# ---- the head ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.9])
def test_T8_temperature_divides_the_logits_in_forward_backward_and_entropy(temperature):
    lm = make_lm("llama")
    wanted = twin(lm, temperature)
    weighed(wanted).backward()
    wanted_gradients = gradients(lm)
    lm.zero_grad()
    found, entropy = Policy(lm)(collate(GROUPS, [0, 1, 2], "cpu"), temperature=temperature, entropy=True)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    weighed(found).backward()
    assert_close(gradients(lm), wanted_gradients, 1e-5)
    exact = []
    for group in GROUPS:
        for response in group.responses:
            logits = tiny_models.plain_logits(lm, group.prompt_ids + response)[len(group.prompt_ids) - 1 : -1]
            logp = (logits / temperature).log_softmax(-1)
            exact.append(-(logp.exp() * logp).sum(-1))
    torch.testing.assert_close(entropy, torch.cat(exact).detach(), rtol=0, atol=1e-5)
    assert not entropy.requires_grad and entropy.dtype == torch.float32
    assert torch.equal(Policy(lm)(collate(GROUPS, [0, 1, 2], "cpu"), temperature=temperature).logprobs, found)


def head_inputs(tokens: int, vocab: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, width, generator=made, dtype=torch.float64).to(dtype)
    weight = (0.5 * torch.randn(vocab, width, generator=made, dtype=torch.float64)).to(dtype)
    return hidden, weight, torch.randint(0, vocab, (tokens,), generator=made)


def test_P3_log_probs_of_a_bf16_model_are_float32_and_exact_for_its_hidden_states():
    hidden, weight, targets = head_inputs(64, 2048, 64, torch.bfloat16)
    wanted = (hidden.double() @ weight.double().T).log_softmax(-1)
    logprobs, entropy = head._HeadLogprobs.apply(hidden, weight, targets, 1.0, 32, True)
    assert logprobs.dtype == entropy.dtype == torch.float32
    exact = wanted.gather(1, targets[:, None])[:, 0]
    assert (logprobs.double() - exact).abs().max() < 1e-4
    assert (entropy.double() + (wanted.exp() * wanted).sum(-1)).abs().max() < 1e-4


def test_P4_head_gradient_in_chunks_is_the_float32_sum():
    """In bf16 a running sum over chunks stops growing: 4096 tokens of which each chunk holds 32."""
    hidden, weight, targets = head_inputs(4096, 64, 16, torch.bfloat16)
    hidden, targets = hidden.abs(), targets % 4  # a gradient that adds up
    exact = weight.double().requires_grad_()
    (hidden.double() @ exact.T).log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    found = {}
    for chunk in (32, 4096):
        w = weight.clone().requires_grad_()
        head._HeadLogprobs.apply(hidden, w, targets, 1.0, chunk, False)[0].sum().backward()
        assert w.grad.dtype == torch.bfloat16
        found[chunk] = w.grad.double()
        assert torch.cosine_similarity(found[chunk].flatten(), exact.grad.flatten(), dim=0) > 0.9999
        assert (found[chunk] - exact.grad).norm() / exact.grad.norm() < 2**-8
    assert torch.cosine_similarity(found[32].flatten(), found[4096].flatten(), dim=0) > 0.9999


class LargestLogits(TorchDispatchMode):
    """Watches every operation, of the backward pass too, for the tallest tensor of `vocab` columns."""

    def __init__(self, vocab: int):
        super().__init__()
        self.vocab, self.rows = vocab, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.ndim == 2 and tensor.shape[1] == self.vocab:
                self.rows = max(self.rows, tensor.shape[0])
        return out


@pytest.mark.parametrize("entropy", [False, True])
def test_no_logits_of_all_tokens_are_ever_alive(monkeypatch, entropy):
    monkeypatch.setitem(head.CHUNK, "cpu", 0)
    vocab, responses = 777, [[i] * 50 for i in range(4, 8)]
    policy = Policy(make_lm("llama", vocab_size=vocab))
    batch = collate([Group([1, 2, 3], responses)], [0], "cpu")
    with LargestLogits(vocab) as largest:
        out = policy(batch, temperature=0.7, entropy=entropy)
        out.logprobs.sum().backward()
    assert largest.rows == 32


# ---- load ----------------------------------------------------------------------------------------------


@EVERY_MODEL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_T17_load_equals_from_pretrained_bit_for_bit(tmp_path, tied, dtype):
    from transformers import AutoModelForCausalLM

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}
    folder = make_folder(tmp_path, make_lm("qwen2", tied, **({"rope_parameters": rope} if tied else {})))
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    policy = load_policy(folder, dtype)
    assert_bit_equal(bits(policy.lm), bits(wanted))
    assert any("inv_freq" in name for name, _ in policy.lm.named_buffers())
    assert (policy.lm.lm_head.weight is policy.lm.model.embed_tokens.weight) == tied
    assert policy.lm.generation_config.eos_token_id == EOS
    assert all(p.requires_grad and p.device.type == "cpu" for p in policy.parameters())


def test_P12_weights_are_stored_in_float32_even_from_a_bf16_file(tmp_path):
    folder = make_folder(tmp_path, make_lm("llama").to(torch.bfloat16))
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert {p.dtype for p in load_policy(folder).parameters()} == {torch.float32}


def rewrite(folder: Path, change) -> None:
    """Edit the folder's one weights file."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
@pytest.mark.parametrize("shape", [None, (48, 31), (47, 32), (48 * 32,), (1, 32)])
def test_a_weight_that_is_missing_or_of_another_shape_is_refused_by_name(tmp_path, name, shape):
    folder = make_folder(tmp_path, make_lm("llama"))
    rewrite(tmp_path, lambda t: t.update({name: torch.zeros(shape)}) if shape else t.pop(name))
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        load_policy(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, keep):
    folder = make_folder(tmp_path, make_lm("llama"))
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_policy(folder)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    # a run that is not there yet is no hub id
    for path, why in ((tmp_path, "not a model"), (tmp_path / "nothing", "no such"), ("runs/nothing", "no such")):
        with pytest.raises(UserError, match=why):
            load_policy(str(path))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="not exported"):
        load_policy(str(tmp_path))


def test_a_window_that_is_switched_off_is_full_attention(tmp_path):
    """Qwen2.5's own config.json names a window and does not use it."""
    lm = make_lm("qwen2", use_sliding_window=False, sliding_window=4, max_window_layers=1)
    policy = load_policy(make_folder(tmp_path, lm))
    torch.testing.assert_close(policy(collate(GROUPS, [0, 1, 2], "cpu")).logprobs, twin(lm), rtol=0, atol=1e-5)


# ---- tokenizers ----------------------------------------------------------------------------------------


def test_a_tokenizer_without_chat_template_or_eos_is_refused(tmp_path):
    folder = make_folder(tmp_path, make_lm("llama"), tokenizer=True)
    assert load_tokenizer(folder).eos_token_id == EOS
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="chat template"):
        load_tokenizer(folder)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="eos_token"):
        load_tokenizer(folder)


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(make_folder(tmp_path, make_lm("llama")))


@EVERY_ARCH
def test_T16_the_tokenizer_that_loads_is_the_one_that_was_saved(tmp_path, arch):
    tokenizer = make_tokenizer()
    save_hf(Policy(make_lm(arch)), tokenizer, tmp_path / "model", torch.float32)
    loaded = load_tokenizer(str(tmp_path / "model"))
    text = "<|im_start|>user\nw1 w2 w29 nonsense <|im_end|> w3"
    wanted = tokenizer(text, add_special_tokens=False).input_ids
    assert len(wanted) == 8
    assert loaded(text, add_special_tokens=False).input_ids == wanted
    assert loaded.decode(wanted) == tokenizer.decode(wanted)
    assert loaded.chat_template == tokenizer.chat_template and loaded.eos_token_id == tokenizer.eos_token_id


@EVERY_ARCH
@pytest.mark.parametrize("named", ["LlamaTokenizerFast", "PreTrainedTokenizerFast", "Qwen2Tokenizer"])
def test_T16_the_name_in_tokenizer_config_does_not_change_the_ids(tmp_path, arch, named):
    """Released byte-level tokenizers call themselves LlamaTokenizerFast; tokenizer.json is what counts."""
    tokenizer = tiny_tokenizers.chatml()
    backend = tokenizer.backend_tokenizer
    folder = make_folder(tmp_path, make_lm(arch, vocab_size=len(tokenizer)))
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": named}))
    text = "which judge said  12345\n and Ünïcode?"
    loaded = load_tokenizer(folder)
    assert loaded(text, add_special_tokens=False).input_ids == backend.encode(text).ids
    assert loaded.decode(backend.encode(text).ids) == text


# ---- weights out ---------------------------------------------------------------------------------------


@EVERY_MODEL
def test_gathered_weights_come_in_order_and_fresh(tied):
    policy = Policy(make_lm("llama", tied))
    got = list(gathered_weights(policy, torch.float32))
    names = [name for name, _ in got]
    own = dict(policy.lm.named_parameters(remove_duplicate=False))
    assert names[0] == "model.embed_tokens.weight" and names[-2:] == ["model.norm.weight", "lm_head.weight"]
    layers = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]
    assert layers == sorted(layers) and set(layers) == {0, 1}
    assert len(names) == len(set(names)) and set(names) == set(own)
    before = bits(policy)
    for name, tensor in got:
        assert torch.equal(tensor, own[name]) and not tensor.requires_grad
        tensor.fill_(7.0)
    assert_bit_equal(bits(policy), before)
    for name, tensor in gathered_weights(policy, torch.bfloat16):
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, own[name].bfloat16())


@EVERY_MODEL
def test_T14_export_loads_with_from_pretrained_and_writes_a_tied_head_once(tmp_path, tied):
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    lm = make_lm("qwen3", tied)
    lm.generation_config.eos_token_id = [EOS, 7]
    policy = load_policy(make_folder(tmp_path / "start", lm))
    save_hf(policy, make_tokenizer(), tmp_path / "model", torch.float32)
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(dict(lm.named_parameters()))  # a tied weight counts once
        assert file.metadata() == {"format": "pt"}
    loaded, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not notes["missing_keys"] and not notes["unexpected_keys"] and not notes["mismatched_keys"]
    assert loaded.dtype == torch.float32
    assert_bit_equal(bits(loaded), bits(lm))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert_bit_equal(bits(load_policy(str(tmp_path / "model")).lm), bits(lm))
    assert loaded.generation_config.eos_token_id == [EOS, 7]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "start"]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["dtype"] == "float32" and config["architectures"] == [type(lm).__name__]


@EVERY_MODEL
def test_export_in_several_files_with_an_index(tmp_path, tied):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    lm, folder = make_lm("qwen2", tied), tmp_path / "model"
    save_hf(Policy(lm), make_tokenizer(), folder, torch.float32, shard_bytes=15_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {p.name for p in folder.glob("*.safetensors")}
    assert len(files) > 3 and files == set(index["weight_map"].values())
    stored = {name: file for file in files for name in load_file(folder / file)}
    assert stored == index["weight_map"], "each tensor stands once, where the index says"
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in lm.parameters())
    assert_bit_equal(dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters()), dict(lm.named_parameters()))
    assert_bit_equal(dict(load_policy(str(folder)).lm.named_parameters()), dict(lm.named_parameters()))


def test_export_in_another_dtype(tmp_path):
    from transformers import AutoModelForCausalLM

    lm, folder = make_lm("llama", tied=True), tmp_path / "model"
    save_hf(Policy(lm), make_tokenizer(), folder, torch.bfloat16)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert_bit_equal(dict(loaded.named_parameters()), dict(lm.to(torch.bfloat16).named_parameters()))


def test_export_replaces_the_old_folder_whole(tmp_path):
    folder = tmp_path / "model"
    save_hf(Policy(make_lm("llama", seed=1)), make_tokenizer(), folder, torch.float32, shard_bytes=15_000)
    lm = make_lm("llama", seed=2)
    save_hf(Policy(lm), make_tokenizer(), folder, torch.float32)
    assert [p.name for p in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert_bit_equal(dict(load_policy(str(folder)).lm.named_parameters()), dict(lm.named_parameters()))


# ---- one optimiser step --------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_T9_step_clips_exactly_and_returns_the_norm_before(scale):
    policy = Policy(make_lm("llama", dtype=torch.float64))
    optimizer = torch.optim.SGD(policy.parameters(), lr=123.0)
    torch.manual_seed(0)
    for parameter in policy.parameters():
        parameter.grad = torch.randn_like(parameter)
    norm = math.sqrt(sum((p.grad**2).sum().item() for p in policy.parameters()))
    for parameter in policy.parameters():
        parameter.grad *= scale / norm
    slopes, before = gradients(policy), bits(policy)
    returned = optimizer_step(policy, optimizer, lr=0.25, max_norm=2.0)
    assert isinstance(returned, float) and math.isclose(returned, scale, rel_tol=1e-9)
    assert optimizer.param_groups[0]["lr"] == 0.25
    factor = min(1.0, 2.0 / scale)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter, before[name] - 0.25 * factor * slopes[name], rtol=0, atol=1e-6)
        assert parameter.grad is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(value):
    policy = Policy(make_lm("llama"))
    optimizer = torch.optim.AdamW(policy.parameters())
    before = bits(policy)
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    policy.lm.model.norm.weight.grad[0] = value
    assert not math.isfinite(optimizer_step(policy, optimizer, 1e-2, 1.0))
    assert_bit_equal(bits(policy), before)
    assert not optimizer.state and all(p.grad is None for p in policy.parameters())


# ---- a mesh of one: mixed precision --------------------------------------------------------------------


@pytest.fixture
def bf16_mesh():
    import torch.distributed as dist

    yield model.make_mesh(torch.bfloat16)
    dist.destroy_process_group()


def test_plain_float32_needs_no_mesh():
    import torch.distributed as dist

    assert model.make_mesh(torch.float32) is None and not dist.is_initialized()


@EVERY_MODEL
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
def test_P12_T14_bf16_compute_keeps_float32_weights_and_moments(tmp_path, bf16_mesh, tied, checkpointing):
    folder = make_folder(tmp_path / "start", make_lm("llama", tied))
    plain, batch = load_policy(folder), collate(GROUPS, [0, 1, 2], "cpu")
    policy = load_policy(folder, torch.float32, bf16_mesh, torch.bfloat16, checkpointing)
    assert (policy.lm.lm_head.weight is policy.lm.model.embed_tokens.weight) == tied
    assert_bit_equal(dict(gathered_weights(policy, torch.float32)), dict(gathered_weights(plain, torch.float32)))

    wanted, found = plain(batch).logprobs, policy(batch).logprobs
    assert found.dtype == torch.float32
    difference = (found - wanted).abs()
    assert 1e-5 < difference.max() < 0.2 and difference.mean() < 0.05, "computed in bf16, close to float32"
    weighed(wanted).backward()
    weighed(found).backward()
    for (name, want), parameter in zip(plain.named_parameters(), policy.parameters(), strict=True):
        got = parameter.grad.full_tensor()
        assert got.dtype == torch.float32
        assert torch.cosine_similarity(got.flatten(), want.grad.flatten(), dim=0) > 0.99, name

    optimizer = torch.optim.AdamW(policy.parameters())
    norm = nn_norm(plain)
    assert math.isclose(optimizer_step(policy, optimizer, 5e-7, 1.0), norm, rel_tol=0.02)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    moments = {s[k].dtype for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")}
    assert moments == {torch.float32}
    after = dict(gathered_weights(policy, torch.float32))
    moved = [after[n] != p for n, p in plain.lm.named_parameters()]
    if tied:  # an untied embedding moves in the rows that were read alone
        assert sum(m.sum() for m in moved) > 0.99 * sum(m.numel() for m in moved)
    assert (policy.lm.lm_head.weight is policy.lm.model.embed_tokens.weight) == tied

    policy(batch)  # leaves the root's weights whole; what is exported is the float32 shard all the same
    save_hf(policy, make_tokenizer(), tmp_path / "model", torch.float32)
    saved = load_policy(str(tmp_path / "model"))
    assert_bit_equal(dict(gathered_weights(saved, torch.float32)), after)


def nn_norm(policy: Policy) -> float:
    return math.sqrt(sum((p.grad**2).sum().item() for p in policy.parameters()))


def test_gathered_weights_under_a_mesh_are_plain_and_fresh(tmp_path, bf16_mesh):
    lm = make_lm("llama", tied=True)
    policy = load_policy(make_folder(tmp_path, lm), torch.float32, bf16_mesh, torch.bfloat16)
    for _ in range(2):
        for name, tensor in gathered_weights(policy, torch.float32):
            assert type(tensor) is Tensor and torch.equal(tensor, lm.get_parameter(name))
            tensor.fill_(7.0)


# ---- resume state --------------------------------------------------------------------------------------


def train_steps(policy: Policy, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        weighed(policy(collate(GROUPS, [step % 3], "cpu")).logprobs).backward()
        optimizer_step(policy, optimizer, 1e-2, 1.0)


def fresh(folder: str, fused: bool = False) -> tuple[Policy, torch.optim.Optimizer]:
    policy = load_policy(folder)
    return policy, torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=fused)


def full_state(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = bits(policy)
    for name, parameter in policy.named_parameters():
        state |= {f"{name}/{kind}": v.clone() for kind, v in optimizer.state[parameter].items()}
    return state


@EVERY_MODEL
def test_T10_a_resumed_run_ends_with_the_same_bits(tmp_path, tied):
    folder = make_folder(tmp_path / "start", make_lm("qwen2", tied))
    policy, optimizer = fresh(folder, fused=not tied)
    train_steps(policy, optimizer, range(3))
    at_save, progress = full_state(policy, optimizer), {"step": 3, "position": 48, "best": 0.25}
    save_state(tmp_path / "state", policy, optimizer, progress)
    assert_bit_equal(full_state(policy, optimizer), at_save)  # saving changes nothing
    train_steps(policy, optimizer, range(3, 6))

    other, other_optimizer = fresh(folder, fused=not tied)
    assert load_state(tmp_path / "state", other, other_optimizer) == progress
    assert_bit_equal(full_state(other, other_optimizer), at_save)
    assert (other.lm.lm_head.weight is other.lm.model.embed_tokens.weight) == tied
    train_steps(other, other_optimizer, range(3, 6))
    assert_bit_equal(full_state(other, other_optimizer), full_state(policy, optimizer))
    assert not list((tmp_path / "state").glob("*.pt")) and not list((tmp_path / "state").glob("*.distcp"))


def test_a_step_counts_where_the_weights_are():
    """A fused optimiser needs it there ("meta" stands for a GPU)."""
    net = torch.nn.Linear(3, 2, device="meta")
    state = states._state(net, torch.optim.AdamW(net.parameters(), fused=True))
    assert state["adam.weight.step"].device.type == "meta"


def test_a_large_state_is_written_in_several_files_from_pageable_memory(tmp_path, monkeypatch):
    """On a GPU a loader that copies ahead would pin host memory, a power of two for each tensor, and keep it."""
    policy, optimizer = fresh(make_folder(tmp_path / "start", make_lm("llama")))
    train_steps(policy, optimizer, range(1))
    monkeypatch.setattr(states, "FILE_BYTES", 20_000)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr("torch.distributed.checkpoint.filesystem._OverlappingCpuLoader", lambda *_, **__: 1 / 0)
        save_state(tmp_path / "state", policy, optimizer, {"step": 1})
    files = list((tmp_path / "state").glob("*.safetensors"))
    assert len(files) > 3 and max(file.stat().st_size for file in files) < 60_000
    wanted = full_state(policy, optimizer)
    other, other_optimizer = fresh(tmp_path / "start")
    assert load_state(tmp_path / "state", other, other_optimizer) == {"step": 1}
    assert_bit_equal(full_state(other, other_optimizer), wanted)
