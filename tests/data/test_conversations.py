"""Conversations from files, in every shape; problems with their place."""

import csv
import json
import math
from decimal import Decimal

import pytest

from loraplus_jax.data.conversations import Turn, describe_dropped, read_chats

from ..messages import assert_mentions, mentions
from ..refusals import refusals
from .chats import TOOL_TALK, call, write_json

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}


def _said(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


TURNS = (Turn("user", "Add.\n\n1 2"), Turn("assistant", "3"))


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (ALPACA | {"text": "left out"}, None),
        ({"prompt": "Add.\n\n1 2", "completion": 3}, None),
        ({"q": "Add.\n\n1 2", "a": "3"}, {"prompt": "q", "completion": "a"}),
        (_said(("user", "Add.\n\n1 2"), ("assistant", "3")), None),
        ({"conversations": [{"from": "human", "value": "Add.\n\n1 2"}, {"from": "gpt", "value": "3"}]}, None),
        ({"x": [{"from": "user", "value": "Add.\n\n1 2"}, {"from": "gpt", "value": "3"}]}, {"messages": "x"}),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_three_shapes_become_turns(tmp_path, row, columns, suffix):
    path = write_json(tmp_path / f"a{suffix}", [row, row])
    chats = read_chats(path, columns)
    assert [c.turns for c in chats] == [TURNS] * 2
    assert [c.place for c in chats] == [f"{path}{': item ' if suffix == '.json' else ':'}{n}" for n in (1, 2)]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_tables_hold_instructions_or_lists_as_json(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    said = json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    turns = json.loads(said)
    pair = [json.dumps(turns[:1]), json.dumps(turns[1:])]
    for rows in (
        [["instruction", "input", "output"], ["Add.", "1 2", "3"]],
        [["messages"], [said]],
        [["prompt", "completion"], pair],
    ):
        with path.open("w", newline="") as file:
            csv.writer(file, "excel-tab" if suffix == ".tsv" else "excel").writerows(rows)
        assert read_chats(path)[0].turns in (TURNS, (Turn("user", "a"), Turn("assistant", "b")))
        assert read_chats(path)[0].place == f"{path}:2"


def test_parquet_files_hold_messages_of_which_some_lack_fields(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    talk = json.loads(json.dumps(TOOL_TALK | {"tools": None}))
    talk["messages"][2]["content"] = "3"  # values of a column have one type
    for function in (one["function"] for m in talk["messages"] for one in m.get("tool_calls", ())):
        function["arguments"] = json.dumps(function["arguments"])
    talk["messages"][1]["tool_calls"][0]["function"]["arguments"] = '{"a": 1, "b": "two"}'
    rows = [_said(U, A), talk]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = read_chats(tmp_path / "a.parquet")
    assert (first.turns, first.place) == ((Turn(*U), Turn(*A)), f"{tmp_path / 'a.parquet'}: item 1")
    assert second.turns == _read(tmp_path, TOOL_TALK)[0].turns


@pytest.mark.parametrize(
    ("call", "named"),
    [({"x": Decimal("1.5")}, "Decimal"), ({"x": math.nan}, "Out of range"), ({"x": b"a"}, "bytes")],
)
def test_arguments_of_parquet_that_are_not_json_are_named(tmp_path, call, named):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    row = _said(U, A)
    row["messages"][1]["tool_calls"] = [{"function": {"name": "f", "arguments": call}}]
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=mentions("a.parquet: item 1", "turn 2", "tool_calls", named)):
        read_chats(tmp_path / "a.parquet")


def test_a_cell_of_messages_that_is_odd_json_is_no_text(tmp_path):
    """It would be trained on as its own source."""
    path = tmp_path / "a.csv"
    for content, named in (
        (r'"hi \ud83d"', "surrogate"),
        ('"a", "role": "user"', "twice|duplicate"),
        ("NaN", "NaN"),
    ):
        prompt = f'[{{"role": "user", "content": {content}}}]'
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["prompt", "completion"], [prompt, "yes"]])
        with pytest.raises(ValueError, match=f"a.csv:2: .*({named})"):
            read_chats(path)
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["messages"], [prompt]])
        with pytest.raises(ValueError, match=f"a.csv:2: column 'messages' .*({named})"):
            read_chats(path)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "completion"], ["[1, 2]", "[3]"]])
    assert read_chats(path)[0].turns == (Turn("user", "[1, 2]"), Turn("assistant", "[3]"))


