"""The training loop: steps, evaluations, checkpoints, resuming, and the files in the output directory."""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .._utils.allocator import keep_memory, release_memory
from .._utils.atomic import to_json, write_text
from .._utils.multihost import allgather, gather_to_host, is_lead
from .._utils.records import check_digests, file_digests, write_record
from ..adapter.tree import combine, count
from ..interop.adapter_directory import save_adapter
from ..optim.trained_ranks import final_ranks
from ..settings.schema import Settings
from ..step.checkpoint import add_metrics, save_checkpoint
from ..step.run_metadata import package_versions
from ..step.sharding import distribute, shard_batch, take_local
from ..step.train_step import TrainState, init_state
from ..tasks.chat_generation import prompt_chat
from ..tasks.interface import held_out_split, row_count
from .adapter_start import saved_form, write_start
from .anomalies import (
    SpikeHistory,
    TrainingFailed,
    advice,
    check_skipped,
    find_spikes,
    index_of_skip_limit,
    metrics_to_host,
)
from .console import LineConsole, ProgressLines, format_metrics, header, lines_only, progress
from .distributed import idle_gpus, join_processes, raise_together
from .estimate import batches_of, estimate_rest, estimate_run, format_seconds
from .evaluation import evaluate, finish_metrics
from .memory import expected_peak
from .metrics_log import PICTURE, SUMMARY, TEXTS, RunLog, draw_loss
from .run_directory import OutputDirectory, archive_results, open_output_directory, write_config
from .run_files import ADAPTER
from .setup import Run, prepare
from .signals import Stopped, StopSignal
from .theory_metrics import copy_adapters, first_rows, read_metrics, to_metrics
from .trackers import Reports, check_trackers

SHOWN_TEXTS = 5


def train(
    settings: Settings,
    *,
    fresh: bool = False,
    allow_different: Sequence[str] = (),
    console: LineConsole | None = None,
) -> dict[str, Any]:
    """Trains, evaluates before and after, and writes all results to `settings.output_dir`.

    An unfinished run there with the same settings resumes from its newest checkpoint. Only the settings in
    `RESUMABLE_FIELDS` may differ; a finished run resumes if one of `STOP_FIELDS` changes.

    Args:
      settings: the settings of the run.
      fresh: start over; an existing run is renamed, not deleted.
      allow_different: parts of the base model or data that may differ from those of the run to resume, or of
        `init_adapter`; see `PARTS`.
      console: where to print, by default a `LineConsole`.

    Returns:
      The contents of `summary.json`.

    Raises:
      ValueError, OSError: invalid input, raised before any file is written; or a file cannot be written.
      Stopped: SIGTERM or Ctrl-C stopped the run after its state was saved.
      TrainingFailed: training produced non-finite values.
      LostProcess: another process of the run is gone.
    """
    began = time.perf_counter()
    with join_processes(settings.distributed), keep_memory():
        console = lines_only(console) if is_lead() else LineConsole(quiet=True)
        with raise_together():
            if is_lead():  # which alone reports
                check_trackers(settings.train.report_to)
        with open_output_directory(settings, console, fresh=fresh, allow_different=allow_different) as output:
            run = prepare(settings, allow_different, fresh=fresh)
            output.claim()
            output.check_origin(run.origin)
            with raise_together():
                if is_lead() and run.start is not None and settings.init_adapter is None:
                    write_start(output.path, run.start, run.parts.specs, settings.applied, run.origin)
            output.open_manager(best=f"validation/{run.data.task.metric}", mode=run.data.task.mode)
            return Trainer(run, output).run_to_end(began)


