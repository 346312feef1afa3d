"""course/patched.py: every patch fits and is small, exercises compute what their hand-computed case says, the tests
that should notice a fault exist, and the pages say what the recorded numbers say."""

from __future__ import annotations

import ast
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

from batch import Group, collate
from course import patched
from course.handout import ROOT
from course.patched import Patch, apply, read_patches
from reward import parse_verdict
from rollout import Rollout
from runtime.disk import write_whole
from runtime.errors import UserError

EXERCISES = {patch.name[:2]: patch for patch in read_patches("exercises")}
TRAPS = read_patches("traps")
MODULES = count()


def in_place(patch: Patch, folder: Path) -> Path:
    """The files that the patch changes, changed."""
    for file in patch.files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / file)
    apply(patch, folder)
    return folder


def lines(patch: Patch) -> int:
    """Lines added or lines removed, whichever is more."""
    marks = re.findall(r"^([+-])(?!\+\+ b/|-- a/)", patch.diff, re.MULTILINE)
    return max(marks.count("+"), marks.count("-"))


def changed(folder: Path, patch: Patch):
    """The (first) script that the patch changes, as a module; what it imports is the project's own."""
    spec = importlib.util.spec_from_file_location(f"patched_{next(MODULES)}", in_place(patch, folder) / patch.files[0])
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patcher:  # a dataclass looks its module up
        patcher.setitem(__import__("sys").modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


def test_there_are_ten_exercises_and_a_trap_for_each_number():
    assert list(EXERCISES) == [f"{n:02}" for n in range(1, 11)]
    assert all({"Title", "Change", "Metric"} <= set(patch.says) for patch in EXERCISES.values())
    assert [patch.name[:3] for patch in TRAPS] == [f"T{n:02}" for n in range(1, 18)]
    assert all({"Title", "Fault", "Test", "Run"} == set(patch.says) for patch in TRAPS)
    assert {patch.says["Run"] for patch in TRAPS} == {"grpo", "sft"}


@pytest.mark.parametrize("patch", [*EXERCISES.values(), *TRAPS], ids=lambda patch: patch.name)
def test_a_patch_fits_is_small_and_compiles(patch, tmp_path):
    assert 1 <= lines(patch) <= (3 if patch in TRAPS else 10)
    in_place(patch, tmp_path)
    for file in patch.files:
        text = (tmp_path / file).read_text(encoding="utf-8")
        compile(text, file, "exec")
        assert max(map(len, text.splitlines())) <= 120


def test_a_patch_that_does_not_fit_is_one_line(tmp_path):
    (tmp_path / "grpo.py").write_text("nothing like it\n")
    with pytest.raises(UserError, match="01_sequence_ratio: does not fit"):
        apply(EXERCISES["01"], tmp_path)


def exists(name: str) -> bool:
    """Is there such a test, written as pytest has it?"""
    file, _, test = name.partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("patch", TRAPS, ids=lambda patch: patch.name)
def test_the_tests_that_should_notice_a_fault_exist(patch):
    names = patch.says["Test"].split()
    assert all(map(exists, names))
    assert any(f"test_T{int(patch.name[1:3])}_" in name for name in names), "one of them carries the trap's number"


# ---- the pages and their numbers -----------------------------------------------------------------------


def read_json(name: str):
    return json.loads((ROOT / "course" / name).read_text(encoding="utf-8"))


def test_the_page_of_exercises_says_what_was_measured():
    page, found = (ROOT / "course" / "exercises.md").read_text(encoding="utf-8"), read_json("exercises.json")
    assert re.findall(r"\(exercises/(\w+)\.patch\), (\d+) line", page) == [
        (patch.name, str(lines(patch))) for patch in EXERCISES.values()
    ]
    for patch in EXERCISES.values():
        assert set(found[patch.name]) == set(patched.sides(patch))
        assert all(list(seeds) == ["0", "1", "2"] for seeds in found[patch.name].values()), patch.name
    grid = patched.overview(found, list(EXERCISES.values()))
    assert len(grid) == 12 and all(f"| {' | '.join(row)} |" in page for row in grid)


def test_the_page_of_traps_says_what_was_measured():
    rows = re.findall(r"^\| \[T\d+\]\(traps/(\w+)\.patch\) (\|.*)$", (ROOT / "course" / "traps.md").read_text(),
                      re.MULTILINE)
    found = read_json("traps.json")
    assert [name for name, _ in rows] == [patch.name for patch in TRAPS]
    for (name, row), patch in zip(rows, TRAPS, strict=True):
        _, fault, notices, red, _, measured, _ = row.split("|")
        named = [[f"{file}::{test}" for test, file in re.findall(r"\[`(\w+)`\]\(\.\./([\w/]+\.py)\)", cell)]
                 for cell in (notices, red)]
        assert patch.says["Title"] in fault and named == [patch.says["Test"].split(), found[name]["red"]] and named[1]
        healthy = found[f"healthy-{patch.says['Run']}"]
        shown = {name: (float(now), float(well)) for name, now, well in
                 re.findall(r"([\w/]+) (-?[\d.e-]+) \((-?[\d.e-]+)\)", measured)}
        for number, (now, well) in shown.items():
            assert now == pytest.approx(found[name][number], rel=2e-3), (name, number)
            assert well == pytest.approx(healthy[number], rel=2e-3), (name, number)
        assert set(shown) == set(found[name]) - {"red", "error"}


# ---- what the changed functions compute ----------------------------------------------------------------


def grpo_batch():
    """Two responses, of two tokens and of one, whose ratios are 1.5 and 0.5, and 1.3."""
    batch = collate([Group([1, 2], [[5, 6], [7]], [1.0, -1.0], [[-0.5, -0.5], [-0.7]])], [0], "cpu")
    batch.old_logprobs = torch.tensor([-1.0, -1.0, -1.0])
    batch.ref_logprobs = torch.tensor([-1.0, -1.5, -1.0])
    return batch, torch.tensor([-1.0 + math.log(1.5), -1.0 + math.log(0.5), -1.0 + math.log(1.3)], requires_grad=True)


def test_01_the_ratio_of_a_response_is_the_geometric_mean(tmp_path):
    grpo = changed(tmp_path, EXERCISES["01"])
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
    module = changed(tmp_path, EXERCISES["02"])
    plain = module.group_advantages(rewards, scale_by_std=False)
    assert plain[0].tolist() == pytest.approx([1 - 1 / 3] * 3 + [-2.0]) and plain[1].abs().max() == 0
    assert module.group_advantages(rewards)[0].tolist() == pytest.approx([2 / 3] * 3 + [-2.0], abs=1e-5)  # std is 1
    assert module.group_advantages(torch.tensor([[3.0]])).item() == 0


def test_03_k1_pushes_every_token_alike_and_k3_is_still_logged(tmp_path):
    grpo = changed(tmp_path, EXERCISES["03"])
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
    rewards = changed(tmp_path, EXERCISES["05"]).verdict_score(made, [pair], None, None, None)
    assert rewards[0].tolist() == pytest.approx([1 / 4, 1 / 5, -1 / 4, -1])


def test_06_the_ratio_is_one_and_its_gradient_stays(tmp_path):
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    value, clipped = changed(tmp_path, EXERCISES["06"]).clipped_surrogate(
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
    module = changed(tmp_path, EXERCISES["08"])
    [verdict] = module.Judge(sampler, system="judge").pairs(sums(), votes=5, temperature=1.0)
    assert verdict.winner == "A" and verdict.votes == {"A": 3, "B": 0, "none": 0} and sampler.asked == 3
    [verdict] = module.Judge(sampler, system="judge").pairs(sums(), votes=5, temperature=1.0)
    assert verdict.votes == {"A": 2, "B": 3, "none": 0} and sampler.asked == 8


def test_09_brier(tmp_path):
    grade = changed(tmp_path, EXERCISES["09"]).graded_reward
    [pair] = sums()
    right, wrong = (f"<answer>[[{x}]]</answer>" for x in (pair.winner, "B" if pair.winner == "A" else "A"))
    for text, p, want in ((right, 0.9, 0.98), (right, 0.5, 0.5), (wrong, 0.5, 0.5), (wrong, 0.9, -0.62), ("", 0.5, -1)):
        [made] = rollouts(text, lengths=(6,), last=math.log(p))
        assert grade(made, pair.winner) == pytest.approx(want)


def test_10_style_pairs_have_one_polite_response(tmp_path):
    toy = changed(tmp_path, EXERCISES["10"])
    pairs = toy.make_pairs(60, random.Random(0), False, "rl")
    assert {pair.category for pair in pairs} == {"Reasoning", "Chat", "Style"}
    for pair in (pair for pair in pairs if pair.category == "Style"):
        better = pair.response_a if pair.winner == "A" else pair.response_b
        worse = pair.response_b if pair.winner == "A" else pair.response_a
        assert toy.keeps("polite", better)[1] and not toy.keeps("polite", worse)[1]
        assert parse_verdict(toy.teach(pair, random.Random(0), toy.CLEAN)) == pair.winner


# ---- runs and their numbers ----------------------------------------------------------------------------


def test_both_sides_are_commands_of_one_judge():
    rows = {row.name: row.commands[0] for row in patched.all_rows(list(EXERCISES.values()))}
    assert rows["01_sequence_ratio"].startswith("python runs/exercises/trees/01_sequence_ratio/grpo.py --preset tiny")
    assert "--model runs/tables/seed-{seed}/distilled --data runs/tables/seed-{seed}/world/rl.jsonl" in rows["baseline"]
    mixed = "--model runs/tables/seed-{seed}/mixed --data runs/tables/seed-{seed}/world-mixed/rl.jsonl"
    assert mixed in rows["05_length_normalised_reward"] and mixed in rows["05_length_normalised_reward-before"]
    assert rows["03_k1_in_the_loss-before"].endswith("--kl-coef 0.1")
    assert rows["06_stale_rollouts-extra"].endswith("--tis-cap 2")
    for patch in EXERCISES.values():
        before, after = (patched.sides(patch)[side] for side in ("before", "changed"))
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


def test_runs_become_numbers(tmp_path):
    sides: dict = {"before": {}, "changed": {}}
    for seed, kl in enumerate((0.1, 0.2, 0.3)):
        for side, right, more in (("before", 2, 0), ("changed", 3, 1)):
            fake_run(tmp_path / f"{side}{seed}", right, kl + more)
            sides[side][str(seed)] = patched.measured(tmp_path / f"{side}{seed}", "policy/ref_kl")
    assert sides["before"]["0"] == {"right": "2200", "accuracy": [[0, 0.5]], "metric": [[4, 0.2], [9, 0.7]]}
    assert patched.measured(tmp_path / "before0", "accuracy on Chat")["metric"] == [[0, 0.5], [10, 0.5]]
    _, row = patched.overview({EXERCISES["03"].name: sides}, [EXERCISES["03"]])
    assert row == ["3", "k1 in the loss instead of k3", "", "0.500 -> 0.750", "+0.250 ± 0.289", "policy/ref_kl",
                   "1.4 -> 8.4, **beyond noise**"]
    log = "round 29\nerror: 5 steps in a row\nfailed\n"
    assert patched.numbers(tmp_path / "before0", log) == {
        "policy/ref_kl": 0.7, "accuracy": 0.5, "error": "error: 5 steps in a row"
    }


def test_a_judge_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(patched, "TABLES", str(tmp_path / "{seed}"))
    with pytest.raises(UserError, match=r"no distilled, .* in .*; `make tables`"):
        patched.run_exercises(patched.Exercises())
    with pytest.raises(UserError, match="--only 99: there are T01"):
        patched.run_traps(patched.Traps(only=("99",)))


def test_a_red_test_is_named_without_its_parameters(tmp_path):
    (tmp_path / "test_one.py").write_text("import pytest\n@pytest.mark.parametrize('x', [1, 2])\n"
                                          "def test_small(x):\n    assert x < 2, 'a - b'\n")
    assert patched.failed_tests(tmp_path, "test_one.py::test_small", 60) == ["test_one.py::test_small"]
    assert patched.failed_tests(tmp_path, "test_one.py::test_small[1]", 60) == []
    with pytest.raises(UserError, match="pytest ended with 4"):
        patched.failed_tests(tmp_path, "test_two.py", 60)
