import csv
import json
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from loraplus_jax.data import splits as data
from loraplus_jax.data.splits import Rows
from loraplus_jax.settings.schema import DataSettings

GOOD = [("1", 'say "hi", twice', "yes"), ("2", "two\nlines", "no"), ("3", "\N{SNOWMAN} tab\there", "yes")]


def _write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _table(path: Path, rows, header=("id", "text", "label"), newline="\n", encoding="utf-8") -> Path:
    dialect = "excel-tab" if path.suffix == ".tsv" else "excel"
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file, dialect, lineterminator=newline).writerows([header, *rows])
    return path


def _rows(texts, labels=None) -> Rows:
    labels = labels or ["a"] * len(texts)
    return Rows(tuple(texts), None, tuple(labels), tuple(f"f.csv:{i + 2}" for i in range(len(texts))))


# settings


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "path=None and train=None"),
        ({"path": "a", "train": "b"}, "path='a' and train='b'"),
        ({"path": "a", "test": "b"}, "test goes with train"),
        ({"path": "a", "validation": "b"}, "validation goes with train"),
        ({"path": " "}, "path must"),
        ({"path": 3}, "path must"),
        ({"path": "a", "text": None}, "text must"),
        ({"path": "a", "label": ""}, "label must"),
        ({"path": "a", "label": "text"}, "different columns"),
        ({"path": "a", "text_pair": "label"}, "different columns"),
        ({"path": "a", "max_length": 1}, "max_length must"),
        ({"path": "a", "max_length": 8.0}, "max_length must"),
        ({"path": "a", "split_seed": -1}, "split_seed must"),
        ({"path": "a", "split_seed": True}, "split_seed must"),
        ({"path": "a", "validation_fraction": 0.0}, "validation_fraction must"),
        ({"path": "a", "validation_fraction": 1}, "validation_fraction must"),
        ({"path": "a", "test_fraction": -0.1}, "test_fraction must"),
        ({"path": "a", "test_fraction": float("nan")}, "test_fraction must"),
        ({"path": "a", "test_fraction": 0.5, "validation_fraction": 0.5}, "leave something for training"),
    ],
)
def test_settings_that_are_refused(fields, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        DataSettings(**fields)


def test_settings_with_separate_files_may_leave_out_validation_and_test():
    assert DataSettings(train="a", text_pair="b").columns == ("text", "b", "label")


# reading


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".CSV"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_tables_are_read_whatever_wrote_them(tmp_path, suffix, newline, encoding):
    path = _table(tmp_path / f"a{suffix}", GOOD, newline=newline, encoding=encoding)
    rows = data.read_rows(path, ["text", "label"])
    assert [(r.values["text"], r.values["label"]) for r in rows] == [g[1:] for g in GOOD]
    assert [r.line for r in rows] == [2, 3, 5]  # the second row holds a line break


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
    rows = data.read_rows(_write(tmp_path / "a.jsonl", text), ["text", "label"])
    assert [dict(r.values) for r in rows] == [
        {"text": "a\u2028b", "label": "1"},
        {"text": "c", "label": "-0.5"},
        {"text": "d", "label": "true"},
    ]
    assert [r.line for r in rows] == [2, 4, 5]


def test_blank_lines_are_skipped_and_unasked_columns_may_be_empty(tmp_path):
    path = _write(tmp_path / "a.csv", "\n\ntext,other,label\n\na,,x\n   \nb,1,y\n\n")
    assert [(r.line, dict(r.values)) for r in data.read_rows(path, ["label"])] == [
        (5, {"label": "x"}),
        (7, {"label": "y"}),
    ]


BAD_FILES = [
    ("a.csv", "", ["a.csv:1: the file is empty"]),
    ("a.jsonl", " \n", ["a.jsonl:1: the file is empty"]),
    ("a.csv", "text,label\n", ["a.csv:1: no rows"]),
    ("a.csv", "txt,label\na,b\n", ["a.csv:1: no column 'text'; did you mean 'txt'?"]),
    (
        "a.csv",
        "q,w\na,b\n",
        ["a.csv:1: no column 'text'; known: q, w", "a.csv:1: no column 'label'; known: q, w"],
    ),
    ("a.csv", "text,label,text\na,b,c\n", ["a.csv:1: column 'text' appears twice"]),
    ("a.csv", "text,label\na\nb,c,d\n", ["a.csv:2: 1 fields, where the header has 2", "a.csv:3: 3 fields"]),
    (
        "a.csv",
        "text,label\n,x\n  ,y\nz,\n",
        ["a.csv:2: column 'text' is empty", "a.csv:3: ", "a.csv:4: column 'label'"],
    ),
    ("a.csv", 'text,label\n"a" b,x\nc,\n', ["a.csv:2: malformed row", "a.csv:3: column 'label' is empty"]),
    ("a.csv", 'text,label\na,x\n"b,y\nc,z\n', ["a.csv:3: malformed row"]),
    (
        "a.csv",
        b"text,label\na,x\n\xe9,y\nc,\n",
        ["a.csv:3: byte 0xe9 is not UTF-8", "a.csv:4: column 'label' is"],
    ),
    ("a.tsv", "text,label\na,b\n", ["a.tsv:1: no column 'text'; did you mean 'text,label'?", "a.tsv:1: no"]),
    ("a.tsv", "id\ttext\tlabel\n7\ta\tx\n8\tb\tx\n7\tc\tx\n", ["a.tsv:4: id '7' was used at line 2 already"]),
    ("a.jsonl", '{"text": "a", "label": 1}\n{"text": \n', ["a.jsonl:2: invalid JSON"]),
    ("a.jsonl", "[1]\nnull\n3\n", ["a.jsonl:1: each line", "a.jsonl:2: each line", "a.jsonl:3: each line"]),
    ("a.jsonl", '{"text": "a", "labels": 1}\n', ["a.jsonl:1: no column 'label'; did you mean 'labels'?"]),
    (
        "a.jsonl",
        '{"text": null, "label": [1]}',
        ["a.jsonl:1: column 'text' must", "a.jsonl:1: column 'label' must"],
    ),
    ("a.jsonl", '{"text": "\\ud800", "label": 1}', ["a.jsonl:1: column 'text' holds half a surrogate"]),
    ("a.jsonl", "[" * 100_000, ["a.jsonl:1: invalid JSON"]),
    ("a.jsonl", '{"id": 1, "text": "a", "label": 1}\n' * 2, ["a.jsonl:2: id '1' was used at line 1 already"]),
]


@pytest.mark.parametrize(("name", "content", "problems"), BAD_FILES)
def test_every_problem_of_a_file_is_named_with_its_line(tmp_path, name, content, problems):
    path = _write(tmp_path / name, content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        data.read_rows(path, ["text", "label"])
    lines = str(caught.value).replace(f"{tmp_path}/", "").splitlines()
    assert lines[0].startswith(problems[0])
    shown = [line.strip() for line in lines[1:]] or lines
    assert len(shown) == len(problems), shown
    assert all(line.startswith(problem) for line, problem in zip(shown, problems, strict=True)), shown


def test_only_the_first_twenty_problems_are_shown(tmp_path):
    path = _write(tmp_path / "a.csv", "text,label\n" + "a,\n" * 25)
    with pytest.raises(ValueError, match="the first of 25 problems") as caught:
        data.read_rows(path, ["text", "label"])
    assert str(caught.value).splitlines()[-1].strip() == "... and 5 more"
    assert len(str(caught.value).splitlines()) == 22


def test_the_problems_of_a_file_that_is_wrong_throughout_fit_in_memory(tmp_path):
    path = _write(tmp_path / "a.jsonl", "x\n" * 100_000)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"a\.jsonl:1: invalid JSON.*the first of 100000 problems"):
        data.read_rows(path, ["text", "label"])
    assert tracemalloc.get_traced_memory()[1] < 5 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "named"), [("a.txt", "cannot read .txt"), ("a", "without suffix"), ("b.csv", "b.csv")]
)
def test_files_that_cannot_be_read(tmp_path, name, named):
    with pytest.raises(ValueError, match=named):
        data.read_rows(tmp_path / name, ["text"])


