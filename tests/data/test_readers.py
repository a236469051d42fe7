"""What tables and JSON files may hold: encodings, line ends, long texts, numbers; every problem with its line."""

import csv
import json
import tracemalloc
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplus_jax.data.options import DataOptions
from loraplus_jax.data.readers import Problems, read_records, read_rows
from loraplus_jax.data.splits import LabelledText, load_rows

from ..messages import assert_mentions, mentions
from .tables import write_table


def test_a_text_longer_than_pythons_own_limit_is_read_and_the_limit_left_as_it_was(tmp_path):
    text, before = "good film " * 20_000, csv.field_size_limit()
    assert len(text) > before
    for suffix, gap in (("csv", ","), ("tsv", "\t")):
        path = tmp_path / f"long.{suffix}"
        path.write_text(f"text{gap}label\n{text}{gap}yes\nshort{gap}no\n")
        assert [row[0] for _, row in read_rows(path, ("text", "label"))] == [text, "short"]
    assert csv.field_size_limit() == before


def test_a_number_of_json_is_one_label_however_it_is_written(tmp_path):
    values = ["1", "1.0", "1e0", '"1"', "-0.0", "2.5", "2.50", "true", "1e300"]
    path = tmp_path / "numbers.jsonl"
    path.write_text("\n".join(f'{{"text": "t{n}", "label": {value}}}' for n, value in enumerate(values)))
    rows = load_rows(path, DataOptions(path=str(path)))
    assert [row.label for row in rows] == ["1", "1", "1", "1", "0", "2.5", "2.5", "true", "1e+300"]


def test_an_object_with_a_key_twice_is_rejected_at_any_depth(tmp_path):
    line = '{"messages": [{"role": "user", "content": "a", "role": "assistant"}]}'
    lines, items = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text(f'{{"messages": []}}\n{line}\n')
    problems = Problems()
    assert list(read_records(lines, problems)) == [(f"{lines}:1", {"messages": []})]
    ((location, text),) = problems.first
    assert location == f"{lines}:2"
    assert_mentions(text, "JSON", '"role"')
    items.write_text(f"[{line}]")
    with pytest.raises(ValueError, match=mentions("a.json:1", "JSON", '"role"')):
        list(read_records(items, Problems()))


GOOD = [("1", 'say "hi", twice', "yes"), ("2", "two\nlines", "no"), ("3", "\N{SNOWMAN} tab\there", "yes")]


def _write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".CSV"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_tables_are_read_whatever_wrote_them(tmp_path, suffix, newline, encoding):
    path = write_table(tmp_path / f"a{suffix}", GOOD, newline=newline, encoding=encoding)
    rows = read_rows(path, ["text", "label"])
    assert [row for _, row in rows] == [g[1:] for g in GOOD]
    assert [place for place, _ in rows] == [
        f"{path}:{n}" for n in (2, 3, 5)
    ]  # the second row holds a line break


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_json_lines_are_read_as_strings(tmp_path, newline):
    values = [
        {"text": "a\u2028b", "label": 1},
        {"text": "c", "label": -0.5, "x": []},
        {"text": "d", "label": True},
    ]
    text = "\ufeff" + newline.join(
        ["", json.dumps(values[0], ensure_ascii=False), " ", *map(json.dumps, values[1:])]
    )
    rows = read_rows(path := _write(tmp_path / "a.jsonl", text), ["text", "label"])
    assert [row for _, row in rows] == [("a\u2028b", "1"), ("c", "-0.5"), ("d", "true")]
    assert [place for place, _ in rows] == [f"{path}:{n}" for n in (2, 4, 5)]


def test_blank_lines_are_skipped_and_unasked_columns_may_be_empty(tmp_path):
    path = _write(tmp_path / "a.csv", "\n\ntext,other,label\n\na,,x\n   \nb,1,y\n\n")
    assert read_rows(path, ["label"]) == [(f"{path}:5", ("x",)), (f"{path}:7", ("y",))]


def test_an_empty_cell_of_a_single_column_is_no_blank_line(tmp_path):
    path = _write(tmp_path / "a.csv", 'text\n"a"\n""\n\n"b"\n')
    with pytest.raises(ValueError, match=mentions("a.csv:3", "'text'", "empty")):
        read_rows(path, ["text"])
    rows = read_rows(path, ["text"], may_be_empty=["text"])
    assert rows == [(f"{path}:{line}", (text,)) for line, text in ((2, "a"), (3, ""), (5, "b"))]


