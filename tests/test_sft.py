"""Stage 1: the loss against a plain twin, what is trained, the best checkpoint, errors."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import exported, logged

import model
import sft
from cor_prompt import encode_prompt, render
from data import load_pairs
from loading.tokenizer import load_tokenizer
from ops import head
from runtime import run_folder
from runtime.errors import UserError

pytestmark = pytest.mark.numeric


def small(world: Path, out: Path, **changes) -> sft.Config:
    base = dataclasses.replace(
        sft.PRESETS["tiny"], model=str(world / "start"), data=str(world / "sft.jsonl"), out=str(out),
        held_out=str(world / "sft_held_out.jsonl"), prompt_file=str(world / "prompt.txt"), batch_size=5, steps=7,
        eval_every=2, save_every=1, lr=1e-2)
    return dataclasses.replace(base, **changes)


def examples(world: Path, cfg: sft.Config):
    return sft.encode_pairs(load_pairs(cfg.data), load_tokenizer(cfg.model), cfg, "judge")


def gradients(cfg: sft.Config, groups) -> tuple[float, int, dict[str, torch.Tensor]]:
    policy = model.load_policy(cfg.model)
    nll, tokens = sft.nll_loss(policy, groups, cfg, backward=True)
    return nll, tokens, {n: p.grad for n, p in policy.lm.named_parameters() if p.grad is not None}


def test_loss_and_gradient_equal_the_plain_twin_for_any_micro_batch_plan(world, tmp_path):  # Eq. 6
    """T3, P7: one forward per pair without packing, cross-entropy summed over trace tokens, divided once."""
    from transformers import AutoModelForCausalLM

    cfg = small(world, tmp_path)
    groups = examples(world, cfg)[:7]
    lm = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=torch.float32)
    total = torch.tensor(0.0)
    count = sum(len(g.responses[0]) for g in groups)
    for g in groups:
        ids = torch.tensor([g.prompt_ids + g.responses[0]])
        logits = lm(ids).logits[0, len(g.prompt_ids) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, ids[0, len(g.prompt_ids) :], reduction="sum")
    (total / count).backward()
    for budget in (1, 90, 200, 4096):
        nll, tokens, grads = gradients(dataclasses.replace(cfg, micro_batch_tokens=budget), groups)
        assert tokens == count and nll == pytest.approx(total.item(), rel=1e-5)
        for name, p in lm.named_parameters():
            assert torch.allclose(grads[name], p.grad, atol=1e-6), (budget, name)


def test_T4_loss_covers_the_trace_and_its_end_of_turn_and_nothing_else(world, tmp_path):  # Eq. 5
    cfg = small(world, tmp_path)
    tokenizer, pair = load_tokenizer(cfg.model), load_pairs(cfg.data)[0]
    group = examples(world, cfg)[0]
    assert group.prompt_ids == encode_prompt(render(pair, "instruct", "judge"), tokenizer)
    assert group.responses[0][-1] == tokenizer.eos_token_id and group.responses[0].count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(group.responses[0][:-1]) == pair.trace


def test_too_long_examples_are_left_out_and_counted(world, tmp_path, capsys):
    cfg = small(world, tmp_path)
    sizes = sorted(len(g.prompt_ids) + len(g.responses[0]) for g in examples(world, cfg))
    kept = examples(world, dataclasses.replace(cfg, max_length=sizes[0]))
    assert len(kept) == sizes.count(sizes[0])
    assert f"{24 - len(kept)} of 24 pairs exceed --max-length {sizes[0]}" in capsys.readouterr().out
    with pytest.raises(UserError, match="none of 24 pairs fits"):
        examples(world, dataclasses.replace(cfg, max_length=3))


def test_a_pair_without_a_trace_is_refused(world, tmp_path):
    with pytest.raises(UserError, match="rl-0 has no trace"):
        sft.train(small(world, tmp_path / "out", data=str(world / "rl.jsonl")))
    assert not (tmp_path / "out").exists()


def test_the_checkpoint_with_the_best_held_out_loss_is_kept(world, tmp_path, monkeypatch):
    """Held-out losses 3, 1, 2, 1.5 after steps 1 to 4: what is exported are the weights after step 2."""
    honest, scripted, after = sft.nll_loss, iter([3.0, 1.0, 2.0, 1.5]), []

    def nll_loss(policy, groups, cfg, backward):
        if backward:
            return honest(policy, groups, cfg, backward)
        after.append({n: p.detach().clone() for n, p in policy.lm.named_parameters()})
        return next(scripted), 1

    monkeypatch.setattr(sft, "nll_loss", nll_loss)
    sft.train(small(world, tmp_path / "run", steps=4, eval_every=1))
    best = exported(tmp_path / "run")
    assert all(torch.equal(best[name], t) for name, t in after[1].items())
    assert not all(torch.equal(best[name], t) for name, t in after[3].items())


def test_a_loss_that_is_not_finite_ends_the_run_with_its_state(world, tmp_path, monkeypatch):
    honest = head._logits
    with monkeypatch.context() as patch:
        patch.setattr(head, "_logits", lambda *args: honest(*args) * math.nan)
        with pytest.raises(UserError, match="5 steps in a row"):
            sft.train(small(world, tmp_path / "run", steps=7))
    assert [row["optim/skipped"] for row in logged(tmp_path / "run")] == [1] * 5
    assert run_folder.latest_checkpoint(tmp_path / "run").name == "step_000005"
    sft.train(small(world, tmp_path / "run", steps=7))
    assert [row["optim/skipped"] for row in logged(tmp_path / "run")] == [1] * 5 + [0] * 2
    monkeypatch.setattr(head, "_logits", lambda *args: honest(*args) * (1 if torch.is_grad_enabled() else math.nan))
    with pytest.raises(UserError, match="no held-out loss was finite"):
        sft.train(small(world, tmp_path / "unseen", steps=2))


def test_without_held_out_the_last_weights_are_exported(world, tmp_path):
    sft.train(small(world, tmp_path / "run", held_out="", steps=2))
    start = load_file(world / "start" / "model.safetensors")
    end = exported(tmp_path / "run")
    assert any(not torch.equal(start[name], t) for name, t in end.items())


def test_paper_presets_are_the_papers_numbers():
    for size, lr in (("7b", 5e-6), ("14b", 3e-6), ("32b", 2e-6)):
        cfg = sft.PRESETS[f"paper-{size}"]
        assert cfg.lr == lr and cfg.model == f"Qwen/Qwen2.5-{size.upper()}-Instruct"
        assert (cfg.batch_size, cfg.epochs, cfg.max_length, cfg.betas) == (128, 1.0, 12288, (0.9, 0.95))
        assert (cfg.lr_schedule, cfg.lr_floor, cfg.warmup_ratio, cfg.weight_decay) == ("cosine", 0.1, 0.03, 0.0)