_FIELD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(
    str.strip
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(_FIELD, _FIELD), min_size=1, max_size=6), st.sampled_from([".csv", ".tsv"]))
def test_what_csv_writes_is_read_back(tmp_path_factory, rows, suffix):
    path = _table(tmp_path_factory.mktemp("t") / f"a{suffix}", rows, header=("text", "label"), newline="\r\n")
    read = data.read_rows(path, ["text", "label"])
    assert [(r.values["text"], r.values["label"]) for r in read] == rows


# splits


def _one_file(tmp_path, texts, **fields) -> dict[str, Rows]:
    path = _table(tmp_path / "a.csv", [(t, "x") for t in texts], header=("text", "label"))
    return data.load_splits(DataSettings(path=str(path), **fields), Path)


TEXTS = [f"text {i}" for i in range(100)]


def test_one_file_is_split_by_share_and_every_row_is_somewhere(tmp_path):
    splits = _one_file(tmp_path, TEXTS)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 70, "validation": 10, "test": 20}
    assert sorted(t for rows in splits.values() for t in rows.texts) == sorted(TEXTS)


def test_no_text_sits_in_two_splits(tmp_path):
    texts = [variant for t in TEXTS for variant in (t, f" {t.upper()}", t.replace(" ", "  "))]
    splits = _one_file(tmp_path, texts)
    keys = [{" ".join(t.lower().split()) for t in rows.texts} for rows in splits.values()]
    assert [len(rows) for rows in splits.values()] == [210, 30, 60]
    assert sum(map(len, keys)) == len(set.union(*keys)) == 100


