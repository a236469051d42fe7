"""Intervals, steps to a target and the sentence, worked by hand."""

import math

import pytest

from loraplus_jax.sweep.statistics import (
    compare_arms,
    decision,
    faster_arm,
    lora_label,
    ratio_interval,
    recommended_arm,
    report_runs,
    steps_to,
    t_interval,
    verdict,
)
from loraplus_jax.sweep.trial import Trial

from ..messages import assert_mentions

CHOSEN = {"lora": Trial(1e-3, 1.0, 16.0, 8), "lora_plus": Trial(5e-4, 4.0, 16.0, 8)}
# Two-sided 95 % quantiles of Student's t, as tables print them.
T = {1: 12.7062, 2: 4.3027, 7: 2.3646}


@pytest.mark.parametrize("count", [2, 3, 8])
def test_the_interval_is_students(count):
    values = [float(n * n) for n in range(count)]
    mean = sum(values) / count
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1))
    half = T[count - 1] * deviation / math.sqrt(count)
    expected = {"mean": mean, "low": mean - half, "high": mean + half, "pairs": count}
    assert t_interval(values) == pytest.approx(expected, rel=2e-4)


def test_ratios_are_geometric_and_turn_round():
    over, under = [200.0, 150.0, 90.0], [100.0, 100.0, 100.0]
    found, other = ratio_interval(over, under), ratio_interval(under, over)
    assert found["mean"] == pytest.approx((2.0 * 1.5 * 0.9) ** (1 / 3))
    assert other["low"] == pytest.approx(1 / found["high"])


def test_steps_to_a_target():
    curve = [(0, 1.0), (10, 0.6), (20, 0.7), (30, 0.2)]
    assert steps_to(curve, 0.8) == pytest.approx(5.0)
    assert steps_to(curve, 0.6) == 10.0
    assert steps_to(curve, 0.45) == pytest.approx(25.0)
    assert steps_to(curve, 0.1) is None
    assert steps_to(curve, 2.0) == 1.0
    assert steps_to([(0, 1.0), (10, None), (20, 0.1)], 0.5) is None


def rows(arm, seed, losses):
    where = {"stage": "report", "arm": arm, "trial": [], "seed": seed, "split": "test", "accuracy": 0.5}
    return [{**where, "step": 10 * n, "loss": loss} for n, loss in enumerate(losses)]


def found(*runs, target=None):
    runs = report_runs([row for run in runs for row in rows(*run)], 20, target)
    return runs, compare_arms(runs, "lora_plus", "lora", "accuracy")


def test_the_target_of_a_seed_is_the_worse_final_loss_of_the_two():
    runs, comparison = found(
        ("lora", 1, [1.0, 0.8, 0.6]),
        ("lora_plus", 1, [1.0, 0.6, 0.4]),
        ("lora", 2, [1.0, 0.5, 0.3]),
        ("lora_plus", 2, [1.0, 0.6, 0.4]),
        ("control", 2, [1.0, 0.9, 0.8]),
    )
    assert [run["target"] for run in runs] == [0.6, 0.6, 0.4, 0.4, 0.4]
    assert [run["steps_to_target"] for run in runs] == [20.0, 10.0, 15.0, 20.0, None]
    assert comparison["steps_ratio"]["mean"] == pytest.approx(math.sqrt(2.0 * 0.75))
    assert comparison["test_loss"]["mean"] == pytest.approx((-0.20 + 0.10) / 2)
    assert faster_arm(comparison) is None
    assert recommended_arm(comparison)[0] == "lora"  # which has one hyperparameter less
    assert_mentions(verdict(comparison, CHOSEN, None), "No significant difference", "tuned LoRA", 1.22)


def one_sided(faster, slower, tests=(0.4, 0.4)):
    middles = {faster: 0.4, slower: 0.7}
    runs = [
        (arm, seed, [1.0, middle, test + seed * 1e-4 * (arm == "lora")])
        for seed in (1, 2, 3)
        for (arm, middle), test in zip(middles.items(), tests, strict=True)
    ]
    return found(*runs)[1]


def test_a_significant_difference_has_its_ratio_and_interval_either_way():
    for arms, name in ((("lora_plus", "lora"), "LoRA+ with lambda=4"), (("lora", "lora_plus"), "Tuned LoRA")):
        comparison = one_sided(*arms)
        assert faster_arm(comparison) == arms[0]
        said = verdict(comparison, CHOSEN, None)
        assert said.startswith(name)
        assert_mentions(said, "2.00 x [2.00, 2.00]", "fewer steps", "LoRA+", "95 %", "3 paired seeds")


