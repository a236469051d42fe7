"""Converts labels from text to class indices or numbers."""

import collections
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from .._utils.validation import suggest
from .readers import NUMBER, SHOWN_PROBLEMS, Problems
from .splits import LabelledText, comparable


def label_names(splits: Mapping[str, Sequence[LabelledText]]) -> list[str]:
    """Returns the classes: the distinct labels of the train split, sorted (by value if all are integers).

    Raises:
      ValueError: there is only one class, two are the same number (1 and 01), or all are numbers and one is no
        integer; or another split has labels that are not in train (with `file:line`).
    """
    known = {row.label for row in splits["train"]}
    integers = all(re.fullmatch(r"[+-]?[0-9]{1,18}", label) for label in known)
    names = sorted(known, key=lambda label: (int(label) if integers else 0, label))
    if all(NUMBER.fullmatch(name) for name in names):
        decimal = next((name for name in names if Decimal(name) != Decimal(name).to_integral_value()), None)
        if decimal is not None:
            raise ValueError(
                f"classes must be words or integers, but the labels are numbers such as {decimal}: set task "
                "regression, or data.label to another column"
            )
    _check_known(itertools.chain(*splits.values()), names)
    spellings: dict[Any, str] = {}
    for name in names:
        if (earlier := spellings.setdefault(LabelledText("", name).label_key, name)) != name:
            raise ValueError(f"labels {earlier!r} and {name!r} are the same number: write both the same way")
    if len(names) < 2:
        raise ValueError(
            f"classification needs at least two labels, but the train split has only {names[0]!r}"
        )
    return names


def class_labels(rows: Sequence[LabelledText], names: Sequence[str]) -> np.ndarray:
    """Returns each row's index in `names`, int32 `(N,)`; raises a ValueError with `file:line` for other labels."""
    _check_known(rows, names)
    index = {name: i for i, name in enumerate(names)}
    return np.array([index[row.label] for row in rows], np.int32)


def label_summary(splits: Mapping[str, Sequence[LabelledText]], names: Sequence[str]) -> list[str]:
    """Describes the classes of the train split, and warns of labels that look like mistakes.

    >>> rows = [LabelledText("a", "bug"), LabelledText("b", "Bug"), LabelledText("a", "Bug")]
    >>> for line in label_summary({"train": rows}, ["Bug", "bug"]):
    ...     print(line)
    2 classes: Bug 2, bug 1
    warning: classes that differ only in case, spacing or Unicode spelling: Bug, bug
    warning: classes with one training text: bug; did you mean 'Bug'?
    """
    counts = collections.Counter(row.label for row in splits["train"])
    shown = [f"{name} {counts[name]:,}" for name in names[:MAX_CLASSES_SHOWN]]
    rest = [f"and {len(names) - len(shown)} more"] if len(names) > len(shown) else []
    lines = [f"{len(names)} classes: {', '.join([*shown, *rest])}"]
    alike = collections.defaultdict(list)
    for name in names:
        alike[comparable(name)].append(name)
    if twins := [name for group in alike.values() if len(group) > 1 for name in group]:
        listed = ", ".join(twins[:MAX_CLASSES_SHOWN])
        lines.append(f"warning: classes that differ only in case, spacing or Unicode spelling: {listed}")
    if single := [name for name in names if counts[name] == 1]:
        # A mistyped label makes a class of its own.
        others = [name for name in names if counts[name] > 1 and not NUMBER.fullmatch(name)]
        shown = [name + suggest(name, others, fallback=False) for name in single[:MAX_CLASSES_SHOWN]]
        lines.append(f"warning: classes with one training text: {', '.join(shown)}")
    return lines


MAX_CLASSES_SHOWN = 20


def _check_known(rows: Iterable[LabelledText], names: Sequence[str]) -> None:
    known, problems = set(names), Problems()
    for row in rows:
        if row.label not in known:
            # A suggestion compares a label with every name, so only the problems shown get one.
            hint = suggest(row.label, names) if problems.count < SHOWN_PROBLEMS else ""
            problems.add(row.place, f"label {row.label!r:.80} is not in the train split{hint}")
    problems.report()


def regression_labels(rows: Sequence[LabelledText]) -> np.ndarray:
    """Parses labels as finite numbers, float32 `(N,)`; raises a ValueError with `file:line` for other labels."""
    values = [float(row.label) if NUMBER.fullmatch(row.label) else math.nan for row in rows]
    allowed = "regression labels must be finite float32 numbers, such as -1.5 or 2e3"
    Problems(
        (row.place, f"{allowed}, got {row.label!r}")
        for row, value in zip(rows, values, strict=True)
        if not abs(value) <= float(np.finfo(np.float32).max)
    ).report()
    return np.array(values, np.float32)
