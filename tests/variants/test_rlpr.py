"""RLPR: the verdict that takes the sampled one's place, its probability by hand and against plain transformers,
the filter by hand and through a resume."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import tiny_tokenizers
import torch
from safetensors.torch import load_file

import grpo
import model
from cor_prompt import plain_tokenizer
from data import Pair
from loading.tokenizer import load_tokenizer
from rollout import Rollout
from runtime.errors import UserError
from runtime.steps import StopSignal
from variants import rlpr
from variants.rlpr import PRESETS, encode_verdict, rlpr_score, with_verdict
from variants.std_filter import StdFilter, running_std

pytestmark = pytest.mark.numeric

TINY = PRESETS["tiny"]
A, B = "<answer>[[A]]</answer>", "<answer>[[B]]</answer>"


def encode(text: str, tokenizer) -> list[int]:
    return plain_tokenizer(tokenizer).encode(text, add_special_tokens=False).ids


def rollout(prompt: list[int], ids: list[int], tokenizer, stop: bool = True) -> Rollout:
    text = tokenizer.decode(ids, skip_special_tokens=False)
    ids = ids + [tokenizer.eos_token_id] * stop
    return Rollout(prompt, ids, [0.0] * len(ids), text, "stop" if stop else "length", 0)


def pair(winner: str) -> Pair:
    return Pair("p", "", (), "", "", winner)


@pytest.fixture(scope="module")
def words(world):
    return load_tokenizer(str(world / "start"))


# ---- the verdict that is scored ------------------------------------------------------------------------


@pytest.mark.parametrize("letter", "AB")
def test_the_letter_with_its_brackets_is_scored_and_the_tags_are_not(any_tokenizer, words, letter):
    ids, chosen = encode_verdict("", letter, any_tokenizer)
    pieces = [any_tokenizer.decode([i]) for i in ids]
    assert "".join(pieces) == f"<answer>[[{letter}]]</answer>"
    assert [p for p, c in zip(pieces, chosen, strict=True) if c] == [">[[", letter, "]]</"]
    ids, chosen = encode_verdict("", letter, words)
    assert words.convert_ids_to_tokens(ids) == ["<answer>", f"[[{letter}]]", "</answer>"] and chosen == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("said", [A, B])
@pytest.mark.parametrize("after", ["", " done", "\n"])
def test_another_verdict_after_the_very_ids_of_the_reasoning(any_tokenizer, said, after):
    """One token a character is a spelling that encoding the text again would not give."""
    reasoning = [i for c in "The judge: naïve [[A]]\n" for i in encode(c, any_tokenizer)]
    assert reasoning != encode("The judge: naïve [[A]]\n", any_tokenizer)
    made = rollout([1], reasoning + encode(said + after, any_tokenizer), any_tokenizer)
    for letter, tag in (("A", A), ("B", B)):
        ids, chosen = with_verdict(made, letter, any_tokenizer)
        assert ids == reasoning + encode(tag, any_tokenizer)
        assert chosen == [0.0] * len(reasoning) + encode_verdict("", letter, any_tokenizer)[1]


def test_in_the_tiny_world_too_where_a_blank_belongs_to_the_tag(words):
    text = "<eval> A 6 6 yes right </eval> "
    made = rollout([1], encode(text + A, words), words)
    assert made.text == text + A
    assert with_verdict(made, "B", words)[0] == encode(text, words) + encode(B, words)
    assert with_verdict(made, "A", words)[0] == made.response_ids[:-1]


def test_a_token_that_reaches_into_the_tag_is_encoded_anew_alone(monkeypatch):
    monkeypatch.setattr(tiny_tokenizers, "TEXT", ["yes</eval><answer>[[A]]</answer>", "no</eval><answer>[[B]]"] * 9)
    tokenizer = tiny_tokenizers.chatml()
    head = [i for c in "It is</eval" for i in encode(c, tokenizer)]
    ids = head + encode(">" + A, tokenizer)
    start = len(tokenizer.decode(head)) + 1
    ends = [len(tokenizer.decode(ids[:k])) for k in range(len(ids) + 1)]
    assert start not in ends  # no token ends where the tag begins
    found, chosen = with_verdict(rollout([1], ids, tokenizer), "B", tokenizer)
    assert tokenizer.decode(found) == "It is</eval>" + B and found[: len(head)] == head
    assert "[[B]]" in tokenizer.decode([i for i, c in zip(found, chosen, strict=True) if c])


def test_the_last_of_two_equal_verdicts_is_replaced(words):
    made = rollout([1], encode(f"{A} yes {A}", words), words)
    assert with_verdict(made, "B", words)[0] == encode(f"{A} yes {B}", words)


@pytest.mark.parametrize("text", ["", "yes right", A + B, "<answer>", A + " yes" * 40])
def test_no_verdict_nothing_to_score(words, text):
    assert with_verdict(rollout([1], encode(text, words), words, stop=False), "A", words) == ([], [])


# ---- against plain transformers ------------------------------------------------------------------------


def traces(tokenizer, prompt: int, count: int) -> list[Rollout]:
    """Chains of several lengths, every third without a verdict."""
    texts = [" first second and the answer" * (1 + 3 * i % 7) + (A, B, "")[i % 3] for i in range(count)]
    return [rollout(list(range(4, 4 + prompt)), encode(text, tokenizer), tokenizer) for text in texts]


def reference(lm, made: Rollout, letter: str, tokenizer) -> list[float]:
    """The verdict's probability by one plain forward with and one without the reasoning."""
    start = max(made.text.rfind(A), made.text.rfind(B))
    if start < 0:
        return [0.0, 0.0]
    tail, chosen = encode_verdict("", letter, tokenizer)
    found = []
    for head in (encode(made.text[:start], tokenizer), []):
        logprobs = tiny_models.plain_logprobs(lm, made.prompt_ids, head + tail, 0.7)[len(head) :]
        chance = [p for p, c in zip(logprobs.exp().tolist(), chosen, strict=True) if c]
        assert len(chance) == 3
        found.append(sum(chance) / 3)
    return found


