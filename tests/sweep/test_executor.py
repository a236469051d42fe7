"""The protocol between sweeps and what runs their units, on units that train nothing."""

import types

import pytest

from loraplus_jax.sweep import executor as module
from loraplus_jax.sweep.executor import InProcess, run_sweeps
from loraplus_jax.sweep.method_comparison import MethodSweep
from loraplus_jax.sweep.unit import Unit
from loraplus_jax.training.console import LineConsole

from ..messages import mentions


def unit(name):
    return Unit(name, "search", (), 0, (8,), "validation")


class Stages:
    """Two stages of two units; the report is what came of them."""

    def __init__(self, name, stored=()):
        self.name, self.stored, self.followed = name, stored, []

    def stages(self):
        first = yield [unit(f"{self.name}1"), unit(f"{self.name}2")]
        second = yield [unit(f"{self.name}3"), unit(f"{self.name}4")]
        return [result["of"] for result in (*first, *second)]

    def stored_result(self, unit):
        return {"of": unit.name, "rows": ["stored"]} if unit.name in self.stored else None

    def follow(self, unit, progress):
        self.followed.append((unit.name, progress.step, progress.rows))


class Recorded:
    """Runs the unit that was submitted last."""

    workers = 2

    def __init__(self, is_concurrent):
        self.is_concurrent, self.queue, self.ran = is_concurrent, [], []

    def submit(self, sweep, unit):
        self.queue.append((sweep, unit))

    def wait(self):
        sweep, unit = self.queue.pop()
        self.ran.append(unit.name)
        return sweep, unit, {"of": unit.name, "rows": []}


@pytest.mark.parametrize("is_concurrent", [False, True])
def test_every_stage_waits_for_all_of_its_units_and_gets_their_results_in_order(is_concurrent):
    executor, sweeps = Recorded(is_concurrent), [Stages("a"), Stages("b")]
    reports = run_sweeps(sweeps, executor)  # pyright: ignore
    assert reports == [["a1", "a2", "a3", "a4"], ["b1", "b2", "b3", "b4"]]
    one, other = ("b", "a") if is_concurrent else ("a", "b")
    assert executor.ran == [f"{name}{n}" for name in (one, other) for n in (2, 1, 4, 3)]
    assert sorted(sweeps[0].followed) == [(f"a{n}", 8, []) for n in (1, 2, 3, 4)]


def test_a_stored_result_is_not_computed_again():
    executor, sweep = Recorded(True), Stages("a", stored=("a1", "a2", "a4"))
    assert run_sweeps([sweep], executor) == [["a1", "a2", "a3", "a4"]]  # pyright: ignore
    assert executor.ran == ["a3"]
    assert ("a1", 8, ["stored"]) in sweep.followed


def test_an_error_of_a_unit_names_its_method(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("its base differs")

    monkeypatch.setattr(module, "run_unit", fail)
    run = types.SimpleNamespace(name="pissa")
    sweep = types.SimpleNamespace(run=run, directory=tmp_path, allow_different=())
    sweep.named = lambda: MethodSweep.named(sweep)  # pyright: ignore
    executor = InProcess(LineConsole(quiet=True))
    executor.population = object()  # pyright: ignore
    executor.submit(sweep, unit("a1"))  # pyright: ignore
    with pytest.raises(ValueError, match=mentions("sweep.methods pissa", "its base differs")):
        executor.wait()
