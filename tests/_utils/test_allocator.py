"""The allocator of host memory: pages that fault, counted in a process of its own."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

CODE = """
import resource, sys
from loraplus_jax._utils.allocator import keep_memory, run_on_main_thread
run_on_main_thread()
import jax, jax.numpy as jnp
step = jax.jit(lambda x: jnp.sin(x))
x = jnp.ones(2**24)
with keep_memory():
    for _ in range(2):
        step(x).block_until_ready()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        step(x).block_until_ready()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_a_program_writes_into_the_memory_of_the_one_before():
    """Ten results of 64 MiB, which are 16,384 pages each: without it all of them fault."""
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, check=True)
    assert int(run.stdout) < 16384


RELEASED = """
import numpy as np, psutil
from loraplus_jax._utils.allocator import keep_memory, release_memory
resident = lambda: psutil.Process().memory_info().rss // 2**20
with keep_memory():
    blocks = [np.ones(2**23) for _ in range(4)]
    last = np.ones(1000)
    full = resident()
    del blocks
    kept = resident()
    release_memory()
    print(full - kept, full - resident())
    blocks = [np.ones(2**23) for _ in range(4)]
    last = np.ones(1000)
    del blocks
blocks = [np.ones(2**23) for _ in range(4)]
last = np.ones(1000)
full = resident()
del blocks
print(full - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_what_is_kept_is_given_back_between_programs():
    """256 MiB below a block that is in use; after the context, nothing is kept."""
    run = subprocess.run([sys.executable, "-c", RELEASED], capture_output=True, check=True)
    kept, released, after = map(int, run.stdout.split())
    assert kept < 64 < 200 < released
    assert after > 200
