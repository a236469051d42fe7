"""The protocol between sweeps and what runs their units, on units that train nothing; times by hand."""

import itertools
import types

import pytest

from loraplus_jax.sweep import executor as module
from loraplus_jax.sweep.executor import InProcess, run_sweeps
from loraplus_jax.sweep.makespan import schedule
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


OPTIONS = (
    *("--sweep.learning_rates", "[1e-4,2e-4]", "--sweep.lr_ratios", "[2,4]", "--sweep.control", "false"),
    *("--sweep.rungs", "[0.25]", "--sweep.keep", "0.5", "--sweep.report_seeds", "2"),
)


def steps_of(sweep, unit):
    return len(unit.members) * float(unit.stops[-1] - unit.start)


def test_by_hand(parsed):
    # 8 settings to step 2 of 8, 4 of them to step 8, then 2 arms on 2 seeds: 16 + 24 + 32 steps, in 3 stages.
    run = parsed(*OPTIONS)
    one = schedule([run], 8, 1, 1, steps_of)
    assert (one.makespan, one.work, one.chain, one.bound) == (72, 72, 2 + 6 + 8, 72)
    many = schedule([run], 8, 1, 8, steps_of)
    assert many.makespan == many.bound == many.chain == 16
    # Three workers: 8 units of 2 steps take 3 rounds, 4 of 6 and 4 of 8 two each.
    assert schedule([run], 8, 1, 3, steps_of).makespan == 3 * 2 + 2 * 6 + 2 * 8
    # Groups of 2 members: 4, 2 and 2 units of twice the steps.
    assert schedule([run], 8, 2, 2, steps_of).makespan == 2 * 4 + 12 + 16


def test_sweeps_share_workers_and_each_worker_prepares_each(parsed):
    run = parsed(*OPTIONS)
    both = schedule([run, run], 8, 1, 16, steps_of, preparation=1.0)
    # A preparation at the start, and one by a worker that changes to the other sweep.
    assert (both.makespan, both.bound) == (18, 17)
    assert {span.sweep for span in both.spans} == {0, 1}
    alone = schedule([run, run], 8, 1, 1, steps_of, preparation=1.0)
    # The stages of the two alternate: three preparations of each.
    assert (alone.makespan, alone.work) == (2 * 72 + 6, 2 * 72)


def test_a_worker_runs_one_unit_at_a_time(parsed):
    found = schedule([parsed(*OPTIONS, "--sweep.interim_seeds", "[]")] * 3, 8, 1, 5, steps_of)
    for worker in range(5):
        spans = sorted((span.start, span.end) for span in found.spans if span.worker == worker)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert found.bound <= found.makespan <= found.bound + found.chain
