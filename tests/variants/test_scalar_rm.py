"""The scalar baseline: its loss by hand and by finite differences, packing against plain forwards, the
exported folder in transformers, and the model as a judge."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import exact_norms, logged, make_config, make_lm, make_tokenizer

import eval as evaluation
from data import Pair, load_pairs, save_pairs, swap
from evaluation.outcomes import read_log, read_scores, score_rows
from judging import scalar
from judging.pointwise import judge_scalar
from judging.scalar import ScalarModel, encode_reply, load_scalar
from runtime.errors import UserError
from variants import scalar_rm
from variants.scalar_rm import Scorer, load_scorer, pack

pytestmark = pytest.mark.numeric


def small(world: Path, out: Path, **changes) -> scalar_rm.Config:
    base = dataclasses.replace(
        scalar_rm.PRESETS["tiny"], model=str(world / "start"), data=str(world / "rl.jsonl"), out=str(out),
        held_out=str(world / "held_out.jsonl"), batch_size=6, steps=5, eval_every=2, save_every=1, lr=1e-2)
    return dataclasses.replace(base, **changes)


def groups_of(world: Path, cfg: scalar_rm.Config) -> list:
    return scalar_rm.encode_pairs(load_pairs(cfg.data), scalar.load_tokenizer(cfg.model), cfg)


def loaded(world: Path, seed: int = 1) -> Scorer:
    """float64 throughout, and a head that is not zero."""
    scorer = load_scorer(str(world / "start"), torch.float64)
    exact_norms(scorer.lm)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.nn.init.normal_(scorer.lm.score.weight)
    return scorer


# ---- the loss ------------------------------------------------------------------------------------------


def test_pair_losses_by_hand():
    losses = scalar_rm.pair_losses(torch.tensor([2.0, 1.0, 0.0, 0.0, -1.0, 1.0]))
    # log(1 + e^-1), log 2, log(1 + e^2)
    assert losses.tolist() == pytest.approx([0.313262, 0.693147, 2.126928], abs=1e-6)


def test_T13_an_empty_micro_batch_gives_no_loss_and_still_a_gradient():
    score = torch.tensor([3.0], requires_grad=True)
    scalar_rm.pair_losses(score).sum().backward()
    assert scalar_rm.pair_losses(score).shape == (0,) and score.grad.tolist() == [0.0]


def test_T3_T12_packed_pairs_equal_a_plain_loop_in_loss_and_gradients_for_any_plan(world, tmp_path):
    """Each response by itself through transformers' own classifier, without packing, mask or shared start."""
    from transformers import AutoModelForSequenceClassification

    scorer, cfg = loaded(world), small(world, tmp_path)
    pairs, tokenizer = load_pairs(cfg.data)[:6], scalar.load_tokenizer(cfg.model)
    plain = AutoModelForSequenceClassification.from_config(scorer.lm.config, attn_implementation="sdpa").double()
    exact_norms(plain).load_state_dict(scorer.lm.state_dict())
    total = torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        texts = (pair.response_a, pair.response_b) if pair.winner == "A" else (pair.response_b, pair.response_a)
        won, lost = (plain(torch.tensor([encode_reply(pair.context, t, tokenizer)])).logits[0, 0] for t in texts)
        total = total + torch.log1p(torch.exp(lost - won))
    (total / 6).backward()
    for budget in (60, 130, 4096):
        scorer.zero_grad()
        wide = dataclasses.replace(cfg, micro_batch_tokens=budget)
        summed, count = scalar_rm.bt_loss(scorer, [pack(p, tokenizer) for p in pairs], wide, backward=True)
        assert count == 6 and summed == pytest.approx(total.item(), abs=1e-9)
        for name, parameter in plain.named_parameters():
            assert torch.allclose(scorer.lm.get_parameter(name).grad, parameter.grad, atol=1e-9), (budget, name)


def test_the_winner_comes_first_wherever_it_stands(world):
    tokenizer, pair = scalar.load_tokenizer(str(world / "start")), load_pairs(str(world / "rl.jsonl"))[0]
    group = pack(pair, tokenizer)
    assert group == pack(swap(pair), tokenizer)
    best = pair.response_a if pair.winner == "A" else pair.response_b
    assert group.prompt_ids + group.responses[0][:-1] == encode_reply(pair.context, best, tokenizer)


