"""Reads conversations from files of messages, instructions, prompts with completions, or plain texts."""

import contextlib
import dataclasses
import difflib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._utils.validation import suggest
from .readers import Problems, Record, as_json, parse_json, read_records, take_text
from .splits import comparable

ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {
    "human": "user",
    "gpt": "assistant",
}
"""Maps roles in files to ours; the last two are ShareGPT's."""
WEIGHTS = {"weight": "0 or 1", "train": "false or true", "training": "false or true"}
"""Fields that say whether a message is trained on, with the allowed values: OpenAI's, and axolotl's."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message with thoughts that some chat templates write before its content."""

LAYOUTS: Sequence[tuple[Mapping[str, str], Sequence[str]]] = (
    ({"messages": "messages"}, ("system", "tools")),
    ({"messages": "conversations"}, ("system", "tools")),
    ({"instruction": "instruction", "output": "output"}, ("input", "system")),
    ({"prompt": "prompt", "completion": "completion"}, ("system", "tools")),
    ({"text": "text"}, ()),
)
"""The file's required columns in each layout, by our names, and the optional ones."""
ANY_LAYOUTS = (
    *LAYOUTS[:-1],
    ({"instruction": "instruction"}, ("output", "input", "system")),
    ({"prompt": "prompt"}, ("completion", "system", "tools")),
    LAYOUTS[-1],
)
"""Also those without answers."""
_ALLOWED = "messages (or conversations), or instruction and output, or prompt and completion, or text"


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
      role: `"system"`, `"user"`, `"assistant"` or `"tool"`, or `"text"` for plain text.
      text: its content; empty in a message that only calls tools.
      trained: whether an answer of the assistant is trained on.
      extra: JSON object of the other fields that a chat template sees (`tool_calls` of the assistant;
        `tool_call_id` and `name` of a tool), or empty.
    """

    role: str
    text: str
    trained: bool = True
    extra: str = ""

    @property
    def message(self) -> dict[str, Any]:
        """The message as a chat template sees it."""
        return {"role": self.role, "content": self.text, **json.loads(self.extra or "{}")}


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
      turns: an optional system turn, then a user turn first, and an assistant turn last if it is to train on; or a
        single plain text.
      place: its location in the file, for error messages.
      tools: JSON list of the tools that a chat template describes, or empty.
      dropped: turns of the file that are left out: an empty system turn, and those after the last answer.
    """

    turns: tuple[Turn, ...]
    place: str = "a conversation"
    tools: str = ""
    dropped: tuple[Turn, ...] = ()

    @property
    def prompt(self) -> str:
        """The first user message, or the plain text."""
        return next(turn.text for turn in self.turns if turn.role in ("user", "text"))

    @property
    def key(self) -> tuple[str, ...]:
        """What duplicates have in common: the prompt and all answers."""
        answers = (turn.text + turn.extra for turn in self.turns if turn.role == "assistant")
        return tuple(map(comparable, (self.prompt, *answers)))

    @property
    def label_key(self) -> None:
        """Equal conversations never have different labels."""


