"""Runs that something disturbs at a step, and what must not depend on it."""

import json

import pytest

from loraplus_jax.training import trainer
from loraplus_jax.training.trainer import Trainer


def rows_of(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "steps_per_second"} for row in rows]


def result_of(out):
    """The adapter, the rows and the summary."""
    summary = json.loads((out / "summary.json").read_text())
    return (out / "adapter/adapter.safetensors").read_bytes(), rows_of(out), {**summary, "seconds": 0}


def undisturbed(first_world, tmp_path_factory, settings):
    """The result of a run of its own that nothing disturbs."""
    world = first_world.copy(tmp_path_factory.mktemp("straight"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "draw_loss", lambda *_: None)
        return result_of(world.trained(*settings))


def at_step(patch, step, act, *, saved=False):
    """Calls `act` while that step's batch is being fetched; with `saved` once all running saves are done."""
    loop = Trainer.loop

    def with_act(self, first):
        batches, fetched, manager = self.batches, [], self.manager

        class Batches:
            get_state = batches.get_state

            def __next__(self):
                fetched.append(1)
                if first + len(fetched) == step:
                    if saved:
                        manager.wait_until_finished()
                    act()
                return next(batches)

        self.batches = Batches()
        return loop(self, first)

    patch.setattr(Trainer, "loop", with_act)
