"""A model carries how it is asked: what is written, what is taken from it, what a flag changes, what is said."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_models import make_folder, make_lm, make_tokenizer

from loading.judge_file import Asked, about, card, how_to_ask
from loading.templates import set_arguments
from loading.tokenizer import load_tokenizer
from model import Policy, save_hf
from runtime.errors import UserError

CFG = SimpleNamespace(model="org/base", data="pairs.jsonl")


def judge(path: Path, **changes) -> str:
    """An exported judge of style plain."""
    asked = Asked(**{"style": "plain", "wording": "Judge. {data}", "max_tokens": 60} | changes)
    save_hf(Policy(make_lm()), make_tokenizer(), path / "model",
            judge=about(CFG, asked, {"data": "d", "model": "m"}))
    return str(path)


def test_an_export_says_how_it_is_asked_and_where_it_came_from(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template += "{# strftime_now enable_thinking #}"
    set_arguments(tokenizer, {"enable_thinking": False})
    judge = about(CFG, Asked("plain", max_tokens=60), {"data": "d"})
    save_hf(Policy(make_lm()), tokenizer, tmp_path / "model", judge=judge)
    found = json.loads((tmp_path / "model/judge.json").read_text())
    assert found["template_args"] == {"date": "2024-07-26", "enable_thinking": False}
    assert (found["style"], found["wording"], found["max_tokens"]) == ("plain", None, 60)
    assert found["base"] == "org/base" and found["data"] == "pairs.jsonl" and found["digests"] == {"data": "d"}
    assert load_tokenizer(str(tmp_path)).template_args == found["template_args"]


def test_an_export_has_a_model_card(tmp_path, monkeypatch):
    page = Path(judge(tmp_path), "model/README.md").read_text()
    assert page.startswith("---\n") and "\nbase_model: org/base\n---\n" in page
    for said in ("`pairs.jsonl`", "style `plain`, at most\n60 tokens, template arguments `{}`", "    Judge. {data}\n",
                 "<answer>[[A]]</answer>", "    python "):
        assert said in page
    monkeypatch.chdir(tmp_path)
    Path("runs/sft").mkdir(parents=True)
    other = about(SimpleNamespace(model="runs/sft", data="d"), Asked(), {}, card)
    assert about(CFG, Asked(), {}, partial(card))["prompt"] == "partial", "a callable without code"
    page = card(other | {"template_args": {}})
    assert "base_model" not in page and "judge_file.py" in page and "[[A]]" not in page, "a prompt of another file"


def test_a_judge_is_asked_as_it_was_trained(tmp_path, capsys):
    run = judge(tmp_path)
    for path in (run, f"{run}/model"):
        assert how_to_ask(path) == Asked("plain", "Judge. {data}", 60, {})
    assert how_to_ask(f"{run}/model", served=True) == Asked("plain", "Judge. {data}", 60, {})
    assert capsys.readouterr().err == "", "nothing to say"


@pytest.mark.parametrize("given, wanted, said", [
    ({"style": "plain"}, Asked("plain", "Judge. {data}", 60), ""),
    ({"wording": "Judge. {data}"}, Asked("plain", "Judge. {data}", 60), ""),
    ({"max_tokens": 9}, Asked("plain", "Judge. {data}", 9), ""),
    ({"wording": "Other {data}"}, Asked("plain", "Other {data}", 60), "--prompt-file"),
    ({"wording": ""}, Asked("plain", "", 60), "--prompt-file"),
    ({"style": "instruct"}, Asked("instruct", None, 60), "--style"),
    ({"style": "rubrics", "wording": "Mine"}, Asked("rubrics", "Mine", 60), "--style"),
    ({"template_args": ("a=1",)}, Asked("plain", "Judge. {data}", 60, {"a": 1}), "--template-args")])
def test_a_flag_that_differs_wins_and_is_said(tmp_path, capsys, given, wanted, said):
    assert how_to_ask(judge(tmp_path), **given) == wanted
    lines = capsys.readouterr().err.splitlines()
    assert (said in lines[0]) if said else not lines


def test_a_folder_without_the_file_gets_the_defaults_and_that_is_said(tmp_path, capsys):
    folder = make_folder(tmp_path, make_lm())
    assert how_to_ask(folder) == Asked("instruct", None, 2048, {})
    said = capsys.readouterr().err
    assert "no judge.json" in said and "their authors' wording: docs/judge.md" in said
    assert how_to_ask(folder, style="plain", default=Asked("reasoning")).style == "plain"
    assert how_to_ask(folder, default=Asked("reasoning", max_tokens=9)) == Asked("reasoning", max_tokens=9)
    assert how_to_ask("a-served-name", served=True) == Asked()


def test_the_documented_command_finds_the_wording_of_a_published_checkpoint(tmp_path):
    command = re.search(r"python (-c \".*\") > rm-r1.txt", Path("docs/judge.md").read_text())[1]
    shown = "\n\n".join(f"[The Start of {x}]\n{x}\n[The End of {x}]" for x in ("A's Response", "B's Response"))
    text = f"Judge. \n\n[Client Question]\nwhy [1]?\n\n{shown}\n\nVerdict."
    row = {"context_messages": [{"role": "user", "content": text}], "winner": "model_a"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    command = command.replace("gaotang/RM-R1-after-Distill-RLVR", str(tmp_path / "rows.jsonl"))
    found = subprocess.run(f"{sys.executable} {command}", shell=True, capture_output=True, text=True, check=True)
    assert found.stdout == "Judge. \n\n{data}\n\nVerdict.\n"


def test_an_unfinished_runs_model_is_said(tmp_path, capsys):
    run = judge(tmp_path)
    (tmp_path / "config.json").write_text('{"steps": 10}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n{"step": 3}\n')
    how_to_ask(run)
    assert "4 of 10 steps" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')
    how_to_ask(run)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", ["[]", "{", '{"style": 3}', '{"style": "plain", "wording": 1, "max_tokens": 3}',
                                     '{"style": "plain", "max_tokens": 3, "template_args": {}}',
                                     '{"style": "plain", "wording": null, "max_tokens": -3, "template_args": {}}'])
def test_a_file_that_says_nothing_usable_is_refused(tmp_path, content):
    run = judge(tmp_path)
    (tmp_path / "model/judge.json").write_text(content)
    with pytest.raises(UserError, match=r"judge\.json"):
        how_to_ask(run)


# ---- what training takes from it -----------------------------------------------------------------------


def parse(*argv: str):
    import grpo
    from runtime import cli

    return cli.parse(grpo.Config, grpo.PRESETS, ["--preset", "tiny", *argv])


def test_training_goes_on_as_the_model_was_trained(tmp_path, capsys):
    from runtime.cli import read_prompt

    cfg = parse("--model", judge(tmp_path))
    assert cfg.style == "plain" and read_prompt(cfg.prompt_file) == "Judge. {data}"
    assert (cfg.steps, cfg.lr) == (120, 3e-4), "nothing else"
    builtin = parse("--model", judge(tmp_path / "built-in", wording=None))
    assert builtin.style == "plain" and read_prompt(builtin.prompt_file) is None
    assert capsys.readouterr().err == ""


def test_a_training_flag_that_differs_wins_and_is_said(tmp_path, capsys):
    run, text = judge(tmp_path), tmp_path / "prompt.txt"
    text.write_text("Mine {data}\n")
    cfg = parse("--model", run, "--prompt-file", str(text))
    assert (cfg.style, cfg.prompt_file) == ("plain", str(text))
    assert "--prompt-file" in capsys.readouterr().err
    cfg = parse("--model", run, "--style=instruct")
    assert (cfg.style, cfg.prompt_file) == ("instruct", "")
    assert "--style" in capsys.readouterr().err


def test_training_from_a_folder_without_the_file_keeps_the_presets_settings(tmp_path, capsys, monkeypatch):
    from settings import GRPO_PRESETS

    monkeypatch.chdir(tmp_path)
    prompt = Path(GRPO_PRESETS["tiny"].prompt_file)
    prompt.parent.mkdir(parents=True)
    prompt.write_text("judge\n")
    cfg = parse("--model", make_folder(tmp_path / "plain", make_lm()))
    assert (cfg.style, cfg.prompt_file) == ("instruct", str(prompt))
    assert "no judge.json: style instruct, the wording of --prompt-file" in capsys.readouterr().err


def test_distillation_asks_an_oracle_as_it_was_trained(tmp_path):
    from prepare import distill
    from runtime import cli

    run = judge(tmp_path)
    cfg = cli.parse(distill.Config, distill.PRESETS, ["--model", run, "--data", "x", "--out", "y"])
    assert (cfg.style, cli.read_prompt(cfg.prompt_file), cfg.max_tokens) == ("plain", "Judge. {data}", 60)
    cfg = cli.parse(distill.Config, distill.PRESETS, ["--model", run, "--data", "x", "--out", "y", "--max-tokens", "9"])
    assert cfg.max_tokens == 9


def test_a_judge_with_a_prompt_of_its_own_is_not_taken_for_ours(tmp_path, capsys):
    from cor_prompt import render
    from variants import rrm

    assert about(CFG, Asked(), {}, render)["prompt"] == "cor_prompt"
    save_hf(Policy(make_lm()), make_tokenizer(), tmp_path / "model", judge=about(CFG, Asked(), {}, rrm.prompt))
    how_to_ask(str(tmp_path))
    assert "rrm.py" in capsys.readouterr().err
