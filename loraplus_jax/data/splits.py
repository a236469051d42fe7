"""Labelled texts: reads rows from files and splits them into train, validation and test."""

import dataclasses
import functools
import hashlib
import operator
import unicodedata
from collections.abc import Callable, Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

from .options import DataOptions
from .readers import NUMBER, TABLE_SUFFIXES, read_rows


@dataclasses.dataclass(frozen=True, slots=True)
class LabelledText:
    """A text, or a pair of texts, with its label.

    Attributes:
      prompt: the text.
      label: the label as written in the file, without surrounding whitespace.
      place: its location in the file, for error messages.
      pair: the second text of a pair.
    """

    prompt: str
    label: str
    place: str = "a text"
    pair: str | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """What duplicates have in common: the texts."""
        return tuple(map(comparable, self.texts))

    @property
    def label_key(self) -> Any:
        """What equal labels have in common: the exact number, or else the text."""
        # Floats of 17 digits may be equal though the labels are not.
        return Decimal(self.label) if NUMBER.fullmatch(self.label) else self.label

    @property
    def texts(self) -> tuple[str, ...]:
        """The text and, of a pair, the second text."""
        return (self.prompt,) if self.pair is None else (self.prompt, self.pair)


def load_splits(options: DataOptions, resolve: Callable[[str], Path]) -> dict[str, list[LabelledText]]:
    """Loads labelled texts as `split_files` does.

    Args:
      options: files, columns and split fractions.
      resolve: turns a setting's value into a path, as `fetch.resolve` does.

    Raises:
      ValueError: a file is invalid (see `read_rows`) or cannot be split (see `split_files`), or `delimiter`,
        `quoting` or `header` is set but no file is a table.
    """
    files = [file for files in options.files.values() for file in files]
    for name in options.table_options:
        if not any(resolve(file).suffix.lower() in TABLE_SUFFIXES for file in files):
            raise ValueError(f"data.{name} requires a .csv or .tsv file, got {', '.join(files)}")
    return split_files(options, lambda value: load_rows(resolve(value), options))


def split_files(options: DataOptions, load: Callable[[str], list[Any]]) -> dict[str, list[Any]]:
    """Loads the examples of `train`, `validation` and, if there is one, `test`.

    A single file is split by a hash of `split_seed` and the text. The split depends neither on the order of the
    rows nor on the labels, and adding rows moves only texts near a split boundary. Texts that differ only in case
    or spacing count as one text and go to the same split. A split has at least one text, but is left out if its
    fraction is 0.

    Args:
      options: the files, and the fractions of the distinct texts to split off.
      load: reads a file: labelled texts, conversations or questions, which are split by their `prompt`.

    Raises:
      ValueError: a file has too few distinct texts to split.
    """
    splits = {name: functools.reduce(operator.add, map(load, files)) for name, files in options.files.items()}
    shares = {} if "validation" in splits else {"validation": options.validation_fraction}
    if options.path is not None:
        splits["train"], shares = splits["path"], shares | {"test": options.test_fraction}
    if shares:
        rows = splits["train"]
        keys = [normalize(row.prompt) for row in rows]
        # By hashes alone, so that neither the order of the rows nor their labels matter.
        order = sorted(set(keys), key=lambda key: _hash(options.split_seed, key))
        sizes = {name: max(1, round(share * len(order))) for name, share in shares.items() if share > 0}
        if sum(sizes.values()) >= len(order):
            raise ValueError(
                f"{rows[0].place.rpartition(':')[0]}: {len(order)} distinct texts are too few to split into "
                f"{', '.join(('train', *sizes))}: add rows"
            )
        names = [name for name, size in sizes.items() for _ in range(size)]
        split_of = dict.fromkeys(order, "train") | dict(zip(order, names, strict=False))
        for name in ("train", *sizes):
            splits[name] = [row for row, key in zip(rows, keys, strict=True) if split_of[key] == name]
    return {name: splits[name] for name in ("train", "validation", "test") if name in splits}


def load_rows(path: Path, options: DataOptions) -> list[LabelledText]:
    """Reads the rows of one file, with the columns in the settings; raises as `read_rows` does."""
    return labelled_texts(read_rows(path, options.columns, **options.table_options))


def labelled_texts(rows: Iterable[tuple[str, tuple[str, ...]]]) -> list[LabelledText]:
    """Returns the rows of a file, whose columns are text, second text if any, and label."""
    return [LabelledText(text, label.strip(), location, *pair) for location, (text, *pair, label) in rows]


def limit_splits(
    splits: dict[str, list[Any]], options: DataOptions
) -> tuple[dict[str, list[Any]], list[str]]:
    """Returns at most `data.limit` examples of each split, in order, and lines to print about it.

    As in `split_files`, a hash of `split_seed` and the text decides, not the order of the rows.
    """
    if options.limit is None:
        return splits, []
    limited, kept = {}, []
    for name, rows in splits.items():
        keys = [_hash(options.split_seed, normalize(row.prompt)) for row in rows]
        indices = sorted(sorted(range(len(keys)), key=keys.__getitem__)[: options.limit])
        limited[name] = [rows[i] for i in indices]
        kept.append(f"{len(indices):,} of {len(rows):,} {name}")
    return limited, [f"data.limit {options.limit} keeps {', '.join(kept)}"]


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
