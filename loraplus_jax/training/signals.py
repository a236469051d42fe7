"""Signals that stop a run cleanly."""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

import jax
from jax.experimental import multihost_utils

from .._utils.output import stdout_problem

GRACE_SECONDS = 5
"""How long after the first signal further ones are ignored: they must not interrupt the save that it began."""


class Stopped(Exception):
    """A signal stopped the run, after its state was saved.

    Attributes:
      signal_number: the signal.
    """

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopSignal:
    """While entered, records SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a closed terminal) instead of acting on them.

    Schedulers and impatient users send more than one: within `GRACE_SECONDS` of the first, further signals change
    nothing; a later one acts as usual. A stdout that can no longer be written counts as SIGPIPE.

    Signals act as before outside the main thread, which alone may set handlers, and where a handler was set in C,
    which Python could not set again.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._wakeup_fd: int | None = None

    def __enter__(self) -> "StopSignal":
        self._previous_handlers = {}
        if threading.current_thread() is not threading.main_thread():
            return self
        # Stop waking the listener thread of `cli.__main__`, which could end the process on a recorded signal.
        self._wakeup_fd = signal.set_wakeup_fd(-1)
        # Of several processes, JAX's preemption service handles a SIGTERM to any and chooses a step that all reach.
        # Its handler must stay in place, and gets the other signals as SIGTERM.
        handled = {signal.SIGINT, *((signal.SIGTERM,) if jax.process_count() == 1 else ())}
        # Windows has no SIGHUP, and nohup ignores it.
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            handled.add(signal.SIGHUP)
        known = {number: signal.getsignal(number) for number in handled}  # None of one that was set in C
        self._previous_handlers = {
            number: handler for number, handler in known.items() if handler is not None
        }
        for number in self._previous_handlers:
            signal.signal(number, self._record)
        return self

    @property
    def received(self) -> int | None:
        """The first signal's number, or None."""
        if self._received is None and stdout_problem() is not None:
            self._record(signal.SIGPIPE, None)
        return self._received

    def check(self, message: str, save: Callable[[], object] = lambda: None) -> None:
        """Raises Stopped after a signal, once `save` has returned; the message gets what to do."""
        if (number := self.received) is not None:
            save()
            raise Stopped(number, f"{message}; rerun the same command to resume")

    def is_due(self, step: int) -> bool:
        """Whether to stop after this step; call it after every step."""
        received = self.received
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self._received = signal.SIGTERM if received is None else received
            return True
        return jax.process_count() == 1 and received is not None

    def __exit__(self, *_: object) -> None:
        self._restore()
        if self._wakeup_fd is not None:
            signal.set_wakeup_fd(self._wakeup_fd, warn_on_full_buffer=False)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received, self._time = number, time.monotonic()
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)
        elif time.monotonic() - self._time > GRACE_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
