"""Which split decides at each stage of a sweep, on members whose losses are given."""

import time
import types

import numpy as np
import pytest

from loraplus_jax.data.batches import take_rows
from loraplus_jax.sweep import run as sweeping
from loraplus_jax.training.console import LineConsole
from loraplus_jax.training.signals import StopSignal

# Loss is this times the rate of B: validation favors the smallest rate, test the largest.
SLOPES = {"validation": 1.0, "test": -1.0}


class Slots:
    """Members that do not change; each is its trial."""

    chunks = ()

    def __init__(self, population, size):
        pass

    def fill(self, members):
        self.trials = members
        self.member_ids = list(members)

    def compact(self, kept):
        self.fill({number: self.trials[number] for number in kept})

    def step(self, batches):
        pass

    def retire(self, numbers):
        assert not list(numbers)

    def as_state(self, clock):
        pass

    def evaluate(self, rows):
        slope = float(rows["slope"][0])
        return {n: {"loss": 9.0 + slope * t.learning_rate * t.lr_ratio} for n, t in self.trials.items()}


@pytest.mark.parametrize("option", ["method=halving", "method=grid", "learning_rates=[1e-3]"])
def test_the_search_selects_on_validation_and_the_report_tests(tmp_path, monkeypatch, parsed, option):
    run = parsed(f"--sweep.{option}", "--train.steps=8", "--train.batch_size=2")
    splits = {name: {"slope": np.full(2, slope)} for name, slope in SLOPES.items()}
    task = types.SimpleNamespace(metric="loss", derived=lambda values: {})
    data = types.SimpleNamespace(
        task=task, splits={**splits, "train": {"x": np.zeros(4)}}, examples={"test": 4}
    )
    metadata = {"base": None, "identity": {}}
    batches = types.SimpleNamespace(arrange=take_rows)
    population = types.SimpleNamespace(
        run=run, data=data, steps=8, batches=batches, first=lambda trial, seed: trial, metadata=metadata
    )
    monkeypatch.setattr(sweeping, "DeviceSlots", Slots)
    monkeypatch.setattr(sweeping.Sweep, "print_estimate", lambda self, seconds: None)
    monkeypatch.setattr(sweeping.Sweep, "save", lambda self: None)
    output = types.SimpleNamespace(
        path=tmp_path, manager=None, console=LineConsole(quiet=True), restore=lambda *_: None
    )
    sweep = sweeping.Sweep(population, 32, output, time.perf_counter())  # pyright: ignore
    sweep.start()
    sweep.run_stage(StopSignal())
    sweep.begin_report()
    sweep.run_stage(StopSignal())
    assert {(row["stage"], row["split"]) for row in sweep.rows} == {
        ("search", "validation"),
        ("report", "test"),
    }
    for row in sweep.rows:
        rate, ratio, *_ = row["trial"]
        assert row["loss"] == 9.0 + SLOPES[row["split"]] * rate * ratio
    lowest = {
        arm: min(t.learning_rate * t.lr_ratio for t in run.trials if t.arm == arm) for arm in sweep.chosen
    }
    assert {arm: t.learning_rate * t.lr_ratio for arm, t in sweep.chosen.items()} == lowest
