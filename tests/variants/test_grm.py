"""DeepSeek-GRM's reward by hand, hostile texts, its too-easy filter, and the loop that it is given to."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import grpo
from cor_prompt import encode_prompt, encode_target
from data import Pair, load_pairs, swap
from judging import pointwise
from judging.verdicts import judge_pairs, tally
from loading.tokenizer import load_tokenizer
from rollout import Reply, Rollout
from runtime.errors import UserError
from toy import files
from toy.files import Build
from toy.world import SYSTEM
from variants import grm, rrm, toy_forms

ASK = ({"role": "user", "content": "What is 2+2?"},)
PAIR = Pair("p", "s", ASK, "four", "five", "A")
TINY = replace(grpo.PRESETS["tiny"], prompt_file="")


# ---- the reward ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scores", "best", "reward"), [
    ([9, 8], 0, 1.0), ([9, 8], 1, -1.0),
    ([8, 8], 0, -1.0), ([8, 8], 1, -1.0),  # a tie is wrong, whoever is best
    ([1, 2, 3, 10], 3, 1.0), ([10, 2, 3, 10], 3, -1.0), ([10, 2, 3, 9], 3, -1.0), ([5, 1, 5], 1, -1.0),
    (None, 0, -1.0)])
def test_the_best_has_to_be_strictly_ahead(scores, best, reward):
    assert grm.grm_reward(scores, best) == reward


def test_scores_stand_as_prompts_by_samples():
    texts = ["\\boxed{9, 2}", "\\boxed{2, 9}", "\\boxed{5, 5}", "\\boxed{9}", "\\boxed{9, 2}" + "." * 99, "none"] * 2
    made = [Rollout([1], [2], [0.0], text, "stop", i // 6) for i, text in enumerate(texts)]
    rewards = grm.grm_score(made, [PAIR, swap(PAIR)], None, None, TINY)
    assert rewards.tolist() == [[1.0] + [-1.0] * 5, [-1.0, 1.0] + [-1.0] * 4]


def test_items_on_which_all_samples_are_right_are_not_trained_on():
    rewards = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, -1.0]])
    assert grm.not_too_easy(rewards).tolist() == [False, True, True]


@pytest.mark.parametrize(("text", "letter"), [("\\boxed{9, 2}", "A"), ("\\boxed{2, 9}", "B"), ("\\boxed{4, 4}", None),
                                              ("[[A]]", None), ("<answer>[[A]]</answer>", None)])
def test_a_held_out_verdict_is_the_strictly_higher_score(text, letter):
    assert grm.verdict(text) == letter


# ---- the prompt ----------------------------------------------------------------------------------------


def test_the_prompt_is_the_one_in_use_and_a_prompt_file_replaces_its_wording_alone():
    asked = grm.prompt(PAIR, "instruct")
    assert asked == pointwise.render_scoring(ASK, ["four", "five"])
    assert grm.prompt(PAIR, "plain", "mine") == [{"role": "system", "content": "mine"}, asked[1]]


def test_pairs_that_cannot_be_scored_are_refused():
    with pytest.raises(UserError, match="pair p"):
        grm.prompt(replace(PAIR, messages=ASK), "instruct")


# ---- held out, and the loop ----------------------------------------------------------------------------


class Scripted:
    """Answers every conversation by its text."""

    def __init__(self, answer):
        self.answer = answer

    def chat(self, conversations, n, temperature, max_tokens, seeds):
        assert (n, temperature) == (1, 0.0)
        return [[Reply(self.answer(c[-1]["content"]), "stop", 1, 1)] for c in conversations]


def judged(sampler, pairs, variant):
    return list(judge_pairs(sampler, pairs, "instruct", max_tokens=60, both_orders=True, prompt=variant.prompt,
                            read=variant.verdict))


@pytest.mark.parametrize(
    ("variant", "fair", "first"),
    [(grm, lambda a: "\\boxed{8, 3}" if a else "\\boxed{3, 8}", "\\boxed{9, 1}"),
     (rrm, lambda a: f"\\boxed{{Assistant {1 if a else 2}}}", "\\boxed{Assistant 1}")],
)
def test_held_out_pairs_are_judged_in_both_orders_by_the_judges_own_verdict(variant, fair, first):
    pairs = [replace(PAIR, pair_id="p1"), replace(swap(PAIR), pair_id="p2")]

    def four_is_first(text):
        return fair(text.index("four") < text.index("five"))

    seen = judged(Scripted(four_is_first), pairs, variant)
    assert [(j.pair_id, j.order, j.verdict, j.winner) for j in seen] == [
        ("p1", "AB", "A", "A"), ("p1", "BA", "B", "B"), ("p2", "AB", "B", "B"), ("p2", "BA", "A", "A")]
    assert tally(seen)["accuracy"] == tally(seen)["consistency"] == 1.0
    seen = judged(Scripted(lambda _: first), pairs, variant)
    assert [tally(seen)[name] for name in ("accuracy", "consistency", "share_a")] == [0.5, 0.0, 1.0]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """{form: folder} of small toy worlds."""
    root = tmp_path_factory.mktemp("worlds")
    files.build(Build(str(root / "cor"), sft_pairs=200, rl_pairs=24, held_out_pairs=6, sft_held_out_pairs=5))
    for form in ("scores", "boxed"):
        toy_forms.write(toy_forms.Config(str(root / "cor"), str(root / form), form))
    return {form: root / form for form in ("cor", "scores", "boxed")}


@pytest.mark.parametrize(("form", "variant"), [("scores", grm), ("boxed", rrm)])
def test_the_toys_other_forms_keep_pairs_chains_and_ids(worlds, form, variant):
    tokenizer, before = load_tokenizer(str(worlds[form] / "start")), load_tokenizer(str(worlds["cor"] / "start"))
    changed = {word for word, i in tokenizer.get_vocab().items() if before.get_vocab().get(word) != i}
    assert changed == set(toy_forms.WORDS) and len(tokenizer.get_vocab()) == len(before.get_vocab())
    unknown = tokenizer.convert_tokens_to_ids("<|unk|>")
    rows, cor = (load_pairs(str(worlds[f] / "sft.jsonl")) for f in (form, "cor"))
    for row, old in zip(rows, cor, strict=True):
        assert row.messages == tuple(variant.prompt(old, "instruct", SYSTEM))
        assert row.trace.partition("\\boxed")[0] == old.trace.partition("<answer>")[0]
        ids = encode_target(row, tokenizer)
        assert unknown not in encode_prompt(row.messages, tokenizer) + ids
        assert tokenizer.decode(ids[:-1]) == row.trace
        letter = variant.verdict(row.trace)
        assert letter is None or f"[[{letter}]]" in old.trace  # scores tie where the verdict was a coin
        assert form == "scores" or letter
    ties = sum(grm.verdict(row.trace) is None for row in rows)
    assert form == "boxed" or 0.15 < ties / len(rows) < 0.35
    for name in ("rl.jsonl", "held_out.jsonl", "prompt.txt", "start/model.safetensors"):
        assert (worlds[form] / name).read_bytes() == (worlds["cor"] / name).read_bytes()


def test_other_worlds_are_refused_and_the_same_is_kept(worlds, tmp_path, capsys):
    before = (worlds["scores"] / "sft.jsonl").stat().st_mtime_ns
    toy_forms.write(toy_forms.Config(str(worlds["cor"]), str(worlds["scores"]), "scores"))
    assert "already" in capsys.readouterr().out and (worlds["scores"] / "sft.jsonl").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="use another DIR"):
        toy_forms.write(toy_forms.Config(str(worlds["cor"]), str(worlds["scores"]), "boxed"))
    with pytest.raises(UserError, match="no world"):
        toy_forms.write(toy_forms.Config(str(tmp_path), str(tmp_path / "new")))


@pytest.mark.parametrize(("form", "variant"), [("scores", grm), ("boxed", rrm)])
def test_the_loop_runs_in_the_tiny_world_and_writes_its_evaluations(worlds, tmp_path, form, variant):
    """Two rounds from an untrained model: no scores come by chance, so that no group is too easy; a box may."""
    world, out = worlds[form], tmp_path / "run"
    cfg = replace(grpo.PRESETS["tiny"], model=f"{world}/start", data=f"{world}/rl.jsonl", out=str(out), steps=2,
                  held_out=f"{world}/held_out.jsonl", prompt_file=f"{world}/prompt.txt", prompts_per_step=4,
                  mini_batch=2, group_size=2, max_response_tokens=8)
    score, keep = (grm.grm_score, grm.not_too_easy) if variant is grm else (rrm.rrm_score, None)
    grpo.train(cfg, grpo.Method(variant.prompt, score, keep, verdict=variant.verdict))
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rewards = [row["reward/mean"] for row in metrics[:2]]
    assert rewards == [-1.0, -1.0] if variant is grm else all(-1.0 <= reward < 0 for reward in rewards)
    for step in (0, 2):
        rows = (out / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()
        assert [json.loads(row)["order"] for row in rows] == ["AB", "BA"] * 6
