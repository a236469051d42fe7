import contextlib
import types

import jax
import jax.numpy as jnp
import pytest

from loraplus_jax.cli.commands import main
from loraplus_jax.training import memory
from loraplus_jax.training.memory import check_memory, free_bytes

from ..messages import assert_mentions, mentions


def program(held):
    """A compiled program that holds so many bytes."""
    state = jax.ShapeDtypeStruct((held // 4,), jnp.float32)
    return jax.jit(lambda state: state + 1, donate_argnums=0).lower(state).compile()


@pytest.fixture(scope="module")
def programs():
    """Two that hold memory, and one that needs 4 MB in passing."""
    passing = jax.jit(lambda x: jnp.sort(jnp.outer(x, x), axis=0)[0]).lower(jnp.ones(1000)).compile()
    return {"4 MB": program(4_000_000), "8 MB": program(8_000_000), "passing": passing}


@pytest.mark.parametrize(
    ("free", "devices", "names", "fits"),
    [
        (4_010_000, 1, ["4 MB"], True),
        (3_990_000, 1, ["4 MB"], False),
        (8_020_000, 2, ["4 MB"], True),
        (7_980_000, 2, ["4 MB"], False),
        (5_000_000, 1, ["4 MB", "8 MB"], False),  # the larger program counts
        (7_000_000, 1, ["passing"], True),
        (7_000_000, 1, ["4 MB", "passing"], False),  # what one program holds stays while another runs
    ],
)
def test_what_does_not_fit_is_rejected_with_numbers(monkeypatch, programs, free, devices, names, fits):
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    rejected = pytest.raises(ValueError, match=mentions("GB", "cpu", "train.accumulate"))
    with contextlib.nullcontext() if fits else rejected:
        check_memory([programs[name] for name in names], jax.devices()[0], devices)


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
