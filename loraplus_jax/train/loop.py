"""The training run: batches, steps, evaluations, checkpoints, and what is left in the output directory."""

import importlib.metadata
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import yaml
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..adapter_io import save_adapter
from ..checkpoint import PACKAGES, differences, open_manager, restore, save
from ..optim import rate_at
from ..sharding import replicate
from ..train_step import DATA_AXIS, TrainState, init_state, jit_step, make_eval, means
from ..tree import count, label_params
from .data import Batch, eval_batches, train_batches
from .fetch import cache_dir
from .prepare import Run, prepare
from .report import PICTURE, SUMMARY, RunLog, draw_loss, write_text
from .settings import Settings

CONFIG, CHECKPOINTS, ADAPTER = "config.yaml", "checkpoints", "adapter"


def train(settings: Settings, *, fresh: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Trains, evaluates before and after, and writes everything to `settings.output_dir`.

    An unfinished run of the same settings there goes on from its newest checkpoint.

    Args:
      settings: the whole run.
      fresh: start over; an older run there is renamed, not deleted.
      console: where to print.

    Returns:
      What `summary.json` holds.

    Raises:
      ValueError, OSError: bad input, found before anything is written.
    """
    console = console or Console()
    directory = Path(settings.output_dir)
    check_directory(directory, settings, fresh=fresh)
    if settings.train.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
    run = prepare(settings)
    if fresh:
        set_aside(directory, console)
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / CONFIG, yaml.safe_dump(settings.to_json(), sort_keys=False))
    task = run.data.task
    manager = open_manager(
        directory / CHECKPOINTS,
        keep=settings.train.keep,
        best=f"validation/{task.metric}",
        mode=task.mode,
    )
    try:
        return Trainer(run, directory, manager, console).run_all()
    finally:
        manager.close()


def check_directory(directory: Path, settings: Settings, *, fresh: bool) -> None:
    """Raises ValueError unless the run may start or go on in the directory."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not directory.is_dir():
        raise ValueError(f"output_dir {directory} is a file")
    if not (directory / CONFIG).is_file():
        raise ValueError(f"output_dir {directory} holds files that are not a run's; choose another directory")
    if fresh:
        return
    other = "choose another --output_dir, or start over with --fresh (the old run is renamed, not deleted)"
    old = yaml.safe_load((directory / CONFIG).read_text(encoding="utf-8"))
    new = settings.to_json()
    if found := differences({**old, "output_dir": None}, {**new, "output_dir": None}):
        found = [text.replace("the checkpoint", "that run") for text in found]
        raise ValueError(
            f"output_dir {directory} holds a run with other settings: {'; '.join(found)}; {other}"
        )
    if (directory / SUMMARY).exists():
        raise ValueError(f"the run in {directory} is finished, its results are in {SUMMARY}; {other}")


def set_aside(directory: Path, console: Console) -> None:
    """Renames an older run to the first free `DIRECTORY.N`."""
    if directory.exists():
        number = next(n for n in range(1, 10**6) if not directory.with_name(f"{directory.name}.{n}").exists())
        old = directory.rename(directory.with_name(f"{directory.name}.{number}"))
        console.print(f"the older run is now {old}")


def evaluate(
    eval_fn: Any, trainable: Any, frozen: Any, arrays: Batch, batch_size: int, mesh: Mesh
) -> dict[str, float]:
    """The means over all rows of a split, every row once."""
    totals: Any = None
    for batch in eval_batches(arrays, batch_size):
        pairs = eval_fn(trainable, frozen, place(batch, mesh))
        totals = pairs if totals is None else jax.tree.map(lambda a, b: a + b, totals, pairs)
    return {name: float(value) for name, value in means(totals).items()}


def place(batch: Batch, mesh: Mesh) -> Any:
    """A process's part of a batch on its devices, as one array over the mesh."""
    sharding = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


class Trainer:
    """One run from its start, or its newest checkpoint, to its summary."""

    def __init__(self, run: Run, directory: Path, manager: ocp.CheckpointManager, console: Console) -> None:
        self.run, self.directory, self.manager, self.console = run, directory, manager, console
        self.task, self.settings = run.data.task, run.settings.train
        loss_fn = self.task.loss_fn(run.parts.model)
        self.step_fn = jit_step(loss_fn, run.tx, mesh=run.mesh, accumulate=self.settings.accumulate)
        self.eval_fn = make_eval(loss_fn, mesh=run.mesh)
        key = jax.random.fold_in(jax.random.key(run.settings.seed), 1)
        self.frozen = replicate(run.mesh, run.parts.frozen)
        self.state: TrainState = replicate(run.mesh, init_state(run.parts.trainable, run.tx, key))
        self.batches = train_batches(
            run.data.splits["train"],
            batch_size=self.settings.batch_size,
            seed=run.settings.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        self.held_out = "test" if "test" in run.data.splits else "validation"
        self.roles = sorted(set(jax.tree.leaves(label_params(run.parts.trainable, run.parts.specs))))

    def run_all(self) -> dict[str, Any]:
        """Everything; returns the summary."""
        started = time.perf_counter()
        step = self.go_on()
        self.log = RunLog(self.directory, step=step)
        try:
            self.print_head(step)
            before = self.before()
            self.loop(step)
            after = self.finish()
            return self.write_summary(before, after, time.perf_counter() - started)
        finally:
            self.log.close()

    def go_on(self) -> int:
        """Restores the newest checkpoint, if there is one; returns the step to go on from."""
        if self.manager.latest_step() is None:
            return 0
        restored = restore(self.manager, self.state, metadata=self.run.metadata)
        self.state = restored.state
        self.batches.set_state(restored.input_position)
        return int(self.state.step)

    def print_head(self, step: int) -> None:
        """What is about to be trained."""
        sizes = {name: len(arrays["label"]) for name, arrays in self.run.data.splits.items()}
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
        if unused:
            self.console.print(f"method {self.run.settings.method} does not use {unused}")
        self.console.print("data: " + ", ".join(f"{size:,} {name}" for name, size in sizes.items()))
        for name, cut in self.run.data.truncated.items():
            if cut:
                self.console.print(
                    f"{cut} {name} texts are longer than {self.run.settings.data.max_length} tokens"
                )
        if step:
            self.console.print(f"going on from step {step} of {self.run.steps}")

    def before(self) -> dict[str, float]:
        """The held-out result before the first step, from the log when the run goes on."""
        name = f"{self.held_out}/"
        first = next((row for row in self.log.rows if row["step"] == 0), None)
        if first is None:
            values = self.evaluate(self.state.trainable, self.held_out)
            self.log.write(0, {name + key: value for key, value in values.items()})
            first = self.log.rows[-1]
        before = {key.removeprefix(name): value for key, value in first.items() if key.startswith(name)}
        self.console.print(f"before: {self.show(before)} ({self.held_out})")
        return before

    def loop(self, step: int) -> None:
        """The steps that are left, with evaluations, checkpoints and early stopping."""
        pending: list[Any] = []
        clock = time.perf_counter()
        with self.progress() as bar:
            task = bar.add_task("training", total=self.run.steps, completed=step, loss="", rate="")
            while step < self.run.steps and not self.should_stop():
                self.state, metrics = self.step_fn(
                    self.state, self.frozen, place(next(self.batches), self.run.mesh)
                )
                pending.append(metrics)
                step += 1
                if step % self.settings.log_every == 0 or step == self.run.steps:
                    values = self.averaged(pending, step)
                    now = time.perf_counter()
                    values["steps_per_second"], clock = len(pending) / (now - clock), now
                    self.log.write(step, values)
                    pending = []
                    bar.update(
                        task,
                        completed=step,
                        loss=f"{values['loss']:.4f}",
                        rate=f"{values['steps_per_second']:.2f}",
                    )
                if step % self.settings.eval_every == 0 or step == self.run.steps:
                    self.evaluate_and_save(step)
                    clock = time.perf_counter()

    def averaged(self, pending: list[Any], step: int) -> dict[str, float]:
        """The means of the metrics of some steps, and the rates of the last."""
        host = jax.device_get(pending)
        values = {name: float(np.mean([row[name] for row in host])) for name in host[0]}
        rates = {f"rate/{r}": float(rate_at(self.run.tx.groups[r].rate, step - 1)) for r in self.roles}
        return values | rates

    def evaluate_and_save(self, step: int) -> None:
        """The validation result goes to the log, to the screen and with a checkpoint."""
        values = self.evaluate(self.state.trainable, "validation")
        named = {f"validation/{name}": value for name, value in values.items()}
        self.log.write(step, named)
        position = self.batches.get_state()
        save(self.manager, self.state, metadata=self.run.metadata, input_position=position, metrics=named)
        self.console.print(f"step {step}: {self.show(values)} (validation)")

    def should_stop(self) -> bool:
        """Whether the last evaluations brought nothing better."""
        patience = self.settings.early_stopping
        values = [value for _, value in self.log.values(f"validation/{self.task.metric}")]
        if patience is None or len(values) <= patience:
            return False
        best = max if self.task.mode == "max" else min
        first_best = values.index(best(values))
        return len(values) - 1 - first_best >= patience

    def finish(self) -> dict[str, float]:
        """Chooses the state to keep, evaluates it on held-out data and writes the adapter and the picture."""
        if self.settings.select == "best":
            self.manager.wait_until_finished()
            best = self.manager.best_step()
            self.state = restore(self.manager, self.state, metadata=self.run.metadata, step=best).state
        after = self.evaluate(self.state.trainable, self.held_out)
        self.log.write(
            int(self.state.step), {f"{self.held_out}_after/{name}": v for name, v in after.items()}
        )
        notes = {name: self.run.metadata[name] for name in ("base", "settings", "task")}
        save_adapter(
            self.directory / ADAPTER, self.run.config, self.run.parts.specs, self.state.trainable, **notes
        )
        title = f"{self.run.settings.method}, {self.run.settings.model.path} on {self.source()}"
        draw_loss(self.directory / PICTURE, self.log, self.task.metric, title)
        return after

    def write_summary(self, before: Mapping, after: Mapping, seconds: float) -> dict[str, Any]:
        """`summary.json`, the last thing a run writes: with it the run is finished."""
        trained = count(self.run.parts.trainable)
        summary = {
            "before": dict(before),
            "after": dict(after),
            "held_out": {
                "split": self.held_out,
                "examples": len(self.run.data.splits[self.held_out]["label"]),
            },
            "method": self.run.settings.method,
            "steps": self.log.values("loss")[-1][0],
            "selected_step": int(self.state.step),
            "trainable": trained,
            "total": trained + count(self.run.parts.frozen),
            "seconds": round(seconds, 1),
            "devices": f"{self.run.mesh.size} x {jax.devices()[0].device_kind}",
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        }
        write_text(self.directory / SUMMARY, json.dumps(summary, indent=1) + "\n")
        chosen = "" if summary["selected_step"] == summary["steps"] else f", step {summary['selected_step']}"
        self.console.print(
            f"after:  {self.show(after)} ({summary['held_out']['examples']:,} {self.held_out} texts{chosen})"
        )
        self.console.print(f"{self.directory}: {ADAPTER}/, {SUMMARY}, {PICTURE}, metrics.jsonl, tensorboard/")
        return summary

    def evaluate(self, trainable: Any, split: str) -> dict[str, float]:
        """The means over a split."""
        arrays = self.run.data.splits[split]
        return evaluate(
            self.eval_fn, trainable, self.frozen, arrays, self.settings.eval_batch_size, self.run.mesh
        )

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
