"""A unit of a sweep's work: a group of members, from one comparison to the next, trained by one process.

What a unit trains is fixed before it starts, and so are its bits on devices of one kind. It has a directory of its
own with its checkpoints and, at the end, its result. So any process that sees the directory can resume it.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from pydantic import BaseModel

from .._utils.atomic import add_path_to_errors, to_json
from .._utils.field_types import check_schema
from .._utils.json_files import MAX_ROWS_BYTES
from .._utils.records import read_record, write_record
from ..adapter.tree import combine, count
from ..data.batches import Batch
from ..data.fetch import resolve
from ..models.files import open_files
from ..step.checkpoint import DamagedCheckpoint, open_manager, restore_checkpoint, save_checkpoint
from ..step.sharding import make_mesh, replicate
from ..tasks.causal_lm import LanguageTask
from ..tasks.held_out_generation import HeldOutTexts
from ..training.console import LineConsole
from ..training.evaluation import finish_metrics
from ..training.memory import expected_peak
from ..training.run_directory import OutputDirectory, lock_directory, origins_of, saved_record
from ..training.run_files import CHECKPOINTS, RESULT, UNITS
from ..training.signals import StopSignal
from .device_members import DeviceMembers, state_like, stored_members
from .member_programs import Members, add_scales
from .population import Population
from .trial import Trial
from .unrelated_text import make_unrelated_loss

TIMED_STEP = 3
"""Which step since the start or the resumption is timed for a second estimate; the first ones are slower."""
COST_STEPS = 5
"""Steps that are timed once a method has finished; the median counts."""
LOCK_SECONDS = 300.0
"""How long a unit waits for its lock: the process that ran it before may still be saving, and a file server keeps
the locks of a lost host for some minutes."""


class MemberSpec(NamedTuple):
    """Arm, setting and seed of a member."""

    arm: str
    trial: Trial
    seed: int


class Source(NamedTuple):
    """Where a member's state is: a finished unit, the number of its members, and the member's number among them."""

    unit: str
    size: int
    number: int


class Unit(NamedTuple):
    """What a unit trains and evaluates.

    Attributes:
      name: name of its directory.
      stage: `"search"` or `"report"`.
      members: its members.
      start: step at which it begins.
      stops: steps after which it evaluates; it ends with the last.
      split: the split that it evaluates.
      sources: where each member's state at `start` is; empty at step 0.
      is_timed: whether to measure an evaluation batch and a step, for an estimate.
      is_scored: whether to score texts and to measure the cost of a step at the end.
    """

    name: str
    stage: str
    members: tuple[MemberSpec, ...]
    start: int
    stops: tuple[int, ...]
    split: str
    sources: tuple[Source, ...] = ()
    is_timed: bool = False
    is_scored: bool = False

    def row_keys(self, step: int) -> list[dict[str, Any]]:
        """What identifies the rows of its members after a step, in order."""
        rest = {"step": step, "split": self.split}
        return [
            {"stage": self.stage, "arm": arm, "trial": list(trial), "seed": seed, **rest}
            for arm, trial, seed in self.members
        ]


class Row(BaseModel, strict=True, extra="allow"):
    """The schema of an evaluation of a member; what is added are the task's metrics."""

    __pydantic_extra__: dict[str, float | None]  # pyright: ignore[reportIncompatibleVariableOverride]
    stage: str
    arm: str
    trial: list[float]
    seed: int
    step: int
    split: str
    loss: float | None


class Score(BaseModel, strict=True, extra="allow"):
    """The schema of the scores of a member's texts."""

    __pydantic_extra__: dict[str, float]  # pyright: ignore[reportIncompatibleVariableOverride]
    arm: str
    seed: int


class Change(BaseModel, strict=True, extra="forbid"):
    """The schema of a member's loss on `sweep.unrelated_text` before and after training."""

    arm: str
    seed: int
    before: float
    after: float


class Cost(BaseModel, strict=True, extra="forbid"):
    """The schema of what `_UnitRun.cost` measures."""

    trainable: int
    step_seconds: float | None


class Result(BaseModel, strict=True, extra="forbid"):
    """The schema of `result.json`.

    Attributes:
      origin: the digest of the sweep's `identity.json`.
      members, rows: the unit's members, and their evaluations in order.
      seconds, devices: how long they were trained, and on what.
      text_scores, unrelated, cost: only of a unit that is scored.
      digest: that of the record.
    """

    origin: str
    members: list[Any]
    rows: list[Row]
    seconds: float
    devices: str
    text_scores: list[Score] | None = None
    unrelated: list[Change] | None = None
    cost: Cost | None = None
    digest: str


