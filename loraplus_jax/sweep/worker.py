"""What a worker of another process, on any host, does with a unit: prepare, compare with the driver, run."""

import contextlib
import functools
import io
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from .._utils.atomic import to_json
from .._utils.field_types import check_schema
from .._utils.json_files import MAX_ROWS_BYTES
from .._utils.records import DIGEST, read_record, write_record
from .._utils.validation import join_first
from ..settings.parsing import settings_from_json
from ..step.run_metadata import field_differences, numeric_options, package_versions, version_of
from ..training.console import LineConsole
from ..training.run_files import OWNER
from ..training.signals import Stopped
from ..training.xla import check_options, use_compilation_cache
from .population import Population, abstract_population, prepare_population
from .settings import SweepRun
from .unit import Progress, Row, Unit, run_unit, unit_directory

PROGRESS = "progress.json"
SECONDS_PER_REPORT = 1.0
INPUT_ERRORS = (ValueError, TypeError, OSError, ImportError)
"""Errors of a user's files, settings or hosts, which are a line; any other is a bug."""


class Job(NamedTuple):
    """What the units of a sweep share.

    Attributes:
      settings: class and values of the sweep's settings.
      directory: its output directory.
      working_directory: that of the driver, from which relative paths start.
      owner: the text by which a worker recognizes the driver's directory; None before the driver has written it.
      source: base, identity and `packages` of the driver.
      members_at_once: members that a device computes in parallel; None measures it.
      group_size: most members of a unit.
      cores: CPU cores to compute on, each a device with a thread of its own; None on other devices.
    """

    settings: tuple[type[SweepRun], dict[str, Any]]
    directory: Path
    working_directory: Path
    owner: str | None
    source: Mapping[str, Any]
    members_at_once: int | None
    group_size: int
    cores: int | None


def packages() -> dict[str, Any]:
    """What the results depend on beside settings and files: versions of packages, and JAX's numeric options."""
    return package_versions() | {n: version_of(n) for n in ("jaxlib", "numpy")} | numeric_options()


def measure(job: Job) -> dict[str, Any]:
    """The members that this worker's devices compute in parallel, as `members_at_once` and `devices`."""
    return _guard(job, lambda console: _measure(job))


def run_on_worker(job: Job, unit: Unit) -> dict[str, Any]:
    """Runs a unit.

    Returns:
      Plain values, as an error of another host is text here: `host`, what was printed as `lines`, and one of
      `result`, `error` (bad input), `failed` (any other error) and `stopped`.
    """

    def run(console: LineConsole) -> dict[str, Any]:
        reporter = _Reporter(unit_directory(job.directory, unit.name) / PROGRESS)
        began = time.perf_counter()
        population = _prepare(job)
        return run_unit(
            population,
            unit,
            job.directory,
            console=console,
            tell=reporter.tell,
            # On CPU cores a process runs further units, with what it has compiled.
            began=began if job.cores is None else None,
        )

    return _guard(job, run)


def read_progress(directory: Path, unit: Unit) -> Progress | None:
    """What a worker last wrote about a unit; None if nothing, or nothing readable."""
    with contextlib.suppress(OSError, ValueError):
        path = unit_directory(directory, unit.name) / PROGRESS
        record = read_record(path, limit=MAX_ROWS_BYTES)
        values = {name: value for name, value in record.items() if name != DIGEST}
        check_schema(list[Row], values.get("rows"), path)
        return check_schema(Progress, values, path)
    return None


class _Reporter:
    """Writes a unit's progress to a file: each evaluation, and otherwise about every second."""

    def __init__(self, path: Path) -> None:
        self.path, self.written, self.last = path, -SECONDS_PER_REPORT, Progress(0)
        path.unlink(missing_ok=True)  # of a worker that was lost

    def tell(self, progress: Progress) -> None:
        """Writes the progress if it is time."""
        waits = time.monotonic() - self.written < SECONDS_PER_REPORT
        if waits and progress._replace(step=self.last.step) == self.last:
            return
        self.written, self.last = time.monotonic(), progress
        write_record(self.path, progress._asdict())


def _guard(job: Job, run: Callable[[LineConsole], dict[str, Any]]) -> dict[str, Any]:
    """Runs something as a worker of a job, with its errors as text."""
    printed = io.StringIO()
    console = LineConsole(file=printed)
    answer: dict[str, Any] = {"host": socket.gethostname()}
    try:
        _check_host(job)
        with use_compilation_cache(console, is_on=job.settings[1]["train"]["compilation_cache"]):
            answer["result"] = run(console)
    except Stopped as stop:
        answer["stopped"] = stop.signal_number
    except INPUT_ERRORS as error:
        answer["error"] = str(error)
    except Exception as error:
        # Its class may not exist where the driver runs, and JAX's notes would hide the message.
        reason = str(error).strip().partition("\n")[0]
        answer["failed"] = f"{type(error).__name__}: {reason}"
    return {**answer, "lines": printed.getvalue().splitlines()}


def _check_host(job: Job) -> None:
    check_options()
    if differences := field_differences(
        {"packages": job.source["packages"]}, {"packages": packages()}, ("on the driver", "on this worker")
    ):
        raise ValueError(
            f"{join_first(differences)}; install the same versions and set the same options of JAX on all hosts"
        )
    if job.working_directory.is_dir():
        os.chdir(job.working_directory)
    owner = job.directory / OWNER
    if job.owner is not None and not (owner.is_file() and owner.read_text() == job.owner):
        raise ValueError(
            f"output_dir {job.directory} must be on storage that all workers see, but this worker does not see the "
            "driver's files there"
        )


class _Prepared:
    """The population of this process, which its units of one sweep share."""

    key: str | None = None
    population: Population | None = None


def _prepare(job: Job) -> Population:
    """Loads and compiles, unless this process has for its last unit; compares the base with the driver's."""
    kind, values = job.settings
    key = to_json([kind.__name__, values, job.members_at_once, job.group_size])
    if _Prepared.key != key or _Prepared.population is None:
        _Prepared.key = _Prepared.population = None  # frees the memory first
        if job.cores is not None:
            use_cores(job.cores)
        abstract = abstract_population(settings_from_json(values, kind))
        _Prepared.population = prepare_population(abstract, job.group_size, job.members_at_once)
        _Prepared.key = key
    population = _Prepared.population
    here = population.origin
    there = {name: job.source[name] for name in here}
    if differences := field_differences(there, here, ("on the driver", "on this worker")):
        raise ValueError(
            f"the base model or the data differ: {join_first(differences)}; copy the same files to all hosts"
        )
    return population


def _measure(job: Job) -> dict[str, Any]:
    try:
        population = _prepare(job)
    except ValueError as error:
        raise ValueError(
            f"{error}; sweep.group_size is the most members that a worker trains together"
        ) from None
    return {"members_at_once": population.programs.at_once, "devices": population.mesh.size}


@functools.cache
def use_cores(count: int) -> None:
    """Makes JAX compute on so many CPU devices, each with one thread; call it before JAX has devices."""
    # Workers share a host: with one pool of threads each, every worker would use all cores.
    # It excludes the option of JAX that sets the same.
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false"
    os.environ["NPROC"] = str(count)  # the size of XLA's pool of threads
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
