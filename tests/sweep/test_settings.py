"""What is tried: every field's effect, and what is rejected."""

import dataclasses

import pytest

from loraplus_jax.cli.commands import main
from loraplus_jax.sweep.arms import programs_of
from loraplus_jax.sweep.halving import comparison_steps, curve_steps, survivors
from loraplus_jax.sweep.run import ignored_fields
from loraplus_jax.sweep.settings import SweepSettings
from loraplus_jax.sweep.statistics import report_runs
from loraplus_jax.sweep.trial import Trial

from ..messages import assert_mentions
from ..refusals import refusals


def trials(run):
    return run.trials


def kept(run):
    scores = {Trial(rate, 1.0, 16.0, 8): rate for rate in (0.1, 0.2, 0.3, 0.4)}
    return survivors(scores, run.sweep.keep)


def stops(run):
    return comparison_steps(run.sweep, 100)


def target(run):
    rows = [
        {"stage": "report", "arm": arm, "seed": 1, "split": "validation", "step": 9, "loss": loss}
        for arm, loss in (("lora", 0.5), ("lora_plus", 0.25))
    ]
    return [found["target"] for found in report_runs(rows, 9, run.sweep.target)]


def pissa(run):
    return programs_of(run)[1].arms[0].trials


RATES = [1e-5 * n for n in range(1, 17)]
# In test_device_members.py, test_run.py, test_ray_tasks.py and integration/test_methods.py.
ELSEWHERE = ("members_at_once", "group_size", "widen", "ray", "worker", "unrelated_text")
EFFECTS = [  # field, another value, what shows it, and what else must be set
    ("method", "grid", stops, ()),
    ("learning_rates", "[1e-3]", trials, ()),
    ("lr_ratios", "[3]", trials, ()),
    ("lora_learning_rates", "[1e-3]", trials, ()),
    ("alphas", "[8,16]", trials, ()),
    ("ranks", "[4,8]", trials, ()),
    ("seeds", "[3,4]", lambda run: run.seeds, ()),
    ("report_seeds", "4", lambda run: run.report_seeds, ()),
    ("curve_points", "10", lambda run: curve_steps(300, run.sweep.curve_points), ()),
    ("control", "false", programs_of, ()),
    ("rungs", "[0.5]", stops, ()),
    ("keep", "0.5", kept, ()),
    ("target", "0.4", target, ()),
    ("methods", "[pissa]", lambda run: run.sweep.methods, ()),
    ("method_learning_rates", f"{{pissa: {RATES}}}", pissa, ("--sweep.methods", "[pissa]")),
]


