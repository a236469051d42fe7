"""Successive halving on tables of scores, worked by hand."""

import math

import pytest

from loraplus_jax.sweep.device_slots import assign_slots
from loraplus_jax.sweep.halving import (
    best_trial,
    check_rungs,
    comparison_steps,
    curve_steps,
    mean_losses,
    member_steps,
    planned_members,
    split_at_rung,
    survivors,
)
from loraplus_jax.sweep.population import fastest_batch_size, largest_eval_batch, parallel_members
from loraplus_jax.sweep.settings import SweepSettings, Trial

from ..messages import mentions


def lora(rate):
    return Trial(rate, 1.0, 16.0, 8)


def plus(rate, ratio):
    return Trial(rate, ratio, 16.0, 8)


SCORES = {
    lora(1.0): 0.9,
    lora(2.0): 0.8,
    lora(3.0): math.nan,
    lora(4.0): 0.7,
    plus(1.0, 2.0): 0.65,
    plus(1.0, 4.0): 0.60,
    plus(2.0, 2.0): 0.61,
    plus(2.0, 4.0): 0.62,
}


def test_each_arm_keeps_its_share():
    assert survivors(SCORES, 0.5) == [lora(2.0), lora(4.0), plus(1.0, 4.0), plus(2.0, 2.0)]
    assert survivors(SCORES, 0.25) == [lora(4.0), plus(1.0, 4.0)]
    assert survivors(SCORES, 0.3) == survivors(SCORES, 0.5)  # 1.2 of 4 is rounded up
    assert survivors(SCORES, 0.01) == survivors(SCORES, 0.25)  # at least one


def test_of_equals_the_first_is_kept_and_what_diverged_never_is():
    assert survivors({lora(1.0): 0.5, lora(2.0): 0.5}, 0.5) == [lora(1.0)]
    assert survivors({lora(1.0): math.nan, lora(2.0): math.inf}, 0.5) == []
    assert survivors({lora(1.0): math.nan, lora(2.0): 1.0}, 0.99) == [lora(2.0)]


def test_the_best_of_an_arm():
    assert best_trial(SCORES, "lora") == lora(4.0)
    assert best_trial(SCORES, "lora_plus") == plus(1.0, 4.0)
    assert best_trial({lora(1.0): math.nan}, "lora") is None


def test_a_setting_is_judged_by_all_its_seeds():
    means = mean_losses(
        {(lora(1.0), 0): 1.0, (lora(1.0), 1): 0.0, (lora(2.0), 0): 0.2, (lora(2.0), 1): math.nan}
    )
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


def test_rungs_within_the_warm_up_are_rejected():
    sane = SweepSettings()
    for steps, warmup in ((300, 20), (300, 37), (16, 0), (1000, 100)):
        check_rungs(sane, steps, warmup)
    words = ("sweep.rungs", 0.125, "step 38", 300, "optimizer.warmup_steps", 0.127)
    with pytest.raises(ValueError, match=mentions(*words)):
        check_rungs(sane, 300, 38)
    check_rungs(SweepSettings(rungs=(0.1271, 0.25)), 300, 38)
    check_rungs(SweepSettings(method="grid"), 300, 290)


def test_rungs_on_one_step_are_rejected():
    with pytest.raises(ValueError, match=mentions("sweep.rungs", 0.25, 0.3, "step 3", 10)):
        check_rungs(SweepSettings(rungs=(0.25, 0.3, 0.5)), 10, 0)
    check_rungs(SweepSettings(rungs=(0.25, 0.4, 0.5)), 10, 0)
    with pytest.raises(ValueError, match=mentions("sweep.rungs", 0.125, 0.25, "step 1", 2)):
        check_rungs(SweepSettings(rungs=(0.125, 0.25)), 2, 0)
    with pytest.raises(ValueError, match=mentions("sweep.rungs", 0.125, "step 1")):
        check_rungs(SweepSettings(), 1, 0)
    with pytest.raises(ValueError, match=mentions("sweep.rungs", 0.999, "step 300")):
        check_rungs(SweepSettings(rungs=(0.5, 0.999)), 300, 0)
    check_rungs(SweepSettings(method="grid"), 1, 0)


