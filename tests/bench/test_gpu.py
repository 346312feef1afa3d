"""The check for the first GPU runs on a CPU, line by line, without the packages that a bare machine lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from bench import gpu

BARE = """import runpy, sys
sys.modules.update(dict.fromkeys(["tyro", "datasets", "openai", "vllm", "matplotlib"]))  # their import fails
runpy.run_module("bench.gpu", run_name="__main__")"""


def test_every_part_passes_in_small_and_without_the_packages_of_a_full_set(tmp_path):
    command = [sys.executable, "-c", BARE, "--tiny", "--minutes", "15", "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, text=True, capture_output=True, timeout=900,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found) == [part.__name__ for part in gpu.PARTS] and all(part["ok"] for part in found.values())
    printed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert printed == [{"part": name} | part for name, part in found.items()]
    assert max(found["packed_policy"]["checkpointing=True"].values()) < 1e-5  # float32 on a CPU


def test_an_error_in_one_part_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def broken(at):
        raise ValueError("no such kernel")

    monkeypatch.setattr(gpu, "PARTS", (broken, gpu.machine))
    monkeypatch.setattr(gpu, "imitate_card", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--out", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert stopped.value.code == 1 and found["machine"]["ok"] and not found["broken"]["ok"]
    assert "no such kernel" in found["broken"]["error"] and "broken" in capsys.readouterr().out.splitlines()[-1]
