"""Reads rows from CSV, TSV, JSON and Parquet files; reports all problems of a file, with line or item."""

import bisect
import csv
import dataclasses
import io
import itertools
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from .._utils.json_files import check_file, parse_int
from .._utils.validation import suggest

# As programs write numbers: float() would also accept 1_0, the digits of other scripts, nan and inf.
NUMBER = re.compile(r"[+-]?(?:[0-9]{1,400}(?:\.[0-9]{0,400})?|\.[0-9]{1,400})(?:[eE][+-]?[0-9]{1,6})?")

Record = tuple[int, dict[str, Any]]
Problem = tuple[int, str]
Quoting = Literal["minimal", "none"]

TABLE_SUFFIXES = (".csv", ".tsv")
SUFFIXES = (*TABLE_SUFFIXES, ".jsonl", ".parquet")
RECORD_SUFFIXES = (*TABLE_SUFFIXES, ".jsonl", ".json")
SHOWN_PROBLEMS = 20
# In a CSV or TSV field: a stray quote swallows what follows, at up to 8 bytes a character.
MAX_FIELD_CHARACTERS = 2**22


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
    """Returns the location of a row: `file:line`, or `file: item n` in a .json or .parquet file, counted from 1.

    >>> location_of(Path("a.csv"), 17), location_of(Path("a.json"), 17)
    ('a.csv:17', 'a.json: item 17')
    """
    return f"{path}: item {number}" if path.suffix.lower() in (".json", ".parquet") else f"{path}:{number}"


def read_rows(
    path: str | Path,
    columns: Sequence[str],
    delimiter: str | None = None,
    *,
    quoting: Quoting = "minimal",
    header: Sequence[str] = (),
    may_be_empty: Collection[str] = (),
    short_rows: Problems | None = None,
) -> list[StringRow]:
    """Reads the rows of a .csv, .tsv, .jsonl or .parquet file.

    Text files are UTF-8, with or without a byte order mark, LF or CRLF. CSV and TSV have a header and may quote
    fields with `"`, doubled inside. JSON lines hold one object each. Strings, numbers and booleans in JSON and
    Parquet become strings. Blank lines are skipped.

    Args:
      path: the file.
      columns: the columns to return.
      delimiter: of a .csv or .tsv file; by default a comma or a tab.
      quoting: of a .csv or .tsv file: minimal, or none, where `"` is a character like any other.
      header: names of the columns of a .csv or .tsv file that has no header line; a first line that has all
        `columns` is one.
      may_be_empty: the columns whose values may be empty.
      short_rows: collects the rows of a .csv or .tsv file with too few fields, which are left out; by default they
        are problems.

    Raises:
      ValueError: the file cannot be read or has no rows, a column is missing, or rows are malformed or empty in
        one of `columns`. One message counts all problems of the file and shows the first `SHOWN_PROBLEMS` with
        `file:line`.
    """
    path, problems = Path(path), Problems()
    found, text = _read(path, SUFFIXES, columns, problems, delimiter, quoting, header, short_rows)
    records = list(_string_records(found, columns, problems))
    for line, what in _value_problems(records, columns, may_be_empty):
        problems.add(line, what)
    if not records and not problems.count:
        for line, what in short_rows.first if short_rows and short_rows.count else [(1, _no_rows(text))]:
            problems.add(line, what)
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
    found, text = _read(path, RECORD_SUFFIXES, (), problems)
    records = list(found)
    if not records and not problems.count:
        raise ValueError(f"{path}: {_no_rows(text)}")
    return records


def has_lone_surrogate(text: str) -> bool:
    """Whether a text contains a lone surrogate, which UTF-8 cannot encode."""
    return re.search(r"[\ud800-\udfff]", text) is not None