def test_what_may_be_missing_and_what_goes_first(tmp_path):
    rows = [
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "input": None, "output": "b", "system": "Be kind."},
        {"instruction": "a", "input": " \n", "output": " b", "system": ""},
    ]
    turns = [c.turns for c in read_chats(write_json(tmp_path / "a.jsonl", rows))]
    assert turns[0] == (Turn("user", "a"), Turn("assistant", "b"))
    assert turns[1] == (Turn("system", "Be kind."), *turns[0])
    assert turns[2] == (Turn("user", "a"), Turn("assistant", " b"))
    both = _said(("user", "x"), ("assistant", "y")) | {"prompt": "p"}
    assert read_chats(write_json(tmp_path / "a.jsonl", [both]))[0].turns[0].text == "x"


def _read(tmp_path, *rows):
    return read_chats(write_json(tmp_path / "a.jsonl", rows))


@pytest.mark.parametrize("fields", [{"weight": 0}, {"train": False}, {"training": False, "weight": None}])
def test_a_weight_says_whether_an_answer_is_trained_on(tmp_path, fields):
    row = _said(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    for message in row["messages"]:
        message |= fields if message["content"] != "d" else dict.fromkeys(fields, 1)
    assert [turn.trained for turn in _read(tmp_path, row)[0].turns] == [True, True, False, True, True]


def test_of_a_prompt_in_messages_only_the_completion_is_trained_on(tmp_path):
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    prompt += [{"role": "user", "content": "c"}]
    (chat,) = _read(tmp_path, {"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]})
    assert [(turn.text, turn.trained) for turn in chat.turns] == [(x, x != "b") for x in "abcd"]


def test_text_that_is_json_stays_text(tmp_path):
    for prompt in ('[{"from": "A", "to": "B"}]', '[{"role": "engineer"}]'):
        row = {"prompt": prompt, "completion": '[{"name": "b"}]'}
        assert [turn.text for turn in _read(tmp_path, row)[0].turns] == [*row.values()]


def test_an_optional_column_may_be_missing_where_no_name_is_near(tmp_path):
    path = write_json(tmp_path / "a.jsonl", [{"user_prompt": "a", "output": "b", "more": 1}])
    for system in ("system_prompt", "input"):
        (chat,) = read_chats(path, {"prompt": "user_prompt", "completion": "output", "system": system})
        assert [turn.role for turn in chat.turns] == ["user", "assistant"]


def test_what_is_answered_is_read_as_in_training(tmp_path):
    row = {"instruction": "other", "prompt": "a", "completion": "b"}
    path = write_json(tmp_path / "a.jsonl", [row])
    assert read_chats(path, to_train=False)[0].prompt == read_chats(path)[0].prompt == "a"
    path = write_json(tmp_path / "a.jsonl", [{"prompt": "a", "text": "a topic"}])
    assert read_chats(path, to_train=False)[0].turns == (Turn("user", "a"),)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}]},
        {"prompt": "a"},
        {"prompt": [{"role": "user", "content": "a"}]},
        {"prompt": "a", "completion": None},
        {"instruction": "a", "output": ""},
    ],
)
def test_what_is_not_trained_on_needs_no_answer(tmp_path, row):
    path = write_json(tmp_path / "a.jsonl", [row | {"system": "s"}])
    (chat,) = read_chats(path, to_train=False)
    assert chat.turns == (Turn("system", "s"), Turn("user", "a"))
    with pytest.raises(ValueError, match=mentions("a.jsonl")):
        read_chats(path)
    names = {name: name for name in ("instruction", "output") if "instruction" in row}
    assert read_chats(path, names or None, to_train=False)[0].prompt == "a"
    with pytest.raises(ValueError, match=mentions("no message to answer")):
        read_chats(write_json(tmp_path / "a.jsonl", [_said(S)]), to_train=False)


