"""Runs a sweep: search, then report, in units that any executor runs and that can be interrupted anywhere.

The search trains all settings in parallel on the search seeds and drops or keeps them by validation loss. The
report trains the best setting of LoRA, the best of LoRA+ and a control to the end on new seeds.

The sweep computes rungs, winners and verdict from the results of units, which are files. So it keeps no state of
its own: started again, it reads the results that exist and runs the other units.
"""

import contextlib
import math
import shutil
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from .._utils.atomic import remove_leftovers, to_json, write_text
from .._utils.json_files import MAX_ROWS_BYTES
from .._utils.records import read_record, write_record
from ..settings.schema import GENERATION
from ..settings.yaml_files import to_yaml
from ..step.run_metadata import package_versions
from ..training.anomalies import TrainingFailed
from ..training.console import LineConsole, ProgressLines, data_lines, ignored_lines, lines_only
from ..training.estimate import Estimate, batches_of
from ..training.metrics_log import METRICS, SUMMARY
from ..training.run_directory import OutputDirectory, open_output_directory
from ..training.run_files import CHECKPOINTS, RESULT
from .edges import beyond
from .executor import Executor, InProcess
from .figures import draw_figures
from .halving import (
    best_trial,
    comparison_steps,
    curve_steps,
    mean_losses,
    member_steps,
    planned_members,
    split_at_rung,
)
from .report import PAGE, RATE_OPTIONS, REPORT, WINNER, make_report, write_report
from .settings import ARM_LABELS, SweepRun, Trial
from .unit import MemberSpec, Progress, Source, Unit, is_result_of, unit_directory

MEMBERS_FILE = "members_at_once.json"
"""File with the numbers of members that a device computes in parallel and that a unit has, as rounding depends on
them: a resumed sweep uses the same."""
WINNER_ONLY_FIELDS = (
    *("train.select", "train.early_stopping", "train.prompt", "train.log_every", "train.theory_every"),
    "train.report_to",
    *(name for name in GENERATION if name != "generation.inputs"),
)
"""Fields that a sweep ignores; training the winner uses them."""


def ignored_fields(run: SweepRun) -> list[str]:
    """Names of the fields of `WINNER_ONLY_FIELDS` that are set."""
    found = []
    for name in WINNER_ONLY_FIELDS:
        section, field = name.split(".")
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
    from .ray_tasks import connect  # Ray is an extra

    with connect(run.sweep, console) as executor:
        yield executor


def sweep(
    run: SweepRun,
    *,
    fresh: bool = False,
    allow_different: Sequence[str] = (),
    console: LineConsole | None = None,
) -> dict[str, Any]:
    """Runs search and report and writes all results to `run.output_dir`; resumes an unfinished sweep there.

    Args:
      run: settings of the sweep.
      fresh: start over; an older sweep there is renamed, not deleted.
      allow_different: parts of the base model or data that may differ from those of the sweep to resume.
      console: where to print, by default a `LineConsole`.

    Returns:
      The content of `report.json`.

    Raises:
      ValueError, OSError: bad input, detected before anything is written.
      Stopped: SIGTERM or Ctrl-C, after saving the progress.
      TrainingFailed: every setting of LoRA, or of LoRA+, diverged; `report.json` has the results so far.
    """
    console = lines_only(console)
    with (
        open_executor(run, console) as executor,
        open_output_directory(run, console, fresh=fresh, allow_different=allow_different) as output,
    ):
        return executor.finish([Sweep(run, output, output, executor)])[0]


