"""The parts of `benchmarks/gpu.py` at a tiny size, on a CPU."""

import jax
import pytest


@pytest.mark.slow
def test_a_step_is_measured():
    import gpu

    found = gpu.measure_step("Llama-3.1-8B NF4, 4 x 2,048", True)
    assert found["compiled"] > 0
    assert found["seconds"] > 0
    assert found["kind"] == jax.devices()[0].device_kind


@pytest.mark.slow
def test_members_and_attention_are_measured():
    import gpu

    assert gpu.time_members(2, True)["seconds"] > 0
    assert gpu.time_attention(64, "blocked")["seconds"] > 0


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
