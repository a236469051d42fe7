"""Runs untrusted templates, tokenizers and regular expressions in a child process of bounded time and memory."""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

SECONDS = 4
"""CPU time of a job; twice that by the clock."""
MEMORY, MEMORY_PER_BYTE = 64 * 2**20, 32
"""Bytes of memory of a job, and additional ones per byte of its arguments: a tokenizer needs up to 26."""

_TIMED_OUT = {-getattr(signal, name, 0) for name in ("SIGALRM", "SIGXCPU")}
_lock = threading.Lock()
_child: subprocess.Popen[bytes] | None = None


def run_job(what: str, job: str, **arguments: Any) -> Any:
    """Runs a function of `untrusted_child`, by its name and JSON arguments, in the child process.

    Raises:
      ValueError: the job fails, exceeds a limit or crashes; one line that begins with `what`, the file's name.
    """
    content = json.dumps(arguments)
    memory = MEMORY + MEMORY_PER_BYTE * len(content)
    request = (
        f'{{"job": "{job}", "seconds": {SECONDS}, "memory": {memory}, "arguments": {content}}}\n'.encode()
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
        except BaseException:  # an answer that nobody reads would be taken for that of the next job
            child.kill()
            raise
        if not answer:
            timed_out = child.wait() in _TIMED_OUT
            limit = f"{SECONDS} s" if timed_out else f"{memory // 2**20} MiB of memory or crashes"
            raise ValueError(f"{what}: it needs more than {limit}; use another file")
    values = json.loads(answer)
    if "error" in values:
        raise ValueError(f"{what}: {values['error']}")
    return values["result"]


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
        env={name: os.environ[name] for name in needed if name in os.environ} | {"RAYON_NUM_THREADS": "1"},
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