class Sweep:
    """One sweep, from its start or its stored results to its report."""

    labels: Mapping[str, str] = ARM_LABELS
    title = ""
    """What begins its lines, where several sweeps run at the same time."""
    units_before: Sequence[Unit] = ()
    """Those of the stage before."""
    is_scored = False
    """Whether its report also scores texts and measures costs."""

    def __init__(
        self, run: SweepRun, output: OutputDirectory, home: OutputDirectory, executor: Executor
    ) -> None:
        self.run, self.output, self.home, self.executor = run, output, home, executor
        self.directory, self.console = output.path, output.console
        self.chosen: dict[str, Trial] = {}
        self.rows: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []
        """Of the last stage."""
        self.is_timed = False
        """Whether a unit measures times for the estimate: the first one that runs."""
        self.done = Counter[str]()
        """Training steps and evaluation batches of the stages that have ended."""
        self.added = Counter[str]()
        """Training steps and evaluations of the settings that `widen` has added."""
        self.devices: set[str] = set()
        self.seconds = 0.0
        """Of the units of the stages that have ended."""

    @property
    def steps(self) -> int:
        """Optimizer steps of a full run."""
        return self.abstract.steps

    async def train(self) -> dict[str, Any]:
        """Runs one stage after another; returns the report."""
        await self.open()
        self.print_head()
        await self.search()
        await self.report_stage()
        report = self.finish()
        self.remove_checkpoints(self.units)
        return report

    async def open(self) -> None:
        """Checks, compiles and loads everything, then takes over the directory."""
        run, members_file = self.run, self.directory / MEMBERS_FILE
        recorded: dict[str, Any] = {"members_at_once": run.sweep.members_at_once}
        recorded["group_size"] = run.sweep.group_size
        # A measurement may choose another program on resuming, which rounds otherwise.
        if not self.output.fresh and members_file.exists():
            recorded = read_record(members_file)
        most = max(len(run.trials) * len(run.seeds), len(run.arms) * run.sweep.report_seeds)
        opened = await self.executor.open(run, most, recorded["members_at_once"], recorded["group_size"])
        self.abstract, origin, at_once, self.group_size = opened
        # Nothing is written before everything has been checked, compiled and loaded.
        self.output.claim()
        self.home.check_origin(origin)
        if recorded["group_size"] != self.group_size or not members_file.exists():
            write_record(members_file, {"members_at_once": at_once, "group_size": self.group_size})

    # Stages.

    async def search(self) -> None:
        """Trains all settings, and drops some at each rung, until every arm has its best."""
        trials, seeds = self.run.trials, self.run.seeds
        members = [MemberSpec(trial.arm, trial, seed) for trial in trials for seed in seeds]
        start, sources = 0, dict[MemberSpec, Source]()
        for stop in comparison_steps(self.run.sweep, self.steps):
            if not members:
                break
            units = self.make_units("search", f"search-{stop}", members, start, (stop,), sources)
            await self.run_stage(units)
            remaining = self.choose(stop)
            members = [member for member in members if member.trial in remaining]
            start, sources = stop, _sources(units)
        await self.widen()

    async def widen(self) -> None:
        """Tries further learning rates of the arms whose best is the smallest or largest tried."""
        for number in range(self.run.sweep.widen):
            added: dict[int, list[Trial]] = {}
            for arm, best in self.chosen.items():
                rows = [row for row in self.rows if row["arm"] == arm]
                if (further := beyond(mean_losses(rows), best)) is not None:
                    self.console.print(
                        f"{self.labels[arm]}: the best learning rate {best.learning_rate:g} is at the edge of the "
                        f"search range; trying {further.learning_rate:g}"
                    )
                    # To the step at which the best was selected, which is a rung if it alone was left.
                    last = max(row["step"] for row in rows if Trial(*row["trial"]) == best)
                    added.setdefault(last, []).append(further)
            for last, trials in added.items():
                stops = tuple(stop for stop in comparison_steps(self.run.sweep, self.steps) if stop <= last)
                members = [MemberSpec(trial.arm, trial, seed) for trial in trials for seed in self.run.seeds]
                units = self.make_units("search", f"wider-{number}-{last}", members, 0, stops, {})
                self.added += Counter(steps=len(members) * last, validation=len(members) * len(stops))
                self.added["units"] += len(units)
                await self.run_stage(units)
                scores = mean_losses(row for row in self.rows if row["step"] == last)
                best = {trial.arm: best_trial(scores, trial.arm) for trial in trials}
                self.chosen |= {arm: trial for arm, trial in best.items() if trial is not None}
                self.print_scores(last, scores, best)
                write_report(self.directory, self.report())

    async def report_stage(self) -> None:
        """Trains the selected settings and the control to the end, on the report's seeds."""
        trials = dict(self.chosen)
        if "control" in self.run.arms:
            trials["control"] = self.chosen["lora_plus"].control
        members = [
            MemberSpec(arm, trials[arm], seed) for arm in self.run.arms for seed in self.run.report_seeds
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
            group, place = tuple(members[first : first + self.group_size]), f"{name}-{number}"
            runs = not (unit_directory(self.directory, place) / RESULT).exists()
            units.append(
                Unit(
                    *(place, stage, group, start, stops, split),
                    sources=tuple(sources[member] for member in group) if sources else (),
                    is_timed=runs and not self.is_timed,
                    is_scored=self.is_scored and stage == "report",
                )
            )
            self.is_timed |= runs
        return units

    async def run_stage(self, units: Sequence[Unit]) -> None:
        """Runs the units that have no result yet, and records the rows of all."""
        self.units, self.progress = units, {unit: Progress(unit.start) for unit in units}
        self.earlier, self.reached, self.has_begun = self.rows, -1, False
        groups = f"{self.stage} of {len(units)} groups" if len(units) > 1 else self.stage
        total, done = len(units) * units[0].stops[-1], len(units) * units[0].start
        self.lines = ProgressLines(
            self.console, f"{self.title}{groups}{',' if len(units) > 1 else ''} step", total, done
        )
        stored = [self.stored_result(unit) for unit in units]
        left = [unit for unit, result in zip(units, stored, strict=True) if result is None]
        computed = iter(await self.executor.run(self, left))
        self.results = [next(computed) if result is None else result for result in stored]
        # In the order of one unit with all members. What a lost worker told may be of another attempt.
        rows = sorted((row for result in self.results for row in result["rows"]), key=lambda row: row["step"])
        self.rows = [*self.earlier, *rows]
        self.done += self.work_so_far()
        self.devices |= {result["devices"] for result in self.results}
        self.seconds += sum(result["seconds"] for result in self.results)
        # Their members have trained on, or were dropped.
        self.remove_checkpoints(self.units_before)
        self.units_before = units

    def remove_checkpoints(self, units: Sequence[Unit]) -> None:
        """Removes the checkpoints of units from which none will continue; their results stay."""
        for unit in units:
            path = unit_directory(self.directory, unit.name)
            shutil.rmtree(path / CHECKPOINTS, ignore_errors=True)
            remove_leftovers(path)  # of a process that was killed as it wrote the result

    @property
    def stage(self) -> str:
        """The stage in training."""
        return self.units[0].stage

    def stored_result(self, unit: Unit) -> dict[str, Any] | None:
        """The result of a unit that has finished, of the same members."""
        path = unit_directory(self.directory, unit.name) / RESULT
        if not path.exists():
            return None
        result = read_record(path, limit=MAX_ROWS_BYTES)
        if not is_result_of(result, unit):
            raise ValueError(f"{path} is of other members; start over with --fresh")
        # Work of before, which says nothing about the speed from now on.
        self.progress[unit] = self.progress[unit]._replace(step=unit.stops[-1])
        self.lines.restart(self.steps_done())
        self.follow(unit, Progress(unit.stops[-1], result["rows"]))
        return result

    def steps_done(self) -> int:
        """Steps of all units of the stage so far."""
        return sum(each.step for each in self.progress.values())

    def follow(self, unit: Unit, progress: Progress) -> None:
        """Learns how far a unit is: prints progress and estimates, and reports what all units have evaluated."""
        before, self.progress[unit] = self.progress[unit], progress
        is_resumed = progress.resumed is not None and before.resumed is None
        if is_resumed:
            self.console.print(f"{self.title}resuming from step {progress.resumed} of the {unit.stage}")
        # Also after a worker was lost, and when the first unit has been prepared: that is no step's time.
        if is_resumed or progress.step < before.step or not self.has_begun:
            self.lines.restart(self.steps_done())
            self.has_begun |= before.step < unit.stops[-1]  # not a result that is read back
        elif progress.step != before.step:
            self.lines.update(self.steps_done())
        is_new = (before.batch_seconds, before.step_seconds) != (
            progress.batch_seconds,
            progress.step_seconds,
        )
        if is_new and progress.batch_seconds is not None:
            self.print_estimate(progress)
        evaluated = [max((row["step"] for row in p.rows), default=-1) for p in self.progress.values()]
        if (step := min(evaluated)) > self.reached:
            self.reached = step
            rows = [row for p in self.progress.values() for row in p.rows if row["step"] <= step]
            # In the order of one unit with all members, and a sort keeps the order of members.
            self.rows = [*self.earlier, *sorted(rows, key=lambda row: row["step"])]
            self.at_stop(step)

    def at_stop(self, step: int) -> None:
        """Writes the report so far; all members have been evaluated after this step."""
        if self.stage == "report" and step:
            self.print_means(step)
        self.output.check()
        write_text(self.directory / METRICS, "".join(to_json(row) + "\n" for row in self.rows))
        write_report(self.directory, self.report())

    def choose(self, step: int) -> list[Trial]:
        """Compares the settings; selects an arm's best at the end, or earlier if only one is left.

        Returns:
          The settings that train on.
        """
        scores = mean_losses(row for row in self.rows if row["step"] == step)
        best = {arm: best_trial(scores, arm) for arm in self.run.searched if arm not in self.chosen}
        self.print_scores(step, scores, best)
        if diverged := [arm for arm, trial in best.items() if trial is None]:
            self.fail(step, diverged)
        if step == self.steps:
            self.chosen |= {arm: trial for arm, trial in best.items() if trial is not None}
            remaining = []
        else:
            selected, remaining = split_at_rung(scores, self.run.sweep.keep)
            self.chosen |= selected
        write_report(self.directory, self.report())
        return remaining

    def print_estimate(self, progress: Progress) -> None:
        """Prints how long what is left takes, from the seconds of a member's step or its evaluation batch."""
        run, steps, data = self.run, self.steps, self.abstract.data
        assert progress.batch_seconds is not None
        step_seconds = progress.step_seconds or progress.step_work * progress.batch_seconds
        stops, reported = comparison_steps(run.sweep, steps), len(run.arms) * len(run.report_seeds)
        members = planned_members(run.trials, len(run.seeds), stops, run.sweep.keep)
        batches = {
            split: batches_of(data.splits[split], progress.eval_rows) for split in ("validation", "test")
        }
        evaluations = (sum(members) + self.added["validation"]) * batches["validation"]
        evaluations += reported * len(curve_steps(steps, run.sweep.curve_points)) * batches["test"]
        done = self.done + self.work_so_far()
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
        also += " and for other methods" if self.title else ""
        self.console.print(f"{self.title}{Estimate(seconds / workers, progress.memory, counts, bound, also)}")

    def work_so_far(self) -> Counter[str]:
        """What the units of this stage have done: `units` that have begun, and, summed over members, `steps` and
        evaluations by split."""
        done = Counter[str]()
        for unit, progress in self.progress.items():
            done["units"] += progress != Progress(unit.start)
            done["steps"] += len(unit.members) * (progress.step - unit.start)
            done[unit.split] += len(unit.members) * len({row["step"] for row in progress.rows})
        return done

    def fail(self, step: int, diverged: Sequence[str]) -> None:
        """Writes what there is and raises TrainingFailed: every setting of these arms diverged."""
        write_report(self.directory, report := self.report())
        if any(row["loss"] is not None for row in report["search"]):
            draw_figures(self.directory, report, ("heat_map",))
        methods = " and of ".join(self.labels[arm] for arm in diverged)
        options = " and ".join(f"sweep.{RATE_OPTIONS[arm, 'learning_rate']}" for arm in diverged)
        raise TrainingFailed(
            f"every setting of {methods} diverged by step {step}; set lower {options}; the results "
            f"so far are in {self.directory}"
        )

    # Output files.

    def report(self) -> dict[str, Any]:
        """The report of all results so far."""
        data = self.abstract.data
        curve = {
            "curve_steps": curve_steps(self.steps, self.run.sweep.curve_points),
            "test_rows": data.examples["test"],
            "constant": dict(data.constant),
        }
        return make_report(self.run, self.rows, self.chosen, self.steps, data.task.metric, curve)

    def write_winner(self, trial: Trial) -> None:
        """Writes the config of a run with a chosen setting."""
        winner = self.run.settings_of(trial, self.run.seed, str(self.directory / "winner"))
        write_text(self.directory / WINNER, to_yaml(winner.to_json()))

    def finish(self) -> dict[str, Any]:
        """Writes the report with its figures, the winner's config and, last, the summary."""
        report = self.report()
        self.output.check()
        draw_figures(self.directory, report)
        write_report(self.directory, report, page=True)
        if report["winner"] is None:
            raise TrainingFailed(f"{report['decision']} The results are in {PAGE} and {REPORT}")
        self.write_winner(self.chosen[report["winner"]["arm"]])
        summary = {
            name: report[name] for name in ("decision", "verdict", "winner", "command", "member_steps")
        }
        summary["seconds"] = round(self.seconds, 1)
        summary["devices"] = ", ".join(sorted(self.devices))
        summary["versions"] = package_versions()
        # The last file, as it marks the sweep as finished.
        write_record(self.directory / SUMMARY, summary)
        for edge in report["at_the_edge"]:
            self.console.print(f"best value at the edge of the search range: {edge}")
        settings = report["protocol"]["settings"]
        if not report["protocol"]["equal_budgets"]:
            self.console.print(
                f"unequal budgets: {settings['lora']} settings of LoRA, {settings['lora_plus']} of LoRA+"
            )
        self.console.print(
            report["verdict"], report["decision"], f"the winner's config: {report['command']}", sep="\n"
        )
        self.console.print(f"{self.directory}: {PAGE}, {REPORT}, {WINNER}, {SUMMARY}, {METRICS}")
        return report

    # Console.

    def print_head(self) -> None:
        """Prints what the sweep will try."""
        counts = {arm: sum(trial.arm == arm for trial in self.run.trials) for arm in self.run.searched}
        settings = " and ".join(f"{count} settings of {self.labels[arm]}" for arm, count in counts.items())
        steps, seeds = self.steps, self.run.report_seeds
        stops = " and ".join(map(str, comparison_steps(self.run.sweep, steps)))
        self.console.print(
            f"sweep: {settings} on seed {', '.join(map(str, self.run.seeds))}, compared after {stops} of "
            f"{steps} steps; then the best of each on seeds {', '.join(map(str, seeds))}"
        )
        for line in (*data_lines(self.abstract.data), *ignored_lines(self.run, self.abstract.shapes)):
            self.console.print(line)
        if names := ignored_fields(self.run):
            self.console.print(f"ignored by the sweep, used when training the winner: {', '.join(names)}")

    def print_scores(
        self, step: int, scores: Mapping[Trial, float], best: Mapping[str, Trial | None]
    ) -> None:
        """Prints the best setting of each arm and how many diverged."""
        for arm, trial in best.items():
            arm_scores = [score for t, score in scores.items() if t.arm == arm]
            count = sum(not math.isfinite(score) for score in arm_scores)
            text = "none" if trial is None else f"{trial}: validation loss {scores[trial]:.4f}"
            diverged = f", {count} diverged" if count else ""
            self.console.print(
                f"step {step}: {self.labels[arm]}, best of {len(arm_scores)} settings{diverged}: {text}"
            )

    def print_means(self, step: int) -> None:
        """Prints each arm's mean test loss over the report seeds on which it did not diverge."""
        seeds = {member.seed for unit in self.units for member in unit.members}
        rows = [
            row
            for row in self.rows
            if (row["stage"], row["step"]) == ("report", step) and row["seed"] in seeds
        ]
        losses = {
            arm: [r["loss"] for r in rows if r["arm"] == arm and r["loss"] is not None]
            for arm in self.run.arms
        }
        means = ", ".join(
            f"{self.labels[arm]} {sum(v) / len(v):.4f}" if v else f"{self.labels[arm]} diverged"
            for arm, v in losses.items()
        )
        numbers = ", ".join(map(str, sorted(seeds)))
        self.console.print(f"step {step}: mean test loss on seeds {numbers}: {means}")


def _sources(units: Sequence[Unit]) -> dict[MemberSpec, Source]:
    """Where units leave the state of each of their members."""
    return {
        member: Source(unit.name, len(unit.members), number)
        for unit in units
        for number, member in enumerate(unit.members)
    }
