"""The embedded sampler: its log-probs are the policy's, and no batch layout can change a rollout."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tiny_models import ARCHITECTURES, EOS, exact_norms, make_folder, make_lm, make_tokenizer, plain_logits

import rollout
from batch import Group, collate
from loading.tokenizer import stop_ids
from model import Policy, gathered_weights, load_policy
from ops import decode
from ops.decode import KVCache, draw
from rollout import Reply, Rollout, TorchSampler
from runtime.errors import UserError
from runtime.seeds import derive_seed
from settings import PAPER_GRPO

pytestmark = pytest.mark.numeric

repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=30)

PROMPTS = [[1, 7, 8, 9, 10], [11], [1, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [20, 2, 2], [1, 30, 31, 32]]
SEEDS = [derive_seed("test", i) for i in range(len(PROMPTS))]
STOPS = [EOS, 15, 16, 17, 18, 19]  # many, so that responses of all lengths occur


def make_sampler(arch: str = "llama", dtype: torch.dtype = torch.float64, stops=STOPS, **changes) -> TorchSampler:
    lm = make_lm(arch, dtype=dtype, **changes)
    lm.generation_config.eos_token_id = stops
    return TorchSampler(lm, make_tokenizer())


@pytest.fixture(scope="module")
def sampler() -> TorchSampler:
    return make_sampler()


def assert_same_rollouts(found: list[Rollout], wanted: list[Rollout], atol: float = 1e-10) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert (a.prompt_ids, a.response_ids, a.text, a.finish_reason) == (
            b.prompt_ids, b.response_ids, b.text, b.finish_reason)
        np.testing.assert_allclose(a.sampler_logprobs, b.sampler_logprobs, rtol=0, atol=atol)


def step_by_step(sampler: TorchSampler, prompt: list[int], seed: int, sample: int, temperature: float,
                 max_tokens: int) -> tuple[list[int], list[float]]:
    """What sampling means: one whole forward per token, no cache, no padding, one sequence, Philox's uniforms."""
    numbers = np.random.Generator(np.random.Philox(key=np.array([seed, sample], np.uint64))).random(256, np.float32)
    ids: list[int] = []
    logprobs: list[float] = []
    while len(ids) < min(max_tokens, sampler.context - len(prompt)) and (not ids or ids[-1] not in sampler.stop_ids):
        with torch.no_grad():
            logits = plain_logits(sampler.lm, prompt + ids)[-1]
        scaled = (logits / temperature if temperature else logits).log_softmax(-1)
        if temperature:
            cdf = scaled.double().exp().cumsum(0)
            chosen = int((cdf <= float(numbers[len(ids)]) * cdf[-1]).sum())
        else:
            chosen = int(logits.argmax())
        ids.append(chosen)
        logprobs.append(scaled[chosen].item())
    return ids, logprobs


