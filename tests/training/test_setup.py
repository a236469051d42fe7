"""How many steps a run takes."""

import pytest

from loraplus_jax.settings.schema import (
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    Settings,
    TrainSettings,
)
from loraplus_jax.training.setup import count_steps

from ..messages import mentions


def settings(train=None, **optimizer):
    return Settings(
        model=ModelSettings(path="m"),
        data=DataSettings(path="d"),
        train=train or TrainSettings(),
        optimizer=OptimizerSettings(**optimizer),
        output_dir="o",
    )


@pytest.mark.parametrize(
    ("train", "examples", "steps"),
    [
        ({"steps": 7}, 32, 7),
        ({}, 100, 3 * 3),
        ({"epochs": 1}, 100, 3),
        ({"epochs": 2.5}, 100, 8),
        ({"epochs": 0.01}, 100, 1),
        ({"epochs": 2, "batch_size": 50, "accumulate": 5}, 100, 4),
    ],
)
def test_steps_in_all(train, examples, steps):
    assert count_steps(settings(TrainSettings(**train)), examples) == steps


def test_steps_are_checked_against_batch_and_warm_up():
    with pytest.raises(ValueError, match=mentions("train.batch_size", 32, 31)):
        count_steps(settings(), 31)
    with pytest.raises(ValueError, match=mentions("optimizer.warmup_steps", 9)):
        count_steps(settings(warmup_steps=9), 100)
    assert count_steps(settings(warmup_steps=8), 100) == 9