def test_every_field_has_its_effect(capsys):
    named = {name for name, *_ in EFFECTS} | {*ELSEWHERE}
    assert named == {field.name for field in dataclasses.fields(SweepSettings)}
    assert main(["sweep", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"--sweep.{name}" in printed for name in named)


@pytest.mark.parametrize(("name", "value", "proof", "base"), EFFECTS, ids=[row[0] for row in EFFECTS])
def test_changing_a_field_changes_something(parsed, name, value, proof, base):
    assert proof(parsed(*base, f"--sweep.{name}", value)) != proof(parsed(*base))


def test_lora_is_tried_as_often_as_lora_plus_over_the_rates_of_both_factors(parsed):
    run = parsed("--sweep.learning_rates=[1e-4,1e-3]", "--sweep.lr_ratios=[2,10]", "--sweep.ranks=[4,8]")
    lora = [trial for trial in run.trials if trial.arm == "lora"]
    plus = [trial for trial in run.trials if trial.arm == "lora_plus"]
    assert len(lora) == len(plus) == 8
    assert [trial.learning_rate for trial in lora[::2]] == [1e-4, 4.64e-4, 2.15e-3, 1e-2]
    pairs = {(trial.learning_rate, trial.lr_ratio) for trial in plus}
    assert pairs == {(1e-4, 2.0), (1e-4, 10.0), (1e-3, 2.0), (1e-3, 10.0)}
    assert {trial.rank for trial in run.trials} == {4, 8}


def test_the_report_has_other_seeds_than_the_search(parsed):
    assert parsed().report_seeds == (8, 9, 10)
    assert parsed("--sweep.seeds", "[5,11]").report_seeds == (12, 13, 14)


def test_the_single_run_of_a_trial(parsed):
    trial = Trial(1e-3, 2.0, 4.0, 2)
    single = parsed("--train.steps", "9").settings_of(trial, 5, "there")
    lora = single.lora
    assert Trial(single.optimizer.learning_rate, lora.lr_ratio, lora.alpha, lora.rank) == trial
    assert (single.seed, single.output_dir, single.train.steps) == (5, "there", 9)
    assert trial.control == Trial(1e-3, 1.0, 8.0, 2)


def test_the_control_has_lambda_times_the_scale_of_every_module(parsed):
    run = parsed("--lora.alpha=2", '--lora.alpha_pattern={"query": 3}', '--lora.rank_pattern={"key": 4}')
    trial = Trial(1e-3, 2.0, 2.0, 8)
    plain, control = run.settings_of(trial, 0).lora, run.settings_of(trial.control, 0).lora
    assert plain.alpha_pattern == run.lora.alpha_pattern
    for module in ("layers/query", "layers/key", "layers/value"):
        assert control.scale_of(module) == 2 * plain.scale_of(module), module


def test_every_member_trains_a_new_head_at_the_recipes_own_rate(parsed):
    def heads(run):
        tried = [t for trial in run.trials for t in (trial, trial.control)]
        return {run.settings_of(trial, 0).optimizer.head_learning_rate for trial in tried}

    rate = ("--optimizer.learning_rate", "3e-4")
    assert heads(parsed(*rate)) == {3e-4}
    assert heads(parsed(*rate, "--sweep.learning_rates", "[1e-3]")) == {3e-4}
    assert heads(parsed(*rate, "--optimizer.head_learning_rate", "1e-2")) == {1e-2}
    assert heads(parsed(*rate, "--task", "instruction")) == {None}


MANY = [n / 1e5 for n in range(1, 102)]
BAD = {
    '--sweep.alphas=[2,4] --lora.alpha_pattern={"query":2}': ["sweep.alphas", "lora.alpha_pattern", "query"],
    '--sweep.ranks=[2] --lora.rank_pattern={"query":2}': ["sweep.ranks", "lora.rank_pattern", "query"],
    "--lora.alpha=3e38 --optimizer.learning_rate=1e-5": ["alpha", "6e+38", "float32"],
    "--sweep.target=-1": ["sweep.target", 0, -1],
    "--sweep.learning_rates=[]": ["sweep.learning_rates", "empty"],
    "--sweep.learning_rates=[1e-3,0]": ["sweep.learning_rates[1]", 0],
    "--sweep.learning_rates=[.inf]": ["sweep.learning_rates[0]", "inf"],
    "--sweep.lora_learning_rates=[-1]": ["sweep.lora_learning_rates[0]", 0, -1],
    "--sweep.lr_ratios=[1,2]": ["sweep.lr_ratios", 1, "LoRA"],
    "--sweep.lr_ratios=[2,2]": ["sweep.lr_ratios", "distinct", "[2, 2]"],
    "--sweep.ranks=[0]": ["sweep.ranks[0]", 1, 0],
    "--sweep.report_seeds=1": ["sweep.report_seeds", 2, 1],
    "--sweep.report_seeds=1000000000": ["sweep.report_seeds", 2, 1000, 1000000000],
    "--sweep.widen=11": ["sweep.widen", 0, 10, 11],
    "--sweep.widen=1 --sweep.learning_rates=[1e-3]": ["sweep.widen", "0.001", "LoRA+", "more rates"],
    "--sweep.unrelated_text=text.jsonl": ["unrelated_text", "text.jsonl", "null", "sweep.methods"],
    "--sweep.unrelated_text=text.jsonl --sweep.methods=[full]": [
        "unrelated_text",
        "language",
        "classification",
    ],
    "--sweep.group_size=0": ["sweep.group_size", 1, 0],
    '--sweep.worker={"GPU":1}': ["worker", "GPU", "sweep.ray"],
    "--sweep.members_at_once=10001": ["sweep.members_at_once", 1, 10000, 10001],
    f"--sweep.learning_rates={MANY} --sweep.lora_learning_rates=[1e-3] --sweep.ranks={list(range(1, 26))}".replace(
        ", ", ","
    ): ["10,000", "10,125", 1, "sweep.seeds"],
    "--sweep.rungs=[0.5,0.25]": ["sweep.rungs", "increasing", "[0.5, 0.25]"],
    "--sweep.rungs=[1.0]": ["sweep.rungs[0]", 0, 1, 1.0],
    "--sweep.keep=1": ["sweep.keep", 0, 1],
    "--sweep.method=grid --sweep.keep=0.5": ["sweep.keep", "halving"],
    "--sweep.method=halfing": ["sweep.method", "'halving'", "halfing"],
    "--sweep.learnin_rates=[1]": ["--sweep.learnin_rates", "'sweep.learning_rates'"],
    "--sweep.learning_rates=1e-3": ["sweep.learning_rates", "numbers", "null", 0.001],
    "--method=lora": ["method", "lora_plus", "lora"],
    "--init_adapter=there": ["init_adapter"],
    f"--seed={2**32 - 2}": ["2**32"],
}


def with_options(line):
    return lambda parsed: parsed(*line.split())


NARROW = ("--sweep.widen=1", "--sweep.learning_rates=[1e-3]", "--sweep.methods=[pissa,lora_plus]")
test_bad_settings = refusals(
    *((with_options(line), *words) for line, words in BAD.items()),
    (lambda parsed: programs_of(parsed(*NARROW)), "sweep.methods lora, lora_plus: sweep.widen", "0.001"),
    error=ValueError,
)


@pytest.mark.parametrize(
    ("command", "lines", "words"),
    [
        ("sweep", "sweep: {lr_ratio: [2]}", ["'lr_ratio'", "'lr_ratios'"]),
        ("train", "sweep: {}", ["loraplus sweep"]),
    ],
)
def test_a_key_that_a_command_does_not_take_is_named(config, tmp_path, capsys, command, lines, words):
    path = tmp_path / "config.yaml"
    path.write_text(config.read_text() + lines)
    assert main([command, str(path)]) == 2
    assert_mentions(capsys.readouterr().err, "sweep", *words)


def test_fields_of_the_winner_alone_are_named(parsed):
    assert ignored_fields(parsed()) == []
    words = ["--generation.beams=2", "--generation.inputs=3", "--train.prompt=Why?", "--train.steps=5"]
    assert ignored_fields(parsed("--task", "generation", *words)) == ["train.prompt", "generation.beams"]
