"""Reads rows from CSV, TSV, JSON and Parquet files, one after the other; collects the problems of a file."""

import contextlib
import csv
import itertools
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from .._utils.json_files import check_file, check_not_utf16, parse_int
from .._utils.untrusted import MEMORY_PER_BYTE, run_job
from .._utils.validation import repeated, suggest

# As programs write numbers: float() would also accept 1_0, the digits of other scripts, nan and inf.
NUMBER = re.compile(r"[+-]?(?:[0-9]{1,400}(?:\.[0-9]{0,400})?|\.[0-9]{1,400})(?:[eE][+-]?[0-9]{1,6})?")

Record = tuple[str, dict[str, Any]]
"""A row's location for messages, and its values by column."""
Quoting = Literal["minimal", "none"]

TABLE_SUFFIXES = (".csv", ".tsv")
SUFFIXES = (*TABLE_SUFFIXES, ".jsonl", ".json", ".parquet")
SHOWN_PROBLEMS = 20
# In a CSV or TSV field: a stray quote swallows what follows, at up to 8 bytes a character.
MAX_FIELD_CHARACTERS = 2**22


class Problems:
    """Collects problems with their locations; keeps the first `SHOWN_PROBLEMS`, as all may not fit in memory."""

    def __init__(self, problems: Iterable[tuple[str, str]] = ()) -> None:
        self.first: list[tuple[str, str]] = []
        self.count = 0
        for problem in problems:
            self.add(*problem)

    def add(self, location: str, what: object) -> None:
        """Adds a problem."""
        self.count += 1
        if len(self.first) < SHOWN_PROBLEMS:
            self.first.append((location, str(what)))

    @contextlib.contextmanager
    def at(self, location: str) -> Iterator[None]:
        """Adds a ValueError of the block instead of raising it."""
        try:
            yield
        except ValueError as error:
            self.add(location, error)

    def report(self) -> None:
        """Raises one ValueError for all problems, if any; its first line makes sense alone."""
        lines = [f"{location}: {what}" for location, what in self.first]
        if self.count > 1:
            tail = [f"... and {self.count - len(lines)} more"] if self.count > len(lines) else []
            lines = [f"{lines[0]} (the first of {self.count} problems)", *lines, *tail]
        if lines:
            raise ValueError("\n  ".join(lines))


def read_rows(
    path: str | Path,
    columns: Sequence[str],
    *,
    may_be_empty: Collection[str] = (),
    short_rows: Problems | None = None,
    **table: Any,
) -> list[tuple[str, tuple[str, ...]]]:
    """Reads the values of some columns as strings, each row with its location.

    Equal numbers become equal strings, so 1.0 becomes "1".

    Args:
      path: the file.
      columns: the columns to return.
      may_be_empty: the columns whose values may be empty.
      short_rows: see `read_records`.
      **table: how a .csv or .tsv file is written, see `read_records`.

    Raises:
      ValueError: the file cannot be read or has no rows, a column is missing, or rows are malformed or empty in
        one of `columns`. One message counts all problems of the file and shows the first `SHOWN_PROBLEMS`.
    """
    problems, rows = Problems(), []
    for location, values in read_records(path, problems, columns, short_rows=short_rows, **table):
        with problems.at(location):
            for column, value in values.items():
                if isinstance(value, float) and abs(value) < 2**53 and value.is_integer():
                    values[column] = int(value)
            rows.append(
                (location, tuple(take_text(values, c, may_be_empty=c in may_be_empty) for c in columns))
            )
    problems.report()
    return rows


