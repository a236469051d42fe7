"""Reuse of freed memory, by page faults of a program whose temporaries take 96 MB; whether there is only a CPU."""

import os
import resource
import subprocess
import sys

import pytest

from loraplus_jax.host_memory import only_cpu

BYTES = 24 * 4 * 1000**2
CODE = f"""
import resource
from loraplus_jax.host_memory import keep_freed_memory
if KEEP and not keep_freed_memory():
    raise SystemExit("no glibc")
import jax
import jax.numpy as jnp
run = jax.jit(lambda x: jnp.sum(jnp.concatenate([x] * 24)[::-1] @ x[:, :8]))
x = jnp.ones((1000, 1000))
assert run.lower(x).compile().memory_analysis().temp_size_in_bytes >= {BYTES}
faults = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults)[6])
"""


def median_faults(keep: bool) -> float:
    run = subprocess.run(
        [sys.executable, "-c", CODE.replace("KEEP", str(keep))],
        capture_output=True,
        text=True,
        # glibc's huge pages would make few faults of many.
        env={**os.environ, "JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": ""},
    )
    if run.stderr.endswith("no glibc\n"):
        pytest.skip("needs glibc")
    return float(run.stdout)


@pytest.mark.slow
def test_kept_memory_is_not_faulted_in_again():
    pages = BYTES / resource.getpagesize()
    assert median_faults(keep=False) > 0.9 * pages
    assert median_faults(keep=True) < 0.05 * pages


@pytest.mark.parametrize(
    ("platforms", "installed", "expected"),
    [
        ("cpu", ["libtpu"], True),
        ("cuda,cpu", [], False),
        ("", [], True),
        ("", ["jax_plugins"], False),
        (None, ["libtpu"], False),
    ],
)
def test_only_cpu_by_jax_platforms_then_by_what_is_installed(monkeypatch, platforms, installed, expected):
    monkeypatch.setattr("loraplus_jax.host_memory.find_spec", lambda name: name in installed)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if platforms is not None:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert only_cpu() is expected
