"""Losses that stay high are found within a few steps; skipped steps are counted over rows and interruptions."""

import types

import numpy as np
import pytest

from loraplus_jax.training.anomalies import (
    HISTORY_STEPS,
    SPIKE_RATIO,
    SPIKE_STEPS,
    SpikeHistory,
    advice,
    find_spikes,
    index_of_skip_limit,
)

from ..messages import assert_mentions


def row(loss, norm=1.0, skipped=0.0):
    return {"loss": loss, "accuracy": 0.5, "grad_norm/b": norm, "update_norm/a": 2 * norm, "skipped": skipped}


def spike_steps(losses):
    """The steps, from 1, at which a spike is found."""
    return [spike.step for spike in find_spikes(SpikeHistory(), 1, [row(loss) for loss in losses])[1]]


def test_losses_that_stay_high_are_named_once_with_the_norms_of_the_last_step():
    rows = [row(1.0) for _ in range(6)] + [row(8.0, norm=10.0 + n) for n in range(20)]
    seen, (spike,) = find_spikes(SpikeHistory((1.0, 1.1, 0.9)), 11, rows)
    assert (spike.step, spike.loss, spike.median) == (10 + 6 + SPIKE_STEPS, 8.0, 1.0)
    assert spike.norms == {"grad_norm/b": 14.0, "update_norm/a": 28.0}
    norms = {"spike/grad_norm/b": 14.0, "spike/update_norm/a": 28.0}
    assert spike.values() == {"spike/loss": 8.0, "spike/median": 1.0} | norms
    assert_mentions(str(spike), "step 21", "8.0000", "1.0000")
    assert seen.losses == 15 * (8.0,)


@pytest.mark.parametrize("cut", [0, 10, 11, 15, 20, 34, 38, 39, 45])
def test_where_rows_are_cut_does_not_matter(cut):
    rows = [row(1.0 + 0.01 * (n % 7)) for n in range(50)]
    rows[10:15] = 5 * [row(5.0)]
    rows[33:39] = [row(12.0), row(13.0), row(11.0), row(0.0, skipped=1.0), row(12.0), row(13.0)]
    whole, spikes = find_spikes(SpikeHistory(), 1, rows)
    middle, first = find_spikes(SpikeHistory(), 1, rows[:cut])
    end, second = find_spikes(middle, cut + 1, rows[cut:])
    assert (end, first + second) == (whole, spikes)
    assert [spike.step for spike in spikes] == [15, 39]
    assert len(find_spikes(whole, 51, rows[:9] * 3)[0].losses) == HISTORY_STEPS + SPIKE_STEPS


def test_single_high_losses_and_small_rises_are_no_spikes_and_skipped_ones_do_not_count():
    calm, nan = tuple(1.0 + 0.01 * (n % 7) for n in range(20)), float("nan")
    assert spike_steps([*calm, *4 * [99.0], *calm, 99.0, *calm]) == []
    assert spike_steps([*calm, *9 * [SPIKE_RATIO * 1.03 - 0.01]]) == []
    assert spike_steps([*calm, *9 * [SPIKE_RATIO * 1.03 + 0.01]]) == [25]
    assert spike_steps([7.0, *calm[1:], *9 * [6.9]]) == []
    assert spike_steps([*calm[:4], *9 * [9.0]]) == spike_steps(5 * [9.0]) == []
    seen, spikes = find_spikes(SpikeHistory(calm, skipped=1), 1, 6 * [row(nan, skipped=1.0)])
    assert (seen, spikes) == (SpikeHistory(calm, skipped=7), [])


def solved(random, size):
    """Losses of texts of which 2 % are answered wrongly."""
    return np.where(random.random(size) < 0.02, random.uniform(2, 6, size), random.exponential(0.02, size))


ROWS = {
    "half solved": lambda random, size: np.log1p(np.exp(-random.normal(2.2, 2.2, size))),
    "solved": solved,
    "log-normal": lambda random, size: 0.2 * np.exp(1.5 * random.normal(size=size)),
    "infinite variance": lambda random, size: 0.2 * random.pareto(1.5, size),
}


@pytest.mark.parametrize("batch", [8, 16, 32])
@pytest.mark.parametrize("kind", ROWS)
def test_hard_batches_are_no_spikes_but_a_damaged_model_is_found_within_a_few_steps(kind, batch):
    random = np.random.default_rng(batch)
    losses = ROWS[kind](random, (2000, batch)).mean(1)
    assert spike_steps(losses) == []
    found = 0
    for calm in losses.reshape(40, 50):
        # After a fall the loss grows by half in each step, or is three times the highest at once.
        falling = calm + np.exp(-np.arange(50) / 5)
        for damage in (calm.max() * 1.5 ** np.arange(8), 3 * calm.max() * np.ones(8)):
            steps = spike_steps([*falling, *(calm[:8] + damage)])
            found += bool(steps) and 50 < steps[0] <= 50 + 8
    assert found >= 78


@pytest.mark.parametrize(("before", "most", "place"), [(0, 3, 4), (0, 4, None), (2, 3, 0), (1, 3, 4)])
def test_skipped_steps_in_a_row(before, most, place):
    rows = [row(1.0, skipped=float(letter == "x")) for letter in "x.xxx."]
    assert index_of_skip_limit(SpikeHistory(skipped=before), rows, most) == place


@pytest.mark.parametrize(
    ("names", "said", "unsaid"),
    [
        (["loss", "grad_norm/a"], ("gradient", "max_grad_norm"), ("product",)),
        (["update_norm/b"], ("lr_ratio", 4, "product"), ("max_grad_norm", "gradient")),
        (["update_norm/a"], ("learning_rate", 0.1), ("max_grad_norm", "lr_ratio")),
    ],
)
def test_advice_follows_from_what_was_not_finite(names, said, unsaid):
    optimizer = types.SimpleNamespace(learning_rate=0.1, max_grad_norm=None, warmup_steps=0)
    run = types.SimpleNamespace(settings=types.SimpleNamespace(optimizer=optimizer, lr_ratio=4.0))
    text = advice(run, names)  # pyright: ignore
    assert_mentions(text, *said)
    assert not any(words in text for words in unsaid)