# ---- T8, P5: the sampler's distribution is the scorer's ------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("loaded", [False, True], ids=["stock attention", "as loaded"])
def test_T8_P5_sampler_log_probs_equal_the_policys(tmp_path, temperature, loaded):  # Eq. 2
    sampler = make_sampler("qwen2", torch.float32)
    if loaded:
        sampler = TorchSampler(load_policy(make_folder(tmp_path, sampler.lm)).lm, sampler.tokenizer)
    made = sampler.generate(PROMPTS, 4, temperature, 12, SEEDS)
    groups = [
        Group(PROMPTS[p], [r.response_ids for r in made[p * 4 : p * 4 + 4]], None,
              [r.sampler_logprobs for r in made[p * 4 : p * 4 + 4]])
        for p in range(len(PROMPTS))
    ]
    batch = collate(groups, list(range(len(groups))), "cpu")
    # greedy log-probs are those at temperature 1
    scored = Policy(sampler.lm)(batch, temperature=temperature or 1.0).logprobs
    torch.testing.assert_close(batch.sampler_logprobs, scored.detach(), rtol=0, atol=1e-5)
    assert len(scored) > 50 and scored.std() > 0.2


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("loaded", [False, True], ids=["stock attention", "as loaded"])
def test_T8_P13_the_cache_equals_a_whole_forward_at_each_step(tmp_path, arch, temperature, loaded):
    sampler = make_sampler(arch)
    made = sampler.generate(PROMPTS, 3, temperature, 12, SEEDS)
    if loaded:
        lm = exact_norms(load_policy(make_folder(tmp_path, sampler.lm), torch.float64).lm)
        made = TorchSampler(lm, sampler.tokenizer).generate(PROMPTS, 3, temperature, 12, SEEDS)
    for i, rollout_ in enumerate(made):
        ids, logprobs = step_by_step(sampler, PROMPTS[i // 3], SEEDS[i // 3], i % 3, temperature, 12)
        assert rollout_.response_ids == ids
        np.testing.assert_allclose(rollout_.sampler_logprobs, logprobs, rtol=0, atol=1e-10)
    if temperature:
        assert len({len(r.response_ids) for r in made}) > 5, "all lengths occur, so that rows leave at many steps"


def test_T8_long_responses_outgrow_the_cache_and_a_block_of_uniforms_while_rows_leave():
    sampler = make_sampler(stops=[EOS], max_position_embeddings=256)
    made = sampler.generate(PROMPTS, 1, 1.0, 100, SEEDS)
    for prompt, seed, rollout_ in zip(PROMPTS, SEEDS, made, strict=True):
        ids, logprobs = step_by_step(sampler, prompt, seed, 0, 1.0, 100)
        assert rollout_.response_ids == ids
        np.testing.assert_allclose(rollout_.sampler_logprobs, logprobs, rtol=0, atol=1e-10)
    lengths = sorted(len(r.response_ids) for r in made)
    assert lengths[-1] == 100 and len(set(lengths)) > 3, lengths


# ---- the same rollouts for any layout ------------------------------------------------------------------


def test_a_paper_run_without_vllm_is_refused_unless_the_embedded_sampler_is_asked_for(tmp_path):
    folder = make_folder(tmp_path / "model", make_lm(), tokenizer=True)
    paper = replace(PAPER_GRPO, model=str(folder), out=str(tmp_path))
    with pytest.raises(UserError, match=r"paper-7b-reasoning.*vllm.*--sampler torch"):
        rollout.make_engine(paper, make_tokenizer(), [])
    for cfg in (replace(paper, sampler="torch"), replace(paper, preset="one-gpu")):
        assert rollout.make_engine(cfg, make_tokenizer(), []) is None


def test_an_engine_that_sleeps_on_a_gpu_is_woken_before_it_is_shut_down():
    said: list[str] = []
    core = SimpleNamespace(shutdown=lambda: said.append("shutdown"))
    engine = object.__new__(rollout.VLLMSampler)
    engine.cuda = engine.dummy = True
    engine.llm = SimpleNamespace(wake_up=lambda: said.append("wake up"), llm_engine=SimpleNamespace(engine_core=core))
    engine.close()
    assert said == ["wake up", "shutdown"]


def test_a_wave_follows_from_shapes_and_the_budget(sampler):
    """Each wave's longest group, times its groups, stays within the budget; a group over it stands alone."""
    from ops.decode import group_bytes

    def size(length: int) -> float:
        return group_bytes(sampler.lm.config, sampler.lm.dtype.itemsize, length, 3, min(10, sampler.context - length))

    tight = TorchSampler(sampler.lm, sampler.tokenizer, decode_gb=2.5 * size(20) / 1e9)
    assert list(tight.waves([20, 5, 20, 100, 20], 3, 10)) == [[1, 0], [2, 4], [3]]
    assert list(sampler.waves([20, 5, 20, 100, 20], 3, 10)) == [[1, 0, 2, 4, 3]]
    assert list(sampler.waves([5] * 90, 3, 10)) == [list(range(85)), [85, 86, 87, 88, 89]]  # 256 rows at most


@repeatable
@given(order=st.permutations(range(len(PROMPTS))), megabytes=st.floats(0.01, 2.0))
def test_rollouts_do_not_depend_on_the_order_of_the_prompts(sampler, order, megabytes):
    wanted = sampler.generate(PROMPTS, 2, 1.0, 6, SEEDS)
    shuffled = TorchSampler(sampler.lm, sampler.tokenizer, decode_gb=megabytes / 1e3)
    made = shuffled.generate([PROMPTS[i] for i in order], 2, 1.0, 6, [SEEDS[i] for i in order])
    assert [r.prompt_index for r in made] == [k for k in range(len(PROMPTS)) for _ in range(2)]
    for k, i in enumerate(order):
        assert_same_rollouts(made[2 * k : 2 * k + 2], wanted[2 * i : 2 * i + 2])


# ---- the end of a response -----------------------------------------------------------------------------


def test_P15_the_stop_token_is_kept_once_and_ends_the_response(sampler):
    made = sampler.generate(PROMPTS, 8, 1.0, 10, SEEDS)
    reasons = Counter(r.finish_reason for r in made)
    assert reasons["stop"] > 5 and reasons["length"] > 2
    for r in made:
        stops = [i for i, token in enumerate(r.response_ids) if token in STOPS]
        assert len(r.sampler_logprobs) == len(r.response_ids) <= 10
        assert r.finish_reason == ("stop" if stops else "length")
        assert stops in ([], [len(r.response_ids) - 1])
        if not stops:
            assert len(r.response_ids) == 10
    ended_at_the_limit = [r for r in made if len(r.response_ids) == 10 and r.finish_reason == "stop"]
    wanted = next(r for r in made if r.finish_reason == "stop" and len(r.response_ids) > 1)
    cut = sampler.generate(PROMPTS, 8, 1.0, len(wanted.response_ids), SEEDS)[made.index(wanted)]
    assert cut == wanted, "a stop at the very last token is a stop"
    assert all(r.response_ids[-1] in STOPS for r in ended_at_the_limit)


@pytest.mark.parametrize("full", [12, 13, 20])
def test_the_context_length_caps_each_row_by_itself(full):
    """A prompt that fills the context, or is longer, gets empty responses and disturbs no other row."""
    short, long = make_sampler(max_position_embeddings=12), make_sampler(max_position_embeddings=128)
    for sampler in (short, long):
        sampler.stop_ids = set()
    prompts = [[1, 7], [1] * 11, [1] * 12, [1] * full, [1, 7, 8, 9]]
    capped, free = short.generate(prompts, 2, 1.0, 8, SEEDS), long.generate(prompts, 2, 1.0, 8, SEEDS)
    assert [len(r.response_ids) for r in capped] == [8, 8, 1, 1, 0, 0, 0, 0, 8, 8]
    for a, b in zip(capped, free, strict=True):
        assert a.response_ids == b.response_ids[: len(a.response_ids)]
        np.testing.assert_allclose(a.sampler_logprobs, b.sampler_logprobs[: len(a.response_ids)], rtol=0, atol=1e-10)
    empty = capped[4]
    assert empty.text == "" and empty.finish_reason == "length" and empty.sampler_logprobs == []
    assert empty.prompt_ids == prompts[2] and capped[6].prompt_ids == prompts[3]
    assert [r.response_ids for r in short.generate(prompts[2:4], 2, 1.0, 8, SEEDS[:2])] == [[]] * 4
    assert short.generate([], 2, 1.0, 8, []) == []


def test_finished_rows_leave_the_batch(sampler, monkeypatch):
    kept, forwarded = [], []
    real_keep, real_forward = KVCache.keep, decode._forward

    def keep(self, rows):
        kept.append(len(rows))
        real_keep(self, rows)

    def forward(lm, ids, positions, mask, cache):
        forwarded.append(ids.shape)
        return real_forward(lm, ids, positions, mask, cache)

    monkeypatch.setattr(KVCache, "keep", keep)
    monkeypatch.setattr(decode, "_forward", forward)
    made = sampler.generate(PROMPTS, 8, 1.0, 100, SEEDS)
    rows = len(PROMPTS) * 8
    assert forwarded[0] == (len(PROMPTS), max(map(len, PROMPTS))), "each prompt is prefilled once"
    assert kept[0] == rows and kept[1:] == sorted(kept[1:], reverse=True)
    assert len(kept) > 4 and all(small <= 0.75 * large for large, small in pairwise(kept))
    longest = max(len(r.response_ids) for r in made)
    assert len(forwarded) == longest, "one pass per token of the longest response, the prefill for its first"
    tokens = sum(len(r.response_ids) for r in made)
    assert sum(shape[0] for shape in forwarded[1:]) <= tokens / 0.75 + rows


# ---- T11: ids in, ids out ------------------------------------------------------------------------------


def test_T11_ids_are_kept_where_their_text_would_encode_otherwise(sampler):
    made = sampler.generate(PROMPTS, 8, 1.0, 12, SEEDS)
    tokenizer, changed = sampler.tokenizer, 0
    for i, r in enumerate(made):
        assert r.prompt_ids == PROMPTS[i // 8]
        content = r.response_ids[:-1] if r.finish_reason == "stop" else r.response_ids
        assert r.text == tokenizer.decode(content, skip_special_tokens=False)
        changed += tokenizer(r.text, add_special_tokens=False).input_ids != content
    assert changed > 10
    assert any("<|im_start|>" in r.text for r in made), "control tokens stay visible in the text"


# ---- draw ----------------------------------------------------------------------------------------------


def test_draw_is_the_inverse_of_the_cumulated_distribution():
    probs = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    uniforms = torch.tensor([0.0, 0.05, 0.11, 0.29, 0.31, 0.59, 0.61, 0.9999999])
    ids, logprobs = draw(probs.log().expand(8, 4), 1.0, uniforms)
    assert ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    torch.testing.assert_close(logprobs, probs.log()[ids])
    # temperature 0.5 squares: 1, 4, 9, 16 of 30 -> borders at 0.033, 0.167, 0.467
    ids, logprobs = draw(probs.log().expand(4, 4), 0.5, torch.tensor([0.03, 0.16, 0.46, 0.47]))
    assert ids.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([1.0, 4.0, 9.0, 16.0], dtype=torch.float64) / 30)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.01])
