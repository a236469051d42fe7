"""The table of methods and the settings of each; their comparison, from rows by hand."""

import dataclasses

import pytest

from loraplus_jax.settings.schema import OptimizerSettings
from loraplus_jax.sweep.method_comparison import TABLE, method_run
from loraplus_jax.sweep.method_comparison_report import compare
from loraplus_jax.sweep.settings import MethodName

from ..messages import assert_mentions
from ..refusals import refusals


def test_every_method_of_the_settings_is_in_the_table():
    assert set(MethodName.__args__) == set(TABLE)


def test_a_method_takes_back_what_has_no_effect_with_it(parsed):
    run = parsed("--optimizer.eps", "1e-6", "--sweep.methods", "[lora_muon]")
    muon = dataclasses.replace(OptimizerSettings(), name="lora_muon")
    assert method_run(run, "lora_muon").optimizer == muon
    assert method_run(run, "lora").optimizer == run.optimizer


def of_adalora(*options):
    return lambda parsed: method_run(parsed(*options, "--sweep.methods=[adalora]"), "adalora")


test_adalora_has_no_patterns = refusals(
    (of_adalora("--lora.rank_pattern={query: 4}"), "sweep.methods adalora", "lora.rank_pattern", "query"),
    (of_adalora("--lora.alpha_pattern={query: 4}"), "sweep.methods adalora", "lora.alpha_pattern", "query"),
)


@pytest.mark.parametrize("name", TABLE)
def test_every_method_has_as_many_settings_and_a_directory_of_its_own(parsed, name):
    tuned = method_run(parsed("--sweep.methods", f"[{name}]"), name)
    assert (len(tuned.trials), tuned.output_dir) == (16, f"o/{name}")
    assert {trial.lr_ratio == 1 for trial in tuned.trials} == {name != "lora_plus"}


LABELS = {"lora": "LoRA", "dora": "DoRA", "pissa": "PiSSA"}


def result(losses, chosen=2e-3, rates=(1e-3, 2e-3, 4e-3), accuracies=(0.5, 0.5, 0.5), constant=0.4):
    """What a method's sweep reports: a search of three rates, and losses on seeds 1 to 3, from 1 to 3 at first."""
    search = {"stage": "search", "step": 4, "loss": 0.5, "seed": 0}
    rows = [search | {"trial": [rate, 1.0, 16.0, 8]} for rate in rates]
    for seed, loss in enumerate(losses, 1):
        for step, value, accuracy in ((0, float(seed), seed / 8), (10, loss, accuracies[seed - 1])):
            rows.append({"stage": "report", "trial": [chosen, 1.0, 16.0, 8], "seed": seed, "step": step})
            rows[-1] |= {"split": "test", "loss": value, "accuracy": accuracy}
    trial = {"learning_rate": chosen, "lr_ratio": 1.0, "alpha": 16.0, "rank": 8}
    return {"rows": rows, "chosen": {"lora": trial}, "steps": 10, "metric": "accuracy"} | {
        "mode": "max",
        "constant": {"accuracy": constant},
    }


@pytest.fixture
def run(parsed):
    return parsed("--sweep.methods", "[dora,pissa]")


def test_intervals_edges_and_the_first_line(run):
    results = {"lora": result([0.5, 0.6, 0.7]), "dora": result([0.4, 0.49, 0.61])}
    results["pissa"] = result([0.5, 0.5, 0.9], chosen=4e-3, rates=(1e-3, 2e-3, 3e-3, 4e-3))
    report = compare(run, LABELS, results)
    assert [m["settings"] for m in report["methods"].values()] == [3, 3, 4]
    # Differences -0.10, -0.11, -0.09: mean -0.1, error 0.01 / sqrt(3), t of 0.9875 with two degrees 6.2053.
    interval = report["methods"]["dora"]["against_lora"]["test_loss"]
    half = 6.2053 * 0.01 / 3**0.5
    found = [interval[name] for name in ("low", "mean", "high")]
    assert found == pytest.approx([-0.1 - half, -0.1, -0.1 + half], abs=1e-5)
    assert report["methods"]["dora"]["against_lora"]["steps_ratio"]["mean"] > 1
    said = ("Lower test loss than tuned LoRA: DoRA -0.1000", "3 paired seeds", "97.5 %")
    assert_mentions(report["verdict"], *said, "the edge of the search range", "PiSSA (learning_rate)")
    assert [m["at_the_edge"] for m in report["methods"].values()] == [[], [], ["learning_rate"]]
    search = report["methods"]["dora"]["search"]
    assert [(row["learning_rate"], row["seed"], row["step"], row["loss"]) for row in search] == [
        (rate, 0, 4, 0.5) for rate in (1e-3, 2e-3, 4e-3)
    ]


def test_a_method_that_diverged_on_a_seed_has_no_result(run):
    losses = {"lora": [0.5, 0.6, 0.7], "dora": [0.4, 0.49, None], "pissa": [0.5, 0.6, 0.9]}
    report = compare(run, LABELS, {name: result(values) for name, values in losses.items()})
    assert report["methods"]["dora"]["diverged"] == 1
    assert_mentions(report["verdict"], "No method has a significantly lower test loss", "no result: DoRA")
    assert_mentions(report["verdict"], "the lowest difference is that of PiSSA, +0.0667 [")
    assert_mentions(report["verdict"], "diverged on a seed: DoRA;")


def test_a_method_is_compared_with_a_constant_answer(run):
    accuracies = {"lora": (0.5, 0.6, 0.7), "dora": (0.41, 0.41, 0.41), "pissa": (0.4, 0.4, 0.4)}
    results = {name: result([0.5, 0.6, 0.7], accuracies=values) for name, values in accuracies.items()}
    report = compare(run, LABELS, results)
    # Means 0.6 and a deviation of 0.1, by the t of 0.9875 with two degrees.
    over = report["methods"]["lora"]["over_constant"]
    assert (over["mean"], over["low"]) == pytest.approx((0.2, 0.2 - 6.2053 * 0.1 / 3**0.5), abs=1e-5)
    assert report["methods"]["dora"]["over_constant"]["low"] == pytest.approx(0.01)
    assert_mentions(report["verdict"], "not significantly better than a constant answer: LoRA, PiSSA")
    assert report["protocol"]["constant"] == {"accuracy": 0.4}
    # The mean of the seeds' 1/8, 2/8 and 3/8, and of 1, 2 and 3.
    assert report["protocol"]["untrained"] == {"accuracy": 0.25, "loss": 2.0}
