"""Runs a sweep: search, then report, as one population that trains step by step and can be interrupted.

The search trains all settings in parallel on the search seeds and drops or keeps them by validation loss. The
report trains the best setting of LoRA, the best of LoRA+ and a control to the end on new seeds, all at once or in
groups of seeds.
"""

import importlib.metadata
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import yaml

from .._utils.atomic import to_json, write_text
from .._utils.records import read_record, write_record
from ..data.batches import train_batches
from ..settings.schema import GENERATION
from ..step.checkpoint import PACKAGES, save_checkpoint
from ..step.train_step import TrainState
from ..training.anomalies import TrainingFailed
from ..training.console import LineConsole, ProgressLines, data_lines, ignored_lines, lines_only
from ..training.estimate import Estimate, batches_of
from ..training.evaluation import finish_metrics
from ..training.memory import expected_peak
from ..training.metrics_log import METRICS, SUMMARY
from ..training.run_directory import OutputDirectory, open_output_directory
from ..training.signals import Stopped, StopSignal
from .device_slots import DeviceSlots
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
from .interim_report import seed_groups
from .population import Members, Population, prepare_population
from .report import PAGE, RATE_OPTIONS, REPORT, WINNER, make_report, write_report
from .settings import ARM_LABELS, SweepRun, Trial

MEMBERS_FILE = "members_at_once.json"
"""File with the number of members that a device computes in parallel, so that a resumed sweep uses it too."""
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


class MemberSpec(NamedTuple):
    """Arm, setting and seed of a member."""

    arm: str
    trial: Trial
    seed: int


def sweep(
    run: SweepRun,
    *,
    fresh: bool = False,
    allow_different: Sequence[str] = (),
    console: LineConsole | None = None,
    kind: "type[Sweep] | None" = None,
) -> dict[str, Any]:
    """Runs search and report and writes all results to `run.output_dir`; resumes an unfinished sweep there.

    Args:
      run: settings of the sweep.
      fresh: start over; an older sweep there is renamed, not deleted.
      allow_different: parts of the base model or data that may differ from those of the sweep to resume.
      console: where to print, by default a `LineConsole`.
      kind: the class that runs it, by default `Sweep`.

    Returns:
      The content of `report.json`.

    Raises:
      ValueError, OSError: bad input, detected before anything is written.
      Stopped: SIGTERM or Ctrl-C, after saving the progress.
      TrainingFailed: every setting of LoRA, or of LoRA+, diverged; `report.json` has the results so far.
    """
    console = lines_only(console)
    if jax.process_count() > 1:
        raise ValueError(f"a sweep runs in one process, got {jax.process_count()} processes; start only one")
    with open_output_directory(run, console, fresh=fresh, allow_different=allow_different) as output:
        started, members_file = time.perf_counter(), output.path / MEMBERS_FILE
        at_once = run.sweep.members_at_once
        # A measurement may choose another program on resuming, which rounds otherwise.
        if at_once is None and not fresh and members_file.exists():
            at_once = read_record(members_file)["members_at_once"]
        largest_group = max(map(len, seed_groups(run)))
        capacity = max(len(run.trials) * len(run.seeds), len(run.arms) * largest_group)
        population = prepare_population(run, capacity, at_once)
        # Nothing is written before everything has been checked, compiled and loaded.
        output.claim()
        write_record(members_file, {"members_at_once": population.programs.at_once})
        output.open_manager()
        return (kind or Sweep)(population, capacity, output, started).run_to_end()


TIMED_STEP = 3
"""The step that is timed for a second estimate; the first ones are slower."""