def test_tool_calls_and_their_results(tmp_path):
    for tools in (TOOL_TALK["tools"], json.dumps(TOOL_TALK["tools"])):
        (chat,) = _read(tmp_path, TOOL_TALK | {"tools": tools})
        messages = [turn.message for turn in chat.turns]
        texts = ["Add 1 and 2.", "", "3", "See.", "", "It is 3."]
        assert [message["content"] for message in messages] == texts
        assert messages[1]["tool_calls"] == [call("add", {"a": 1, "b": "two"}, id="x")]
        assert messages[2] == {"role": "tool", "content": "3", "tool_call_id": "x", "name": "add"}
        assert messages[3]["tool_calls"] == TOOL_TALK["messages"][3]["tool_calls"]
        assert json.loads(chat.tools) == TOOL_TALK["tools"]
    assert _read(tmp_path, _said(U, A) | {"tools": None})[0].tools == ""


def test_text_in_parts_is_joined(tmp_path):
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b", "image": None}]
    assert _read(tmp_path, _said(("user", parts), A))[0].prompt == "a b"


def test_messages_without_effect_are_left_out_and_counted(tmp_path):
    empty, late = ("system", " "), ("user", "c")
    chats = _read(tmp_path, _said(empty, U, A), _said(U, A, late, ("tool", "d")), _said(empty, U, A, late))
    assert [chat.turns for chat in chats] == [(Turn(*U), Turn(*A))] * 3
    assert [turn.text for turn in chats[1].dropped] == ["c", "d"]
    for line, words in zip(describe_dropped(chats), (("system", 2), ("last answer", 2)), strict=True):
        assert_mentions(line, *words)
    assert describe_dropped(_read(tmp_path, _said(S, U, A))) == []


def _weighted(role="assistant", **fields):
    """A conversation of two turns with more fields in one of them."""
    row = _said(U, A)
    next(message for message in row["messages"] if message["role"] == role).update(fields)
    return row


U, A, S = ("user", "a"), ("assistant", "b"), ("system", "c")


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (_said(("usr", "a"), A), ["turn 1", '"usr"', "'user'"]),
        (_said((3, "a"), A), ["turn 1", 3, "assistant, gpt, human, system, tool, user"]),
        (_said(U, ("assistant", " \n")), ["turn 2", "content", "empty"]),
        (_said(U, ("assistant", None)), ["turn 2", "content", "null"]),
        (_said(U, ("assistant", "\ud800")), ["surrogate"]),
        (_said(U), ["assistant"]),
        (_said(A, U, A), ["assistant", "first"]),
        (_said(U, S, A), ["turn 2", "system", "first"]),
        (_said(("tool", "a"), A), ["tool", "first"]),
        (_said(("user", [{"type": "image", "image": "a.png"}]), A), ["turn 1", "part 1", '"image"', "text"]),
        (_said(("user", []), A), ["turn 1", "content", "empty"]),
        (_weighted(weight=0.5), ["turn 2", "weight", 0, 1, 0.5]),
        (_weighted(train="false"), ["turn 2", "train", "false", "true", '"false"']),
        (_weighted(weight=1, training=False), ["turn 2", "weight", "training"]),
        (_weighted(weight=0), ["assistant", "weight 0", "train false"]),
        (_weighted(train_detail=[{"begin_offset": 0}]), ["turn 2", "train_detail"]),
        (_weighted(reasoning_content="so"), ["turn 2", "reasoning_content", "content", "<think>"]),
        (_weighted(thinking="so", reasoning=None), ["turn 2", "thinking", "content"]),
        (_weighted("user", train=True), ["turn 1", "train", "true", "assistant"]),
        (_weighted("user", tool_calls=[call("add", {})]), ["turn 1", "tool_calls", "assistant"]),
        (_weighted(tool_calls=[call("add", "{")]), ["turn 2", "tool call 1", '"arguments"']),
        (_weighted(tool_calls=[call("add", {}), "x"]), ["turn 2", "tool call 2", 'got "x"']),
        (_weighted(tool_calls="x"), ["turn 2", "tool_calls", "list", 'got "x"']),
        (_weighted(tool_calls=[call("add", '{"a": "\\ud800"}')]), ["turn 2", "tool call", "arguments"]),
        (_said(U, A) | {"tools": "add"}, ["'tools'", "list", '"add"']),
        (_said(U, A) | {"tools": [3]}, ["'tools'", "objects", "[3]"]),
        ({"messages": []}, ["'messages'", "list", "[]"]),
        ({"messages": "hi"}, ["'messages'", "list", '"hi"']),
        ({"messages": ["hi"]}, ["turn 1", '{"role": ..., "content": ...}', '{"from"']),
        ({"messages": [{"role": "user"}]}, ["turn 1", "role", "content"]),
        ({"mesages": []}, ["'messages'", "'mesages'"]),
        (["x"], ["JSON object"]),
    ],
)
def test_every_problem_is_named_with_its_location(tmp_path, row, named):
    rows = [_said(U, A), row, _said(U, A)]
    with pytest.raises(ValueError, match=mentions("a.jsonl:2", *named)):
        read_chats(write_json(tmp_path / "a.jsonl", rows))
    item = "a.json:1" if "surrogate" in named else "a.json: item 2"
    with pytest.raises(ValueError, match=mentions(item, *named)):
        read_chats(write_json(tmp_path / "a.json", rows))


