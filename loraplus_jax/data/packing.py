"""Token sequences to rows of one length: each padded by itself, or several packed into a row."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from .._validation import check_int
from .batches import Batch


@dataclasses.dataclass(frozen=True)
class Sequences:
    """N token sequences.

    Attributes:
      ids: of each its tokens, int32 `(t,)`, t at least 1.
      masks: of each which tokens are to be predicted, float32 `(t,)` of 0 and 1; the first token never is.
      truncated: how many were cut to fit.
    """

    ids: tuple[np.ndarray, ...]
    masks: tuple[np.ndarray, ...]
    truncated: int = 0

    @property
    def lengths(self) -> list[int]:
        """Tokens of each."""
        return [len(ids) for ids in self.ids]


def pad(sequences: Sequences, length: int) -> Batch:
    """One sequence a row, padded on the right.

    Returns:
      int32 `input_ids` `(N, length)`, int32 `segment_ids` `(N, length)`: 1, and 0 where there is padding (token 0);
      float32 `loss_mask` `(N, length)`: 1 where `input_ids[:, t]` is to be predicted, from what stands before t.

    Raises:
      ValueError: a sequence is empty or longer than `length`.
    """
    check_lengths(sequences.lengths, length)
    return _fill(sequences, [[i] for i in range(len(sequences.ids))], length)


def pack(sequences: Sequences, length: int) -> Batch:
    """As many sequences a row as fit, none of them cut, by best fit decreasing.

    Which sequence goes where depends on the lengths alone: the longest are placed first, each into the fullest row
    that has room. Rows are in the order of their first sequences, and sequences in a row in their own order.

    Returns:
      As `pad`, with M rows; `segment_ids` count a row's sequences from 1.

    Raises:
      ValueError: a sequence is empty or longer than `length`.
    """
    return _fill(sequences, plan_packing(sequences.lengths, length), length)


def plan_packing(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Which sequences make up each row when sequences of these lengths are packed; errors as in `pack`.

    >>> plan_packing([3, 5, 2, 4, 1], 6)
    [[0], [1, 4], [2, 3]]
    """
    check_lengths(lengths, length)
    rows: list[list[int]] = []
    rooms: list[list[int]] = [[] for _ in range(length + 1)]  # rows by how many tokens they still take
    open_rooms = 0  # bit r: there are rows that still take r tokens
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


def check_lengths(lengths: Sequence[int], length: int) -> None:
    """Raises a ValueError unless every sequence has a token at least, and at most `length`."""
    check_int("length", length, at_least=1)
    wrong = [i for i, n in enumerate(lengths) if not 1 <= n <= length]
    if wrong:
        i = wrong[0]
        raise ValueError(
            f"sequences must have 1 to {length} tokens, got {lengths[i]} in number {i} ({len(wrong)} such)"
        )


def _fill(sequences: Sequences, rows: Sequence[Sequence[int]], length: int) -> Batch:
    shape = (len(rows), length)
    arrays = {
        "input_ids": np.zeros(shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "loss_mask": np.zeros(shape, np.float32),
    }
    for r, row in enumerate(rows):
        start = 0
        for segment, i in enumerate(row, 1):
            index = (r, slice(start, start + len(sequences.ids[i])))
            arrays["input_ids"][index] = sequences.ids[i]
            arrays["segment_ids"][index] = segment
            arrays["loss_mask"][index] = sequences.masks[i]
            start = index[1].stop
    return arrays
