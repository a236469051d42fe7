"""A run among others and against interruptions: one process a directory, and signals that stop it cleanly."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import filelock

LOCK, OWNER = ".lock", ".pid"


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
