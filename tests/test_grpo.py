"""Stage 2: the equations at hand-computed points, the update against a plain twin, resume, refill, errors."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import assert_close, exact_norms, exported, gradients, logged, plain_logprobs

import batch as batch_module
import grpo
import model
from batch import collate, loss_divisor
from grpo import clipped_surrogate, group_advantages, kl_k3
from ops import head
from rollout import Rollout
from runtime import metrics as metrics_module, ranks, run_folder, seeds, steps
from runtime.errors import UserError
from runtime.metrics import Metrics
from runtime.steps import StopSignal

pytestmark = pytest.mark.numeric

ROOT = Path(__file__).parents[1]


def small(world: Path, out: Path, **changes) -> grpo.Config:
    base = dataclasses.replace(
        grpo.PRESETS["tiny"], model=str(world / "start"), data=str(world / "rl.jsonl"), held_out="", out=str(out),
        prompt_file=str(world / "prompt.txt"), steps=3, prompts_per_step=4, group_size=3, mini_batch=2,
        max_response_tokens=12, save_every=1, lr=1e-2)
    return dataclasses.replace(base, **changes)


def parity(rollouts, pairs, policy, tokenizer, cfg) -> torch.Tensor:
    """A reward that random weights earn now and then, so that the policy really moves."""
    return torch.tensor([1.0 if r.response_ids[0] % 2 else -1.0 for r in rollouts]).view(len(pairs), -1)


# ---- advantages ----------------------------------------------------------------------------------------


def test_advantages_are_the_papers_with_unbiased_std():  # Eq. 10
    """Six of seven right: the wrong one gets -2.268, the right ones +0.378 (ddof 1; ddof 0 gives -2.449)."""
    rewards = torch.tensor([[1.0] * 6 + [-1.0]])
    got = group_advantages(rewards)[0]
    assert got[:6].tolist() == pytest.approx([0.37796] * 6, abs=1e-4)
    assert got[6].item() == pytest.approx(-2.26779, abs=1e-4)
    plain = group_advantages(rewards, scale_by_std=False)[0]
    assert plain.tolist() == pytest.approx([2 / 7] * 6 + [-12 / 7])


def test_every_group_has_its_own_mean_and_standard_deviation():  # Eq. 10
    """Means 0 and 2.5, std sqrt(2) and sqrt(2) / 2; pooled, the second group would get less than the first."""
    got = group_advantages(torch.tensor([[1.0, -1.0], [2.0, 3.0]]))
    assert got.flatten().tolist() == pytest.approx([0.5**0.5, -(0.5**0.5), -(0.5**0.5), 0.5**0.5], abs=1e-5)


def test_T5_equal_rewards_and_groups_of_one_give_zero():
    """Exactly, though the mean of eight times 0.7 is not 0.7 in float32."""
    for rewards in (torch.full((2, 8), 0.7), torch.full((1, 7), 1 / 3), torch.tensor([[3.0], [-0.1]])):
        for scale in (True, False):
            assert torch.equal(group_advantages(rewards, scale), torch.zeros_like(rewards))
            beside = group_advantages(torch.cat([rewards, torch.arange(rewards.shape[1])[None]]), scale)
            assert not beside[:-1].any() and beside[-1].any() == (rewards.shape[1] > 1), "beside another group too"


def test_eps_is_added_to_the_standard_deviation():  # Eq. 10
    """Rewards 2e-6 apart: std sqrt(2) x 1e-6, so 1 / (sqrt(2) + 1) = sqrt(2) - 1; without eps it would be 0.707."""
    got = group_advantages(torch.tensor([[0.0, 2e-6]], dtype=torch.float64))
    assert got[0].tolist() == pytest.approx([1 - 2**0.5, 2**0.5 - 1])


# ---- clipped surrogate ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped"),
    [
        (1.5, 2.0, -2.4, 0.0, True),  # gained too much already: the clip holds it
        (0.5, 2.0, -1.0, -1.0, False),  # fell though it should rise: no clip
        (1.5, -2.0, 3.0, 3.0, False),  # rose though it should fall: no clip
        (0.5, -2.0, 1.6, 0.0, True),  # fell enough
        (1.1, 2.0, -2.2, -2.2, False),
        (0.9, -2.0, 1.8, 1.8, False),
    ],
)
def test_T2_clip_in_all_four_quadrants(ratio, advantage, loss, slope, clipped):  # Eq. 9
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    value, won = clipped_surrogate(logprobs, torch.zeros(1), torch.tensor([advantage]), 0.2, 0.2)
    value.sum().backward()
    assert value.item() == pytest.approx(loss, abs=1e-5)
    assert logprobs.grad is not None and logprobs.grad.item() == pytest.approx(slope, abs=1e-5)
    assert won.item() is clipped


def test_a_ratio_beyond_float32_keeps_loss_and_gradient_finite():
    logprobs = torch.tensor([0.0, -200.0, 0.0], requires_grad=True)
    loss, _ = grpo.clipped_surrogate(
        logprobs, torch.tensor([-200.0, 0.0, -200.0]), torch.tensor([-1.0, 1.0, 1.0]), 0.2, 0.2
    )
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(logprobs.grad).all()
    assert loss[:2].tolist() == pytest.approx([math.exp(20), -math.exp(-20)])  # the log-ratio stops at +-20
    assert loss[2].item() == pytest.approx(-1.2) and logprobs.grad[2] == 0


def test_clip_bounds_are_two_numbers():
    value, won = clipped_surrogate(torch.tensor([1.0, -1.0]), torch.zeros(2), torch.tensor([1.0, -1.0]), 0.1, 0.27)
    assert value.tolist() == pytest.approx([-1.27, 0.9]) and won.all()


# ---- KL ------------------------------------------------------------------------------------------------


def test_T7_k3_value_and_gradient_at_a_known_point():  # Eq. 9
    """k3 = exp(d) - d - 1 with d = ref - policy; its slope in log p is 1 - exp(d) (k1's would be 1)."""
    logprobs = torch.tensor([-1.0], requires_grad=True)
    value = kl_k3(logprobs, torch.tensor([-1.5]))
    value.sum().backward()
    assert value.item() == pytest.approx(math.exp(-0.5) + 0.5 - 1)
    assert logprobs.grad is not None and logprobs.grad.item() == pytest.approx(1 - math.exp(-0.5))


@pytest.mark.parametrize("gap", [0.0, 5.0, 50.0, 100.0, -50.0, -100.0])
def test_P14_k3_stays_finite_and_so_does_its_gradient(gap):
    logprobs = torch.tensor([0.0], requires_grad=True)
    value = kl_k3(logprobs, torch.tensor([gap]))
    value.sum().backward()
    assert 0.0 <= value.item() <= 10.0
    assert logprobs.grad is not None and torch.isfinite(logprobs.grad).all()


def test_k3_estimates_the_kl_without_bias():  # Eq. 9
    torch.manual_seed(0)
    p, q = torch.randn(2, 6, dtype=torch.float64).log_softmax(-1)
    expected = (p.exp() * (p - q)).sum()
    assert (p.exp() * kl_k3(p, q)).sum().item() == pytest.approx(expected.item())


# ---- the loss ------------------------------------------------------------------------------------------


def made_batch():
    from batch import Group

    return collate([Group([1, 2], [[5, 6], [7]], [1.0, -1.0], [[-0.5, -0.5], [-0.7]])], [0], "cpu")


def test_loss_is_surrogate_plus_kl_averaged_as_asked(world, tmp_path):  # Eq. 9
    batch = made_batch()
    batch.old_logprobs = torch.tensor([-0.5, -0.6, -0.7])
    batch.ref_logprobs = torch.tensor([-0.4, -0.6, -0.9])
    logprobs = torch.tensor([-0.5, -0.7, -0.6])
    surrogate = [-1.0, -math.exp(-0.1), math.exp(0.1)]
    kl = [math.exp(0.1) - 0.1 - 1, math.exp(0.1) - 0.1 - 1, math.exp(-0.3) + 0.3 - 1]
    token = [s + 0.5 * k for s, k in zip(surrogate, kl, strict=True)]
    want = {
        "seq": ((token[0] + token[1]) / 2 + token[2]) / 2,
        "token": sum(token) / 3,
        "const": sum(token) / 20,
    }
    for agg, number in (("seq", 2), ("token", 3), ("const", 20)):
        cfg = small(world, tmp_path, agg=agg, kl_coef=0.5)
        value, stats = grpo.grpo_loss(logprobs, batch, cfg, number)
        assert value.item() == pytest.approx(want[agg], abs=1e-6)
    assert stats["policy/ref_kl"].tolist() == pytest.approx(kl, abs=1e-6)
    assert stats["policy/approx_kl"][1].item() == pytest.approx(math.exp(0.1) - 0.1 - 1, abs=1e-6)


def test_P5_tis_weight_is_trainer_over_sampler_and_capped(world, tmp_path):
    batch = made_batch()
    batch.old_logprobs = batch.ref_logprobs = torch.tensor([-0.5, -0.5 + math.log(1.5), -0.7 + math.log(9.0)])
    cfg = small(world, tmp_path, tis_cap=2.0, kl_coef=0.0, agg="token")
    value, stats = grpo.grpo_loss(batch.old_logprobs, batch, cfg, 3)
    assert value.item() == pytest.approx((-1.0 - 1.5 + 2.0) / 3, abs=1e-6)
    assert stats["sync/tis_clip_fraction"].tolist() == [0.0, 0.0, 1.0]
    batch.old_logprobs = batch.sampler_logprobs
    _, stats = grpo.grpo_loss(batch.old_logprobs, batch, dataclasses.replace(cfg, tis_cap=1.0), 3)
    assert stats["sync/tis_clip_fraction"].tolist() == [0.0] * 3  # a weight that equals the cap is not cut


# ---- the update against a plain twin -------------------------------------------------------------------


def fixed_rollouts(seed: int = 0, groups: int = 4, size: int = 3) -> tuple[list[Rollout], torch.Tensor]:
    """Random ids of uneven lengths, one response empty, one cut."""
    g = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(1, 90, (n,), generator=g).tolist()

    rollouts = []
    for p in range(groups):
        prompt = ids(4 + 3 * p)
        for k in range(size):
            response = ids((p * size + k) % 6) + ([95] if k else [])
            rollouts.append(Rollout(prompt, response, [-1.0] * len(response), "", "stop", p))
    return rollouts, torch.randn(groups, size, generator=g)


def plain_update(cfg: grpo.Config, rollouts, advantages) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The algorithm as a first-year student writes it: one forward per response, no packing, Eq. 9 in loops."""
    from transformers import AutoModelForCausalLM

    policy, ref = (exact_norms(AutoModelForCausalLM.from_pretrained(cfg.model, dtype=torch.float64)) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), cfg.lr, cfg.betas, weight_decay=cfg.weight_decay)
    gradients_of_steps: list[dict] = []
    optimizer.register_step_pre_hook(lambda *_: gradients_of_steps.append(gradients(policy)))

    def score(lm, rollout):
        return plain_logprobs(lm, rollout.prompt_ids, rollout.response_ids, cfg.temperature)

    size = advantages.shape[1]
    with torch.no_grad():
        old = [score(policy, r) for r in rollouts]
        reference = [score(ref, r) for r in rollouts]
    per_mini = cfg.mini_batch * size
    for m in range(0, len(rollouts), per_mini):
        members = range(m, m + per_mini)
        divisor = {"seq": per_mini, "token": sum(len(rollouts[i].response_ids) for i in members),
                   "const": per_mini * cfg.max_response_tokens}[cfg.agg]
        loss = torch.tensor(0.0, dtype=torch.float64)
        for i in members:
            if not rollouts[i].response_ids:
                continue
            logprobs, a = score(policy, rollouts[i]), advantages.flatten()[i].double()
            ratio = (logprobs - old[i]).exp()
            surrogate = torch.min(ratio * a, ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high) * a)
            d = reference[i] - logprobs
            token = -surrogate + cfg.kl_coef * (d.exp() - d - 1)
            loss = loss + (token.mean() if cfg.agg == "seq" else token.sum()) / divisor
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = steps.learning_rate(m // per_mini, cfg)
        optimizer.step()
        optimizer.zero_grad()
    return gradients_of_steps, policy.state_dict()


def packed_update(cfg: grpo.Config, rollouts, advantages, dtype=torch.float32, gradients_of_steps=None,
                  **more) -> tuple[dict[str, torch.Tensor], dict]:
    """`update` -> weights and metrics; the gradients of each optimiser step go to `gradients_of_steps`."""
    policy, reference = model.load_policy(cfg.model, dtype), model.load_policy(cfg.model, dtype).requires_grad_(False)
    if dtype == torch.float64:
        exact_norms(policy.lm), exact_norms(reference.lm)
    optimizer = torch.optim.AdamW(policy.parameters(), cfg.lr, cfg.betas, weight_decay=cfg.weight_decay)
    if gradients_of_steps is not None:
        optimizer.register_step_pre_hook(lambda *_: gradients_of_steps.append(gradients(policy.lm)))
    stats = grpo.update(policy, reference, optimizer, rollouts, advantages, cfg, **more)
    return policy.lm.state_dict(), stats


@pytest.mark.parametrize(("agg", "max_grad_norm"), [("seq", 1e9), ("token", 1e9), ("const", 1e9), ("seq", 0.1)])
def test_T3_P7_update_equals_the_plain_twin_for_any_micro_batch_plan(world, tmp_path, agg, max_grad_norm):  # Eq. 7
    """Two mini-batches, so that ratio, clip and KL count in the second. In float64, because Adam's first step is
    nearly the sign of a gradient: in float32 the rounding of a tiny one would decide a whole step."""
    cfg = small(world, tmp_path, agg=agg, kl_coef=0.1, temperature=0.8, max_grad_norm=max_grad_norm)
    rollouts, advantages = fixed_rollouts()
    wanted_gradients, wanted_weights = plain_update(cfg, rollouts, advantages)
    for budget in (10, 45, 4096):
        plan, found = dataclasses.replace(cfg, micro_batch_tokens=budget), []
        after, stats = packed_update(plan, rollouts, advantages, torch.float64, found)
        assert len(found) == len(wanted_gradients) == 2
        for mine, wanted in zip([*found, after], [*wanted_gradients, wanted_weights], strict=True):
            assert_close(mine, wanted, 1e-9)
        assert stats["policy/ref_kl"] > 0 and stats["policy/clip_fraction"] > 0 and stats["optim/grad_norm"] > 0.1


def test_P17_on_policy_ratio_is_one_in_the_first_mini_batch(world, tmp_path):
    cfg = small(world, tmp_path, mini_batch=4)
    _, stats = packed_update(cfg, *fixed_rollouts())
    assert stats["policy/approx_kl"] == 0.0 and stats["policy/clip_fraction"] == 0.0 and stats["policy/ref_kl"] < 1e-12


def test_P17_old_logprobs_of_later_mini_batches_have_ratio_one_while_the_policy_stands(world, tmp_path):
    cfg = small(world, tmp_path, mini_batch=2, lr=0.0)
    _, stats = packed_update(cfg, *fixed_rollouts())
    assert stats["policy/approx_kl"] < 1e-12 and stats["policy/ref_kl"] < 1e-12


def test_P19_a_constant_group_pushes_nothing_but_its_kl_and_still_counts(world, tmp_path):  # Eq. 7
    """Without KL its gradient is exactly 0, and the others' is divided by all responses."""
    rollouts, advantages = fixed_rollouts()
    advantages[2:] = 0.0
    cfg = small(world, tmp_path, mini_batch=4, kl_coef=0.0, max_grad_norm=1e9)
    _, both = packed_update(cfg, rollouts, advantages)
    half = dataclasses.replace(cfg, prompts_per_step=2, mini_batch=2)
    _, alone = packed_update(half, rollouts[:6], advantages[:2])
    assert both["optim/grad_norm"] == pytest.approx(alone["optim/grad_norm"] / 2, rel=1e-5)


def test_T5_a_round_of_empty_responses_is_survived(world, tmp_path):
    rollouts = [Rollout([5, 6, 7], [], [], "", "length", i // 3) for i in range(12)]
    for agg in ("seq", "token", "const"):
        got, stats = packed_update(small(world, tmp_path, agg=agg), rollouts, torch.zeros(4, 3))
        assert all(torch.isfinite(t).all() for t in got.values()) and stats["optim/grad_norm"] == 0.0


def test_T9_metrics_are_means_over_all_tokens_not_the_last_micro_batch(world, tmp_path):
    cfg = small(world, tmp_path, mini_batch=4, lr=0.0)
    rollouts, advantages = fixed_rollouts()
    _, coarse = packed_update(cfg, rollouts, advantages)
    _, fine = packed_update(dataclasses.replace(cfg, micro_batch_tokens=10), rollouts, advantages)
    for name in ("policy/entropy", "sync/logprob_diff_mean", "sync/logprob_diff_max", "optim/grad_norm"):
        assert fine[name] == pytest.approx(coarse[name], rel=1e-4) and coarse[name] > 0, name


def test_T11_groups_carry_the_sampled_ids():
    rollouts, advantages = fixed_rollouts()
    for group, start in zip(grpo.make_groups(rollouts, advantages), range(0, 12, 3), strict=True):
        assert group.prompt_ids is rollouts[start].prompt_ids
        members = rollouts[start : start + 3]
        assert all(a is r.response_ids for a, r in zip(group.responses, members, strict=True))
        assert all(a is r.sampler_logprobs for a, r in zip(group.sampler_logprobs, members, strict=True))
    assert loss_divisor(grpo.make_groups(rollouts, advantages), "seq", 12) == 12


def test_statistics_of_tokens_by_hand():
    """The gap between trainer and sampler is |old - sampler|; a filler batch says nothing."""
    batch, said = made_batch(), Metrics()
    batch.old_logprobs = torch.tensor([-0.5, -0.25, -1.7])  # the sampler's: -0.5, -0.5, -0.7
    batch.ref_logprobs = batch.old_logprobs
    _, stats = grpo.grpo_loss(batch.old_logprobs, batch, grpo.Config(), 3)
    stats = {"sync/logprob_diff_mean": stats["sync/logprob_diff_mean"]}
    grpo.record_tokens(said, batch, stats | {"x": torch.tensor([1.0, 2.0, 6.0])})
    grpo.record_tokens(said, dataclasses.replace(batch, weight=0.0), {"x": torch.tensor([9.0])})
    want = {"x": 3.0, "sync/logprob_diff_mean": 1.25 / 3, "sync/logprob_diff_max": 1.0}
    assert said.reduce() == pytest.approx(want)


def test_the_first_mini_batch_takes_its_old_log_probs_from_its_own_forward(world, tmp_path, monkeypatch):
    passes, honest = [], head._logits
    monkeypatch.setattr(head, "_logits", lambda *args: passes.append(1) or honest(*args))
    packed_update(small(world, tmp_path, mini_batch=4), *fixed_rollouts())
    assert len(passes) == 3  # one micro-batch: the reference, the policy forward and again in its backward


def test_a_mini_batch_of_one_token_is_divided_by_one(world, tmp_path):
    rollout = Rollout([5, 6, 7], [8], [-1.0], "", "stop", 0)
    cfg = small(world, tmp_path, kl_coef=0.0, max_grad_norm=1e9, mini_batch=2)
    _, both = packed_update(cfg, [rollout] * 2, torch.ones(2, 1))
    _, alone = packed_update(dataclasses.replace(cfg, mini_batch=1), [rollout], torch.ones(1, 1))
    assert alone["optim/grad_norm"] == pytest.approx(both["optim/grad_norm"], rel=1e-5) and both["optim/grad_norm"] > 0


def test_the_mean_over_ranks_is_made_a_sum(world, tmp_path, monkeypatch):
    """On one of two ranks with half a mini-batch the gradient is doubled, for FSDP halves it."""
    rollouts, advantages = fixed_rollouts()
    cfg = small(world, tmp_path, mini_batch=4, max_grad_norm=1e9)
    _, alone = packed_update(cfg, rollouts, advantages)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    for module in (ranks, batch_module, metrics_module):
        monkeypatch.setattr(module, "gather", lambda value: [value])
    _, half = packed_update(dataclasses.replace(cfg, mini_batch=8), rollouts, advantages)
    assert half["optim/grad_norm"] == pytest.approx(2 * alone["optim/grad_norm"], rel=1e-5)


def test_the_round_places_its_updates_in_the_schedule(world, tmp_path):
    cfg = small(world, tmp_path, steps=10, mini_batch=2)
    stats = packed_update(cfg, *fixed_rollouts(), step=3)[1]  # two updates a round: numbers 6 and 7
    assert stats["optim/lr"] == steps.learning_rate(7, cfg) != steps.learning_rate(6, cfg)
    assert "compile/graphs" not in stats  # nothing is compiled on a CPU
    official = dataclasses.replace(cfg, compat="official")  # the authors' whole first round trains with 0
    rates = [packed_update(official, *fixed_rollouts(), step=step)[1]["optim/lr"] for step in (0, 1)]
    assert rates[0] == 0.0 < rates[1]


# ---- the loop ------------------------------------------------------------------------------------------


def stop_after(monkeypatch, step: int) -> None:
    calls = iter(range(10**6))
    monkeypatch.setattr(StopSignal, "requested", lambda self: next(calls) + 1 == step)


def test_T10_T6_a_stopped_run_continues_bit_for_bit(world, tmp_path, monkeypatch):
    """Two mini-batches a round and more data than one epoch; metrics are equal too, none twice or missing."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    changes = {"steps": 8, "held_out": str(world / "held_out.jsonl"), "eval_every": 3}
    grpo.train(small(world, straight, **changes), grpo.Method(score=parity))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            grpo.train(small(world, broken, **changes), grpo.Method(score=parity))
    assert len(logged(broken)) == 3 and not (broken / "model").exists()
    grpo.train(small(world, broken, **changes), grpo.Method(score=parity))
    assert logged(broken) == logged(straight) and len(logged(straight)) == 9
    start = load_file(world / "start" / "model.safetensors")
    assert_close(exported(broken), exported(straight), 0)
    assert not any(torch.equal(start[name], tensor) for name, tensor in exported(straight).items())
    assert all(row["sync/logprob_diff_max"] < 1e-5 for row in logged(broken)[:-1])
    assert sorted(p.name for p in (broken / "checkpoints").iterdir()) == ["step_000007", "step_000008"]
    assert sorted(p.name for p in (broken / "rollouts").iterdir()) == [
        f"step_{s:06d}.jsonl" for s in (0, 3, 6, 8)]
    before = exported(broken)
    grpo.train(small(world, broken, **changes), grpo.Method(score=parity))  # a finished run changes nothing
    assert logged(broken) == logged(straight)
    assert_close(exported(broken), before, 0)


def test_rewards_of_the_loop_are_verdicts_only(world):  # Eq. 8
    from data import load_pairs

    pairs = load_pairs(str(world / "rl.jsonl"))[:2]
    right, wrong = (f"<answer>[[{x}]]</answer>" for x in (pairs[0].winner, "B" if pairs[0].winner == "A" else "A"))
    texts = [right, wrong, "", f"<answer>[[{pairs[1].winner}]]</answer>", "[[A]]", right + " " * 81]
    made = [Rollout([1], [2] * size, [0.0] * size, t, "stop", 0) for size, t in enumerate(texts, 1)]
    got = grpo.verdict_score(made, pairs, None, None, None)
    assert got.tolist() == [[1, -1, -1], [1, -1, -1]]


class Scripted:
    """A sampler that answers with its call number and remembers the seeds it was given."""

    def __init__(self):
        self.seeds: list[int] = []

    def generate(self, prompts, n, temperature, max_tokens, seeds):
        self.seeds += seeds
        return [Rollout(p, [1], [0.0], "", "stop", i) for i, p in enumerate(prompts) for _ in range(n)]


def scripted_run(cfg, pairs, sampler, keep):
    method = grpo.Method(score=lambda made, taken, *_: torch.ones(len(taken), cfg.group_size), keep=keep)
    return grpo.Run(cfg, method, None, None, pairs, [], None, None, sampler, None, None)


def test_refused_groups_are_replaced_from_the_stream(world, tmp_path, monkeypatch):
    from data import load_pairs, stream

    pairs, cfg, sampler = load_pairs(str(world / "rl.jsonl")), small(world, tmp_path), Scripted()
    order = [p.pair_id for p in stream(pairs, 0, 12, cfg.seed)]

    def refuse_every_second(rewards):
        return torch.arange(len(rewards)) % 2 == 1

    run = scripted_run(cfg, pairs, sampler, refuse_every_second)
    monkeypatch.setattr(grpo.Run, "prompt_ids", lambda self, pair: [order.index(pair.pair_id)])
    rollouts, rewards, position = grpo.collect_kept(run, 0)
    assert [r.prompt_ids[0] for r in rollouts[:: cfg.group_size]] == [1, 3, 5, 7]
    assert rewards.shape == (4, 3) and position == 8
    assert sampler.seeds == [seeds.derive_seed(cfg.seed, "rollout", place) for place in range(8)]


def test_a_stream_of_which_nothing_is_kept_ends_in_one_line(world, tmp_path, monkeypatch):
    from data import load_pairs

    monkeypatch.setattr(grpo, "REFILLS", 3)
    monkeypatch.setattr(grpo.Run, "prompt_ids", lambda self, pair: [1])
    pairs, cfg, sampler = load_pairs(str(world / "rl.jsonl")), small(world, tmp_path), Scripted()
    with pytest.raises(UserError, match="of 12 groups only 3 were kept"):
        grpo.collect_kept(scripted_run(cfg, pairs, sampler, lambda rewards: torch.arange(len(rewards)) == 0), 0)
    assert len(sampler.seeds) == 12


def test_a_loss_that_is_not_finite_skips_steps_and_then_ends_the_run_with_its_state(world, tmp_path, monkeypatch):
    """Rounds 2 and 3 of 20 are bad, then all from round 5 on; mini-batch 0 alone is enough."""
    met, bad = [], {4, 6, *range(10, 100)}

    def loss(logprobs, batch, cfg, total):
        if not any(batch.inputs is inputs for inputs in met):
            met.append(batch.inputs)
        value, stats = grpo.grpo_loss(logprobs, batch, cfg, total)
        return value * (math.nan if len(met) - 1 in bad else 1.0), stats

    cfg = small(world, tmp_path / "run", steps=20, mini_batch=2, save_every=100)
    with pytest.raises(UserError, match="5 steps in a row"):
        grpo.train(cfg, grpo.Method(score=parity, loss=loss))
    rows = logged(tmp_path / "run")
    assert [row["optim/skipped"] for row in rows] == [0, 0, 0.5, 0.5, 0, 1, 1, 1, 1, 1]
    assert all("not_finite" in row for row in rows if row["optim/skipped"])
    assert run_folder.latest_checkpoint(tmp_path / "run").name == "step_000010"
    with pytest.raises(UserError, match="the content of method has changed"):
        grpo.train(cfg, grpo.Method(score=parity))
    bad.clear()  # without the fault the same command goes on to the end
    grpo.train(cfg, grpo.Method(score=parity, loss=loss))
    assert len(logged(tmp_path / "run")) == 21
    assert all(torch.isfinite(t).all() for t in exported(tmp_path / "run").values())


# ---- configuration and errors --------------------------------------------------------------------------


def test_a_score_of_another_shape_or_without_numbers_is_refused(world, tmp_path):
    for i, wrong in enumerate((lambda rewards: rewards.T, torch.Tensor.tolist, lambda rewards: rewards * math.nan)):
        with pytest.raises(UserError, match="score must return finite rewards"):
            grpo.train(small(world, tmp_path / str(i)), grpo.Method(score=lambda *a, wrong=wrong: wrong(parity(*a))))


def test_paper_presets_are_the_papers_numbers():
    for name, lr in [("7b-reasoning", 1e-6), ("14b-reasoning", 1e-6), ("32b-reasoning", 8e-7),
                     ("7b-instruct", 1e-6), ("14b-instruct", 7e-7), ("32b-instruct", 5e-7)]:
        cfg = grpo.PRESETS[f"paper-{name}"]
        assert cfg.lr == lr and cfg.preset == f"paper-{name}"
        assert (cfg.prompts_per_step, cfg.mini_batch, cfg.group_size, cfg.updates_per_step) == (1024, 128, 7, 8)
        assert (cfg.clip_low, cfg.clip_high, cfg.kl_coef, cfg.weight_decay) == (0.2, 0.2, 0.001, 0.01)
        assert (cfg.max_prompt_tokens, cfg.max_response_tokens, cfg.temperature) == (4096, 8192, 1.0)
        assert cfg.lr_schedule == "constant" and cfg.warmup_updates == 0 and cfg.agg == "seq"
        assert cfg.style == ("reasoning" if "reasoning" in name else "instruct")
        assert cfg.steps == (71 if "reasoning" in name else 62)


ZEROS = ["steps", "group_size", "mini_batch", "temperature", "eval_every", "save_every"]


@pytest.mark.parametrize(("changes", "message"), [
    *(({name: 0}, f"--{name.replace('_', '-')} 0") for name in ZEROS),
    ({"group_size": 1}, "--group-size 1"), ({"mini_batch": 3}, "--prompts-per-step 4, --mini-batch 3"),
    ({"data": "none.jsonl"}, "none.jsonl: no such file"),
    ({"model": "none"}, "expected a folder with config.json"), ({"max_prompt_tokens": 3}, "none of .* pairs fits"),
    ({"preset": "paper-7b-reasoning"}, "needs GPUs.*--preset tiny"),
])
def test_what_cannot_run_is_refused_before_anything_is_written(world, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        grpo.train(small(world, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_group_of_one_serves_a_method_that_needs_no_group(world, tmp_path):
    method = grpo.Method(advantage=lambda rewards, scale_by_std: rewards)
    grpo.train(small(world, tmp_path / "out", steps=1, group_size=1, held_out=""), method)


def test_an_instruct_preset_wants_its_stage_1_or_any_model_that_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grpo.cli, "check_hardware", lambda preset: None)
    for named, said in (("runs/sft", "once its stage has run"), ("owner/name", "neither a folder nor a hub model")):
        with pytest.raises(UserError, match=said):
            grpo.set_up(dataclasses.replace(grpo.PRESETS["paper-7b-instruct"], model=named), grpo.Method())
