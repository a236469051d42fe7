"""Reads untrusted files: only regular ones, and JSON within bounds of size and depth."""

import json
import re
import stat
from pathlib import Path
from typing import Any


def check_file(path: Path) -> None:
    """Raises ValueError unless a path is a regular file: opening a FIFO can block forever, a device may not end."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise ValueError(f"{path} {reason}") from None
    if kind != stat.S_IFREG:
        kinds = {stat.S_IFDIR: "directory", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
        raise ValueError(f"{path} is a {kinds.get(kind, 'device')}: use a regular file")


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """The text of an untrusted file; a ValueError if it is no regular file or not UTF-8."""
    check_file(path)
    try:
        return path.read_text(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from an untrusted file.

    Raises:
      ValueError: the file is missing, oversized, no JSON object, nested too deeply, or holds unprintable text.
    """
    check_file(path)
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size} bytes, at most {MAX_JSON_BYTES} are read")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 alike
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    if problem := find_problem(content):
        raise ValueError(f"{path} {problem}")
    return content


MAX_JSON_BYTES, MAX_DEPTH = 2**20, 100
"""Bytes and levels. Python needs up to 40 times the bytes of a JSON file."""


def find_problem(tree: Any) -> str | None:
    """What makes a value from JSON or YAML unsafe to walk through or to print, if anything does."""
    level = [tree]
    for _ in range(MAX_DEPTH):
        if any(isinstance(node, str) and re.search("[\ud800-\udfff]", node) for node in level):
            return "holds half a surrogate pair, which is no character"
        level = [part for node in level for part in _parts(node)]
        if not level:
            return None
    return f"is nested more than {MAX_DEPTH} deep"


def _parts(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return [*node.keys(), *node.values()]
    return node if isinstance(node, list) else []