def read_records(
    path: str | Path,
    problems: Problems,
    columns: Sequence[str] = (),
    *,
    delimiter: str | None = None,
    quoting: Quoting = "minimal",
    header: Sequence[str] = (),
    short_rows: Problems | None = None,
) -> Iterator[Record]:
    """Yields the rows of a .csv, .tsv, .jsonl, .json or .parquet file; JSON and Parquet values keep their types.

    Text files are UTF-8, with or without a byte order mark, LF or CRLF. CSV and TSV have a header and may quote
    fields with `"`, doubled inside. JSON lines hold an object each, a .json file a list of them. Blank lines are
    skipped.

    Args:
      path: the file.
      problems: collects the problems of single rows, which are left out; the caller reports them.
      columns: the columns that a .csv, .tsv or .parquet file must have; of the last no others are read, by default
        all.
      delimiter: of a .csv or .tsv file; by default a comma or a tab.
      quoting: of a .csv or .tsv file: minimal, or none, where `"` is a character like any other.
      header: names of the columns of a .csv or .tsv file that has no header line; a first line that has all
        `columns` is one.
      short_rows: collects the rows of a .csv or .tsv file with too few fields; by default they are problems.

    Yields:
      Each row's location, `file:line`, or `file: item n` in a .json or .parquet file, counted from 1; and its
      values by column.

    Raises:
      ValueError: the file cannot be read, is a .json file that is not a UTF-8 JSON list, or has no rows.
    """
    path = Path(path)
    if (suffix := path.suffix.lower()) not in SUFFIXES:
        raise ValueError(
            f"{path}: unsupported file type {path.suffix or '(no suffix)'}: use {', '.join(SUFFIXES)}"
        )
    check_file(path, links="any")
    short, empty = problems if short_rows is None else short_rows, f"{path}:1: the file is empty"
    try:
        if suffix in TABLE_SUFFIXES:
            delimiter = delimiter or ("\t" if suffix == ".tsv" else ",")
            records = _table_records(path, columns, problems, delimiter, quoting, header, short)
            empty = f"{path}:1: no rows below the header" if path.stat().st_size else empty
        elif suffix == ".parquet":
            records = _parquet_records(path, columns, problems)
        else:
            records = (_json_lines if suffix == ".jsonl" else _json_items)(path, problems)
        is_empty = True
        for record in records:
            is_empty = False
            yield record
    except OSError as error:
        raise ValueError(f"{path}: cannot read the file: {error.strerror or error}") from None
    if is_empty and not problems.count:
        short.report()
        raise ValueError(empty)


def take_text(
    values: Mapping[str, Any], column: str, *, optional: bool = False, may_be_empty: bool = False
) -> str:
    """Returns a column's text; numbers and booleans are written as in JSON.

    With `optional`, a missing, null or blank column gives `""`.
    """
    value = values.get(column)
    if optional and (value is None or value == ""):
        return ""
    if column not in values:
        raise ValueError(f"no column {column!r}{suggest(column, values)}")
    # Parquet has other types than JSON, such as decimals, and numbers that are not finite.
    if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"column {column!r} must be a string or a number, got {as_json(value):.40}")
    text = value if isinstance(value, str) else json.dumps(value)
    if text.strip() or may_be_empty:
        return text
    if optional:
        return ""
    raise ValueError(f"column {column!r} is empty")


def as_json(value: Any) -> str:
    """A value as JSON for messages, whatever its type."""
    return json.dumps(value, default=repr)


def parse_json(text: str) -> Any:
    """Parses a JSON value.

    Raises:
      ValueError: it is invalid or nested too deeply, or has NaN, a number that overflows, an object with a key
        twice or a lone surrogate.
    """

    def finite(word: str) -> float:
        if math.isfinite(value := float(word)):
            return value
        tokens = re.finditer(r'"(?:[^"\\]|\\.)*"|[^\s,:\[\]{}"]+', text)
        position = next(token.start() for token in tokens if token[0] == word)
        raise json.JSONDecodeError(f"{word} is not a finite number, or text without quotes", text, position)

    numbers: dict[str, Any] = {"parse_constant": finite, "parse_float": finite, "parse_int": parse_int}
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, **numbers)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    # Only an escape makes one. Nothing that follows can encode it in UTF-8.
    if re.search(r"\\u[dD][89a-fA-F]", text) and re.search(
        "[\ud800-\udfff]", json.dumps(value, ensure_ascii=False)
    ):
        raise ValueError("a lone surrogate is not a character, and UTF-8 cannot encode it")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        duplicate = repeated(name for name, _ in pairs)[0]
        raise ValueError(f"duplicate key {json.dumps(duplicate):.80} in an object")
    return values


def _lines(path: Path, problems: Problems, newline: str) -> Iterator[str]:
    check_not_utf16(path)
    # Invalid bytes become surrogates, so that each is told with its line.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
        for number, line in enumerate(file, 1):
            if not line.isascii() and (byte := re.search("[\udc80-\udcff]", line)):
                what = f"byte 0x{ord(byte[0]) - 0xDC00:02x} is not UTF-8: save the file as UTF-8"
                problems.add(f"{path}:{number}", what)
                line = line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            yield line


