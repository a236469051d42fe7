"""Runs the units of sweeps as tasks of Ray, on a running cluster or on this machine alone.

Ray chooses the workers, and retries a unit whose worker is lost; the unit resumes from its checkpoint. Files on
storage that all hosts see carry everything else: checkpoints, results and progress.
"""

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from .._utils.atomic import to_json
from .._utils.validation import expand_path
from ..step.fingerprints import fingerprint
from ..training.console import LineConsole
from ..training.distributed import LostProcess
from ..training.run_files import OWNER
from ..training.signals import StopSignal
from .executor import Opened, Stages
from .population import AbstractPopulation, load_weights, origin_of
from .settings import SweepSettings
from .unit import Progress, Unit
from .worker import Job, measure, packages, read_progress, run_on_worker

LOCAL, AUTO = "local", "auto"
RETRIES = 20
"""How often a unit is started again after its worker was lost."""
RETRY_SECONDS = 10.0
"""How long Ray waits before it does. It notices only after some 15 s that a node is lost, and gives it tasks."""
SAVE_SECONDS = 120.0
"""How long to wait for workers that save when the sweep is stopped."""
VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_COLOR_PREFIX": "0",  # its lines about lost workers may go to a log file
    "RAY_task_retry_delay_ms": f"{1000 * RETRY_SECONDS:.0f}",
}
"""Environment variables of Ray that have these values unless the user sets them."""
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's switch for computers whose firewalls ask about every open port: it uses the loopback interface only."""
POLL_SECONDS = 0.5
CONNECT_SECONDS = 10.0


@contextlib.contextmanager
def connect(settings: SweepSettings, console: LineConsole) -> Generator["RayTasks"]:
    """Connects to the cluster of `sweep.ray`, or starts Ray on this machine until the context ends.

    Raises:
      ImportError: Ray is not installed.
      ValueError: there is no such cluster, or no node of it has what a worker needs.
    """
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    is_local = settings.ray == LOCAL
    if is_local:
        os.environ[LOOPBACK] = "0"
    # The driver computes nothing; it must not take the devices of the workers on its host.
    jax.config.update("jax_platforms", "cpu")
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        if error.name != "ray":  # but a package that Ray requires
            raise
        raise ImportError("sweep.ray requires Ray; run pip install 'loraplus_jax[ray]'") from None
    handler, hook = signal.getsignal(signal.SIGTERM), sys.excepthook
    quiet = {"log_to_driver": False, "logging_level": "CRITICAL", "include_dashboard": False}
    if is_local:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ray.init(address=LOCAL, num_cpus=cores, **quiet)
    else:
        _join_cluster(ray, str(settings.ray))
    # Ray replaces both; the handler only in the main thread. One that was set in C is None.
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
    sys.excepthook = hook
    try:
        with StopSignal() as stop:
            executor = RayTasks(ray, settings, console, stop)
            try:
                yield executor
            finally:  # whatever ended the sweep, its workers save
                executor.cancel()
    finally:
        ray.shutdown()


def _join_cluster(ray: Any, address: str) -> None:
    if not re.fullmatch(rf"{AUTO}|[^/]+:\d+", address):
        raise ValueError(
            f"sweep.ray must be auto, local or HOST:PORT, got {address}; start the sweep on a host of the cluster"
        )
    try:
        if address != AUTO:  # where nothing listens, Ray would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level="CRITICAL")
    except (ConnectionError, OSError, TimeoutError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"sweep.ray {address}: no Ray cluster answers there ({reason}); start one with ray start --head, or "
            "use sweep.ray local for this machine alone"
        ) from None
    except (RuntimeError, ValueError) as error:  # such as other versions of Ray or Python
        reason = " ".join(str(error).split())
        raise ValueError(f"sweep.ray {address}: cannot join the cluster: {reason:.300}") from None


def worker_resources(
    worker: Mapping[str, float] | None, nodes: list[Mapping[str, float]]
) -> dict[str, float]:
    """The resources of a worker, by Ray's names.

    Args:
      worker: `sweep.worker`.
      nodes: the resources of each node.

    Raises:
      ValueError: no node has them all.

    >>> worker_resources(None, [{"CPU": 8.0}, {"CPU": 8.0, "GPU": 4.0}])
    {'CPU': 1.0, 'GPU': 1.0}
    """
    if worker is None:
        most = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in ("GPU", "TPU")}
        worker = {"GPU": 1.0} if most["GPU"] else {"TPU": most["TPU"]} if most["TPU"] else {}
    if ignored := {"memory", "object_store_memory"} & set(worker):
        raise ValueError(
            f"sweep.worker must have CPU, GPU, TPU or a resource of the cluster, got {min(ignored)}"
        )
    worker = {"CPU": 1.0} | dict(worker)
    if not any(all(node.get(name, 0.0) >= count for name, count in worker.items()) for node in nodes):
        have = [
            ", ".join(f"{name} {node[name]:g}" for name in node if name in ("CPU", "GPU", "TPU", *worker))
            for node in nodes
        ]
        wanted = ", ".join(f"{name} {count:g}" for name, count in worker.items())
        raise ValueError(
            f"sweep.worker: no node has {wanted}; they have {'; '.join(dict.fromkeys(have)) or 'nothing'}"
        )
    return worker


