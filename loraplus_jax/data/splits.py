"""Labelled texts: files to rows, rows to splits, texts to token arrays, arrays to batches of one static shape."""

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tokenizers import Tokenizer

from ..config import check_number, check_whole, nearest
from ..models.hf import read_json
from ..models.tokenizer import read_file
from .readers import raise_problems, read_rows

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where the texts lie, which columns hold what, and how they are split.

    A value is a path, a fetchable name or a hub id; files are .csv, .tsv or .jsonl, for language models .json too.

    Attributes:
      path: one file, split by `split_seed` into train, validation and test. Either this or `train` is required.
      train: the training file, when the splits are separate files.
      validation: the validation file; without it `validation_fraction` of the training file is taken.
      test: the test file, optional; only beside `train`.
      text: the column with the text.
      text_pair: the column with a second text, for tasks on pairs.
      label: the column with the label: a class name, a whole number, or a rating for regression.
      max_length: T, tokens a text (or pair) is truncated and padded to, special tokens included.
      validation_fraction: share of the distinct texts for validation, when no file is given for it.
      test_fraction: share of the distinct texts of `path` for the test split; 0 makes none.
      split_seed: decides which text goes to which split.
      template: the chat template: the model's own, plain (a few headings), or a file.
      answers: whether all turns of the assistant are learned, or the last.
      packing: whether short conversations share a row of max_length tokens; batches are counted in rows.
      column_names: for conversations and questions in columns of other names, ours to the file's.

    Raises:
      ValueError: a field is out of range, or two do not go together; the message names them.
    """

    path: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    max_length: int = 128
    validation_fraction: float = 0.1
    test_fraction: float = 0.2
    split_seed: int = 0
    template: str = "model"
    answers: Literal["all", "last"] = "all"
    packing: bool = False
    column_names: dict[str, str] | None = None

    def __post_init__(self) -> None:
        for name in ("path", "train", "validation", "test", "text", "text_pair", "label", "template"):
            value = getattr(self, name)
            if value is None and name in ("text", "label"):
                raise ValueError(f"{name} must name a column, got None")
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise ValueError(f"{name} must be a non-empty string, got {value!r}")
        self._check_sources()
        if len(set(self.columns)) < len(self.columns):
            raise ValueError(f"text, text_pair and label must be different columns, got {self.columns}")
        check_whole("max_length", self.max_length, at_least=2)
        check_whole("split_seed", self.split_seed, at_least=0)
        check_number("validation_fraction", self.validation_fraction, above=0.0, below=1.0)
        check_number("test_fraction", self.test_fraction, at_least=0.0, below=1.0)
        if self.path is not None and self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                "validation_fraction and test_fraction must leave something for training, "
                f"got {self.validation_fraction} + {self.test_fraction}"
            )

    def _check_sources(self) -> None:
        if (self.path is None) == (self.train is None):
            given = f"path={self.path!r} and train={self.train!r}"
            raise ValueError(
                f"give either path (one file, split by seed) or train (separate files), got {given}"
            )
        if self.path is not None:
            for name in ("validation", "test"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} goes with train, not with path, got {getattr(self, name)!r}")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        return tuple(c for c in (self.text, self.text_pair, self.label) if c is not None)


@dataclasses.dataclass(frozen=True)
class Rows:
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

    def take(self, indices: Iterable[int]) -> "Rows":
        """The rows at `indices`, in their order."""
        kept = list(indices)

        def pick(column: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(column[i] for i in kept)

        pairs = None if self.pairs is None else pick(self.pairs)
        return Rows(pick(self.texts), pairs, pick(self.labels), pick(self.places))


def load_splits(settings: DataSettings, resolve: Callable[[str], Path]) -> dict[str, Rows]:
    """The rows of `train`, `validation` and, where there is one, `test`.

    One file is split by hashes of `split_seed` and text: neither the order of the file nor the labels matter, and
    more rows move only texts near a border. Texts that differ in case or spacing only stay together, as one.

    Args:
      settings: says which files, columns and shares.
      resolve: turns what the user named into a path, as `fetch.resolve` does.

    Raises:
      ValueError: a file is faulty (see `read_rows`), or holds too few distinct texts to split.
    """
    return split_files(settings, lambda value: load_rows(resolve(value), settings), _split)


def split_files(
    settings: DataSettings, load: Callable[[str], Any], split: Callable[[Any, Mapping[str, float], int], dict]
) -> dict[str, Any]:
    """What `load` makes of each file that the settings name, by split; `split` cuts one file by shares and seed."""
    if settings.path is not None:
        shares = {"validation": settings.validation_fraction, "test": settings.test_fraction}
        return split(load(settings.path), shares, settings.split_seed)
    named = {"train": settings.train, "validation": settings.validation, "test": settings.test}
    splits = {key: load(value) for key, value in named.items() if value is not None}
    if "validation" not in splits:
        splits |= split(splits["train"], {"validation": settings.validation_fraction}, settings.split_seed)
    return {key: splits[key] for key in named if key in splits}


def load_rows(path: Path, settings: DataSettings) -> Rows:
    """The rows of one file, in the columns that the settings name; errors as `read_rows` has them."""
    rows = read_rows(path, settings.columns)

    def column(name: str) -> tuple[str, ...]:
        return tuple(row.values[name] for row in rows)

    pairs = column(settings.text_pair) if settings.text_pair is not None else None
    places = tuple(f"{path}:{row.line}" for row in rows)
    labels = tuple(label.strip() for label in column(settings.label))
    return Rows(column(settings.text), pairs, labels, places)


def _split(rows: Rows, shares: Mapping[str, float], seed: int) -> dict[str, Rows]:
    homes = split_texts(rows.texts, shares, seed, where=rows.places[0].rpartition(":")[0])
    return {name: rows.take(indices) for name, indices in homes.items()}


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
    home = dict.fromkeys(order, "train") | dict(zip(order, names, strict=False))
    return {name: [i for i, key in enumerate(keys) if home[key] == name] for name in ("train", *sizes)}


def label_names(splits: Mapping[str, Rows]) -> list[str]:
    """The classes: the distinct labels of the train split, sorted; whole numbers by their value.

    Raises:
      ValueError: there is only one, two are one whole number, as 1 and 1.0 are, or another split has labels that
        train has not (with `file:line`).
    """
    known = set(splits["train"].labels)
    whole = all(re.fullmatch(r"[+-]?[0-9]{1,18}", label) for label in known)
    names = sorted(known, key=lambda label: (int(label) if whole else 0, label))
    raise_problems([problem for rows in splits.values() for problem in _unknown(rows, names)])
    for name in names:
        if (number := re.fullmatch(r"([+-]?[0-9]+)\.0+", name)) and number[1] in known:
            raise ValueError(f"labels {number[1]!r} and {name!r} are the same number: write it in one way")
    if len(names) < 2:
        raise ValueError(
            f"classification needs two labels or more, and the train split has only {names[0]!r}"
        )
    return names


def class_labels(rows: Rows, names: Sequence[str]) -> np.ndarray:
    """Each row's index in `names`: int32 `(N,)`; another label is a ValueError with `file:line`."""
    raise_problems(_unknown(rows, names))
    index = {name: i for i, name in enumerate(names)}
    return np.array([index[label] for label in rows.labels], np.int32)