def _table_records(
    path: Path,
    columns: Sequence[str],
    problems: Problems,
    delimiter: str,
    quoting: Quoting,
    header: Sequence[str],
    short_rows: Problems,
) -> Iterator[Record]:
    style = csv.QUOTE_NONE if quoting == "none" else csv.QUOTE_MINIMAL
    # Line ends as they are: a quoted field may hold some.
    lines = _lines(path, problems, newline="")
    rows = _table_rows(path, csv.reader(lines, delimiter=delimiter, strict=True, quoting=style), problems)
    first = next(rows, None)
    if first is None:
        return
    if header and not {*columns} <= {*first[1]}:
        top, rows = f"{path}:1", itertools.chain([first], rows)
    else:
        top, header = first
    faults = [f"column {c!r} appears twice" for c in repeated(header)]
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
    for location, fields in rows if not faults else ():
        if len(fields) == len(header):
            yield location, dict(zip(header, fields, strict=True))
        else:
            hint = f"; {QUOTING_HINT}" if any("\n" in field for field in fields) else ""
            collector = short_rows if len(fields) < len(header) else problems
            collector.add(location, f"{len(fields)} fields, but the header has {len(header)}{hint}")


QUOTING_HINT = "if quotes are part of the text, set data.quoting none"
_DELIMITERS = {";": "semicolon", "\t": "tab", "|": "pipe", ",": "comma"}


def _table_rows(path: Path, reader: Any, problems: Problems) -> Iterator[tuple[str, list[str]]]:
    while True:
        location, limit = f"{path}:{reader.line_num + 1}", csv.field_size_limit(MAX_FIELD_CHARACTERS)
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            too_long = "field larger" in str(error)
            reason = f"a field of more than {MAX_FIELD_CHARACTERS:,} characters" if too_long else error
            problems.add(location, f"malformed row, perhaps a stray quote: {reason}; {QUOTING_HINT}")
            continue
        finally:
            # The limit is global to the process.
            csv.field_size_limit(limit)
        # An empty line; in a table of one column "" is an empty cell.
        if fields and not (len(fields) == 1 and fields[0].isspace()):
            yield location, fields


def _json_lines(path: Path, problems: Problems) -> Iterator[Record]:
    # Not splitlines, which also splits at characters that strings of JSON may hold, such as U+2028.
    for number, line in enumerate(_lines(path, problems, newline="\n"), 1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            problems.add(f"{path}:{number}", f"invalid JSON: {error}")
            continue
        if isinstance(record, dict):
            yield f"{path}:{number}", record
        else:
            problems.add(f"{path}:{number}", f"each line must be a JSON object, got {line.strip():.40}")


def _json_items(path: Path, problems: Problems) -> Iterator[Record]:
    text = "".join(_lines(path, problems, newline="\n"))
    # A list of JSON has items, not lines, so what is wrong with its lines cannot be listed with them.
    problems.report()
    if not text.strip():
        return
    try:
        items = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path}:{getattr(error, 'lineno', 1)}: invalid JSON: {error}") from None
    if not isinstance(items, list):
        raise ValueError(f"{path}: must be a JSON list of objects, got {text.strip():.40}")
    if not items:
        raise ValueError(f"{path}: the list is empty")
    for number, item in enumerate(items, 1):
        if isinstance(item, dict):
            yield f"{path}: item {number}", item
        else:
            problems.add(
                f"{path}: item {number}", f"each item must be a JSON object, got {as_json(item):.40}"
            )


def _parquet_records(path: Path, columns: Sequence[str], problems: Problems) -> Iterator[Record]:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ValueError(
            f"{path}: .parquet files require pyarrow; run pip install 'loraplus_jax[hub]'"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names, number = file.schema_arrow.names, 0
            for column in columns:
                if column not in names:
                    problems.add(f"{path}: item 1", f"no column {column!r}{suggest(column, names)}")
            if not problems.count:
                # Some kB can unpack to gigabytes; a column that repeats a long text does to hundreds of MB.
                limit = 2**29 + MEMORY_PER_BYTE * path.stat().st_size
                arguments = {"path": str(path.resolve()), "columns": list(columns) or None, "limit": limit}
                run_job(f"{path}: cannot read the Parquet file", "try_parquet", files=[path], **arguments)
            for batch in () if problems.count else file.iter_batches(columns=list(columns) or None):
                try:
                    records = batch.to_pylist()
                except (OverflowError, ValueError) as error:  # years that Python has not, invalid UTF-8
                    what = f"cannot read the rows from item {number + 1} on: {error}"
                    raise ValueError(f"{path}: {what}") from None
                for record in records:
                    number += 1
                    yield f"{path}: item {number}", {c: _without_nulls(v) for c, v in record.items()}
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: cannot read the Parquet file: {error}") from None


def _without_nulls(value: Any) -> Any:
    # All rows of a Parquet file have the fields that any row has, which JSON would leave out.
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [*map(_without_nulls, value)] if isinstance(value, list) else value
