"""The table of methods, the settings of each, and which share a program."""

import dataclasses

import pytest

from loraplus_jax.settings.schema import OptimizerSettings
from loraplus_jax.sweep.arms import TABLE, method_run, programs_of
from loraplus_jax.sweep.settings import MethodName

from ..refusals import refusals


def test_every_method_of_the_settings_is_in_the_table():
    assert set(MethodName.__args__) == set(TABLE)


def test_a_method_takes_back_what_has_no_effect_with_it(parsed):
    run = parsed("--optimizer.eps", "1e-6", "--sweep.methods", "[lora_muon]")
    muon = dataclasses.replace(OptimizerSettings(), name="lora_muon")
    assert method_run(run, "lora_muon").optimizer == muon
    assert method_run(run, "lora").optimizer == run.optimizer


def of_adalora(*options):
    return lambda parsed: programs_of(parsed(*options, "--sweep.methods=[adalora]"))


test_adalora_has_no_patterns = refusals(
    (of_adalora("--lora.rank_pattern={query: 4}"), "sweep.methods adalora", "lora.rank_pattern", "query"),
    (of_adalora("--lora.alpha_pattern={query: 4}"), "sweep.methods adalora", "lora.alpha_pattern", "query"),
)


@pytest.mark.parametrize("name", TABLE)
def test_every_method_has_as_many_settings_and_shares_a_program_if_only_rates_differ(parsed, name):
    programs = programs_of(parsed("--sweep.methods", f"[{name}]"))
    arms = {arm.name: arm for program in programs for arm in program.arms}
    assert list(arms) == [*dict.fromkeys(("lora", name))]
    assert {len(arm.trials) for arm in arms.values()} == {16}
    assert {trial.lr_ratio == 1 for trial in arms[name].trials} == {name != "lora_plus"}
    assert len(programs) == (1 if name in ("lora", "lora_plus") else 2)


def test_a_sweep_of_lambda_has_one_program(parsed):
    (program,) = programs_of(parsed())
    assert [(arm.name, len(arm.trials)) for arm in program.arms] == [
        ("lora", 16),
        ("lora_plus", 16),
        ("control", 0),
    ]
    (program,) = programs_of(parsed("--sweep.control=false"))
    assert [arm.name for arm in program.arms] == ["lora", "lora_plus"]