def _unknown(rows: Rows, names: Sequence[str]) -> list[tuple[str, str]]:
    """The problems of labels that training does not know."""
    known = set(names)
    return [
        (place, f"label {label!r} is not in the train split{nearest(label, names)}")
        for label, place in zip(rows.labels, rows.places, strict=True)
        if label not in known
    ]


def regression_labels(rows: Rows) -> np.ndarray:
    """The labels as numbers: float32 `(N,)`; one that is no finite number is a ValueError with `file:line`."""
    values = [_number(label) for label in rows.labels]
    raise_problems(
        [
            (place, f"regression needs finite numbers as labels, got {label!r}")
            for label, place, value in zip(rows.labels, rows.places, values, strict=True)
            if not abs(value) <= float(np.finfo(np.float32).max)
        ]
    )
    return np.array(values, np.float32)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def load_tokenizer(directory: Path, max_length: int) -> Tokenizer:
    """The tokenizer of `tokenizer.json`, set to truncate and pad on the right to exactly `max_length` tokens.

    Padding and truncation baked into the file are replaced. The pad token is that of the file's own padding, or of
    `tokenizer_config.json`, or a token called `[PAD]` or `<pad>`, or else the end-of-text token.

    Raises:
      ValueError: the file is missing or broken, or no pad token is found.
    """
    tokenizer = read_file(directory)
    token = _pad_token(tokenizer, directory / "tokenizer_config.json")
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(token), pad_token=token, length=max_length)
    return tokenizer


def _pad_token(tokenizer: Tokenizer, config_path: Path) -> str:
    config = read_json(config_path) if config_path.is_file() else {}
    declared = [config.get("pad_token"), "[PAD]", "<pad>", config.get("eos_token"), "</s>", "<|endoftext|>"]
    for token in [(tokenizer.padding or {}).get("pad_token"), *declared]:
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and tokenizer.token_to_id(token) is not None:
            return token
    raise ValueError(f"no pad token found: name one as pad_token in {config_path}")


