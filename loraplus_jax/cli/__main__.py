"""The `loraplus` command; handles Ctrl-C, SIGTERM and SIGHUP from the start, before JAX is imported."""

import contextlib
import os
import signal
import sys
import threading
import traceback

WORDS = {signal.SIGINT: b"interrupted", signal.SIGTERM: b"stopped by SIGTERM"}
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
    WORDS[signal.SIGHUP] = b"stopped by SIGHUP"
ENDING = threading.Lock()


def run() -> None:
    """Runs the command line and ends the process."""
    # Otherwise the first files of a run would take the place of a closed stdin, stdout or stderr.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    listen()
    from .commands import TRACEBACK, main

    show = bool(os.environ.get(TRACEBACK))
    if not show:
        # What fails in a thread or a destructor of a library, the library raises again where it matters.
        sys.unraisablehook = threading.excepthook = lambda problem: None
    try:
        code = main()
    except Exception as error:  # a bug; a normal exit would wait for the other processes of the run
        line = f"{type(error).__name__}: {error}".partition("\n")[0][:2000]
        text = (
            traceback.format_exc()
            if show
            else f"loraplus: internal error: {line}; set {TRACEBACK}=1 to see where\n"
        )
        with contextlib.suppress(OSError):
            os.write(2, text.encode(errors="replace"))
        code = 1
    if code:
        os._exit(code)  # after a failed save, orbax's threads would delay a normal exit by minutes


def listen() -> None:
    """Ends the process on a signal of `WORDS`, unless training has installed its own handler."""
    # Python runs handlers only between bytecode instructions, and one of those may compile for minutes. So a thread
    # listens for signals too.
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
    # Not by an exception, which could get lost in a callback. Of two threads only the first ends the process.
    if not ENDING.acquire(blocking=False):
        return
    with contextlib.suppress(OSError):  # a closed stderr
        os.write(2, b"loraplus: %s\n" % WORDS[signal.Signals(number)])
    try:
        atomic = sys.modules.get("loraplus_jax._utils.atomic")  # without it, nothing is half written
        getattr(atomic, "remove_unfinished", lambda: None)()
    finally:
        os._exit(128 + number)


if __name__ == "__main__":
    run()