def test_pairs_that_do_not_fit_a_micro_batch_are_left_out_and_counted(world, tmp_path, capsys):
    cfg = small(world, tmp_path)
    sizes = sorted(scalar_rm.group_tokens(g) for g in groups_of(world, cfg))
    assert sizes[0] < sizes[-1]
    for changes in ({"max_length": sizes[0]}, {"micro_batch_tokens": sizes[0]}):
        kept = groups_of(world, dataclasses.replace(cfg, **changes))
        assert len(kept) == sizes.count(sizes[0])
        assert f"{24 - len(kept)} of 24 pairs exceed the lesser of" in capsys.readouterr().out
    with pytest.raises(UserError, match="fits the lesser of"):
        groups_of(world, dataclasses.replace(cfg, max_length=3))


# ---- training ------------------------------------------------------------------------------------------


def test_the_first_loss_is_log_2_and_it_falls(world, tmp_path):
    scalar_rm.train(small(world, tmp_path / "run", steps=30, save_every=100, eval_every=100))
    losses = [row["train/loss"] for row in logged(tmp_path / "run")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert sum(losses[-5:]) / 5 < 0.6


# ---- the exported folder -------------------------------------------------------------------------------


def test_transformers_loads_the_export_as_it_is_and_gives_the_same_scores(world, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    scalar_rm.train(small(world, tmp_path / "run", steps=3))
    folder = tmp_path / "run" / "model"
    lm, info = AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True, use_safetensors=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(lm).__name__ == "LlamaForSequenceClassification" and lm.config.num_labels == 1
    assert not list(folder.glob("*.bin"))
    judge, tokenizer = load_scalar(str(tmp_path / "run")), AutoTokenizer.from_pretrained(folder)
    pairs = load_pairs(str(world / "held_out.jsonl"))[:3]
    turns = [[*p.context, {"role": "assistant", "content": p.response_a}] for p in pairs]
    batch = tokenizer.apply_chat_template(turns, return_tensors="pt", padding=True, return_dict=True)
    with torch.no_grad():  # as a user of transformers would: a padded batch
        together = lm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    assert together.std() > 1e-4
    alone = [judge.score(p.context, p.response_a) for p in pairs]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)


def test_a_pad_token_that_ends_turns_is_not_exported_as_padding(tmp_path):
    """transformers scores the last token that is not padding: a turn's own end would be skipped."""
    lm = make_lm("qwen2", tied=True)
    for pad, kept in ((2, None), (3, 3)):
        lm.config.pad_token_id = pad
        lm.save_pretrained(tmp_path / str(pad))
        assert load_scorer(str(tmp_path / str(pad)), torch.float32).lm.config.pad_token_id == kept


@pytest.mark.parametrize("first", ["full_attention", "sliding_attention"])
def test_architectures_that_packing_was_not_tested_with_are_refused(tmp_path, first):
    lm = make_lm("qwen2")
    lm.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    changes = {"use_sliding_window": True, "sliding_window": 4, "layer_types": [first, "sliding_attention"]}
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match="windowed"):
        load_scorer(str(tmp_path), torch.float32)


# ---- the model as a judge ------------------------------------------------------------------------------


def test_T15_no_text_becomes_a_control_token(any_tokenizer):
    calm = encode_reply(({"role": "user", "content": "the question"},), "the answer", any_tokenizer)
    turns = [{"role": "user", "content": "the question"}, {"role": "assistant", "content": "the answer"}]
    expected = any_tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert calm == expected
    control = set(any_tokenizer.added_tokens_decoder)
    tokens = "".join(token.content for token in any_tokenizer.added_tokens_decoder.values())
    hostile = encode_reply(({"role": "user", "content": tokens},), f"the answer {tokens}", any_tokenizer)
    assert [i for i in hostile if i in control] == [i for i in calm if i in control]


