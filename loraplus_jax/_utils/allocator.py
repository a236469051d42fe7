"""The allocator of host memory: on a CPU, a step writes into the memory of the step before.

By default glibc gives large blocks back to the system, and every step faults in new pages. It can keep the blocks
of the main thread; the heaps of other threads hold no large ones. What a compiler or another program leaves behind
would be kept too, so between programs it is given back.
"""

import ctypes
import sys

import jax


def run_on_main_thread() -> None:
    """Lets JAX run programs of one CPU device on the thread that calls them; call it before JAX has devices."""
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def keep_memory() -> None:
    """Keeps what was freed for later blocks, where the allocator is glibc's."""
    if libc := _glibc():
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the end of the heap back
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block in a mapping of its own


def release_memory() -> None:
    """Gives all free pages back to the system, where the allocator is glibc's."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if libc is not None and hasattr(libc, "malloc_trim") else None
