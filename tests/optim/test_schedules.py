"""Rates: the ratio at every step of every schedule."""

import functools

import numpy as np
import optax
import pytest

from loraplus_jax import lora_plus, lora_plus_adamw, make_schedule

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