class Trainer:
    """Runs training from the start, or from the newest checkpoint, to the summary."""

    def __init__(self, run: Run, output: OutputDirectory) -> None:
        self.run, self.output = run, output
        self.directory, self.manager, self.console = output.path, output.manager, output.console
        self.task, self.settings = run.data.task, run.settings.train
        self.stop = StopSignal()
        self.history = SpikeHistory()
        self.evaluation_pending = False  # of the newest checkpoint
        # Dropout's key. The seed's own key is split for the head and the adapters.
        key = jax.random.fold_in(jax.random.key(run.settings.seed), 1)
        # No copy: the weights were loaded into these shardings.
        self.frozen = distribute(run.parts.frozen, run.shardings.frozen)
        # One program: eager operations would each be compiled. The state takes the memory of the initial values.
        make_state = jax.jit(
            lambda trainable: init_state(trainable, run.tx, key),
            out_shardings=run.shardings.state,
            donate_argnums=0,
        )
        self.state: TrainState = make_state(distribute(run.parts.trainable, run.shardings.state.trainable))
        self.held_out = held_out_split(run.data.splits)
        self.answers: dict[str, str] = {}
        self.ranks: dict[str, Any] = {}
        self.pending: list[Any] = []  # metrics of steps that are not logged yet
        self.started = time.perf_counter()  # less the seconds of earlier starts, once the run has resumed
        self.timed_steps = 0  # steps since `clock` that this process has trained
        self.clock = time.perf_counter()

    def run_to_end(self, began: float) -> dict[str, Any]:
        """Resumes if possible, trains, evaluates and writes the results; returns the summary.

        `began` is when the run's preparation did, by `time.perf_counter`.
        """
        if allgather(self.manager.latest_step())[0] is not None:  # it will replace the initial values
            self.ask_prompt("before", self.state.trainable)
        rows, digest = self.resume()
        self.step = step = int(self.state.step)
        if changed := self.output.changed:  # only now is it known that the run can resume
            if self.run.steps < step:
                raise ValueError(
                    f"train.steps or train.epochs ends the run at step {self.run.steps}, but it has already done "
                    f"{step} steps; raise it"
                )
            if is_lead():
                archive_results(self.directory)
                write_config(self.directory, self.run.settings)
            self.console.print(f"settings changed since the run started: {'; '.join(changed)}")
        self.log = RunLog(
            self.directory,
            keep=rows,
            digest=digest,
            writes=is_lead(),
            check=self.output.check,
            open_reports=self.open_reports,
        )
        finished = False
        try:
            self.restore_metrics()
            # A signal before this ends the process at once: there is nothing new to save.
            with self.stop:
                for line in (*header(self.run, step), *idle_gpus()):
                    self.console.print(line)
                seconds = format_seconds(time.perf_counter() - began)
                self.console.print(f"loading and compiling took {seconds}")
                before = self.evaluate_before()
                self.loop(step)
                after = self.finish()
                summary = self.write_summary(before, after)
                finished = True
                return summary
        finally:
            self.log.close(finished=finished)

    def open_reports(self, logged: list[tuple[int, dict[str, float]]]) -> Reports:
        """Opens the trackers of `train.report_to`."""
        config, check = self.run.settings.to_json(), self.output.check
        return Reports(self.settings.report_to, self.directory, config, logged, self.console, check)

    def check_stop(self) -> None:
        """Raises Stopped if a signal was received, once running saves are done."""
        # Orbax writes in the background; a process that ended now would lose the checkpoint.
        save = self.manager.wait_until_finished
        self.stop.check(f"stopped at step {self.step} of {self.run.steps}", save)

    def resume(self) -> tuple[int, str | None]:
        """Restores the newest readable checkpoint, if any; returns the number and digest of the rows before it."""
        restored = self.output.restore(self.state, self.run.metadata)
        if restored is None:
            return 0, None
        self.state, position = restored.state, restored.input_position
        self.pending = position["pending"]
        self.history = SpikeHistory(tuple(position["losses"]), position["skipped"])
        self.evaluation_pending = position["due"]
        self.started -= position["seconds"]
        # Texts from before training cannot be generated again.
        check_digests(self.directory, position["files"], "start over with --fresh")
        return position["rows"], position["digest"]

    def restore_metrics(self) -> None:
        """Writes metrics of checkpoints that are missing or damaged again, from the log: they decide the best."""
        decisive = f"validation/{self.task.metric}"
        rows = {row["step"]: row for row in self.log.rows if math.isfinite(row.get(decisive, math.nan))}
        steps = [step for step in self.manager.all_steps() if step in rows and not self.manager.metrics(step)]
        # The list of the lead process, on all: `add_metrics` waits for every process.
        for step in allgather(steps)[0]:
            self.console.print(
                f"the metrics of checkpoint {step} are damaged or missing; restored from the log"
            )
            add_metrics(self.manager, step, {k: v for k, v in rows[step].items() if k != "step"})

    def evaluate_before(self) -> dict[str, float]:
        """Evaluates on held-out data before the first step, or returns what a resumed run logged then."""
        prefix = f"{self.held_out}/"
        # A resumed run has it in the log; its own state is past the first step.
        row = next((row for row in self.log.rows if row["step"] == 0), None)
        is_resumed = row is not None
        if row is None:
            values = self.evaluate_timed()
            if not math.isfinite(values["loss"]):
                raise TrainingFailed(
                    "the loss is not finite before training: check the weights, model.dtype and model.param_dtype"
                )
            values |= self.score_texts(self.state.trainable, "before")
            self.log.write(0, {f"before/{prefix}{name}": value for name, value in values.items()})
            self.ask_prompt("before", self.state.trainable)
            row = self.log.rows[-1]
        elif (remaining := self.run.steps - self.step) and (speeds := self.log.values("steps_per_second")):
            self.console.print(
                f"{estimate_rest(remaining, [speed for _, speed in speeds], self.expected_peak())}"
            )
        before = {name.removeprefix(f"before/{prefix}"): row[name] for name in row if name != "step"}
        if not is_resumed:
            self.console.print(f"before: {format_metrics(before)} ({self.held_out}{self.constant_answer})")
            self.print_answer("before")
        return before

    def evaluate_timed(self) -> dict[str, float]:
        """Evaluates on held-out data, and prints from its time how long the run will take."""
        run, memory, began = self.run, self.expected_peak(), time.perf_counter()
        values = self.evaluate(self.state.trainable, self.held_out)
        batches = batches_of(run.data.splits[self.held_out], run.batches.eval_rows)
        seconds = (time.perf_counter() - began) / batches
        self.console.print(f"{estimate_run(run, self.held_out, seconds, memory)}")
        return values

    @property
    def constant_answer(self) -> str:
        """What to print beside held-out metrics: the decisive one of the constant answer, if the task has one."""
        metric, constant = self.task.metric, self.run.data.constant
        return f"; constant answer: {format_metrics({metric: constant[metric]})}" if constant else ""

    def expected_peak(self) -> int:
        """The expected peak memory in bytes."""
        return expected_peak(self.run.programs.compiled, self.run.mesh.local_devices)

    def ask_prompt(self, when: str, trainable: Any) -> None:
        """Stores the model's answer to `train.prompt`, if there is one."""
        if self.run.chat_model is not None and (prompt := self.settings.prompt) is not None:
            variables = combine(trainable, self.frozen)
            chat = prompt_chat(prompt, self.run.settings.task)
            (answer,) = self.run.chat_model.answer(variables, [chat])
            self.answers |= {"prompt": prompt, when: answer}

    def print_answer(self, when: str) -> None:
        """Prints `train.prompt` and the model's answer, which may have several lines."""
        if self.answers:
            text = f"> {self.answers['prompt']}\n{when + ':':7} {self.answers[when]}"
            self.console.print(*text.split("\n"), sep="\n")

    def score_texts(self, trainable: Any, when: str) -> dict[str, float]:
        """Generates texts for held-out inputs, writes them to a file and prints a few; returns their scores."""
        if self.run.held_out_texts is None:
            return {}
        texts = self.run.held_out_texts
        between = self.between_batches("text batch", len(texts.inputs), texts.batch_size)
        rows, scores = texts.generate(combine(trainable, self.frozen), between)
        if is_lead():
            lines = (to_json(row, ensure_ascii=False) + "\n" for row in rows)
            write_text(self.directory / TEXTS[when], "".join(lines))
        for i in np.unique(np.linspace(0, len(rows) - 1, SHOWN_TEXTS).astype(int)):
            row = rows[i]
            lines = [f"> {row['mr']}", f"{when + ':':10} {row['text']}", f"reference: {row['references'][0]}"]
            self.console.print(*lines, sep="\n")
        return scores

    def between_batches(self, unit: str, rows: int, batch_size: int) -> Callable[[], None]:
        """Returns what to call before each batch: it prints progress, and raises Stopped after a signal."""
        lines = ProgressLines(self.console, unit, -(-rows // batch_size))
        batches = itertools.count()

        def between() -> None:
            lines.update(next(batches))
            # Of several processes, one that left would keep the others waiting in a collective.
            if jax.process_count() == 1:
                self.check_stop()

        return between

    def loop(self, step: int) -> None:
        """Runs the remaining steps, with evaluations, checkpoints and early stopping."""
        with progress(self.console) as bar:
            task = bar.add_task("training", total=self.run.steps, completed=step, loss="", rate="")
            validated = {at for at, _ in self.log.values("validation/loss")}
            if step == self.run.steps and step not in validated:  # ends where it was stopped
                if self.pending:
                    self.log_row(step)
                self.evaluation_pending = True
            if self.evaluation_pending:
                self.evaluate_and_save(step)
            self.clock, lines = time.perf_counter(), ProgressLines(self.console, "step", self.run.steps, step)
            ends = self.should_stop()
            while step < self.run.steps and not ends:
                batch = take_local(self.run.batches.batch(self.run.settings.seed, step), self.run.mesh)
                every = self.settings.theory_every
                is_measured = every is not None and (step + 1) % every == 0
                before = copy_adapters(self.state.trainable) if is_measured else None
                rows = shard_batch(batch, self.run.mesh)
                self.state, metrics = self.run.programs.step(self.state, self.frozen, rows)
                # They stay on the devices: to read them here would wait for the step.
                self.pending.append(metrics)
                self.timed_steps += 1
                self.step = step = step + 1
                stopping = self.stop.is_due(step)
                if is_measured:
                    part = first_rows(batch, self.run.mesh, self.run.batches.train_rows)
                    rows = shard_batch(part, self.run.mesh)
                    terms = self.run.programs.theory(self.state.trainable, before, self.frozen, rows)
                    self.log.write(step, to_metrics(terms, self.run.parts.specs))
                if step % self.settings.log_every == 0 or step == self.run.steps or self.has_too_many_skips():
                    loss, rate = self.log_row(step)
                    bar.update(task, completed=step, loss=loss, rate=rate)
                if bar.disable:
                    lines.update(step, loss=metrics["loss"])
                if step % self.settings.eval_every == 0 or step == self.run.steps:
                    self.evaluate_and_save(step)
                    lines.restart(step)
                    ends = self.should_stop()
                elif stopping:
                    self.save(None)
                if stopping:
                    self.check_stop()
        if self.pending:
            self.log_row(step)
        if step < self.run.steps:
            patience = self.settings.early_stopping
            self.console.print(
                f"stopped at step {step:,} of {self.run.steps:,}: {self.task.metric} has not improved in "
                f"{patience} evaluations (train.early_stopping)"
            )

    def log_row(self, step: int) -> tuple[str, str]:
        """Logs the pending metrics as one row; returns loss and speed for the progress bar."""
        host, first = metrics_to_host(self.pending), step - len(self.pending) + 1
        history, spikes = find_spikes(self.history, first, host)
        for spike in spikes:
            self.log.write(spike.step, spike.values())
            tips = advice(self.run, [])
            self.console.print(f"{spike}; if the loss stays high, {tips}")
        now = time.perf_counter()
        speed = self.timed_steps / (now - self.clock)
        speeds = {"steps_per_second": speed} if self.timed_steps else {}
        self.clock, self.timed_steps, self.pending = now, 0, []
        done = [row for row in host if not row["skipped"]]
        values = {name: float(np.mean([row[name] for row in done])) for name in (done[0] if done else ())}
        values["skipped"] = float(len(host) - len(done))
        rates = {name: value for name, value in host[-1].items() if name.startswith("rate/")}
        self.log.write(step, values | rates | speeds)
        check_skipped(self.run, self.history, first, host, self.manager.latest_step() or 0)
        self.history = history
        return f"{values.get('loss', math.nan):.4f}", f"{speed:.2f}"

    def has_too_many_skips(self) -> bool:
        """Whether too many consecutive steps were skipped, not counting the step in flight."""
        before = self.pending[:-1]
        # Waits only for this flag, so that at most two steps are in flight.
        if not before or not before[-1]["skipped"]:
            return False
        limit = self.settings.max_skipped
        return index_of_skip_limit(self.history, metrics_to_host(before), limit) is not None

    def evaluate_and_save(self, step: int) -> None:
        """Evaluates on the validation split, logs and prints the result, and saves a checkpoint."""
        jax.block_until_ready(self.state)
        began = time.perf_counter()
        if jax.process_count() > 1 and not self.evaluation_pending:
            # No process may leave an evaluation that the others are in, so save the state first.
            self.save(None, evaluation_pending=True)
            self.evaluation_pending = True
        try:
            values = self.evaluate(self.state.trainable, "validation")
        except Stopped:
            # The resumed run evaluates: a large split may take longer than the grace period before a kill.
            if not self.evaluation_pending:
                self.save(None, evaluation_pending=True)
                self.manager.wait_until_finished()
            raise
        if not math.isfinite(values["loss"]):
            tips = advice(self.run, [])
            raise TrainingFailed(
                f"the validation loss is not finite at step {step}; {tips}; checkpoints up to step "
                f"{self.manager.latest_step() or 0} are kept"
            )
        metrics = {f"validation/{name}": value for name, value in values.items()}
        self.log.write(step, metrics)
        if self.evaluation_pending:
            self.manager.wait_until_finished()
            add_metrics(self.manager, step, metrics)
            self.evaluation_pending = False
        else:
            self.save(metrics)
        self.clock += time.perf_counter() - began  # the speed is that of training
        self.console.print(f"step {step}: {format_metrics(values)} (validation)")

    def save(self, metrics: Mapping[str, float] | None, *, evaluation_pending: bool = False) -> None:
        """Saves a checkpoint with the position in the log and the metrics that are not logged yet."""
        self.log.sync()  # resuming needs the rows, so they are on disk before the checkpoint
        texts = [TEXTS["before"]] if self.run.held_out_texts is not None else []
        position = {
            "pending": metrics_to_host(self.pending),
            "rows": len(self.log.rows),
            "digest": self.log.digest(),
            **self.history._asdict(),
            "due": evaluation_pending,
            "files": file_digests(self.directory, texts),
            "seconds": time.perf_counter() - self.started,
        }
        save_checkpoint(
            self.manager, self.state, metadata=self.run.metadata, input_position=position, metrics=metrics
        )

    def should_stop(self) -> bool:
        """Whether the last `train.early_stopping` evaluations after a step were all worse than the best of them."""
        if (patience := self.settings.early_stopping) is None:
            return False
        sign = 1 if self.task.mode == "max" else -1
        values = [sign * value for _, value in self.log.values(f"validation/{self.task.metric}")]
        if len(values) <= patience:
            return False
        values = [-math.inf if math.isnan(value) else value for value in values]
        # Among ties the latest counts, as in the checkpoint manager that keeps the best.
        return values[::-1].index(max(values)) >= patience

    def finish(self) -> dict[str, float]:
        """Selects the final state, evaluates it on held-out data, and writes the adapter and the loss plot."""
        if self.settings.select == "best":
            self.manager.wait_until_finished()
            if (best := self.output.restore(self.state, self.run.metadata, best=True)) is not None:
                self.state = best.state
        trainable, settings, specs = self.state.trainable, self.run.settings, self.run.parts.specs
        after = self.evaluate(trainable, self.held_out) | self.score_texts(trainable, "after")
        # Without a test split: `validation/` has a row for each evaluation already.
        prefix = "test/" if self.held_out == "test" else f"after/{self.held_out}/"
        self.log.write(int(self.state.step), {prefix + name: value for name, value in after.items()})
        self.ask_prompt("after", trainable)
        # A collective, so every process takes part, though only the lead process writes.
        trained = gather_to_host(trainable)
        if settings.optimizer.target_rank is not None:
            self.ranks = final_ranks(trained["lora"], specs)
        self.log.sync()  # what the results follow from is on disk before them
        if is_lead():
            notes: dict[str, Any] = self.run.origin | {"task": self.run.metadata["task"]}
            notes["settings"] = {k: v for k, v in settings.to_json().items() if k != "output_dir"}
            trained, specs, config, start = saved_form(trained, specs, settings.applied, self.run.start)
            save_adapter(self.directory / ADAPTER, trained, specs, config, start=start, **notes)
            source = ", ".join(Path(file).name for file in settings.data.sources)
            title = f"{settings.method}, {settings.model.path} on {source}"
            draw_loss(self.directory / PICTURE, self.log, self.task.metric, title)
        return after

    def write_summary(self, before: Mapping, after: Mapping) -> dict[str, Any]:
        """Writes `summary.json`, which marks the run as finished, and prints the results."""
        trained, texts, settings = count(self.run.parts.trainable), self.run.held_out_texts, self.run.settings
        theory = read_metrics(self.log.rows, settings.applied, settings.init_adapter is not None)
        constant = dict(self.run.data.constant)
        optional = {"constant": constant, "answers": self.answers, "theory": theory, "ranks": self.ranks}
        optional["allowed_differences"] = [*self.output.differences, *self.run.differences]
        held_out = {"split": self.held_out, "examples": self.run.data.examples[self.held_out]}
        summary = {
            "before": dict(before),
            "after": dict(after),
            "examples": dict(self.run.data.examples),
            "held_out": held_out | ({} if texts is None else {"inputs": len(texts.inputs)}),
            **{name: value for name, value in optional.items() if value},
            "method": settings.method,
            "steps": self.step,
            "stopped_early": self.step < self.run.steps,
            "skipped_steps": int(sum(value for _, value in self.log.values("skipped"))),
            "selected_step": int(self.state.step),
            "trainable": trained,
            "total": trained + count(self.run.parts.frozen),
            "seconds": round(time.perf_counter() - self.started, 1),
            "devices": f"{self.run.mesh.size} x {jax.devices()[0].device_kind}",
            "versions": package_versions(),
        }
        if is_lead():
            # Last of all files: with it the run counts as finished.
            write_record(self.directory / SUMMARY, summary)
        chosen = "" if summary["selected_step"] == summary["steps"] else f", step {summary['selected_step']}"
        details = f"{held_out['examples']:,} {self.held_out} examples{chosen}{self.constant_answer}"
        self.console.print(f"after:  {format_metrics(after)} ({details})")
        if theory:
            self.console.print(f"theory: {theory}")
        self.print_answer("after")
        self.console.print(
            f"results in {self.directory}: {ADAPTER}/, {SUMMARY}, {PICTURE}, metrics.jsonl, tensorboard/"
            + (f", {TEXTS['after']}" if texts else "")
        )
        return summary

    def evaluate(self, trainable: Any, split: str) -> dict[str, float]:
        """Returns the metrics on a split: means, and the task's metrics derived from them."""
        arrays, size = self.run.data.splits[split], self.run.batches.eval_rows
        program = self.run.programs.evaluate
        between = self.between_batches(f"{split} batch", row_count(arrays), size)
        release_memory()  # a step's, as evaluation needs other blocks
        values = evaluate(program, trainable, self.frozen, arrays, size, self.run.mesh, between=between)
        release_memory()
        return finish_metrics(self.task, values)
