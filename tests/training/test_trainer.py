"""Evaluation over all rows once, early stopping, and which split is evaluated when."""

import json
import math
import types
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loraplus_jax.data.batches import train_batches
from loraplus_jax.data.options import DataOptions
from loraplus_jax.models.options import ModelOptions
from loraplus_jax.settings.schema import Settings, TrainSettings
from loraplus_jax.step.problem import Problem
from loraplus_jax.step.sharding import make_mesh
from loraplus_jax.step.train_step import Rows, jit_step, make_eval
from loraplus_jax.tasks.interface import AdaptedModel, TaskData, full_batches
from loraplus_jax.training import run_directory
from loraplus_jax.training import trainer as training
from loraplus_jax.training.console import LineConsole
from loraplus_jax.training.evaluation import evaluate, finish_metrics
from loraplus_jax.training.programs import AbstractRun, Programs
from loraplus_jax.training.setup import Run
from loraplus_jax.training.trainer import Trainer

from ..marks import slow


@pytest.mark.parametrize("size", [1, 2, 5, 7, 100])
def test_a_split_is_averaged_over_all_rows_once(size):
    rng = np.random.default_rng(size)
    arrays = {"x": rng.normal(size=size).astype(np.float32)}

    def eval_fn(trainable, frozen, batch):
        weight = batch["weight"]
        scaled = trainable * frozen * batch["x"] * weight
        return {"loss": (scaled.sum(), weight.sum()), "one": (weight.sum(), weight.sum())}

    found = evaluate(eval_fn, 2.0, 3.0, arrays, 4, make_mesh(4))
    assert found == pytest.approx({"loss": 6 * arrays["x"].mean(), "one": 1.0}, rel=1e-5, abs=1e-6)
    assert all(type(value) is float for value in found.values())


def trainer(values, patience, mode="max"):
    """Only what early stopping looks at."""
    rows = [*enumerate(values, 1)]
    log = types.SimpleNamespace(values=lambda name: rows if name == "validation/m" else [])
    task = types.SimpleNamespace(metric="m", mode=mode)
    return types.SimpleNamespace(settings=TrainSettings(early_stopping=patience), task=task, log=log)


@pytest.mark.parametrize(
    ("values", "patience", "stops"),
    [
        ([], 1, False),
        ([0.5], 1, False),
        ([0.5, 0.5], 1, False),
        ([0.5, 0.6], 1, False),
        ([0.5, 0.6, 0.55], 1, True),
        ([0.5, 0.6, 0.55], 2, False),
        ([0.5, 0.6, 0.55, 0.6], 2, False),
        ([0.5, 0.4, 0.6], 2, False),
        ([0.9, 0.1, 0.1, 0.1], None, False),
        ([math.nan, 0.5, math.nan], 1, True),  # an evaluation without a number is the worst
        ([0.5, math.nan, 0.6], 1, False),
        ([math.nan, math.nan], 1, False),
    ],
)
def test_early_stopping_counts_evaluations_without_a_better_one(values, patience, stops):
    assert Trainer.should_stop(trainer(values, patience)) is stops  # pyright: ignore
    down = trainer([-value for value in values], patience, "min")
    assert Trainer.should_stop(down) is stops  # pyright: ignore


def test_without_early_stopping_no_row_is_looked_at():
    one = trainer([0.5], None)
    one.log.values = None
    assert Trainer.should_stop(one) is False  # pyright: ignore


def test_seconds_of_earlier_starts_count(tmp_path):
    position = {"pending": [], "losses": [], "skipped": 0, "due": False, "files": {}}
    position |= {"rows": 3, "digest": "d", "seconds": 40.0}
    restored = types.SimpleNamespace(state="saved", input_position=position)
    output = types.SimpleNamespace(restore=lambda *_: restored)
    run = types.SimpleNamespace(metadata={})
    one = types.SimpleNamespace(output=output, run=run, state=None, directory=tmp_path, started=100.0)
    assert Trainer.resume(one) == (3, "d")  # pyright: ignore
    assert (one.state, one.started) == ("saved", 60.0)


def numbered(trainable, frozen, batch):
    """A mean, and the rows of a batch."""
    values, weight = batch["x"] * trainable, batch["weight"]
    return {"x": (jnp.sum(values * weight), jnp.sum(weight)), "rows": Rows(values, weight)}


class Summed:
    """A task with a metric from a mean and rows."""

    def derived(self, values):
        return {"both": values["x"] + float(values["rows"].sum())}


@pytest.mark.parametrize("size", [1, 4, 7])
def test_rows_are_kept_in_order_without_padding(size):
    arrays = {"x": np.arange(1, size + 1, dtype=np.float32)}
    found = evaluate(jax.jit(numbered), 2.0, None, arrays, 4, make_mesh(4))
    np.testing.assert_array_equal(found["rows"], 2 * arrays["x"])
    mean = size + 1  # of 2, 4, ... 2 size
    assert finish_metrics(Summed(), found) == {"x": mean, "both": mean + mean * size}  # pyright: ignore


