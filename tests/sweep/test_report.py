"""The report of a sweep and its pictures, from rows by hand."""

import re
import types

import pytest

from loraplus_jax.sweep.arms import Arm, programs_of
from loraplus_jax.sweep.figures import heat_map_cells
from loraplus_jax.sweep.report import make_report, measured
from loraplus_jax.sweep.trial import Trial

from ..messages import assert_mentions

DATA = types.SimpleNamespace(
    task=types.SimpleNamespace(metric="accuracy", mode="max"),
    examples={"test": 4},
    constant={"accuracy": 0.4},
)


def test_every_best_value_at_an_edge_names_the_option_that_widens_the_range(parsed):
    options = {
        "learning_rates": [1e-3, 2e-3, 4e-3],
        "lr_ratios": [2.0, 4.0],
        "lora_learning_rates": [1e-3, 8e-3],
    }
    run = parsed(*(f"--sweep.{name}={value}" for name, value in options.items()))
    (program,) = programs_of(run)
    for best in run.trials:
        report = make_report(run, program.arms, [], {best.arm: best}, [], 8, DATA, {})
        lines = report["at_the_edge"]
        found = {name for line in lines for name in re.findall(r"--sweep\.(\w+)", line)}
        tried = {"learning_rates": best.learning_rate, "lr_ratios": best.lr_ratio}
        if best.arm == "lora":
            tried = {"lora_learning_rates": best.learning_rate}
        ends = {name for name, value in tried.items() if value in (min(options[name]), max(options[name]))}
        assert found == ends


def row(rate, ratio, step, loss, alpha=16.0):
    return {"learning_rate": rate, "lr_ratio": ratio, "alpha": alpha, "rank": 8, "step": step, "loss": loss}


SEARCH = [
    row(1e-3, 1.0, 5, 0.6),
    row(1e-3, 4.0, 5, 0.5),
    row(1e-2, 1.0, 5, 0.7),
    row(1e-2, 4.0, 5, None),
    row(1e-3, 1.0, 40, 0.4),
    row(1e-3, 4.0, 40, 0.3),
]


def test_cells_are_those_of_the_last_rung():
    cells, dropped = heat_map_cells(SEARCH)
    assert cells == {(1e-3, 1e-3): 0.4, (1e-3, 4e-3): 0.3, (1e-2, 1e-2): None, (1e-2, 4e-2): None}
    assert dropped == {(1e-2, 1e-2): 5}


LABELS = {"lora": "LoRA", "lora_plus": "LoRA+", "dora": "DoRA", "pissa": "PiSSA"}


def method(losses, chosen=2e-3, rates=(1e-3, 2e-3, 4e-3), accuracies=(0.5, 0.5, 0.5)):
    """A method's rates, best setting and rows: a search, and losses on seeds 1 to 3, from 1 to 3 at first."""
    trials = tuple(Trial(rate, 1.0, 16.0, 8) for rate in rates)
    rows = [{"stage": "search", "step": 4, "loss": 0.5, "seed": 0, "trial": list(trial)} for trial in trials]
    for seed, loss in enumerate(losses, 1):
        for step, value, accuracy in ((0, float(seed), seed / 8), (10, loss, accuracies[seed - 1])):
            rows.append({"stage": "report", "trial": [chosen, 1.0, 16.0, 8], "seed": seed, "step": step})
            rows[-1] |= {"split": "test", "loss": value, "accuracy": accuracy}
    return trials, Trial(chosen, 1.0, 16.0, 8), rows


@pytest.fixture
def compare(parsed):
    """The report of methods, by name."""

    def report(methods, results=()):
        run = parsed("--sweep.methods", "[dora,pissa]")
        arms = [Arm(name, LABELS[name], trials) for name, (trials, _, _) in methods.items()]
        rows = [row | {"arm": name} for name, (_, _, own) in methods.items() for row in own]
        chosen = {name: best for name, (_, best, _) in methods.items() if best is not None}
        diverged = [name for name in methods if name not in chosen]
        return make_report(run, arms, rows, chosen, diverged, 10, DATA, measured(results, list(methods)))

    return report


def against_lora(report, name):
    return next(row for row in report["comparisons"] if row["first"] == name)


def test_intervals_edges_and_the_verdict(compare):
    methods = {"lora": method([0.5, 0.6, 0.7]), "dora": method([0.4, 0.49, 0.61])}
    methods["pissa"] = method([0.5, 0.5, 0.9], chosen=4e-3, rates=(1e-3, 2e-3, 3e-3, 4e-3))
    report = compare(methods)
    assert report["protocol"]["settings"] == {"lora": 3, "dora": 3, "pissa": 4}
    # Differences -0.10, -0.11, -0.09: mean -0.1, error 0.01 / sqrt(3), t of 0.9875 with two degrees 6.2053.
    interval = against_lora(report, "dora")["test_loss"]
    half = 6.2053 * 0.01 / 3**0.5
    found = [interval[name] for name in ("low", "mean", "high")]
    assert found == pytest.approx([-0.1 - half, -0.1, -0.1 + half], abs=1e-5)
    assert against_lora(report, "dora")["steps_ratio"]["mean"] > 1
    said = ("Lower test loss than tuned LoRA: DoRA -0.1000", "3 paired seeds", "97.5 %")
    assert_mentions(report["verdict"], *said, "the edge of the search range", "PiSSA (learning_rate)")
    assert [m["at_the_edge"] for m in report["methods"].values()] == [[], [], ["learning_rate"]]
    (line,) = report["at_the_edge"]
    assert_mentions(line, "PiSSA: learning_rate 0.004", "--sweep.method_learning_rates")
    search = [row for row in report["search"] if row["arm"] == "dora"]
    assert [(row["learning_rate"], row["step"], row["loss"]) for row in search] == [
        (rate, 4, 0.5) for rate in (1e-3, 2e-3, 4e-3)
    ]


