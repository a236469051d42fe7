"""Labelled texts: reads rows from files and splits them into train, validation and test."""

import dataclasses
import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..settings.schema import DataSettings
from .readers import TABLE_SUFFIXES, StringRow, location_of, read_rows


@dataclasses.dataclass(frozen=True)
class LabelledTexts:
    """N labelled texts as columns of length N.

    Attributes:
      texts: the texts.
      pairs: the second texts of text pairs, or None.
      labels: the labels as written in the file, without surrounding whitespace.
      places: `file:line` of each row, for error messages.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: tuple[str, ...]
    places: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Iterable[int]) -> "LabelledTexts":
        """Returns the rows at `indices`, in that order."""
        indices = list(indices)

        def pick(column: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(column[i] for i in indices)

        pairs = None if self.pairs is None else pick(self.pairs)
        return LabelledTexts(pick(self.texts), pairs, pick(self.labels), pick(self.places))


def load_splits(settings: DataSettings, resolve: Callable[[str], Path]) -> dict[str, LabelledTexts]:
    """Loads the rows of `train`, `validation` and, if there is one, `test`.

    A single file is split by a hash of `split_seed` and the text. The split depends neither on the order of the
    rows nor on the labels, and adding rows moves only texts near a split boundary. Texts that differ only in case
    or spacing count as one text and go to the same split.

    Args:
      settings: files, columns and split fractions.
      resolve: turns a setting's value into a path, as `fetch.resolve` does.

    Raises:
      ValueError: a file is invalid (see `read_rows`) or has too few distinct texts to split, or `delimiter` or
        `quoting` is set but no file is a table.
    """
    files = [f for f in (settings.path, settings.train, settings.validation, settings.test) if f is not None]
    written = {"delimiter": settings.delimiter, "quoting": settings.quoting != "minimal"}
    for name in [name for name, value in written.items() if value]:
        if not any(resolve(file).suffix.lower() in TABLE_SUFFIXES for file in files):
            raise ValueError(f"data.{name} requires a .csv or .tsv file, got {', '.join(files)}")
    return split_files(settings, lambda value: load_rows(resolve(value), settings), split_rows)


def split_files(
    settings: DataSettings, load: Callable[[str], Any], split: Callable[[Any, Mapping[str, float], int], dict]
) -> dict[str, Any]:
    """Loads each file in the settings with `load`, by split; `split` divides one file by fractions and seed."""
    if settings.path is not None:
        shares = {"validation": settings.validation_fraction, "test": settings.test_fraction}
        return split(load(settings.path), shares, settings.split_seed)
    files = {"train": settings.train, "validation": settings.validation, "test": settings.test}
    splits = {key: load(value) for key, value in files.items() if value is not None}
    if "validation" not in splits:
        splits |= split(splits["train"], {"validation": settings.validation_fraction}, settings.split_seed)
    return {key: splits[key] for key in files if key in splits}


def load_rows(path: Path, settings: DataSettings) -> LabelledTexts:
    """Reads the rows of one file, with the columns in the settings; raises as `read_rows` does."""
    rows = read_rows(path, settings.columns, settings.delimiter, quoting=settings.quoting)
    return labelled_texts(path, rows)


def labelled_texts(path: Path, rows: Sequence[StringRow]) -> LabelledTexts:
    """Returns the rows of a file, whose columns are text, second text if any, and label."""
    columns = list(zip(*(row.values.values() for row in rows), strict=True))
    labels = tuple(label.strip() for label in columns[-1])
    places = tuple(location_of(path, row.line) for row in rows)
    return LabelledTexts(columns[0], columns[1] if len(columns) == 3 else None, labels, places)


def split_rows(rows: LabelledTexts, shares: Mapping[str, float], seed: int) -> dict[str, LabelledTexts]:
    """Splits rows as `split_texts` does."""
    indices_by_split = split_texts(rows.texts, shares, seed, where=rows.places[0].rpartition(":")[0])
    return {name: rows.take(indices) for name, indices in indices_by_split.items()}


def normalize(text: str) -> str:
    """Returns what texts have in common that land in one split: case and spacing are ignored.

    A change here would move examples between the splits of existing runs.
    """
    return " ".join(text.split()).casefold()


def comparable(text: str) -> str:
    """Returns what duplicates have in common: as in `normalize`, and Unicode's spellings are ignored."""
    return normalize(unicodedata.normalize("NFKC", text))


def split_texts(
    texts: Sequence[str], shares: Mapping[str, float], seed: int, *, where: str
) -> dict[str, list[int]]:
    """Splits texts into `train` and the splits in `shares`; returns the indices of each.

    A share is a fraction of the distinct texts. A split has at least one text, but is left out if its share is 0.
    """
    keys = [normalize(text) for text in texts]
    order = sorted(set(keys), key=lambda key: hashlib.blake2b(f"{seed} {key}".encode()).digest())
    sizes = {name: max(1, round(share * len(order))) for name, share in shares.items() if share > 0}
    if sum(sizes.values()) >= len(order):
        raise ValueError(
            f"{where}: {len(order)} distinct texts are too few to split into "
            f"{', '.join(('train', *sizes))}: add rows"
        )
    names = [name for name, size in sizes.items() for _ in range(size)]
    split_of = dict.fromkeys(order, "train") | dict(zip(order, names, strict=False))
    return {name: [i for i, key in enumerate(keys) if split_of[key] == name] for name in ("train", *sizes)}
