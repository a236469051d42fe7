"""Reads rows from CSV, TSV, JSON lines and JSON files; reports all problems of a file, with line or item."""

import bisect
import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._validation import suggest
from ..json_files import check_file

NUMBER = re.compile(r"[+-]?(?:[0-9]{1,400}(?:\.[0-9]{0,400})?|\.[0-9]{1,400})(?:[eE][+-]?[0-9]{1,6})?")
"""A number as programs write it: float() would also accept 1_0, the digits of other scripts, nan and inf."""

Record = tuple[int, dict[str, Any]]
Problem = tuple[int, str]

SUFFIXES = (".csv", ".tsv", ".jsonl")
RECORD_SUFFIXES = (*SUFFIXES, ".json")
SHOWN_PROBLEMS = 20
MAX_FIELD_CHARACTERS = 2**22
"""Maximum characters in a CSV or TSV field: a stray quote swallows what follows, at up to 8 bytes a character."""


@dataclasses.dataclass(frozen=True)
class StringRow:
    """A row of a file: its first line, counted from 1, and its values by column, as strings."""

    line: int
    values: Mapping[str, str]


class Problems:
    """Collects the problems of a file.

    Keeps the first `SHOWN_PROBLEMS` by line and counts the rest: all of them may not fit in memory.
    """

    def __init__(self) -> None:
        self.first: list[Problem] = []
        self.count = 0

    def add(self, line: int, what: str) -> None:
        """Adds a problem."""
        self.count += 1
        bisect.insort(self.first, (line, what), key=lambda problem: problem[0])
        del self.first[SHOWN_PROBLEMS:]

    def report(self, path: Path) -> None:
        """Raises one ValueError for all problems, if any."""
        raise_problems([(location_of(path, number), what) for number, what in self.first], self.count)


def location_of(path: Path, number: int) -> str:
    """Returns the location of a row: `file:line`, or `file: item n` in a .json file; both are counted from 1.

    >>> location_of(Path("a.csv"), 17), location_of(Path("a.json"), 17)
    ('a.csv:17', 'a.json: item 17')
    """
    return f"{path}: item {number}" if path.suffix.lower() == ".json" else f"{path}:{number}"


def read_rows(path: str | Path, columns: Sequence[str], delimiter: str | None = None) -> list[StringRow]:
    """Reads the rows of a .csv, .tsv or .jsonl file in UTF-8, with or without a byte order mark, LF or CRLF.

    CSV and TSV have a header and may quote fields with `"`, doubled inside. JSON lines hold one object each, whose
    strings, numbers and booleans become strings. Blank lines are skipped. Only `columns` are returned, but the
    values of an `id` column, if there is one, must be unique.

    Args:
      path: the file.
      columns: the columns to return.
      delimiter: of a .csv or .tsv file; by default a comma or a tab.

    Raises:
      ValueError: the file cannot be read or has no rows, a column is missing, or rows are malformed, empty in one
        of `columns`, or repeat an id. One message counts all problems of the file and shows the first
        `SHOWN_PROBLEMS` with `file:line`.
    """
    path, problems = Path(path), Problems()
    _check_suffix(path, SUFFIXES)
    text = _decode(path, problems)
    if path.suffix.lower() == ".jsonl":
        records = list(_string_records(_json_lines(text, problems), columns, problems))
    else:
        records = list(_table_records(path, text, columns, problems, delimiter))
    for line, what in _value_problems(records, columns):
        problems.add(line, what)
    if not records and not problems.count:
        problems.add(1, _no_rows(text))
    problems.report(path)
    return [StringRow(line, {c: record[c] for c in columns}) for line, record in records]


def read_records(path: Path, problems: Problems) -> list[Record]:
    """Reads the rows of a .jsonl, .json, .csv or .tsv file with all columns; JSON values keep their types.

    A .json file holds a list of objects. Blank lines are skipped.

    Args:
      path: the file, in UTF-8.
      problems: collects the problems of single rows; the caller may add more before it reports them.

    Returns:
      Each row's number for `location_of`, and its values by column.

    Raises:
      ValueError: the file cannot be read, is a .json file that is not a UTF-8 JSON list, or has no rows.
    """
    _check_suffix(path, RECORD_SUFFIXES)
    text = _decode(path, problems)
    if path.suffix.lower() == ".json":
        raise_problems([(f"{path}:{line}", what) for line, what in problems.first], problems.count)
        records = list(_json_items(path, text, problems))
    elif path.suffix.lower() == ".jsonl":
        records = list(_json_lines(text, problems))
    else:
        records = list(_table_records(path, text, (), problems))
    if not records and not problems.count:
        raise ValueError(f"{path}: {_no_rows(text)}")
    return records


def has_lone_surrogate(text: str) -> bool:
    """Whether a text contains a lone surrogate, which UTF-8 cannot encode."""
    return re.search(r"[\ud800-\udfff]", text) is not None


def _check_suffix(path: Path, allowed: Sequence[str]) -> None:
    if path.suffix.lower() not in allowed:
        raise ValueError(
            f"{path}: unsupported file type {path.suffix or '(no suffix)'}: use {', '.join(allowed)}"
        )


def _no_rows(text: str) -> str:
    if not text.strip():
        return "the file is empty"
    return "the list is empty" if text.strip()[0] == "[" else "no rows below the header"


def raise_problems(problems: Sequence[tuple[str, str]], count: int | None = None) -> None:
    """Raises one ValueError for all (location, problem) pairs, if any; its first line makes sense alone.

    `count` is the total number, if `problems` holds only the first of them.
    """
    if not problems:
        return
    count = len(problems) if count is None else count
    lines = [f"{location}: {problem}" for location, problem in problems[:SHOWN_PROBLEMS]]
    if count == 1:
        raise ValueError(lines[0])
    tail = [f"... and {count - len(lines)} more"] if count > len(lines) else []
    raise ValueError("\n  ".join([f"{lines[0]} (the first of {count} problems)", *lines, *tail]))