@pytest.mark.parametrize(
    ("value", "named"), [(float("nan"), "NaN"), (Decimal("1.50"), "1.50"), (b"a", "b'a'"), (None, "null")]
)
def test_values_that_only_parquet_has(tmp_path, value, named):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.table({"text": ["a"], "label": [value]}), tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match=mentions("a.parquet: item 1", "'label'", "string or a number", named)
    ):
        read_rows(tmp_path / "a.parquet", ["text", "label"])


def test_a_parquet_value_that_python_has_not_is_named_with_its_file(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(
        pyarrow.table({"at": pyarrow.array([2**62], pyarrow.timestamp("ms"))}), tmp_path / "a.parquet"
    )
    with pytest.raises(ValueError, match=mentions("a.parquet", "item 1")):
        list(read_records(tmp_path / "a.parquet", Problems()))


BAD_FILES = [
    ("a.csv", "", [("a.csv:1", "empty")]),
    ("a.jsonl", " \n", [("a.jsonl:1", "empty")]),
    ("a.csv", "text,label\n", [("a.csv:1", "rows")]),
    ("a.csv", "txt,label\na,b\n", [("a.csv:1", "'text'", "'txt'")]),
    ("a.csv", "q,w\na,b\n", [("a.csv:1", "'text'", "q", "w"), ("a.csv:1", "'label'", "q", "w")]),
    ("a.csv", "text,label,text\na,b,c\n", [("a.csv:1", "'text'", "twice")]),
    ("a.csv", "text," + "x" * 500 + "\na,b\n", [("a.csv:1", "'label'", "text, " + "x" * 80)]),
    ("a.csv", "text,label\na\nb,c,d\n", [("a.csv:2", 1, 2), ("a.csv:3", 3, 2)]),
    (
        "a.csv",
        "text,label\n,x\n  ,y\nz,\n",
        [("a.csv:2", "'text'", "empty"), ("a.csv:3", "'text'", "empty"), ("a.csv:4", "'label'", "empty")],
    ),
    ("a.csv", 'text,label\n"a" b,x\nc,\n', [("a.csv:2",), ("a.csv:3", "'label'", "empty")]),
    ("a.csv", 'text,label\na,x\n"b,y\nc,z\n', [("a.csv:3",)]),
    (
        "a.csv",
        b"text,label\na,x\n\xe9,y\nc,\n",
        [("a.csv:3", "0xe9", "UTF-8"), ("a.csv:4", "'label'", "empty")],
    ),
    ("a.tsv", "text,label\na,b\n", [("a.tsv:1", "'text'", "'text,label'"), ("a.tsv:1", "'label'")]),
    ("a.jsonl", '{"text": "a", "label": 1}\n{"text": \n', [("a.jsonl:2", "JSON")]),
    ("a.jsonl", "[1]\nnull\n3\n", [(f"a.jsonl:{n}", "JSON object") for n in (1, 2, 3)]),
    ("a.jsonl", '{"text": "a", "labels": 1}\n', [("a.jsonl:1", "'label'", "'labels'")]),
    (
        "a.jsonl",
        '{"text": null, "label": [1]}',
        [("a.jsonl:1", "'text'", "null")],
    ),
    ("a.jsonl", '{"text": "\\ud800", "label": 1}', [("a.jsonl:1", "surrogate")]),
    ("a.jsonl", "[" * 100_000, [("a.jsonl:1", "JSON")]),
]


@pytest.mark.parametrize(("name", "content", "problems"), BAD_FILES)
def test_every_problem_of_a_file_is_named_with_its_line(tmp_path, name, content, problems):
    path = _write(tmp_path / name, content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read_rows(path, ["text", "label"])
    lines = str(caught.value).replace(f"{tmp_path}/", "").splitlines()
    assert_mentions(lines[0], *problems[0])
    shown = [line.strip() for line in lines[1:]] or lines
    assert len(shown) == len(problems), shown
    for line, (place, *words) in zip(shown, problems, strict=True):
        assert line.startswith(f"{place}: ")
        assert_mentions(line, *words)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json"])
def test_a_file_in_utf_16_is_named_as_such_alone(tmp_path, name, encoding):
    path = _write(tmp_path / name, "\ufefftext,label\na,b\n".encode(encoding))
    with pytest.raises(ValueError, match=mentions(name, "UTF-16", "UTF-8")) as caught:
        read_rows(path, ["text", "label"])
    assert len(str(caught.value).splitlines()) == 1


def test_only_the_first_twenty_problems_are_shown(tmp_path):
    path = _write(tmp_path / "a.csv", "text,label\n" + "a,\n" * 25)
    with pytest.raises(ValueError, match=mentions("a.csv:2", 25)) as caught:
        read_rows(path, ["text", "label"])
    assert_mentions(str(caught.value).splitlines()[-1], 5)
    assert len(str(caught.value).splitlines()) == 22


@pytest.mark.slow
def test_the_problems_of_a_file_that_is_wrong_throughout_fit_in_memory(tmp_path):
    path = _write(tmp_path / "a.jsonl", "x\n" * 100_000)
    tracemalloc.start()
    with pytest.raises(ValueError, match=mentions("a.jsonl:1", "JSON", 100000)):
        read_rows(path, ["text", "label"])
    assert tracemalloc.get_traced_memory()[1] < 5 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_file_is_read_row_by_row(tmp_path, suffix):
    line = json.dumps({"text": "x" * 1000}) if suffix == "jsonl" else "x" * 1000
    path = _write(tmp_path / f"a.{suffix}", "\n".join(["text"] * (suffix == "csv") + [line] * 2_000))
    tracemalloc.start()
    assert sum(1 for _ in read_records(path, Problems())) == 2_000
    assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 2
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "named"),
    [("a.txt", mentions("a.txt", ".csv", ".tsv", ".jsonl")), ("a", "suffix"), ("b.csv", "b.csv")],
)
def test_files_that_cannot_be_read(tmp_path, name, named):
    with pytest.raises(ValueError, match=named):
        read_rows(tmp_path / name, ["text"])