def test_problems_are_reported_together(tmp_path):
    rows = [ALPACA | {"output": ""}, ALPACA, ALPACA | {"instruction": [1]}, *[{"input": "a"}] * 24]
    with pytest.raises(ValueError, match=mentions("item 1", "'output'", "empty", 26)) as caught:
        read_chats(write_json(tmp_path / "a.json", rows))
    lines = str(caught.value).splitlines()
    assert_mentions(lines[2], "item 3", "'instruction'", "[1]")
    assert_mentions(lines[3], "item 4", "'instruction'")
    assert_mentions(lines[-1], 6)


def file_of(content, name="a.json", columns=None):
    def call(tmp_path):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        read_chats(tmp_path / name, columns)

    return call


test_files_that_are_rejected = refusals(
    (file_of('{"a": 1}'), "a.json", "list"),
    (file_of('[\n{"a": 1},\n'), "a.json:3", "JSON"),
    (file_of("[" * 100_000), "a.json:1", "JSON"),
    (file_of(b"[\n\xff]"), "a.json:2", "0xff", "UTF-8"),
    (file_of("[]"), "a.json", "list", "empty"),
    (file_of(""), "a.json", "file", "empty"),
    (file_of("prompt,completion\n", "a.csv"), "a.csv", "rows"),
    (file_of('{"words": 1}', "a.jsonl"), "a.jsonl", "words", "messages", "conversations"),
    (file_of('{"words": 1}', "a.jsonl", {"prompt": "text"}), "messages", "conversations", "prompt"),
    (file_of("{}", "a.jsonl", {"messages": "a", "prompt": "text"}), "messages, prompt"),
    (
        file_of("q,a,context\nx,y,z\n", "a.csv", {"instruction": "q", "output": "a", "input": "contxt"}),
        *("'contxt'", "'context'"),
    ),
    (
        file_of('prompt,completion\n"[{""role"": ""user"", ""content"": ""a""}]",b\n', "a.csv"),
        *("a.csv:2", "'prompt'", "list of messages", "'completion'"),
    ),
    (file_of('[{"prompt": [{"role": "user", "content": "a"}], "completion": "d"}]'), "'prompt'", "[{"),
    (file_of("{\n", "a.jsonl", {"prompt": "q", "completion": "r"}), "a.jsonl:1", "JSON"),
    (file_of("", "a.txt"), ".txt", ".csv", ".tsv", ".jsonl", ".json"),
)