def test_draw_never_takes_a_token_of_probability_zero(temperature):
    edge = float(np.nextafter(np.float32(1), np.float32(0)))  # the largest float32 below 1
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, -math.inf, 0.0, -math.inf]])
    for uniform, wanted in ((0.0, 1), (0.25, 1), (0.75, 4), (1 - 2**-24, 4), (edge, 4)):
        ids, logprobs = draw(logits, temperature, torch.tensor([uniform]))
        assert ids.item() == wanted and logprobs.isfinite().all()
    for size in (3, 10, 49, 999, 5003):  # the sum may miss 1 by rounding, whatever comes last is not taken for it
        wide = torch.cat([torch.zeros(size), torch.full((3,), -math.inf)])[None]
        assert draw(wide, temperature, torch.tensor([edge]))[0].item() == size - 1
    steep = torch.tensor([[0.0, -1e4, -1e4]])
    assert draw(steep, temperature, torch.tensor([1 - 2**-24]))[0].item() == 0


def test_draw_changes_no_input_and_works_in_float32_for_bf16():
    logits = torch.randn(3, 9).bfloat16()
    before = logits.clone()
    _, logprobs = draw(logits, 0.7, torch.rand(3))
    assert torch.equal(logits, before) and logprobs.dtype == torch.float32


