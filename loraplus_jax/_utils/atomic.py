"""Files and directories that are written completely and to disk, or not at all; and the JSON in them."""

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: without a lock, what a killed process leaves behind stays
    fcntl = None

PREFIX, STAGING = ".loraplus-", ".partial"
"""How the name of a hidden directory begins and ends that a killed process may leave behind."""
_unfinished: set[Path] = set()
# Held while files are renamed or removed, and from `remove_unfinished` to the end of the process.
_ending = threading.RLock()


@contextlib.contextmanager
def atomic_write(path: Path, *, new: bool = False) -> Iterator[Path]:
    """Yields a path to write a file or directory to, which replaces `path` if the block succeeds.

    With `new`, nothing may be there, and missing parents are made, which a failure removes again. Of several
    processes that write to one new path, only the first to finish succeeds.

    Raises:
      ValueError: `new`, and something is there.
      OSError: it cannot be written.

    Errors of the block that name a file in the hidden directory, which is next to `path`, name `path` instead.
    """

    def check_new() -> None:
        if new and os.path.lexists(path):
            raise ValueError(f"{path} already exists; nothing is overwritten: choose another path")

    check_new()
    with (
        add_path_to_errors(path),
        _new_parents(path) if new else contextlib.nullcontext(),
        temporary_directory(path.parent) as staging,
    ):
        written, old = staging / "new", staging / "replaced" / path.name
        try:
            yield written
        except ValueError as error:  # of a reader, such as of another library
            text = re.sub(rf"{re.escape(str(staging))}(/\w+)?", lambda _: str(path), str(error))
            if text == str(error):
                raise
            raise ValueError(text) from None
        # All of it is flushed before it is renamed, and its directory afterwards: without that, a power loss may
        # leave the new name with no content.
        for part in (written, *written.rglob("*")):
            sync(part)
        with _ending:
            check_new()
            if path.is_dir() and not new:  # a directory cannot be renamed onto another
                old.parent.mkdir()
                os.rename(path, old)
            try:  # neither a link nor the rename of a directory replaces what another process made since the check
                (os.replace if not new else os.rename if written.is_dir() else os.link)(written, path)
            except OSError:
                check_new()
                os.replace(written, path)  # a file system without links
            sync(path.parent)


@contextlib.contextmanager
def _new_parents(path: Path) -> Iterator[None]:
    missing = list(itertools.takewhile(lambda parent: not parent.exists(), path.parents))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # another process may have put something there
            for parent in missing:
                parent.rmdir()
        raise


@contextlib.contextmanager
def temporary_directory(parent: Path | None = None) -> Iterator[Path]:
    """Yields a new hidden directory, which no other process uses, and removes it at the end.

    If a signal ends the process, `remove_unfinished` removes it, and after a SIGKILL `remove_leftovers`, which the
    next call for `parent` begins with, and each command for the system's directory.

    Args:
      parent: where to make it; by default the system's directory for temporary files.
    """
    parent = parent or Path(tempfile.gettempdir())
    remove_leftovers(parent)
    while True:
        staging = Path(tempfile.mkdtemp(prefix=PREFIX, suffix=STAGING, dir=parent))
        try:
            lock, is_ours = _open_lock(staging)
        except FileNotFoundError:
            continue  # another process has taken it for a leftover
        except OSError:
            staging.rmdir()
            raise
        if is_ours is not False and staging.exists():
            break
        os.close(lock)
    _unfinished.add(staging)
    try:
        yield staging
    finally:
        with _ending:
            _unfinished.discard(staging)
            _remove(staging)
        os.close(lock)


def remove_leftovers(parent: Path) -> None:
    """Removes the hidden directories in `parent` of this user's processes that were killed."""
    user = getattr(os, "geteuid", lambda: 0)()
    for leftover in parent.glob(f"{PREFIX}*{STAGING}"):
        with contextlib.suppress(OSError):
            # In a directory that all users share, another one's may be a trap.
            if not stat.S_ISDIR((status := leftover.lstat()).st_mode) or status.st_uid != user:
                continue
            lock, is_ours = _open_lock(leftover)
            if is_ours:
                _remove(leftover)
            os.close(lock)


def remove_unfinished() -> None:
    """Removes the hidden directories of this process; call it only right before the process ends.

    Threads that are writing to one stop at its end: what they write by then fails or is removed.
    """
    _ending.acquire()
    for staging in list(_unfinished):
        with contextlib.suppress(OSError):  # a new name first, under which no thread writes
            _remove(staging.rename(staging.with_name(f"{PREFIX}ended-{staging.name.removeprefix(PREFIX)}")))


def _open_lock(staging: Path) -> tuple[int, bool | None]:
    # The lock's descriptor, and whether it is ours (None: locks are unsupported). The operating system releases a
    # flock even if the process is killed.
    lock = os.open(staging / "lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    if fcntl is None:
        return lock, None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return lock, False
    except OSError:  # a file system without locks
        return lock, None
    return lock, True


def _remove(staging: Path) -> None:
    """Removes a hidden directory, after moving back what it was about to replace."""
    for old in (staging / "replaced").glob("*"):
        if not os.path.lexists(path := staging.parent / old.name):
            os.rename(old, path)
    shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def add_path_to_errors(path: Path) -> Iterator[None]:
    """Adds the path to system errors without a file name, such as a full disk, or with a hidden directory's."""
    try:
        yield
    except OSError as error:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        if error.errno is None or (names and not any(PREFIX in name and STAGING in name for name in names)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


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
