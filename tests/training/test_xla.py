"""Compiler options by platform, and the persistent cache of compiled programs."""

import io
import os
import types
import warnings

import jax
import numpy as np
import pytest
from rich.console import Console

from loraplus_jax.training.xla import compiler_options, one_thread_per_device, use_compilation_cache

from ..messages import assert_mentions


@pytest.fixture
def cache(tmp_path):
    """A cache directory with two entries; JAX's own setting is restored."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: jax.config.values[name] for name in names}
    for name in ("jit_step-0a-cache", "jit_evaluate-0b-cache"):
        (tmp_path / name).write_text("program")
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_damaged_entry_is_reported_and_removed(cache):
    text = io.StringIO()
    with use_compilation_cache(cache, Console(file=text, width=300)):
        assert jax.config.values["jax_compilation_cache_dir"] == str(cache)
        assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] == 0  # small programs too
        warnings.warn(
            "Error reading persistent compilation cache entry for 'jit_step': cut short", stacklevel=1
        )
    assert [path.name for path in cache.iterdir()] == ["jit_evaluate-0b-cache"]
    assert_mentions(text.getvalue(), cache, "jit_step", "cut short")


def test_other_warnings_are_printed_and_nothing_is_removed(cache):
    text = io.StringIO()
    with use_compilation_cache(cache, Console(file=text, width=300)):
        warnings.warn("something else", stacklevel=1)
        assert text.getvalue() == "something else\n"  # not at the end of a run of hours
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    ("platform", "unrolled", "some"), [("cpu", False, False), ("tpu", True, False), ("tpu", False, True)]
)
def test_options_are_only_for_loops_on_tpus(platform, unrolled, some):
    mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform)]))
    assert (compiler_options(mesh, unrolled=unrolled) is not None) == some  # pyright: ignore


@pytest.mark.parametrize(
    ("platform", "devices", "cores", "some"),
    [("cpu", 4, 4, True), ("cpu", 2, 4, False), ("cpu", 1, 1, False), ("gpu", 4, 4, False)],
)
def test_only_as_many_cpu_devices_as_cores_compute_with_one_thread(
    monkeypatch, platform, devices, cores, some
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    mesh = types.SimpleNamespace(local_devices=[types.SimpleNamespace(platform=platform)] * devices)
    assert (one_thread_per_device(mesh) is not None) == some  # pyright: ignore
