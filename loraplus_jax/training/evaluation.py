"""Evaluation on a split."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ..data.batches import Batch, eval_batches
from ..step.sharding import local_rows, shard_batch
from ..step.train_step import Rows, weighted_means
from ..tasks.interface import Task


def evaluate(
    eval_fn: Any,
    trainable: Any,
    frozen: Any,
    arrays: Batch,
    batch_size: int,
    mesh: Mesh,
    *,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Averages the metrics over all rows of a split, and keeps `Rows` as arrays; see `finish_metrics`.

    `between` is called before each batch and may raise.
    """
    totals: Any = None
    kept: list[dict[str, Rows]] = []
    for batch in eval_batches(arrays, batch_size, local_rows(mesh, batch_size)):
        between()
        pairs, rows = separate_rows(eval_fn(trainable, frozen, shard_batch(batch, mesh)))
        kept.append(rows)
        # Keep at most two batches in flight, so that `between` is called regularly.
        jax.block_until_ready(totals)
        totals = pairs if totals is None else jax.tree.map(lambda a, b: a + b, totals, pairs)
    means = {name: float(value) for name, value in weighted_means(totals).items()}
    # Rows are fetched at the end: to fetch them in the loop would wait for each batch.
    return means | join_rows(jax.device_get(kept))


def separate_rows(pairs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Rows]]:
    """Returns the pairs (sum, weight) and the `Rows` of a batch."""
    rows = {name: pair for name, pair in pairs.items() if isinstance(pair, Rows)}
    return {name: pair for name, pair in pairs.items() if name not in rows}, rows


def join_rows(batches: Sequence[Mapping[str, Rows]]) -> dict[str, np.ndarray]:
    """Concatenates the rows of all batches, `(N,)`, without the padding, whose weight is 0."""
    joined = {}
    for name in batches[0]:
        values, weights = (np.concatenate(x) for x in zip(*(batch[name] for batch in batches), strict=True))
        joined[name] = values[weights > 0]
    return joined


def finish_metrics(task: Task, values: Mapping[str, Any]) -> dict[str, float]:
    """Returns the means and the metrics that the task derives from means and rows."""
    means = {name: value for name, value in values.items() if not isinstance(value, np.ndarray)}
    return means | task.derived(values)
