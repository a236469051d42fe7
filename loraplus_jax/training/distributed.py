"""Joins the processes of a run, raises errors on all of them, and checks that they agree.

`jax.distributed` connects the processes and detects lost ones; GSPMD and orbax handle computation and checkpoints.
"""

import contextlib
import errno
import glob
import ipaddress
import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from .._utils.multihost import allgather, is_lost_process
from .._utils.validation import join_first
from ..settings.schema import AUTO, DistributedSettings
from ..step.run_metadata import field_differences
from .signals import Stopped

ENVIRONMENT_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, ImportError, OSError)
"""What JAX raises if the environment describes the processes wrongly or incompletely."""

GPU_FILES = "/dev/nvidia[0-9]*"
"""The device files of a host's NVIDIA GPUs, also of those that CUDA_VISIBLE_DEVICES hides."""


class LostProcess(Exception):
    """Another process of the run has exited or is unreachable."""


@contextlib.contextmanager
def join_processes(settings: DistributedSettings) -> Iterator[None]:
    """Connects this process to the others of the run while entered; does nothing for a single process."""
    if settings.coordinator is None:
        yield
        return
    is_auto = settings.coordinator == AUTO
    bind_address = _bind_address(settings) if settings.process_id == 0 else None
    process = f"process {settings.process_id} of {settings.processes}"
    late = (
        f"{'this process, configured by the environment,' if is_auto else process} could not connect to the "
        f"others at distributed.coordinator {settings.coordinator} within {settings.start_timeout} s "
        "(distributed.start_timeout)"
    )

    def abort() -> None:
        # An exception would not interrupt the native call in which the main thread waits.
        sys.stdout.flush()
        os.write(2, f"loraplus: error: {late}\n".encode())
        os._exit(2)

    # On its own timeout, JAX aborts the process with a native stack trace.
    timer = threading.Timer(settings.start_timeout, abort)
    timer.daemon = True
    timer.start()
    address = {
        "coordinator_address": settings.coordinator,
        "num_processes": settings.processes,
        "process_id": settings.process_id,
    }
    try:
        jax.distributed.initialize(
            **({} if is_auto else address),
            initialization_timeout=settings.start_timeout + 60,
            heartbeat_timeout_seconds=settings.lost_timeout,
            coordinator_bind_address=bind_address,
        )
    except ENVIRONMENT_ERRORS as error:
        reason = _first_line(error)
        if not is_auto:
            raise ValueError(f"{late}: {reason}") from error
        if "start RPC server" in reason:
            raise ValueError(
                f"distributed.coordinator is {AUTO} and this process is the coordinator, but it cannot listen on "
                f"its port ({reason}); set JAX_COORDINATOR_PORT to a free port, the same for all processes"
            ) from error
        raise ValueError(
            f"distributed.coordinator is {AUTO}, but the environment does not describe the processes completely "
            f"({reason}); set distributed.coordinator, processes and process_id"
        ) from error
    finally:
        timer.cancel()
    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:  # JAX's collectives would hang or fail
        jax.distributed.shutdown()
        listed = ", ".join(f"process {number} has {count}" for number, count in sorted(counts.items()))
        raise ValueError(f"all processes must have the same number of devices, but {listed}")
    try:
        yield
    except Stopped:
        # All processes stop at the same step. After any other error the rest may be inside a collective, for which
        # a shutdown would wait.
        jax.distributed.shutdown()
        raise
    except Exception as error:
        if not is_lost_process(error):
            raise
        raise LostProcess(
            f"process {jax.process_index()} of {jax.process_count()} lost contact with another process "
            f"({_first_line(error)}); restart all processes; training resumes from its newest checkpoint"
        ) from error
    jax.distributed.shutdown()


def idle_gpus() -> list[str]:
    """A line for the header if the processes see fewer GPUs than their hosts have; every process must call it."""
    # Under SLURM and Open MPI, JAX gives each process one GPU, so with one process per host the others stay idle.
    allocated = os.environ.get("SLURM_GPUS_ON_NODE", "")
    available = int(allocated) if allocated.isdigit() else len(glob.glob(GPU_FILES))
    visible = sum(device.platform == "gpu" for device in jax.local_devices())
    used, total = Counter(), Counter()
    for host, process_visible, host_available in allgather([socket.gethostname(), visible, available]):
        used[host] += process_visible
        total[host] = max(total[host], host_available)
    idle = [f"{host} {used[host]} of {total[host]}" for host in total if used[host] < total[host]]
    if not idle:
        return []
    return [
        f"using {used.total()} of {total.total()} GPUs ({join_first(idle)}); to use all, start one process per GPU "
        "or set JAX_LOCAL_DEVICE_IDS (docs/pods.md)"
    ]


def _bind_address(settings: DistributedSettings) -> str | None:
    """Where the coordinator listens: at the address of `distributed.coordinator`; None for all interfaces.

    All interfaces if that is no address of this host, which then is translated on the way (NAT), or if a hosts file
    maps the host's own name to loopback, where no other host could connect. JAX_COORDINATOR_BIND_ADDRESS overrides.
    """
    if override := os.environ.get("JAX_COORDINATOR_BIND_ADDRESS"):
        return override
    host, _, port = str(settings.coordinator).rpartition(":")
    host = host.strip("[]")
    own = []
    # JAX would share the port with another run's coordinator (SO_REUSEPORT), join that run and end it. So listen at
    # every address once without that option: a taken port raises.
    try:
        for family, _, _, _, target in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            try:
                socket.create_server(target, family=family).close()
                own.append(target[0])
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # another host's address
                    raise
        if any(host in ("localhost", ip) or not ipaddress.ip_address(ip).is_loopback for ip in own):
            return settings.coordinator
        socket.create_server(("", int(port))).close()
    except OSError as error:
        raise ValueError(
            f"process 0 of {settings.processes} cannot listen on distributed.coordinator {settings.coordinator} "
            f"({str(error.strerror).partition(' (')[0]}); choose a host name or address of process 0 and a free "
            "port, the same for all processes"
        ) from None
    return None


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text:.200}" if isinstance(error, LookupError) else f"{text:.200}"


@contextlib.contextmanager
def raise_together() -> Iterator[None]:
    """Runs the block on every process; if it raises on one, every process raises the same error."""
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    messages = allgather(None if error is None else str(error) or type(error).__name__)
    failed = [number for number, message in enumerate(messages) if message is not None]
    if failed and len(messages) > 1:
        jax.distributed.shutdown()  # a clean shutdown, since every process is here
    if error is not None:
        raise error
    if failed:
        raise ValueError(f"process {failed[0]} of {len(messages)} failed: {messages[failed[0]]}")


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
