"""Output that may become impossible to write, into a closed pipe or on a full disk."""

import contextlib
import errno
import os
import sys
from typing import Any, TextIO


class Output:
    """A text stream that keeps the first error of a write and drops all output after it."""

    # An exception could come from any print, in the middle of a save too. So training checks `stdout_problem` after
    # every step: a broken pipe or a full disk stops it as a signal does.

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        with contextlib.suppress(AttributeError):  # characters that the terminal lacks are escaped
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore
        self.error = None if stream else OSError(errno.EBADF, os.strerror(errno.EBADF))

    def write(self, text: str) -> int:
        """Writes text, unless an earlier write has failed."""
        self._attempt("write", text)
        return len(text)

    def flush(self) -> None:
        """Flushes the stream, unless an earlier write has failed."""
        self._attempt("flush")

    def _attempt(self, method: str, *arguments: str) -> None:
        if self.error is None:
            try:
                getattr(self._stream, method)(*arguments)
            except OSError as error:
                self.error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def stdout_problem() -> str | None:
    """Why stdout cannot be written, as a phrase; None if it can, or if it is no `Output`."""
    error = sys.stdout.error if isinstance(sys.stdout, Output) else None
    return error and f"cannot write to stdout ({error.strerror})"
