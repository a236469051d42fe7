"""Runs a sweep: search, then report, in units that any executor runs and that can be interrupted anywhere.

The search trains all settings in parallel on the search seeds and drops or keeps them by validation loss. The
report trains the best setting of each arm, and the control, to the end on new seeds.

The sweep computes rungs, winners and verdict from the results of units, which are files. So it keeps no state of
its own: started again, it reads the results that exist and runs the other units.
"""

import contextlib
import math
import shutil
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Annotated, Any

from pydantic import BaseModel, Field

from .._utils.atomic import remove_leftovers, to_json, write_text
from .._utils.field_types import Count, check_schema
from .._utils.records import DIGEST, read_record, write_record
from .._utils.yaml_files import to_yaml
from ..settings.schema import GENERATION
from ..step.fingerprints import fingerprint
from ..step.run_metadata import package_versions
from ..training.anomalies import TrainingFailed
from ..training.console import LineConsole, ProgressLines, data_lines, ignored_lines, lines_only
from ..training.estimate import Estimate, batches_of, format_seconds
from ..training.metrics_log import METRICS, SUMMARY
from ..training.provenance import Origin
from ..training.run_directory import (
    OutputDirectory,
    open_output_directory,
    origins_of,
    saved_record,
    write_config,
)
from ..training.run_files import CHECKPOINTS, RESULT
from ..training.xla import restore_platforms
from .arms import SharedProgram, named, programs_of
from .edges import beyond
from .executor import Executor, InProcess, Opened
from .figures import draw_figures
from .halving import (
    best_trial,
    comparison_steps,
    curve_steps,
    mean_losses,
    member_steps,
    planned_members,
    survivors,
)
from .population import AbstractPopulation, abstract_population, load_weights, origin_of
from .report import PAGE, REPORT, WINNER, ReportRow, make_report, measured, widening_option, write_report
from .settings import MOST_MEMBERS, SweepRun
from .trial import Trial
from .unit import MemberSpec, Progress, Source, Unit, read_result, unit_directory

MEMBERS_FILE = "members_at_once.json"
"""File with the numbers of members that a device computes in parallel and that a unit has, of each program, as
rounding depends on them: a resumed sweep uses the same."""
WINNER_ONLY_FIELDS = (
    *("train.select", "train.early_stopping", "train.prompt", "train.log_every", "train.theory_every"),
    "train.report_to",
    *(name for name in GENERATION if name != "generation.inputs"),
)
"""Fields that a sweep ignores; training the winner uses them."""


class Sizes(BaseModel, strict=True, extra="forbid"):
    """The schema of a program's numbers in `MEMBERS_FILE`."""

    members_at_once: Annotated[Count, Field(le=MOST_MEMBERS)]
    group_size: Annotated[Count, Field(le=MOST_MEMBERS)]


