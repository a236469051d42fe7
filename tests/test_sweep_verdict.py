"""Intervals, steps to a target and the sentence, worked by hand."""

import math

import pytest

from loraplus_jax.train.sweep_settings import Trial
from loraplus_jax.train.sweep_verdict import (
    compare,
    favoured,
    interval,
    ratio_interval,
    runs_of,
    steps_to,
    verdict,
)

CHOSEN = {"lora": Trial(1e-3, 1.0, 16.0, 8), "lora_plus": Trial(5e-4, 4.0, 16.0, 8)}
# Two-sided 95 % quantiles of Student's t, as tables print them.
T = {1: 12.7062, 2: 4.3027, 4: 2.7764, 7: 2.3646}


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_the_interval_is_students(count):
    values = [float(n * n) for n in range(count)]
    mean = sum(values) / count
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1))
    half = T[count - 1] * deviation / math.sqrt(count)
    found = interval(values)
    assert found["pairs"] == count
    assert found["mean"] == pytest.approx(mean)
    assert found["low"] == pytest.approx(mean - half, rel=2e-4)
    assert found["high"] == pytest.approx(mean + half, rel=2e-4)


def test_too_few_pairs_have_no_interval():
    assert interval([]) == {"mean": None, "low": None, "high": None, "pairs": 0}
    assert interval([2.0]) == {"mean": 2.0, "low": None, "high": None, "pairs": 1}


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


def rows(arm, seed, losses, test):
    where = {"stage": "report", "arm": arm, "trial": [], "seed": seed}
    curve = [{**where, "step": 10 * n, "split": "validation", "loss": loss} for n, loss in enumerate(losses)]
    return [*curve, {**where, "step": 20, "split": "test", "loss": test, "accuracy": 0.5}]


def found(*runs, target=None):
    runs = runs_of([row for run in runs for row in rows(*run)], 20, target)
    return runs, compare(runs, "lora_plus", "lora", "accuracy")


def test_the_target_of_a_seed_is_the_worse_final_loss_of_the_two():
    runs, comparison = found(
        ("lora", 1, [1.0, 0.8, 0.6], 0.61),
        ("lora_plus", 1, [1.0, 0.6, 0.4], 0.41),
        ("lora", 2, [1.0, 0.5, 0.3], 0.31),
        ("lora_plus", 2, [1.0, 0.6, 0.4], 0.45),
        ("control", 2, [1.0, 0.9, 0.8], 0.81),
    )
    assert [run["target"] for run in runs] == [0.6, 0.6, 0.4, 0.4, 0.4]
    assert [run["steps_to_target"] for run in runs] == [20.0, 10.0, 15.0, 20.0, None]
    assert comparison["steps_ratio"]["mean"] == pytest.approx(math.sqrt(2.0 * 0.75))
    assert comparison["test_loss"]["mean"] == pytest.approx((-0.20 + 0.14) / 2)
    assert favoured(comparison) is None
    assert verdict(comparison, CHOSEN, None).startswith("No difference found: tuned LoRA takes 1.22 x [")


def one_sided(faster, slower):
    curves = {faster: [1.0, 0.5, 0.4], slower: [1.0, 0.75, 0.5]}
    return found(*[(arm, seed, curve, 0.4) for seed in (1, 2, 3) for arm, curve in curves.items()])[1]


def test_a_sure_difference_has_its_ratio_and_interval_either_way():
    comparison = one_sided("lora_plus", "lora")
    assert favoured(comparison) == "lora_plus"
    assert verdict(comparison, CHOSEN, None).startswith(
        "LoRA+ with lambda=4 needs 2.00 x [2.00, 2.00] fewer steps than tuned LoRA to the same validation loss "
        "(95 % interval, 3 paired seeds)"
    )
    comparison = one_sided("lora", "lora_plus")
    assert favoured(comparison) == "lora"
    assert verdict(comparison, CHOSEN, None).startswith(
        "Tuned LoRA needs 2.00 x [2.00, 2.00] fewer steps than LoRA+"
    )


def test_a_target_never_reached_is_said():
    _, comparison = found(
        *[("lora", seed, [1.0, 0.8, 0.6], 0.6) for seed in (1, 2)],
        *[("lora_plus", seed, [1.0, 0.8, 0.2], 0.2) for seed in (1, 2)],
        target=0.3,
    )
    assert comparison["never_reached"] == {"lora_plus": 0, "lora": 2}
    assert favoured(comparison) is None
    assert verdict(comparison, CHOSEN, 0.3).startswith(
        "No verdict on steps: a validation loss of 0.3 was never reached by LoRA+ on 0 and by LoRA on 2 of 2 seeds"
    )


def test_a_run_that_diverged_is_left_out_and_said():
    _, comparison = found(
        ("lora", 1, [1.0, 0.8, 0.6], 0.6),
        ("lora_plus", 1, [1.0, None, None], None),
        ("lora", 2, [1.0, 0.8, 0.6], 0.6),
        ("lora_plus", 2, [1.0, 0.8, 0.5], 0.5),
    )
    assert comparison["diverged"] == {"lora_plus": 1, "lora": 0}
    assert comparison["test_loss"]["pairs"] == 1
    assert "diverged or never reached by LoRA+ on 1" in verdict(comparison, CHOSEN, None)