class Sweep:
    """One sweep, from its start or newest checkpoint to its report."""

    def __init__(
        self, population: Population, capacity: int, output: OutputDirectory, started: float
    ) -> None:
        self.population, self.run, self.slots = population, population.run, DeviceSlots(population, capacity)
        self.output, self.directory = output, output.path
        self.manager, self.console = output.manager, output.console
        self.chosen: dict[str, Trial] = {}
        self.rows: list[dict[str, Any]] = []
        self.group = -1
        """Index of the group of report seeds in training; -1 in the search."""
        # Orbax names checkpoints by their step and keeps the newest, so stages and evaluations count on one clock.
        self.clock, self.seconds, self.started = 0, 0.0, started
        self.labels = ARM_LABELS

    def run_to_end(self) -> dict[str, Any]:
        """Runs everything that is left and returns the report."""
        self.start()
        self.print_head()
        if self.stage == "search" and self.step < TIMED_STEP:
            self.measure()
        with StopSignal() as stop:
            self.run_stage(stop)
            while self.report_continues():
                self.begin_report()
                self.end_if(stop)
                self.run_stage(stop)
        return self.finish()

    def report_continues(self) -> bool:
        """Whether another group of report seeds follows; the analysis so far is in the report."""
        remaining = len(seed_groups(self.run)) - (self.group + 1)
        return remaining > 0 and (self.stage == "search" or not self.report()["complete"])

    def run_stage(self, signal: StopSignal) -> None:
        """Trains and evaluates to the end of the stage; a signal ends it after the current step or evaluation."""
        while stops := self.stops():
            stop = stops[0]
            lines = ProgressLines(self.console, f"{self.stage} step", stop, self.step)
            while self.step < stop:
                batches = self.next_batches()
                # Dispatch runs ahead of the devices; a signal would wait for all steps up to the stop.
                jax.block_until_ready(self.slots.chunks)
                began = time.perf_counter()
                self.slots.step(batches)
                self.step, self.clock = self.step + 1, self.clock + 1
                lines.update(self.step)
                if self.stage == "search" and self.step == TIMED_STEP:
                    jax.block_until_ready(self.slots.chunks)
                    self.print_estimate((time.perf_counter() - began) / len(self.entries))
                should_save = self.step % self.run.train.eval_every == 0 or signal.received is not None
                if should_save and self.step < stop:
                    self.save()
                    self.end_if(signal)
            self.at_stop()
            if self.stage == "report" or self.stops():
                self.save()
                self.end_if(signal)

    def measure(self) -> None:
        """Measures an evaluation batch, and prints from its time how long the sweep will take."""
        programs, devices = self.slots.programs, self.population.mesh.local_devices
        self.memory = expected_peak((programs.step.largest, programs.evaluate), devices[0], len(devices))
        self.batch_seconds = self.slots.time_evaluation(self.population.data.splits["validation"])
        self.print_estimate(programs.step_work * self.batch_seconds)

    def print_estimate(self, step_seconds: float) -> None:
        """Prints how long the sweep will take, from the seconds of a member's step and of its evaluation batch."""
        run, steps, rows = self.run, self.population.steps, self.population.batches.eval_rows
        stops, reported = comparison_steps(run.sweep, steps), len(run.arms) * len(run.report_seeds)
        members = planned_members(run.trials, len(run.seeds), stops, run.sweep.keep)
        batches = {name: batches_of(columns, rows) for name, columns in self.population.data.splits.items()}
        evaluations = sum(members) * batches["validation"]
        evaluations += reported * len(curve_steps(steps, run.sweep.curve_points)) * batches["test"]
        total = member_steps(members, stops) + reported * steps
        seconds = total * step_seconds + evaluations * self.batch_seconds
        counts = {"training steps": total, "evaluation batches": evaluations}
        bound = "at most" if run.sweep.interim_seeds else "about"
        self.console.print(f"{Estimate(seconds, self.memory, counts, bound)}")

    # Stages.

    def start(self) -> None:
        """Begins the search, or resumes from the newest readable checkpoint."""
        trials, seeds = self.run.trials, self.run.seeds
        self.begin("search", [MemberSpec(trial.arm, trial, seed) for trial in trials for seed in seeds])
        # Orbax restores into arrays of the saved shapes, which do not depend on the stage.
        restored = self.output.restore(self.slots.as_state(self.clock), self.population.metadata)
        if restored is not None:
            self.resume(restored.state, restored.input_position)

    def begin(self, stage: str, entries: Sequence[MemberSpec]) -> None:
        """Starts a stage: fills the slots with its entries, before their first step."""
        self.stage, self.step = stage, 0
        self.slots.fill(self.enter(entries))

    def enter(self, entries: Sequence[MemberSpec]) -> dict[int, Members]:
        """Takes over the entries of a stage, with the batches of a single run with each seed, from the start.

        Returns:
          Their initial members, by number.
        """
        self.entries = list(entries)
        split, size = self.population.data.splits["train"], self.run.train.batch_size
        arrange = self.population.batches.arrange
        self.batches = {
            seed: train_batches(split, batch_size=size, seed=seed, arrange=arrange)
            for seed in dict.fromkeys(entry.seed for entry in entries)
        }
        return {n: self.population.first(entry.trial, entry.seed) for n, entry in enumerate(entries)}

    def begin_report(self) -> None:
        """Starts the next group of report seeds and evaluates its members before their first step."""
        self.group += 1
        if self.group:
            count = self.run.sweep.interim_seeds[self.group - 1]
            self.console.print(
                f"no significant difference in test loss on {count} report seeds; training more"
            )
        self.begin("report", self.report_entries())
        self.clock += 1
        self.record("test")
        self.save()

    def resume(self, state: TrainState, position: dict[str, Any]) -> None:
        """Restores the content of a checkpoint; `start` has begun the search."""
        self.stage, self.step, self.clock = position["stage"], position["step"], int(state.step)
        self.rows, self.seconds, self.group = position["rows"], position["seconds"], position["group"]
        self.chosen = {arm: Trial(*values) for arm, values in position["chosen"].items()}
        entries = self.report_entries() if self.stage == "report" else self.entries
        self.slots.resume(state, self.enter(entries), position["places"])
        for seed, batches in self.batches.items():
            batches.set_state(position["batches"][str(seed)])

    def next_batches(self) -> dict[int, Any]:
        """The next batch of every member."""
        by_seed = {seed: next(batches) for seed, batches in self.batches.items()}
        return {number: by_seed[self.entries[number].seed] for number in self.slots.member_ids}

    def report_entries(self) -> list[MemberSpec]:
        """The selected settings and the control, each on every report seed of the group."""
        trials = dict(self.chosen)
        if "control" in self.run.arms:
            trials["control"] = self.chosen["lora_plus"].control
        seeds = seed_groups(self.run)[self.group]
        return [MemberSpec(arm, trials[arm], seed) for arm in self.run.arms for seed in seeds]

    def stops(self) -> list[int]:
        """Remaining steps of the stage at which its members are evaluated."""
        if self.stage == "search" and len(self.chosen) == len(self.run.searched):
            return []
        sweep, steps = self.run.sweep, self.population.steps
        curve = curve_steps(steps, sweep.curve_points)
        stops = comparison_steps(sweep, steps) if self.stage == "search" else curve
        return [stop for stop in stops if stop > self.step]

    def at_stop(self) -> None:
        """Evaluates all members, drops settings during the search, and writes the report so far."""
        self.clock += 1
        self.record("validation" if self.stage == "search" else "test")
        if self.stage == "search":
            self.choose()
        else:
            self.print_means()
        write_report(self.directory, self.report())

    def record(self, split: str) -> None:
        """Evaluates on a split and records the rows; stops members with a non-finite loss."""
        rows = self.population.data.splits[split]
        results = self.slots.evaluate(rows)
        for number, values in results.items():
            arm, trial, seed = self.entries[number]
            finite = math.isfinite(values["loss"])
            values = finish_metrics(self.population.data.task, values)
            # JSON has no NaN, and the metrics of a diverged member say nothing.
            values = values if finite else dict.fromkeys(values)
            key = {"stage": self.stage, "arm": arm, "trial": list(trial), "seed": seed, "step": self.step}
            self.rows.append({**key, "split": split, **values})
        self.slots.retire(number for number, values in results.items() if not math.isfinite(values["loss"]))

    def choose(self) -> None:
        """Drops settings at a rung; selects an arm's best at the end, or earlier if only one is left."""
        scores = mean_losses(row for row in self.rows if row["step"] == self.step)
        best = {arm: best_trial(scores, arm) for arm in self.run.searched if arm not in self.chosen}
        self.print_scores(scores, best)
        if diverged := [arm for arm, trial in best.items() if trial is None]:
            self.save()
            self.fail(diverged)
        if self.step == self.population.steps:
            self.chosen |= {arm: trial for arm, trial in best.items() if trial is not None}
            return
        selected, remaining = split_at_rung(scores, self.run.sweep.keep)
        self.chosen |= selected
        if remaining:
            self.slots.compact([n for n in self.slots.member_ids if self.entries[n].trial in remaining])

    def fail(self, diverged: Sequence[str]) -> None:
        """Writes what there is and raises TrainingFailed: every setting of these arms diverged."""
        write_report(self.directory, report := self.report())
        if any(row["loss"] is not None for row in report["search"]):
            draw_figures(self.directory, report, ("heat_map",))
        methods = " and of ".join(self.labels[arm] for arm in diverged)
        options = " and ".join(f"sweep.{RATE_OPTIONS[arm, 'learning_rate']}" for arm in diverged)
        raise TrainingFailed(
            f"every setting of {methods} diverged by step {self.step}; set lower {options}; the results "
            f"so far are in {self.directory}"
        )

    # Output files.

    def save(self) -> None:
        """Saves a checkpoint with all results so far."""
        position = {
            "stage": self.stage,
            "group": self.group,
            "step": self.step,
            "places": self.slots.slots,
            "chosen": {arm: list(trial) for arm, trial in self.chosen.items()},
            "batches": {str(seed): batches.get_state() for seed, batches in self.batches.items()},
            "rows": self.rows,
            "seconds": self.seconds + time.perf_counter() - self.started,
        }
        state = self.slots.as_state(self.clock)
        self.output.check()
        save_checkpoint(self.manager, state, metadata=self.population.metadata, input_position=position)
        # Only a copy: a kill before this line loses nothing, as the checkpoint holds the rows.
        write_text(self.directory / METRICS, "".join(to_json(row) + "\n" for row in self.rows))

    def end_if(self, signal: StopSignal) -> None:
        """Raises Stopped if a signal was received; the caller has just saved."""
        if signal.received is not None:
            # Orbax writes in the background; a process that ended now would lose the checkpoint.
            self.manager.wait_until_finished()
            raise Stopped(
                signal.received,
                f"stopped at step {self.step} of the {self.stage}; rerun the same command to resume",
            )

    def report(self) -> dict[str, Any]:
        """The report of all results so far."""
        metric = self.population.data.task.metric
        curve = {
            "curve_steps": curve_steps(self.population.steps, self.run.sweep.curve_points),
            "test_rows": self.population.data.examples["test"],
            "constant": dict(self.population.data.constant),
        }
        report = make_report(self.run, self.rows, self.chosen, self.population.steps, metric, curve)
        return report | self.source()

    def source(self) -> dict[str, Any]:
        """The base and the data of the results, for a comparison that reads them back."""
        return {name: self.population.metadata[name] for name in ("base", "identity")}

    def finish(self) -> dict[str, Any]:
        """Writes the report with its figures, the winner's recipe and, last, the summary."""
        report = self.report()
        self.output.check()
        draw_figures(self.directory, report)
        write_report(self.directory, report, page=True)
        if report["winner"] is None:
            raise TrainingFailed(f"{report['decision']} The results are in {PAGE} and {REPORT}")
        best = self.chosen[report["winner"]["arm"]]
        winner = self.run.settings_of(best, self.run.seed, str(self.directory / "winner"))
        text = yaml.safe_dump(winner.to_json(), sort_keys=False)
        write_text(self.directory / WINNER, text)
        summary = {
            name: report[name]
            for name in ("decision", "verdict", "winner", "command", "member_steps", "ended")
        }
        summary["seconds"] = round(self.seconds + time.perf_counter() - self.started, 1)
        summary["devices"] = f"{self.population.mesh.size} x {jax.devices()[0].device_kind}"
        summary["versions"] = {name: importlib.metadata.version(name) for name in PACKAGES}
        # The last file, as it marks the sweep as finished.
        write_record(self.directory / SUMMARY, summary)
        if self.run.sweep.interim_seeds:
            ended = "decided" if report["ended"]["reason"] == "decided" else "not decided earlier"
            self.console.print(
                f"used {report['ended']['seeds']} of {len(self.run.report_seeds)} report seeds: {ended}"
            )
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
        steps, seeds = self.population.steps, self.run.report_seeds
        stops = " and ".join(map(str, comparison_steps(self.run.sweep, steps)))
        self.console.print(
            f"sweep: {settings} on seed {', '.join(map(str, self.run.seeds))}, compared after {stops} of "
            f"{steps} steps; then the best of each on seeds {', '.join(map(str, seeds))}"
        )
        for line in (*data_lines(self.population.data), *ignored_lines(self.run, self.population.parts)):
            self.console.print(line)
        if names := ignored_fields(self.run):
            self.console.print(f"ignored by the sweep, used when training the winner: {', '.join(names)}")
        if self.clock:
            self.console.print(f"resuming from step {self.step} of the {self.stage}")

    def print_scores(self, scores: Mapping[Trial, float], best: Mapping[str, Trial | None]) -> None:
        """Prints the best setting of each arm and how many diverged."""
        for arm, trial in best.items():
            arm_scores = [score for t, score in scores.items() if t.arm == arm]
            count = sum(not math.isfinite(score) for score in arm_scores)
            text = "none" if trial is None else f"{trial}: validation loss {scores[trial]:.4f}"
            diverged = f", {count} diverged" if count else ""
            self.console.print(
                f"step {self.step}: {self.labels[arm]}, best of {len(arm_scores)} settings{diverged}: {text}"
            )

    def print_means(self) -> None:
        """Prints each arm's mean test loss over the report seeds on which it did not diverge."""
        seeds = {entry.seed for entry in self.entries}
        rows = [
            row
            for row in self.rows
            if (row["stage"], row["step"]) == ("report", self.step) and row["seed"] in seeds
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
        self.console.print(f"step {self.step}: mean test loss on seeds {numbers}: {means}")
