"""Runs the units of sweeps: in this process, one after another, or as tasks of Ray (`ray_tasks`).

A sweep awaits the results of a stage's units. It does not know where they ran, and its report does not depend on
it.
"""

from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax

from ..training.console import LineConsole
from ..training.provenance import Origin
from .population import AbstractPopulation, Population, prepare_population
from .settings import SweepRun
from .unit import Progress, Unit, run_unit


class Opened(NamedTuple):
    """What a sweep knows of its model and data before its first unit.

    Attributes:
      abstract: data, steps and shapes.
      origin: base and data, which every unit must share.
      members_at_once: members that a device computes in parallel.
      group_size: most members of a unit.
    """

    abstract: AbstractPopulation
    origin: Origin
    members_at_once: int
    group_size: int


class Stages(Protocol):
    """What an executor knows of a sweep."""

    directory: Path

    async def train(self) -> dict[str, Any]:
        """Runs one stage after another; returns the report."""
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

    async def open(
        self, run: SweepRun, most: int, members_at_once: int | None, group_size: int | None
    ) -> Opened:
        """Loads, checks and, as far as it can before the first unit, compiles; it writes nothing.

        Args:
          run: settings of the sweep.
          most: members of the largest stage.
          members_at_once: members that a device computes in parallel; None chooses.
          group_size: most members of a unit; None chooses.
        """
        ...

    async def run(self, sweep: Stages, units: Sequence[Unit]) -> list[dict[str, Any]]:
        """The results of units; meanwhile `sweep.follow` learns how far they are."""
        ...

    def finish(self, sweeps: Sequence[Stages]) -> list[dict[str, Any]]:
        """Runs sweeps to their ends; returns the report of each."""
        ...


class InProcess:
    """Runs units in this process, on all its devices.

    By default a unit has as many members as a program call: all of a stage where they follow one after another.
    """

    is_concurrent, workers = False, 1

    def __init__(self, console: LineConsole) -> None:
        self.console = console

    async def open(
        self, run: SweepRun, most: int, members_at_once: int | None, group_size: int | None
    ) -> Opened:
        """Compiles and loads everything."""
        if jax.process_count() > 1:
            raise ValueError(
                f"a sweep runs in one process, got {jax.process_count()} processes; start only one"
            )
        size = min(group_size or most, most)
        self.population: Population | None = None  # before the next one is loaded
        self.population = population = prepare_population(run, size, members_at_once)
        programs = population.programs
        size = group_size or (programs.size if programs.at_once > 1 else most)
        return Opened(population.abstract, population.origin, programs.at_once, min(size, most))

    async def run(self, sweep: Stages, units: Sequence[Unit]) -> list[dict[str, Any]]:
        """Runs one unit after another."""
        return [self._run_unit(sweep, unit) for unit in units]

    def _run_unit(self, sweep: Stages, unit: Unit) -> dict[str, Any]:
        assert self.population is not None
        result = run_unit(
            self.population,
            unit,
            sweep.directory,
            console=self.console,
            tell=lambda progress: sweep.follow(unit, progress),
        )
        sweep.follow(unit, Progress(unit.stops[-1], result["rows"]))
        return result

    def finish(self, sweeps: Sequence[Stages]) -> list[dict[str, Any]]:
        """Runs one sweep after another."""
        return [_run_through(sweep.train()) for sweep in sweeps]


def _run_through(sweep: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    # Nothing in this process suspends a sweep, so it needs no event loop: a notebook has one that runs already.
    try:
        sweep.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("a sweep in this process waits for another one")
