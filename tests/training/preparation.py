"""Preparation of a run without compiling, and a directory that another process uses."""

import contextlib
import subprocess
import sys

import pytest

from loraplus_jax.training import setup
from loraplus_jax.training.programs import Programs


@contextlib.contextmanager
def without_compiling():
    """Leaves out step and evaluation, which take most of the time of a preparation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "compile_programs", lambda *_, **__: Programs(None, None))
        patch.setattr(setup, "check_memory", lambda *_: None)
        yield


HOLD = """
import filelock, os, pathlib, sys
directory = pathlib.Path(sys.argv[1])
with filelock.FileLock(directory / ".lock"):
    (directory / ".pid").write_text(f"{os.getpid()}\\n")
    print("held", flush=True)
    sys.stdin.read()
"""
"""As `lock_directory` does it, without what that imports."""


@contextlib.contextmanager
def lock_of_another_process(directory):
    """A process that holds the lock until the block ends, when it is killed."""
    command = [sys.executable, "-c", HOLD, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()
