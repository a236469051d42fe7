"""The allocator of host memory: on a CPU, a step writes into the memory of the step before.

By default glibc gives large blocks back to the system, and every step faults in new pages. It can keep the blocks
of the main thread; the heaps of other threads hold no large ones.
"""

import ctypes
import sys

import jax


def run_on_main_thread() -> None:
    """Lets JAX run programs of one CPU device on the thread that calls them; call it before JAX has devices."""
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def keep_memory() -> None:
    """Keeps what was freed for later blocks, where the allocator is glibc's."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None:
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the end of the heap back
        mallopt(-4, 0)  # M_MMAP_MAX: no block in a mapping of its own