class Progress(NamedTuple):
    """How far a unit is.

    Attributes:
      step: the last step.
      rows: its evaluations so far.
      resumed: the step from which it was resumed, or None.
      batch_seconds: seconds of a member's evaluation batch, if it is timed.
      step_seconds: seconds of a member's step, once one was timed.
      step_work: FLOPs of a step over those of an evaluation batch.
      eval_rows: rows of an evaluation batch.
      memory: expected peak memory in bytes.
      preparation: seconds from the unit's start to its first step, if it is timed: compiling, and initial values.
    """

    step: int
    rows: Sequence[dict[str, Any]] = ()
    resumed: int | None = None
    batch_seconds: float | None = None
    step_seconds: float | None = None
    step_work: float = 1.0
    eval_rows: int = 1
    memory: int = 0
    preparation: float = 0.0


def unit_directory(directory: Path, name: str) -> Path:
    """The directory of a unit in that of its sweep."""
    return directory / UNITS / name


def run_unit(
    population: Population,
    unit: Unit,
    directory: Path,
    *,
    console: LineConsole,
    tell: Callable[[Progress], None] = lambda progress: None,
    began: float | None = None,
) -> dict[str, Any]:
    """Runs or resumes a unit.

    Args:
      population: the programs and the base.
      unit: what to run.
      directory: the output directory of the sweep.
      console: where to print what happens to a damaged checkpoint, and whose texts are generated.
      tell: called at the start and after every step and evaluation.
      began: when a process that runs only this unit began to load and compile, by `time.perf_counter`.

    Returns:
      The content of `result.json` in the unit's directory, which marks it as finished.

    Raises:
      Stopped: SIGTERM or Ctrl-C, after saving the progress.
    """
    path = unit_directory(directory, unit.name)
    with contextlib.ExitStack() as stack:
        stack.enter_context(add_path_to_errors(path))
        path.mkdir(parents=True, exist_ok=True)
        check = stack.enter_context(lock_directory(path, wait=LOCK_SECONDS))
        origins = origins_of(saved_record(directory))
        # By another process while this one waited.
        if (result := read_result(directory, unit, origins, population.data.task.metric)) is not None:
            return result
        signal = stack.enter_context(StopSignal())
        output = OutputDirectory(path, population.run, console, False, (), True, (), stack, check)
        output.open_manager()
        return _UnitRun(population, unit, output, tell, signal, began, origins).run()