@pytest.mark.parametrize(
    ("tests", "winner", "why", "first"),
    [
        ((0.4, 0.4), "lora_plus", ["fewer steps", "2.00 x [2.00, 2.00]"], "LoRA+ with lambda=4 needs"),
        ((0.3, 0.4), "lora_plus", ["by 0.1002 [0.1000, 0.1004]"], "LoRA+ with lambda=4 ends with"),
        ((0.5, 0.4), "lora", ["test loss", "lower", "more steps"], "Tuned LoRA ends with"),
    ],
)
def test_the_winner_ends_lower_or_else_is_faster(tests, winner, why, first):
    comparison = one_sided("lora_plus", "lora", tests)
    arm, reason = recommended_arm(comparison)
    assert arm == winner
    assert_mentions(reason, *why)
    name = "LoRA+, lambda 4" if winner == "lora_plus" else "plain LoRA"
    assert decision(comparison, CHOSEN).startswith(f"Train with {name}: ")
    assert_mentions(decision(comparison, CHOSEN), *why, "95 % intervals", "3 paired seeds")
    assert verdict(comparison, CHOSEN, None).startswith(first)


@pytest.mark.parametrize(("seeds", "sure"), [(5, False), (6, True)])
def test_a_target_that_one_alone_reaches_counts_by_a_sign_test(seeds, sure):
    # Two-sided, five of five by chance: 2 / 2^5 = 0.06; six of six: 2 / 2^6 = 0.03.
    _, comparison = found(
        *[("lora", seed, [1.0, 0.8, 0.6 + 1e-3 * seed]) for seed in range(seeds)],
        *[("lora_plus", seed, [1.0, 0.8, 0.2 + 1e-3 * (seed % 2)]) for seed in range(seeds)],
        target=0.3,
    )
    assert comparison["alone"] == {"lora_plus": seeds, "lora": 0}
    assert faster_arm(comparison) == ("lora_plus" if sure else None)
    said = verdict(comparison, CHOSEN, 0.3)
    assert_mentions(said, "LoRA+ with lambda=4", "tuned LoRA", 0.3, seeds, f"0 of {seeds} seeds")
    assert said.startswith("LoRA+ with lambda=4 ends with a significantly lower test loss")
    assert ("no verdict on steps" in said) != sure


@pytest.mark.parametrize(
    ("target", "losses", "what"),
    [(None, [0.69, 0.71, 0.72], ["LoRA or LoRA+"]), (0.9, [0.69, 0.6, 0.5], [0.9])],
)
def test_a_target_met_at_the_start_gives_no_verdict(target, losses, what):
    runs = [(arm, seed, losses) for arm in ("lora", "lora_plus") for seed in (1, 2)]
    rows, comparison = found(*runs, target=target)
    assert all(run["at_start"] and run["steps_to_target"] is None for run in rows)
    assert faster_arm(comparison) is None
    assert_mentions(verdict(comparison, CHOSEN, target), "No verdict on steps", "2 of 2 seeds", *what)


def test_a_run_that_diverged_is_left_out_and_reported():
    _, comparison = found(
        ("lora", 1, [1.0, 0.8, 0.6]),
        ("lora_plus", 1, [1.0, None, None]),
        ("lora", 2, [1.0, 0.8, 0.6]),
        ("lora_plus", 2, [1.0, 0.8, 0.5]),
    )
    assert comparison["diverged"] == {"lora_plus": 1, "lora": 0}
    assert comparison["test_loss"]["pairs"] == 1
    said = verdict(comparison, CHOSEN, None)
    assert said.startswith("LoRA+ with lambda=4 diverged on 1")
    assert_mentions(said, "no verdict on steps", "tuned LoRA", "0 of 2 seeds")
    arm, reason = recommended_arm(comparison)
    assert arm == "lora"
    assert_mentions(reason, "LoRA+", "diverged", "1 of 2 seeds")
    assert decision(comparison, CHOSEN) == f"Train with plain LoRA: {reason}."


def test_where_both_always_diverge_nothing_wins():
    _, comparison = found(*[(arm, 1, [1.0, None, None]) for arm in ("lora", "lora_plus")])
    arm, reason = recommended_arm(comparison)
    assert arm is None
    assert "diverged" in reason
    assert decision(comparison, CHOSEN).startswith("There is no winner: both diverged")


def test_lora_is_called_tuned_only_where_it_was():
    comparison = one_sided("lora_plus", "lora")
    even = {"lora": 4, "lora_plus": 4}
    assert lora_label(even, ["lr_ratio"]) == "tuned LoRA"
    at_edge = lora_label(even, ["learning_rate"])
    assert_mentions(at_edge, "LoRA", "edge")
    assert at_edge in verdict(comparison, CHOSEN, None, at_edge)
    few = lora_label({"lora": 1, "lora_plus": 4}, [])
    assert_mentions(few, "LoRA", 1, "LoRA+", 4)
    assert few in verdict(comparison, CHOSEN, None, few)
