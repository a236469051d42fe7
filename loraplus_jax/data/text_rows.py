"""Packs the texts of a batch into rows of tokens, so that few tokens are padding."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .batches import Batch, round_up
from .packed_rows import fill, lengths_of, plan_packing

TOKENS = ("input_ids", "token_type_ids")
"""The columns with a value for each token; all others have one for each text."""
MOST_SHAPES = 4
"""The most numbers of rows that are chosen beforehand."""


@dataclasses.dataclass(frozen=True)
class TextRows:
    """The shape of the rows that the texts of a batch are packed into.

    Attributes:
      length: tokens in a row, as many as the longest text has.
      texts: the most texts in a row, as many as fit of the shortest.
      counts: the numbers of rows of a batch, ascending; a batch that needs more has as many as it needs.
      multiple: what divides every number of rows: parts of the mesh times micro-batches.
      full: share of a batch's tokens that are text, in the batches for which the numbers were chosen.
    """

    length: int
    texts: int
    counts: tuple[int, ...] = ()
    multiple: int = 1
    full: float = 1.0

    @classmethod
    def fitting(cls, lengths: np.ndarray) -> "TextRows":
        """The rows for texts with these numbers of tokens, `(N,)`."""
        longest = int(lengths.max())
        return cls(longest, longest // int(lengths.min()))

    def for_batches(
        self, lengths: np.ndarray, batches: Iterable[np.ndarray], multiple: int, least_saving: float
    ) -> "TextRows":
        """The same rows, in numbers chosen for batches of these indices of texts; see `choose_counts`."""
        tokens, needed = 0, Counter()
        for indices in batches:
            rows = plan_packing(lengths[indices], self.length)
            needed[round_up(len(rows), multiple)] += 1
            tokens += lengths[indices].sum()
        counts = choose_counts(needed, least_saving)
        total = sum(min(n for n in counts if n >= need) * times for need, times in needed.items())
        full = float(tokens / (total * self.length))
        return dataclasses.replace(self, counts=counts, multiple=multiple, full=full)

    def arrange(self, columns: Mapping[str, np.ndarray], indices: np.ndarray) -> Batch:
        """Packs the texts with these indices into R rows of T tokens and up to S texts each; see `fill_rows`."""
        batch = {name: column[indices] for name, column in columns.items()}
        rows = plan_packing(text_lengths(batch), self.length)
        count = next((n for n in self.counts if n >= len(rows)), round_up(len(rows), self.multiple))
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


def choose_counts(needed: Mapping[int, int], least_saving: float) -> tuple[int, ...]:
    """Chooses numbers of rows, ascending: the largest, and up to `MOST_SHAPES` in all that are worth a program.

    Args:
      needed: how many batches of a sample need each number of rows.
      least_saving: what another number has to save, as a share of the rows if all batches had the largest.

    >>> choose_counts({6: 50, 8: 40, 12: 10}, 0.05), choose_counts({6: 50, 8: 40, 12: 10}, 0.1)
    ((6, 8, 12), (8, 12))
    """
    chosen = (max(needed),)

    def share(counts: Sequence[int]) -> float:
        """Rows of all batches, as a share of the most."""
        rows = sum(min(n for n in counts if n >= need) * times for need, times in needed.items())
        return rows / (sum(needed.values()) * max(needed))

    while len(chosen) < MOST_SHAPES and (others := [n for n in needed if n not in chosen]):
        best = min((tuple(sorted((*chosen, n))) for n in others), key=share)
        if share(chosen) - share(best) < least_saving:
            break
        chosen = best
    return chosen


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