class _UnitRun:
    """A unit in training."""

    def __init__(
        self,
        population: Population,
        unit: Unit,
        output: OutputDirectory,
        tell: Callable[[Progress], None],
        signal: StopSignal,
        began: float | None,
        origins: Sequence[str | None],
    ) -> None:
        self.population, self.unit, self.output, self.origins = population, unit, output, origins
        self.signal, self._tell = signal, tell
        self.progress = Progress(unit.start)
        self.seconds, self.started, self.timed_step = 0.0, time.perf_counter(), TIMED_STEP
        self.began = self.started if began is None else began

    def run(self) -> dict[str, Any]:
        """Runs everything that is left, and writes and returns the result."""
        unit = self.unit
        self.begin()
        self.timed_step = self.step + TIMED_STEP
        if unit.is_timed:
            self.measure()
        evaluated = max((row["step"] for row in self.progress.rows), default=-1)
        for stop in unit.stops:
            if stop > evaluated:
                self.train_to(stop)
                self.record()
                if stop < self.population.steps or unit.is_scored:
                    self.save()
                    if stop < unit.stops[-1]:
                        self.end_if_stopped()
        scored: dict[str, Any] = {}
        if unit.is_scored:
            scored = {"text_scores": self.score_texts(), "unrelated": self.unrelated_losses()}
            scored["cost"] = self.cost()  # which trains on
        # The units that continue from here read the checkpoint.
        self.output.manager.wait_until_finished()
        result = {
            "origin": self.origins[-1],
            "members": unit.members,
            "rows": self.progress.rows,
            "seconds": self.seconds + time.perf_counter() - self.started,
            "devices": f"{self.population.mesh.size} x {jax.devices()[0].device_kind}",
            **scored,
        }
        self.output.check()
        write_record(self.output.path / RESULT, result)
        self.end_if_stopped()
        return read_record(self.output.path / RESULT, limit=MAX_ROWS_BYTES)

    @property
    def step(self) -> int:
        """The last step."""
        return self.progress.step

    def tell(self, **changes: Any) -> None:
        """Tells the progress after these changes of it."""
        self.progress = self.progress._replace(**changes)
        self._tell(self.progress)

    def begin(self) -> None:
        """Makes the members: from the newest checkpoint, from the units before, or before their first step."""
        unit, population = self.unit, self.population
        members = [population.first(member.trial, member.seed) for member in unit.members]
        path = self.output.path / CHECKPOINTS
        like, remedy = state_like(population, len(members)), f"remove {path} to train its members again"
        if (restored := self.output.restore(like, population.metadata, remedy=remedy)) is not None:
            position = restored.input_position
            self.check_source(path, position)
            members = stored_members(restored.state, members, range(len(members)))
            self.seconds, step = position["seconds"], int(restored.state.step)
            self.tell(step=step, rows=position["rows"], resumed=step)
        else:
            members = members if unit.start == 0 else self.members_from_sources(members)
            self.tell()
        self.members = DeviceMembers(population, members)

    def members_from_sources(self, first: list[Members]) -> list[Members]:
        """The members as the units before have left them."""
        unit, members = self.unit, list(first)
        for name in dict.fromkeys(source.unit for source in unit.sources):
            own = [n for n, source in enumerate(unit.sources) if source.unit == name]
            size = next(source.size for source in unit.sources if source.unit == name)
            path = self.output.path.with_name(name)
            with open_manager(path / CHECKPOINTS, keep=self.population.run.train.keep) as manager:
                try:
                    like = state_like(self.population, size)
                    restored = restore_checkpoint(
                        manager, like, metadata=self.population.metadata, step=unit.start
                    )
                except (DamagedCheckpoint, FileNotFoundError) as error:
                    raise ValueError(
                        f"{error}; restore the original files, or remove {path} to train its members again"
                    ) from None
            self.check_source(path, restored.input_position)
            numbers = [unit.sources[n].number for n in own]
            stored = stored_members(restored.state, [first[n] for n in own], numbers)
            for n, member in zip(own, stored, strict=True):
                members[n] = member
        return members

    def check_source(self, path: Path, position: Mapping[str, Any]) -> None:
        """Raises ValueError if a checkpoint is of another sweep."""
        if position["origin"] not in self.origins:
            raise ValueError(
                f"{path} is of another sweep; restore it, or remove it to train its members again"
            )

    def measure(self) -> None:
        """Measures an evaluation batch."""
        programs, rows = self.members.programs, self.population.batches.eval_rows
        largest = programs.step.largest, programs.evaluate
        memory = expected_peak(largest, self.population.mesh.local_devices)
        seconds = self.members.time_evaluation(self.population.data.splits["validation"])
        work, preparation = programs.step_work, time.perf_counter() - self.began
        self.tell(
            memory=memory, batch_seconds=seconds, step_work=work, eval_rows=rows, preparation=preparation
        )

    def train_to(self, stop: int) -> None:
        """Trains up to a step, saving at intervals and when a signal was received."""
        while self.step < stop:
            batches = self.next_batches()
            # Dispatch runs ahead of the devices; a signal would wait for all steps up to the stop.
            jax.block_until_ready(self.members.stacked)
            began = time.perf_counter()
            self.members.step(batches)
            step = self.step + 1
            self.progress = self.progress._replace(step=step)
            if self.unit.is_timed and step == self.timed_step:
                jax.block_until_ready(self.members.stacked)
                self.tell(step_seconds=(time.perf_counter() - began) / len(self.unit.members))
            else:
                self.tell()
            is_due = step % self.population.run.train.eval_every == 0 or self.signal.received is not None
            if is_due and step < stop:
                self.save()
                self.end_if_stopped()

    def next_batches(self) -> list[Batch]:
        """The next batch of each member."""
        seeds = dict.fromkeys(member.seed for member in self.unit.members)
        by_seed = {seed: self.population.batches.batch(seed, self.step) for seed in seeds}
        return [by_seed[member.seed] for member in self.unit.members]

    def record(self) -> None:
        """Evaluates all members and tells the rows; stops members with a non-finite loss."""
        unit, data = self.unit, self.population.data

        def between() -> None:
            # The resumed unit evaluates: a large split may take longer than the grace period before a kill.
            if self.signal.received is not None:
                if self.step > unit.start:
                    self.save()
                self.end_if_stopped()

        results = self.members.evaluate(data.splits[unit.split], between)
        diverged, rows = [], [*self.progress.rows]
        for number, (key, values) in enumerate(zip(unit.row_keys(self.step), results, strict=True)):
            if not (finite := math.isfinite(values["loss"])):
                diverged.append(number)
            values = finish_metrics(data.task, values)
            # JSON has no NaN, and the metrics of a diverged member say nothing.
            values = values if finite else dict.fromkeys(values)
            rows.append(key | values)
        self.members.retire(diverged)
        self.tell(rows=rows)

    def save(self) -> None:
        """Saves a checkpoint with all rows so far, unless the step has one, of a stopped evaluation."""
        if self.step in self.output.manager.all_steps():
            return
        position = {
            "origin": self.origins[-1],
            "rows": self.progress.rows,
            "seconds": self.seconds + time.perf_counter() - self.started,
        }
        state = self.members.as_state(self.step)
        self.output.check()
        save_checkpoint(
            self.output.manager, state, metadata=self.population.metadata, input_position=position
        )

    def end_if_stopped(self) -> None:
        """Raises Stopped if a signal was received; the caller has just saved."""
        save = self.output.manager.wait_until_finished
        self.signal.check(f"stopped at step {self.step} of the {self.unit.stage}", save)

    def score_texts(self) -> list[dict[str, Any]]:
        """Arm and seed of each member, and the scores of its texts (task generation); else empty."""
        run, parts, data = self.population.run, self.population.parts, self.population.data
        if not isinstance(data.task, LanguageTask) or data.task.kind != "generation":
            return []
        files = open_files(resolve(run.model.path, "model"))
        mesh = make_mesh(run.mesh.data)  # one member after another, each on all devices
        texts = HeldOutTexts.from_options(run.task_options, files, data.task, parts.model, data.inputs, mesh)
        rows = []
        for spec, member in self.alive_members():
            self.output.console.print(
                f"{spec.arm}, seed {spec.seed}: generating texts for {len(texts.inputs)} test inputs"
            )
            frozen = add_scales(parts.frozen, parts.specs, member)
            variables = replicate(mesh, combine(member.state.trainable, frozen))
            _, scores = texts.generate(variables, self.end_if_stopped)
            rows.append({"arm": spec.arm, "seed": spec.seed, **scores})
        return rows

    def unrelated_losses(self) -> list[dict[str, Any]]:
        """Arm and seed of each member, and its loss on `sweep.unrelated_text` before and after; else empty."""
        if (loss := make_unrelated_loss(self.population, self.end_if_stopped)) is None:
            return []
        # All members compute the same before their first step.
        before = loss(self.population.first(*self.unit.members[0][1:]))
        rows = [
            {"arm": spec.arm, "seed": spec.seed, "before": before, "after": loss(member)}
            for spec, member in self.alive_members()
        ]
        return [row for row in rows if math.isfinite(row["after"])]

    def alive_members(self) -> Iterator[tuple[MemberSpec, Members]]:
        """The members that have not diverged, on the host."""
        members = self.members.to_host()
        for number, spec in enumerate(self.unit.members):
            member = jax.tree.map(lambda leaf, number=number: leaf[number], members)
            if member.alive:
                yield spec, member

    def cost(self) -> dict[str, Any]:
        """Trainable parameters, and seconds of a member's step (median; None if all diverged); trains them on."""
        batches = self.next_batches()
        # Computed one at a time, a member that has diverged costs nothing.
        alive = int(np.sum(self.members.stacked.alive))
        computed = alive if self.members.programs.at_once == 1 else len(batches)
        seconds = []
        for _ in range(COST_STEPS):
            began = time.perf_counter()
            self.members.step(batches)
            jax.block_until_ready(self.members.stacked)
            seconds.append(time.perf_counter() - began)
        trainable = count(self.population.parts.trainable)
        return {
            "trainable": trainable,
            "step_seconds": float(np.median(seconds)) / computed if alive else None,
        }


