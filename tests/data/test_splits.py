"""One file is split by text, separate files are splits as they are."""

from pathlib import Path

import pytest

from loraplus_jax.data.conversations import Chat, Turn
from loraplus_jax.data.multiple_choice import Question
from loraplus_jax.data.options import DataOptions
from loraplus_jax.data.splits import (
    LabelledText,
    comparable,
    limit_splits,
    load_rows,
    load_splits,
    split_files,
)

from ..messages import assert_mentions, mentions
from .tables import write_table


def _one_file(tmp_path, texts, **fields) -> dict[str, list[LabelledText]]:
    path = write_table(tmp_path / "a.csv", [(t, "x") for t in texts], header=("text", "label"))
    return load_splits(DataOptions(path=str(path), **fields), Path)


TEXTS = [f"text {i}" for i in range(100)]


def test_one_file_is_split_by_share_and_every_row_is_somewhere(tmp_path):
    splits = _one_file(tmp_path, TEXTS)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 70, "validation": 10, "test": 20}
    assert sorted(row.prompt for rows in splits.values() for row in rows) == sorted(TEXTS)


def test_no_text_sits_in_two_splits(tmp_path):
    texts = [variant for t in TEXTS for variant in (t, f" {t.upper()}", t.replace(" ", "  "))]
    splits = _one_file(tmp_path, texts)
    keys = [{" ".join(row.prompt.lower().split()) for row in rows} for rows in splits.values()]
    assert [len(rows) for rows in splits.values()] == [210, 30, 60]
    assert sum(map(len, keys)) == len(set.union(*keys)) == 100


def test_the_split_depends_on_seed_and_text_only(tmp_path):
    first = _one_file(tmp_path, TEXTS)
    moved = _one_file(tmp_path, TEXTS[::-1])
    assert _texts(first) == _texts(moved)
    assert _texts(_one_file(tmp_path, TEXTS, split_seed=1))["test"] != _texts(first)["test"]
    grown = _texts(_one_file(tmp_path, [*TEXTS, "one more"]))
    assert sum(len(texts - grown[name]) for name, texts in _texts(first).items()) <= 3


def test_locations_stay_with_their_rows(tmp_path):
    splits = _one_file(tmp_path, TEXTS)
    assert sum(map(len, splits.values())) == 100
    for rows in splits.values():
        for row in rows:
            assert row.place == f"{tmp_path / 'a.csv'}:{int(row.prompt.split()[1]) + 2}"


def test_a_share_of_nothing_makes_no_split_and_too_few_texts_are_rejected(tmp_path):
    assert set(_one_file(tmp_path, TEXTS, test_fraction=0)) == {"train", "validation"}
    assert [len(r) for r in _one_file(tmp_path, TEXTS[:3]).values()] == [1, 1, 1]
    with pytest.raises(ValueError, match=mentions("a.csv", 2)):
        _one_file(tmp_path, [*TEXTS[:2], TEXTS[0]])


def _texts(splits):
    return {name: {row.prompt for row in rows} for name, rows in splits.items()}


def test_a_limit_keeps_a_part_of_each_split_whatever_the_order_of_the_rows(tmp_path):
    whole, settings = _one_file(tmp_path, TEXTS), DataOptions(path="a.csv", limit=15)
    limited, (line,) = limit_splits(whole, settings)
    assert {name: len(rows) for name, rows in limited.items()} == {"train": 15, "validation": 10, "test": 15}
    assert all(_texts(limited)[name] <= texts for name, texts in _texts(whole).items())
    assert limited["train"] == [row for row in whole["train"] if row in limited["train"]]
    assert limited["train"] != whole["train"][:15]
    backwards, _ = limit_splits(_one_file(tmp_path, TEXTS[::-1]), settings)
    assert _texts(backwards) == _texts(limited)
    assert_mentions(line, "data.limit 15", "15 of 70 train", "10 of 10 validation", "15 of 20 test")


