"""Reads untrusted files: only regular files, and JSON with limits on size and depth."""

import codecs
import json
import math
import os
import re
import stat
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

Links = Literal["none", "inside", "any"]
"""Which symbolic links count as a file: none, those that `check_link` allows, or any, where users name the path."""


def check_file(path: Path, *, links: Links = "inside", limit: float = math.inf) -> None:
    """Raises ValueError unless a path is a regular file of at most `limit` bytes, or one of the `links` to one."""
    # Opening a FIFO can block forever, a device may not end, and writing to a link changes its target.
    try:
        status = path.stat(follow_symlinks=links != "none")
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise ValueError(f"{path} {reason}") from None
    if (kind := stat.S_IFMT(status.st_mode)) != stat.S_IFREG:
        kinds = {stat.S_IFDIR: "directory", stat.S_IFIFO: "FIFO", stat.S_IFLNK: "symbolic link"}
        raise ValueError(f"{path} is a {kinds.get(kind, 'device or socket')}: use a regular file")
    if links == "inside":
        check_link(path)
    if status.st_size > limit:
        raise ValueError(f"{path} is too large: {status.st_size} bytes, the limit is {limit}")


def check_link(path: Path) -> None:
    """Raises ValueError if a path is a symbolic link out of its directory: its author may not see what is there.

    The files of a snapshot in the Hub's cache are links to the blobs of their repository.
    """
    if not path.is_symlink():
        return
    directory, target = path.parent.resolve(), path.resolve()
    blobs = [parent.parent / "blobs" for parent in directory.parents if parent.name == "snapshots"]
    if not any(target.is_relative_to(root) for root in (directory, *blobs)):
        raise ValueError(
            f"{path} is a symbolic link to {os.readlink(path)}, outside its directory; if you trust it, put a copy "
            "in its place"
        )


def is_plain_name(name: Any) -> bool:
    """Whether a value from a file can only name something in the file's own directory."""
    # By Windows' rules, which also split at a backslash and after a drive.
    is_part = isinstance(name, str) and PureWindowsPath(name).name == name
    return is_part and name.isprintable() and name not in ("", "..")


def check_directory_files(directory: Path) -> None:
    """Raises ValueError unless all files in a directory are regular, for a library that opens them itself."""
    for path in directory.rglob("*"):
        (check_link if path.is_dir() else check_file)(path)


def check_not_utf16(path: Path) -> None:
    """Raises ValueError if a text file begins with the byte order mark of UTF-16, as some editors write it."""
    with path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError(f"{path} is UTF-16: save it as UTF-8")


def read_text(
    path: Path, encoding: str = "utf-8", *, links: Links = "inside", limit: int | None = None
) -> str:
    """The text of an untrusted file of at most `limit` bytes, by default `MAX_LIST_BYTES`.

    Raises:
      ValueError: `check_file` rejects it, or it is not UTF-8.
    """
    check_file(path, links=links, limit=limit or MAX_LIST_BYTES)
    try:
        return path.read_text(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def read_json(path: Path, *, limit: int | None = None, links: Links = "inside") -> dict[str, Any]:
    """Reads a JSON object from an untrusted file of at most `limit` bytes, by default `MAX_JSON_BYTES`.

    Raises:
      ValueError: the file is missing, too large, not a JSON object, too deeply nested, or contains invalid text.
    """
    check_file(path, links=links, limit=limit or MAX_JSON_BYTES)
    data = path.read_bytes()
    if (values := sum(map(data.count, (b",", b"[", b"{")))) > MAX_VALUES:
        raise ValueError(f"{path} is too large: about {values:,} values, the limit is {MAX_VALUES:,}")
    try:
        content = json.loads(data.decode("utf-8"), parse_int=parse_int)
    except (ValueError, RecursionError) as error:  # ValueError for invalid JSON and for invalid UTF-8
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must contain a JSON object, got {type(content).__name__}")
    if problem := find_problem(content):
        raise ValueError(f"{path} {problem}")
    return content


def parse_int(digits: str) -> int:
    """Parses an integer of a file, or raises ValueError if it has more than `MAX_DIGITS` digits."""
    if len(digits) > MAX_DIGITS:
        raise ValueError(
            f"{digits[:20]}... has {len(digits):,} digits; an integer may have at most {MAX_DIGITS:,}"
        )
    return int(digits)


# Python's own limit.
MAX_DIGITS = 4_300
# Python needs up to 40 times a JSON file's size in memory, and recursion over it fails at about 1,000 levels.
MAX_JSON_BYTES, MAX_DEPTH = 2**20, 100
MAX_LIST_BYTES = 2**24
"""Of files that list a model's tensors or tokens, and of texts."""
MAX_TOKENIZER_BYTES = 2**26
"""Of a tokenizer.json: one of a million tokens has 60 MiB."""
MAX_ROWS_BYTES, MAX_VALUES = 2**28, 2**23
"""Of a run's own rows: bytes, and values, of which one takes up to 100 bytes in memory."""


def find_problem(tree: Any) -> str | None:
    """Describes what makes a value from JSON or YAML unsafe to traverse or print; None if it is safe."""
    level = [tree]
    for _ in range(MAX_DEPTH):
        if any(isinstance(node, str) and re.search("[\ud800-\udfff]", node) for node in level):
            return "contains half a surrogate pair, which is not a character"
        dicts = (part for node in level if isinstance(node, dict) for part in (*node.keys(), *node.values()))
        level = [*dicts, *(part for node in level if isinstance(node, list) for part in node)]
        if not level:
            return None
    return f"is nested more than {MAX_DEPTH} levels deep"
