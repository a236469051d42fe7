"""Reads files of messages, instructions, or prompts with completions into conversations."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._validation import suggest
from .readers import Problems, Record, has_lone_surrogate, location_of, read_records

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
"""Roles as files write them, to ours; the last two are ShareGPT's."""

COLUMN_SETS = (("messages",), ("instruction", "output"), ("prompt", "completion"), ("text",))
"""The columns that each kind of file must have."""
OPTIONAL_COLUMNS = {
    "messages": ("system",),
    "instruction": ("input", "system"),
    "prompt": ("system",),
    "text": (),
}
"""What else it may have, by its first column."""
_ALLOWED = "messages (or conversations), or instruction and output, or prompt and completion, or text"


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message: `role` is `"system"`, `"user"` or `"assistant"`, or `"text"` for plain text."""

    role: str
    text: str


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation, and where it came from, for error messages.

    A system turn can only be the first; then a user begins, and the assistant has the last word. Or it is one text.
    """

    turns: tuple[Turn, ...]
    place: str = "a conversation"


def read_chats(path: str | Path, columns: Mapping[str, str] | None = None) -> list[Chat]:
    """The conversations of a .jsonl, .json (a list of objects), .csv or .tsv file in UTF-8.

    A row has one of four shapes:

    - `messages`: a list of `{"role": ..., "content": ...}`, or of ShareGPT's `{"from": ..., "value": ...}`, where
      the column is called `conversations`; in a table, such a list as JSON;
    - `instruction` and `output`, and perhaps `input`, which follows the instruction after a blank line;
    - `prompt` and `completion`;
    - `text`, which is learned as it stands, without a chat template.

    All but the last may have `system`, a text that goes first. Other columns are left out.

    Args:
      path: the file.
      columns: our names, as above, to the file's, all that is to be read: `{"prompt": "question", "completion":
        "reply"}`. By default the first shape that most rows have, under our names.

    Raises:
      ValueError: the file cannot be read, no shape fits it, or rows are faulty: columns missing or of the wrong
        type, unknown roles, empty contents, no assistant, or turns in another order than `Chat` says. All in one
        message, the first 20 with `file:line`, or `file: item n` in a .json file, both counted from 1.
    """
    path, problems = Path(path), Problems()
    records = read_records(path, problems)
    if columns is None:
        columns = _infer_columns(path, records) if records else {}
    elif not any(
        set(shape) <= set(columns) <= {*shape, *OPTIONAL_COLUMNS[shape[0]]} for shape in COLUMN_SETS
    ):
        named = ", ".join(columns) or "nothing"
        raise ValueError(
            f"columns must name {_ALLOWED} (with input or system where there are any), got {named}"
        )
    chats = []
    for number, values in records:
        faults: list[str] = []
        turns = _parse_turns(values, columns, faults)
        faults = faults or list(_order_faults(turns))
        for fault in faults:
            problems.add(number, fault)
        if not faults:
            chats.append(Chat(tuple(turns), location_of(path, number)))
    problems.report(path)
    return chats


def take_text(values: Mapping[str, Any], column: str, faults: list[str], *, optional: bool = False) -> str:
    """A column's text, a number or boolean as JSON writes it; what is wrong with it is added to `faults`.

    With `optional` the column may be missing, null or blank, and is then `""`.
    """
    value = values.get(column)
    if optional and (value is None or value == ""):
        return ""
    if column not in values:
        faults.append(f"no column {column!r}{suggest(column, values)}")
    elif value is None or isinstance(value, list | dict):
        faults.append(f"column {column!r} must hold a string or a number, got {json.dumps(value)[:40]}")
    else:
        text = value if isinstance(value, str) else json.dumps(value)
        if optional and not text.strip():
            return ""
        faults.extend(_text_faults(f"column {column!r}", text))
        return text
    return ""