_FIELD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(
    str.strip
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(_FIELD, _FIELD), min_size=1, max_size=6), st.sampled_from([".csv", ".tsv"]))
def test_what_csv_writes_is_read_back(tmp_path_factory, rows, suffix):
    path = write_table(
        tmp_path_factory.mktemp("t") / f"a{suffix}", rows, header=("text", "label"), newline="\r\n"
    )
    read = read_rows(path, ["text", "label"])
    assert [row for _, row in read] == rows


def test_another_delimiter(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('message;category\n"good, bad";1\n')
    assert read_rows(path, ["message", "category"], delimiter=";") == [(f"{path}:2", ("good, bad", "1"))]
    with pytest.raises(ValueError, match=mentions("'message'", "semicolon", "data.delimiter", "';'")):
        read_rows(path, ["message"])


@pytest.mark.parametrize(("suffix", "gap"), [("csv", ","), ("tsv", "\t")])
def test_a_file_without_a_header_line(tmp_path, suffix, gap):
    path = _write(tmp_path / f"a.{suffix}", f"\n1{gap}a{gap}good\n0{gap}{gap}bad\n")
    settings = DataOptions(path=str(path), text="review", header=("label", "mark", "review"))
    good, bad = LabelledText("good", "1", f"{path}:2"), LabelledText("bad", "0", f"{path}:3")
    assert load_rows(path, settings) == [good, bad]
    _write(path, f"review{gap}label\nfair{gap}1\n")  # it has one
    assert [row.prompt for row in load_rows(path, settings)] == ["fair"]
    _write(path, f"1{gap}good\n")
    with pytest.raises(ValueError, match=mentions(f"a.{suffix}:1", "2 fields", 3)):
        load_rows(path, settings)
    with pytest.raises(ValueError, match=mentions("'text'", "data.header")):
        load_rows(path, DataOptions(path=str(path)))
    _write(path, "")
    with pytest.raises(ValueError, match=mentions("empty")):
        load_rows(path, settings)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("a.jsonl", lambda path: read_rows(path, ["text", "label"])),
        ("a.json", lambda path: read_rows(path, ["text", "label"])),
    ],
)
def test_a_number_that_is_none_is_an_error_with_its_line(tmp_path, name, read, value):
    rows = ['{"text": "NaN, 1e999", "label": "Infinity"}', f'{{"text": "b \\" {value}", "label": {value}}}']
    path = tmp_path / name
    path.write_text("\n".join(rows) if name == "a.jsonl" else f"[{rows[0]},\n{rows[1]}]")
    with pytest.raises(ValueError, match=mentions(f"{name}:2", "JSON", value)):
        read(path)
    path.write_text(rows[0] if name == "a.jsonl" else f"[{rows[0]}]")
    assert len(read(path)) == 1
