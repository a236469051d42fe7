"""Batches token arrays into one static shape."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from .._utils.validation import check_int

Batch = dict[str, np.ndarray]


def train_batches(
    arrays: Mapping[str, np.ndarray],
    *,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | np.ndarray | None = None,
) -> grain.DatasetIterator[Batch]:
    """Returns an endless iterator over batches, reshuffled every epoch; each epoch's incomplete batch is dropped.

    Every process draws the same global batches and keeps the rows for its own devices, so training does not depend
    on the number of processes. There is no prefetch (a batch takes less than a millisecond). So the iterator's
    `get_state()`, a small JSON-serializable dictionary, is exactly the position after the last batch, and
    `set_state()` restores that position.

    Args:
      arrays: columns of N rows each.
      batch_size: rows in a global batch.
      seed: seed of the shuffles.
      rows: rows of each global batch to keep, as `sharding.local_rows` returns them; all by default.

    Returns:
      A grain iterator over batches of these columns, plus a float32 `weight` column of ones.

    Raises:
      ValueError: the columns differ in length, one is named `weight`, or the batch is larger than the data.
    """
    size = _row_count(arrays, batch_size)
    if batch_size > size:
        raise ValueError(f"batch_size must be at most {size}, the number of training rows, got {batch_size}")
    check_int("seed", seed, at_least=0)

    def take(indices: np.ndarray) -> Batch:
        local = indices if rows is None else indices[rows]
        return _take(arrays, local, np.ones(len(local), np.float32))

    # A prefetching iterator's state would be ahead of the batch that it returned last.
    indices = grain.MapDataset.range(size).seed(seed).shuffle().batch(batch_size, drop_remainder=True)
    return iter(
        indices.map(take).repeat().to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    )


def eval_batches(
    arrays: Mapping[str, np.ndarray], batch_size: int, rows: Sequence[int] | np.ndarray | None = None
) -> Iterator[Batch]:
    """Yields every row once, in order, in batches of `batch_size` rows; with `rows`, only these rows of each batch.

    Pads the last batch with copies of the last row at float32 `weight` 0; all other rows have weight 1.

    Raises:
      ValueError: the columns differ in length, one is named `weight`, or the batch size is below 1.
    """
    size = _row_count(arrays, batch_size)
    for start in range(0, size, batch_size):
        indices = start + (np.arange(batch_size) if rows is None else np.asarray(rows))
        # The last row again and again: XLA compiles a program for each shape of a batch.
        yield _take(arrays, np.minimum(indices, size - 1), (indices < size).astype(np.float32))


def _take(arrays: Mapping[str, np.ndarray], indices: np.ndarray, weight: np.ndarray) -> Batch:
    return {name: array[indices] for name, array in arrays.items()} | {"weight": weight}


def _row_count(arrays: Mapping[str, np.ndarray], batch_size: int) -> int:
    check_int("batch_size", batch_size, at_least=1)
    sizes = {name: len(array) for name, array in arrays.items()}
    if len(set(sizes.values())) != 1 or "weight" in sizes:
        raise ValueError(f"columns must have the same number of rows, none named weight, got {sizes}")
    return next(iter(sizes.values()))


def digest(rows: Iterable[Any]) -> str:
    """Returns a short hex digest of a split's rows of JSON values, in order: texts and labels, not tokens."""
    total = hashlib.sha256()
    for row in rows:
        total.update(json.dumps(row).encode() + b"\n")
    return total.hexdigest()[:16]
