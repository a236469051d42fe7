"""Compiler options by platform, and the persistent cache of compiled programs."""

import contextlib
import io
import os
import subprocess
import sys
import types
import warnings

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from rich.console import Console

from loraplus_jax.training.xla import compiler_options, one_thread_per_device, use_compilation_cache

from ..messages import assert_mentions


@pytest.fixture
def cache(tmp_path, no_own_cache):
    """A cache directory with two entries."""
    directory = tmp_path / "xla"
    directory.mkdir()
    for name in ("jit_step-0a-cache", "jit_evaluate-0b-cache"):
        (directory / name).write_text("program")
    return directory


def test_a_damaged_entry_is_reported_and_removed(cache):
    text = io.StringIO()
    with use_compilation_cache(Console(file=text, width=300), is_on=True):
        assert jax.config.values["jax_compilation_cache_dir"] == str(cache)
        assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] == 0  # small programs too
        warnings.warn(
            "Error reading persistent compilation cache entry for 'jit_step': cut short", stacklevel=1
        )
    assert [path.name for path in cache.iterdir()] == ["jit_evaluate-0b-cache"]
    assert_mentions(text.getvalue(), cache, "jit_step", "cut short")


def test_other_warnings_are_printed_and_nothing_is_removed(cache):
    text = io.StringIO()
    with use_compilation_cache(Console(file=text, width=300), is_on=True):
        warnings.warn("something else", stacklevel=1)
        assert text.getvalue() == "something else\n"  # not at the end of a run of hours
    assert len(list(cache.iterdir())) == 2


def test_a_cache_is_used_until_its_context_ends(tmp_path, no_own_cache):
    """JAX opens one only once by itself."""

    def compile_for(size):
        jax.jit(lambda x: x + size).lower(np.float32(size)).compile()

    def state():
        return jax.config.values["jax_compilation_cache_dir"], warnings.filters[:], warnings.showwarning

    with config_options({"jax_enable_compilation_cache": True}):
        compile_for(1)
        before = state()
        with contextlib.suppress(ZeroDivisionError), use_compilation_cache(Console(), is_on=True):
            compile_for(2)
            raise ZeroDivisionError
        assert state() == before
        compile_for(3)
        assert len([*(tmp_path / "xla").glob("*-cache")]) == 1


def test_a_user_s_cache_stays_as_it_is_unless_it_is_switched_off(tmp_path):
    options = {"jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 2.0}
    with config_options(options):
        for is_on in (True, False):
            with use_compilation_cache(Console(), is_on=is_on):
                assert jax.config.values["jax_compilation_cache_dir"] == (str(tmp_path) if is_on else None)
                assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] == 2


@contextlib.contextmanager
def config_options(options):
    before = {name: jax.config.values[name] for name in options}
    for values in (options, before):
        for name, value in values.items():
            jax.config.update(name, value)
        reset_cache()
        if values is options:
            yield


RESTORED = """
import os
import jax
from loraplus_jax.training.xla import restore_platforms
with restore_platforms("NEW", "OLD"):
    jax.config.update("jax_platforms", "cpu")
    os.environ.update(NEW="1", OLD="1")
    assert len(jax.devices()) == 1
assert jax.config.jax_platforms is None and os.environ["OLD"] == "0" and "NEW" not in os.environ
jax.config.update("jax_num_cpu_devices", 3)  # an error once JAX has devices
assert len(jax.devices()) == 3
with restore_platforms():
    jax.config.update("jax_platforms", "cpu")
    array = jax.numpy.ones(3)
assert array.sum() == 3
"""


@pytest.mark.slow
def test_a_process_that_has_planned_finds_its_devices_anew():
    dropped = "JAX_PLATFORMS", "XLA_FLAGS"
    environment = {name: value for name, value in os.environ.items() if name not in dropped} | {"OLD": "0"}
    subprocess.run([sys.executable, "-c", RESTORED], env=environment, check=True)


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
