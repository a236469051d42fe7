"""The `loraplus` command; handles Ctrl-C and SIGTERM from the start, before JAX is imported."""

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
    sys.unraisablehook = _print_unraisable
    from loraplus_jax.cli import main

    try:
        code = main()
    except Exception:  # a bug; a normal exit would wait for the other processes of the run
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)  # after a failed save, orbax's threads would delay a normal exit by minutes


def listen() -> None:
    """Ends the process on SIGINT or SIGTERM, unless training has installed its own handler.

    Python runs handlers only between bytecode instructions, and one of those may compile for minutes. So a thread
    listens for signals too.
    """
    for number in WORDS:
        signal.signal(number, _exit_on_signal)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def wait() -> None:
        while received := os.read(reader, 1):
            if signal.getsignal(received[0]) is _exit_on_signal:
                _exit_on_signal(received[0], None)

    threading.Thread(target=wait, daemon=True).start()


def _exit_on_signal(number: int, frame: object) -> None:
    """Exits immediately; an exception could get lost in a callback. Only the first of two threads prints."""
    if not ENDING.acquire(blocking=False):
        return
    os.write(2, b"loraplus: %s\n" % WORDS[signal.Signals(number)])
    os._exit(128 + number)


def _print_unraisable(problem: "sys.UnraisableHookArgs") -> None:
    """Hides writes of a failed save that outlive their event loop; the save itself reports its error."""
    if str(problem.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(problem)


if __name__ == "__main__":
    run()
