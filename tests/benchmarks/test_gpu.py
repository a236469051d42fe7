"""`benchmarks/gpu.py` at a tiny size, on a CPU."""

import json
import os
import subprocess
import sys
import time

import pytest


@pytest.fixture(autouse=True)
def end(monkeypatch):
    """Time for processes."""
    monkeypatch.setenv("BENCHMARK_END", str(time.time() + 300))


def run_script(benchmarks, results, *words):
    environment = os.environ | {"BENCHMARK_RESULTS": str(results), "XLA_FLAGS": ""}
    words = [sys.executable, str(benchmarks / "gpu.py"), *words]
    return subprocess.run(words, capture_output=True, text=True, env=environment)


@pytest.mark.long
def test_all_parts(benchmarks, tmp_path):
    run = run_script(benchmarks, tmp_path, "--tiny", "--minutes", "60")  # a busy machine is slow
    assert run.returncode == 0, run.stderr
    found = {file.stem: json.loads(file.read_text())["rows"] for file in tmp_path.iterdir()}
    assert found.keys() == {
        f"gpu_tiny_{part}" for part in ("plan", "attention", "population", "peft", "quantized")
    }
    assert not any("failed" in row for rows in found.values() for row in rows)
    for row in found["gpu_tiny_plan"]:
        # On a CPU, the plan's own compilation is that of the device.
        assert row["planned, GB"] == row["compiled, GB"] != "-"
        assert float(row["step, s"]) > 0
    assert len(found["gpu_tiny_plan"]) == 3
    assert [row["members"] for row in found["gpu_tiny_population"]] == ["1", "4"]
    assert float(found["gpu_tiny_attention"][0]["blocked, ms"]) > 0
    assert {"here"} <= {row["run"] for row in found["gpu_tiny_peft"]}
    assert {"nf4", "int8"} <= {row["run"] for row in found["gpu_tiny_quantized"]}


@pytest.mark.slow
def test_without_a_gpu_nothing_is_written(benchmarks, tmp_path):
    run = run_script(benchmarks, tmp_path)
    assert run.returncode == 2
    assert "no NVIDIA GPU" in run.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_process_ends_with_the_time(monkeypatch):
    import gpu

    monkeypatch.setenv("BENCHMARK_END", "0")
    assert gpu.in_process("device_kind") == {"failed": "no time left"}


def test_rows_name_what_failed_and_a_kind_without_a_plan(monkeypatch):
    import gpu

    asked = []

    def in_process(function, *arguments, **environment):
        asked.append((function, environment))
        return {
            "measure_step": {"compiled": 3e9, "peak": None, "seconds": 0.5, "kind": "some GPU"},
            "plan_without": {},
            "time_members": {"failed": "out of memory"},
        }[function]

    monkeypatch.setattr(gpu, "in_process", in_process)
    row = gpu.compare_plan("a case", True)
    assert (row["planned, GB"], row["compiled, GB"], row["step, s"]) == ("-", "3.00", "0.500")
    assert asked == [("measure_step", {}), ("plan_without", {"JAX_PLATFORMS": "cpu"})]
    assert {row["failed"] for row in gpu.population_part(True)} == {"out of memory"}
    assert gpu.plan_without("SmolLM2-135M, 8 x 2,048", True, "some GPU") == {}


@pytest.mark.slow
def test_a_failed_process_gives_the_last_line_of_its_errors():
    import gpu

    assert "no such case" in gpu.in_process("measure_step", "no such case", True)["failed"]
