"""A run among others and against interruptions: whose a directory is, and signals that stop a run cleanly."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import filelock
from rich.console import Console

from ..checkpoint import differences
from .report import SUMMARY, partial_path
from .settings import Settings, read_yaml

CONFIG, LOCK, OWNER = "config.yaml", ".lock", ".pid"


class Stopped(Exception):
    """A signal asked the run to stop, and it has saved what it had.

    Attributes:
      signal_number: which signal.
    """

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


@contextmanager
def only_run(directory: Path) -> Iterator[None]:
    """Holds the directory for this process; the operating system lets go of it when the process ends, however.

    Raises:
      ValueError: another process has a run in it; the message gives its pid.
    """
    lock, owner = filelock.FileLock(directory / LOCK), directory / OWNER
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        pid = owner.read_text(encoding="utf-8").strip() if owner.exists() else "unknown"
        raise ValueError(
            f"a run with pid {pid} is at work in {directory}; wait for it or choose another"
        ) from None
    try:
        owner.write_text(f"{os.getpid()}\n", encoding="utf-8")
        yield
        owner.unlink(missing_ok=True)
    finally:
        lock.release()


def check_directory(directory: Path, settings: Settings, *, fresh: bool) -> None:
    """Raises ValueError unless the run may start or go on in the directory."""
    for parent in (directory, *directory.parents):
        if parent.exists() and not parent.is_dir():
            raise ValueError(f"output_dir {directory}: {parent} is a file")
    names = {path.name for path in directory.iterdir()} if directory.exists() else set()
    if names <= {LOCK, OWNER, partial_path(directory / CONFIG).name}:
        return
    if not (directory / CONFIG).is_file():
        raise ValueError(f"output_dir {directory} holds files that are not a run's; choose another directory")
    if fresh:
        return
    other = "choose another --output_dir, or start over with --fresh (the old run is renamed, not deleted)"
    old, new = read_yaml(directory / CONFIG), settings.to_json()
    if not isinstance(old, dict):
        raise ValueError(f"{directory / CONFIG} holds no settings; {other}")
    if found := differences({**old, "output_dir": None}, {**new, "output_dir": None}):
        found = [text.replace("the checkpoint", "that run") for text in found]
        raise ValueError(
            f"output_dir {directory} holds a run with other settings: {'; '.join(found)}; {other}"
        )
    if (directory / SUMMARY).exists():
        raise ValueError(f"the run in {directory} is finished, its results are in {SUMMARY}; {other}")


def set_aside(directory: Path, console: Console) -> None:
    """Renames an older run, unless it is at work, to the first free `DIRECTORY.N`."""
    if (directory / CONFIG).exists():
        number = next(n for n in range(1, 10**6) if not directory.with_name(f"{directory.name}.{n}").exists())
        with only_run(directory):
            old = directory.rename(directory.with_name(f"{directory.name}.{number}"))
        console.print(f"the older run is now {old}")


class StopSignal:
    """While entered, SIGTERM and SIGINT (Ctrl-C) only leave a note; a second one acts as it always does.

    Attributes:
      received: the signal's number, or None.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.getsignal(number) for number in self.SIGNALS}
        for number in self.SIGNALS:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