def test_the_split_depends_on_seed_and_text_only(tmp_path):
    first = _one_file(tmp_path, TEXTS)
    moved = _one_file(tmp_path, TEXTS[::-1])
    assert {k: set(v.texts) for k, v in first.items()} == {k: set(v.texts) for k, v in moved.items()}
    assert set(_one_file(tmp_path, TEXTS, split_seed=1)["test"].texts) != set(first["test"].texts)
    grown = _one_file(tmp_path, [*TEXTS, "one more"])
    assert sum(len(set(first[k].texts) - set(grown[k].texts)) for k in first) <= 3


def test_places_stay_with_their_rows(tmp_path):
    for rows in _one_file(tmp_path, TEXTS).values():
        for text, place in zip(rows.texts, rows.places, strict=True):
            assert place == f"{tmp_path / 'a.csv'}:{int(text.split()[1]) + 2}"


def test_a_share_of_nothing_makes_no_split_and_too_few_texts_are_refused(tmp_path):
    assert set(_one_file(tmp_path, TEXTS, test_fraction=0)) == {"train", "validation"}
    assert [len(r) for r in _one_file(tmp_path, TEXTS[:3]).values()] == [1, 1, 1]
    with pytest.raises(ValueError, match=r"a\.csv: 2 distinct texts are too few"):
        _one_file(tmp_path, [*TEXTS[:2], TEXTS[0]])


def _paired(tmp_path) -> Path:
    rows = [(t, f"{t}!", "x") for t in TEXTS]
    return _table(tmp_path / "paired.csv", rows, header=("text", "text2", "label"))


def test_separate_files_stay_as_they_are(tmp_path):
    for name, count in [("train", 10), ("validation", 2), ("test", 3)]:
        _table(
            tmp_path / f"{name}.csv", [(t, "q", "x") for t in TEXTS[:count]], header=("text", "pair", "label")
        )
    named = {name: f"{name}.csv" for name in ("train", "validation", "test")}
    splits = data.load_splits(DataSettings(**named, text_pair="pair"), lambda value: tmp_path / value)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 10, "validation": 2, "test": 3}
    assert splits["test"].pairs == ("q", "q", "q")
    del named["validation"]
    splits = data.load_splits(DataSettings(**named), lambda value: tmp_path / value)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 9, "validation": 1, "test": 3}
    splits = data.load_splits(DataSettings(path="train.csv", text_pair="text2"), lambda _: _paired(tmp_path))
    assert all(
        pair == f"{text}!" for r in splits.values() for text, pair in zip(r.texts, r.pairs, strict=True)
    )


# labels


def test_label_names_are_sorted_and_whole_numbers_by_value():
    assert data.label_names({"train": _rows("abc", ["pos", "neg", "pos"])}) == ["neg", "pos"]
    assert data.label_names({"train": _rows("abc", ["10", "9", "-1"])}) == ["-1", "9", "10"]
    rows = _rows("abc", ["10", "9", "-1"])
    labels = data.class_labels(rows, ["-1", "9", "10"])
    assert labels.tolist() == [2, 1, 0]
    assert labels.dtype == np.int32


