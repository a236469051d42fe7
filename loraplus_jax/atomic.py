"""Files and directories that are written completely and to disk, or not at all; and the JSON in them."""

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

STAGING = ".partial"
"""End of the name of a hidden directory that a killed process may leave behind."""


@contextlib.contextmanager
def atomic_write(path: Path, *, new: bool = False) -> Iterator[Path]:
    """Yields a path to write a file or directory to, which replaces `path` if the block succeeds.

    All of it is flushed to disk before it is renamed, and the directory that holds it afterwards: a power loss
    leaves the old content or the new, never an empty file.

    Args:
      path: a file or directory, in a directory that exists.
      new: whether to raise instead of replacing.

    Raises:
      ValueError: `new`, and something is there.
    """
    _check_new(path, new)
    # In a directory of its own: another process that writes to the same path cannot interfere.
    try:
        staging = Path(tempfile.mkdtemp(prefix=".", suffix=STAGING, dir=path.parent))
    except OSError as error:  # with the name that the caller knows
        raise OSError(error.errno, error.strerror, str(path)) from None
    written, old = staging / "new", staging / "old"
    try:
        yield written
        for part in (written, *written.rglob("*")):
            sync(part)
        _check_new(path, new)
        if path.is_dir():
            os.rename(path, old)  # a directory cannot be renamed onto another
        os.replace(written, path)
        sync(path.parent)
    finally:
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(staging, ignore_errors=True)


def _check_new(path: Path, new: bool) -> None:
    if new and os.path.lexists(path):
        raise ValueError(f"{path} already exists; nothing is overwritten: choose another path")


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, *, new: bool = False) -> None:
    """Writes a file as `atomic_write` does."""
    with atomic_write(path, new=new) as written:
        written.write_text(text, encoding="utf-8")


def to_json(value: Any, **options: Any) -> str:
    """JSON text in which NaN and infinities, which JSON does not have, are null.

    >>> to_json({"loss": math.nan, "steps": (1, math.inf)})
    '{"loss": null, "steps": [1, null]}'
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value
