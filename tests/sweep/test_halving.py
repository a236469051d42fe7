"""Successive halving on tables of scores, worked by hand."""

import math

from loraplus_jax.sweep.halving import (
    best_trial,
    check_rungs,
    comparison_steps,
    curve_steps,
    mean_losses,
    member_steps,
    planned_members,
    survivors,
)
from loraplus_jax.sweep.settings import SweepSettings
from loraplus_jax.sweep.trial import Trial

from ..refusals import refusals


def lora(rate):
    return Trial(rate, 1.0, 16.0, 8)


def plus(rate, ratio):
    return Trial(rate, ratio, 16.0, 8)


SCORES = {lora(1.0): 0.9, lora(2.0): 0.8, lora(3.0): math.nan, lora(4.0): 0.7}
PLUS = {plus(1.0, 2.0): 0.65, plus(1.0, 4.0): 0.60, plus(2.0, 2.0): 0.61, plus(2.0, 4.0): 0.62}


def test_an_arm_keeps_its_share():
    assert survivors(SCORES, 0.5) == [lora(2.0), lora(4.0)]
    assert survivors(PLUS, 0.5) == [plus(1.0, 4.0), plus(2.0, 2.0)]
    assert survivors(SCORES, 0.25) == [lora(4.0)]
    assert survivors(SCORES, 0.3) == survivors(SCORES, 0.5)  # 1.2 of 4 is rounded up
    assert survivors(SCORES, 0.01) == survivors(SCORES, 0.25)  # at least one


def test_of_equals_the_first_is_kept_and_what_diverged_never_is():
    assert survivors({lora(1.0): 0.5, lora(2.0): 0.5}, 0.5) == [lora(1.0)]
    assert survivors({lora(1.0): math.nan, lora(2.0): math.inf}, 0.5) == []
    assert survivors({lora(1.0): math.nan, lora(2.0): 1.0}, 0.99) == [lora(2.0)]


def test_the_best_of_an_arm():
    assert best_trial(SCORES) == lora(4.0)
    assert best_trial(PLUS) == plus(1.0, 4.0)
    assert best_trial({lora(1.0): math.nan}) is None


def test_a_setting_is_judged_by_all_its_seeds():
    rows = [(lora(1.0), 1.0), (lora(1.0), 0.0), (lora(2.0), 0.2), (lora(2.0), None)]
    means = mean_losses({"trial": list(trial), "loss": loss} for trial, loss in rows)
    assert means[lora(1.0)] == 0.5
    assert math.isnan(means[lora(2.0)])


def test_stops():
    assert comparison_steps(SweepSettings(), 300) == [38, 300]
    assert comparison_steps(SweepSettings(method="grid"), 300) == [300]
    assert comparison_steps(SweepSettings(rungs=(0.001, 0.002)), 10) == [1, 10]


def test_a_curve_is_dense_where_the_target_is_reached():
    assert curve_steps(120, 7) == [0, 30, 60, 72, 84, 96, 108, 120]
    assert curve_steps(16, 7) == [0, 4, 8, 10, 11, 13, 14, 16]
    assert curve_steps(12, 3) == [0, 3, 6, 12]
    assert curve_steps(1, 7) == [0, 1]


def with_rungs(*rungs):
    return SweepSettings(rungs=rungs)


def test_rungs_that_compare_something():
    for steps, warmup in ((300, 20), (300, 37), (16, 0), (1000, 100)):
        check_rungs(SweepSettings(), steps, warmup)
    check_rungs(with_rungs(0.1271, 0.25), 300, 38)
    check_rungs(with_rungs(0.25, 0.4, 0.5), 10, 0)
    for steps, warmup in ((300, 290), (1, 0)):
        check_rungs(SweepSettings(method="grid"), steps, warmup)


test_rungs_within_the_warm_up_or_on_one_step = refusals(
    (
        lambda: check_rungs(SweepSettings(), 300, 38),
        *("sweep.rungs", 0.125, "step 38", 300, "optimizer.warmup_steps", 0.127),
    ),
    (lambda: check_rungs(with_rungs(0.25, 0.3, 0.5), 10, 0), "sweep.rungs", 0.25, 0.3, "step 3", 10),
    (lambda: check_rungs(with_rungs(0.125, 0.25), 2, 0), "sweep.rungs", 0.125, 0.25, "step 1", 2),
    (lambda: check_rungs(SweepSettings(), 1, 0), "sweep.rungs", 0.125, "step 1"),
    (lambda: check_rungs(with_rungs(0.5, 0.999), 300, 0), "sweep.rungs", 0.999, "step 300"),
    error=ValueError,
)


def test_members_of_each_stage():
    # An arm of which one is left is selected, and trains no further.
    assert planned_members([16, 16], 1, [38, 300], 0.125) == [32, 4]
    assert planned_members([4, 8], 3, [10, 20, 40], 0.25) == [36, 6, 0]


def test_the_defaults_take_less_than_a_quarter_of_the_grid():
    # 16 settings of each arm: all to 38, two of each to the end.
    stops = comparison_steps(SweepSettings(), 300)
    taken = member_steps(planned_members([16, 16], 1, stops, SweepSettings().keep), stops)
    assert taken == 32 * 38 + 4 * 262 == 2264 <= 32 * 300 / 4
