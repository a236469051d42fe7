"""The table of methods, and the settings of each."""

import dataclasses

import pytest

from loraplus_jax.settings.parsing import settings_from_json
from loraplus_jax.settings.schema import OptimizerSettings
from loraplus_jax.sweep.methods import TABLE, method_run
from loraplus_jax.sweep.settings import MethodName, SweepRun

LEAST = {"model": {"path": "m"}, "data": {"path": "d"}, "output_dir": "o", "seed": 7}


def test_every_method_of_the_settings_is_in_the_table():
    assert set(MethodName.__args__) == set(TABLE)


def test_a_method_takes_back_what_has_no_effect_with_it():
    run = settings_from_json(
        {**LEAST, "optimizer": {"eps": 1e-6}, "sweep": {"methods": ["lora_muon"]}}, SweepRun
    )
    assert method_run(run, "lora_muon").optimizer == dataclasses.replace(
        OptimizerSettings(), name="lora_muon"
    )
    assert method_run(run, "lora").optimizer == run.optimizer


@pytest.mark.parametrize("name", TABLE)
def test_every_method_has_as_many_settings_and_a_directory_of_its_own(name):
    run = settings_from_json({**LEAST, "sweep": {"methods": [name]}}, SweepRun)
    tuned = method_run(run, name)
    assert (len(tuned.trials), tuned.output_dir) == (16, f"o/{name}")
    assert {trial.lr_ratio == 1 for trial in tuned.trials} == {name != "lora_plus"}
