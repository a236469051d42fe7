"""Loss spikes are seen at the very step; skipped steps are counted over rows and interruptions."""

import types

import pytest

from loraplus_jax.training.anomalies import (
    HISTORY_STEPS,
    NOISE,
    SpikeHistory,
    advice,
    find_spikes,
    index_of_skip_limit,
)

from ..messages import assert_mentions


def row(loss, norm=1.0, skipped=0.0):
    return {"loss": loss, "accuracy": 0.5, "grad_norm/b": norm, "update_norm/a": 2 * norm, "skipped": skipped}


def test_one_step_of_eight_times_the_loss_in_a_window_of_ten_is_named_with_its_own_norms():
    rows = [row(1.0) for _ in range(10)]
    rows[6] = row(8.0, norm=30.0)
    seen, (jump,) = find_spikes(SpikeHistory((1.0, 1.1, 0.9)), 11, rows)
    assert (jump.step, jump.loss, jump.median) == (17, 8.0, 1.0)
    assert jump.norms == {"grad_norm/b": 30.0, "update_norm/a": 60.0}
    norms = {"spike/grad_norm/b": 30.0, "spike/update_norm/a": 60.0}
    assert jump.values() == {"spike/loss": 8.0, "spike/median": 1.0} | norms
    assert_mentions(str(jump), "step 17", "8.0000", "1.0000", "grad_norm/b 30", "update_norm/a 60")
    assert seen.losses[-4:] == (8.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("cut", [0, 10, 11, 20, 33, 34, 35, 40])
def test_where_rows_are_cut_does_not_matter(cut):
    rows = [row(1.0 + 0.01 * (n % 7)) for n in range(40)]
    rows[10], rows[33], rows[34] = row(5.0), row(3.0), row(0.0, skipped=1.0)
    whole, jumps = find_spikes(SpikeHistory(), 1, rows)
    middle, first = find_spikes(SpikeHistory(), 1, rows[:cut])
    end, second = find_spikes(middle, cut + 1, rows[cut:])
    assert (end, first + second) == (whole, jumps)
    assert [jump.step for jump in jumps] == [11, 34]
    assert len(whole.losses) == HISTORY_STEPS


def test_losses_that_always_jump_about_are_no_spikes_and_skipped_ones_do_not_count():
    noisy = tuple(float(2 ** (n % 5)) for n in range(20))  # a median of 4, most of them 2 to 3 away from it
    assert find_spikes(SpikeHistory(noisy), 1, [row(9.0), row(4 + 3 * NOISE)])[1] == []
    assert len(find_spikes(SpikeHistory(noisy), 1, [row(5 + 3 * NOISE)])[1]) == 1
    nan = float("nan")
    seen, jumps = find_spikes(SpikeHistory(noisy[:3], skipped=1), 1, 2 * [row(nan, skipped=1.0)])
    assert (seen, jumps) == (SpikeHistory(noisy[:3], skipped=3), [])


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