def read_chats(
    path: str | Path, columns: Mapping[str, str] | None = None, *, to_train: bool = True
) -> list[Chat]:
    """Reads conversations from a file of one of `readers.SUFFIXES`.

    A row has one of four layouts:

    - `messages` (or, without `columns`, `conversations`): a list of `{"role": ..., "content": ...}` or, as in
      ShareGPT, of `{"from": ..., "value": ...}`; in CSV and TSV, the list is JSON;
    - `instruction` and `output`, and optionally `input`, which follows the instruction after a blank line;
    - `prompt` and `completion`: texts, or lists of messages (in CSV and TSV as JSON), of which only those in
      `completion` are trained on;
    - `text`: plain text to train on, without a chat template.

    All but `text` may have `system`, the system prompt. `messages` and `prompt` may have `tools`, a list of JSON
    objects (or that list as JSON), for the chat template. Other columns are ignored.

    A message's content is a string or a list of `{"type": "text", "text": ...}`. A message of the assistant may
    call tools (`tool_calls`, as OpenAI has them; their arguments may be JSON), which messages of the role `tool`
    answer. `weight` 0 or 1, or `train` (or `training`) true or false, says whether one is trained on. An empty
    system message, and messages after the last answer, are left out (see `Chat.dropped`).

    Args:
      path: the file.
      columns: maps the names above to the file's, for all columns to read: `{"prompt": "question", "completion":
        "reply"}`. By default, the names above, in the layout that most rows have (the first of equals).
      to_train: whether each conversation needs an answer to train on. Else `output` and `completion` may be
        missing, and the messages after the last answer are kept.

    Raises:
      ValueError: the file cannot be read, no layout fits, one of `columns` seems to be misspelled, or rows are
        invalid: columns missing or of the wrong type, unknown roles, empty content, images, no assistant turn to
        train on, or turns out of order (see `Chat`). One message shows the first 20 problems with their locations.
    """
    problems = Problems()
    records = list(read_records(path, problems))
    columns = choose_columns(path, records, columns, LAYOUTS if to_train else ANY_LAYOUTS, _ALLOWED)
    chats = []
    for location, values in records:
        with problems.at(location):
            chats.append(_parse_chat(values, columns, location, to_train))
    problems.report()
    return chats


def describe_dropped(chats: Iterable[Chat]) -> list[str]:
    """Returns lines that count the conversations with dropped turns."""
    counts = Counter(kind for chat in chats for kind in {turn.role == "system" for turn in chat.dropped})
    texts = {True: "an empty system message", False: "the messages after the last answer"}
    return [f"left out {texts[kind]} in {counts[kind]:,} conversations" for kind in texts if counts[kind]]


def take_list(values: Mapping[str, Any], column: str) -> list[Any]:
    """Returns a column's list, which is JSON in CSV and TSV."""
    value = values.get(column)
    if column not in values:
        raise ValueError(f"no column {column!r}{suggest(column, values)}")
    reason = ""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            reason = f": {error}"
    if not isinstance(value, list) or not value:
        raise ValueError(f"column {column!r} must be a non-empty list, got {as_json(value):.40}{reason}")
    return value


def choose_columns(
    path: str | Path,
    records: Sequence[Record],
    columns: Mapping[str, str] | None,
    layouts: Sequence[tuple[Mapping[str, str], Sequence[str]]],
    allowed: str,
) -> dict[str, str]:
    """Returns the file's columns by our names: `columns` if given, else those of the layout that most rows have.

    Raises:
      ValueError: `columns` are those of no layout, an optional one seems to be misspelled, or no row has a layout.
    """
    if columns is not None:
        if any(set(required) <= set(columns) <= {*required, *optional} for required, optional in layouts):
            # A file may lack an optional one, but not where a column has nearly its name.
            known = {name for _, values in records for name in values}
            required = {name for names, _ in layouts for name in names}
            for name, column in columns.items():
                near = difflib.get_close_matches(column, known - {*columns.values()}, n=1, cutoff=0.8)
                if name not in required and column not in known and near:
                    raise ValueError(
                        f"{path}: no row has the column {column!r} of data.column_names; did you mean {near[0]!r}?"
                    )
            return dict(columns)
        others = ", ".join(sorted({name for _, optional in layouts for name in optional}))
        raise ValueError(
            f"data.column_names must name {allowed}{f', and may name {others}' if others else ''}; got "
            f"{', '.join(columns) or 'none'}"
        )
    counts = Counter(name for _, values in records for name in values)
    matches = [sum(set(required.values()) <= row.keys() for _, row in records) for required, _ in layouts]
    if records and not max(matches):
        names = ", ".join(name for name, _ in counts.most_common(10)) or "none"
        raise ValueError(
            f"{path}: expected columns {allowed}; got {names}: rename them or set data.column_names"
        )
    required, optional = layouts[matches.index(max(matches))]  # the first of equals
    return {**required, **{name: name for name in optional if name in counts}}