def read_result(
    directory: Path, unit: Unit, origins: Sequence[str | None], metric: str
) -> dict[str, Any] | None:
    """The result of a unit that has finished, or None.

    Args:
      directory: the output directory of the sweep.
      unit: the unit.
      origins: from `origins_of` the sweep's record.
      metric: a name that its rows must have.

    Raises:
      ValueError: it is damaged, or of another sweep or other members.
    """
    path = unit_directory(directory, unit.name) / RESULT
    if not path.exists():
        return None

    def check(content: dict[str, Any]) -> None:
        result = check_schema(Result, content, path)
        if result.origin not in origins:
            raise ValueError(f"{path} is of another sweep")
        if content["members"] != json.loads(to_json(unit.members)):
            raise ValueError(f"{path} is of other members")
        rows, keys = content["rows"], [key for stop in unit.stops for key in unit.row_keys(stop)]
        if len(rows) != len(keys) or any(row | key != row for row, key in zip(rows, keys, strict=True)):
            raise ValueError(
                f"{path}: rows must be of all members on the {unit.split} split after steps "
                f"{', '.join(map(str, unit.stops))}"
            )
        lists = rows, *(content.get(name) or [] for name in ("text_scores", "unrelated"))
        if metric not in rows[0] or any(row.keys() != part[0].keys() for part in lists for row in part):
            raise ValueError(f"{path}: every row must have the same fields, among them {metric}")
        if (result.cost is not None) != unit.is_scored:
            raise ValueError(f"{path}: cost must be of a unit that is scored")

    return read_record(
        path, check, limit=MAX_ROWS_BYTES, remedy=f"remove {path.parent} to train its members again"
    )
