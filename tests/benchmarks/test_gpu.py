"""`benchmarks/gpu.py` at a tiny size, on a CPU."""

import json
import os
import subprocess
import sys

import pytest


def run_script(benchmarks, results, *words):
    environment = os.environ | {"BENCHMARK_RESULTS": str(results), "XLA_FLAGS": ""}
    words = [sys.executable, str(benchmarks / "gpu.py"), *words]
    return subprocess.run(words, capture_output=True, text=True, env=environment)


@pytest.mark.long
def test_a_plan_on_a_cpu_is_what_its_compiler_says(benchmarks, tmp_path):
    run = run_script(benchmarks, tmp_path, "--tiny")
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "gpu_tiny.json").read_text())["rows"]
    assert len(rows) == 3
    for row in rows:
        assert row["planned, GB"] == row["compiled, GB"] != "-"
        assert float(row["step, s"]) > 0


@pytest.mark.slow
def test_without_a_gpu_nothing_is_written(benchmarks, tmp_path):
    run = run_script(benchmarks, tmp_path)
    assert run.returncode == 2
    assert "no NVIDIA GPU" in run.stderr
    assert not list(tmp_path.iterdir())
