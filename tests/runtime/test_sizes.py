"""What --dry-run says: counts, memory by hand, refusals, every preset and every recipe."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import subprocess
from pathlib import Path

import pytest
from tiny_models import make_config, make_lm
from transformers import AutoConfig

import grpo
import model
import sft
from ops import head
from runtime import cli, ranks, sizes, states
from runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.sh"))
SCRIPTS = {"sft.py": sft, "grpo.py": grpo}
SHAPES = {size: sizes.read_shape(f"Qwen/Qwen2.5-{size}-Instruct") for size in ("0.5B", "1.5B", "7B", "14B", "32B")}


def paper(**changes) -> grpo.Config:
    return dataclasses.replace(grpo.Config(), **changes)


# ---- the model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, total", [("0.5B", 494_032_768), ("1.5B", 1_543_714_304), ("7B", 7_615_616_512),
                                         ("14B", 14_770_033_664), ("32B", 32_763_876_352)])
def test_parameters_are_those_that_the_authors_publish(size, total):
    assert SHAPES[size].total == total


@pytest.mark.parametrize("tied", (True, False))
def test_a_tied_head_counts_once(tied):
    found, lm = sizes.shape_of(make_config("qwen3", tied)), make_lm("qwen3", tied)
    assert found.total == sum(p.numel() for p in lm.parameters())
    assert found.head == (0 if tied else lm.lm_head.weight.numel())


def test_an_untested_architecture_is_refused(tmp_path):
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"gpt2.*tested"):
        sizes.read_shape(str(tmp_path))


def test_a_shape_comes_from_a_folder_a_run_or_a_preset(tmp_path):
    make_config("qwen3").save_pretrained(tmp_path / "plain")
    make_config("llama").save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "config.json").write_text('{"preset": "tiny"}')
    assert sizes.read_shape(str(tmp_path / "plain")) == sizes.shape_of(make_config("qwen3"))
    assert sizes.read_shape(str(tmp_path / "run")) == sizes.shape_of(make_config("llama"))
    assert sizes.read_shape("deepseek-ai/DeepSeek-R1-Distill-Qwen-14B") == SHAPES["14B"]


def test_a_missing_shape_says_what_to_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"preset": "tiny", "model": "runs/x"}')  # nothing exported yet
    for path in ("runs/nowhere", "nobody/nothing", "run"):
        with pytest.raises(UserError, match=rf"^{path}.*--model"):
            sizes.read_shape(path)


# ---- memory by hand ------------------------------------------------------------------------------------


def test_training_memory_of_the_7b_on_eight_gpus_by_hand():
    """18 bytes a parameter over 8 ranks are 17.1 GB; the rest as in the docstring, in GB."""
    got = sizes.training_memory(paper(), SHAPES["7B"], 8)
    n, layer, head = 7.615616512, 0.233057792, 0.544997376
    one_layer = 2 * (2 * 3584 + 2 * 3584 + 2 * 512 + 4 * 18944) + 6 * 2 * 3584  # bytes a token
    assert got == pytest.approx({
        "weights": 4 * n / 8, "optimiser": 8 * n / 8, "reference": 2 * n / 8, "gradients": 4 * n / 8 + 4 * layer,
        "gathered": 2 * (2 * layer + 2 * head), "activations": 16384e-9 * (28 * 2 * 3584 + one_layer + 2 * 2 * 18944),
        "head": 2 * head + 2 * 16384 * 3584e-9, "engine": 1.5, "CUDA": 2.0,
    })


@pytest.mark.parametrize("size, ranks, simulated", [("7B", 8, 30.64), ("14B", 8, 52.78), ("32B", 32, 45.22)])
def test_training_memory_is_that_of_a_simulation_with_fake_tensors(size, ranks, simulated):
    """The peak of two micro-batches of 16,384 tokens under FSDP2 on a fake process group, in GB."""
    got = sizes.training_memory(paper(), SHAPES[size], ranks)
    assert sum(got.values()) - got["engine"] - got["CUDA"] == pytest.approx(simulated, rel=0.02)


def test_a_small_model_peaks_in_the_backward_pass_of_its_head():
    got = sizes.training_memory(grpo.PRESETS["one-gpu"], SHAPES["0.5B"], 1)
    head = 151936 * 896e-9
    assert got["head"] == pytest.approx(12 * (2**27 // 151936) * 151936e-9 + 4 * head + 4 * 8192 * 896e-9)


def test_sampling_memory_of_the_14b_by_hand():
    cfg, n = paper(tp=2, engine_memory=0.4), 14.770033664
    got = sizes.sampling_memory(cfg, SHAPES["14B"], 16, 80.0)
    assert got == pytest.approx({
        "weights": 4 * n / 16, "optimiser": 8 * n / 16, "reference": 2 * n / 16,
        "sync": 2 * 0.77856768 * 17 / 16, "engine": 32.0, "CUDA": 2.0,
    })
    host = sizes.sampling_memory(dataclasses.replace(cfg, offload_optimizer=True), SHAPES["14B"], 16, 80.0)
    assert host == got | {"optimiser": 0.0}
    room = 0.4 * 80 - 3.0 - 2 * n / 2
    assert sizes.engine_tokens(cfg, SHAPES["14B"], 0.4, 80.0) == int(room * 1e9 / (2 * 48 * 4 * 128 * 2))


@pytest.mark.parametrize("size, tp, kib", [("7B", 1, 56), ("32B", 4, 64), ("7B", 4, 14), ("7B", 28, 14)])
def test_kv_cache_of_a_token(size, tp, kib):
    """A head is never cut: more GPUs than key/value heads hold copies."""
    assert sizes.kv_bytes(SHAPES[size], 2, tp) == kib * 1024


def test_storage_by_hand():
    got = sizes.storage(paper(offload_optimizer=True), SHAPES["32B"], 32)  # 8.2 GB of moments a GPU: 2^33 are 8.6
    assert got == pytest.approx({
        "moments": 8 * 2**33 / 1e9, "state": 16 * (2**30 / 1e9 + 4 * 0.77856768 / 32),
        "export": 4 * 32.763876352 + 4.294967296,
    })
    assert sizes.storage(sft.Config(), SHAPES["7B"], 8)["moments"] == 0


def test_constants_are_those_of_the_files_they_describe():
    assert head.CHUNK["cuda"] == sizes.CHUNK
    assert states.FILE_BYTES == sizes.STATE_FILE
    assert inspect.signature(model.save_hf).parameters["shard_bytes"].default == sizes.EXPORT_FILE


def test_what_a_stage_or_a_sampler_does_not_have_needs_nothing():
    """And batch.split lets a sequence over the budget stand alone, so a small budget does not save its activations."""
    first, cfg = sizes.training_memory(sft.Config(), SHAPES["7B"], 8), paper(sampler="torch", sampler_dtype="float32")
    assert first["reference"] == first["engine"] == 0 and first["optimiser"] == pytest.approx(8 * 7.615616512 / 8)
    assert sizes.training_memory(cfg, SHAPES["7B"], 64)["engine"] == pytest.approx(4 * 7.615616512)  # a whole copy
    assert sizes.sampling_memory(cfg, SHAPES["7B"], 64, 80.0)["engine"] > 4 * 7.615616512
    assert sizes.longest_row(paper(micro_batch_tokens=100)) == 12288 and sizes.longest_row(paper()) == 16384


# ---- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg, ranks, words", [
    (paper(prompts_per_step=1000), 8, ("--prompts-per-step 1000", "--mini-batch 128")),
    (paper(mini_batch=64), 48, ("--mini-batch 64", "48 GPUs")),
    (paper(tp=4), 2, ("2 GPUs", "--tp 4")),
    (paper(tp=8), 8, ("28 attention heads", "--tp 8")),
    (paper(shard_ranks=3), 8, ("8 GPUs", "--shard-ranks 3")),
    (paper(shard_ranks=-1), 8, ("8 GPUs", "--shard-ranks -1")),
    (paper(tp=2, sampler="torch"), 8, ("--tp 2", "--sampler torch")),
    (dataclasses.replace(sft.Config(), batch_size=100), 8, ("--batch-size 100", "8 GPUs")),
])
def test_sizes_that_do_not_divide_are_both_named(cfg, ranks, words):
    with pytest.raises(UserError) as caught:
        sizes.refuse(cfg, SHAPES["7B"], ranks)
    assert all(word in str(caught.value) for word in words)


def test_tensor_parallel_rules_of_the_engine():
    """Key/value heads divide by tp, or tp by them: then they are copied."""
    for widths, tp, word in (((12, 6, 64), 4, "6 key/value heads"), ((8, 4, 60), 8, "intermediate size 60")):
        shape = dataclasses.replace(SHAPES["7B"], **dict(zip(("heads", "kv_heads", "inner"), widths, strict=True)))
        with pytest.raises(UserError, match=f"{word} and --tp {tp} do not divide"):
            sizes.refuse(paper(tp=tp), shape, 8)
    sizes.refuse(paper(tp=4), dataclasses.replace(shape, heads=8, kv_heads=2, inner=64), 8)


@pytest.mark.parametrize("size, cfg, ranks, gpu_gb, words", [
    ("32B", paper(tp=4), 8, 80.0, ("training", "optimiser with 32.8", "more GPUs")),
    ("32B", paper(tp=4, engine_memory=0.9), 32, 80.0, ("sampling", "engine with 72.0", "--offload-optimizer")),
    ("32B", paper(), 32, 80.0, ("--engine-memory 0.7", "65.5 GB", "--tp (now 1)")),
    ("7B", paper(micro_batch_tokens=131072), 8, 80.0, ("training", "activations", "--micro-batch-tokens")),
    ("7B", paper(checkpointing=False), 8, 80.0, ("training needs 131.6", "activations", "--checkpointing")),
    ("14B", paper(shard_ranks=2), 8, 80.0, ("training", "--shard-ranks")),
])
def test_a_layout_that_does_not_fit_names_its_largest_part_and_the_way_out(size, cfg, ranks, gpu_gb, words):
    with pytest.raises(UserError) as caught:
        sizes.refuse_layout(cfg, SHAPES[size], ranks, gpu_gb)
    assert all(word in str(caught.value) for word in words), caught.value


# ---- --dry-run -----------------------------------------------------------------------------------------


def write_config(folder: Path, size: str) -> None:
    widths = zip(sizes.WIDTHS, sizes.QWEN2[f"Qwen/Qwen2.5-{size}-Instruct"], strict=True)
    AutoConfig.for_model("qwen2", **dict(widths)).save_pretrained(folder)


def dry_run(script: str, argv: list[str]) -> None:
    module = SCRIPTS[script]
    module.train(cli.parse(module.Config, module.PRESETS, argv))


REFUSED = {  # on eight cards of 80 GB
    "paper-32b": "training needs", "paper-32b-reasoning": "training needs", "paper-32b-instruct": "training needs",
    "small": "do not divide",
}


@pytest.mark.parametrize("script, preset", [(s, p) for s, m in SCRIPTS.items() for p in m.PRESETS])
def test_every_preset_says_what_it_needs_on_eight_gpus(script, preset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "check_hardware", lambda preset: pytest.fail("a dry run needs no GPU"))
    monkeypatch.setattr(ranks, "join_ranks", lambda: pytest.fail("a dry run joins no ranks"))
    cfg = SCRIPTS[script].PRESETS[preset]
    if cfg.model.startswith("runs/"):
        found = re.search(r"\d+b", preset)
        write_config(tmp_path / cfg.model, found[0].upper() if found else "0.5B")
    if cfg.prompt_file:
        (tmp_path / cfg.prompt_file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / cfg.prompt_file).write_text("Judge.")
    if preset in REFUSED and (script, preset) != ("sft.py", "small"):
        with pytest.raises(UserError, match=REFUSED[preset]):
            dry_run(script, ["--preset", preset, "--dry-run", "8"])
        assert ("DOES NOT FIT" in capsys.readouterr().out) == (preset != "small")  # first printed, then refused
        return
    dry_run(script, ["--preset", preset, "--dry-run", "8"])
    out = capsys.readouterr().out
    assert out.startswith(f"{preset}: {cfg.model} on 8 x 80 GB") and "fits" in out
    assert not (tmp_path / cfg.out).exists()
    rows = [line.split() for line in out.splitlines()]
    table = {row[0]: [float(x) for x in row[1:3] if x != "fits"] for row in rows
             if len(row) > 1 and re.fullmatch(r"\d+\.\d", row[1])}
    for k, peak in enumerate(table["peak"]):  # the columns add up
        parts = [column[k] for name, column in table.items() if name != "peak"]
        assert sum(parts) == pytest.approx(peak, abs=0.05 * len(parts))


# ---- recipes -------------------------------------------------------------------------------------------


def commands(recipe: Path, tmp_path: Path, *argv: str, **environment: str) -> list[tuple[str, list[str], int]]:
    """(script, its arguments, GPUs) of every command of a recipe, run by bash with stand-ins that only take notes."""
    notes = tmp_path / "notes"
    for name in ("python", "torchrun"):
        stand_in = tmp_path / "bin" / name
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.write_text(f"#!/bin/sh\nprintf '%s\\n' {name} \"$@\" END >> '{notes}'\n")
        stand_in.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"} | environment
    subprocess.run(["bash", str(recipe), *argv], env=env, check=True, timeout=60)
    found = []
    for words in (part.split("\n") for part in notes.read_text().removesuffix("END\n").split("END\n")):
        place = next(i for i, word in enumerate(words) if word.endswith(".py"))
        launch = dict(word.split("=", 1) for word in words[1:place])
        gpus = int(launch.get("--nnodes", 1)) * int(launch.get("--nproc_per_node", 1))
        found.append((words[place], [word for word in words[place + 1 :] if word], gpus))
    notes.unlink()
    return found


def rehearse(recipe: Path, size: str, gpu_gb: str, tmp_path: Path, monkeypatch, *argv: str, **env: str) -> list:
    """Dry-run each command in turn, in an empty folder; what stage 1 would export is put in its place."""
    monkeypatch.chdir(tmp_path)
    made = []
    for script, arguments, gpus in commands(recipe, tmp_path, *argv, **env):
        arguments = [*arguments, "--dry-run", str(gpus), "--gpu-gb", gpu_gb]
        dry_run(script, arguments)
        cfg = cli.parse(SCRIPTS[script].Config, SCRIPTS[script].PRESETS, arguments)
        write_config(tmp_path / cfg.out / "model", size)
        made.append((script, cfg, gpus))
    return made


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs_and_fits_the_hardware_that_its_header_wants(recipe, tmp_path, monkeypatch):
    text = recipe.read_text(encoding="utf-8")
    assert "\nset -euo pipefail\n" in text
    header = " ".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    nodes, cards, gpu_gb, host = re.search(
        r"Hardware: (?:(\d) nodes? of )?(\d) x (\d+) GB.*? (\d+) GB of host", header
    ).groups()
    size = recipe.stem.split("-")[0].upper() if recipe.stem != "one-gpu" else "0.5B"
    made = rehearse(recipe, size, gpu_gb, tmp_path, monkeypatch)
    assert [script for script, _, _ in made] == (["grpo.py"] if "distilled" in recipe.stem else ["sft.py", "grpo.py"])
    for _, cfg, gpus in made:
        assert gpus == int(nodes or 1) * int(cards)
        need = sizes.storage(cfg, SHAPES[size], gpus)
        assert need["moments"] + max(need["state"], need["export"]) <= float(host)
        assert cfg.preset == "one-gpu" or cfg.preset.startswith(f"paper-{size.lower()}")


def test_the_one_gpu_recipe_hands_over_and_takes_a_larger_model(tmp_path, monkeypatch):
    assert grpo.PRESETS["one-gpu"].model == sft.PRESETS["one-gpu"].out
    recipe, larger = ROOT / "recipes" / "one-gpu.sh", "Qwen/Qwen2.5-1.5B-Instruct"
    made = rehearse(recipe, "1.5B", "48", tmp_path, monkeypatch, larger)
    assert made[1][1].model == made[0][1].out == "runs/one-gpu/Qwen2.5-1.5B-Instruct/sft"
    with pytest.raises(UserError, match="training needs"):
        rehearse(recipe, "1.5B", "24", tmp_path, monkeypatch, larger)
