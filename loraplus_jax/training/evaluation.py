"""Evaluation on a split."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from ..data.batches import Batch, eval_batches
from ..sharding import local_rows, shard_batch
from ..train_step import weighted_means


def evaluate(
    eval_fn: Any,
    trainable: Any,
    frozen: Any,
    arrays: Batch,
    batch_size: int,
    mesh: Mesh,
    *,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Averages the metrics over all rows of a split. `between` is called before each batch and may raise."""
    totals: Any = None
    for batch in eval_batches(arrays, batch_size, local_rows(mesh, batch_size)):
        between()
        pairs = eval_fn(trainable, frozen, shard_batch(batch, mesh))
        # Keep at most two batches in flight, so that `between` is called regularly.
        jax.block_until_ready(totals)
        totals = pairs if totals is None else jax.tree.map(lambda a, b: a + b, totals, pairs)
    return {name: float(value) for name, value in weighted_means(totals).items()}
