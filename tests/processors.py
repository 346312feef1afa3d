"""Runs the tests that compare numbers once for each kind of processor that torch, MKL and oneDNN can imitate.

`make test-processors`: two runs at a time, one line per run, exit code 1 if any of them fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SETTINGS = ["OMP_NUM_THREADS=1", "OMP_NUM_THREADS=2", "ATEN_CPU_CAPABILITY=default", "ATEN_CPU_CAPABILITY=avx2",
            "ATEN_CPU_CAPABILITY=avx512", "MKL_CBWR=COMPATIBLE", "MKL_CBWR=AVX2", "ONEDNN_MAX_CPU_ISA=SSE41",
            "ONEDNN_MAX_CPU_ISA=AVX2"]


def is_possible(setting: str) -> bool:
    """AVX-512 cannot be imitated: without it in the processor the run would end in an illegal instruction."""
    cpuinfo = Path("/proc/cpuinfo")
    return "avx512" not in setting or (cpuinfo.exists() and "avx512f" in cpuinfo.read_text())


def passes(setting: str) -> bool:
    name, _, value = setting.partition("=")
    command = [sys.executable, "-m", "pytest", "-m", "numeric and not slow", "-p", "no:cacheprovider"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", name: value}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip()
    print(f"{setting}:", said.splitlines()[-1] if done.returncode == 0 else f"FAILED\n{said[-5000:]}", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(passes, filter(is_possible, SETTINGS)))
    sys.exit(0 if all(results) else 1)
