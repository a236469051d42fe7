"""The devices and the processes of a run: what is set, how processes join, and what one does for all.

JAX's own runtime does the work: `jax.distributed` joins the processes and notices when one is lost, GSPMD and orbax
do the rest.
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

from ..checkpoint import field_differences
from ..multihost import allgather, is_lost_process
from ..settings.schema import AUTO, DistributedSettings
from .signals import Stopped

ENVIRONMENT_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, ImportError, OSError)
"""What JAX raises where the environment tells of the processes wrongly or in part."""


class LostProcess(Exception):
    """Another process of the run has ended, or cannot be reached any more."""


@contextlib.contextmanager
def join_processes(settings: DistributedSettings) -> Iterator[None]:
    """One of the run's processes, if there are several.

    Raises:
      ValueError: the others cannot be joined; the message says where they were sought and how long.
      LostProcess: a computation failed because another process ended.
    """
    if settings.coordinator is None:
        yield
        return
    if settings.process_id == 0:
        _check_port(settings)
    # When its own time is over JAX aborts the process with a stack of native code.
    watch = threading.Timer(settings.start_timeout, _abort, [_timeout_message(settings)])
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            **_address(settings),
            initialization_timeout=settings.start_timeout + 60,
            heartbeat_timeout_seconds=settings.lost_timeout,
        )
    except ENVIRONMENT_ERRORS as error:
        raise ValueError(_join_error(settings, error)) from error
    finally:
        watch.cancel()
    _check_devices()
    try:
        yield
    except Stopped:  # by all of them, at the same step
        jax.distributed.shutdown()
        raise
    except Exception as error:
        if not is_lost_process(error):
            raise
        raise LostProcess(
            f"process {jax.process_index()} of {jax.process_count()} ends, because it cannot reach another one "
            f"any more ({_first_line(error)}); start all of them again, and the run goes on from its "
            "newest checkpoint"
        ) from error
    jax.distributed.shutdown()


def _check_devices() -> None:
    """Raises ValueError, in all processes, unless all have as many devices, as JAX's exchange needs."""
    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        jax.distributed.shutdown()
        found = ", ".join(f"process {number} has {count}" for number, count in sorted(counts.items()))
        raise ValueError(f"all processes must have as many devices; {found}")


def _address(settings: DistributedSettings) -> dict[str, Any]:
    if settings.coordinator == AUTO:
        return {}
    return {
        "coordinator_address": settings.coordinator,
        "num_processes": settings.processes,
        "process_id": settings.process_id,
    }


def _abort(message: str) -> None:
    """Ends the process, which a native call may hold."""
    sys.stdout.flush()
    os.write(2, f"loraplus: error: {message}\n".encode())
    os._exit(2)


def _check_port(settings: DistributedSettings) -> None:
    """Raises ValueError if process 0 cannot listen where the others seek it, of which JAX would die."""
    port = int(str(settings.coordinator).rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise ValueError(
            f"process 0 of {settings.processes} cannot listen at distributed.coordinator {settings.coordinator} "
            f"({os.strerror(error.errno or 0)}); give a free port, the same to all"
        ) from None


def _timeout_message(settings: DistributedSettings) -> str:
    """What is said when nobody has come in time."""
    who = f"process {settings.process_id} of {settings.processes}"
    if settings.coordinator == AUTO:
        who = "this process, which the environment has placed,"
    where = f"distributed.coordinator {settings.coordinator}"
    return f"{who} found no others at {where} in {settings.start_timeout} s (distributed.start_timeout)"


def _join_error(settings: DistributedSettings, error: Exception) -> str:
    reason = _first_line(error)
    if settings.coordinator != AUTO:
        return f"{_timeout_message(settings)}: {reason}"
    if "start RPC server" in reason:
        return (
            f"distributed.coordinator is {AUTO}, and this process, which the environment makes the coordinator, "
            f"cannot listen at its port ({reason}); set JAX_COORDINATOR_PORT to a free one, the same for all"
        )
    return (
        f"distributed.coordinator is {AUTO}, and what the environment tells of the processes does not suffice "
        f"({reason}); give distributed.coordinator, processes and process_id"
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text:.200}" if isinstance(error, LookupError) else f"{text:.200}"


@contextlib.contextmanager
def raise_together() -> Iterator[None]:
    """What every process does for itself and none may go on from alone: what one refuses, all refuse, in its words.

    Raises:
      ValueError: another process has refused.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    said = allgather(None if error is None else str(error) or type(error).__name__)
    if any(words is not None for words in said) and len(said) > 1:
        jax.distributed.shutdown()  # in order, for all are here
    if error is not None:
        raise error
    for number, words in enumerate(said):
        if words is not None:
            raise ValueError(f"process {number} of {len(said)} refuses the run: {words}")


def check_same_everywhere(values: Mapping[str, Any]) -> None:
    """Raises ValueError, in all processes, unless all of them have the same JSON values; names what differs."""
    first, *others = allgather(dict(values))
    for number, other in enumerate(others, 1):
        if found := field_differences(first, other, ("in process 0", f"in process {number}")):
            jax.distributed.shutdown()
            more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
            raise ValueError(
                f"the processes are not alike: {'; '.join(found[:5])}{more}; start each with the same "
                "command (but for distributed.process_id), packages, data and weights"
            )
