"""Pages of prose: links lead somewhere, commands exist and run, examples of code work."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock, call

import pytest
import torch
from transformers import AutoConfig

import grpo
import sft
from data import Pair
from loading.folder import TESTED
from rollout import Rollout
from runtime import cli

ROOT = Path(__file__).resolve().parent.parent
README, DOCS = ROOT / "README.md", sorted((ROOT / "docs").glob("*.md"))
PAGES = [page for folder in (".", "docs", "course", "course/assignments", "recipes/miniature", "recipes/real")
         for page in sorted((ROOT / folder).glob("*.md"))]
named = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Headings as GitHub names them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@named
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http:", "https:")):
            continue
        name, _, heading = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        assert found.exists(), f"{page}: {target}"
        assert not heading or heading in anchors(found), f"{page}: no heading {target}"


def test_every_page_is_linked_from_the_readme_or_from_a_page():
    linked = {(page.parent / target.partition("#")[0]).resolve() for page in PAGES
              for target in re.findall(r"\]\(([^)\s]+)\)", prose(page))}
    assert not [page.name for page in DOCS if page not in linked]


def test_the_readme_stays_short():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1500


def commands(page: Path) -> list[tuple[Path, list[str]]]:
    """(script, its words) of every `python x.py`, `python -m a.b` and `torchrun ... x.py` in code, fenced or not."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", prose(page))
    found = []
    for line in lines:
        if not re.match(r"\$?\s*(python|torchrun) ", line):
            continue
        words = shlex.split(line.lstrip("$ "), comments=True)
        for k, word in enumerate(words):
            script = ROOT / (word.replace(".", "/") + ".py" if words[k - 1] == "-m" else word)
            if words[k - 1] == "-m" and (ROOT / word / "__main__.py").is_file():
                script = ROOT / word / "__main__.py"
            if k and word != words[0] and script.suffix == ".py" and (words[k - 1] == "-m" or word.endswith(".py")):
                found.append((script, words[k + 1 :]))
                break
    return found


@named
def test_commands_name_scripts_and_flags_that_exist(page):
    for script, words in commands(page):
        assert script.is_file(), f"{page}: {script}"
        sources = script.read_text(encoding="utf-8")
        for module in re.findall(r"^\s*from ([\w.]+) import .*", sources, re.MULTILINE):  # a variant's flags are grpo's
            other = ROOT / (module.replace(".", "/") + ".py")
            sources += other.read_text(encoding="utf-8") if other.is_file() else ""
        if re.search(r"^import (grpo|sft)$", sources, re.MULTILINE):
            sources += "".join(
                (ROOT / name).read_text(encoding="utf-8") for name in ("grpo.py", "sft.py", "settings.py")
            )
        for word in words:
            if word.startswith("--") and word != "--help":
                flag = word.lstrip("-").partition("=")[0]
                field = re.search(rf"^    {flag.replace('-', '_')}: |\"--{flag}\"", sources, re.MULTILINE)
                assert field, f"{page}: {script.name} has no {word}"


def test_a_wrong_flag_or_script_would_be_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```\n$ python sft.py --presett tiny\npython -m variants.nothing --seed 1\n```\n"
                    "and `torchrun -x 2 grpo.py --lr 1`")
    scripts = [(script.name, words) for script, words in commands(page)]
    assert scripts == [("sft.py", ["--presett", "tiny"]), ("nothing.py", ["--seed", "1"]), ("grpo.py", ["--lr", "1"])]
    with pytest.raises(AssertionError, match="presett"):
        test_commands_name_scripts_and_flags_that_exist(page)


@named
def test_make_targets_exist(page):
    targets = re.findall(r"^([\w-]+)(?: [\w-]+)*:(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    targets += (ROOT / "course" / "student" / "Makefile").read_text(encoding="utf-8").split()  # `pack:` and others
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"^make ([\w-]+)|`make ([\w-]+)[^`]*`", text, re.MULTILINE):
        name = "".join(target)
        assert name in targets or f"{name}:" in targets, f"{page}: make {name}"


TRAINING = [(page.name, script, words) for page in [README, *DOCS] for script, words in commands(page)
            if script in (ROOT / "sft.py", ROOT / "grpo.py") and words and "--help" not in words and "..." not in words]


