"""Which split decides at each stage of a sweep, on units whose losses are given."""

import types

import pytest

from loraplus_jax.sweep.executor import Opened, run_sweeps
from loraplus_jax.sweep.run import Sweep
from loraplus_jax.sweep.unit import Progress, unit_directory
from loraplus_jax.training.console import LineConsole
from loraplus_jax.training.run_directory import open_output_directory
from loraplus_jax.training.run_files import CHECKPOINTS

# Loss is this times the rate of B: validation favors the smallest rate, test the largest.
SLOPES = {"validation": 1.0, "test": -1.0}


class GivenLosses:
    """Executor of units that train nothing; the last that was submitted finishes first."""

    is_concurrent, workers = True, 3

    def __init__(self, group_size=None):
        self.group_size, self.queue, self.units = group_size, [], []

    def open(self, run, most, members_at_once, group_size):
        task = types.SimpleNamespace(metric="loss", derived=lambda values: {})
        data = types.SimpleNamespace(task=task, examples={"test": 4}, summary=(), constant={})
        abstract = types.SimpleNamespace(data=data, steps=8, shapes=None)
        return Opened(abstract, {"base": None, "identity": {}}, 1, self.group_size or most)  # pyright: ignore

    def submit(self, sweep, unit):
        self.queue.append((sweep, unit))
        self.units.append(unit)

    def wait(self):
        sweep, unit = self.queue.pop()
        slope, rows = SLOPES[unit.split], []
        for stop in unit.stops:
            for arm, trial, seed in unit.members:
                key = {"stage": unit.stage, "arm": arm, "trial": list(trial), "seed": seed, "step": stop}
                loss = 9.0 + slope * trial.learning_rate * trial.lr_ratio
                rows.append({**key, "split": unit.split, "loss": loss})
            sweep.follow(unit, Progress(stop, list(rows)))
        return sweep, unit, {"rows": rows, "devices": "1 x given", "seconds": 0.0}


@pytest.fixture
def ended(tmp_path, monkeypatch, parsed):
    """A sweep on an executor, to its end but for figures and winner."""
    monkeypatch.setattr(Sweep, "print_head", lambda self: None)
    monkeypatch.setattr(Sweep, "finish", lambda self: self.report())

    def end(executor, *options):
        run = parsed(*options, f"--output_dir={tmp_path / 'out'}", "--train.compilation_cache=false")
        with open_output_directory(run, LineConsole(quiet=True), fresh=True) as output:
            sweep = Sweep(run, output, executor)
            return sweep, run_sweeps([sweep], executor)[0]

    return end


@pytest.mark.parametrize("option", ["method=halving", "method=grid", "learning_rates=[1e-3]"])
def test_the_search_selects_on_validation_and_the_report_tests(ended, option):
    sweep, _ = ended(GivenLosses(), f"--sweep.{option}")
    run = sweep.run
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


def test_the_report_does_not_depend_on_the_groups_nor_on_which_ends_first(ended):
    whole = GivenLosses()
    sweep, report = ended(whole, "--sweep.keep=0.5")
    assert [unit.name for unit in whole.units] == ["search-1-0", "search-8-0", "report-0-0"]
    for size in (1, 3):
        split = GivenLosses(size)
        again, same = ended(split, "--sweep.keep=0.5")
        assert (again.rows, same) == (sweep.rows, report)
        assert [len(unit.members) for unit in split.units[: 32 // size]] == [size] * (32 // size)


def test_members_continue_from_the_unit_that_trained_them(ended):
    executor = GivenLosses(3)
    ended(executor, "--sweep.keep=0.5")
    units = {unit.name: unit for unit in executor.units}
    continued = [unit for unit in executor.units if unit.stage == "search" and unit.start]
    assert [len(unit.members) for unit in continued] == [3] * 5 + [1]
    for unit in continued:
        for member, source in zip(unit.members, unit.sources, strict=True):
            assert units[source.unit].members[source.number] == member
            assert len(units[source.unit].members) == source.size
            assert units[source.unit].stops[-1] == unit.start


def test_the_report_is_of_results_not_of_what_a_lost_attempt_told(ended):
    class Told(GivenLosses):
        """Tells losses of its own before each result."""

        def wait(self):
            sweep, unit = self.queue[-1]
            members = [{"arm": arm, "trial": list(trial), "seed": seed} for arm, trial, seed in unit.members]
            key = {"stage": unit.stage, "split": unit.split, "loss": 1.0}
            rows = [key | member | {"step": stop} for stop in unit.stops for member in members]
            sweep.follow(unit, Progress(unit.stops[-1], rows))
            return super().wait()

    sweep, report = ended(Told(3), "--sweep.keep=0.5")
    again, same = ended(GivenLosses(3), "--sweep.keep=0.5")
    assert (sweep.rows, report) == (again.rows, same)


def test_checkpoints_stay_while_units_continue_from_them(ended):
    class Saving(GivenLosses):
        """Has a checkpoint of each unit, and notes those that are there when a unit ends."""

        there = ()

        def wait(self):
            sweep, unit, result = super().wait()
            (unit_directory(sweep.directory, unit.name) / CHECKPOINTS).mkdir(parents=True)
            for source in unit.sources:
                assert (unit_directory(sweep.directory, source.unit) / CHECKPOINTS).exists()
            self.there = {path.parent.name.rpartition("-")[0] for path in sweep.directory.glob("units/*/*")}
            return sweep, unit, result

    executor = Saving(3)
    sweep, _ = ended(executor, "--sweep.keep=0.5")
    # Of the stage before the report, and of the report's own; at the end none.
    assert executor.there == {"search-8", "report-0"}
    assert not list(sweep.directory.glob(f"units/*/{CHECKPOINTS}"))
