"""What runs the units of sweeps, on units that train nothing."""

import asyncio
import signal
import types

import pytest

from loraplus_jax.sweep.executor import InProcess
from loraplus_jax.sweep.ray_tasks import RayTasks
from loraplus_jax.training.signals import Stopped, StopSignal


async def nothing():
    pass


def programs(events, pause):
    """The stages of two, which await something twice."""

    def stages(name):
        async def train():
            for stage in (1, 2):
                events.append((name, stage))
                await pause()

        return types.SimpleNamespace(train=train)

    return [stages("a"), stages("b")]


def test_in_this_process_one_program_ends_before_the_next_begins():
    events = []
    InProcess.finish(None, programs(events, nothing))  # pyright: ignore
    assert events == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]


@pytest.fixture
def on_ray():
    """The executor without a cluster."""
    executor = object.__new__(RayTasks)
    executor.stop = StopSignal()
    return executor


def test_on_ray_all_programs_run_at_the_same_time_and_an_error_of_one_ends_all(on_ray):
    events = []
    on_ray.finish(programs(events, lambda: asyncio.sleep(0)))
    assert events == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]

    async def fail():
        if len(events) == 6:
            raise ValueError("a worker has another base")
        await asyncio.sleep(60)

    with pytest.raises(ValueError, match="another base"):
        on_ray.finish(programs(events, fail))
    assert len(events) == 6


def test_on_ray_a_notebook_may_have_a_loop_and_a_signal_is_not_lost(on_ray):
    events = []

    async def cell():
        on_ray.finish(programs(events, nothing))

    asyncio.run(cell())
    assert len(events) == 4
    on_ray.stop._received = signal.SIGINT
    with pytest.raises(Stopped):
        on_ray.finish(programs([], nothing))
