"""The `loraplus` command: quiet on Ctrl-C from its first moment, which is before JAX is imported."""

import os
import signal
import sys


def run() -> None:
    """Runs the command line and ends the process."""
    signal.signal(signal.SIGINT, _interrupted)
    sys.unraisablehook = _unraisable
    from loraplus_jax.train.cli import main

    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)  # at once: after a failed save, orbax's threads would keep the process for minutes


def _interrupted(number: int, frame: object) -> None:
    """At once, and by no exception, which may get lost in a callback. Training has a handler of its own."""
    os.write(2, b"loraplus: interrupted\n")
    os._exit(128 + number)


def _unraisable(problem: "sys.UnraisableHookArgs") -> None:
    """Quiet about writes of a failed save that outlive their event loop: one line says what failed."""
    if str(problem.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(problem)


if __name__ == "__main__":
    run()