def test_the_only_remaining_setting_of_an_arm_is_selected():
    assert split_at_rung(SCORES, 0.5) == ({}, [lora(2.0), lora(4.0), plus(1.0, 4.0), plus(2.0, 2.0)])
    scores = {lora(4.0): 0.7, plus(1.0, 4.0): 0.60, plus(2.0, 2.0): 0.61, plus(2.0, 4.0): 0.62}
    assert split_at_rung(scores, 0.5) == ({"lora": lora(4.0)}, [plus(1.0, 4.0), plus(2.0, 2.0)])
    assert split_at_rung(SCORES, 0.25) == ({"lora": lora(4.0), "lora_plus": plus(1.0, 4.0)}, [])
    assert split_at_rung({}, 0.5) == ({}, [])


def test_the_defaults_take_less_than_a_quarter_of_the_grid():
    # 16 settings of each arm: all to 38, two of each to the end.
    settings = [make(n) for make in (lora, lambda n: plus(n, 4.0)) for n in range(1, 17)]
    left = survivors({trial: float(n) for n, trial in enumerate(settings)}, SweepSettings().keep)
    taken = member_steps([len(settings), len(left)], comparison_steps(SweepSettings(), 300))
    assert taken == 32 * 38 + 4 * 262 == 2264 <= 32 * 300 / 4


def test_members_are_spread_over_the_devices():
    assert assign_slots(5, chunk=8, devices=4, at_once=1) == [0, 2, 4, 6, 1]
    assert assign_slots(9, chunk=8, devices=4, at_once=1)[8] == 8
    assert assign_slots(5, chunk=4, devices=2, at_once=2) == [0, 1, 2, 3, 4]
    for count in range(1, 17):
        assert len(set(assign_slots(count, chunk=8, devices=4, at_once=1))) == count


def test_more_members_at_once_only_while_it_pays():
    asked = []

    def seconds(size):
        asked.append(size)
        return {1: 1.0, 2: 0.5, 4: 0.49, 8: 0.1}[size]

    assert fastest_batch_size(seconds, 16) == 2
    assert asked == [1, 2, 4]
    assert fastest_batch_size(lambda size: 1 / size, 6) == 4
    assert fastest_batch_size(lambda size: math.inf if size > 1 else 1.0, 6) == 1


def test_few_members_are_computed_in_the_least_power_of_two_that_holds_them():
    assert [parallel_members(count, 16, 1) for count in (32, 9, 8, 5, 2, 1)] == [16, 16, 8, 8, 2, 1]
    assert [parallel_members(count, 16, 4) for count in (33, 32, 4, 3)] == [16, 8, 1, 1]
    assert parallel_members(7, 6, 1) == 6  # a number of the user's own
    assert parallel_members(7, 1, 1) == 1


def test_an_evaluation_batch_takes_the_steps_memory_and_pads_the_splits_least():
    def batch(rows, room, needs=lambda size: 10 * size):
        return largest_eval_batch(64, rows, room, needs)

    assert batch([1004, 2008], 10 * 64) == batch([1004, 2008], 0) == 64
    assert batch([1004, 2008], 10 * 255) == 128
    assert batch([1004, 2008], 10**9) == 1024  # 1,024 + 2,048 rows, as with 64; 2,048 would be 4,096
    assert batch([1100, 1100], 10**9) == 128  # 1,152 rows, as with 64; 256 would be 1,280
    assert batch([20, 20], 10**9) == 64
    # Twice as many examples need more than twice the memory.
    assert batch([1004, 2008], 10 * 1024, lambda size: 10 * size + (size > 64) * 10**6) == 64


def test_the_plan_of_a_sweep_counts_as_it_trains():
    # 8 settings of two methods to step 4, 2 of each to 16.
    trials = [Trial(10.0**-n, ratio, 16.0, 8) for ratio in (1.0, 4.0) for n in range(4)]
    assert planned_members(trials, 1, [4, 16], 0.5) == [8, 4]
    assert member_steps([8, 4], [4, 16]) == 8 * 4 + 4 * 12
    assert planned_members(trials, 2, [16], 0.5) == [16]
