"""XLA: compiler options, and the persistent cache of compiled programs."""

import contextlib
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax._src import xla_bridge  # no public function says whether JAX has devices yet
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.extend.backend import clear_backends
from jax.sharding import Mesh
from rich.console import Console

from ..data.fetch import cache_dir


def check_options() -> None:
    """Raises ValueError for an option of JAX with which no training step compiles or runs."""
    for name, needed in (("jax_disable_jit", "False"), ("jax_numpy_dtype_promotion", "standard")):
        if (value := str(getattr(jax.config, name))) != needed:
            raise ValueError(
                f"{name} must be {needed}, got {value}; training runs compiled programs of mixed dtypes: leave "
                f"{name.upper()} unset"
            )


def compiler_options(mesh: Mesh, *, unrolled: bool) -> dict[str, Any] | None:
    """Options for a training step on TPUs with a loop over layers; None otherwise."""
    # They let one all-gather of a weight serve both recomputation and gradient. By default XLA gathers again if
    # many operations are in between, such as attention for q, k and v. With unrolled layers, the options would
    # keep every layer's weights from the forward to the backward pass.
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    return {"xla_tpu_spmd_threshold_for_allgather_cse": 10**6} if on_tpu and not unrolled else None


def one_thread_per_device(mesh: Mesh) -> dict[str, Any] | None:
    """Options for programs without communication where every core is a CPU device of its own; None otherwise."""
    # They compute on the device's own thread. By default all CPU devices share one pool of threads and wait for it.
    devices = mesh.local_devices
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    is_one_each = devices[0].platform == "cpu" and 1 < cores <= len(devices)
    return {"xla_cpu_multi_thread_eigen": False} if is_one_each else None


class ProgramByShape:
    """A program for each shape of a batch, which is the last argument and has a column `weight`.

    Attributes:
      programs: the compiled programs, by the shape of `weight`.
    """

    def __init__(self, compile_for: Callable[[Any], Any], batch: Any) -> None:
        """Compiles `compile_for(batch)` for these shapes, and for others when the first such batch comes."""
        self._compile_for = compile_for
        self.programs = {batch["weight"].shape: compile_for(batch)}

    def __call__(self, *args: Any) -> Any:
        """Calls the program for the batch."""
        batch = args[-1]
        if (shape := batch["weight"].shape) not in self.programs:
            shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
            self.programs[shape] = self._compile_for(shapes)
        return self.programs[shape](*args)

    @property
    def largest(self) -> Any:
        """The program of the largest batch."""
        return self.programs[max(self.programs)]


@contextmanager
def use_compilation_cache(console: Console, *, is_on: bool) -> Iterator[None]:
    """Caches compiled programs; prints warnings when they come, and removes damaged entries.

    Args:
      console: where to print.
      is_on: `train.compilation_cache`. If true, the cache is the one that the user set JAX to, otherwise one in
        `cache_dir`; if false, there is none.
    """
    before: dict[str, Any] = {name: jax.config.values[name] for name in (_DIRECTORY, _LEAST_SECONDS)}
    options = dict(before)
    if not is_on:
        options[_DIRECTORY] = None
    elif not before[_DIRECTORY]:
        # By default only programs that take a second; a start compiles dozens of small ones, together as slow.
        options = {_DIRECTORY: str(cache_dir() / "xla"), _LEAST_SECONDS: 0.0}
    directory = Path(options[_DIRECTORY] or "")

    def show(message: Warning | str, *_: Any) -> None:
        entry = re.search(r"persistent compilation cache entry for '(.*?)'", str(message))
        console.print(f"{directory}: {message}" if entry else f"{message}")
        # JAX warns at every start about an entry that a full disk truncated, and never replaces it.
        for path in directory.glob(f"{entry[1]}-*-cache") if entry else ():
            with contextlib.suppress(OSError):
                path.unlink()

    try:
        _set_cache(options)
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = show
            yield
    finally:
        _set_cache(before)


_DIRECTORY = "jax_compilation_cache_dir"
_LEAST_SECONDS = "jax_persistent_cache_min_compile_time_secs"


def _set_cache(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
    reset_cache()  # JAX opens a cache once; this makes it forget the one before


@contextmanager
def restore_platforms(*variables: str) -> Iterator[None]:
    """Restores at its end which platforms JAX may use, with environment variables that it read.

    If JAX had no devices before, it has none after, and looks for them again.
    """
    environment = {name: os.environ.get(name) for name in variables}
    platforms = jax.config.values["jax_platforms"]
    had_devices = xla_bridge.backends_are_initialized()
    try:
        yield
    finally:
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        jax.config.update("jax_platforms", platforms)
        if not had_devices:
            clear_backends()