def _decode(path: Path, problems: Problems) -> str:
    """Decodes the file; reports lines that are not UTF-8 and replaces their invalid bytes."""
    check_file(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot read the file: {error.strerror}") from None
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            problems.add(number, f"byte 0x{line[error.start]:02x} is not UTF-8: save the file as UTF-8")
    return content.decode("utf-8-sig", errors="replace")


def _table_records(
    path: Path, text: str, columns: Sequence[str], problems: Problems, delimiter: str | None = None
) -> Iterator[Record]:
    delimiter = delimiter or ("\t" if path.suffix.lower() == ".tsv" else ",")
    rows = _table_rows(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), problems)
    top, header = next(rows, (1, None))
    if header is None:
        return
    faults = [f"column {c!r} appears twice" for c in dict.fromkeys(header) if header.count(c) > 1]
    other = next((d for d in _DELIMITERS if d != delimiter and len(header) == 1 and d in header[0]), None)
    hint = (
        f"; {header[0]!r:.60} looks {_DELIMITERS[other]}-separated: set data.delimiter {other!r}"
        if other
        else None
    )
    faults += [f"no column {c!r}{hint or suggest(c, header)}" for c in columns if c not in header]
    for fault in faults:
        problems.add(top, fault)
    for line, fields in rows if not faults else ():
        if len(fields) == len(header):
            yield line, dict(zip(header, fields, strict=True))
        else:
            problems.add(line, f"{len(fields)} fields, but the header has {len(header)}")


_DELIMITERS = {";": "semicolon", "\t": "tab", "|": "pipe", ",": "comma"}


def _table_rows(reader: Any, problems: Problems) -> Iterator[tuple[int, list[str]]]:
    """Yields the non-blank rows of a `csv.reader` with the first line of each."""
    while True:
        line, limit = reader.line_num + 1, csv.field_size_limit(MAX_FIELD_CHARACTERS)
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            too_long = "field larger" in str(error)
            reason = f"a field of more than {MAX_FIELD_CHARACTERS:,} characters" if too_long else error
            problems.add(line, f"malformed row, perhaps a stray quote: {reason}")
            continue
        finally:
            csv.field_size_limit(limit)  # the limit is global to the process
        if len(fields) > 1 or "".join(fields).strip():
            yield line, fields


def _json_lines(text: str, problems: Problems) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), 1):
        try:
            record = _parse_json(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            problems.add(number, f"invalid JSON: {error}")
            continue
        if isinstance(record, dict):
            yield number, record
        elif line.strip():
            problems.add(number, f"each line must be a JSON object, got {line.strip()[:40]}")


def _parse_json(text: str) -> Any:
    """Parses a JSON value; raises a ValueError for NaN, numbers that overflow, and keys that an object repeats."""

    def finite(word: str) -> float:
        if math.isfinite(value := float(word)):
            return value
        tokens = re.finditer(r'"(?:[^"\\]|\\.)*"|[^\s,:\[\]{}"]+', text)
        position = next(token.start() for token in tokens if token[0] == word)
        raise json.JSONDecodeError(f"{word} is not a finite number, or text without quotes", text, position)

    return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=finite, parse_float=finite)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"duplicate key {json.dumps(duplicate):.80} in an object")
    return values


def _to_string(value: Any) -> str:
    """Converts a JSON value to a string; equal numbers give equal strings, so 1.0 becomes "1".

    >>> _to_string("a"), _to_string(1), _to_string(1.0), _to_string(1.5), _to_string(True)
    ('a', '1', '1', '1.5', 'true')
    """
    if isinstance(value, str):
        return value
    integral = isinstance(value, float) and abs(value) < 2**53 and value.is_integer()
    return json.dumps(int(value) if integral else value)


def _json_items(path: Path, text: str, problems: Problems) -> Iterator[Record]:
    try:
        items = _parse_json(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}:{getattr(error, 'lineno', 1)}: invalid JSON: {error}") from None
    if not isinstance(items, list):
        raise ValueError(f"{path}: must be a JSON list of objects, got {text.strip()[:40]}")
    for number, item in enumerate(items, 1):
        if isinstance(item, dict):
            yield number, item
        else:
            problems.add(number, f"each item must be a JSON object, got {json.dumps(item)[:40]}")


def _string_records(
    records: Iterable[Record], columns: Sequence[str], problems: Problems
) -> Iterator[Record]:
    """Yields the records that have all `columns`, with their values as strings."""
    for number, record in records:
        faults = [f"no column {c!r}{suggest(c, record)}" for c in columns if c not in record]
        selected = {c: record[c] for c in (*columns, "id") if c in record}
        faults += [
            f"column {c!r} must be a string or a number, got {json.dumps(v)[:40]}"
            for c, v in selected.items()
            if v is None or isinstance(v, list | dict)
        ]
        for fault in faults:
            problems.add(number, fault)
        if not faults:
            yield number, {c: _to_string(v) for c, v in selected.items()}


def _value_problems(records: Sequence[Record], columns: Sequence[str]) -> Iterator[Problem]:
    first_lines: dict[str, int] = {}
    for line, record in records:
        for column in columns:
            if not record[column].strip():
                yield line, f"column {column!r} is empty"
            elif has_lone_surrogate(record[column]):
                yield line, f"column {column!r} contains a lone surrogate, which UTF-8 cannot encode"
        name = record.get("id", "")
        if name.strip() and first_lines.setdefault(name, line) != line:
            yield line, f"id {name!r} is already used at line {first_lines[name]}"
