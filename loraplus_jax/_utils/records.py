"""Records: JSON files that a command reads back, with a digest of themselves and of the files next to them.

A writer adds what the result depends on as the field `identity`; a reader compares it with the current base and
data.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .atomic import to_json, write_text
from .json_files import check_file, is_plain_name, read_json

DIGEST, FILES = "digest", "files"
PATHS = (
    *("model.path", "data.path", "data.root", "data.train", "data.validation", "data.test"),
    "init_adapter",
)
"""Settings that a digest leaves out: a base model or data may move, and their identity is compared."""


def record_text(content: Mapping[str, Any], directory: Path, files: Iterable[str] = ()) -> str:
    """The text of a record of JSON values, and of the files in `directory` that belong to it."""
    content = {**content, **({FILES: names} if (names := file_digests(directory, files)) else {})}
    content = json.loads(to_json(content))  # digest what a reader gets: lists for tuples, null for NaN
    return to_json({**content, DIGEST: _digest(content)}, indent=1) + "\n"


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a record of `content` atomically."""
    write_text(path, record_text(content, path.parent))


def read_record(
    path: Path,
    check: Callable[[dict[str, Any]], object] | None = None,
    *,
    limit: int | None = None,
    remedy: str | None = None,
) -> dict[str, Any]:
    """Reads a record; `check_files` compares the files that belong to it.

    Args:
      path: the file.
      check: raises ValueError for the content of another kind of record, before the digest is compared.
      limit: most bytes of the file.
      remedy: what to do if the file cannot be restored; without one, removing the digest accepts a change.

    Raises:
      ValueError: it cannot be read, or has changed since it was saved.
    """
    try:
        content = read_json(path, limit=limit)
        if check is not None:  # may raise an error that says more than that something changed
            check(content)
        expected = _digest(content)
        if content.get(DIGEST, None if remedy else expected) != expected:
            accept = "" if remedy else f"; restore it, or {_accept(path)}"
            raise ValueError(f"{path} has changed since it was saved{accept}")
    except ValueError as error:
        if remedy is None:
            raise
        raise ValueError(f"{error}; restore it, or {remedy}") from None
    return content


def check_files(path: Path, record: Mapping[str, Any]) -> None:
    """Raises ValueError if a file that belongs to the record in `path` is missing or has changed."""
    if DIGEST in record:
        check_digests(path.parent, record.get(FILES, {}), _accept(path))


def file_digests(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """The digest of each file, by name."""
    digests = {}
    for name in names:
        check_file(directory / name)
        with (directory / name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def check_digests(directory: Path, digests: Any, remedy: str) -> None:
    """Raises ValueError, which ends in the remedy, if a file is missing or does not have its digest.

    The digests may be from an untrusted file: unless they map plain names to text, nothing is read.
    """
    if not isinstance(digests, Mapping) or not all(
        is_plain_name(name) and isinstance(digest, str) for name, digest in digests.items()
    ):
        raise ValueError(
            f"{directory}: {FILES} must map plain names of files to digests, got {digests!r:.80}; {remedy}"
        )
    for name, digest in digests.items():
        if file_digests(directory, [name])[name] != digest:
            raise ValueError(f"{directory / name} has changed since it was saved; restore it, or {remedy}")


def _accept(record: Path) -> str:
    return f"remove {DIGEST} from {record} to accept the change"


def _digest(content: Mapping[str, Any]) -> str:
    """A digest of a record without its own, whatever the order of keys."""
    content = {name: value for name, value in content.items() if name != DIGEST}
    if isinstance(settings := content.get("settings"), Mapping):
        content["settings"] = {
            section: {n: v for n, v in value.items() if f"{section}.{n}" not in PATHS}
            if isinstance(value, Mapping)
            else value
            for section, value in settings.items()
            if section not in PATHS
        }
    return hashlib.sha256(to_json(content, sort_keys=True).encode()).hexdigest()
