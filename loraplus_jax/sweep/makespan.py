"""How long sweeps take on a number of workers: their own schedule, with given times of units, in no time."""

import heapq
import types
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..training.console import LineConsole
from .executor import Executor, Stages, run_sweeps
from .halving import split_at_rung
from .interim_report import seed_groups
from .run import Sweep
from .settings import SweepRun, Trial
from .unit import Progress, Unit


class Span(NamedTuple):
    """When a worker runs a unit, in seconds; preparation, such as compiling, comes first.

    Attributes:
      worker: number of the worker.
      sweep: number of the sweep.
      unit: the unit.
      start, end: from when to when.
    """

    worker: int
    sweep: int
    unit: Unit
    start: float
    end: float


class Schedule(NamedTuple):
    """What workers do, and how fast any schedule could be.

    Attributes:
      spans: the units, by their end.
      makespan: seconds until the last unit ends.
      chain: seconds of the longest chain of stages that wait for each other, with as many workers as units.
      work: seconds of all units on one worker.
      workers: number of workers.
    """

    spans: list[Span]
    makespan: float
    chain: float
    work: float
    workers: int

    @property
    def bound(self) -> float:
        """Seconds that no schedule of these units on these workers undercuts."""
        return max(self.chain, self.work / self.workers)


def schedule(
    runs: Sequence[SweepRun],
    steps: int,
    group_size: int,
    workers: int,
    seconds: Callable[[int, Unit], float],
    preparation: float = 0.0,
) -> Schedule:
    """Schedules sweeps whose settings all converge, as `run_sweeps` does with Ray, first come first served.

    Args:
      runs: settings of the sweeps, which run concurrently.
      steps: optimizer steps of a full run.
      group_size: most members of a unit.
      workers: number of workers.
      seconds: maps the number of a sweep and a unit of it to seconds.
      preparation: seconds that a worker needs before its first unit of each sweep.
    """
    executor: Any = _Simulated(workers, seconds, preparation)
    sweeps = [_PlannedSweep(run, steps, group_size, executor) for run in runs]
    executor.numbers = {id(sweep): number for number, sweep in enumerate(sweeps)}
    run_sweeps(sweeps, executor)
    stages: dict[tuple[int, str, int, str], float] = {}
    for _, sweep, unit, _, _ in executor.spans:
        key = sweep, unit.stage, unit.start, unit.name.rpartition("-")[0]
        stages[key] = max(stages.get(key, 0.0), seconds(sweep, unit))
    chains = [sum(value for key, value in stages.items() if key[0] == number) for number in range(len(runs))]
    work = sum(seconds(span.sweep, span.unit) for span in executor.spans)
    return Schedule(executor.spans, executor.clock, max(chains, default=0.0) + preparation, work, workers)


class _Simulated:
    """Executor of workers that only wait; planned sweeps open nothing."""

    is_concurrent = True

    def __init__(self, workers: int, seconds: Callable[[int, Unit], float], preparation: float) -> None:
        self.workers, self.seconds, self.preparation = workers, seconds, preparation
        self.idle, self.prepared = list(range(workers)), dict[int, int]()
        self.running: list[tuple[float, int, int, Stages, Unit]] = []
        self.queue: list[tuple[Stages, Unit]] = []
        self.spans: list[Span] = []
        self.numbers: Mapping[int, int] = {}
        self.clock, self.count = 0.0, 0

    def submit(self, sweep: Stages, unit: Unit) -> None:
        """Queues a unit."""
        self.queue.append((sweep, unit))

    def wait(self) -> tuple[Stages, Unit, dict[str, Any]]:
        """Lets idle workers begin, and time pass until a unit ends."""
        while self.queue and self.idle:
            sweep, unit = self.queue.pop(0)
            number, worker = self.numbers[id(sweep)], self.idle.pop(0)
            wait = 0.0 if self.prepared.get(worker) == number else self.preparation
            self.prepared[worker] = number
            end = self.clock + wait + self.seconds(number, unit)
            self.spans.append(Span(worker, number, unit, self.clock, end))
            self.count += 1
            heapq.heappush(self.running, (end, self.count, worker, sweep, unit))
        self.clock, _, worker, sweep, unit = heapq.heappop(self.running)
        self.idle.append(worker)
        return sweep, unit, {"rows": [], "devices": "", "seconds": 0.0}


class _PlannedSweep(Sweep):
    """A sweep that only plans: its settings are as good as their order."""

    def __init__(self, run: SweepRun, steps: int, group_size: int, executor: Executor) -> None:
        self.run, self.executor, self.group_size = run, executor, group_size
        self.console, self.directory = LineConsole(quiet=True), Path("unused")
        self.chosen, self.rows, self.group, self.devices = {}, [], -1, set()
        self.is_timed, self.done, self.seconds = True, Counter(), 0.0
        self.abstract: Any = types.SimpleNamespace(steps=steps)
        self.left = list(run.trials)

    def open(self) -> None:
        """Reads and writes nothing."""

    def print_head(self) -> None:
        """Prints nothing."""

    def stored_result(self, unit: Unit) -> None:
        """Nothing has finished."""

    def follow(self, unit: Unit, progress: Progress) -> None:
        """Learns nothing."""

    def choose(self, step: int) -> list[Trial]:
        """Keeps the first settings of each arm."""
        scores = {trial: float(number) for number, trial in enumerate(self.left)}
        if step == self.steps:
            self.left, best = [], {trial.arm: trial for trial in reversed(self.left)}
        else:
            best, self.left = split_at_rung(scores, self.run.sweep.keep)
        self.chosen |= best
        return self.left

    def widen(self) -> Generator[Sequence[Unit], list[dict[str, Any]], None]:
        """No best is at the edge."""
        yield from ()

    def report_continues(self) -> bool:
        """The report may end early, and does not here."""
        return self.group + 1 < len(seed_groups(self.run))

    def finish(self) -> dict[str, Any]:
        """There is no report."""
        return {}
