"""Signals that stop a run cleanly."""

import os
import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Stopped(Exception):
    """A signal asked the run to stop, and it has saved what it had.

    Attributes:
      signal_number: which signal.
    """

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopSignal:
    """While entered, SIGTERM and SIGINT (Ctrl-C) only leave a note; a second one acts as it always does.

    Where several processes train, JAX's preemption service has SIGTERM, of whichever process, and chooses a step
    that all of them reach; SIGINT is handed on to it.

    Attributes:
      received: the signal's number, or None.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "StopSignal":
        # Nor is any other thread told: it would take a signal that is noted here for one that ends the process.
        self._told = signal.set_wakeup_fd(-1)
        ours = self.SIGNALS if jax.process_count() == 1 else (signal.SIGINT,)
        self._before = {number: signal.getsignal(number) for number in ours}
        for number in ours:
            signal.signal(number, self._note)
        return self

    def is_due(self, step: int) -> bool:
        """Whether to stop after a step, which is to be asked after every one."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.received = signal.SIGTERM if self.received is None else self.received
            return True
        return jax.process_count() == 1 and self.received is not None

    def __exit__(self, *_: object) -> None:
        self._restore()
        signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