def take_list(values: Mapping[str, Any], column: str, faults: list[str]) -> list[Any]:
    """A column's list, which in a table is written as JSON; what is wrong with it is added to `faults`."""
    value = values.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = values[column]
    if column not in values:
        faults.append(f"no column {column!r}{suggest(column, values)}")
    elif not isinstance(value, list) or not value:
        faults.append(f"column {column!r} must hold a list, not empty, got {json.dumps(value)[:40]}")
    else:
        return value
    return []


def _infer_columns(path: Path, records: Sequence[Record]) -> dict[str, str]:
    """Picks the first of the shapes that most rows have."""
    counts = Counter(name for _, values in records for name in values)
    forms = [{name: name for name in shape} for shape in COLUMN_SETS]
    forms.insert(1, {"messages": "conversations"})
    fitting = [sum(all(c in values for c in form.values()) for _, values in records) for form in forms]
    if not max(fitting):
        names = ", ".join(name for name, _ in counts.most_common(10)) or "no columns"
        raise ValueError(
            f"{path}: no conversations in {names}: a file needs {_ALLOWED}, or settings name them"
        )
    form = forms[fitting.index(max(fitting))]
    return form | {name: name for name in OPTIONAL_COLUMNS[next(iter(form))] if name in counts}


def _parse_turns(values: Mapping[str, Any], columns: Mapping[str, str], faults: list[str]) -> list[Turn]:
    def text(name: str, *, optional: bool = False) -> str:
        return take_text(values, columns[name], faults, optional=optional) if name in columns else ""

    if "text" in columns:
        return [Turn("text", text("text"))]
    system = text("system", optional=True)
    first = [Turn("system", system)] if system else []
    if "messages" in columns:
        messages = take_list(values, columns["messages"], faults)
        return first + [_parse_message(number, message, faults) for number, message in enumerate(messages, 1)]
    if "instruction" in columns:
        prompt, answer = text("instruction"), text("output")
        if context := text("input", optional=True):
            prompt = f"{prompt}\n\n{context}"
    else:
        prompt, answer = text("prompt"), text("completion")
    return [*first, Turn("user", prompt), Turn("assistant", answer)]


def _parse_message(number: int, message: Any, faults: list[str]) -> Turn:
    names = ("from", "value") if isinstance(message, dict) and "from" in message else ("role", "content")
    if not isinstance(message, dict) or not set(names) <= set(message):
        allowed = '{"role": ..., "content": ...} or {"from": ..., "value": ...}'
        faults.append(f"turn {number} must be {allowed}, got {json.dumps(message)[:60]}")
        return Turn("", "")
    role, text = (message[name] for name in names)
    if not isinstance(role, str) or role not in ROLES:
        hint = suggest(role, ROLES) if isinstance(role, str) else f"; known: {', '.join(sorted(ROLES))}"
        faults.append(f"turn {number} has the unknown role {json.dumps(role)[:40]}{hint}")
        role = ""
    if not isinstance(text, str):
        faults.append(f"turn {number}: {names[1]} must be a string, got {json.dumps(text)[:40]}")
    else:
        faults.extend(_text_faults(f"turn {number}: {names[1]}", text))
    return Turn(ROLES.get(role, ""), text if isinstance(text, str) else "")


def _text_faults(what: str, text: str) -> Iterator[str]:
    if not text.strip():
        yield f"{what} is empty"
    elif has_lone_surrogate(text):
        yield f"{what} holds half a surrogate pair, which is no character"


def _order_faults(turns: Sequence[Turn]) -> Iterator[str]:
    roles = [turn.role for turn in turns]
    if roles == ["text"]:
        return
    for number, role in enumerate(roles[1:], 2):
        if role == "system":
            yield f"turn {number} is the system's, which can only be the first"
    spoken = [role for role in roles if role != "system"]
    if "assistant" not in spoken:
        yield "no turn of the assistant, so there is nothing to learn"
        return
    if spoken[0] != "user":
        yield "the assistant speaks first, where a user must"
    if spoken[-1] != "assistant":
        yield "the last turn is the user's, where the assistant must answer"