TARGETS = {"train": 9.0, "validation": 2.0, "test": 4.0}


def _descend(variables, batch, rng):
    return (-jnp.sum(jnp.mean(variables["params"]["w"]) * batch["weight"]), jnp.sum(batch["weight"])), {}


def _distance(variables, batch, rng):
    losses = jnp.square(jnp.mean(variables["params"]["w"]) - batch["target"]) * batch["weight"]
    return (jnp.sum(losses), jnp.sum(batch["weight"])), {}


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """A run whose one weight is the number of steps, and whose loss is its squared distance to a split's target."""

    def make(**train):
        settings = Settings(
            model=ModelOptions(path="m"),
            data=DataOptions(path="d"),
            train=TrainSettings(steps=5, batch_size=2, compilation_cache=False, **train),
            method="full",
            output_dir=str(tmp_path / "out"),
        )
        mesh, tx = make_mesh(1), cast(Any, optax.sgd(1.0))
        task: Any = types.SimpleNamespace(metric="loss", mode="min", derived=lambda values: {})
        splits = {name: {"target": np.full(4, target, np.float32)} for name, target in TARGETS.items()}
        data = TaskData(task, splits, dict.fromkeys(splits, 4), {}, {})
        base: Any = None
        parts = AdaptedModel(base, base, {}, {"params": {"w": jnp.zeros(())}}, {})
        step = jit_step(_descend, tx, mesh=mesh, skip_nonfinite=True)
        programs = Programs(step, make_eval(_distance, mesh=mesh))
        batches, notes = full_batches(splits["train"], 2, 64), {"base": None, "task": {}}
        batches = batches._replace(batch=train_batches(splits["train"], batch_size=2))
        losses = {"loss": _descend, "unbounded_loss": _descend, "evaluate": _distance}
        shapes = {"train_batch": batches.train, "eval_batch": batches.evaluate, "batch": batches.batch}
        variables = {"specs": {}, "trainable": parts.trainable, "frozen": {}, "rules": ((".*", ()),)}
        problem = Problem(**losses, **variables, **shapes, steps=5)
        shardings = AbstractRun(problem, mesh, tx).shardings
        made = settings, data, parts, 5, batches, tx, mesh, shardings, programs
        run = Run(*made, None, None, {"base": None, "identity": {}}, notes, None)
        monkeypatch.setattr(training, "prepare", lambda *_, **__: run)
        monkeypatch.setattr(training, "draw_loss", lambda *_: None)
        monkeypatch.setattr(Trainer, "expected_peak", lambda _: 0)  # of programs that are not compiled
        return run

    return make


def _rows(run):
    lines = (Path(run.settings.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_dropout_has_a_key_of_its_own_as_in_a_sweep(make_run):
    """Not the seed's own key, of which the adapters and the head are drawn; a sweep's members have the same."""
    output: Any = types.SimpleNamespace(path=None, manager=None, console=None)
    state = Trainer(make_run(), output).state
    expected = jax.random.fold_in(jax.random.key(make_run().settings.seed), 1)
    np.testing.assert_array_equal(jax.random.key_data(state.rng), jax.random.key_data(expected))


@pytest.mark.parametrize(("select", "selected"), [("best", 2), slow("last", 5)])
def test_validation_selects_the_best_and_test_is_evaluated_before_and_after(make_run, select, selected):
    run = make_run(eval_every=1, select=select)
    summary = training.train(run.settings, console=LineConsole(quiet=True))
    rows = _rows(run)
    evaluated = [(row["step"], name, row[name]) for row in rows for name in row if name.endswith("/loss")]
    assert evaluated == [
        (0, "before/test/loss", 16.0),
        *((n, "validation/loss", (n - 2.0) ** 2) for n in range(1, 6)),
        (selected, "test/loss", (selected - 4.0) ** 2),
    ]
    assert (summary["held_out"]["split"], summary["examples"]) == ("test", run.data.examples)
    assert (summary["before"]["loss"], summary["selected_step"]) == (16.0, selected)
    assert summary["after"]["loss"] == (selected - 4.0) ** 2


def test_initial_values_take_no_memory_beside_the_state(make_run, monkeypatch):
    """In full fine-tuning they are as large as the weights; the check of memory counts only the state."""
    run = make_run(eval_every=5, select="best")
    run = run._replace(parts=run.parts._replace(trainable={"params": {"w": jnp.zeros(1234)}}))
    counts = []

    def counting(function):
        def call(*args, **kwargs):
            counts.append(sum(x.shape == (1234,) for x in jax.live_arrays()))
            return function(*args, **kwargs)

        return call

    programs = Programs(counting(run.programs.step), counting(run.programs.evaluate))
    monkeypatch.setattr(training, "prepare", lambda *_, **__: run._replace(programs=programs))
    monkeypatch.setattr(run_directory, "restore_checkpoint", counting(run_directory.restore_checkpoint))
    training.train(run.settings, console=LineConsole(quiet=True))
    assert counts == [1] * 7 + [0, 1]  # before the best checkpoint is read, the last state is freed
