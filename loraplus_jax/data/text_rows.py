"""Packs the texts of a batch into rows of tokens, so that few tokens are padding."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from .batches import Batch, round_up
from .packed_rows import fill, lengths_of, plan_packing, row_cost

TOKENS = ("input_ids", "token_type_ids")
"""The columns with a value for each token; all others have one for each text."""
TRIED_BATCHES = 50
"""Batches for which all lengths of rows are tried."""


@dataclasses.dataclass(frozen=True)
class TextRows:
    """The shape of the rows that the texts of a batch are packed into.

    Attributes:
      length: tokens in a row.
      texts: the most texts in a row, as many as fit of the shortest.
      count: rows of a batch; one that needs more has as many as it needs.
      multiple: what divides every number of rows: parts of the mesh times micro-batches.
      full: share of a batch's tokens that are text, in the batches for which the shape was chosen.
    """

    length: int
    texts: int
    count: int = 1
    multiple: int = 1
    full: float = 1.0

    @classmethod
    def fitting(cls, lengths: np.ndarray, most: int) -> "TextRows":
        """The shortest rows for texts with these numbers of tokens, `(N,)`, of at most so many tokens."""
        # A multiple of eight: with other lengths, steps on a CPU are a few per cent slower.
        length = min(round_up(int(lengths.max()), 8), most)
        return cls(length, length // int(lengths.min()))

    @classmethod
    def for_batches(cls, lengths: np.ndarray, batches: np.ndarray, most: int, multiple: int) -> "TextRows":
        """The rows with the least time of a step that all of these batches fit into.

        Longer rows are fuller, and have more pairs of tokens to compute and to mask.

        Args:
          lengths: the number of tokens of each text, `(N,)`.
          batches: the indices of the texts of each batch.
          most: the most tokens in a row.
          multiple: what has to divide the number of rows.
        """
        shortest = cls.fitting(lengths, most)

        def chosen(length: int, batches: np.ndarray) -> TextRows:
            count = round_up(max(len(plan_packing(lengths[texts], length)) for texts in batches), multiple)
            full = float(lengths[batches].sum() / (len(batches) * count * length))
            return cls(length, length // int(lengths.min()), count, multiple, full)

        best: TextRows | None = None
        tokens = lengths[batches].sum(axis=1).max()
        for length in range(shortest.length, min(3 * shortest.length, most) + 1, 8):
            # No rows are fuller than full.
            if best is not None and best.cost <= row_cost(length) * tokens / length:
                break
            # All batches may need more rows than the first ones, never fewer.
            if best is None or chosen(length, batches[:TRIED_BATCHES]).cost < best.cost:
                best = min(filter(None, (best, chosen(length, batches))), key=lambda rows: rows.cost)
        assert best is not None
        return best

    @property
    def cost(self) -> float:
        """The time of a step, but for a factor."""
        return self.count * row_cost(self.length)

    def arrange(self, columns: Mapping[str, np.ndarray], indices: np.ndarray) -> Batch:
        """Packs the texts with these indices into R rows of T tokens and up to S texts each; see `fill_rows`."""
        batch = {name: column[indices] for name, column in columns.items()}
        rows = plan_packing(text_lengths(batch), self.length)
        count = max(self.count, round_up(len(rows), self.multiple))
        return fill_rows(batch, rows, count, self.length, self.texts)[0]

    def arrange_all(self, columns: Mapping[str, np.ndarray]) -> tuple[Batch, np.ndarray]:
        """Packs all texts into as few rows as they fill; also returns the row and slot of each, int (N, 2)."""
        rows = plan_packing(text_lengths(columns), self.length)
        batch, places = fill_rows(columns, rows, len(rows), self.length, self.texts)
        slots = np.zeros_like(places)
        slots[[index for row in rows for index in row]] = places
        return batch, slots


def text_lengths(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """The number of tokens of each text, `(N,)`."""
    return lengths_of(columns["input_ids"])


def fill_rows(
    columns: Mapping[str, np.ndarray], rows: Sequence[Sequence[int]], count: int, length: int, texts: int
) -> tuple[Batch, np.ndarray]:
    """Fills rows with texts; see `fill`.

    Args:
      columns: of N texts, those in `TOKENS` ragged, the others `(N,)`.
      rows: the indices of the texts in each row.
      count: R, the number of rows.
      length: T, tokens in a row.
      texts: S, the most texts in a row.

    Returns:
      The columns in `TOKENS` `(R, T)`, with the number of the text in its row, from 1, as `attention_mask` of each
      token; the others `(R, S)`; and float32 `weight` `(R, S)`, 1 for a text and 0 where there is none. All else is
      zero. Then the row and slot of each text, in the order of `rows`.
    """
    batch, places = fill({name: columns[name] for name in TOKENS}, rows, count, length)
    batch["attention_mask"] = batch.pop("segment_ids")
    order = [index for row in rows for index in row]
    values = {name: column[order] for name, column in columns.items() if name not in TOKENS}
    for name, column in (values | {"weight": np.ones(len(order), np.float32)}).items():
        batch[name] = np.zeros((count, texts), column.dtype)
        batch[name][tuple(places.T)] = column
    return batch, places