class RayTasks:
    """Runs units as tasks of Ray; by default a unit has as many members as a worker computes in parallel."""

    def __init__(self, ray: Any, settings: SweepSettings, console: LineConsole, stop: StopSignal) -> None:
        self.ray, self.console, self.stop = ray, console, stop
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.resources = worker_resources(settings.worker, nodes)
        counts = (
            min(int(node.get(name, 0.0) / count) for name, count in self.resources.items()) for node in nodes
        )
        self.workers = max(1, sum(counts))
        uses_cores = not {"GPU", "TPU"} & set(self.resources)
        self.cores = max(1, int(self.resources["CPU"])) if uses_cores else None
        self.called = set[Any]()
        """Tasks that have not been read."""
        self.weights: dict[str, str] = {}
        """The fingerprint of the weights, by the settings of the model."""

    async def open(
        self, abstract: AbstractPopulation, most: int, members_at_once: int | None, group_size: int | None
    ) -> Opened:
        """Loads and checks; where there is no CPU, one worker measures how many members it computes in parallel."""
        run = abstract.run
        model = to_json(run.to_json()["model"])
        if model not in self.weights:
            self.weights[model] = fingerprint(load_weights(abstract))
            self.check_stop()
        origin = origin_of(abstract, self.weights[model])
        job = Job(
            settings=(type(run), run.to_json()),
            directory=expand_path("output_dir", run.output_dir).absolute(),
            working_directory=Path.cwd(),
            owner=None,
            source=origin | {"packages": packages()},
            members_at_once=1 if members_at_once is None and self.cores else members_at_once,
            group_size=min(group_size or most, most),
            cores=self.cores,
        )
        devices = self.cores if run.mesh.data == -1 else run.mesh.data
        if job.members_at_once is None or devices is None:
            measured = await self.call(measure, job)
            job, devices = job._replace(members_at_once=measured["members_at_once"]), measured["devices"]
        at_once = job.members_at_once or 1
        job = job._replace(group_size=min(group_size or at_once * devices, most))
        return Opened(job, origin, at_once, job.group_size)

    async def run(self, opened: Opened, stages: Stages, units: Sequence[Unit]) -> list[dict[str, Any]]:
        """Queues all units in Ray, and follows their progress."""
        job = opened.program._replace(owner=(stages.directory / OWNER).read_text())
        return await asyncio.gather(*(self._run_unit(stages, job, unit) for unit in units))

    async def _run_unit(self, stages: Stages, job: Job, unit: Unit) -> dict[str, Any]:
        def poll() -> None:
            if (progress := read_progress(stages.directory, unit)) is not None:
                stages.follow(unit, progress)

        result = await self.call(run_on_worker, job, unit, poll=poll)
        stages.follow(unit, Progress(unit.stops[-1], result["rows"]))
        return result

    def finish(self, programs: Sequence[Stages]) -> None:
        """Runs the stages of all programs at the same time."""

        async def run_all() -> None:
            await asyncio.gather(*(stages.train() for stages in programs))

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            asyncio.run(run_all())
        else:  # a notebook's, in this thread
            with ThreadPoolExecutor(1) as pool:
                pool.submit(lambda: asyncio.run(run_all())).result()
        self.check_stop()

    def check_stop(self) -> None:
        """Raises Stopped after a signal."""
        self.stop.check("stopped")

    async def call(
        self, function: Any, *arguments: Any, poll: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """The answer of a worker; calls `poll` every `POLL_SECONDS` until it is there.

        Raises:
          ValueError: input that the worker rejects.
          RuntimeError: any other error of the worker.
          LostProcess: its worker was lost too often.
          Stopped: after a signal.
        """
        resources = dict(self.resources)
        options: dict[str, Any] = {"num_cpus": resources.pop("CPU"), "num_gpus": resources.pop("GPU", 0)}
        if self.cores is None:
            options["max_calls"] = 1  # a process that has ended holds no GPU or TPU
        task = self.ray.remote(**options, resources=resources, max_retries=RETRIES, retry_exceptions=False)(
            function
        )
        answer = None
        while answer is None:  # a signal stops the worker whose host shuts down
            self.check_stop()
            self.called.add(reference := task.remote(*arguments))
            # Asked and not awaited: Ray may end a task after the event loop, and would then print an error.
            future = reference.future()
            while not future.done():
                await asyncio.sleep(POLL_SECONDS)
                self.check_stop()
                poll()
            self.called.discard(reference)
            answer = self._read(future)
        return answer

    def cancel(self) -> None:
        """Interrupts all tasks, as Ctrl-C does, and waits until they have saved."""
        for reference in self.called:
            with contextlib.suppress(self.ray.exceptions.RayError):
                self.ray.cancel(reference, force=False)
        if self.called:
            self.ray.wait(list(self.called), num_returns=len(self.called), timeout=SAVE_SECONDS)

    def _read(self, future: Future[Any]) -> dict[str, Any] | None:
        """What a worker answered, or None if a signal has stopped it."""
        errors = self.ray.exceptions
        try:
            answer = future.result()
        except errors.RayTaskError as error:  # before our code runs there, as where the package is missing
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise RuntimeError(f"a worker failed: {lines[-1]}") from error
        except errors.RayError as error:
            reason = str(error).strip().partition("\n")[0]
            lost = f"a worker was lost {RETRIES + 1} times ({type(error).__name__}: {reason})"
            raise LostProcess(f"{lost}; rerun the same command to resume") from None
        for line in answer["lines"]:
            self.console.print(f"worker {answer['host']}: {line}")
        if "error" in answer:
            raise ValueError(f"worker {answer['host']}: {answer['error']}")
        if "failed" in answer:
            raise RuntimeError(f"worker {answer['host']}: {answer['failed']}")
        return answer.get("result")
