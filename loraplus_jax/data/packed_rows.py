"""Arranges token sequences in rows of one length: one padded sequence per row, or several packed into one."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from .._utils.validation import check_int
from .batches import Batch


@dataclasses.dataclass(frozen=True)
class Sequences:
    """N token sequences.

    Attributes:
      ids: tokens of each sequence, int32 `(t,)`, t at least 1.
      masks: loss mask of each sequence, float32 `(t,)`: 1 for tokens to predict, 0 for others and the first token.
      truncated: number of truncated sequences.
    """

    ids: tuple[np.ndarray, ...]
    masks: tuple[np.ndarray, ...]
    truncated: int = 0

    @property
    def lengths(self) -> list[int]:
        """Number of tokens in each sequence."""
        return [len(ids) for ids in self.ids]


def pad(sequences: Sequences, length: int) -> Batch:
    """Pads each sequence on the right to one row.

    Returns:
      int32 `input_ids` `(N, length)`; int32 `segment_ids` `(N, length)`: 1 for tokens, 0 for padding (token 0);
      float32 `loss_mask` `(N, length)`: 1 where `input_ids[:, t]` is to be predicted from the tokens before t.

    Raises:
      ValueError: a sequence is empty or longer than `length`.
    """
    check_lengths(sequences.lengths, length)
    return _fill(sequences, [[i] for i in range(len(sequences.ids))], length)


def pack(sequences: Sequences, length: int) -> Batch:
    """Packs several sequences into each row by best-fit decreasing, truncating none.

    The layout depends only on the lengths: the longest sequences go first, each into the fullest row with enough
    room. Rows are ordered by their first sequence, and sequences in a row keep their order.

    Returns:
      Arrays as from `pad`, with M rows; `segment_ids` number the sequences of a row from 1.

    Raises:
      ValueError: a sequence is empty or longer than `length`.
    """
    return _fill(sequences, plan_packing(sequences.lengths, length), length)


def plan_packing(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Returns the indices of the sequences in each row when `pack` packs these lengths; raises as `pack` does.

    >>> plan_packing([3, 5, 2, 4, 1], 6)
    [[0], [1, 4], [2, 3]]
    """
    check_lengths(lengths, length)
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


def check_lengths(lengths: Sequence[int], length: int) -> None:
    """Raises a ValueError unless every sequence has 1 to `length` tokens."""
    check_int("length", length, at_least=1)
    invalid = [i for i, n in enumerate(lengths) if not 1 <= n <= length]
    if invalid:
        i = invalid[0]
        raise ValueError(
            f"sequences must have 1 to {length} tokens, got {lengths[i]} in sequence {i} ({len(invalid)} invalid)"
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
