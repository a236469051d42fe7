"""Runs what untrusted files may make hang, crash or grow in a child process of bounded time and memory.

That is templates, tokenizers, regular expressions, and formats that expand: npz, orbax checkpoints and Parquet.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401, since it names dtypes for numpy
import numpy as np

SECONDS = 4
"""CPU time of a job; twice that by the clock."""
FILE_SECONDS, BYTES_PER_SECOND = 20, 2**22
"""CPU time of a job that reads files, and how much of them adds a second."""
MEMORY, MEMORY_PER_BYTE = 64 * 2**20, 32
"""Bytes of memory of a job, and additional ones per byte of its arguments and files: a tokenizer needs up to 26."""

_TIMED_OUT = {-getattr(signal, name, 0) for name in ("SIGALRM", "SIGXCPU")}
_lock = threading.Lock()
_child: subprocess.Popen[bytes] | None = None


def run_job(what: str, job: str, *, files: Sequence[Path] = (), **arguments: Any) -> Any:
    """Runs a function of `untrusted_child`, by its name and JSON arguments, in the child process.

    Args:
      what: what its errors begin with: the file's name.
      job: the function.
      files: the files that it reads, whose sizes raise the limits.
      **arguments: its arguments.

    Returns:
      Its result; of a job that reads arrays, a dict of them by name.

    Raises:
      ValueError: the job fails, exceeds a limit or crashes; one line.
    """
    content = json.dumps(arguments)
    size = sum(file.stat().st_size for file in files)
    seconds = FILE_SECONDS + size // BYTES_PER_SECOND if files else SECONDS
    memory = MEMORY + MEMORY_PER_BYTE * (len(content) + size)
    request = (
        f'{{"job": "{job}", "seconds": {seconds}, "memory": {memory}, "arguments": {content}}}\n'.encode()
    )
    with _lock:
        child = _running_child()
        try:
            try:
                child.stdin.write(request)
                child.stdin.flush()
            except BrokenPipeError:  # something else has killed it since its last job
                child.wait()
                child = _running_child()
                child.stdin.write(request)
                child.stdin.flush()
            answer = child.stdout.readline()
            values = json.loads(answer) if answer else {}
            arrays = {name: _read_array(child, *kind) for name, *kind in values.get("arrays", ())}
        except BaseException:  # an answer that nobody reads would be taken for that of the next job
            child.kill()
            raise
        if not answer:
            timed_out = child.wait() in _TIMED_OUT
            limit = f"{seconds} s" if timed_out else f"{memory // 2**20} MiB of memory or crashes"
            raise ValueError(f"{what}: it needs more than {limit}; use another file")
    if "error" in values:
        raise ValueError(f"{what}: {values['error']}")
    return arrays if "arrays" in values else values["result"]


def _read_array(child: Any, dtype: str, shape: Sequence[int]) -> np.ndarray:
    array = np.empty(shape, dtype)
    if array.nbytes and child.stdout.readinto(array.reshape(-1).view(np.uint8)) < array.nbytes:
        raise ChildProcessError("the child process that reads untrusted files was killed")
    return array


def _running_child() -> Any:
    # One process for all jobs, since Python and its imports take longer to start than a job.
    global _child
    if _child is not None and _child.poll() is None:
        return _child
    _stop_child()
    needed = ("SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
    _child = child = subprocess.Popen[bytes](
        # Without site, which takes time: the parent's path is passed below.
        [sys.executable, "-I", "-S", str(Path(__file__).with_name("untrusted_child.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in needed if name in os.environ}
        # Threads take memory, and a GPU is the parent's.
        | {"RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "JAX_PLATFORMS": "cpu"},
        start_new_session=True,  # Ctrl-C in a terminal is for the parent, whose end closes the pipe
    )
    assert child.stdin is not None
    child.stdin.write(json.dumps([path for path in sys.path if path]).encode() + b"\n")
    return child


@atexit.register
def _stop_child() -> None:
    if _child is not None:
        _child.kill()
        _child.communicate()
