"""Arranges token sequences in rows of one length: one in each row, or several packed into one."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .batches import Batch

TOKENS_DOUBLING = 600
"""Tokens of a row with which a token takes twice the time, as attention is between all tokens of a row: measured
with MiniLM on a CPU; larger models spend less of their time on it."""


def row_cost(length: int) -> float:
    """The time of a row of so many tokens, but for a factor."""
    return length * (1 + length / TOKENS_DOUBLING)


def ragged(sequences: Iterable[np.ndarray]) -> np.ndarray:
    """A column of N arrays (t,) of different lengths, as an array of objects (N,)."""
    sequences = list(sequences)
    column = np.empty(len(sequences), object)
    # One by one: numpy would take sequences of one length for a matrix.
    for index, sequence in enumerate(sequences):
        column[index] = sequence
    return column


def lengths_of(column: np.ndarray) -> np.ndarray:
    """The length of each sequence of a column, int (N,)."""
    return np.fromiter(map(len, column), np.int64, len(column))


def plan_packing(lengths: Sequence[int] | np.ndarray, length: int) -> list[list[int]]:
    """Packs sequences of 1 to `length` tokens into rows by best-fit decreasing; returns the indices in each row.

    The layout depends only on the lengths: the longest sequences go first, each into the fullest row with enough
    room. Rows are ordered by their first sequence, and sequences in a row keep their order.

    >>> plan_packing([3, 5, 2, 4, 1], 6)
    [[0], [1, 4], [2, 3]]
    """
    lengths = np.asarray(lengths).tolist()
    rows: list[list[int]] = []
    rooms: list[list[int]] = [[] for _ in range(length + 1)]  # rows by number of free tokens
    # Bit r is set if a row has r free tokens: the best fit is the lowest set bit, found without a search.
    open_rooms = 0
    # The longest first, so that short ones are left to fill what remains.
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = open_rooms >> lengths[i]
        if fitting:
            room = lengths[i] + (fitting & -fitting).bit_length() - 1
            row = rooms[room].pop()
            if not rooms[room]:
                open_rooms ^= 1 << room
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(i)
        rooms[room - lengths[i]].append(row)
        open_rooms |= 1 << (room - lengths[i])
    return sorted(sorted(row) for row in rows)


def fill(
    columns: Mapping[str, np.ndarray], rows: Sequence[Sequence[int]], count: int, length: int
) -> tuple[Batch, np.ndarray]:
    """Fills rows with sequences, one after the other from the start of a row.

    Args:
      columns: ragged columns of N sequences.
      rows: the indices of the sequences in each row.
      count: R, the number of rows; the last ones are empty if `rows` are fewer.
      length: T, tokens in a row.

    Returns:
      Each column `(R, T)`; and `segment_ids`, int32 `(R, T)`, the number of each token's sequence in its row, from
      1. All else is zero. Then the row and slot of each sequence, in the order of `rows`, int `(n, 2)`.
    """
    order = [index for row in rows for index in row]
    row = np.repeat(np.arange(len(rows)), np.array([*map(len, rows)], np.int64))
    slot = np.array([slot for members in rows for slot in range(len(members))], np.int64)
    sequences = {name: column[order] for name, column in columns.items()}
    lengths = lengths_of(next(iter(sequences.values())))
    before = np.cumsum(lengths) - lengths
    # Of the sequences before, those in the same row.
    start = before - before[np.searchsorted(row, row)]
    index = np.repeat(row * length + start - before, lengths) + np.arange(lengths.sum())

    def filled(values: Sequence[np.ndarray]) -> np.ndarray:
        array = np.zeros(count * length, values[0].dtype if len(values) else np.int32)
        array[index] = np.concatenate([array[:0], *values])
        return array.reshape(count, length)

    batch = {name: filled(list(column)) for name, column in sequences.items()}
    batch["segment_ids"] = filled([np.repeat(slot + 1, lengths).astype(np.int32)])
    return batch, np.stack([row, slot], axis=1)