# ---- P13, P16: modes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_P16_sampling_restores_the_mode_also_after_a_failure(monkeypatch, training):
    sampler = make_sampler()
    sampler.lm.train(training)
    sampler.generate(PROMPTS, 1, 1.0, 3, SEEDS)
    assert all(m.training == training for m in sampler.lm.modules())

    def fails(*args):
        raise ValueError("no")

    monkeypatch.setattr(decode, "draw", fails)
    with pytest.raises(ValueError, match="no"):
        sampler.generate(PROMPTS, 1, 1.0, 3, SEEDS)
    assert all(m.training == training for m in sampler.lm.modules())


@pytest.mark.parametrize("change", ["checkpointing", "dropout", "training"])
def test_P13_P16_checkpointing_dropout_and_mode_do_not_reach_sampling(change):
    wanted = make_sampler().generate(PROMPTS, 3, 1.0, 12, SEEDS)
    sampler = make_sampler(attention_dropout=0.1 if change == "dropout" else 0.0)
    if change == "checkpointing":
        sampler.lm.gradient_checkpointing_enable({"use_reentrant": False})
    sampler.lm.train()
    assert_same_rollouts(sampler.generate(PROMPTS, 3, 1.0, 12, SEEDS), wanted)
    assert sampler.lm.training


# ---- T6: weight sync -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_T6_sync_copies_everything(tied):
    """Perturb every weight, sync: the sampler holds copies of its own, and samples from them."""
    policy = Policy(make_lm("qwen2", tied, dtype=torch.float64))
    stale = make_sampler("qwen2", tie_word_embeddings=tied)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    before = stale.generate(PROMPTS, 2, 1.0, 10, SEEDS)
    stale.sync(gathered_weights(policy, torch.float64))
    for (name, mine), (_, theirs) in zip(
        stale.lm.named_parameters(remove_duplicate=False), policy.lm.named_parameters(remove_duplicate=False),
        strict=True,
    ):
        assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr(), name
    assert (stale.lm.lm_head.weight is stale.lm.model.embed_tokens.weight) == tied
    after = stale.generate(PROMPTS, 2, 1.0, 10, SEEDS)
    assert [r.response_ids for r in after] != [r.response_ids for r in before]
    group = Group(PROMPTS[0], [after[0].response_ids])
    scored = policy(collate([group], [0], "cpu")).logprobs
    np.testing.assert_allclose(after[0].sampler_logprobs, scored.tolist(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.layers.1.self_attn.k_proj.bias", "model.norm.weight"])
def test_T6_a_parameter_that_did_not_come_is_an_error(lost):
    sampler = make_sampler("qwen2")
    weights = [(n, t) for n, t in gathered_weights(Policy(sampler.lm), torch.float64) if n != lost]
    with pytest.raises(RuntimeError, match=lost.replace(".", r"\.")):
        sampler.sync(weights)


def test_T6_a_shared_model_needs_no_sync():
    lm = make_lm("llama")
    sampler = TorchSampler(lm, make_tokenizer(), shared=True)
    before = [p.clone() for p in lm.parameters()]
    sampler.sync(iter([("lm_head.weight", torch.zeros(48, 32))]))
    assert sampler.lm is lm and all(torch.equal(a, b) for a, b in zip(before, lm.parameters(), strict=True))
    first = sampler.generate(PROMPTS, 1, 0.0, 5, SEEDS)
    with torch.no_grad():
        lm.lm_head.weight.copy_(lm.lm_head.weight.flip(0))
    assert sampler.generate(PROMPTS, 1, 0.0, 5, SEEDS) != first, "it samples from the trainer's own weights"


# ---- stop ids, chat, load ------------------------------------------------------------------------------


def test_stop_ids_are_the_tokenizers_and_the_generation_configs():
    tokenizer, config = make_tokenizer(), make_lm("llama").generation_config
    for listed, wanted in (([5, 6], {2, 5, 6}), (7, {2, 7}), (None, {2}), (2, {2})):
        config.eos_token_id = listed
        assert stop_ids(config, tokenizer) == wanted
    assert stop_ids(None, tokenizer) == {2}


def test_chat_replies_to_each_conversation_in_order(sampler):
    talks = [[{"role": "user", "content": text}] for text in ("w1 w2 w3", "w4", "w5 w6 w7 w8 w9")]
    replies = sampler.chat(talks, 3, 1.0, 10, SEEDS[:3])
    assert [len(r) for r in replies] == [3, 3, 3]
    for talk, seed, got in zip(talks, SEEDS, replies, strict=False):
        ids = sampler.tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        made = sampler.generate([ids], 3, 1.0, 10, [seed])
        assert got == [Reply(r.text, r.finish_reason, len(ids), len(r.response_ids)) for r in made]


def test_load_sampler_gives_the_folders_model_and_stops(tmp_path):
    lm = make_lm("llama")
    lm.generation_config.eos_token_id = [EOS, 15]
    loaded = rollout.load_sampler(make_folder(tmp_path, lm, tokenizer=True))
    assert loaded.stop_ids == {EOS, 15} and loaded.context == 128 and not loaded.shared
    wanted = TorchSampler(lm, make_tokenizer()).generate(PROMPTS, 1, 0.0, 8, SEEDS)
    assert_same_rollouts(loaded.generate(PROMPTS, 1, 0.0, 8, SEEDS), wanted, atol=1e-5)
