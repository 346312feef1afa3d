"""The same seed in two fresh processes with other string hashes: the same bytes, times apart; another seed, others.

What is compared is the whole folder of each command: weights, resume states, metrics, traces, verdicts, chains.
The order of files and hash seeds of build_data is in test_build_data.py, that of a server's answers in test_distill.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from fake_server import answering
from survival_worker import Server, tree

from toy import oracle as toy_oracle


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Server]]:
    servers = [Server(PYTHONHASHSEED=seed) for seed in ("1", "2")]
    yield servers
    for server in servers:
        with server.process as process:
            process.stdin.close()


@pytest.fixture(scope="module")
def commands(world, verdicts) -> Iterator[dict[str, list[str]]]:
    """Command lines but for --out and --seed. The oracle is toy/'s, in this process."""
    model, prompt = ["--model", str(world / "start")], ["--prompt-file", str(world / "prompt.txt")]
    start = ["--model", str(verdicts / "start"), "--data", str(verdicts / "pairs.jsonl")]
    with answering(toy_oracle.make_server(toy_oracle.Serve(port=0))) as url:
        yield {
            "sft": ["--preset", "tiny", *model, *prompt, "--data", str(world / "sft.jsonl"), "--held-out",
                    str(world / "sft_held_out.jsonl"), *"--steps 3 --batch-size 4 --eval-every 2".split()],
            "grpo": ["--preset", "tiny", *start, "--held-out", str(verdicts / "held_out.jsonl"), "--prompt-file", "",
                     *"--steps 3 --prompts-per-step 4 --group-size 3 --mini-batch 2 --max-response-tokens 6".split(),
                     "--lr", "0.01"],
            "eval": ["run", *start, *"--sampler torch --max-tokens 6 --votes 3 --temperature 1".split()],
            "distill": ["--preset", "tiny", *prompt, "--data", str(world / "sft.jsonl"), "--base-url", url],
        }


@pytest.mark.parametrize("script", ["sft", "grpo", "eval", "distill"])
def test_a_seed_and_nothing_else_decides_every_byte(servers, commands, tmp_path, script):
    out = tmp_path / "out"

    def files(server: Server, seed: int) -> dict[str, str]:
        argv = [*commands[script], "--seed", str(seed), "--out", str(out)]
        reply = server(
            {"script": {"distill": "prepare.distill"}.get(script, script), "ranks": 1, "out": str(out), "argv": argv}
        )
        assert reply["codes"] == [0], reply["output"]
        found = tree(out)
        shutil.rmtree(out)
        return found

    first, second, other = files(servers[0], 0), files(servers[1], 0), files(servers[0], 1)
    assert first == second
    results = {"sft": "model/model.safetensors", "grpo": "model/model.safetensors", "eval": "judgements.jsonl",
               "distill": "traces.jsonl"}
    log = "metrics.jsonl" if script in ("sft", "grpo") else results[script]
    assert all(first[name] != other[name] for name in (results[script], log, "config.json"))
