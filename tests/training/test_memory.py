import types

import jax
import jax.numpy as jnp
import pytest

from loraplus_jax.cli.commands import main
from loraplus_jax.training import memory
from loraplus_jax.training.memory import check_memory, free_bytes

from ..messages import assert_mentions, mentions


def program(held, passing):
    """A compiled program that holds so many bytes and needs so many more while it runs."""

    def f(state, x):
        return state + 1, jnp.sum(jnp.sin(x[None] * jnp.arange(passing // x.nbytes).reshape(-1, 1)))

    state = jax.ShapeDtypeStruct((held // 4,), jnp.float32)
    x = jnp.ones(1024)
    return jax.jit(f, donate_argnums=0).lower(state, x).compile()


def host(monkeypatch, free):
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)


def test_what_fits_passes_and_what_does_not_is_rejected_with_numbers(monkeypatch):
    small, device = program(held=4_000_000, passing=0), jax.devices()[0]
    host(monkeypatch, 4_010_000)
    check_memory([small], device, 1)
    host(monkeypatch, 3_990_000)
    with pytest.raises(ValueError, match=mentions("GB", "cpu", "train.accumulate")):
        check_memory([small], device, 1)
    host(monkeypatch, 8_020_000)
    check_memory([small], device, 2)
    host(monkeypatch, 7_980_000)
    with pytest.raises(ValueError, match=mentions("GB", "cpu")):
        check_memory([small], device, 2)


def test_the_larger_program_counts(monkeypatch):
    host(monkeypatch, 5_000_000)
    check_memory([program(4_000_000, 0)], jax.devices()[0], 1)
    with pytest.raises(ValueError, match=mentions("GB", "cpu")):
        check_memory([program(4_000_000, 0), program(8_000_000, 0)], jax.devices()[0], 1)


def test_what_one_program_holds_stays_while_another_runs(monkeypatch):
    many = (
        jax.jit(lambda x: jnp.sort(jnp.outer(x, x), axis=0)[0]).lower(jnp.ones(1000)).compile()
    )  # 4 MB in passing
    host(monkeypatch, 7_000_000)
    device = jax.devices()[0]
    check_memory([many], device, 1)
    check_memory([program(4_000_000, 0)], device, 1)
    with pytest.raises(ValueError, match=mentions("GB", "cpu")):
        check_memory([program(4_000_000, 0), many], device, 1)


def test_free_memory_of_an_accelerator_comes_from_its_own_statistics():
    stats = {"bytes_limit": 100, "bytes_in_use": 30}
    assert free_bytes(types.SimpleNamespace(memory_stats=lambda: stats)) == 70


def test_a_control_group_limits_what_is_free(tmp_path, monkeypatch):
    group = tmp_path / "job"
    group.mkdir()
    files = {"memory.max": "1000\n", "memory.current": "600\n", "memory.stat": "anon 1\ninactive_file 50\n"}
    for name, text in files.items():
        (group / name).write_text(text)
    (tmp_path / "membership").write_text("3:cpu:/\n0::/job\n")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "membership")
    cpu = jax.devices()[0]
    assert free_bytes(cpu) == 450
    (group / "memory.max").write_text("max\n")
    assert free_bytes(cpu) > 10**6


def test_out_of_memory_at_run_time_is_reported(monkeypatch, capsys):
    def exhausted(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr("loraplus_jax.inference.predict.evaluate_run", exhausted)
    assert main(["eval", "run"]) == 2
    assert_mentions(capsys.readouterr().err, "out of memory", "train.accumulate", "train.batch_size")
