"""Batches token arrays into one static shape."""

import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from .._utils.validation import check_int

Batch = dict[str, np.ndarray]

SWAPS = 4
"""Rounds of swaps: with more, sums are hardly more equal."""


def take_rows(arrays: Mapping[str, np.ndarray], indices: np.ndarray) -> Batch:
    """The rows with these indices, and a float32 `weight` of ones."""
    return {name: array[indices] for name, array in arrays.items()} | {
        "weight": np.ones(len(indices), np.float32)
    }


def train_batches(
    arrays: Mapping[str, np.ndarray],
    *,
    batch_size: int,
    arrange: Callable[[Mapping[str, np.ndarray], np.ndarray], Batch] = take_rows,
    lengths: np.ndarray | None = None,
) -> Callable[[int, int], Batch]:
    """Returns `batch(seed, step)`: the batches of a run with that seed, in the order of `batch_order`.

    It depends on nothing else, so a run resumes by its step alone. Every process draws the same global batches and
    takes the rows for its own devices (`sharding.take_local`), so training does not depend on the number of
    processes.

    Args:
      arrays: columns of N examples each.
      batch_size: examples in a batch.
      arrange: makes a batch of the columns and the indices of its examples.
      lengths: the length of each example, for batches of nearly the same total length; see `batch_order`.

    Returns:
      A function of a seed and a number of completed steps. A batch has the columns, and a float32 `weight` of ones.

    Raises:
      ValueError: the columns differ in length, or the batch is larger than the data.
    """
    size = _row_count(arrays, batch_size)
    if batch_size > size:
        raise ValueError(f"batch_size must be at most {size}, the number of training rows, got {batch_size}")
    # A seed's order is made once; it keeps the shuffle of the newest epoch.
    order = functools.cache(lambda seed: batch_order(size, batch_size=batch_size, seed=seed, lengths=lengths))
    return lambda seed, step: arrange(arrays, np.asarray(order(seed)[step]))


def batch_order(
    size: int, *, batch_size: int, seed: int, lengths: np.ndarray | None = None
) -> grain.MapDataset[np.ndarray]:
    """The endless sequence of batches, each as the indices of its examples, int `(batch_size,)`.

    Examples are reshuffled every epoch; each epoch's incomplete batch is dropped. With `lengths`, int `(size,)`,
    all batches of an epoch have nearly the same sum of lengths, and each has short and long examples. Otherwise
    batches are random: from 8 examples on, two examples meet again hardly more often than by chance.
    """
    check_int("seed", seed, at_least=0)
    if lengths is not None:
        return grain.MapDataset.source(_EvenBatches(lengths, batch_size, seed))
    return grain.MapDataset.range(size).seed(seed).shuffle().batch(batch_size, drop_remainder=True).repeat()


class _EvenBatches:
    """The batches of `batch_order` by length, without end."""

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.count = len(lengths) // batch_size
        self.epoch, self.batches = -1, np.empty(0, int)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> np.ndarray:
        epoch, batch = divmod(index, self.count)
        if epoch != self.epoch:
            # Of NumPy's random numbers only the raw ones are the same in every version (NEP 19).
            numbers = np.random.Philox(np.random.SeedSequence([self.seed, epoch]))
            keys = numbers.random_raw((3, len(self.lengths)))
            self.epoch, self.batches = epoch, even_batches(keys, self.lengths, self.batch_size)
        return self.batches[batch]