@pytest.mark.parametrize("page, script, words", TRAINING, ids=lambda part: getattr(part, "stem", None))
def test_training_commands_are_rehearsed(page, script, words, tmp_path, monkeypatch):
    """A dry run of each command: flags and values are read, and the sizes fit each other and the cards."""
    monkeypatch.chdir(tmp_path)
    module = {"sft": sft, "grpo": grpo}[script.stem]
    words = words if "--dry-run" in words else [*words, "--dry-run", "2" if "tiny" in words else "8"]
    cfg = cli.parse(module.Config, module.PRESETS, words)
    if cfg.model.startswith("runs/"):
        AutoConfig.for_model("qwen2", hidden_size=896, num_hidden_layers=24).save_pretrained(tmp_path / cfg.model)
    module.train(cfg)


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    """A folder that stands for `runs/`: the tiny world with a judge after 300 steps, under the names of the demo."""
    runs = tmp_path_factory.mktemp("runs")
    toy = runs / "toy"
    run(f"-m toy build {toy}".split())
    files = f"--data {toy}/sft.jsonl --held-out {toy}/sft_held_out.jsonl --prompt-file {toy}/prompt.txt"
    run(f"sft.py --preset tiny --model {toy}/start {files} --steps 300 --out {toy}/sft".split())
    (toy / "grpo").symlink_to("sft")
    return runs


def run(words: list[str]) -> str:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=600,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"{words}: {done.stderr[-2000:]}"
    return done.stdout


QUICK = [(page, script, words) for page in [README, *DOCS] for script, words in commands(page)
         if script.stem in ("judge", "eval", "probes") and any(word.startswith("runs/toy") for word in words)
         and not {"--scalar", "runs/probes/grpo"} & set(words)  # these need what another command makes
         and page.name != "judge.md"]  # that page shows errors and servers too


@pytest.mark.slow
@pytest.mark.parametrize("page, script, words", QUICK, ids=lambda part: getattr(part, "stem", None))
def test_commands_on_the_demos_judge_run(page, script, words, small_world, tmp_path):
    named = " ".join(script.relative_to(ROOT).with_suffix("").parts).replace(" ", ".")
    words = [re.sub(r"^runs/(?!toy)", f"{tmp_path}/", word).replace("runs/toy/curve", f"{tmp_path}/curve")
             .replace("runs/toy", f"{small_world}/toy") for word in words]
    assert run(["-m", named, *words])


def test_every_logged_metric_is_explained():
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    sources = "".join((ROOT / name).read_text(encoding="utf-8")
                      for name in ("grpo.py", "sft.py", "rollout.py", "runtime/metrics.py"))
    kinds = "reward|rollout|policy|sync|optim|train|eval|tokens|compile"
    logged = set(re.findall(rf'"((?:{kinds})/[\w]+)"', sources))
    assert len(logged) > 15 and not {name for name in logged if name not in page}


def test_the_page_names_every_family_of_models():
    page = (ROOT / "docs" / "change-it.md").read_text(encoding="utf-8").lower().replace(" ", "")
    assert not [family for family in TESTED if family not in page]


def test_the_example_of_another_reward_works():
    """docs/change-it.md: a right response of half the budget gets 1 - 0.05, a wrong one of the whole -1 - 0.1."""
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "change-it.md").read_text(encoding="utf-8"), re.DOTALL)
    names = {"__name__": "page"}
    exec(compile(code, "docs/change-it.md", "exec"), names)
    cfg = grpo.PRESETS["tiny"]
    budget = cfg.max_response_tokens
    rollouts = [Rollout([1], [2] * length, [0.0] * length, f"<answer>[[{letter}]]</answer>", "stop", 0)
                for length, letter in [(budget // 2, "A"), (budget, "B")]]
    rewards = names["score"](rollouts, [Pair("p", "", (), "", "", "A")], None, None, cfg)
    torch.testing.assert_close(rewards, torch.tensor([[0.95, -1.1]]))


def test_metrics_can_be_sent_elsewhere(tmp_path, monkeypatch):
    """docs/metrics.md: both examples send every number of a log, at its step."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward/mean": 0.5}\n{"step": 1, "reward/mean": 0.75}\n')
    board, wandb = MagicMock(), MagicMock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(sys, "argv", ["send.py", str(tmp_path)])
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        exec(compile(block, "docs/metrics.md", "exec"), {})
    scalars = board.SummaryWriter.return_value.__enter__.return_value.add_scalar
    assert call("reward/mean", 0.75, 1) in scalars.call_args_list
    assert call({"step": 1, "reward/mean": 0.75}, step=1) in wandb.log.call_args_list


def test_diffs_on_a_page_are_lines_of_the_exercises():
    patches = [patch.read_text(encoding="utf-8").splitlines() for patch in ROOT.glob("course/exercises/*.patch")]
    blocks = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "change-it.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) > 2
    for block in blocks:
        assert any(set(block.splitlines()) <= set(patch) for patch in patches), block