@pytest.mark.parametrize("arch", tiny_models.ARCHITECTURES)
def test_rewards_equal_a_plain_forward_of_each_sequence_under_any_plan(tmp_path, any_tokenizer, arch):
    lm = tiny_models.make_lm(arch, vocab_size=len(any_tokenizer), max_position_embeddings=512)
    policy = model.load_policy(tiny_models.make_folder(tmp_path, lm))
    rollouts = [r for prompt in (5, 11, 2) for r in traces(any_tokenizer, prompt, 6)]
    pairs = [pair(winner) for winner in "ABA"]
    with torch.no_grad():
        plain = [reference(lm, r, pairs[i // 6].winner, any_tokenizer) for i, r in enumerate(rollouts)]
    given, without = torch.tensor(plain, dtype=torch.float64).T.reshape(2, 3, 6)
    assert len(set(given.flatten().tolist())) > 10
    for budget in (1, 300, 100_000):
        cfg = replace(TINY, temperature=0.7, micro_batch_tokens=budget)
        raw = rlpr_score(rollouts, pairs, policy, any_tokenizer, replace(cfg, debias=False))
        torch.testing.assert_close(raw, given, atol=0, rtol=1e-4)
        got = rlpr_score(rollouts, pairs, policy, any_tokenizer, cfg)
        torch.testing.assert_close(got, (given - without).clamp(0, 1), atol=2e-6, rtol=0)
    assert all(p.grad is None for p in policy.parameters())


# ---- the filter ----------------------------------------------------------------------------------------


def test_the_running_deviation_by_hand():
    """Rounds 6 to 10 start it, each later round counts a hundredth."""
    first = [9.0] * 5 + [0.2, 0.4, 0.3, 0.1, 0.5]
    assert running_std(first[:9]) == 0.0
    assert running_std(first) == pytest.approx(0.3)
    assert running_std([*first, 0.5]) == pytest.approx(0.99 * 0.3 + 0.01 * 0.5)  # .302
    assert running_std([*first, 0.5, 0.0]) == pytest.approx(0.99 * 0.302)


def spread(*deviations: float) -> torch.Tensor:
    """Groups of two with these unbiased deviations."""
    return torch.tensor([[0.0, d * math.sqrt(2)] for d in deviations], dtype=torch.float64)


def test_groups_below_their_share_of_it_are_refused_from_round_11(tmp_path):
    groups = StdFilter(str(tmp_path), 0.5)
    for _ in range(10):
        assert groups.keep(spread(0.0, 0.4)).all()  # not yet
        groups.advantage(spread(0.4), True)
    assert groups.history == pytest.approx([0.2] * 10)  # the refused would count as well
    assert groups.keep(spread(0.09, 0.11, 0.3)).tolist() == [False, True, True]  # .5 x .2
    groups.keep(spread(0.01, 0.01, 0.05))
    groups.advantage(spread(0.11, 0.3), True)
    assert groups.history[10] == pytest.approx((0.09 + 0.11 + 0.3 + 0.01 + 0.01 + 0.05) / 6)
    assert json.loads((tmp_path / "std.json").read_text()) == groups.history and groups.seen == []


def test_the_folder_of_another_method_is_refused(tmp_path):
    (tmp_path / "checkpoints" / "step_000004").mkdir(parents=True)
    with pytest.raises(UserError, match="use another --out"):
        StdFilter(str(tmp_path), 0.5)


def test_a_share_of_0_keeps_all(tmp_path):
    groups = StdFilter(str(tmp_path), 0.0)
    groups.history = [0.5] * 10
    assert groups.keep(spread(0.0, 0.1)).all()


def test_rounding_is_no_advantage(tmp_path):
    groups = StdFilter(str(tmp_path), 0.5)
    rewards = torch.tensor([[0.5, 0.5 + 1e-7, 0.5, 0.5], [0.1, 0.2, 0.1, 0.2]], dtype=torch.float64)
    groups.keep(rewards)
    got = groups.advantage(rewards, True)
    assert got[0].tolist() == [0.0] * 4
    torch.testing.assert_close(got[1], grpo.group_advantages(rewards)[1])


def by_ids(rollouts, pairs, policy, tokenizer, cfg) -> torch.Tensor:
    """Rewards in [0, 1] that random weights earn, differing more in some groups than in others."""
    rewards = torch.tensor([(sum(r.response_ids) * 37 % 101) / 101 for r in rollouts], dtype=torch.float64)
    scale = torch.tensor([0.1 + r.prompt_ids[-6] % 7 / 7 for r in rollouts], dtype=torch.float64)
    return (rewards * scale).view(len(pairs), -1)


def test_T10_a_run_that_is_stopped_and_continued_keeps_its_running_deviation(world, tmp_path, monkeypatch):
    base = replace(
        TINY, model=str(world / "start"), data=str(world / "rl.jsonl"), held_out="", steps=14, prompts_per_step=4,
        prompt_file=str(world / "prompt.txt"), group_size=3, mini_batch=2, max_response_tokens=6, save_every=100,
        lr=1e-2, std_beta=1.0)
    refused = []

    def go(out: Path, stop: int = 0) -> None:
        calls = iter(range(1, 100))
        monkeypatch.setattr(StopSignal, "requested", lambda _: next(calls) == stop)
        cfg = replace(base, out=str(out))
        groups = StdFilter(cfg.out, cfg.std_beta)

        def keep(rewards):
            kept = groups.keep(rewards)
            refused.append(int((~kept).sum()))
            return kept

        grpo.train(cfg, grpo.Method(score=by_ids, keep=keep, advantage=groups.advantage))

    go(tmp_path / "whole")
    assert refused[:10] == [0] * 10 and sum(refused) > 0
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "parts", stop=12)
    (tmp_path / "parts" / "std.json").write_text(  # as if it had been killed a round after its last saved state
        json.dumps([*json.loads((tmp_path / "parts" / "std.json").read_text()), 9.0]))
    go(tmp_path / "parts")
    whole, parts = (json.loads((tmp_path / name / "std.json").read_text()) for name in ("whole", "parts"))
    assert whole == parts and len(whole) == 14
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


# ---- settings ------------------------------------------------------------------------------------------


def test_presets_are_grpos_but_for_the_authors_settings():
    assert PRESETS.keys() == grpo.PRESETS.keys()
    for name, cfg in PRESETS.items():
        own = {"clip_low": 0.2, "clip_high": 0.27, "kl_coef": 0.0, "agg": "token", "out": cfg.out}
        assert vars(cfg) == vars(grpo.PRESETS[name]) | own | {"debias": True, "std_beta": 0.5}
        assert cfg.out == grpo.PRESETS[name].out + "-rlpr"


def test_what_train_is_given(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(grpo, "train", lambda cfg, method: given.update(vars(method), cfg=cfg))
    monkeypatch.setattr(sys, "argv", ["rlpr", "--preset", "tiny", "--std-beta", "0.9", "--out", str(tmp_path)])
    rlpr.main()
    assert given["cfg"] == replace(TINY, std_beta=0.9, out=str(tmp_path)) and given["score"] is rlpr_score
    assert given["keep"].__self__ is given["advantage"].__self__ and given["keep"].__self__.beta == 0.9
