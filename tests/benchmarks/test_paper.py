"""The paper's experiments at a reduced size, against their ranges; and how the convergence table counts."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from ..marks import every

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "paper"))


def passes(check, low, high):
    """Inside its range, which is the one that the experiment must have."""
    assert check[1:] == pytest.approx((low, high))
    assert check.passed, check


@pytest.mark.slow
@pytest.mark.parametrize("number", every(2, range(6)))
def test_coordinate_check(number):
    import coordinate_check as experiment
    from shared import slope

    setting, widths = experiment.SETTINGS[number], (256, 1024, 4096)
    values = experiment.measured(setting, widths, seeds=2)
    for name, expected in zip(experiment.SHOWN, setting.slopes, strict=True):
        assert slope(widths, values[name]) == pytest.approx(expected, abs=0.2), name


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(("power", "expected"), [(1.0, -0.5), (0.5, -0.75)])
def test_best_single_rate_against_width(power, expected):
    import best_rate as experiment
    from shared import slope

    widths = (64, 256, 1024)
    rates, _ = experiment.best_rates(power, widths, seeds=3)
    # Three widths for seven: the slope is known less well.
    assert slope(widths, rates) == pytest.approx(expected, abs=0.25)


@pytest.mark.slow
def test_figure_2():
    """A part of the grid for one draw of the model in which rates matter much."""
    import figure2 as experiment

    rates = experiment.RATES[4:14]
    losses = experiment.grid(rates, (10,), worlds=2, seeds=2, points=200)[10]["train"]
    found = [experiment.optimum(one, rates) for one in losses]
    assert all(1e-3 < one["equal rates"] < 0.1 for one in found)
    assert max(one["eta_B"] / one["eta_A"] for one in found) > 4
    assert max(one["gap"] for one in found) > 0.3


def test_an_optimum_off_the_diagonal_by_hand():
    import figure2 as experiment

    found = experiment.optimum(
        np.array([[4.0, 2.0, np.inf], [9.0, 3.0, 9.0], [9.0, 9.0, np.inf]]), (0.1, 1.0, 10.0)
    )
    assert found == {
        "eta_A": 0.1,
        "eta_B": 1.0,
        "loss": 2.0,
        "equal rates": 1.0,
        "their loss": 3.0,
        "gap": 0.5,
    }


@pytest.mark.long
@pytest.mark.slow
def test_exactness():
    import exactness as experiment

    found = experiment.checks(steps=100)
    passes(found["values that differ between lambda = 1 and optax.adamw"], 0, 0)
    passes(found["lambda as alpha, epsilon 1e-30"], 0, 1e-9)
    passes(found["largest step over its rate, 500 adapters"], 0, 1.00001)
    assert all(check.passed for check in found.values())


def test_committed_results_state_correctly_what_passed():
    kept = {path.stem: json.loads(path.read_text()) for path in (BENCHMARKS / "results/paper").glob("*.json")}
    assert {"figure2", "best_rate", "coordinate_check", "exactness"} <= kept.keys()
    for name, result in kept.items():
        assert result["checks"], name
        for check in result["checks"].values():
            low, high = (
                end if end is not None else no_end
                for end, no_end in zip(check["range"], (-np.inf, np.inf), strict=True)
            )
            assert check["passed"] == (low <= check["found"] <= high), name


def test_a_slope_and_a_range():
    from shared import Check, slope

    assert slope([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)
    assert [Check(x, 0, 1).passed for x in (0, 1, 1.1, float("nan"))] == [True, True, False, False]


# The convergence table.


def rows(plan, name, losses, seeds, phase="report", point=None):
    from convergence_plan import choose

    point = point or choose(plan, name, [])
    return [
        {"phase": phase, "method": name, **point._asdict(), "seed": s, "loss": loss, "curve": [loss] * 60}
        | {"accuracy": None if loss is None else 1 - loss}
        for s, loss in zip(seeds, losses, strict=True)
    ]


@pytest.fixture
def plan():
    from convergence_plan import experiment

    return experiment("sentences")


def tuned(plan, **best):
    """Tuning rows of all methods, the point of a given index the best for each."""
    from convergence_plan import TUNING_SEEDS

    found = []
    for name, method in plan.methods.items():
        for n, point in enumerate(method.points):
            loss = 0.5 if n == best.get(name, 2) else 0.6
            found += rows(plan, name, [loss, loss], TUNING_SEEDS, "tune", point)
    return found


def test_every_method_is_tuned_on_as_many_runs_and_reported_on_others(plan):
    from convergence_plan import CONTROL, REPORT_SEEDS, TUNING_SEEDS, reports, tuning

    jobs = list(tuning(plan, plan.methods))
    count = {name: sum(job.method == name for job in jobs) for name in plan.methods}
    assert count.pop(CONTROL) == 0
    assert set(count.values()) == {12}
    assert len(REPORT_SEEDS) >= 8
    assert not set(REPORT_SEEDS) & set(TUNING_SEEDS)
    assert list(reports(plan, plan.methods, [])) == []
    reported = list(reports(plan, plan.methods, tuned(plan)))
    assert len(reported) == 6 * 8
    assert {job.method for job in reported[:6]} == set(plan.methods)


def test_the_lowest_mean_validation_loss_chooses_and_a_run_that_diverged_is_out(plan):
    from convergence_plan import CONTROL, choose

    found = tuned(plan, **{"lora": 3, "lora+": 1})
    assert choose(plan, "lora", found) == plan.methods["lora"].points[3]
    assert choose(plan, CONTROL, found) == (2.5e-4, 1.0, 16.0)
    assert choose(plan, "lora", found[1:]) is None
    next(r for r in found if r["method"] == "lora" and r["loss"] == 0.5)["loss"] = None
    assert choose(plan, "lora", found) != plan.methods["lora"].points[3]


def test_differences_are_paired_by_seed_and_their_interval_is_students(plan):
    from convergence_plan import choose
    from convergence_table import summarize

    found = tuned(plan)
    both = {name: choose(plan, name, found) for name in ("lora", "lora+")}
    found += rows(plan, "lora", [0.5, 0.6, 0.9], (0, 1, 2), point=both["lora"])
    found += rows(plan, "lora+", [0.4, 0.3, 0.8, 0.1], (0, 1, 2, 5), point=both["lora+"])
    table = {row["method"]: row for row in summarize(plan, found)}
    mean, low, high = (table["lora+"]["loss difference"][name] for name in ("mean", "low", "high"))
    # Differences -0.1, -0.3, -0.1: mean -1/6, standard error 1/15; t(0.975, 2) = 4.3027.
    assert (mean, low, high) == pytest.approx(
        (-1 / 6, -1 / 6 - 4.30265 / 15, -1 / 6 + 4.30265 / 15), abs=1e-5
    )
    assert (table["lora+"]["pairs"], table["lora+"]["seeds"]) == (3, 4)
    assert table["lora+"]["tuned over"] == "6 x 2"
    assert "loss difference" not in table["lora"]


def test_report_runs_of_a_point_that_is_no_longer_chosen_do_not_count(plan):
    from convergence_table import summarize

    old = plan.methods["lora"].points[5]
    assert summarize(plan, [*tuned(plan), *rows(plan, "lora", [0.1], (0,), point=old)]) == []


def test_steps_to_a_loss_are_those_of_a_mean_over_ten():
    from convergence_table import steps_to

    falling = [1.0] * 5 + [0.0] * 20
    assert steps_to(falling, 0.5) == 10
    assert steps_to(falling, 0.4) == 11
    assert steps_to(falling, -1.0) is None
    assert steps_to([None, *falling], 0.05) == 16


def noisy(seed):
    """A training curve that falls at a pace of its own, with noise."""
    rng = np.random.default_rng(seed)
    pace = rng.uniform(5, 50)
    return list(np.exp(-np.arange(60) / pace) + 0.05 * rng.normal(size=60))


def test_the_other_way_round_fewer_steps_are_more():
    from convergence_table import steps_saved

    curves = [(noisy(2 * n), noisy(2 * n + 1)) for n in range(8)]
    found, back = steps_saved(curves), steps_saved([(b, a) for a, b in curves])
    assert found["pairs"] == back["pairs"] == 8
    assert ends(back) == pytest.approx([1 / found["mean"], 1 / found["high"], 1 / found["low"]])
    assert found["mean"] != pytest.approx(1)


def test_two_methods_that_are_the_same_are_called_faster_as_rarely_as_slower():
    from convergence_table import steps_saved

    found = [steps_saved([(noisy(m + n), noisy(m + n + 8)) for n in range(8)]) for m in range(0, 6400, 16)]
    assert all(one["pairs"] == 8 for one in found)
    faster, slower = (sum(one["low"] > 1 for one in found), sum(one["high"] < 1 for one in found))
    assert faster + slower < 0.08 * len(found)
    # A t interval of 5 %: ten of 400 each way, with a standard deviation of three.
    assert min(faster, slower) >= 2


def ends(interval):
    return [interval[name] for name in ("mean", "low", "high")]


def test_the_goal_is_the_worse_final_loss_and_only_runs_that_diverged_are_left_out():
    """One method ends at 0.5 after 20 steps, the other comes to 0.5 in 30 of 60 and goes on to 0."""
    from convergence_table import steps_saved

    early, late = [1.0] * 10 + [0.5] * 50, [1.0] * 20 + [0.5] * 20 + [0.0] * 20
    found = steps_saved([(early, late)] * 2)
    assert (ends(found), found["pairs"]) == (pytest.approx([1.5] * 3), 2)
    lost = [1.0] * 59 + [None]
    assert steps_saved([(early, late)] * 2 + [(early, lost), (lost, late)])["pairs"] == 2
    one = steps_saved([(early, late), (early, lost)])
    assert (one["low"], one["pairs"]) == (None, 1)


def test_the_share_of_the_rivals_steps_leaves_out_seeds_that_never_get_there():
    from convergence_table import share_of_steps

    early, late = [1.0] * 10 + [0.5] * 50, [1.0] * 20 + [0.5] * 20 + [0.0] * 20
    # Mean of ten losses: 0.5 at step 20 of 60 for the one; the other, at 30, is at 0.5 too; the first never at 0.
    assert share_of_steps([(early, [1.0] * 50 + [0.5] * 10)]) == {
        "median": pytest.approx(1 / 3),
        "reached": 1,
        "pairs": 1,
    }
    assert share_of_steps([(late, early), (early, late)]) == {
        "median": pytest.approx(0.5),
        "reached": 1,
        "pairs": 2,
    }
    assert share_of_steps([(early, late)])["median"] is None


def test_a_best_rate_or_lambda_at_the_edge_and_diverged_seeds_are_shown(plan):
    from convergence_plan import CONTROL, choose
    from convergence_table import summarize

    found = tuned(plan, **{"lora": 5, "lora+": 2})
    best = {name: choose(plan, name, found) for name in ("lora", "lora+", CONTROL)}
    assert (best["lora+"].rate, best["lora+"].ratio) == (1e-3, 4.0)
    for name, point in best.items():
        found += rows(
            plan, name, [0.5, 0.6, None] if name == "lora" else [0.4, 0.6, 0.7], (0, 1, 2), point=point
        )
    shown = {row["method"]: row for row in summarize(plan, found)}
    columns = ("rate of A", "rate at the edge", "lambda", "lambda at the edge")
    assert [shown["lora"][name] for name in columns] == [0.008, True, 1, False]
    assert [shown["lora+"][name] for name in columns] == [0.001, False, 4, True]
    assert [shown[CONTROL][name] for name in columns] == [0.001, False, 1, False]
    assert [(shown[name]["seeds"], shown[name]["diverged"]) for name in ("lora", "lora+")] == [(2, 1), (3, 0)]
    assert (ends(shown["lora+"]["steps saved"]), shown["lora+"]["steps saved"]["pairs"]) == ([1.0] * 3, 2)


def test_other_settings_are_another_set_of_rows(plan):
    from convergence import digest

    longer = dataclasses.replace(plan, stride=1)
    assert digest(plan, "report") == digest(longer, "report")
    assert digest(plan, "tune") != digest(longer, "tune")
    other = dataclasses.replace(plan.settings, lora=dataclasses.replace(plan.settings.lora, rank=4))
    assert digest(plan, "report") != digest(dataclasses.replace(plan, settings=other), "report")