def _read(
    path: Path, suffixes: Sequence[str], columns: Sequence[str], problems: Problems, *table: Any
) -> tuple[Iterator[Record], str]:
    """The records of a file, and its text; `table` are the last arguments of `_table_records`."""
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        raise ValueError(
            f"{path}: unsupported file type {path.suffix or '(no suffix)'}: use {', '.join(suffixes)}"
        )
    if suffix == ".parquet":
        return _parquet_records(path, columns, problems), ""
    text = _decode(path, problems)
    if suffix == ".json":
        # A list of JSON has items, not lines, so what is wrong with its lines cannot be listed with them.
        raise_problems([(f"{path}:{line}", what) for line, what in problems.first], problems.count)
        return _json_items(path, text, problems), text
    if suffix == ".jsonl":
        return _json_lines(text, problems), text
    return _table_records(path, text, columns, problems, *table), text


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
    check_file(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot read the file: {error.strerror}") from None
    # Line by line, as an error of the whole would name a byte and only the first.
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            problems.add(number, f"byte 0x{line[error.start]:02x} is not UTF-8: save the file as UTF-8")
    return content.decode("utf-8-sig", errors="replace")


def _table_records(
    path: Path,
    text: str,
    columns: Sequence[str],
    problems: Problems,
    delimiter: str | None = None,
    quoting: Quoting = "minimal",
    header: Sequence[str] = (),
    short_rows: Problems | None = None,
) -> Iterator[Record]:
    delimiter = delimiter or ("\t" if path.suffix.lower() == ".tsv" else ",")
    style = csv.QUOTE_NONE if quoting == "none" else csv.QUOTE_MINIMAL
    # Line ends as they are: a quoted field may hold some.
    lines = io.StringIO(text, newline="")
    rows = _table_rows(csv.reader(lines, delimiter=delimiter, strict=True, quoting=style), problems)
    first = next(rows, None)
    if first is None:
        return
    if header and not {*columns} <= {*first[1]}:
        top, rows = 1, itertools.chain([first], rows)
    else:
        top, header = first
    faults = [f"column {c!r} appears twice" for c in dict.fromkeys(header) if header.count(c) > 1]
    other = next((d for d in _DELIMITERS if d != delimiter and len(header) == 1 and d in header[0]), None)
    hint = (
        f"; {header[0]!r:.60} looks {_DELIMITERS[other]}-separated: set data.delimiter {other!r}"
        if other
        else None
    )
    bare = "" if {*columns} & {*header} else "; if the file has no header line, set data.header"
    faults += [f"no column {c!r}{hint or suggest(c, header) + bare}" for c in columns if c not in header]
    for fault in faults:
        problems.add(top, fault)
    for line, fields in rows if not faults else ():
        if len(fields) == len(header):
            yield line, dict(zip(header, fields, strict=True))
        else:
            hint = f"; {QUOTING_HINT}" if any("\n" in field for field in fields) else ""
            collector = short_rows if short_rows is not None and len(fields) < len(header) else problems
            collector.add(line, f"{len(fields)} fields, but the header has {len(header)}{hint}")


QUOTING_HINT = "if quotes are part of the text, set data.quoting none"
_DELIMITERS = {";": "semicolon", "\t": "tab", "|": "pipe", ",": "comma"}


def _table_rows(reader: Any, problems: Problems) -> Iterator[tuple[int, list[str]]]:
    while True:
        line, limit = reader.line_num + 1, csv.field_size_limit(MAX_FIELD_CHARACTERS)
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            too_long = "field larger" in str(error)
            reason = f"a field of more than {MAX_FIELD_CHARACTERS:,} characters" if too_long else error
            problems.add(line, f"malformed row, perhaps a stray quote: {reason}; {QUOTING_HINT}")
            continue
        finally:
            # The limit is global to the process.
            csv.field_size_limit(limit)
        # An empty line; in a table of one column "" is an empty cell.
        if fields and not (len(fields) == 1 and fields[0].isspace()):
            yield line, fields


def _json_lines(text: str, problems: Problems) -> Iterator[Record]:
    # Not splitlines, which also splits at characters that strings of JSON may hold, such as U+2028.
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

    numbers: dict[str, Any] = {"parse_constant": finite, "parse_float": finite, "parse_int": parse_int}
    return json.loads(text, object_pairs_hook=_unique_keys, **numbers)


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


def _parquet_records(path: Path, columns: Sequence[str], problems: Problems) -> Iterator[Record]:
    check_file(path)
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ValueError(
            f"{path}: .parquet files require pyarrow; run pip install 'loraplus_jax[hub]'"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for fault in [f"no column {c!r}{suggest(c, names)}" for c in columns if c not in names]:
                problems.add(1, fault)
            records = [] if problems.count else file.read(list(columns)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot read the Parquet file: {error}") from None
    yield from enumerate(records, 1)


def _string_records(
    records: Iterable[Record], columns: Sequence[str], problems: Problems
) -> Iterator[Record]:
    for number, record in records:
        faults = [f"no column {c!r}{suggest(c, record)}" for c in columns if c not in record]
        selected = {c: record[c] for c in columns if c in record}
        # Parquet has other types than JSON, such as decimals, and numbers that are not finite.
        faults += [
            f"column {c!r} must be a string or a number, got {json.dumps(v, default=repr)[:40]}"
            for c, v in selected.items()
            if not isinstance(v, str | int | float) or (isinstance(v, float) and not math.isfinite(v))
        ]
        for fault in faults:
            problems.add(number, fault)
        if not faults:
            yield number, {c: _to_string(v) for c, v in selected.items()}


def _value_problems(
    records: Sequence[Record], columns: Sequence[str], may_be_empty: Collection[str]
) -> Iterator[Problem]:
    for line, record in records:
        for column in columns:
            if not record[column].strip() and column not in may_be_empty:
                yield line, f"column {column!r} is empty"
            elif has_lone_surrogate(record[column]):
                yield line, f"column {column!r} contains a lone surrogate, which UTF-8 cannot encode"
