"""The C library's allocator, for programs that XLA runs on a CPU."""

import ctypes
import os
import sys
from importlib.util import find_spec

# Options of glibc's mallopt(3), and their values.
_KEEP = {
    -8: 1,  # M_ARENA_MAX: other arenas than the main one map every block above 64 MB
    -4: 0,  # M_MMAP_MAX: map no block
    -1: -1,  # M_TRIM_THRESHOLD: give nothing back
}


def keep_freed_memory() -> bool:
    """Makes the process reuse large blocks of memory that it has freed, and returns whether it does.

    XLA on a CPU allocates and frees the temporaries of a program in every call. glibc maps blocks above 32 MB anew
    each time, so each step page-faults all its activations, on one thread. The peak hardly changes, but the process
    gives no memory back before it ends.

    Call it before the first JAX computation: a thread stays with the arena it started with. Returns False where the
    C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and all(mallopt(option, value) for option, value in _KEEP.items())


def only_cpu() -> bool:
    """Whether JAX can only run on the CPU here, by `JAX_PLATFORMS` and the installed plugins; starts no backend."""
    platforms = os.environ.get("JAX_PLATFORMS")
    return platforms == "cpu" if platforms else not any(map(find_spec, ("jax_plugins", "libtpu")))