def test_a_method_that_diverged_on_a_seed_has_no_result(compare):
    losses = {"lora": [0.5, 0.6, 0.7], "dora": [0.4, 0.49, None], "pissa": [0.5, 0.6, 0.9]}
    report = compare({name: method(values) for name, values in losses.items()})
    assert report["methods"]["dora"]["diverged"] == 1
    assert_mentions(report["verdict"], "No method has a significantly lower test loss", "no result: DoRA")
    assert_mentions(report["verdict"], "the lowest difference is that of PiSSA, +0.0667 [")
    assert_mentions(report["verdict"], "diverged on a seed: DoRA;")


def test_a_method_is_compared_with_a_constant_answer(compare):
    accuracies = {"lora": (0.5, 0.6, 0.7), "dora": (0.41, 0.41, 0.41), "pissa": (0.4, 0.4, 0.4)}
    methods = {name: method([0.5, 0.6, 0.7], accuracies=values) for name, values in accuracies.items()}
    report = compare(methods)
    # Means 0.6 and a deviation of 0.1, by the t of 0.9875 with two degrees.
    over = report["methods"]["lora"]["over_constant"]
    assert (over["mean"], over["low"]) == pytest.approx((0.2, 0.2 - 6.2053 * 0.1 / 3**0.5), abs=1e-5)
    assert report["methods"]["dora"]["over_constant"]["low"] == pytest.approx(0.01)
    assert_mentions(report["verdict"], "not significantly better than a constant answer: LoRA, PiSSA")
    assert report["protocol"]["constant"] == {"accuracy": 0.4}
    # The mean of the seeds' 1/8, 2/8 and 3/8, and of 1, 2 and 3.
    assert report["protocol"]["untrained"] == {"accuracy": 0.25, "loss": 2.0}


@pytest.mark.parametrize(("accuracies", "says"), [((0.4, 0.3, 0.41), True), ((0.69, 0.7, 0.71), False)])
def test_a_sweep_of_lambda_says_that_no_method_is_better_than_a_constant_answer(parsed, accuracies, says):
    run = parsed("--sweep.control=false")
    trials, best, rows = method([0.5, 0.6, 0.7], accuracies=accuracies)
    arms = [Arm(name, LABELS[name], trials) for name in ("lora", "lora_plus")]
    rows = [row | {"arm": arm.name} for arm in arms for row in rows]
    report = make_report(run, arms, rows, {arm.name: best for arm in arms}, [], 10, DATA, {})
    assert report["complete"]
    assert ("constant answer" in report["decision"]) == says


def test_of_a_method_whose_settings_have_all_diverged_no_seed_did(compare):
    trials, _, rows = method([0.5, 0.6, 0.7])
    gone = [row | {"loss": None} for row in rows if row["stage"] == "search"]
    report = compare({"lora": method([0.5, 0.6, 0.7]), "dora": (trials, None, gone)})
    assert [method["diverged"] for method in report["methods"].values()] == [0, None]
    assert_mentions(report["verdict"], "every setting diverged: DoRA", "no result: DoRA")
    assert not re.search("diverged on a seed", report["verdict"])


def test_scores_and_losses_of_texts_are_compared_seed_by_seed(compare):
    def unit(arm, seeds, bleu, after):
        rows = [{"arm": arm, "seed": seed} for seed in seeds]
        return {
            "members": [[arm, [], seed] for seed in seeds],
            "cost": {"trainable": 7, "step_seconds": 0.5},
            "text_scores": [row | {"bleu": bleu[row["seed"]]} for row in rows],
            "unrelated": [row | {"before": 1.0, "after": after[row["seed"]]} for row in rows],
        }

    methods = {name: method([0.5, 0.6, 0.7]) for name in LABELS}
    # In units of any size, in which a run that diverged has no row.
    results = [
        unit("lora", (1, 2), {1: 20.0, 2: 30.0}, {1: 1.1, 2: 1.2}),
        unit("lora", (3,), {3: 40.0}, {3: 1.3}),
    ]
    results.append(unit("dora", (1, 3), {1: 21.0, 3: 43.0}, {1: 1.0, 3: 1.1}))
    report = compare(methods, results)
    dora = report["methods"]["dora"]
    assert dora["text_scores"]["bleu"]["mean"] == 32.0
    assert dora["text_scores"]["bleu"]["gain"]["mean"] == 2.0
    assert dora["unrelated"]["against_lora"]["mean"] == pytest.approx((-0.1 - 0.2) / 2)
    assert dora["unrelated"]["change"]["mean"] == pytest.approx(0.05)
    assert dora["cost"]["trainable"] == 7
    assert report["methods"]["pissa"]["cost"] is None
    scores = {(run["arm"], run["seed"]): run.get("text_scores") for run in report["runs"]}
    assert scores["lora", 3] == {"bleu": 40.0}
    assert scores["dora", 2] is None
