"""Communication between the processes of a run: gathering values, and detecting lost processes."""

import errno
import json
import os
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_LOST = re.compile("(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED): ")
_POSSIBLY_LOST = re.compile("(UNKNOWN|INTERNAL): ")
_NETWORK = re.compile(
    "gloo|coordination service|heartbeat|connection (closed|reset)|socket closed|"
    + re.escape(os.strerror(errno.ECONNREFUSED)),
    re.I,
)


def allgather(value: Any) -> list[Any]:
    """Gathers a JSON value from every process, in process order; waits until all processes call it."""
    if jax.process_count() == 1:
        return [value]
    # JAX gathers only arrays, of one shape on all processes: texts are padded to the longest.
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(mine.size))
    rows = multihost_utils.process_allgather(np.pad(mine, (0, int(sizes.max()) - mine.size)))
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def is_lost_process(error: BaseException) -> bool:
    """Whether a computation or barrier failed because another process is lost.

    JAX raises its own errors for background computations, and ValueError for those that it waits for; both messages
    begin with a status. Orbax raises TimeoutError.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return False
    if isinstance(error, TimeoutError):
        return True
    if not isinstance(error, jax.errors.JaxRuntimeError | ValueError):
        return False
    text = str(error)
    return bool(_LOST.match(text) or (_POSSIBLY_LOST.match(text) and _NETWORK.search(text)))


def is_lead() -> bool:
    """Whether this is the lead process, which writes files and prints."""
    return jax.process_index() == 0


def gather_to_host(tree: Any) -> Any:
    """All-gathers arrays into the host memory of every process."""

    def gather(leaf: Any) -> Any:
        # np.asarray raises for an array with parts on other processes' devices.
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(gather, tree)