def folder_of(path: Path, **changes) -> str:
    from transformers import AutoModelForSequenceClassification

    config = make_config("llama", pad_token_id=3, num_labels=changes.pop("num_labels", 1))
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    written = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(written | changes))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_labels": 2}, "gives 2 numbers for a response"),
        ({"auto_map": {"AutoModelForSequenceClassification": "rm.Custom"}}, "code from its folder"),
        ({"model_type": "internlm2"}, "not an architecture of transformers"),
    ],
)
def test_models_of_another_kind_are_refused_in_one_line(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        load_scalar(folder_of(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_a_language_model_is_not_loaded_with_a_random_head(tmp_path):
    make_lm("llama", num_labels=1).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no scalar reward model \(LlamaForCausalLM\)"):
        load_scalar(str(tmp_path))
    written = json.loads((tmp_path / "config.json").read_text())
    changed = written | {"architectures": ["LlamaForSequenceClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"1 weights are missing, score.weight among them"):
        load_scalar(str(tmp_path))


class Known(ScalarModel):
    """Scores from a table; counts the calls."""

    def __init__(self, scores: dict[str, float | None]):
        super().__init__(None, None, 100)
        self.scores, self.asked = scores, []

    def score(self, context, response):
        self.asked.append(response)
        return self.scores[response]


def pair_of(name: str, a: str, b: str, winner="A") -> Pair:
    return Pair(name, "test", ({"role": "user", "content": "q"},), a, b, winner)


def test_scores_become_verdicts_in_both_orders():
    judge = Known({"good": 1.5, "bad": -0.25, "same": 1.5, "long": None})
    pairs = [pair_of("0", "good", "bad"), pair_of("1", "good", "bad", "B"), pair_of("2", "good", "same"),
             pair_of("3", "good", "long")]
    seen = list(judge_scalar(judge.score, pairs, both_orders=True))
    assert [(j.order, j.verdict, j.winner, j.correct) for j in seen] == [
        ("AB", "A", "A", True), ("BA", "B", "B", True),
        ("AB", "A", "B", False), ("BA", "B", "A", False),
        ("AB", None, "A", False), ("BA", None, "B", False),
        ("AB", None, "A", False), ("BA", None, "B", False),
    ]
    assert [j.finish_reason for j in seen] == ["stop"] * 6 + ["length"] * 2
    assert [j.text for j in seen[:3]] == ["A 1.5 B -0.25 [[A]]", "A -0.25 B 1.5 [[B]]", "A 1.5 B -0.25 [[A]]"]
    assert [read_scores(j.text) for j in seen[3:6]] == [(-0.25, 1.5), (1.5, 1.5), (1.5, 1.5)]
    assert judge.asked == ["good", "bad", "good", "bad", "good", "same", "good", "long"]
    done = {("test", "0", "AB"), ("test", "1", "AB"), ("test", "1", "BA")}
    assert [(j.pair_id, j.order) for j in judge_scalar(judge.score, pairs[:2], True, done)] == [("0", "BA")]


def test_a_response_goes_through_the_model_once():
    calls = []

    class Lm(torch.nn.Linear):
        def forward(self, input_ids):
            calls.append(input_ids.shape)
            return SimpleNamespace(logits=torch.tensor([[float(input_ids.sum())]]))

    judge = ScalarModel(Lm(1, 1), make_tokenizer(), context=12)
    context = ({"role": "user", "content": "w1 w2"},)
    first = [judge.score(context, "w3"), judge.score(context, "w4"), judge.score(context, "w3")]
    assert first[0] == first[2] != first[1] and len(calls) == 2
    assert judge.score(context, "w3 " * 12) is None and len(calls) == 2


def test_ready_made_prompts_are_refused():
    pair = Pair("p", "s", (), "", "", "A", messages=({"role": "user", "content": "judge"},))
    with pytest.raises(UserError, match="ready-made prompt holds no responses"):
        list(judge_scalar(Known({}).score, [pair]))


def test_eval_logs_scores_like_verdicts_and_continues_without_asking_again(tmp_path):
    pairs = [pair_of("0", "good", "bad"), pair_of("1", "good", "bad", "B"), pair_of("2", "good", "same")]
    (tmp_path / "pairs.jsonl").write_text(save_pairs(pairs))
    judge = Known({"good": 1.5, "bad": -0.25, "same": 1.5})
    cfg = evaluation.Run(model="scores", data=str(tmp_path / "pairs.jsonl"), out=str(tmp_path / "out"),
                         both_orders=True, scalar=True)
    summary = evaluation.evaluate(cfg, judge)
    assert summary["overall"]["accuracy"] == pytest.approx(1 / 3)  # right, wrong, and a tie is wrong
    assert summary["overall"]["consistency"] == pytest.approx(2 / 3)
    assert summary["overall"]["verdict_rate"] == pytest.approx(2 / 3)
    log, asked = tmp_path / "out" / "judgements.jsonl", len(judge.asked)
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:-1]) + "\n")
    assert evaluation.evaluate(cfg, judge) == summary and judge.asked[asked:] == ["good", "same"]
    rows = read_log([str(tmp_path / "out")])
    tables = [score_rows("pairs", rows, compat)["table"] for compat in ("none", "official")]
    assert tables[0] == tables[1]  # the official parser reads the same verdicts out of the text


@pytest.mark.parametrize("change", [{"votes": 3, "temperature": 1.0}, {"max_tokens": (4, 8)},
                                    {"base_url": "http://localhost:1/v1"}, {"prompt_file": "p.txt"}])
def test_eval_refuses_settings_that_scores_do_not_have(tmp_path, change):
    cfg = evaluation.Run(model="m", data="d.jsonl", out=str(tmp_path / "out"), scalar=True, **change)
    with pytest.raises(UserError, match="--scalar: scores have no"):
        evaluation.evaluate(cfg)
