"""Labels as written in a file to classes or numbers."""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from .._validation import suggest
from .readers import raise_problems
from .splits import LabelledTexts


def label_names(splits: Mapping[str, LabelledTexts]) -> list[str]:
    """The classes: the distinct labels of the train split, sorted; whole numbers by their value.

    Raises:
      ValueError: there is only one, two are one whole number, as 1 and 1.0 are, or another split has labels that
        train has not (with `file:line`).
    """
    known = set(splits["train"].labels)
    integers = all(re.fullmatch(r"[+-]?[0-9]{1,18}", label) for label in known)
    names = sorted(known, key=lambda label: (int(label) if integers else 0, label))
    raise_problems([problem for rows in splits.values() for problem in _unknown_labels(rows, names)])
    for name in names:
        if (number := re.fullmatch(r"([+-]?[0-9]+)\.0+", name)) and number[1] in known:
            raise ValueError(f"labels {number[1]!r} and {name!r} are the same number: write it in one way")
    if len(names) < 2:
        raise ValueError(
            f"classification needs two labels or more, and the train split has only {names[0]!r}"
        )
    return names


def class_labels(rows: LabelledTexts, names: Sequence[str]) -> np.ndarray:
    """Each row's index in `names`: int32 `(N,)`; another label is a ValueError with `file:line`."""
    raise_problems(_unknown_labels(rows, names))
    index = {name: i for i, name in enumerate(names)}
    return np.array([index[label] for label in rows.labels], np.int32)


def _unknown_labels(rows: LabelledTexts, names: Sequence[str]) -> list[tuple[str, str]]:
    """A problem for each label that the train split does not have."""
    known = set(names)
    return [
        (place, f"label {label!r} is not in the train split{suggest(label, names)}")
        for label, place in zip(rows.labels, rows.places, strict=True)
        if label not in known
    ]


def regression_labels(rows: LabelledTexts) -> np.ndarray:
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