def even_batches(keys: np.ndarray, lengths: np.ndarray, batch_size: int) -> np.ndarray:
    """Deals examples to random batches of nearly the same sum of lengths.

    The examples are sorted by length, with noise, and cut into groups of similar length, as many as a batch has
    examples. Each batch draws one of each group. Then the batch with the largest sum swaps its example of one group
    with that of the batch with the smallest sum, the second largest with the second smallest, and so on.

    Args:
      keys: random numbers, uint64 `(3, N)`: for the order, the noise and the draws.
      lengths: the length of each example, `(N,)`.
      batch_size: examples in a batch.

    Returns:
      The indices in each batch, int `(N // batch_size, batch_size)`; the end of the order is left out.
    """
    count = len(lengths) // batch_size
    order = np.argsort(keys[0], kind="stable")[: count * batch_size]
    # From here on examples are positions in the order. Nothing but the last lines depends on it: ties of length are
    # broken by the noise.
    lengths, noise, draws = lengths[order], keys[1, order], keys[2, order]
    by_length = np.lexsort((noise, -lengths))
    # Without noise examples of similar lengths would never meet; with more, rows are less full.
    # Small batches have few groups, so that they need more noise, and swaps would leave a text few partners.
    most = 2 * count // 3 if batch_size >= 16 else 16 * count // batch_size
    noisy = np.arange(len(order)) + (noise[by_length] % max(1, most)).astype(int)
    groups = by_length[np.argsort(noisy, kind="stable")].reshape(batch_size, count)
    batches = np.take_along_axis(groups, np.argsort(draws[groups], axis=1, kind="stable"), axis=1).T
    for _ in range(SWAPS if batch_size >= 8 else 1):
        sums = lengths[batches].sum(axis=1)
        by_sum = np.argsort(sums, kind="stable")
        short, long = by_sum[: count // 2], by_sum[::-1][: count // 2]
        gap, moved = sums[long] - sums[short], lengths[batches[long]] - lengths[batches[short]]
        left = np.abs(gap[:, None] - 2 * moved)
        better = left.min(axis=1) < gap
        short, long, group = short[better], long[better], left.argmin(axis=1)[better]
        batches[short, group], batches[long, group] = batches[long, group], batches[short, group]
    # So that neither the index of a batch nor an example's position in it depends on lengths.
    batches.sort(axis=1)
    return order[batches[np.argsort(batches[:, 0])]]


def first_batches(
    size: int, *, batch_size: int, seeds: Sequence[int], count: int, lengths: np.ndarray | None = None
) -> np.ndarray:
    """The first batches of `batch_order` for each of the seeds, int `(seeds * count, batch_size)`."""
    orders = [batch_order(size, batch_size=batch_size, seed=seed, lengths=lengths) for seed in seeds]
    return np.array([order[n] for order in orders for n in range(count)])


def eval_batches(
    arrays: Mapping[str, np.ndarray], batch_size: int, rows: Sequence[int] | np.ndarray | None = None
) -> Iterator[Batch]:
    """Yields every row once, in order, in batches of `batch_size` rows; with `rows`, only these rows of each batch.

    Pads the last batch with copies of the last row at float32 `weight` 0; all other rows have weight 1, or that of
    a column `weight`, whose first axis is that of the rows.

    Raises:
      ValueError: the columns differ in length, or the batch size is below 1.
    """
    size = _row_count(arrays, batch_size)
    for start in range(0, size, batch_size):
        indices = start + (np.arange(batch_size) if rows is None else np.asarray(rows))
        # The last row again and again: XLA compiles a program for each shape of a batch.
        batch = {name: array[np.minimum(indices, size - 1)] for name, array in arrays.items()}
        weight = batch.setdefault("weight", np.ones(len(indices), np.float32))
        weight[indices >= size] = 0
        yield batch


def add_rows(batch: Batch, rows: int) -> Batch:
    """The batch with empty rows at its end, of weight 0, so that it has so many."""
    missing = rows - len(batch["weight"])
    return {name: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) for name, x in batch.items()}


def even_batch_size(rows: int, at_most: int, multiple: int) -> int:
    """The smallest batch that takes all rows in as few batches as the largest does, a multiple of a number.

    >>> even_batch_size(65, 64, 1), even_batch_size(65, 64, 8), even_batch_size(10, 64, 8)
    (33, 40, 16)
    """
    batches = -(-rows // at_most)
    return min(at_most, round_up(-(-rows // batches), multiple))


def round_up(number: int, multiple: int) -> int:
    """The next multiple.

    >>> round_up(9, 4)
    12
    """
    return -(-number // multiple) * multiple


def _row_count(arrays: Mapping[str, np.ndarray], batch_size: int) -> int:
    check_int("batch_size", batch_size, at_least=1)
    sizes = {name: len(array) for name, array in arrays.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"columns must have the same number of rows, got {sizes}")
    return next(iter(sizes.values()))


def digest(rows: Iterable[Any]) -> str:
    """Returns a short hex digest of a split's rows of JSON values, in order: texts and labels, not tokens."""
    total = hashlib.sha256()
    for row in rows:
        total.update(json.dumps(row).encode() + b"\n")
    return total.hexdigest()[:16]
