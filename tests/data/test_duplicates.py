"""Data that makes a result meaningless is told, dropped or an error: duplicates, and one value in two spellings."""

import dataclasses
import json

import pytest

from loraplus_jax.data.conversations import read_chats
from loraplus_jax.data.duplicates import handle_duplicates
from loraplus_jax.data.multiple_choice import read_questions
from loraplus_jax.data.options import DataOptions
from loraplus_jax.data.splits import load_splits

from ..messages import assert_mentions, mentions
from .chats import call


def chat(user, answer):
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}


def question(prompt, answer, choices=("red", "blue")):
    return {"prompt": prompt, "choices": list(choices), "answer": answer}


def read_texts(path):
    return load_splits(DataOptions(train=str(path), validation=str(path)), type(path))["train"]


def read_pairs(path):
    settings = DataOptions(train=str(path), validation=str(path), text_pair="pair")
    return load_splits(settings, type(path))["train"]


def text(text, label, **more):
    return {"text": text, "label": label, **more}


def tool_chat(text, **arguments):
    answer = {"role": "assistant", "tool_calls": [call("add", arguments)]}
    return {"messages": [{"role": "user", "content": text}, answer]}


CASES = {
    # Reader, rows of train, rows of test; test rows that are in train, conflicts, train rows that drop keeps.
    "texts": (
        *(read_texts, [text("a", "x"), text("b", "x"), text("c", "y")], [text(" A ", "y"), text("d", "x")]),
        *(1, 1, [1, 2]),
    ),
    "other labels in train": (
        *(read_texts, [text("a", "x"), text("b", "x"), text("A", "y")], [text("d", "x")]),
        *(0, 1, [1]),
    ),
    "one spelling of a number": (
        *(read_texts, [text("a", "1"), text("b", "2"), text("a", "1.0")], [text("d", "1")]),
        *(0, 0, [0, 1, 2]),
    ),
    "pairs": (
        *(read_pairs, [text("a", "x", pair="p"), text("a", "y", pair="q")]),
        *([text("a", "x", pair="P"), text("b", "x", pair="q")], 1, 0, [1]),
    ),
    "conversations": (
        *(read_chats, [chat("hi", "yes"), chat("hi", "no"), chat("ho", "yes")]),
        *([chat("Hi", " yes"), chat("ho", "no")], 1, 0, [1, 2]),
    ),
    "tool calls": (
        *(read_chats, [tool_chat("hi", n=1), tool_chat("hi", n=2)]),
        *([tool_chat("hi", n=2), tool_chat("hi", n=3)], 1, 0, [0]),
    ),
    "plain texts": (read_chats, [{"text": "a"}, {"text": "b"}], [{"text": "A"}], 1, 0, [1]),
    "questions": (
        *(read_questions, [question("q", "red"), question("r", "red"), question("r", "blue")]),
        *([question("Q", "red", ("blue", "red")), question("q", "red", ("red", "green"))], 1, 1, []),
    ),
}


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    read, train, test, *expected = CASES[request.param]
    splits = {}
    for name, rows in {"train": train, "test": test}.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        splits[name] = read(path)
    return splits, expected


def settings(duplicates, **files):
    return DataOptions(train="train.jsonl", validation="v.jsonl", duplicates=duplicates, **files)


def test_duplicates_are_counted(case):
    splits, (shared, conflicts, _) = case
    same, lines = handle_duplicates(splits, settings("warn"))
    assert same is splits
    assert len(lines) == bool(shared) + bool(conflicts)
    for line, words in zip(
        lines, [(shared, len(splits["test"]), "test", "train")] * bool(shared) + [(conflicts,)], strict=False
    ):
        assert line.startswith("warning: ")
        assert_mentions(line, *words)
        assert line.count(".jsonl:") == 2


def test_duplicates_are_an_error_with_counts_and_lines(case):
    splits, (shared, conflicts, _) = case
    if not shared and not conflicts:
        assert handle_duplicates(splits, settings("error")) == (splits, [])
        return
    with pytest.raises(ValueError, match=mentions("data.duplicates", "drop", "warn")) as caught:
        handle_duplicates(splits, settings("error"))
    first, *pairs = str(caught.value).splitlines()
    assert_mentions(first, *([f"{shared} of {len(splits['test'])}"] if shared else []))
    assert_mentions(first, *([f"{conflicts} text"] if conflicts else []))
    assert len(pairs) == shared + conflicts
    assert all(pair.count(".jsonl:") == 2 for pair in pairs)


def test_duplicates_are_dropped_from_train(case):
    splits, (shared, conflicts, kept) = case
    if not kept:
        with pytest.raises(ValueError, match=mentions("drop", "train", len(splits["train"]))):
            handle_duplicates(splits, settings("drop"))
        return
    rows, lines = handle_duplicates(splits, settings("drop"))
    train = splits["train"]
    assert rows == {**splits, "train": [train[i] for i in kept]}
    assert len(lines) == bool(shared or conflicts)
    for line in lines:
        assert_mentions(line, f"{len(train) - len(kept)} of {len(train)}", "train")


@pytest.mark.parametrize(("first", "shared"), [(50, 10), (58, 2)])
def test_validation_and_test_are_compared_too(tmp_path, first, shared):
    for name, start in (("a.csv", 0), ("v.csv", 50), ("t.csv", first)):
        rows = "".join(f"text {i},{i % 2}\n" for i in range(start, start + 10))
        (tmp_path / name).write_text("text,label\n" + rows)
    data = DataOptions(train="a.csv", validation="v.csv", test="t.csv")
    splits = load_splits(data, lambda value: tmp_path / value)
    (line,) = handle_duplicates(splits, data)[1]
    assert_mentions(line, f"{shared} of 10", "test", "validation")
    drop = dataclasses.replace(data, duplicates="drop")
    if shared == 10:
        with pytest.raises(ValueError, match=mentions("validation", "10 of 10")):
            handle_duplicates(splits, drop)
        return
    rows, (line,) = handle_duplicates(splits, drop)
    assert_mentions(line, "2 of 10", "validation")
    assert (rows["train"], rows["test"]) == (splits["train"], splits["test"])
    assert rows["validation"] == splits["validation"][:8]


def test_a_split_file_has_no_duplicates_and_its_result_does_not_depend_on_the_setting(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"text {i},x\nText  {i},x\n" for i in range(50)))
    found = []
    for duplicates in ("warn", "error", "drop"):
        data = DataOptions(path=str(path), duplicates=duplicates)
        splits, lines = handle_duplicates(load_splits(data, type(path)), data)
        assert lines == []
        found.append(splits)
    assert found[0] == found[1] == found[2]


def test_what_drop_keeps_is_still_counted(tmp_path):
    splits = {}
    for name, rows in {"train": [text("a", "x")], "test": [text("b", "x"), text("b", "y")]}.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        splits[name] = read_texts(path)
    rows, (line,) = handle_duplicates(splits, settings("drop"))
    assert rows == splits
    assert_mentions(line, "1 text with different labels", "test.jsonl:1", "test.jsonl:2")