def by_program(content: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers in `MEMBERS_FILE`, by program."""
    return {name: value for name, value in content.items() if name != DIGEST}


def ignored_fields(run: SweepRun) -> list[str]:
    """Names of the fields of `WINNER_ONLY_FIELDS` that are set; with `sweep.methods` the report generates texts."""
    found = []
    for name in WINNER_ONLY_FIELDS:
        section, field = name.split(".")
        if section == "generation" and run.sweep.methods is not None:
            continue
        settings = getattr(run, section)
        if getattr(settings, field) != getattr(type(settings), field):
            found.append(name)
    return found


@contextlib.contextmanager
def open_executor(run: SweepRun, console: LineConsole) -> Generator[Executor]:
    """Opens the executor of the settings: Ray's with `sweep.ray`, else this process."""
    if run.sweep.ray is None:
        yield InProcess(console)
        return
    from .ray_tasks import LOOPBACK, VARIABLES, connect  # Ray is an extra

    with restore_platforms(*VARIABLES, LOOPBACK), connect(run.sweep, console) as executor:
        yield executor


def sweep(
    run: SweepRun,
    *,
    programs: Sequence[SharedProgram] | None = None,
    fresh: bool = False,
    allow_different: Sequence[str] = (),
    console: LineConsole | None = None,
) -> dict[str, Any]:
    """Runs search and report and writes all results to `run.output_dir`; resumes an unfinished sweep there.

    Args:
      run: settings of the sweep.
      programs: arms of any settings, with `"lora"` in the first program; by default `programs_of(run)`.
      fresh: start over; an older sweep there is renamed, not deleted.
      allow_different: parts of the base model or data that may differ from those of the sweep to resume.
      console: where to print, by default a `LineConsole`.

    Returns:
      The content of `report.json`.

    Raises:
      ValueError, OSError: bad input, detected before anything is written, but for the memory of a second and
        later program.
      Stopped: SIGTERM or Ctrl-C, after saving the progress.
      TrainingFailed: every setting of LoRA, or of all others, diverged; `report.json` has the results so far.
    """
    console = lines_only(console)
    programs = programs_of(run) if programs is None else programs
    with (
        open_executor(run, console) as executor,
        open_output_directory(run, console, fresh=fresh, allow_different=allow_different) as output,
    ):
        return Sweep(run, programs, output, executor).train()


class Sweep:
    """One sweep, from its start or its stored results to its report."""

    def __init__(
        self, run: SweepRun, programs: Sequence[SharedProgram], output: OutputDirectory, executor: Executor
    ) -> None:
        self.run, self.output, self.executor = run, output, executor
        self.directory, self.console = output.path, output.console
        self.arms = [arm for program in programs for arm in program.arms]
        self.is_several, self.tunings = len(programs) > 1, list[Tuning]()
        # All is checked before the first program is compiled, on data that is loaded once.
        for program in programs:
            data = self.tunings[0].abstract.data if self.tunings else None
            began = time.perf_counter()
            with self.named(program):
                abstract = abstract_population(program.run, data)
            self.tunings.append(Tuning(self, program, abstract, time.perf_counter() - began))
        self.data, self.steps = self.tunings[0].abstract.data, self.tunings[0].abstract.steps
        self.has_begun = self.has_compared = self.has_logged = False
        """Whether the directory is taken over, whether weights were compared, and whether rows were written."""
        self.sizes: dict[str, Any] = {}
        """The members at once and the group size of each program that has begun."""
        # A measurement may choose another program on resuming, which rounds otherwise.
        if not output.fresh and (path := self.directory / MEMBERS_FILE).exists():
            self.sizes = by_program(
                read_record(
                    path,
                    lambda content: check_schema(dict[str, Sizes], by_program(content), path),
                    remedy="remove it to choose them again",
                )
            )

    def named(self, program: SharedProgram) -> contextlib.AbstractContextManager[None]:
        """Says in an error of which methods it is, if there are several programs."""
        return named([arm.name for arm in program.arms]) if self.is_several else contextlib.nullcontext()

    def train(self) -> dict[str, Any]:
        """Runs all searches and reports; returns the report."""
        self.executor.finish(self.tunings)
        if not self.has_compared:  # as all was read back
            abstract = self.tunings[0].abstract
            self.begin(origin_of(abstract, fingerprint(load_weights(abstract))))
        report = self.finish()
        for tuning in self.tunings:
            tuning.remove_checkpoints(tuning.stages[-1])
        return report

    def begin(self, origin: Origin) -> None:
        """Takes over the directory, once something is ready to run, and compares base and data with those there."""
        is_first, self.has_begun = not self.has_begun, True
        compares = origin["base"] is not None and not self.has_compared
        if is_first:
            self.output.claim()
        self.output.check_origin(origin)
        if compares and self.output.changed:  # only now is it known that the sweep can resume
            write_config(self.directory, self.run)
            self.console.print(f"settings changed since the sweep started: {'; '.join(self.output.changed)}")
        self.has_compared |= compares
        if is_first:
            self.print_head()

    # Output files.

    def rows(self) -> list[ReportRow]:
        """All evaluations so far, in an order that does not depend on when they were made."""
        return [row for tuning in self.tunings for row in tuning.rows()]

    def report(self) -> dict[str, Any]:
        """The report of all results so far."""
        costs = dict[str, Any]()
        for tuning in self.tunings:
            costs |= measured(tuning.results, [arm.name for arm in tuning.program.arms])
        return make_report(
            self.run,
            self.arms,
            self.rows(),
            {name: trial for tuning in self.tunings for name, trial in tuning.chosen.items()},
            [name for tuning in self.tunings for name in tuning.diverged],
            self.steps,
            self.data,
            costs,
            self.output.differences,
        )

    def log(self, rows: Iterable[ReportRow]) -> None:
        """Appends rows to the file; the first call in a process rewrites it."""
        self.output.check()
        text = "".join(to_json(row) + "\n" for row in rows)
        if self.has_logged:
            with (self.directory / METRICS).open("a", encoding="utf-8") as file:
                file.write(text)
        else:
            write_text(self.directory / METRICS, text)
        self.has_logged = True

    def fail_if_nothing_is_left(self, step: int) -> None:
        """Writes what there is and raises TrainingFailed if plain LoRA, or all else that is tuned, has diverged."""
        diverged = [arm for tuning in self.tunings for arm in tuning.searched if arm.name in tuning.diverged]
        others = [arm.name for arm in self.arms if arm.trials and arm.name != "lora"]
        names = {arm.name for arm in diverged}
        if "lora" not in names and not (others and names.issuperset(others)):
            return
        write_report(self.directory, report := self.report())
        if self.run.sweep.methods is None and any(row["loss"] is not None for row in report["search"]):
            draw_figures(self.directory, report, ("heat_map",))
        methods = " and of ".join(arm.label for arm in diverged)
        options = dict.fromkeys(widening_option(self.run, arm.name, "learning_rate") for arm in diverged)
        raise TrainingFailed(
            f"every setting of {methods} diverged by step {step}; set lower {' and '.join(options)}; the results "
            f"so far are in {self.directory}"
        )

    def write_winners(self, report: Mapping[str, Any]) -> list[str]:
        """Writes the config of a run with the best setting of each arm, and of the winner; returns their names."""
        chosen = {
            arm.name: (tuning.program.run, tuning.chosen[arm.name])
            for tuning in self.tunings
            for arm in tuning.searched
            if arm.name in tuning.chosen
        }
        winner = report["winner"]
        configs = ({} if winner is None else {"": chosen[winner["arm"]]}) | chosen
        for name, (run, trial) in configs.items():
            place = self.directory / name
            place.mkdir(exist_ok=True)
            settings = run.settings_of(trial, run.seed, str(place / "winner"))
            write_text(place / WINNER, to_yaml(settings.to_json()))
        return [str((self.directory / name / WINNER).relative_to(self.directory)) for name in configs]

    def finish(self) -> dict[str, Any]:
        """Writes the report with its figures, the configs of the best settings and, last, the summary."""
        self.has_logged = False  # programs that ran at the same time have logged in turn
        self.log(self.rows())
        report = self.report()
        draw_figures(self.directory, report)
        write_report(self.directory, report, page=True)
        if report["decision"] is not None and report["winner"] is None:
            raise TrainingFailed(f"{report['decision']} The results are in {PAGE} and {REPORT}")
        configs = self.write_winners(report)
        names = ("decision", "verdict", "winner", "command", "member_steps")
        summary = {name: report[name] for name in names}
        if differences := report["protocol"]["allowed_differences"]:
            summary["allowed_differences"] = differences
        results = [result for tuning in self.tunings for result in tuning.results]
        summary["seconds"] = round(sum(result["seconds"] for result in results), 1)
        summary["devices"] = ", ".join(sorted({result["devices"] for result in results}))
        summary["versions"] = package_versions()
        # The last file, as it marks the sweep as finished.
        write_record(self.directory / SUMMARY, summary)
        for edge in report["at_the_edge"]:
            self.console.print(f"best value at the edge of the search range: {edge}")
        if not report["protocol"]["equal_budgets"]:
            self.console.print(f"unequal budgets: {self.counts(report['protocol']['settings'])}")
        self.console.print(report["verdict"])
        if report["decision"] is not None:
            self.console.print(report["decision"], f"the winner's config: {report['command']}", sep="\n")
        files = (PAGE, REPORT, SUMMARY, METRICS, *configs)
        self.console.print(f"{self.directory}: {', '.join(files)}")
        return report

    # Console.

    def counts(self, settings: Mapping[str, int]) -> str:
        """Numbers of settings with the labels of their arms."""
        parts = [f"{settings[arm.name]} settings of {arm.label}" for arm in self.arms if arm.trials]
        return ", ".join(parts[:-1]) + f" and {parts[-1]}" if len(parts) > 1 else parts[0]

    def print_head(self) -> None:
        """Prints what the sweep will try."""
        steps, seeds = self.steps, self.run.report_seeds
        stops = " and ".join(map(str, comparison_steps(self.run.sweep, steps)))
        settings = self.counts({arm.name: len(arm.trials) for arm in self.arms})
        self.console.print(
            f"sweep: {settings} on seed {', '.join(map(str, self.run.seeds))}, compared after {stops} of "
            f"{steps} steps; then the best of each on seeds {', '.join(map(str, seeds))}"
        )
        lines = [*data_lines(self.data)]
        if (text := self.data.unrelated) is not None and text.truncated:
            lines.append(
                f"sweep.unrelated_text: {text.truncated:,} of {text.examples:,} texts truncated to "
                f"data.max_length {self.run.data.max_length} tokens"
            )
        for tuning in self.tunings:
            lines += ignored_lines(tuning.program.run, tuning.abstract.shapes)
        for line in dict.fromkeys(lines):
            self.console.print(line)
        if names := ignored_fields(self.run):
            self.console.print(f"ignored by the sweep, used when training the winner: {', '.join(names)}")


class Tuning:
    """The search and the report of the arms that share a program."""

    def __init__(
        self, sweep: Sweep, program: SharedProgram, abstract: AbstractPopulation, loading: float
    ) -> None:
        self.sweep, self.program, self.abstract = sweep, program, abstract
        self.loading = loading
        """Seconds that it took to load what is in `abstract`."""
        self.began: float | None = None
        """When loading and compiling began, until it is printed how long they took."""
        self.run, self.console, self.executor = program.run, sweep.console, sweep.executor
        self.directory, self.steps = sweep.directory, abstract.steps
        self.labels = {arm.name: arm.label for arm in program.arms}
        self.searched = [arm for arm in program.arms if arm.trials]
        self.name = program.arms[0].name
        self.prefix = f"{self.name}-" if sweep.is_several else ""
        """What begins the names of its units."""
        self.title = f"{' and '.join(self.labels.values())}: " if sweep.is_several else ""
        """What begins its lines."""
        self.opened: Opened | None = None
        self.group_size = 0
        """Most members of a unit; 0 before it is known."""
        self.chosen: dict[str, Trial] = {}
        self.diverged: list[str] = []
        """Arms of which every setting has."""
        self.stages: list[dict[Unit, Progress]] = []
        """How far the units of each stage are."""
        self.results: list[dict[str, Any]] = []
        """Of the units of the stages that have ended."""
        self.is_timed = False
        """Whether a unit measures times for the estimate: the first one that runs."""
        self.added = Counter[str]()
        """Training steps and evaluations of the settings that `widen` has added."""

    async def train(self) -> None:
        """Runs one stage after another."""
        sizes = self.sweep.sizes.get(self.name)
        if sizes is None:
            # Nothing is written before all is checked, and the first program is compiled and loaded.
            await self.open(self.run.sweep.members_at_once, self.run.sweep.group_size)
        else:
            self.sweep.begin(origin_of(self.abstract, None))
            self.at_once, self.group_size = sizes["members_at_once"], sizes["group_size"]
        await self.search()
        if self.chosen:
            await self.report_stage()
        self.opened = None  # the next program needs the memory

    async def open(self, at_once: int | None, group_size: int | None) -> Opened:
        """Compiles and loads, unless it has."""
        if self.opened is None:
            self.began = time.perf_counter() - self.loading
            trials = sum(len(arm.trials) for arm in self.program.arms)
            most = max(trials * len(self.run.seeds), len(self.program.arms) * self.run.sweep.report_seeds)
            with self.sweep.named(self.program):
                self.opened = opened = await self.executor.open(self.abstract, most, at_once, group_size)
            self.sweep.begin(opened.origin)
            if not self.group_size:
                self.at_once, self.group_size = opened.members_at_once, opened.group_size
                own = {"members_at_once": self.at_once, "group_size": self.group_size}
                self.sweep.sizes[self.name] = own
                write_record(self.directory / MEMBERS_FILE, self.sweep.sizes)
        return self.opened

    # Stages.

    async def search(self) -> None:
        """Trains all settings, and drops some at each rung, until every arm has its best."""
        left = {arm.name: list(arm.trials) for arm in self.searched}
        start, sources = 0, dict[MemberSpec, Source]()
        for stop in comparison_steps(self.run.sweep, self.steps):
            members = [
                MemberSpec(arm, trial, seed)
                for arm, trials in left.items()
                for trial in trials
                for seed in self.run.seeds
            ]
            if not members:
                break
            units = self.make_units("search", f"search-{stop}", members, start, (stop,), sources)
            await self.run_stage(units)
            left = self.choose(stop, left)
            start, sources = stop, _sources(units)
        await self.widen()

    async def widen(self) -> None:
        """Tries further learning rates of the arms whose best is the smallest or largest tried."""
        for number in range(self.run.sweep.widen):
            added: dict[int, dict[str, Trial]] = {}
            for arm, best in self.chosen.items():
                rows = [row for row in self.rows() if row["arm"] == arm]
                if (further := beyond(mean_losses(rows), best)) is not None:
                    self.console.print(
                        f"{self.labels[arm]}: the best learning rate {best.learning_rate:g} is at the edge of the "
                        f"search range; trying {further.learning_rate:g}"
                    )
                    # To the step at which the best was selected, which is a rung if it alone was left.
                    last = max(row["step"] for row in rows if Trial(*row["trial"]) == best)
                    added.setdefault(last, {})[arm] = further
            for last, trials in added.items():
                stops = tuple(stop for stop in comparison_steps(self.run.sweep, self.steps) if stop <= last)
                members = [
                    MemberSpec(arm, trial, seed) for arm, trial in trials.items() for seed in self.run.seeds
                ]
                units = self.make_units("search", f"wider-{number}-{last}", members, 0, stops, {})
                self.added += Counter(steps=len(members) * last, validation=len(members) * len(stops))
                self.added["units"] += len(units)
                await self.run_stage(units)
                for arm in trials:
                    scores = self.scores(arm, last)
                    best = best_trial(scores)
                    self.chosen |= {arm: best} if best is not None else {}
                    self.print_scores(arm, last, scores, best)
                write_report(self.directory, self.sweep.report())

    async def report_stage(self) -> None:
        """Trains the selected settings and the control to the end, on the report's seeds."""
        trials = dict(self.chosen)
        if "control" in self.labels:
            trials["control"] = self.chosen["lora_plus"].control
        members = [
            MemberSpec(arm, trials[arm], seed)
            for arm in self.labels
            if arm in trials
            for seed in self.run.report_seeds
        ]
        stops = tuple(curve_steps(self.steps, self.run.sweep.curve_points))
        await self.run_stage(self.make_units("report", "report", members, 0, stops, {}))

    def make_units(
        self,
        stage: str,
        name: str,
        members: Sequence[MemberSpec],
        start: int,
        stops: tuple[int, ...],
        sources: Mapping[MemberSpec, Source],
    ) -> list[Unit]:
        """Splits the members of a stage into units, in order, each of the same size but the last."""
        split = "validation" if stage == "search" else "test"
        units = []
        for number, first in enumerate(range(0, len(members), self.group_size)):
            group = tuple(members[first : first + self.group_size])
            place = f"{self.prefix}{name}-{number}"
            runs = not (unit_directory(self.directory, place) / RESULT).exists()
            units.append(
                Unit(
                    *(place, stage, group, start, stops, split),
                    sources=tuple(sources[member] for member in group) if sources else (),
                    is_timed=runs and not self.is_timed,
                    is_scored=self.sweep.run.sweep.methods is not None and stage == "report",
                )
            )
            self.is_timed |= runs
        return units

    async def run_stage(self, units: Sequence[Unit]) -> None:
        """Runs the units that have no result yet, and follows all."""
        self.stages.append({unit: Progress(unit.start) for unit in units})
        self.reached, self.has_begun = -1, False
        self.evaluated = Counter({-1: len(units)})
        """How many units have last evaluated after each step."""
        groups = f"{self.stage} of {len(units)} groups" if len(units) > 1 else self.stage
        total, self.steps_done = len(units) * units[0].stops[-1], len(units) * units[0].start
        self.lines = ProgressLines(
            self.console, f"{self.title}{groups}{',' if len(units) > 1 else ''} step", total, self.steps_done
        )
        origins = origins_of(saved_record(self.directory))
        stored = [self.stored_result(unit, origins) for unit in units]
        computed = iter(())
        if left := [unit for unit, result in zip(units, stored, strict=True) if result is None]:
            opened = await self.open(self.at_once, self.group_size)
            with self.sweep.named(self.program):
                computed = iter(await self.executor.run(opened, self, left))
        # In their order, whichever were read back: sums of floats depend on it.
        self.results += [next(computed) if result is None else result for result in stored]
        # Their members have trained on, or were dropped.
        self.remove_checkpoints(self.stages[-2] if len(self.stages) > 1 else ())

    def rows(self) -> list[ReportRow]:
        """The evaluations that all units of a stage have reached, in the order of one unit with all members."""
        return [
            row
            for stage in self.stages
            for row in _rows_between(stage, -1, min(map(_evaluated, stage.values())))
        ]

    def remove_checkpoints(self, units: Iterable[Unit]) -> None:
        """Removes the checkpoints of units from which none will continue; their results stay."""
        for unit in units:
            path = unit_directory(self.directory, unit.name)
            shutil.rmtree(path / CHECKPOINTS, ignore_errors=True)
            remove_leftovers(path)  # of a process that was killed as it wrote the result

    @property
    def stage(self) -> str:
        """The stage in training."""
        return next(iter(self.stages[-1])).stage

    def stored_result(self, unit: Unit, origins: Sequence[str | None]) -> dict[str, Any] | None:
        """The result of a unit that has finished, or None."""
        result = read_result(self.directory, unit, origins, self.abstract.data.task.metric)
        if result is None:
            return None
        # Work of before, which says nothing about the speed from now on.
        self.stages[-1][unit] = self.stages[-1][unit]._replace(step=unit.stops[-1])
        self.steps_done += unit.stops[-1] - unit.start
        self.lines.restart(self.steps_done)
        self.follow(unit, Progress(unit.stops[-1], result["rows"]))
        return result

    def follow(self, unit: Unit, progress: Progress) -> None:
        """Learns how far a unit is: prints progress and estimates, and reports what all units have evaluated."""
        stage = self.stages[-1]
        before, stage[unit] = stage[unit], progress
        # Counted, not summed over all units: each of them comes here at each of its steps.
        self.steps_done += progress.step - before.step
        self.evaluated.update({_evaluated(before): -1})
        self.evaluated.update({_evaluated(progress): 1})
        is_resumed = progress.resumed is not None and before.resumed is None
        if is_resumed:
            self.console.print(f"{self.title}resuming from step {progress.resumed} of the {unit.stage}")
        # Also after a worker was lost, and when the first unit has been prepared: that is no step's time.
        if is_resumed or progress.step < before.step or not self.has_begun:
            self.lines.restart(self.steps_done)
            self.has_begun |= before.step < unit.stops[-1]  # not a result that is read back
        elif progress.step != before.step:
            self.lines.update(self.steps_done)
        is_new = (before.batch_seconds, before.step_seconds) != (
            progress.batch_seconds,
            progress.step_seconds,
        )
        if is_new and progress.batch_seconds is not None:
            self.print_estimate(progress)
        if (step := min(step for step, units in self.evaluated.items() if units)) > self.reached:
            rows = _rows_between(stage, self.reached, step)
            self.reached = step
            if unit.stage == "report" and step:
                self.print_means(step, [row for row in rows if row["step"] == step])
            self.sweep.log(rows)

    def scores(self, arm: str, step: int) -> dict[Trial, float]:
        """The validation loss of each setting of an arm that was compared at a step."""
        return mean_losses(row for row in self.rows() if (row["arm"], row["step"]) == (arm, step))

    def choose(self, step: int, left: Mapping[str, list[Trial]]) -> dict[str, list[Trial]]:
        """Compares the settings; selects an arm's best at the end, or earlier if only one is left.

        Returns:
          The settings of each arm that train on.
        """
        remaining = {}
        for arm in left:
            scores = self.scores(arm, step)
            best, alive = best_trial(scores), survivors(scores, self.run.sweep.keep)
            self.print_scores(arm, step, scores, best)
            if best is None:
                self.diverged.append(arm)
            elif step == self.steps or len(alive) == 1:
                # Of one alone, further training could not change the selection.
                self.chosen[arm] = best
            else:
                remaining[arm] = alive
        self.sweep.fail_if_nothing_is_left(step)
        write_report(self.directory, self.sweep.report())
        return remaining

    def print_estimate(self, progress: Progress) -> None:
        """Prints how long what is left takes, from the seconds of a member's step or its evaluation batch."""
        run, steps, data = self.run, self.steps, self.abstract.data
        assert progress.batch_seconds is not None
        if self.began is not None:  # before the first estimate, which is of what follows
            taken = format_seconds(time.perf_counter() - self.began)
            self.console.print(f"{self.title}loading and compiling took {taken}")
            self.began = None
        step_seconds = progress.step_seconds or progress.step_work * progress.batch_seconds
        stops, reported = comparison_steps(run.sweep, steps), len(self.labels) * len(run.report_seeds)
        settings = [len(arm.trials) for arm in self.searched]
        members = planned_members(settings, len(run.seeds), stops, run.sweep.keep)
        batches = {
            split: batches_of(data.splits[split], progress.eval_rows) for split in ("validation", "test")
        }
        evaluations = (sum(members) + self.added["validation"]) * batches["validation"]
        evaluations += reported * len(curve_steps(steps, run.sweep.curve_points)) * batches["test"]
        done = self.work_so_far()
        total = member_steps(members, stops) + self.added["steps"] + reported * steps - done["steps"]
        evaluations -= sum(done[split] * count for split, count in batches.items())
        # Each unit that has not begun will be prepared, about as long as the one that was timed.
        stages = [*members, reported]
        units = sum(-(-count // self.group_size) for count in stages) + self.added["units"] - done["units"]
        seconds = total * step_seconds + evaluations * progress.batch_seconds
        seconds += max(0, units) * progress.preparation
        counts = {"training steps": total, "evaluation batches": evaluations}
        bound = "at least" if run.sweep.widen and self.stage == "search" else "about"
        workers = self.executor.workers
        also = f"waiting for the slowest of {workers} workers" if workers > 1 else ""
        also += " and for other methods" if len(self.sweep.tunings) > 1 and workers > 1 else ""
        self.console.print(f"{self.title}{Estimate(seconds / workers, progress.memory, counts, bound, also)}")

    def work_so_far(self) -> Counter[str]:
        """The `units` that have begun and, summed over members, their `steps` and evaluations by split."""
        done = Counter[str]()
        for unit, progress in (item for stage in self.stages for item in stage.items()):
            done["units"] += progress != Progress(unit.start)
            done["steps"] += len(unit.members) * (progress.step - unit.start)
            done[unit.split] += len(unit.members) * len({row["step"] for row in progress.rows})
        return done

    # Console.

    def print_scores(self, arm: str, step: int, scores: Mapping[Trial, float], best: Trial | None) -> None:
        """Prints the best setting of an arm and how many diverged."""
        count = sum(not math.isfinite(score) for score in scores.values())
        text = "none" if best is None else f"{best}: validation loss {scores[best]:.4f}"
        diverged = f", {count} diverged" if count else ""
        self.console.print(
            f"step {step}: {self.labels[arm]}, best of {len(scores)} settings{diverged}: {text}"
        )

    def print_means(self, step: int, rows: Sequence[ReportRow]) -> None:
        """Prints each arm's mean test loss over the report seeds on which it did not diverge after a step."""
        losses = {
            arm: [r["loss"] for r in rows if r["arm"] == arm and r["loss"] is not None] for arm in self.labels
        }
        means = ", ".join(
            f"{self.labels[arm]} {sum(v) / len(v):.4f}" if v else f"{self.labels[arm]} diverged"
            for arm, v in losses.items()
        )
        numbers = ", ".join(map(str, self.run.report_seeds))
        self.console.print(f"step {step}: mean test loss on seeds {numbers}: {means}")


def _sources(units: Sequence[Unit]) -> dict[MemberSpec, Source]:
    """Where units leave the state of each of their members."""
    return {
        member: Source(unit.name, len(unit.members), number)
        for unit in units
        for number, member in enumerate(unit.members)
    }


def _evaluated(progress: Progress) -> int:
    """The last step after which a unit has evaluated; -1 if there is none."""
    return progress.rows[-1]["step"] if progress.rows else -1


def _rows_between(stage: Mapping[Unit, Progress], after: int, last: int) -> list[ReportRow]:
    """The rows of a stage after one step and up to another, in the order of one unit with all members."""
    rows = []
    for progress in stage.values():
        start, end = (bisect_right(progress.rows, step, key=itemgetter("step")) for step in (after, last))
        rows += progress.rows[start:end]
    return sorted(rows, key=itemgetter("step"))  # which keeps the order of members
