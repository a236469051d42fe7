"""What runs the units of sweeps, on units that train nothing."""

import asyncio
import signal
import types

import pytest

from loraplus_jax.sweep import executor as module
from loraplus_jax.sweep.executor import InProcess
from loraplus_jax.sweep.method_comparison import MethodSweep
from loraplus_jax.sweep.ray_tasks import RayTasks
from loraplus_jax.sweep.run import Sweep
from loraplus_jax.sweep.unit import Unit
from loraplus_jax.training.console import LineConsole
from loraplus_jax.training.signals import Stopped, StopSignal


def unit(name):
    return Unit(name, "search", (), 0, (8,), "validation")


async def nothing():
    pass


def sweeps(events, pause):
    """Two that await something twice, as stages do; the report is their name."""

    def sweep(name):
        async def train():
            for stage in (1, 2):
                events.append((name, stage))
                await pause()
            return {"of": name}

        return types.SimpleNamespace(train=train)

    return [sweep("a"), sweep("b")]


def test_in_this_process_one_sweep_ends_before_the_next_begins():
    events = []
    reports = InProcess.finish(None, sweeps(events, nothing))  # pyright: ignore
    assert reports == [{"of": "a"}, {"of": "b"}]
    assert events == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]


@pytest.fixture
def on_ray():
    """The executor without a cluster."""
    executor = object.__new__(RayTasks)
    executor.stop = StopSignal()
    return executor


def test_on_ray_all_sweeps_run_at_the_same_time_and_an_error_of_one_ends_all(on_ray):
    events = []
    reports = on_ray.finish(sweeps(events, lambda: asyncio.sleep(0)))
    assert reports == [{"of": "a"}, {"of": "b"}]
    assert events == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]

    async def fail():
        if len(events) == 6:
            raise ValueError("a worker has another base")
        await asyncio.sleep(60)

    with pytest.raises(ValueError, match="another base"):
        on_ray.finish(sweeps(events, fail))
    assert len(events) == 6


def test_on_ray_a_notebook_may_have_a_loop_and_a_signal_is_not_lost(on_ray):
    async def cell():
        return on_ray.finish(sweeps([], nothing))

    assert asyncio.run(cell()) == [{"of": "a"}, {"of": "b"}]
    on_ray.stop._received = signal.SIGINT
    with pytest.raises(Stopped):
        on_ray.finish(sweeps([], nothing))


def test_an_error_of_a_unit_names_its_method(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("its base differs")

    monkeypatch.setattr(module, "run_unit", fail)
    executor = InProcess(LineConsole(quiet=True))
    executor.population = object()  # pyright: ignore

    async def one_unit(self):
        return await executor.run(self, [unit("a1")])

    monkeypatch.setattr(Sweep, "train", one_unit)
    sweep = object.__new__(MethodSweep)
    sweep.run, sweep.directory = types.SimpleNamespace(name="pissa"), tmp_path  # pyright: ignore
    with pytest.raises(ValueError, match=r"^sweep\.methods pissa: its base differs$"):
        executor.finish([sweep])