def test_a_label_that_training_lacks_is_an_error_with_its_line():
    splits = {"train": _rows("ab", ["pos", "neg"]), "test": _rows("abc", ["pos", "Pos", "maybe"])}
    with pytest.raises(
        ValueError, match=r"f\.csv:3: label 'Pos' is not in the train split.*mean 'pos'"
    ) as caught:
        data.label_names(splits)
    assert "f.csv:4: label 'maybe'" in str(caught.value)
    with pytest.raises(ValueError, match="only 'a'"):
        data.label_names({"train": _rows("ab")})


def test_regression_labels_are_finite_numbers():
    labels = data.regression_labels(_rows("abc", ["1", "-2.5", "1e-3"]))
    np.testing.assert_array_equal(labels, np.array([1, -2.5, 1e-3], np.float32))
    assert labels.dtype == np.float32
    with pytest.raises(ValueError, match="4 problems") as caught:
        data.regression_labels(_rows("abcde", ["1", "nan", "inf", "x", "1e39"]))
    assert [f"f.csv:{line}: " in str(caught.value) for line in (2, 3, 4, 5, 6)] == [
        False,
        True,
        True,
        True,
        True,
    ]


# tokens


def _tokenizer(directory: Path, *, pad: str = "[PAD]", baked: bool = True) -> Path:
    vocabulary = [pad, "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(20))]
    tokenizer = Tokenizer(models.WordLevel({w: i + 5 for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 7), ("[SEP]", 8)],
    )
    if baked:
        tokenizer.enable_truncation(3)
        tokenizer.enable_padding(pad_id=5, pad_token=pad, length=16, direction="left")
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def test_texts_become_arrays_of_exactly_max_length(tmp_path):
    tokenizer = data.load_tokenizer(_tokenizer(tmp_path), 6)
    arrays, truncated = data.encode(["w0 w1", "w0 w1 w2 w3 w4 w5"], None, tokenizer)
    assert arrays["input_ids"].tolist() == [[7, 9, 10, 8, 5, 5], [7, 9, 10, 11, 12, 8]]
    assert arrays["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert arrays["token_type_ids"].tolist() == [[0] * 6] * 2
    assert {a.dtype for a in arrays.values()} == {np.dtype(np.int32)}
    assert truncated == 1


def test_pairs_keep_their_special_tokens_and_types(tmp_path):
    tokenizer = data.load_tokenizer(_tokenizer(tmp_path), 7)
    arrays, truncated = data.encode(["w0", "w0 w1 w2 w3"], ["w1", "w4 w5"], tokenizer)
    assert arrays["input_ids"].tolist() == [[7, 9, 8, 10, 8, 5, 5], [7, 9, 10, 8, 13, 14, 8]]
    assert arrays["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1]]
    assert truncated == 1


def test_long_lists_are_encoded_in_order(tmp_path):
    tokenizer = data.load_tokenizer(_tokenizer(tmp_path), 4)
    arrays, truncated = data.encode([f"w{i % 20}" for i in range(2500)], None, tokenizer)
    assert arrays["input_ids"][:, 1].tolist() == [9 + i % 20 for i in range(2500)]
    assert truncated == 0
    assert data.encode([], None, tokenizer)[0]["input_ids"].shape == (0, 4)


@pytest.mark.parametrize(
    ("pad", "config", "found"),
    [
        ("<pad>", {}, "<pad>"),
        ("w19", {"pad_token": {"content": "w3"}}, "w3"),
        ("w19", {"pad_token": None, "eos_token": "[SEP]"}, "[SEP]"),
    ],
)
def test_the_pad_token_is_found_where_padding_is_not_baked_in(tmp_path, pad, config, found):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = data.load_tokenizer(_tokenizer(tmp_path, pad=pad, baked=False), 6)
    ids = data.encode(["w0"], None, tokenizer)[0]["input_ids"]
    assert ids[0, -1] == tokenizer.token_to_id(found)


def test_tokenizers_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        data.load_tokenizer(tmp_path, 8)
    with pytest.raises(ValueError, match="no pad token"):
        data.load_tokenizer(_tokenizer(tmp_path, pad="w19", baked=False), 8)
    tokenizer = data.load_tokenizer(_tokenizer(tmp_path), 3)
    data.encode(["w0"], None, tokenizer)
    with pytest.raises(ValueError, match="max_length must be above 3"):
        data.encode(["w0"], ["w1"], tokenizer)
    _write(tmp_path / "tokenizer.json", "{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        data.load_tokenizer(tmp_path, 8)


# batches


def _columns(n: int) -> dict[str, np.ndarray]:
    return {"row": np.arange(n, dtype=np.int32), "twice": np.arange(n, dtype=np.int32)[:, None] * [2, 2]}


def _taken(iterator, count: int) -> list[list[int]]:
    return [next(iterator)["row"].tolist() for _ in range(count)]


def test_train_batches_have_one_shape_and_keep_rows_together():
    batches = data.train_batches(_columns(10), batch_size=4, seed=0)
    for _ in range(7):
        batch = next(batches)
        assert {k: (v.shape, v.dtype.name) for k, v in batch.items() if k != "twice"} == {
            "row": ((4,), "int32"),
            "weight": ((4,), "float32"),
        }
        assert batch["weight"].tolist() == [1, 1, 1, 1]
        assert (batch["twice"] == 2 * batch["row"][:, None]).all()


def test_each_epoch_is_another_shuffle_of_distinct_rows():
    iterator = data.train_batches(_columns(12), batch_size=4, seed=0)
    epochs = [np.concatenate(_taken(iterator, 3)).tolist() for _ in range(4)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, list(range(12))]}) == 5


def test_the_seed_decides_the_order():
    def order(seed):
        return _taken(data.train_batches(_columns(30), batch_size=10, seed=seed), 6)

    assert order(1) == order(1) != order(2)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_each_global_batch(processes):
    whole = _taken(data.train_batches(_columns(20), batch_size=8, seed=3), 9)
    parts = [
        data.train_batches(_columns(20), batch_size=8, seed=3, rows=rows)
        for rows in np.split(np.arange(8), processes)
    ]
    shares = [_taken(part, 9) for part in parts]
    assert all(len(batch) == 8 // processes for share in shares for batch in share)
    assert [np.concatenate(batch).tolist() for batch in zip(*shares, strict=True)] == whole


def test_processes_share_each_batch_of_an_evaluation():
    whole = [batch["x"].tolist() for batch in data.eval_batches({"x": np.arange(10)}, 4)]
    shares = [list(data.eval_batches({"x": np.arange(10)}, 4, rows)) for rows in ([0, 3], [1, 2])]
    assert whole == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 9, 9]]
    assert [batch["x"].tolist() for batch in shares[0]] == [[0, 3], [4, 7], [8, 9]]
    assert [batch["weight"].tolist() for batch in shares[0]] == [[1, 1], [1, 1], [1, 0]]
    assert [batch["weight"].tolist() for batch in shares[1]] == [[1, 1], [1, 1], [1, 0]]


@pytest.mark.parametrize("position", [0, 1, 4, 5, 13])
def test_the_position_is_restored_exactly(position):
    iterator = data.train_batches(_columns(23), batch_size=4, seed=5)
    _taken(iterator, position)
    state = json.loads(json.dumps(iterator.get_state()))
    following = _taken(iterator, 12)
    fresh = data.train_batches(_columns(23), batch_size=4, seed=5)
    fresh.set_state(state)
    assert _taken(fresh, 12) == following
    iterator.set_state(state)
    assert _taken(iterator, 12) == following


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"batch_size": 11}, "batch_size must be at most 10"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"batch_size": 4, "seed": -1}, "seed must"),
    ],
)
def test_train_batches_that_are_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        data.train_batches(_columns(10), **{"seed": 0, **fields})


@pytest.mark.parametrize("arrays", [{"a": np.zeros(3), "b": np.zeros(4)}, {"weight": np.zeros(3)}, {}])
def test_columns_that_do_not_fit_are_refused(arrays):
    with pytest.raises(ValueError, match="same number of rows"):
        next(data.eval_batches(arrays, 2))


@pytest.mark.parametrize(("rows", "batch_size"), [(10, 4), (8, 4), (3, 8), (1, 1), (0, 2)])
def test_eval_batches_hold_every_row_once(rows, batch_size):
    batches = list(data.eval_batches(_columns(rows), batch_size))
    assert all(len(batch["row"]) == len(batch["weight"]) == batch_size for batch in batches)
    counted = [r for batch in batches for r, w in zip(batch["row"], batch["weight"], strict=True) if w == 1]
    assert counted == list(range(rows))
    assert all((batch["row"][batch["weight"] == 0] == rows - 1).all() for batch in batches)
    assert sum(batch["weight"].sum() for batch in batches) == rows
    assert all(batch["weight"].dtype == np.float32 for batch in batches)
