"""The allocator of host memory: on a CPU, a step writes into the memory of the step before.

By default glibc gives large blocks back to the system, and every step faults in new pages. It can keep the blocks
of the main thread; the heaps of other threads hold no large ones. What a compiler or another program leaves behind
would be kept too, so between programs it is given back.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import jax

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
DEFAULTS = {M_TRIM_THRESHOLD: 2**17, M_MMAP_MAX: 2**16}
"""glibc's defaults, as `mallopt` cannot read them back."""


def run_on_main_thread() -> None:
    """Lets JAX run programs of one CPU device on the thread that calls them; call it before JAX has devices."""
    jax.config.update("jax_cpu_enable_async_dispatch", False)


@contextmanager
def keep_memory() -> Iterator[None]:
    """Keeps what is freed for later blocks until the context ends, where JAX computes on a CPU and glibc allocates.

    Where other devices compute, the host should not keep the weights.
    """
    libc = _glibc() if jax.default_backend() == "cpu" else None
    if libc is None:
        yield
        return
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # never give the end of the heap back
    libc.mallopt(M_MMAP_MAX, 0)  # no block in a mapping of its own
    try:
        yield
    finally:
        for option, default in DEFAULTS.items():
            libc.mallopt(option, default)
        release_memory()


def release_memory() -> None:
    """Gives all free pages back to the system, where the allocator is glibc's."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if libc is not None and hasattr(libc, "malloc_trim") else None
