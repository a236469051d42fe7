"""Class names and regression labels, from texts."""

import difflib
import json

import numpy as np
import pytest

from loraplus_jax._utils.validation import suggest
from loraplus_jax.data import labels
from loraplus_jax.data.labels import class_labels, label_names, label_summary, regression_labels
from loraplus_jax.data.options import DataOptions
from loraplus_jax.data.splits import LabelledText, load_rows

from ..messages import assert_mentions, mentions
from ..refusals import refusals


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_white_space_around_a_label_makes_no_class_of_its_own(tmp_path, suffix):
    labels = ["yes", " yes", "yes\t", "no", "no "]
    lines = [f"t{n},{label}" for n, label in enumerate(labels)]
    if suffix == "jsonl":
        lines = [json.dumps({"text": f"t{n}", "label": label}) for n, label in enumerate(labels)]
    path = tmp_path / f"labels.{suffix}"
    path.write_text("\n".join(lines if suffix == "jsonl" else ["text,label", *lines]))
    rows = load_rows(path, DataOptions(path=str(path)))
    assert [row.label for row in rows] == ["yes", "yes", "yes", "no", "no"]
    assert label_names({"train": rows}) == ["no", "yes"]


def _rows(texts, labels) -> list[LabelledText]:
    pairs = zip(texts, labels, strict=True)
    return [LabelledText(text, label, f"f.csv:{n}") for n, (text, label) in enumerate(pairs, 2)]


def test_label_names_are_sorted_and_whole_numbers_by_value():
    assert label_names({"train": _rows("abc", ["pos", "neg", "pos"])}) == ["neg", "pos"]
    assert label_names({"train": _rows("abc", ["10", "9", "-1"])}) == ["-1", "9", "10"]
    rows = _rows("abc", ["10", "9", "-1"])
    labels = class_labels(rows, ["-1", "9", "10"])
    assert labels.tolist() == [2, 1, 0]
    assert labels.dtype == np.int32


def test_a_label_that_training_lacks_is_an_error_with_its_line():
    splits = {"train": _rows("ab", ["pos", "neg"]), "test": _rows("abc", ["pos", "Pos", "maybe"])}
    with pytest.raises(ValueError, match=mentions("f.csv:3", "'Pos'", "train", "'pos'")) as caught:
        label_names(splits)
    assert_mentions(str(caught.value), "f.csv:4", "'maybe'")


def test_only_the_problems_shown_get_a_suggestion(monkeypatch):
    calls = []
    monkeypatch.setattr(labels, "suggest", lambda label, names: calls.append(label) or "")
    rows = [_rows("a" * 1000, [f"{kind}{i}" for i in range(1000)]) for kind in "xy"]
    with pytest.raises(ValueError, match=mentions("f.csv:2", "'y0'", 1000)):
        label_names({"train": rows[0], "test": rows[1]})
    assert calls == [f"y{i}" for i in range(20)]


def test_many_names_are_neither_compared_nor_all_listed(monkeypatch):
    monkeypatch.setattr(difflib, "get_close_matches", None)
    message = suggest("y", [f"x{i:05}" for i in range(100_000)])
    assert_mentions(message, "x00000", "x00049", "99,950")
    assert len(message) < 1000


def test_a_class_of_one_text_is_told_with_the_class_that_it_may_be():
    def warning(labels):
        rows = _rows("t" * len(labels), labels)
        return label_summary({"train": rows}, label_names({"train": rows}))[-1]

    few = 3 * ["positive", "negative"]
    assert_mentions(warning([*few, "positve"]), "warning", "positve", "'positive'")
    assert "'" not in warning([*few, "?"])
    assert "'" not in warning([*(3 * ["1", "2"]), "11"])


@pytest.mark.parametrize(
    ("label", "number"),
    [("-2.5", -2.5), ("+3", 3), ("1e-3", 1e-3), ("1E+2", 100), (".5", 0.5), ("5.", 5), ("007", 7)],
)
def test_a_regression_label_is_a_number_as_programs_write_it(label, number):
    labels = regression_labels(_rows("ab", ["1", label]))
    np.testing.assert_array_equal(labels, np.array([1, number], np.float32))
    assert labels.dtype == np.float32


def classes(*labels):
    return lambda: label_names({"train": _rows("abc"[: len(labels)], labels)})


def numbers(label):
    return lambda: regression_labels(_rows("ab", ["1", label]))


NO_NUMBERS = ("1_0", "٣", "\uff11", "1,5", "inf", "-Infinity", "nan", "1e39", "0x1", "1 0", "")
SPELLINGS = [
    ("-0", "0"),
    ("01", "1"),
    ("1", "1.0"),
    ("+1", "1"),
    ("1e1", "10"),
    ("0.5", "0.50"),
    ("-0.0", "00"),
]
DECIMALS = ("3.27", "-0.5", "1e-999999")

test_labels_that_are_rejected = refusals(
    (classes("a", "a"), "'a'"),
    *((classes("1", label, "1e999999"), label, "task", "regression") for label in DECIMALS),
    *((classes(*pair, "x"), "number", *map(repr, pair)) for pair in SPELLINGS),  # of one number
    *((numbers(label), "f.csv:3", "regression", repr(label)) for label in NO_NUMBERS),
    *((numbers(x), "f.csv:3", "regression", repr(x)) for x in (".", "e5", "+", "--1", "1e", "true")),
    lines=3,
)


@pytest.mark.parametrize("decimal", DECIMALS)
def test_decimal_numbers_beside_words_are_classes(decimal):
    assert label_names({"train": _rows("ab", [decimal, "yes"])}) == [decimal, "yes"]


@pytest.mark.parametrize(
    "labels", [("1", "10"), ("9007199254740993", "9007199254740992"), ("1_0", "10"), ("٣", "3")]
)
def test_labels_that_are_not_the_same_number_are_classes(labels):
    assert set(label_names({"train": _rows("ab", labels)})) == set(labels)