def encode(texts: Sequence[str], pairs: Sequence[str] | None, tokenizer: Tokenizer) -> tuple[Batch, int]:
    """Token arrays of N texts or pairs, with a tokenizer from `load_tokenizer`.

    Returns:
      int32 `input_ids`, `attention_mask` and `token_type_ids`, each `(N, T)`, T being the tokenizer's `max_length`;
      and how many of the N were truncated. Special tokens are never cut.

    Raises:
      ValueError: `max_length` leaves no room for the text.
    """
    if tokenizer.truncation is None:
        raise ValueError("the tokenizer has no max_length: take it from load_tokenizer")
    length = tokenizer.truncation["max_length"]
    special = tokenizer.num_special_tokens_to_add(pairs is not None)
    if length <= special:
        raise ValueError(f"max_length must be above {special}, the number of special tokens, got {length}")
    inputs = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
    columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    arrays = {name: np.zeros((len(inputs), length), np.int32) for name in columns}
    truncated = 0
    for start in range(0, len(inputs), 1024):  # an Encoding takes far more memory than its row
        encodings = tokenizer.encode_batch_fast(inputs[start : start + 1024])
        truncated += sum(bool(e.overflowing) for e in encodings)
        for name, attribute in columns.items():
            arrays[name][start : start + 1024] = [getattr(e, attribute) for e in encodings]
    return arrays, truncated


def train_batches(
    arrays: Mapping[str, np.ndarray],
    *,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | np.ndarray | None = None,
) -> "grain.DatasetIterator[Batch]":
    """Endless batches of N rows, reshuffled every epoch by `seed`, the last incomplete batch of each left out.

    Every process sees the same global batches and takes the rows of each that its own devices need, so what is
    learnt does not depend on the number of processes. A batch is made when it is asked for (in less than
    a millisecond; nothing is prefetched), so the iterator's `get_state()`, a small dictionary for JSON, is the
    position after the last batch taken, and `set_state()` goes back to exactly there.

    Args:
      arrays: columns, each of N rows.
      batch_size: rows of the global batch.
      seed: of the shuffles.
      rows: which rows of a global batch to take, as `sharding.local_rows` gives them; all by default.

    Returns:
      A grain iterator of the columns' rows, with float32 ones as `weight`.

    Raises:
      ValueError: columns of different length, or a batch larger than the data.
    """
    import grain  # takes a second to import, which command lines' help should not wait for

    size = _row_count(arrays, batch_size)
    if batch_size > size:
        raise ValueError(f"batch_size must be at most {size}, the number of training rows, got {batch_size}")
    check_whole("seed", seed, at_least=0)

    def take(indices: np.ndarray) -> Batch:
        mine = indices if rows is None else indices[rows]
        return _take(arrays, mine, np.ones(len(mine), np.float32))

    indices = grain.MapDataset.range(size).seed(seed).shuffle().batch(batch_size, drop_remainder=True)
    return iter(
        indices.map(take).repeat().to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    )


def eval_batches(
    arrays: Mapping[str, np.ndarray], batch_size: int, rows: Sequence[int] | np.ndarray | None = None
) -> Iterator[Batch]:
    """Every row once, in order, in batches of exactly `batch_size` rows, or of each batch the given `rows`.

    The last batch is filled up with copies of the last row, whose float32 `weight` is 0; all others have 1.

    Raises:
      ValueError: columns of different length, or a batch size below 1.
    """
    size = _row_count(arrays, batch_size)
    for start in range(0, size, batch_size):
        indices = start + (np.arange(batch_size) if rows is None else np.asarray(rows))
        yield _take(arrays, np.minimum(indices, size - 1), (indices < size).astype(np.float32))


def _take(arrays: Mapping[str, np.ndarray], indices: np.ndarray, weight: np.ndarray) -> Batch:
    return {name: array[indices] for name, array in arrays.items()} | {"weight": weight}


def _row_count(arrays: Mapping[str, np.ndarray], batch_size: int) -> int:
    check_whole("batch_size", batch_size, at_least=1)
    sizes = {name: len(array) for name, array in arrays.items()}
    if len(set(sizes.values())) != 1 or "weight" in sizes:
        raise ValueError(f"columns must have the same number of rows, and none be called weight, got {sizes}")
    return next(iter(sizes.values()))


def digest(splits: Mapping[str, Batch]) -> str:
    """A short hex digest of all arrays, by which a run that goes on knows its data again."""
    total = hashlib.sha256()
    for split, arrays in splits.items():
        for name, array in arrays.items():
            total.update(f"{split} {name} {array.shape}".encode())
            total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()[:16]