def test_a_split_may_have_several_files(tmp_path):
    for name, part in {"a": TEXTS[:10], "b": TEXTS[10:20], "c": TEXTS[20:]}.items():
        write_table(
            tmp_path / f"{name}.csv", [(t, f"{t}?", "x") for t in part], header=("text", "q", "label")
        )
    fields = {"train": ("a.csv", "b.csv"), "text_pair": "q"}
    splits = load_splits(DataOptions(**fields, validation="c.csv"), lambda value: tmp_path / value)
    assert [row.texts for row in splits["train"]] == [(t, f"{t}?") for t in TEXTS[:20]]
    places = [row.place for row in splits["train"][9:11]]
    assert places == [f"{tmp_path / 'a.csv'}:11", f"{tmp_path / 'b.csv'}:2"]
    splits = load_splits(DataOptions(**fields), lambda value: tmp_path / value)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 18, "validation": 2}


def test_conversations_and_questions_are_split_by_the_first_user_message():
    turns = [(Turn("user", t), Turn("assistant", a)) for t in TEXTS for a in "xy"]
    chats = [Chat(t, f"a.jsonl:{i}") for i, t in enumerate(turns)]
    questions = [Question(t, ("x", "y"), n, "a.jsonl:1") for t in TEXTS for n in (0, 1)]
    for rows in (chats, questions):
        splits = split_files(DataOptions(path="a.jsonl"), lambda _, rows=rows: rows)
        assert {name: len(part) for name, part in splits.items()} == {
            "train": 140,
            "validation": 20,
            "test": 40,
        }
        prompts = [{row.prompt for row in part} for part in splits.values()]
        assert sum(map(len, prompts)) == len(set.union(*prompts)) == 100
        limited, _ = limit_splits(splits, DataOptions(path="a.jsonl", limit=4))
        assert {name: len(part) for name, part in limited.items()} == dict.fromkeys(splits, 4)
    with pytest.raises(ValueError, match=mentions("a.jsonl", 1, "train, validation, test")):
        split_files(DataOptions(path="a.jsonl"), lambda _: chats[:2])


def test_labelled_texts_may_be_a_list_of_json(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a", "label": 1},\n {"text": "b", "label": "x"}]')
    rows = load_rows(tmp_path / "a.json", DataOptions(path="a.json"))
    places = [f"{tmp_path / 'a.json'}: item {n}" for n in (1, 2)]
    assert rows == [LabelledText("a", "1", places[0]), LabelledText("b", "x", places[1])]


@pytest.mark.parametrize("option", [{"header": ("text", "label")}, {"quoting": "none"}, {"delimiter": ";"}])
def test_options_of_tables_require_one(tmp_path, option):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": "x"}')
    with pytest.raises(ValueError, match=mentions(f"data.{next(iter(option))}", ".csv", ".tsv", "a.jsonl")):
        load_splits(DataOptions(path="a.jsonl", **option), lambda value: tmp_path / value)


def _paired(tmp_path) -> Path:
    rows = [(t, f"{t}!", "x") for t in TEXTS]
    return write_table(tmp_path / "paired.csv", rows, header=("text", "text2", "label"))


def test_separate_files_stay_as_they_are(tmp_path):
    for name, count in [("train", 10), ("validation", 2), ("test", 3)]:
        write_table(
            tmp_path / f"{name}.csv", [(t, "q", "x") for t in TEXTS[:count]], header=("text", "pair", "label")
        )
    named = {name: f"{name}.csv" for name in ("train", "validation", "test")}
    splits = load_splits(DataOptions(**named, text_pair="pair"), lambda value: tmp_path / value)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 10, "validation": 2, "test": 3}
    assert [row.pair for row in splits["test"]] == ["q", "q", "q"]
    del named["validation"]
    splits = load_splits(DataOptions(**named), lambda value: tmp_path / value)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 9, "validation": 1, "test": 3}
    splits = load_splits(DataOptions(path="train.csv", text_pair="text2"), lambda _: _paired(tmp_path))
    assert all(row.pair == f"{row.prompt}!" for rows in splits.values() for row in rows)


@pytest.mark.parametrize(("text", "other"), [("caf\u00e9", "cafe\u0301"), ("\uff11 A", "1  a")])
def test_spellings_of_unicode_are_one_text(text, other):
    assert text != other
    assert comparable(text) == comparable(other)
