"""The `loraplus` command: one line on Ctrl-C and SIGTERM from its first moment, which is before JAX is imported."""

import os
import signal
import sys
import threading
import traceback

WORDS = {signal.SIGINT: b"interrupted", signal.SIGTERM: b"stopped by SIGTERM"}
ENDING = threading.Lock()


def run() -> None:
    """Runs the command line and ends the process."""
    listen()
    sys.unraisablehook = _unraisable
    from loraplus_jax.cli import main

    try:
        code = main()
    except Exception:  # a fault of ours: of several processes, Python's own exit would wait for the others
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)  # at once: after a failed save, orbax's threads would keep the process for minutes


def listen() -> None:
    """Ends the process at a signal, unless training has put a handler of its own in the place of ours.

    Python calls handlers between two of its instructions only, and one of them may be a compilation of minutes: so
    a thread is told of signals too.
    """
    for number in WORDS:
        signal.signal(number, _interrupted)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def wait() -> None:
        while told := os.read(reader, 1):
            if signal.getsignal(told[0]) is _interrupted:
                _interrupted(told[0], None)

    threading.Thread(target=wait, daemon=True).start()


def _interrupted(number: int, frame: object) -> None:
    """At once, and by no exception, which may get lost in a callback. Of two threads that come here one says so."""
    if not ENDING.acquire(blocking=False):
        return
    os.write(2, b"loraplus: %s\n" % WORDS[signal.Signals(number)])
    os._exit(128 + number)


def _unraisable(problem: "sys.UnraisableHookArgs") -> None:
    """Quiet about writes of a failed save that outlive their event loop: one line says what failed."""
    if str(problem.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(problem)


if __name__ == "__main__":
    run()
