"""XLA: compiler options, and the persistent cache of compiled programs."""

import contextlib
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console


def compiler_options(mesh: Mesh, *, unrolled: bool) -> dict[str, Any] | None:
    """For a training step on TPUs whose layers are a loop: one gather serves a weight's recompute and its gradient.

    By default XLA gathers a weight again where many operations lie between, as an attention does for q, k and v.
    Not for straight code: there each layer's weights would be kept from the forward to the backward pass.
    """
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    return {"xla_tpu_spmd_threshold_for_allgather_cse": 10**6} if on_tpu and not unrolled else None


@contextmanager
def use_compilation_cache(directory: Path, console: Console) -> Iterator[None]:
    """Compiled programs are kept in a directory; if they cannot be, a line says so.

    Entries that a full disk cut short are removed: JAX complains of them at every start and never replaces them.
    """
    jax.config.update("jax_compilation_cache_dir", str(directory))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            yield
        finally:
            for text in (str(warning.message) for warning in caught):
                _tell_of_cache(text, directory, console)


def _tell_of_cache(text: str, directory: Path, console: Console) -> None:
    found = re.search(r"persistent compilation cache entry for '(.*?)'", text)
    console.print(f"{directory}: {text}" if found else text)
    for path in directory.glob(f"{found[1]}-*-cache") if found else ():
        with contextlib.suppress(OSError):
            path.unlink()
