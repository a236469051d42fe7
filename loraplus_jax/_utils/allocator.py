"""The allocator of host memory, which programs on a CPU use too."""

import ctypes
import sys

import jax


def keep_memory() -> None:
    """Lets a program on a CPU write into the memory of the one before it; call it before JAX has devices.

    Otherwise glibc gives large blocks back to the system, and their pages fault anew in every step.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None:
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the end of the heap back
        mallopt(-4, 0)  # M_MMAP_MAX: no block in a mapping of its own
    # The heaps of other threads hold no large blocks, so programs run on the main thread.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
