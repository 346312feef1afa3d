"""course/exercises: every patch fits, is small, does what its hand-computed case says; the page lists what there is."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import re
import shutil
from itertools import count
from pathlib import Path

import pytest
import torch
import tyro

from batch import Group, collate
from course import exercises
from course.patches import ROOT, Patch, apply, read_patches
from reward import parse_verdict
from rollout import Rollout
from runtime.disk import write_whole
from runtime.errors import UserError

PATCHES = {patch.name[:2]: patch for patch in read_patches(ROOT / "course" / "exercises")}
EVERY = pytest.mark.parametrize("patch", PATCHES.values(), ids=lambda patch: patch.name)
MODULES = count()


def patched(folder: Path, patch: Patch):
    """The (first) script that the patch changes, as a module; what it imports is the project's own."""
    for file in reversed(patch.files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / file)
    apply(patch, folder)
    spec = importlib.util.spec_from_file_location(f"patched_{next(MODULES)}", folder / file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patcher:  # a dataclass looks its module up
        patcher.setitem(__import__("sys").modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


def test_there_are_ten_and_each_says_what_it_is():
    assert list(PATCHES) == [f"{n:02}" for n in range(1, 11)]
    for patch in PATCHES.values():
        assert {"Title", "Change", "Where", "Expect", "Metric", "Question"} <= set(patch.says), patch.name


@EVERY
def test_a_patch_fits_is_small_and_compiles(patch, tmp_path):
    assert 1 <= patch.changed <= 10
    for file in patch.files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    apply(patch, tmp_path)
    for file in patch.files:
        text = (tmp_path / file).read_text(encoding="utf-8")
        compile(text, file, "exec")
        assert text != (ROOT / file).read_text(encoding="utf-8") and max(map(len, text.splitlines())) <= 120


def test_a_patch_that_does_not_fit_is_one_line(tmp_path):
    (tmp_path / "grpo.py").write_text("nothing like it\n")
    with pytest.raises(UserError, match="01_sequence_ratio: does not fit"):
        apply(PATCHES["01"], tmp_path)


def test_the_page_lists_exactly_the_patches():
    page = (ROOT / "course" / "exercises.md").read_text(encoding="utf-8")
    assert re.findall(r"\(exercises/(\w+)\.patch\)", page) == [patch.name for patch in PATCHES.values()]


def test_the_page_is_the_one_that_the_patches_and_numbers_make(tmp_path):
    numbers = ROOT / "course" / "exercises.json"
    if numbers.exists():
        shutil.copy(numbers, tmp_path)
    exercises.write_table(tmp_path)
    page = (ROOT / "course" / "exercises.md").read_text(encoding="utf-8")
    assert page == (tmp_path / "exercises.md").read_text(encoding="utf-8"), "run python -m course.exercises table"


def test_every_exercise_was_measured_with_three_seeds_on_each_side():
    found = json.loads((ROOT / "course" / "exercises.json").read_text(encoding="utf-8"))
    assert list(found) == [patch.name for patch in PATCHES.values()]
    for patch in PATCHES.values():
        assert "Found" in patch.says, "what came out, in words"
        assert set(found[patch.name]) == set(exercises.sides(patch, ""))
        assert all(list(seeds) == ["0", "1", "2"] for seeds in found[patch.name].values()), patch.name
    assert (ROOT / "course" / "exercises.png").stat().st_size < 150_000


# ---- what the changed functions compute ----------------------------------------------------------------


def grpo_batch():
    """Two responses, of two tokens and of one, whose ratios are 1.5 and 0.5, and 1.3."""
    batch = collate([Group([1, 2], [[5, 6], [7]], [1.0, -1.0], [[-0.5, -0.5], [-0.7]])], [0], "cpu")
    batch.old_logprobs = torch.tensor([-1.0, -1.0, -1.0])
    batch.ref_logprobs = torch.tensor([-1.0, -1.5, -1.0])
    return batch, torch.tensor([-1.0 + math.log(1.5), -1.0 + math.log(0.5), -1.0 + math.log(1.3)], requires_grad=True)


def test_01_the_ratio_of_a_response_is_the_geometric_mean(tmp_path):
    grpo = patched(tmp_path, PATCHES["01"])
    batch, logprobs = grpo_batch()
    cfg = grpo.Config(kl_coef=0.0, clip_low=0.2, clip_high=0.2)
    value, stats = grpo.grpo_loss(logprobs, batch, cfg, 2)
    ratio = math.sqrt(1.5 * 0.5)  # 0.866: neither token is clipped, though each alone lies outside
    assert stats["policy/clip_fraction"].tolist() == [0, 0, 0]
    assert value.item() == pytest.approx((-ratio + 1.3) / 2)
    value.backward()
    assert logprobs.grad.tolist() == pytest.approx([-ratio / 4, -ratio / 4, 1.3 / 2])


def test_02_the_others_mean_is_the_baseline(tmp_path):
    rewards = torch.tensor([[1.0, 1.0, 1.0, -1.0], [2.0, 2.0, 2.0, 2.0]])
    module = patched(tmp_path, PATCHES["02"])
    plain = module.group_advantages(rewards, scale_by_std=False)
    assert plain[0].tolist() == pytest.approx([1 - 1 / 3] * 3 + [-2.0]) and plain[1].abs().max() == 0
    assert module.group_advantages(rewards)[0].tolist() == pytest.approx([2 / 3] * 3 + [-2.0], abs=1e-5)  # std is 1
    assert module.group_advantages(torch.tensor([[3.0]])).item() == 0


def test_03_k1_pushes_every_token_alike_and_k3_is_still_logged(tmp_path):
    grpo = patched(tmp_path, PATCHES["03"])
    batch, _ = grpo_batch()
    logprobs = torch.full((3,), -1.0, requires_grad=True)
    batch.advantages = torch.zeros(3)
    value, stats = grpo.grpo_loss(logprobs, batch, grpo.Config(kl_coef=0.5, agg="token"), 3)
    value.backward()
    assert value.item() == pytest.approx(0.5 * 0.5 / 3)  # -1 against -1.5 in one token of three
    assert logprobs.grad.tolist() == pytest.approx([0.5 / 3] * 3)
    assert stats["policy/ref_kl"].tolist() == pytest.approx([0, math.exp(-0.5) + 0.5 - 1, 0], abs=1e-6)


def rollouts(*texts: str, lengths: tuple[int, ...], last: float = -0.1) -> list[Rollout]:
    return [Rollout([1], [2] * n, [last] * n, text, "stop", 0) for text, n in zip(texts, lengths, strict=True)]


def sums(size: int = 1):
    from toy import world

    return [world.make_sum(random.Random(i)) for i in range(size)]


def test_05_a_reward_per_token(tmp_path):
    [pair] = sums()
    right, wrong = (f"<answer>[[{x}]]</answer>" for x in (pair.winner, "B" if pair.winner == "A" else "A"))
    made = rollouts(right, right, wrong, "", lengths=(4, 5, 4, 0))
    rewards = patched(tmp_path, PATCHES["05"]).verdict_score(made, [pair], None, None, None)
    assert rewards[0].tolist() == pytest.approx([1 / 4, 1 / 5, -1 / 4, -1])


def test_06_the_ratio_is_one_and_its_gradient_stays(tmp_path):
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    value, clipped = patched(tmp_path, PATCHES["06"]).clipped_surrogate(
        logprobs, torch.tensor([-3.0, -0.1]), torch.tensor([2.0, -1.0]), 0.2, 0.2)
    value.sum().backward()
    assert value.tolist() == [-2.0, 1.0] and logprobs.grad.tolist() == [-2.0, 1.0] and not clipped.any()


def test_08_votes_stop_where_the_lead_cannot_be_caught_up(tmp_path):
    """Of 5 votes: 3 : 0 decides, 2 : 0 does not."""
    from rollout import Reply

    class Scripted:
        asked = 0

        def chat(self, conversations, n, temperature, max_tokens, seeds):
            assert n == 1
            self.asked += len(conversations)
            return [[Reply(f"[[{next(script)}]]", "stop", 1, 1)] for _ in conversations]

    sampler, script = Scripted(), iter("AAABABAB")  # the first pair AAA, the second: what is left
    module = patched(tmp_path, PATCHES["08"])
    [verdict] = module.Judge(sampler, system="judge").pairs(sums(), votes=5, temperature=1.0)
    assert verdict.winner == "A" and verdict.votes == {"A": 3, "B": 0, "none": 0} and sampler.asked == 3
    [verdict] = module.Judge(sampler, system="judge").pairs(sums(), votes=5, temperature=1.0)
    assert verdict.votes == {"A": 2, "B": 3, "none": 0} and sampler.asked == 8


def test_09_brier(tmp_path):
    grade = patched(tmp_path, PATCHES["09"]).graded_reward
    [pair] = sums()
    right, wrong = (f"<answer>[[{x}]]</answer>" for x in (pair.winner, "B" if pair.winner == "A" else "A"))
    for text, p, want in ((right, 0.9, 0.98), (right, 0.5, 0.5), (wrong, 0.5, 0.5), (wrong, 0.9, -0.62), ("", 0.5, -1)):
        [made] = rollouts(text, lengths=(6,), last=math.log(p))
        assert grade(made, pair.winner) == pytest.approx(want)


def test_10_style_pairs_have_one_polite_response(tmp_path):
    toy = patched(tmp_path, PATCHES["10"])
    pairs = toy.make_pairs(60, random.Random(0), False, "rl")
    assert {pair.category for pair in pairs} == {"Reasoning", "Chat", "Style"}
    for pair in (pair for pair in pairs if pair.category == "Style"):
        better = pair.response_a if pair.winner == "A" else pair.response_b
        worse = pair.response_b if pair.winner == "A" else pair.response_a
        assert toy.keeps("polite", better)[1] and not toy.keeps("polite", worse)[1]
        assert parse_verdict(toy.teach(pair, random.Random(0), toy.CLEAN)) == pair.winner


# ---- rows and numbers ----------------------------------------------------------------------------------


def test_both_sides_are_commands_of_one_judge():
    place = "runs/tables/seed-{seed}/distilled"
    rows = {row.name: row.commands for row in exercises.all_rows(list(PATCHES.values()), "runs/x", place)}
    assert rows["01_sequence_ratio"][0].startswith("python runs/x/trees/01_sequence_ratio/grpo.py --preset tiny")
    assert (
        "--model runs/tables/seed-{seed}/distilled --data runs/tables/seed-{seed}/world/rl.jsonl" in rows["baseline"][0]
    )
    mixed = "--model runs/tables/seed-{seed}/mixed --data runs/tables/seed-{seed}/world-mixed/rl.jsonl"
    assert mixed in rows["05_length_normalised_reward"][0] and mixed in rows["05_length_normalised_reward-before"][0]
    assert rows["03_k1_in_the_loss-before"][0].endswith("--kl-coef 0.1")
    assert rows["06_stale_rollouts-extra"][0].endswith("--tis-cap 2")
    for before, after in ((exercises.sides(p, "t")[s] for s in ("before", "changed")) for p in PATCHES.values()):
        assert before.name != after.name and "{tree}" not in before.commands[0] + after.commands[0]


def fake_run(folder: Path, right: int, kl: float) -> None:
    rows = [{"pair_id": f"p-{i}", "order": order, "correct": i < right, "category": "Chat"}
            for i in range(4) for order in ("AB", "BA")]
    for step in (0, 10):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_whole(folder / "rollouts" / f"step_{step:06d}.jsonl", text)
    metrics = [
        {"step": i, "policy/ref_kl": kl * i} | ({"eval/accuracy": 0.5} if i % 10 == 0 else {}) for i in range(10)
    ]
    write_whole(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in metrics))
    write_whole(folder / "checkpoints" / "step_000010" / "progress.json", json.dumps({"position": 160}))


def test_runs_become_a_section(tmp_path):
    sides: dict = {"before": {}, "changed": {}}
    for seed, kl in enumerate((0.1, 0.2, 0.3)):
        fake_run(tmp_path / f"a{seed}", 2, kl)
        fake_run(tmp_path / f"b{seed}", 3, kl + 1)
        sides["before"][str(seed)] = exercises.measured(tmp_path / f"a{seed}", "policy/ref_kl")
        sides["changed"][str(seed)] = exercises.measured(tmp_path / f"b{seed}", "policy/ref_kl")
    assert sides["before"]["0"] == {"right": "2200", "pairs drawn": 160, "accuracy": [[0, 0.5]],
                                    "metric": [[4, 0.2], [9, 0.7]]}
    said = exercises.verdict(sides, "changed", "policy/ref_kl")
    assert said[0] == "- changed, held-out accuracy: +0.250 ± 0.289 (+0.250, +0.250, +0.250), within noise"
    assert said[1] == "- changed, policy/ref_kl: 1.4 -> 8.4, +7 ± 0 (+7, +7, +7), beyond noise" and len(said) == 2
    assert exercises.measured(tmp_path / "a0", "accuracy on Chat")["metric"] == [[0, 0.5], [10, 0.5]]
    write_whole(tmp_path / "exercises.json", json.dumps({PATCHES["03"].name: sides}))
    exercises.write_table(tmp_path)
    page = (tmp_path / "exercises.md").read_text()
    assert said[1] in page and (tmp_path / "exercises.png").exists()
    assert "0.500 -> 0.750 | +0.250 ± 0.289 | policy/ref_kl | 1.4 -> 8.4, **beyond noise** |" in page
    assert "Beyond noise are 0 differences of accuracy after 10 rounds, 0 at the end and 1 of the metric" in page


def test_a_judge_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match="is no finished judge"):
        exercises.run_exercises(tyro.cli(exercises.Run, args=["--distilled", str(tmp_path / "{seed}" / "distilled")]))