def _parse_chat(values: Mapping[str, Any], columns: Mapping[str, str], location: str, to_train: bool) -> Chat:
    turns = _parse_turns(values, columns, to_train)
    tools = _parse_tools(values, columns)
    _check_order(turns, to_train)
    answers = (n for n, turn in enumerate(turns) if turn.role in ("assistant", "text"))
    stop = 1 + max(answers) if to_train else len(turns)
    kept = tuple(turn for turn in turns[:stop] if turn.role != "system" or turn.text.strip())
    dropped = tuple(turn for turn in turns[:stop] if turn not in kept) + tuple(turns[stop:])
    return Chat(kept, location, tools, dropped)


def _parse_turns(values: Mapping[str, Any], columns: Mapping[str, str], to_train: bool) -> list[Turn]:
    def text(name: str, *, optional: bool = False) -> str:
        return take_text(values, columns[name], optional=optional) if name in columns else ""

    if "text" in columns:
        return [Turn("text", text("text"))]
    system = text("system", optional=True)
    first = [Turn("system", system)] if system else []
    if "messages" in columns:
        return first + _parse_messages(take_list(values, columns["messages"]))
    question, answer = ("instruction", "output") if "instruction" in columns else ("prompt", "completion")
    is_open = not to_train and (answer not in columns or values.get(columns[answer]) in (None, "", []))
    prompt, reply = (_messages(values.get(columns.get(name, ""))) for name in ("prompt", "completion"))
    if prompt and (reply or is_open):
        return first + _parse_messages([*prompt, *reply], len(prompt))
    if prompt and not isinstance(values[columns["prompt"]], list):
        raise ValueError(f"column {columns['prompt']!r} is a list of messages, but not {columns[answer]!r}")
    asked = text(question)
    if context := text("input", optional=True):
        asked = f"{asked}\n\n{context}"
    return [*first, Turn("user", asked), *([] if is_open else [Turn("assistant", text(answer))])]


def _messages(value: Any) -> list[Any]:
    """A list of messages, which is JSON in CSV and TSV; empty for anything else, such as text that is JSON."""
    if not isinstance(value, str):
        return value if isinstance(value, list) else []
    try:
        found = json.loads(value) if value.lstrip().startswith("[") else []
    except (ValueError, RecursionError):
        return []
    is_message = lambda x: isinstance(x, dict) and str(x.get("role", x.get("from"))) in ROLES  # noqa: E731
    # What the other JSON may not have, such as a key twice, is an error here too: it is no text.
    return parse_json(value) if all(map(is_message, found)) and found else []


