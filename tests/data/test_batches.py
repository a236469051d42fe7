"""Batches of training and of evaluation: shapes, order, shares of processes, position."""

import numpy as np
import pytest

from loraplus_jax.data.batches import batch_order, eval_batches, even_batches, train_batches

from ..refusals import refusals


def _columns(n: int) -> dict[str, np.ndarray]:
    return {"row": np.arange(n, dtype=np.int32), "twice": np.arange(n, dtype=np.int32)[:, None] * [2, 2]}


def _taken(batch, count: int, seed: int = 0) -> list[list[int]]:
    return [batch(seed, step)["row"].tolist() for step in range(count)]


def test_train_batches_have_one_shape_and_keep_rows_together():
    batches = train_batches(_columns(10), batch_size=4)
    for step in range(7):
        batch = batches(0, step)
        assert {k: (v.shape, v.dtype.name) for k, v in batch.items() if k != "twice"} == {
            "row": ((4,), "int32"),
            "weight": ((4,), "float32"),
        }
        assert batch["weight"].tolist() == [1, 1, 1, 1]
        assert (batch["twice"] == 2 * batch["row"][:, None]).all()


def test_each_epoch_is_another_shuffle_of_distinct_rows():
    rows = np.concatenate(_taken(train_batches(_columns(12), batch_size=4), 12))
    epochs = rows.reshape(4, 12).tolist()
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, list(range(12))]}) == 5


def test_the_seed_decides_the_order():
    def order(seed):
        return _taken(train_batches(_columns(30), batch_size=10), 6, seed)

    assert order(1) == order(1) != order(2)


def test_processes_share_each_batch_of_an_evaluation():
    whole = [batch["x"].tolist() for batch in eval_batches({"x": np.arange(10)}, 4)]
    shares = [list(eval_batches({"x": np.arange(10)}, 4, rows)) for rows in ([0, 3], [1, 2])]
    assert whole == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 9, 9]]
    assert [batch["x"].tolist() for batch in shares[0]] == [[0, 3], [4, 7], [8, 9]]
    assert [batch["weight"].tolist() for batch in shares[0]] == [[1, 1], [1, 1], [1, 0]]
    assert [batch["weight"].tolist() for batch in shares[1]] == [[1, 1], [1, 1], [1, 0]]


@pytest.mark.parametrize("lengths", [None, np.arange(23)])
def test_a_batch_depends_on_seed_and_step_alone(lengths):
    straight = _taken(train_batches(_columns(23), batch_size=4, lengths=lengths), 15, seed=5)
    # As a resumed run asks, and one that goes back to an earlier epoch; other seeds lie between.
    batch = train_batches(_columns(23), batch_size=4, lengths=lengths)
    for step in (13, 0, 14, 4, 5, 1):
        batch(6, step)
        assert batch(5, step)["row"].tolist() == straight[step]


def test_batches_of_even_length_by_hand():
    lengths, order = np.array([1, 9, 2, 8, 3, 7]), np.array([2, 5, 0, 3, 1, 4])
    # 9 to the first batch and 8 to the second; 7 to the second, 3 to the first; 2 to the first, 1 to the second.
    # Theirs are the texts 1, 4, 2 and 3, 5, 0, in the given order, which also is that of the batches.
    assert even_batches(order, lengths, 2).tolist() == [[2, 1, 4], [5, 0, 3]]
    assert even_batches(order[1:5], lengths, 2).tolist() == [[5, 3], [0, 1]]


def test_batches_of_even_length_hold_each_example_once_an_epoch():
    lengths = 1 + np.random.default_rng(0).permutation(203)
    order = batch_order(203, batch_size=10, seed=4, lengths=lengths)
    epochs = np.array([order[n] for n in range(60)]).reshape(3, 200)
    assert all(len({*epoch.tolist()}) == 200 for epoch in epochs)
    assert (np.sort(epochs) != np.sort(epochs[0])).any()  # another three are left out
    sums = lengths[epochs.reshape(60, 10)].sum(axis=1).reshape(3, 20)
    assert (np.ptp(sums, axis=1) < 0.03 * sums.mean()).all()
    # Each batch has one of the longest, one of the next, and so on.
    ranks = np.argsort(np.argsort(-lengths[epochs[0]], kind="stable"))
    assert (np.sort(ranks.reshape(20, 10) // 20) == np.arange(10)).all()
    again = batch_order(203, batch_size=10, seed=5, lengths=lengths)
    assert [set(again[n]) for n in range(20)] != [set(order[n]) for n in range(20)]


def test_the_order_of_even_batches_says_nothing_of_their_lengths():
    lengths = np.arange(1, 101)
    # The batch with the longest example of all: anywhere in the epoch.
    orders = [batch_order(100, batch_size=5, seed=seed, lengths=lengths) for seed in range(60)]
    at = [next(n for n in range(20) if 99 in order[n]) for order in orders]
    assert 7 < np.mean(at) < 12
    assert len({*at}) > 15
    # And its place in it, as the first rows are taken to measure and to start from.
    places = [order[n].tolist().index(99) for order, n in zip(orders, at, strict=True)]
    assert 1 < np.mean(places) < 3
    assert len({*places}) == 5


def test_the_order_of_even_batches_does_not_change_with_versions():
    # By hand from NumPy's Philox and SeedSequence, whose streams are fixed: a resumed run continues its order.
    order = batch_order(6, batch_size=2, seed=0, lengths=np.array([4, 4, 4, 2, 2, 2]))
    assert [order[n].tolist() for n in range(6)] == [[0, 3], [5, 1], [2, 4], [3, 2], [4, 1], [5, 0]]


test_batches_that_are_rejected = refusals(
    (lambda: train_batches(_columns(10), batch_size=11), "batch_size", 10, 11),
    (lambda: train_batches(_columns(10), batch_size=0), "batch_size", 1, 0),
    (lambda: train_batches(_columns(10), batch_size=4)(-1, 0), "seed", 0, -1),
    (lambda: next(eval_batches({"a": np.zeros(3), "b": np.zeros(4)}, 2)), "rows"),
    (lambda: next(eval_batches({}, 2)), "rows"),
)


@pytest.mark.parametrize(("rows", "batch_size"), [(10, 4), (8, 4), (3, 8), (1, 1), (0, 2)])
def test_eval_batches_hold_every_row_once(rows, batch_size):
    batches = list(eval_batches(_columns(rows), batch_size))
    assert all(len(batch["row"]) == len(batch["weight"]) == batch_size for batch in batches)
    counted = [r for batch in batches for r, w in zip(batch["row"], batch["weight"], strict=True) if w == 1]
    assert counted == list(range(rows))
    assert all((batch["row"][batch["weight"] == 0] == rows - 1).all() for batch in batches)
    assert sum(batch["weight"].sum() for batch in batches) == rows
    assert all(batch["weight"].dtype == np.float32 for batch in batches)
