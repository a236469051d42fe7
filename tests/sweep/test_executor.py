"""What runs the units of sweeps, on units that train nothing."""

import asyncio
import types

import pytest

from loraplus_jax.sweep import executor as module
from loraplus_jax.sweep.executor import InProcess
from loraplus_jax.sweep.method_comparison import MethodSweep
from loraplus_jax.sweep.ray_tasks import RayTasks
from loraplus_jax.sweep.unit import Unit
from loraplus_jax.training.console import LineConsole

from ..messages import mentions


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


def test_on_ray_all_sweeps_run_at_the_same_time_and_an_error_of_one_ends_all():
    events = []
    reports = RayTasks.finish(None, sweeps(events, lambda: asyncio.sleep(0)))  # pyright: ignore
    assert reports == [{"of": "a"}, {"of": "b"}]
    assert events == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]

    async def fail():
        if len(events) == 6:
            raise ValueError("a worker has another base")
        await asyncio.sleep(60)

    with pytest.raises(ValueError, match="another base"):
        RayTasks.finish(None, sweeps(events, fail))  # pyright: ignore
    assert len(events) == 6


def test_an_error_of_a_unit_names_its_method(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("its base differs")

    monkeypatch.setattr(module, "run_unit", fail)
    run = types.SimpleNamespace(name="pissa")
    sweep = types.SimpleNamespace(run=run, directory=tmp_path, allow_different=())
    sweep.named = lambda: MethodSweep.named(sweep)  # pyright: ignore
    executor = InProcess(LineConsole(quiet=True))
    executor.population = object()  # pyright: ignore
    with pytest.raises(ValueError, match=mentions("sweep.methods pissa", "its base differs")):
        executor.run(sweep, [unit("a1")]).send(None)  # pyright: ignore
