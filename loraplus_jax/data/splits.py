"""Labelled texts: reads rows from files and splits them into train, validation and test."""

import dataclasses
import functools
import hashlib
import operator
import unicodedata
from collections.abc import Callable, Iterable, Sequence
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

    def __add__(self, other: "LabelledTexts") -> "LabelledTexts":
        pairs = None if self.pairs is None or other.pairs is None else self.pairs + other.pairs
        return LabelledTexts(
            self.texts + other.texts, pairs, self.labels + other.labels, self.places + other.places
        )

    def take(self, indices: Iterable[int]) -> "LabelledTexts":
        """Returns the rows at `indices`, in that order."""
        indices = list(indices)

        def pick(column: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(column[i] for i in indices)

        pairs = None if self.pairs is None else pick(self.pairs)
        return LabelledTexts(pick(self.texts), pairs, pick(self.labels), pick(self.places))


def load_splits(settings: DataSettings, resolve: Callable[[str], Path]) -> dict[str, LabelledTexts]:
    """Loads labelled texts as `split_files` does.

    Args:
      settings: files, columns and split fractions.
      resolve: turns a setting's value into a path, as `fetch.resolve` does.

    Raises:
      ValueError: a file is invalid (see `read_rows`) or cannot be split (see `split_files`), or `delimiter`,
        `quoting` or `header` is set but no file is a table.
    """
    files = [file for files in settings.files.values() for file in files]
    for name in settings.table_options:
        if not any(resolve(file).suffix.lower() in TABLE_SUFFIXES for file in files):
            raise ValueError(f"data.{name} requires a .csv or .tsv file, got {', '.join(files)}")
    return split_files(settings, lambda value: load_rows(resolve(value), settings))


def split_files(settings: DataSettings, load: Callable[[str], Any]) -> dict[str, Any]:
    """Loads the rows of `train`, `validation` and, if there is one, `test`.

    A single file is split by a hash of `split_seed` and the text. The split depends neither on the order of the
    rows nor on the labels, and adding rows moves only texts near a split boundary. Texts that differ only in case
    or spacing count as one text and go to the same split. A split has at least one text, but is left out if its
    fraction is 0.

    Args:
      settings: the files, and the fractions of the distinct texts to split off.
      load: reads a file: labelled texts, or a list of conversations or questions, which are split by the first
        user message.

    Raises:
      ValueError: a file has too few distinct texts to split.
    """
    splits = {
        name: functools.reduce(operator.add, map(load, files)) for name, files in settings.files.items()
    }
    shares = {} if "validation" in splits else {"validation": settings.validation_fraction}
    if settings.path is not None:
        splits["train"], shares = splits["path"], shares | {"test": settings.test_fraction}
    if shares:
        rows = splits["train"]
        keys = [normalize(text) for text, _ in _texts(rows)]
        # By hashes alone, so that neither the order of the rows nor their labels matter.
        order = sorted(set(keys), key=lambda key: _hash(settings.split_seed, key))
        sizes = {name: max(1, round(share * len(order))) for name, share in shares.items() if share > 0}
        if sum(sizes.values()) >= len(order):
            _, place = _texts(rows)[0]
            raise ValueError(
                f"{place.rpartition(':')[0]}: {len(order)} distinct texts are too few to split into "
                f"{', '.join(('train', *sizes))}: add rows"
            )
        names = [name for name, size in sizes.items() for _ in range(size)]
        split_of = dict.fromkeys(order, "train") | dict(zip(order, names, strict=False))
        for name in ("train", *sizes):
            splits[name] = take(rows, [i for i, key in enumerate(keys) if split_of[key] == name])
    return {name: splits[name] for name in ("train", "validation", "test") if name in splits}


def _texts(rows: Any) -> list[tuple[str, str]]:
    # By this text rows are split; the location is for messages.
    if isinstance(rows, LabelledTexts):
        return list(zip(rows.texts, rows.places, strict=True))
    return [(row.prompt, row.place) for row in rows]


def load_rows(path: Path, settings: DataSettings) -> LabelledTexts:
    """Reads the rows of one file, with the columns in the settings; raises as `read_rows` does."""
    return labelled_texts(path, read_rows(path, settings.columns, **settings.table_options))


def labelled_texts(path: Path, rows: Sequence[StringRow]) -> LabelledTexts:
    """Returns the rows of a file, whose columns are text, second text if any, and label."""
    columns = list(zip(*(row.values.values() for row in rows), strict=True))
    labels = tuple(label.strip() for label in columns[-1])
    places = tuple(location_of(path, row.line) for row in rows)
    return LabelledTexts(columns[0], columns[1] if len(columns) == 3 else None, labels, places)


def limit_splits(splits: dict[str, Any], settings: DataSettings) -> tuple[dict[str, Any], list[str]]:
    """Returns at most `data.limit` examples of each split, in order, and lines to print about it.

    As in `split_files`, a hash of `split_seed` and the text decides, not the order of the rows.
    """
    if settings.limit is None:
        return splits, []
    limited, kept = {}, []
    for name, rows in splits.items():
        keys = [_hash(settings.split_seed, normalize(text)) for text, _ in _texts(rows)]
        indices = sorted(sorted(range(len(keys)), key=keys.__getitem__)[: settings.limit])
        limited[name] = take(rows, indices)
        kept.append(f"{len(indices):,} of {len(rows):,} {name}")
    return limited, [f"data.limit {settings.limit} keeps {', '.join(kept)}"]


def take(rows: Any, indices: Iterable[int]) -> Any:
    """Returns the rows at `indices` of labelled texts, or of a list of conversations or questions."""
    return rows.take(indices) if isinstance(rows, LabelledTexts) else [rows[i] for i in indices]


def normalize(text: str) -> str:
    """Returns what texts have in common that land in one split: case and spacing are ignored.

    A change here would move examples between the splits of existing runs.
    """
    return " ".join(text.split()).casefold()


def comparable(text: str) -> str:
    """Returns what duplicates have in common: as in `normalize`, and Unicode's spellings are ignored."""
    return normalize(unicodedata.normalize("NFKC", text))


def _hash(seed: int, key: str) -> bytes:
    # Not `hash`, which Python salts in every process.
    return hashlib.blake2b(f"{seed} {key}".encode()).digest()
