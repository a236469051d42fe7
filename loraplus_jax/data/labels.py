"""Converts labels from text to class indices or numbers."""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from .._validation import suggest
from .readers import raise_problems
from .splits import LabelledTexts


def label_names(splits: Mapping[str, LabelledTexts]) -> list[str]:
    """Returns the classes: the distinct labels of the train split, sorted (by value if all are integers).

    Raises:
      ValueError: there is only one class, two are the same integer (1 and 1.0), or another split has labels that
        are not in train (with `file:line`).
    """
    known = set(splits["train"].labels)
    integers = all(re.fullmatch(r"[+-]?[0-9]{1,18}", label) for label in known)
    names = sorted(known, key=lambda label: (int(label) if integers else 0, label))
    raise_problems([problem for rows in splits.values() for problem in _unknown_labels(rows, names)])
    for name in names:
        if (number := re.fullmatch(r"([+-]?[0-9]+)\.0+", name)) and number[1] in known:
            raise ValueError(
                f"labels {number[1]!r} and {name!r} are the same number: write both the same way"
            )
    if len(names) < 2:
        raise ValueError(
            f"classification needs at least two labels, but the train split has only {names[0]!r}"
        )
    return names


def class_labels(rows: LabelledTexts, names: Sequence[str]) -> np.ndarray:
    """Returns each row's index in `names`, int32 `(N,)`; raises a ValueError with `file:line` for other labels."""
    raise_problems(_unknown_labels(rows, names))
    index = {name: i for i, name in enumerate(names)}
    return np.array([index[label] for label in rows.labels], np.int32)


def _unknown_labels(rows: LabelledTexts, names: Sequence[str]) -> list[tuple[str, str]]:
    """Returns (location, problem) for each label that is not in the train split."""
    known = set(names)
    return [
        (location, f"label {label!r} is not in the train split{suggest(label, names)}")
        for label, location in zip(rows.labels, rows.places, strict=True)
        if label not in known
    ]


def regression_labels(rows: LabelledTexts) -> np.ndarray:
    """Parses labels as finite numbers, float32 `(N,)`; raises a ValueError with `file:line` for other labels."""
    values = [_number(label) for label in rows.labels]
    raise_problems(
        [
            (location, f"regression labels must be finite float32 numbers, got {label!r}")
            for label, location, value in zip(rows.labels, rows.places, values, strict=True)
            if not abs(value) <= float(np.finfo(np.float32).max)
        ]
    )
    return np.array(values, np.float32)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
