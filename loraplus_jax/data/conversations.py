"""Reads conversations from files of messages, instructions, prompts with completions, or plain texts."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._validation import suggest
from .readers import Problems, Record, has_lone_surrogate, location_of, read_records

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
"""Maps roles in files to ours; the last two are ShareGPT's."""

COLUMN_SETS = (("messages",), ("instruction", "output"), ("prompt", "completion"), ("text",))
"""Required columns of each layout."""
OPTIONAL_COLUMNS = {
    "messages": ("system",),
    "instruction": ("input", "system"),
    "prompt": ("system",),
    "text": (),
}
"""Optional columns of a layout, by its first column."""
_ALLOWED = "messages (or conversations), or instruction and output, or prompt and completion, or text"


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message: `role` is `"system"`, `"user"` or `"assistant"`, or `"text"` for plain text."""

    role: str
    text: str


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation and its location in the file, for error messages.

    Turns: an optional system turn, then a user turn first and an assistant turn last. Or a single plain text.
    """

    turns: tuple[Turn, ...]
    place: str = "a conversation"

    @property
    def question(self) -> str:
        """The first user message, or the plain text."""
        return next(turn.text for turn in self.turns if turn.role in ("user", "text"))


def read_chats(path: str | Path, columns: Mapping[str, str] | None = None) -> list[Chat]:
    """Reads conversations from a .jsonl, .json (a list of objects), .csv or .tsv file in UTF-8.

    A row has one of four layouts:

    - `messages` (or, without `columns`, `conversations`): a list of `{"role": ..., "content": ...}` or, as in
      ShareGPT, of `{"from": ..., "value": ...}`; in CSV and TSV, the list is JSON;
    - `instruction` and `output`, and optionally `input`, which follows the instruction after a blank line;
    - `prompt` and `completion`;
    - `text`: plain text to train on, without a chat template.

    All but `text` may have `system`, the system prompt. Other columns are ignored.

    Args:
      path: the file.
      columns: maps the names above to the file's, for all columns to read: `{"prompt": "question", "completion":
        "reply"}`. By default, the names above, in the layout that most rows have (the first of equals).

    Raises:
      ValueError: the file cannot be read, no layout fits, or rows are invalid: columns missing or of the wrong
        type, unknown roles, empty content, no assistant turn, or turns out of order (see `Chat`). One message shows
        the first 20 problems with `file:line`, or `file: item n` in a .json file, both counted from 1.
    """
    path, problems = Path(path), Problems()
    records = read_records(path, problems)
    if columns is None:
        columns = _infer_columns(path, records) if records else {}
    elif not any(
        set(layout) <= set(columns) <= {*layout, *OPTIONAL_COLUMNS[layout[0]]} for layout in COLUMN_SETS
    ):
        names = ", ".join(columns) or "none"
        raise ValueError(f"columns must name {_ALLOWED} (optionally input or system); got {names}")
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
    """Returns a column's text (numbers and booleans as in JSON); appends any problem to `faults`.

    With `optional`, a missing, null or blank column gives `""`.
    """
    value = values.get(column)
    if optional and (value is None or value == ""):
        return ""
    if column not in values:
        faults.append(f"no column {column!r}{suggest(column, values)}")
    elif value is None or isinstance(value, list | dict):
        faults.append(f"column {column!r} must be a string or a number, got {json.dumps(value)[:40]}")
    else:
        text = value if isinstance(value, str) else json.dumps(value)
        if optional and not text.strip():
            return ""
        faults.extend(_text_faults(f"column {column!r}", text))
        return text
    return ""


def take_list(values: Mapping[str, Any], column: str, faults: list[str]) -> list[Any]:
    """Returns a column's list (JSON in CSV and TSV); appends any problem to `faults`."""
    value = values.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = values[column]
    if column not in values:
        faults.append(f"no column {column!r}{suggest(column, values)}")
    elif not isinstance(value, list) or not value:
        faults.append(f"column {column!r} must be a non-empty list, got {json.dumps(value)[:40]}")
    else:
        return value
    return []


def _infer_columns(path: Path, records: Sequence[Record]) -> dict[str, str]:
    """Picks the layout that most rows have; the first of equals."""
    counts = Counter(name for _, values in records for name in values)
    layouts = [{name: name for name in layout} for layout in COLUMN_SETS]
    layouts.insert(1, {"messages": "conversations"})
    matches = [sum(all(c in values for c in layout.values()) for _, values in records) for layout in layouts]
    if not max(matches):
        names = ", ".join(name for name, _ in counts.most_common(10)) or "none"
        raise ValueError(
            f"{path}: expected columns {_ALLOWED}; got {names}: rename them or set data.column_names"
        )
    layout = layouts[matches.index(max(matches))]
    return layout | {name: name for name in OPTIONAL_COLUMNS[next(iter(layout))] if name in counts}


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
        faults.append(f"turn {number}: unknown role {json.dumps(role)[:40]}{hint}")
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
        yield f"{what} contains a lone surrogate, which UTF-8 cannot encode"


def _order_faults(turns: Sequence[Turn]) -> Iterator[str]:
    roles = [turn.role for turn in turns]
    if roles == ["text"]:
        return
    for number, role in enumerate(roles[1:], 2):
        if role == "system":
            yield f"turn {number} has the role system, allowed only for the first turn"
    dialogue = [role for role in roles if role != "system"]
    if "assistant" not in dialogue:
        yield "no assistant turn, so there is nothing to train on"
        return
    if dialogue[0] != "user":
        yield "the assistant has the first turn, which must be the user's"
    if dialogue[-1] != "assistant":
        yield "the user has the last turn, which must be the assistant's"
