"""The training run: batches, steps, evaluations, checkpoints, and what is left in the output directory."""

import contextlib
import importlib.metadata
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..adapter_io import save_adapter
from ..checkpoint import PACKAGES, DamagedCheckpoint, open_manager, restore, save
from ..optim import rate_at
from ..sharding import batch_sharding, distribute, local_rows
from ..train_step import TrainState, init_state, means
from ..tree import combine, count, label_params
from .data import Batch, eval_batches, train_batches
from .family import rows_of
from .fetch import cache_dir
from .hosts import is_first, joined, to_host, wait_for_all
from .language import head_is_frozen
from .lifecycle import (
    ADAPTER,
    CONFIG,
    Stopped,
    StopSignal,
    check_directory,
    keep_results,
    kept_programs,
    named,
    only_run,
    set_aside,
    write_config,
)
from .prepare import Run, prepare
from .report import PICTURE, SUMMARY, RunLog, draw_loss, write_text
from .settings import Settings
from .watch import TrainingFailed, advice, not_finite, spike

CHECKPOINTS, DAMAGED = "checkpoints", "damaged_checkpoints"


def train(settings: Settings, *, fresh: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Trains, evaluates before and after, and writes everything to `settings.output_dir`.

    An unfinished run of the same settings there goes on from its newest checkpoint; `settings.MAY_CHANGE` lists
    what may differ, and a finished run goes on when its end has moved.

    Args:
      settings: the whole run.
      fresh: start over; an older run there is renamed, not deleted.
      console: where to print.

    Returns:
      What `summary.json` holds.

    Raises:
      ValueError, OSError: bad input, found before anything is written.
      Stopped: SIGTERM or Ctrl-C; what was done is saved.
      TrainingFailed: numbers that are not finite.
      LostProcess: one of several processes has ended.
    """
    directory = Path(settings.output_dir).expanduser()
    with contextlib.ExitStack() as stack:
        stack.enter_context(joined(settings.distributed))
        console = (console or Console(soft_wrap=True)) if is_first() else Console(quiet=True)
        changed = check_directory(directory, settings, fresh=fresh)
        if settings.train.compilation_cache:
            stack.enter_context(kept_programs(cache_dir() / "xla", console))
        return _train(settings, directory, changed, fresh, console)


def _train(
    settings: Settings, directory: Path, changed: list[str], fresh: bool, console: Console
) -> dict[str, Any]:
    run = prepare(settings)
    wait_for_all("nobody writes before all have looked")
    with named(directory), contextlib.ExitStack() as stack:
        if is_first():
            stack.enter_context(_own(directory, settings, fresh, console))
        wait_for_all("the directory is there")
        task = run.data.task
        best = f"validation/{task.metric}"
        manager = open_manager(directory / CHECKPOINTS, keep=settings.train.keep, best=best, mode=task.mode)
        try:
            if changed:
                check_end(run, manager)
                if is_first():
                    keep_results(directory)
                    write_config(directory, settings)
                console.print(f"changed since the run was started: {'; '.join(changed)}")
            return Trainer(run, directory, manager, console).run_all()
        finally:
            manager.close()


@contextlib.contextmanager
def _own(directory: Path, settings: Settings, fresh: bool, console: Console) -> Iterator[None]:
    """The output directory, made or taken over, and held."""
    if fresh:
        set_aside(directory, console)
    directory.mkdir(parents=True, exist_ok=True)
    with only_run(directory):
        if not (directory / CONFIG).exists():
            # The first file of a run: by it the directory is known as one, however early the run is killed.
            write_config(directory, settings)
        yield


def check_end(run: Run, manager: ocp.CheckpointManager) -> None:
    """Raises ValueError if the run is past its new end already."""
    done = manager.latest_step() or 0
    if run.steps < done:
        raise ValueError(
            f"train.steps or epochs ends the run at step {run.steps}, and it has done {done} already"
        )


def evaluate(
    eval_fn: Any, trainable: Any, frozen: Any, arrays: Batch, batch_size: int, mesh: Mesh
) -> dict[str, float]:
    """The means over all rows of a split, every row once."""
    totals: Any = None
    for batch in eval_batches(arrays, batch_size, local_rows(mesh, batch_size)):
        pairs = eval_fn(trainable, frozen, place(batch, mesh))
        totals = pairs if totals is None else jax.tree.map(lambda a, b: a + b, totals, pairs)
    return {name: float(value) for name, value in means(totals).items()}


def place(batch: Batch, mesh: Mesh) -> Any:
    """A process's part of a batch on its devices, as one array over the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


class Trainer:
    """One run from its start, or its newest checkpoint, to its summary."""

    def __init__(self, run: Run, directory: Path, manager: ocp.CheckpointManager, console: Console) -> None:
        self.run, self.directory, self.manager, self.console = run, directory, manager, console
        self.task, self.settings = run.data.task, run.settings.train
        self.skipped_in_a_row = 0
        key = jax.random.fold_in(jax.random.key(run.settings.seed), 1)
        self.frozen = distribute(run.parts.frozen, run.shardings.frozen)
        self.initial = distribute(run.parts.trainable, run.shardings.state.trainable)
        self.state: TrainState = distribute(init_state(self.initial, run.tx, key), run.shardings.state)
        self.batches = train_batches(
            run.data.splits["train"],
            batch_size=self.settings.batch_size,
            seed=run.settings.seed,
            rows=local_rows(run.mesh, self.settings.batch_size),
        )
        self.held_out = "test" if "test" in run.data.splits else "validation"
        self.roles = sorted(set(jax.tree.leaves(label_params(run.parts.trainable, run.parts.specs))))
        self.answers: dict[str, str] = {}
        self.pending: list[Any] = []  # the metrics of steps that no row tells of yet

    def run_all(self) -> dict[str, Any]:
        """Everything; returns the summary."""
        started = time.perf_counter()
        rows = self.go_on()
        step = int(self.state.step)
        self.log = RunLog(self.directory, keep=rows, writes=is_first())
        try:
            self.print_head(step)
            before = self.before()
            self.loop(step)
            after = self.finish()
            return self.write_summary(before, after, time.perf_counter() - started)
        finally:
            self.log.close()

    def go_on(self) -> int:
        """Restores the newest checkpoint that can be read, if any; returns how many rows were logged by then."""
        while (step := self.manager.latest_step()) is not None:
            try:
                restored = restore(self.manager, self.state, metadata=self.run.metadata)
            except DamagedCheckpoint as error:
                self.set_aside_damaged(step, error)
                continue
            self.state, position = restored.state, restored.input_position
            self.batches.set_state(position["batches"])
            self.pending, self.skipped_in_a_row = position["pending"], position["skipped"]
            return position["rows"]
        return 0

    def set_aside_damaged(self, step: int, error: DamagedCheckpoint) -> None:
        """Moves a checkpoint that cannot be read out of the way."""
        place = self.directory / DAMAGED / str(step)
        if is_first():
            place.parent.mkdir(exist_ok=True)
            (self.directory / CHECKPOINTS / str(step)).rename(place)
        wait_for_all("a damaged checkpoint is out of the way")
        self.manager.reload()
        self.console.print(f"{error}; it is now {place}, and the one before is used")

    def print_head(self, step: int) -> None:
        """What is about to be trained."""
        sizes = self.run.data.examples
        trained = count(self.run.parts.trainable)
        total = trained + count(self.run.parts.frozen)
        method = self.run.settings.method
        if self.run.config is not None:
            method += f" (rank {self.run.config.rank}, lr_ratio {self.run.config.lr_ratio:g})"
        self.console.print(
            f"{method}: training {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %) "
            f"for {self.run.steps} steps"
        )
        unused = {"lora": "lora.lr_ratio (it is 1)", "full": "the section lora"}.get(self.run.settings.method)
        if self.run.settings.is_language and not head_is_frozen(self.run.parts):
            self.console.print(
                "the head is trained, so the loss needs all logits: model.loss_chunk is not used"
            )
        if unused:
            self.console.print(f"method {self.run.settings.method} does not use {unused}")
        self.console.print("data: " + ", ".join(f"{size:,} {name}" for name, size in sizes.items()))
        if (rows := rows_of(self.run.data.splits["train"])) != sizes["train"]:
            self.console.print(
                f"packed: {rows:,} rows of {self.run.settings.data.max_length} tokens to train on"
            )
        if cut := sum(self.run.data.truncated.values()):
            length = self.run.settings.data.max_length
            self.console.print(
                f"{cut:,} of {sum(sizes.values()):,} examples are longer than {length} tokens and are cut"
            )
        if step:
            self.console.print(f"going on from step {step} of {self.run.steps}")

    def before(self) -> dict[str, float]:
        """The held-out result before the first step, from the log when the run goes on."""
        name = f"{self.held_out}/"
        first = next((row for row in self.log.rows if row["step"] == 0), None)
        if first is None:
            values = self.evaluate(self.state.trainable, self.held_out)
            if not math.isfinite(values["loss"]):
                raise TrainingFailed(
                    "the loss is not finite before any training: look at the weights and the dtype"
                )
            self.log.write(0, {name + key: value for key, value in values.items()})
            first = self.log.rows[-1]
        before = {key.removeprefix(name): value for key, value in first.items() if key.startswith(name)}
        self.console.print(f"before: {self.show(before)} ({self.held_out})")
        if self.run.answer is not None:
            self.answers = {"prompt": self.run.answer.prompt, "before": self.answer(self.initial)}
            self.console.print(f"> {self.answers['prompt']}\nbefore: {self.answers['before']}", markup=False)
        return before

    def answer(self, trainable: Any) -> str:
        """What the model says to the prompt of the settings."""
        assert self.run.answer is not None
        return self.run.answer.ask(combine(trainable, self.frozen))

    def loop(self, step: int) -> None:
        """The steps that are left, with evaluations, checkpoints and early stopping."""
        every = self.settings
        with self.progress() as bar, StopSignal() as stop:
            task = bar.add_task("training", total=self.run.steps, completed=step, loss="", rate="")
            self.clock = time.perf_counter()
            while step < self.run.steps and not self.should_stop():
                batch = place(next(self.batches), self.run.mesh)
                self.state, metrics = self.run.programs.step(self.state, self.frozen, batch)
                self.pending.append(metrics)
                step += 1
                if step % every.log_every == 0 or step == self.run.steps:
                    loss, rate = self.log_row(step)
                    bar.update(task, completed=step, loss=loss, rate=rate)
                if step % every.eval_every == 0 or step == self.run.steps:
                    self.evaluate_and_save(step)
                elif stop.received is not None:
                    self.save(None)
                if stop.received is not None:
                    self.manager.wait_until_finished()
                    message = (
                        f"stopped at step {step} of {self.run.steps}; the same command goes on from there"
                    )
                    raise Stopped(stop.received, message)
        if self.pending:
            self.log_row(step)

    def log_row(self, step: int) -> tuple[str, str]:
        """Turns the pending metrics into a row; returns what the progress bar shows."""
        host = [{name: float(value) for name, value in row.items()} for row in jax.device_get(self.pending)]
        now = time.perf_counter()
        speed, self.clock, self.pending = len(host) / (now - self.clock), now, []
        done = [row for row in host if not row["skipped"]]
        values = {name: float(np.mean([row[name] for row in done])) for name in (done[0] if done else ())}
        values["skipped"] = float(len(host) - len(done))
        if done and (jump := spike([value for _, value in self.log.values("loss")], values)):
            self.console.print(f"step {step}: {jump}")
        rates = {f"rate/{r}": float(rate_at(self.run.tx.groups[r].rate, step - 1)) for r in self.roles}
        self.log.write(step, values | rates | {"steps_per_second": speed})
        self.check_finite(step, host)
        return f"{values.get('loss', math.nan):.4f}", f"{speed:.2f}"

    def check_finite(self, step: int, rows: list[dict[str, float]]) -> None:
        """Ends the run when too many steps in a row were skipped, naming what was not finite."""
        for number, row in enumerate(rows, step - len(rows) + 1):
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if row["skipped"] else 0
            if self.skipped_in_a_row >= self.settings.max_skipped:
                odd = not_finite(row)
                raise TrainingFailed(
                    f"{self.skipped_in_a_row} steps in a row up to step {number} were skipped: not finite were "
                    f"{', '.join(odd)}; {advice(self.run, odd)}; checkpoints up to step "
                    f"{self.manager.latest_step() or 0} are kept"
                )

    def evaluate_and_save(self, step: int) -> None:
        """The validation result goes to the log, to the screen and with a checkpoint."""
        values = self.evaluate(self.state.trainable, "validation")
        if not math.isfinite(values["loss"]):
            tips = advice(self.run, ["grad_norm/a"])
            raise TrainingFailed(
                f"the validation loss at step {step} is not finite; {tips}; checkpoints up to step "
                f"{self.manager.latest_step() or 0} are kept"
            )
        named = {f"validation/{name}": value for name, value in values.items()}
        self.log.write(step, named)
        self.save(named)
        self.clock = time.perf_counter()
        self.console.print(f"step {step}: {self.show(values)} (validation)")

    def save(self, metrics: Mapping[str, float] | None) -> None:
        """A checkpoint with the position of the batch taken last and the metrics that no row tells of yet."""
        pending = [
            {name: float(value) for name, value in row.items()} for row in jax.device_get(self.pending)
        ]
        position = {"batches": self.batches.get_state(), "pending": pending, "rows": len(self.log.rows)}
        position["skipped"] = self.skipped_in_a_row
        save(self.manager, self.state, metadata=self.run.metadata, input_position=position, metrics=metrics)

    def should_stop(self) -> bool:
        """Whether the last evaluations were all worse than the best one before them."""
        patience = self.settings.early_stopping
        values = [value for _, value in self.log.values(f"validation/{self.task.metric}")]
        if patience is None or len(values) <= patience:
            return False
        best = max(values) if self.task.mode == "max" else min(values)
        # Of equals the last counts, as it does for the manager that keeps the best.
        return values[::-1].index(best) >= patience

    def finish(self) -> dict[str, float]:
        """Chooses the state to keep, evaluates it on held-out data and writes the adapter and the picture."""
        if self.settings.select == "best":
            self.manager.wait_until_finished()
            self.choose_best()
        after = self.evaluate(self.state.trainable, self.held_out)
        if self.run.answer is not None:
            self.answers["after"] = self.answer(self.state.trainable)
        self.write_results()
        return after

    def write_results(self) -> None:
        """The adapter, and the picture of how the loss fell."""
        trained = to_host(self.state.trainable)
        if not is_first():
            return
        notes = {name: self.run.metadata[name] for name in ("base", "task")}
        settings = {name: v for name, v in self.run.settings.to_json().items() if name != "output_dir"}
        save_adapter(
            self.directory / ADAPTER,
            self.run.config,
            self.run.parts.specs,
            trained,
            settings=settings,
            **notes,
        )
        title = f"{self.run.settings.method}, {self.run.settings.model.path} on {self.source()}"
        draw_loss(self.directory / PICTURE, self.log, self.task.metric, title)

    def choose_best(self) -> None:
        """The state of the best evaluation whose checkpoint can be read; the one of now if none can."""
        while (best := self.manager.best_step()) is not None:
            try:
                self.state = restore(self.manager, self.state, metadata=self.run.metadata, step=best).state
                return
            except DamagedCheckpoint as error:
                self.set_aside_damaged(best, error)

    def write_summary(self, before: Mapping, after: Mapping, seconds: float) -> dict[str, Any]:
        """`summary.json`, the last thing a run writes: with it the run is finished."""
        trained = count(self.run.parts.trainable)
        summary = {
            "before": dict(before),
            "after": dict(after),
            "held_out": {
                "split": self.held_out,
                "examples": self.run.data.examples[self.held_out],
            },
            **({"answers": self.answers} if self.answers else {}),
            "method": self.run.settings.method,
            "steps": self.log.rows[-1]["step"],
            "skipped_steps": int(sum(value for _, value in self.log.values("skipped"))),
            "selected_step": int(self.state.step),
            "trainable": trained,
            "total": trained + count(self.run.parts.frozen),
            "seconds": round(seconds, 1),
            "devices": f"{self.run.mesh.size} x {jax.devices()[0].device_kind}",
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        }
        if is_first():
            write_text(self.directory / SUMMARY, json.dumps(summary, indent=1) + "\n")
        chosen = "" if summary["selected_step"] == summary["steps"] else f", step {summary['selected_step']}"
        self.console.print(
            f"after:  {self.show(after)} ({summary['held_out']['examples']:,} {self.held_out} examples{chosen})"
        )
        if self.answers:
            self.console.print(f"> {self.answers['prompt']}\nafter:  {self.answers['after']}", markup=False)
        self.console.print(f"{self.directory}: {ADAPTER}/, {SUMMARY}, {PICTURE}, metrics.jsonl, tensorboard/")
        return summary

    def evaluate(self, trainable: Any, split: str) -> dict[str, float]:
        """The means over a split, and what follows from them."""
        arrays, size = self.run.data.splits[split], self.settings.eval_batch_size
        values = evaluate(self.run.programs.evaluate, trainable, self.frozen, arrays, size, self.run.mesh)
        return values | self.task.derived(values)

    def show(self, values: Mapping[str, float]) -> str:
        """Metrics for the screen."""
        return ", ".join(f"{name} {value:.4f}" for name, value in values.items())

    def source(self) -> str:
        """What was trained on, in a word."""
        data = self.run.settings.data
        return Path(data.path or data.train or "").name

    def progress(self) -> Progress:
        """Steps done, loss, step/s and the time left."""
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]} step/s"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
