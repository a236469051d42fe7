"""Joins the processes of a run, raises errors on all of them, and checks that they agree.

`jax.distributed` connects the processes and detects lost ones; GSPMD and orbax handle computation and checkpoints.
"""

import contextlib
import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from ..checkpoint import field_differences, join_first
from ..multihost import allgather, is_lost_process
from ..settings.schema import AUTO, DistributedSettings
from .signals import Stopped

ENVIRONMENT_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, ImportError, OSError)
"""What JAX raises if the environment describes the processes wrongly or incompletely."""


class LostProcess(Exception):
    """Another process of the run has exited or is unreachable."""


@contextlib.contextmanager
def join_processes(settings: DistributedSettings) -> Iterator[None]:
    """Connects this process to the others of the run while entered; does nothing for a single process.

    Raises:
      ValueError: the processes cannot connect; the message gives the coordinator and the timeout.
      LostProcess: a computation failed because another process is gone.
    """
    if settings.coordinator is None:
        yield
        return
    if settings.process_id == 0:
        _check_port(settings)
    # On its own timeout, JAX aborts the process with a native stack trace.
    timer = threading.Timer(settings.start_timeout, _abort, [_timeout_message(settings)])
    timer.daemon = True
    timer.start()
    address = {
        "coordinator_address": settings.coordinator,
        "num_processes": settings.processes,
        "process_id": settings.process_id,
    }
    try:
        jax.distributed.initialize(
            **({} if settings.coordinator == AUTO else address),
            initialization_timeout=settings.start_timeout + 60,
            heartbeat_timeout_seconds=settings.lost_timeout,
        )
    except ENVIRONMENT_ERRORS as error:
        raise ValueError(_join_error(settings, error)) from error
    finally:
        timer.cancel()
    _check_devices()
    try:
        yield
    except Stopped:  # all processes stop at the same step
        jax.distributed.shutdown()
        raise
    except Exception as error:
        if not is_lost_process(error):
            raise
        raise LostProcess(
            f"process {jax.process_index()} of {jax.process_count()} lost contact with another process "
            f"({_first_line(error)}); restart all processes to resume from the newest checkpoint"
        ) from error
    jax.distributed.shutdown()


def _check_devices() -> None:
    """Raises ValueError on every process unless all have the same number of devices, as JAX's collectives need."""
    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        jax.distributed.shutdown()
        listed = ", ".join(f"process {number} has {count}" for number, count in sorted(counts.items()))
        raise ValueError(f"all processes must have the same number of devices, but {listed}")


def _abort(message: str) -> None:
    """Exits the process, even while a native call blocks it."""
    sys.stdout.flush()
    os.write(2, f"loraplus: error: {message}\n".encode())
    os._exit(2)


def _check_port(settings: DistributedSettings) -> None:
    """Raises ValueError if process 0 cannot listen on the coordinator's port; JAX itself would crash."""
    port = int(str(settings.coordinator).rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise ValueError(
            f"process 0 of {settings.processes} cannot listen on distributed.coordinator {settings.coordinator} "
            f"({os.strerror(error.errno or 0)}); choose a free port, the same for all processes"
        ) from None


def _timeout_message(settings: DistributedSettings) -> str:
    """The message if the processes do not connect in time."""
    process = f"process {settings.process_id} of {settings.processes}"
    if settings.coordinator == AUTO:
        process = "this process, configured by the environment,"
    return (
        f"{process} could not connect to the others at distributed.coordinator {settings.coordinator} within "
        f"{settings.start_timeout} s (distributed.start_timeout)"
    )


def _join_error(settings: DistributedSettings, error: Exception) -> str:
    reason = _first_line(error)
    if settings.coordinator != AUTO:
        return f"{_timeout_message(settings)}: {reason}"
    if "start RPC server" in reason:
        return (
            f"distributed.coordinator is {AUTO} and this process is the coordinator, but it cannot listen on its "
            f"port ({reason}); set JAX_COORDINATOR_PORT to a free port, the same for all processes"
        )
    return (
        f"distributed.coordinator is {AUTO}, but the environment does not describe the processes completely "
        f"({reason}); set distributed.coordinator, processes and process_id"
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text:.200}" if isinstance(error, LookupError) else f"{text:.200}"


@contextlib.contextmanager
def raise_together() -> Iterator[None]:
    """Runs the block on every process; if it raises on one, every process raises the same error.

    Raises:
      ValueError: the block raised on another process.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    messages = allgather(None if error is None else str(error) or type(error).__name__)
    if any(message is not None for message in messages) and len(messages) > 1:
        jax.distributed.shutdown()  # a clean shutdown, since every process is here
    if error is not None:
        raise error
    for number, message in enumerate(messages):
        if message is not None:
            raise ValueError(f"process {number} of {len(messages)} failed: {message}")


def check_same_everywhere(values: Mapping[str, Any]) -> None:
    """Raises ValueError on every process unless all have the same JSON values; names the differences."""
    lead_values, *others = allgather(dict(values))
    for number, other_values in enumerate(others, 1):
        differences = field_differences(lead_values, other_values, ("in process 0", f"in process {number}"))
        if differences:
            jax.distributed.shutdown()
            raise ValueError(
                f"the processes differ: {join_first(differences)}; start all with the same command "
                "(except distributed.process_id), packages, data and weights"
            )
