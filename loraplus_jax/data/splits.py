"""Labelled texts: reads files into rows and splits rows into train, validation and test."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..settings.schema import DataSettings
from .readers import read_rows


@dataclasses.dataclass(frozen=True)
class LabelledTexts:
    """N labelled texts as columns of length N.

    Attributes:
      texts: the texts.
      pairs: the second texts, or None.
      labels: the labels as written in the file, without white space around them.
      places: `file:line` of each row, for error messages.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: tuple[str, ...]
    places: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Iterable[int]) -> "LabelledTexts":
        """The rows at `indices`, in their order."""
        indices = list(indices)

        def pick(column: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(column[i] for i in indices)

        pairs = None if self.pairs is None else pick(self.pairs)
        return LabelledTexts(pick(self.texts), pairs, pick(self.labels), pick(self.places))


def load_splits(settings: DataSettings, resolve: Callable[[str], Path]) -> dict[str, LabelledTexts]:
    """The rows of `train`, `validation` and, where there is one, `test`.

    One file is split by hashes of `split_seed` and text: neither the order of the file nor the labels matter, and
    more rows move only texts near a border. Texts that differ in case or spacing only stay together, as one.

    Args:
      settings: says which files, columns and shares.
      resolve: turns what the user named into a path, as `fetch.resolve` does.

    Raises:
      ValueError: a file is faulty (see `read_rows`), or holds too few distinct texts to split.
    """
    return split_files(settings, lambda value: load_rows(resolve(value), settings), _split_rows)


def split_files(
    settings: DataSettings, load: Callable[[str], Any], split: Callable[[Any, Mapping[str, float], int], dict]
) -> dict[str, Any]:
    """What `load` makes of each file that the settings name, by split; `split` cuts one file by shares and seed."""
    if settings.path is not None:
        shares = {"validation": settings.validation_fraction, "test": settings.test_fraction}
        return split(load(settings.path), shares, settings.split_seed)
    files = {"train": settings.train, "validation": settings.validation, "test": settings.test}
    splits = {key: load(value) for key, value in files.items() if value is not None}
    if "validation" not in splits:
        splits |= split(splits["train"], {"validation": settings.validation_fraction}, settings.split_seed)
    return {key: splits[key] for key in files if key in splits}


def load_rows(path: Path, settings: DataSettings) -> LabelledTexts:
    """The rows of one file, in the columns that the settings name; errors as `read_rows` has them."""
    rows = read_rows(path, settings.columns)

    def column(name: str) -> tuple[str, ...]:
        return tuple(row.values[name] for row in rows)

    pairs = column(settings.text_pair) if settings.text_pair is not None else None
    places = tuple(f"{path}:{row.line}" for row in rows)
    labels = tuple(label.strip() for label in column(settings.label))
    return LabelledTexts(column(settings.text), pairs, labels, places)


def _split_rows(rows: LabelledTexts, shares: Mapping[str, float], seed: int) -> dict[str, LabelledTexts]:
    indices_by_split = split_texts(rows.texts, shares, seed, where=rows.places[0].rpartition(":")[0])
    return {name: rows.take(indices) for name, indices in indices_by_split.items()}


def split_texts(
    texts: Sequence[str], shares: Mapping[str, float], seed: int, *, where: str
) -> dict[str, list[int]]:
    """Indices of `train` and of the splits of `shares` (of the distinct texts; at least one each, or none at 0)."""
    keys = [" ".join(text.split()).casefold() for text in texts]
    order = sorted(set(keys), key=lambda key: hashlib.blake2b(f"{seed} {key}".encode()).digest())
    sizes = {name: max(1, round(share * len(order))) for name, share in shares.items() if share > 0}
    if sum(sizes.values()) >= len(order):
        raise ValueError(f"{where}: {len(order)} distinct texts are too few to split")
    names = [name for name, size in sizes.items() for _ in range(size)]
    split_of = dict.fromkeys(order, "train") | dict(zip(order, names, strict=False))
    return {name: [i for i, key in enumerate(keys) if split_of[key] == name] for name in ("train", *sizes)}
