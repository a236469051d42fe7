"""Several processes that run one program: what each of them knows, told to all, and how a loss of one looks."""

import json
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_GONE = re.compile("(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED): ")
_PERHAPS = re.compile("(UNKNOWN|INTERNAL): ")
_SIGNS = re.compile(
    "gloo|coordination service|heartbeat|connection (closed|reset|refused)|socket closed", re.I
)


def allgather(value: Any) -> list[Any]:
    """A JSON value of every process, in their order; returns when all have come here."""
    if jax.process_count() == 1:
        return [value]
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(mine.size))
    rows = multihost_utils.process_allgather(np.pad(mine, (0, int(sizes.max()) - mine.size)))
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def is_lost_process(error: BaseException) -> bool:
    """Whether a computation or a barrier failed because another process has left it.

    JAX raises its own errors for computations that run in the background, and ValueError with the same text, which
    begins with a status, for those that it waits for; orbax raises TimeoutError.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return False
    if isinstance(error, TimeoutError):
        return True
    if not isinstance(error, jax.errors.JaxRuntimeError | ValueError):
        return False
    text = str(error)
    return bool(_GONE.match(text) or (_PERHAPS.match(text) and _SIGNS.search(text)))


def is_lead() -> bool:
    """Whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def gather_to_host(tree: Any) -> Any:
    """Whole arrays in the memory of every process."""

    def whole(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)
