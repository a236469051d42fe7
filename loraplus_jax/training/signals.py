"""Signals that stop a run cleanly."""

import os
import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Stopped(Exception):
    """A signal stopped the run, after its state was saved.

    Attributes:
      signal_number: the signal.
    """

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopSignal:
    """While entered, records SIGTERM and SIGINT (Ctrl-C) instead of acting on them; a second one acts as usual.

    With several processes, JAX's preemption service handles a SIGTERM to any of them and chooses a step that all
    reach; SIGINT is forwarded to it as SIGTERM.

    Attributes:
      received: the signal's number, or None.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "StopSignal":
        # Stop waking the listener thread of `loraplus_command`, which could end the process on a recorded signal.
        self._wakeup_fd = signal.set_wakeup_fd(-1)
        handled = self.SIGNALS if jax.process_count() == 1 else (signal.SIGINT,)
        self._previous_handlers = {number: signal.getsignal(number) for number in handled}
        for number in handled:
            signal.signal(number, self._record)
        return self

    def is_due(self, step: int) -> bool:
        """Whether to stop after this step; call it after every step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.received = signal.SIGTERM if self.received is None else self.received
            return True
        return jax.process_count() == 1 and self.received is not None

    def __exit__(self, *_: object) -> None:
        self._restore()
        signal.set_wakeup_fd(self._wakeup_fd, warn_on_full_buffer=False)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def _restore(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