def _parse_tools(values: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    if "tools" not in columns or values.get(columns["tools"]) in (None, "", "[]", []):
        return ""
    tools = take_list(values, columns["tools"])
    if not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(
            f"column {columns['tools']!r} must be a list of JSON objects, got {as_json(tools):.60}"
        )
    return _dump(tools, f"column {columns['tools']!r}")


def _dump(value: Any, name: str) -> str:
    """JSON for the template. Parquet has values that it has not: times, decimals, bytes, NaN."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from None


def _parse_messages(messages: Sequence[Any], untrained: int = 0) -> list[Turn]:
    """Parses messages, of which the first do not count as trained on if they do not say so."""
    turns = []
    for number, message in enumerate(messages, 1):
        try:
            turns.append(_parse_message(message, trained=number > untrained))
        except ValueError as error:
            raise ValueError(f"turn {number}{error}") from None
    return turns


def _parse_message(message: Any, *, trained: bool) -> Turn:
    names = ("from", "value") if isinstance(message, dict) and "from" in message else ("role", "content")
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    if not isinstance(message, dict) or not {names[0], *(() if calls else names)} <= set(message):
        allowed = '{"role": ..., "content": ...} or {"from": ..., "value": ...}'
        raise ValueError(f" must be {allowed}, got {as_json(message):.60}")
    role, content = message[names[0]], message.get(names[1])
    if not isinstance(role, str) or role not in ROLES:
        hint = suggest(role, ROLES) if isinstance(role, str) else f"; known: {', '.join(sorted(ROLES))}"
        raise ValueError(f": unknown role {as_json(role):.40}{hint}")
    role = ROLES[role]
    text = "" if content is None and calls else _parse_content(names[1], content)
    # A tool may return nothing, and an empty system message is left out.
    if not text.strip() and not calls and role not in ("tool", "system"):
        raise ValueError(f": {names[1]} is empty")
    extra: dict[str, Any] = {}
    if role == "tool":
        extra = {name: message[name] for name in ("tool_call_id", "name") if message.get(name) is not None}
    elif calls and role == "assistant":
        extra = {"tool_calls": _parse_calls(calls)}
    elif calls:
        raise ValueError(f": only the assistant may have tool_calls, got {as_json(calls):.40}")
    if thoughts := next((name for name in REASONING if message.get(name)), None):
        raise ValueError(
            f": {thoughts} is not supported: write it into {names[1]}, as the chat template does (such as "
            "<think>...</think>)"
        )
    trained = _parse_weight(role, message, trained)
    return Turn(
        role, text, trained or role != "assistant", _dump(extra, f": {', '.join(extra)}") if extra else ""
    )


def _parse_content(name: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f": {name} must be a string or a list of text parts, got {as_json(content):.40}")
    for number, part in enumerate(content, 1):
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            allowed = '{"type": "text", "text": ...}; images and other media are not supported'
            raise ValueError(f": part {number} of {name} must be {allowed}, got {as_json(part):.60}")
    return "".join(part["text"] for part in content)


def _parse_calls(calls: Any) -> list[Any]:
    # OpenAI's files hold arguments as JSON text, but chat templates expect an object. Anything else of a call stays
    # in its order, in which a template may write it.
    allowed = '{"type": "function", "function": {"name": ..., "arguments": {...}}}'
    if not isinstance(calls, list | dict):
        raise ValueError(f": tool_calls must be a list of {allowed}, got {as_json(calls):.60}")
    parsed = []
    for number, call in enumerate(calls if isinstance(calls, list) else [calls], 1):
        function = call.get("function") if isinstance(call, dict) else None
        function = function if isinstance(function, dict) else {}
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError):
                arguments = parse_json(arguments)
        if not isinstance(arguments, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f": tool call {number} must be {allowed}, got {as_json(call):.60}")
        parsed.append({**call, "function": {**function, "arguments": arguments}})
    return parsed


def _parse_weight(role: str, message: Mapping[str, Any], default: bool) -> bool:
    values = {name: message[name] for name in WEIGHTS if message.get(name) is not None}
    for name, value in values.items():
        if value not in (0, 1):
            raise ValueError(f": {name} must be {WEIGHTS[name]}, got {as_json(value):.40}")
        if value and role != "assistant":
            raise ValueError(
                f": {name} {as_json(value)} is for the assistant; only its messages are trained on"
            )
    if len({*map(bool, values.values())}) > 1:
        raise ValueError(f": {' and '.join(values)} contradict each other")
    if message.get("train_detail"):
        raise ValueError(": train_detail is not supported: use train, for the whole message")
    return all(values.values()) if values else default


def _check_order(turns: Sequence[Turn], to_train: bool) -> None:
    roles = [turn.role for turn in turns]
    if roles == ["text"]:
        return
    if "system" in roles[1:]:
        number = roles.index("system", 1) + 1
        raise ValueError(f"turn {number} has the role system, allowed only for the first turn")
    dialogue = [role for role in roles if role != "system"]
    if not dialogue or (to_train and "assistant" not in dialogue):
        raise ValueError(
            "no assistant turn, so there is nothing to train on" if to_train else "no message to answer"
        )
    if dialogue[0] != "user":
        raise ValueError(f"the {dialogue[0]} has the first turn, which must be the user's")
    if to_train and not any(turn.trained for turn in turns if turn.role == "assistant"):
        raise ValueError("no assistant turn to train on: each has weight 0 or train false")
