"""Rates: the ratio at every step of every schedule, and suggested ones by simulation in float64."""

import functools
import itertools

import numpy as np
import optax
import pytest

from loraplus_jax import lora_plus, lora_plus_adamw, make_schedule
from loraplus_jax.optim.starting_rate import suggest_learning_rate

from ..refusals import refusals
from .toy import ONES, SCHEDULES, leaves, run


@pytest.mark.slow
@pytest.mark.parametrize(("name", "wrapped"), [(name, n % 2 == 1) for n, name in enumerate(SCHEDULES)])
def test_the_ratio_holds_at_every_step_of_every_schedule(name, wrapped):
    # Adam's step for a gradient that is always one is the rate itself.
    rate = SCHEDULES[name]
    adamw = functools.partial(optax.adamw, weight_decay=0.0, eps=1e-30)
    tx = lora_plus(adamw(rate), lr_ratio=8.0) if wrapped else lora_plus_adamw(rate, lr_ratio=8.0, eps=1e-30)
    for step, (_, updates) in enumerate(run(tx, 10, grads=lambda _: ONES)):
        expected = float(rate(step) if callable(rate) else rate)
        a, b, extra = leaves(updates)
        np.testing.assert_allclose(a, np.full((2, 1), -expected), rtol=1e-4)
        np.testing.assert_allclose(extra, a[:, 0], rtol=1e-6)
        np.testing.assert_allclose(b, 8 * a.T, rtol=1e-6)


RATES = {  # of a peak of 0.1, 23 steps, 3 of warm-up and a quarter of the peak at the end, at STEPS
    "constant": (0.0, 0.1 / 3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1),
    "linear": (0.0, 0.1 / 3, 0.1, 0.0625, 0.04375, 0.0325, 0.025, 0.025),
    "cosine": (0.0, 0.1 / 3, 0.1, 0.0625, 0.0359835, 0.0268353, 0.025, 0.025),
    "wsd": (0.0, 0.1 / 3, 0.1, 0.1, 0.1, 0.0625, 0.025, 0.025),
}


STEPS = (0, 1, 3, 13, 18, 21, 23, 24)


@pytest.mark.parametrize("name", RATES)
def test_rates_by_hand(name):
    floor = {} if name == "constant" else {"final_fraction": 0.25}
    schedule = make_schedule(name, 0.1, 23, warmup_steps=3, **floor)
    np.testing.assert_allclose([schedule(n) for n in STEPS], RATES[name], rtol=1e-5, atol=1e-9)


WSD = functools.partial(make_schedule, "wsd", 0.1, 10)

test_schedules_that_are_rejected = refusals(
    (lambda: make_schedule("step", 0.1, 10), "schedule", "constant", "linear", "cosine", "wsd", "'step'"),
    (lambda: make_schedule("linear", 0.1, 10, decay_steps=3), "decay_steps", "wsd", "linear", 3),
    (lambda: make_schedule("constant", 0.1, 10, final_fraction=0.1), "final_fraction", "constant", 0.1),
    (lambda: make_schedule("linear", 0.1, 10, warmup_steps=10), "steps", "warmup_steps", 10),
    (lambda: WSD(warmup_steps=4, decay_steps=7), "steps", "warmup_steps", 4, "decay_steps", 7, 10),
    (lambda: make_schedule("linear", 0.1, 10, final_fraction=1.0), "final_fraction", 1, 1.0),
    error=ValueError,
)


# The suggested rate changes a layer's output alike at all widths and ranks.

WIDTHS, RANKS = (256, 1024, 4096), (8, 32, 128)


def output_change(init, alpha, rank, width, rate, steps=4):
    """Root mean square of the change of s (A B)ᵀ x by steps of η in the signs of the gradients of a linear loss."""
    rng = np.random.default_rng(0)
    x, slope = rng.standard_normal(width), rng.standard_normal(width)
    a, b = np.zeros((width, rank)), np.zeros((rank, width))
    if init == "lora_b":
        b = rng.uniform(-1, 1, b.shape) * np.sqrt(6 / rank)
    else:
        a = rng.uniform(-1, 1, a.shape) * np.sqrt({"lora": 1, "he_uniform": 6}[init] / width)
    scale = alpha / rank
    start = scale * x @ a @ b
    for _ in range(steps):
        da, db = np.outer(x, b @ slope), np.outer(x @ a, slope)
        a, b = a - rate * np.sign(da), b - rate * np.sign(db)
    return np.sqrt(np.mean((scale * x @ a @ b - start) ** 2))


@pytest.mark.parametrize("scaled", [True, False], ids=["alpha / rank fixed", "alpha fixed"])
@pytest.mark.parametrize("init", ["lora", "he_uniform", "lora_b"])
def test_the_output_changes_alike_at_all_widths_and_ranks(init, scaled):
    changes = {}
    for width, rank in itertools.product(WIDTHS, RANKS):
        alpha = 2.0 * rank if scaled else 16.0
        rate = suggest_learning_rate(init, alpha, rank, width)
        changes[width, rank] = output_change(init, alpha, rank, width, rate)
    assert max(changes.values()) < 2.5 * min(changes.values()), changes


def test_a_rate_that_ignores_the_width_does_not():
    first, last = (output_change("lora", 16.0, 8, width, 1e-3) for width in (WIDTHS[0], WIDTHS[-1]))
    assert last > 5 * first


def test_by_hand():
    assert suggest_learning_rate("lora", 16, 8, 1024) == pytest.approx(0.15 / 128)
    assert suggest_learning_rate("lora", 16, 64, 1024) == pytest.approx(0.15 / 128)
    assert suggest_learning_rate("lora", 1024, 64, 256) == pytest.approx(0.06 * 6**0.5 / 1024)
    assert suggest_learning_rate("he_uniform", 256, 64, 256) == pytest.approx(0.06 / 256)
    assert suggest_learning_rate("lora_b", 16, 8, 1024) == pytest.approx(0.75 * 8 / 16384)
    assert suggest_learning_rate("lora_b", 16, 512, 1024) == pytest.approx(0.5 / 128)


@pytest.mark.parametrize("alpha", [16, 4096])
def test_rates_of_the_two_starts_follow_from_each_other(alpha):
    # A run from A with alpha and η is one from √6 A with alpha / 6 and √6 η: the same outputs at every step.
    rate, other = (
        suggest_learning_rate(*case, 8, 256) for case in (("lora", alpha), ("he_uniform", alpha / 6))
    )
    assert other == pytest.approx(6**0.5 * rate)


test_bad_arguments = refusals(
    (lambda: suggest_learning_rate("pissa", 16, 8, 64), "init", "lora, he_uniform, lora_b", "pissa"),
    (lambda: suggest_learning_rate("lora", 0, 8, 64), "alpha", "above 0", 0),
    (lambda: suggest_learning_rate("lora", 16, 0, 64), "rank", "at least 1", 0),
    (lambda: suggest_learning_rate("lora", 16, 8, 0), "width", "at least 1", 0),
    error=ValueError,
)
