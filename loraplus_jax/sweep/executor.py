"""Runs the units of sweeps: in this process, one after another, or as tasks of Ray (`ray_tasks`).

A sweep says which units its next stage needs and gets their results. It does not know where they ran, and its
report does not depend on it.
"""

from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax

from ..training.console import LineConsole
from ..training.provenance import ORIGIN
from .population import AbstractPopulation, Population, prepare_population
from .settings import SweepRun
from .unit import Progress, Unit, run_unit


class Opened(NamedTuple):
    """What a sweep knows of its model and data before its first unit.

    Attributes:
      abstract: data, steps and shapes.
      origin: the `ORIGIN` of the results, which every unit must share.
      members_at_once: members that a device computes in parallel.
      group_size: most members of a unit.
    """

    abstract: AbstractPopulation
    origin: Mapping[str, Any]
    members_at_once: int
    group_size: int


class Stages(Protocol):
    """What an executor runs: the stages of a sweep."""

    run: SweepRun
    directory: Path
    allow_different: Sequence[str]

    def named(self) -> AbstractContextManager[None]:
        """Says in an error of whose unit it is, where there are several sweeps."""
        ...

    def stages(self) -> Generator[Sequence[Unit], list[dict[str, Any]], dict[str, Any]]:
        """Yields the units of one stage after another, gets their results, and returns the report."""
        ...

    def stored_result(self, unit: Unit) -> dict[str, Any] | None:
        """The result of a unit that has finished before."""
        ...

    def follow(self, unit: Unit, progress: Progress) -> None:
        """Learns how far a unit is."""
        ...


class Executor(Protocol):
    """Runs units.

    Attributes:
      is_concurrent: whether it runs the units of several sweeps at the same time.
      workers: number of units that run at the same time; more or fewer may, as workers join or are lost.
    """

    is_concurrent: bool
    workers: int

    def open(self, run: SweepRun, most: int, members_at_once: int | None, group_size: int | None) -> Opened:
        """Loads, checks and, as far as it can before the first unit, compiles; it writes nothing.

        Args:
          run: settings of the sweep.
          most: members of the largest stage.
          members_at_once: members that a device computes in parallel; None chooses.
          group_size: most members of a unit; None chooses.
        """
        ...

    def submit(self, sweep: Stages, unit: Unit) -> None:
        """Queues a unit."""
        ...

    def wait(self) -> tuple[Stages, Unit, dict[str, Any]]:
        """Waits until a unit has finished; returns it and its result."""
        ...


class InProcess:
    """Runs units in this process, on all its devices; by default a stage is one unit."""

    is_concurrent, workers = False, 1

    def __init__(self, console: LineConsole) -> None:
        self.console, self.queue = console, deque[tuple[Stages, Unit]]()

    def open(self, run: SweepRun, most: int, members_at_once: int | None, group_size: int | None) -> Opened:
        """Compiles and loads everything."""
        if jax.process_count() > 1:
            raise ValueError(
                f"a sweep runs in one process, got {jax.process_count()} processes; start only one"
            )
        size = min(group_size or most, most)
        self.population: Population | None = None  # before the next one is loaded
        self.population = population = prepare_population(run, size, members_at_once)
        origin = {name: population.metadata[name] for name in ORIGIN}
        return Opened(population.abstract, origin, population.programs.at_once, size)

    def submit(self, sweep: Stages, unit: Unit) -> None:
        """Queues a unit."""
        self.queue.append((sweep, unit))

    def wait(self) -> tuple[Stages, Unit, dict[str, Any]]:
        """Runs the first unit of the queue."""
        assert self.population is not None
        sweep, unit = self.queue.popleft()
        with sweep.named():
            result = run_unit(
                self.population,
                unit,
                sweep.directory,
                console=self.console,
                allow_different=sweep.allow_different,
                tell=lambda progress: sweep.follow(unit, progress),
            )
        return sweep, unit, result


def run_sweeps(sweeps: Sequence[Stages], executor: Executor) -> list[dict[str, Any]]:
    """Runs sweeps to their ends, those that are first in the list first if the executor runs one at a time.

    Returns:
      The report of each.
    """
    waiting, reports = deque(enumerate(sweeps)), {}
    running: dict[int, _Running] = {}
    while waiting or running:
        while waiting and (executor.is_concurrent or not running):
            number, sweep = waiting.popleft()
            running[number] = _Running(sweep, sweep.stages(), [], {})
            _advance(running, number, executor, reports)
        if not running:
            continue
        sweep, unit, result = executor.wait()
        number = next(n for n, one in running.items() if one.sweep is sweep)
        sweep.follow(unit, Progress(unit.stops[-1], result["rows"]))
        running[number].results[unit] = result
        _advance(running, number, executor, reports)
    return [reports[number] for number in sorted(reports)]


class _Running(NamedTuple):
    """A sweep with the units of its stage, and the results of those that have finished."""

    sweep: Stages
    stages: Generator[Sequence[Unit], list[dict[str, Any]], dict[str, Any]]
    units: list[Unit]
    results: dict[Unit, dict[str, Any]]


def _advance(
    running: dict[int, _Running], number: int, executor: Executor, reports: dict[int, dict[str, Any]]
) -> None:
    """Enters the next stage of a sweep once every unit of its stage has a result."""
    sweep, stages, units, results = running[number]
    while len(results) == len(units):
        values: Any = [results[unit] for unit in units] if units else None
        try:
            units = list(stages.send(values))
        except StopIteration as end:
            reports[number] = end.value
            del running[number]
            return
        results = {}
        for unit in units:
            if (result := sweep.stored_result(unit)) is None:
                executor.submit(sweep, unit)
            else:
                sweep.follow(unit, Progress(unit.stops[-1], result["rows"]))
                results[unit] = result
        running[number] = _Running(sweep, stages, units, results)
