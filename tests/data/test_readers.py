"""What files may hold and what not: long texts, labels written in several ways, keys that stand twice."""

import csv
import json

import pytest

from loraplus_jax.data.labels import label_names
from loraplus_jax.data.readers import Problems, read_records, read_rows
from loraplus_jax.data.splits import Rows, load_rows
from loraplus_jax.settings.schema import DataSettings


def test_a_text_longer_than_pythons_own_limit_is_read_and_the_limit_left_as_it_was(tmp_path):
    text, before = "good film " * 20_000, csv.field_size_limit()
    assert len(text) > before
    for suffix, gap in (("csv", ","), ("tsv", "\t")):
        path = tmp_path / f"long.{suffix}"
        path.write_text(f"text{gap}label\n{text}{gap}yes\nshort{gap}no\n")
        assert [row.values["text"] for row in read_rows(path, ("text", "label"))] == [text, "short"]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_white_space_around_a_label_makes_no_class_of_its_own(tmp_path, suffix):
    labels = ["yes", " yes", "yes\t", "no", "no "]
    lines = [f"t{n},{label}" for n, label in enumerate(labels)]
    if suffix == "jsonl":
        lines = [json.dumps({"text": f"t{n}", "label": label}) for n, label in enumerate(labels)]
    path = tmp_path / f"labels.{suffix}"
    path.write_text("\n".join(lines if suffix == "jsonl" else ["text,label", *lines]))
    rows = load_rows(path, DataSettings(path=str(path)))
    assert rows.labels == ("yes", "yes", "yes", "no", "no")
    assert label_names({"train": rows}) == ["no", "yes"]


def test_a_number_of_json_is_one_label_however_it_is_written(tmp_path):
    values = ["1", "1.0", "1e0", '"1"', "-0.0", "2.5", "2.50", "true", "1e300"]
    path = tmp_path / "numbers.jsonl"
    path.write_text("\n".join(f'{{"text": "t{n}", "label": {value}}}' for n, value in enumerate(values)))
    rows = load_rows(path, DataSettings(path=str(path)))
    assert rows.labels == ("1", "1", "1", "1", "0", "2.5", "2.5", "true", "1e+300")


def test_the_same_number_as_two_labels_is_refused():
    rows = Rows(tuple("abcd"), None, ("1", "1.0", "2", "3.0"), tuple("abcd"))
    with pytest.raises(ValueError, match=r"labels '1' and '1\.0' are the same number"):
        label_names({"train": rows})
    assert label_names({"train": rows.take([1, 2, 3])}) == ["1.0", "2", "3.0"]


def test_an_object_with_a_key_twice_is_refused_wherever_it_stands(tmp_path):
    line = '{"messages": [{"role": "user", "content": "a", "role": "assistant"}]}'
    lines, items = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text(f'{{"messages": []}}\n{line}\n')
    problems = Problems()
    assert read_records(lines, problems) == [(1, {"messages": []})]
    assert problems.first == [(2, 'invalid JSON: the key "role" stands twice in an object')]
    items.write_text(f"[{line}]")
    with pytest.raises(ValueError, match=r'a\.json:1: invalid JSON: the key "role" stands twice'):
        read_records(items, Problems())
