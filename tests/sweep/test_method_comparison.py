"""The table of methods, and the settings of each."""

import dataclasses

import pytest

from loraplus_jax.settings.schema import OptimizerSettings
from loraplus_jax.sweep.method_comparison import TABLE, method_run
from loraplus_jax.sweep.settings import MethodName


def test_every_method_of_the_settings_is_in_the_table():
    assert set(MethodName.__args__) == set(TABLE)


def test_a_method_takes_back_what_has_no_effect_with_it(parsed):
    run = parsed("--optimizer.eps", "1e-6", "--sweep.methods", "[lora_muon]")
    muon = dataclasses.replace(OptimizerSettings(), name="lora_muon")
    assert method_run(run, "lora_muon").optimizer == muon
    assert method_run(run, "lora").optimizer == run.optimizer


@pytest.mark.parametrize("name", TABLE)
def test_every_method_has_as_many_settings_and_a_directory_of_its_own(parsed, name):
    tuned = method_run(parsed("--sweep.methods", f"[{name}]"), name)
    assert (len(tuned.trials), tuned.output_dir) == (16, f"o/{name}")
    assert {trial.lr_ratio == 1 for trial in tuned.trials} == {name != "lora_plus"}
