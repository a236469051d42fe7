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
    # The order is 2, 5, 0, 3, 1, 4, so the lengths 2, 7, 1, 8, 9, 4. Without noise the groups are 9 and 8, 7 and 4,
    # 2 and 1. Drawn are 9, 7, 2 and 8, 4, 1, of 18 and 13: 7 and 4 are swapped, of 15 and 16, and no two after.
    lengths = np.array([1, 9, 2, 8, 4, 7])
    order, draws = [2, 4, 0, 3, 5, 1], [1, 0, 0, 1, 1, 0]
    keys = np.array([order, np.zeros(6), draws], np.uint64)
    assert even_batches(keys, lengths, 3).tolist() == [[2, 1, 4], [5, 0, 3]]
    # Of equal lengths noise, not the order, decides which are in the first group: 9 and text 3. Drawn are 9, 7, 2
    # and 7, 7, 1, of 18 and 15: 9 and text 3 are swapped.
    lengths, keys[1] = np.array([1, 9, 2, 7, 7, 7]), [0, 0, 0, 3, 6, 9]
    assert even_batches(keys, lengths, 3).tolist() == [[2, 5, 3], [0, 1, 4]]


def spread_lengths(kind):
    rng = np.random.default_rng(0)
    if kind == "few lengths":  # as of film reviews
        return rng.integers(4, 49, 2000)
    if kind == "distinct":
        return 20 + rng.permutation(320)
    if kind == "long documents":
        return rng.choice(np.arange(100, 2000), 640, replace=False)
    return np.clip(np.exp(rng.normal(4, 0.6, 1200)).astype(int), 10, 256)  # a long tail, as of pairs of texts


KINDS = ["few lengths", "distinct", "long documents", "long tail"]


def orders(lengths, batch_size, seeds):
    return [batch_order(len(lengths), batch_size=batch_size, seed=seed, lengths=lengths) for seed in seeds]


@pytest.mark.parametrize("batch_size", [8, 16, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_pairs_meet_again_as_often_as_in_random_batches(kind, batch_size):
    """Over epochs and seeds, while the sums of batches differ by 2.5 % (standard deviation), of 8 by 5 %."""
    lengths = spread_lengths(kind)
    size, count = len(lengths), len(lengths) // batch_size
    labels, sums = [], []
    for order in orders(lengths, batch_size, range(4)):
        for epoch in range(5):
            batches = np.array([order[epoch * count + n] for n in range(count)])
            assert len(np.unique(batches)) == count * batch_size
            labels.append(np.full(size, count))
            labels[-1][batches] = np.arange(count)[:, None]
            sums.append(lengths[batches].sum(axis=1) / lengths[batches].sum() * count)
    assert np.std(sums) < (0.05 if batch_size == 8 else 0.025)
    again = []
    for n, a in enumerate(labels):
        for b in labels[:n]:
            together = np.bincount(a * (count + 1) + b, minlength=(count + 1) ** 2).reshape(count + 1, -1)
            again.append((together * (together - 1) // 2)[:count, :count].sum())
    pairs = count * batch_size * (batch_size - 1) / 2
    assert 0.97 < np.mean(again) / (pairs**2 / (size * (size - 1) / 2)) < 1.06


@pytest.mark.parametrize("kind", KINDS)
def test_the_place_in_an_epoch_says_nothing_of_a_length(kind):
    lengths = spread_lengths(kind)
    count = len(lengths) // 16
    places: dict[str, list[float]] = {"short": [], "long": [], "slot": []}
    for order in orders(lengths, 16, range(40)):
        batches = np.array([order[n] for n in range(count)])
        of = lengths[batches]
        index = np.broadcast_to(np.arange(count)[:, None] / (count - 1), of.shape)
        places["short"].append(index[of <= np.quantile(lengths, 0.1)].mean())
        places["long"].append(index[of >= np.quantile(lengths, 0.9)].mean())
        # The first rows of a batch are taken to measure and to start from.
        places["slot"].append(of[:, 0].mean() / of.mean())
    mean = {name: np.mean(values) for name, values in places.items()}
    assert mean == pytest.approx({"short": 0.5, "long": 0.5, "slot": 1}, abs=0.03)


def test_the_order_of_even_batches_does_not_change_with_versions():
    # From NumPy's Philox and SeedSequence, whose streams are fixed: a resumed run continues its order.
    order = batch_order(6, batch_size=2, seed=0, lengths=np.array([4, 4, 4, 2, 2, 2]))
    assert [order[n].tolist() for n in range(6)] == [[0, 3], [5, 2], [1, 4], [3, 0], [4, 2], [1, 5]]


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
