"""The table of methods, and the settings of each."""

import dataclasses

import pytest

from loraplus_jax.settings.schema import OptimizerSettings
from loraplus_jax.sweep.method_comparison import TABLE, method_run
from loraplus_jax.sweep.settings import MethodName

from ..messages import mentions


def test_every_method_of_the_settings_is_in_the_table():
    assert set(MethodName.__args__) == set(TABLE)


def test_a_method_takes_back_what_has_no_effect_with_it(parsed):
    run = parsed("--optimizer.eps", "1e-6", "--sweep.methods", "[lora_muon]")
    muon = dataclasses.replace(OptimizerSettings(), name="lora_muon")
    assert method_run(run, "lora_muon").optimizer == muon
    assert method_run(run, "lora").optimizer == run.optimizer


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_adalora_has_no_patterns(parsed, pattern):
    run = parsed(f"--lora.{pattern}", "{query: 4}", "--sweep.methods", "[adalora]")
    with pytest.raises(ValueError, match=mentions("sweep.methods adalora", f"lora.{pattern}", "query")):
        method_run(run, "adalora")


@pytest.mark.parametrize("name", TABLE)
def test_every_method_has_as_many_settings_and_a_directory_of_its_own(parsed, name):
    tuned = method_run(parsed("--sweep.methods", f"[{name}]"), name)
    assert (len(tuned.trials), tuned.output_dir) == (16, f"o/{name}")
    assert {trial.lr_ratio == 1 for trial in tuned.trials} == {name != "lora_plus"}
