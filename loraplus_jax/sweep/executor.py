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
from .population import AbstractPopulation, prepare_population
from .unit import Progress, Unit, run_unit


class Opened(NamedTuple):
    """A program that is ready to run units.

    Attributes:
      program: what the executor runs them with.
      origin: base and data, which every unit must share.
      members_at_once: members that a device computes in parallel.
      group_size: most members of a unit.
    """

    program: Any
    origin: Origin
    members_at_once: int
    group_size: int


class Stages(Protocol):
    """What an executor knows of the search and the report of a program's arms."""

    directory: Path

    async def train(self) -> None:
        """Runs one stage after another."""
        ...

    def follow(self, unit: Unit, progress: Progress) -> None:
        """Learns how far a unit is."""
        ...


class Executor(Protocol):
    """Runs units.

    Attributes:
      workers: number of units that run at the same time; more or fewer may, as workers join or are lost.
    """

    workers: int

    async def open(
        self, abstract: AbstractPopulation, most: int, members_at_once: int | None, group_size: int | None
    ) -> Opened:
        """Loads, checks and, as far as it can before the first unit, compiles; it writes nothing.

        Args:
          abstract: the population before weights are read.
          most: members of the largest stage.
          members_at_once: members that a device computes in parallel; None chooses.
          group_size: most members of a unit; None chooses.
        """
        ...

    async def run(self, opened: Opened, stages: Stages, units: Sequence[Unit]) -> list[dict[str, Any]]:
        """The results of units; meanwhile `stages.follow` learns how far they are."""
        ...

    def finish(self, programs: Sequence[Stages]) -> None:
        """Runs the stages of all programs to their ends."""
        ...


class InProcess:
    """Runs units in this process, on all its devices.

    By default a unit has as many members as a program call: all of a stage where they follow one after another.
    """

    workers = 1

    def __init__(self, console: LineConsole) -> None:
        self.console = console

    async def open(
        self, abstract: AbstractPopulation, most: int, members_at_once: int | None, group_size: int | None
    ) -> Opened:
        """Compiles and loads everything."""
        if jax.process_count() > 1:
            raise ValueError(
                f"a sweep runs in one process, got {jax.process_count()} processes; start only one"
            )
        population = prepare_population(abstract, min(group_size or most, most), members_at_once)
        programs = population.programs
        size = group_size or (programs.size if programs.at_once > 1 else most)
        return Opened(population, population.origin, programs.at_once, min(size, most))

    async def run(self, opened: Opened, stages: Stages, units: Sequence[Unit]) -> list[dict[str, Any]]:
        """Runs one unit after another."""
        return [self._run_unit(opened, stages, unit) for unit in units]

    def _run_unit(self, opened: Opened, stages: Stages, unit: Unit) -> dict[str, Any]:
        result = run_unit(
            opened.program,
            unit,
            stages.directory,
            console=self.console,
            tell=lambda progress: stages.follow(unit, progress),
        )
        stages.follow(unit, Progress(unit.stops[-1], result["rows"]))
        return result

    def finish(self, programs: Sequence[Stages]) -> None:
        """Runs one program after another."""
        for stages in programs:
            _run_through(stages.train())


def _run_through(stages: Coroutine[Any, Any, None]) -> None:
    # Nothing in this process suspends them, so they need no event loop: a notebook has one that runs already.
    try:
        stages.send(None)
    except StopIteration:
        return
    raise AssertionError("a sweep in this process waits for something")
