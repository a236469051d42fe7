import numpy as np
import pytest

from loraplus_jax.data.batches import add_rows, even_batch_size, first_batches, train_batches
from loraplus_jax.data.packed_rows import ragged
from loraplus_jax.data.text_rows import TextRows, choose_counts, fill_rows, text_lengths


def columns(lengths):
    """Texts whose n-th has the tokens 10 n + 1, 10 n + 2, ..., and the label n."""
    ids = ragged(10 * n + np.arange(1, length + 1) for n, length in enumerate(lengths))
    types = ragged((np.arange(length) > 0).astype(np.int32) for length in lengths)
    return {"input_ids": ids, "token_type_ids": types, "label": np.arange(len(lengths), dtype=np.float32)}


def texts_of(batch):
    """Tokens, types and label of every text in the rows, by its label."""
    found = {}
    for ids, mask, types, labels, weights in zip(
        *(batch[n] for n in ("input_ids", "attention_mask", "token_type_ids", "label", "weight")), strict=True
    ):
        assert sorted({*mask.tolist()} - {0}) == [n + 1 for n, w in enumerate(weights) if w]
        for slot in np.flatnonzero(weights):
            at = mask == slot + 1
            assert labels[slot] not in found
            found[labels[slot]] = ids[at].tolist(), types[at].tolist()
    return found


def test_rows_by_hand():
    batch, places = fill_rows(columns([2, 3, 1]), [[0, 2], [1]], count=3, length=4, texts=2)
    assert places.tolist() == [[0, 0], [0, 1], [1, 0]]
    assert batch["input_ids"].tolist() == [[1, 2, 21, 0], [11, 12, 13, 0], [0] * 4]
    assert batch["attention_mask"].tolist() == [[1, 1, 2, 0], [1, 1, 1, 0], [0] * 4]
    assert batch["token_type_ids"].tolist() == [[0, 1, 0, 0], [0, 1, 1, 0], [0] * 4]
    assert batch["label"].tolist() == [[0, 2], [1, 0], [0, 0]]
    assert batch["weight"].tolist() == [[1, 1], [1, 0], [0, 0]]
    assert batch["weight"].dtype == batch["label"].dtype == np.float32


@pytest.mark.parametrize("seed", range(5))
def test_every_text_of_a_batch_stands_in_it_once(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 20, 60)
    data = columns(lengths)
    rows = TextRows.fitting(text_lengths(data))
    assert (rows.length, rows.texts) == (lengths.max(), lengths.max() // lengths.min())
    batches = first_batches(60, batch_size=8, seeds=[seed], count=7)
    rows = rows.for_batches(lengths, batches, multiple=2, least_saving=0.01)
    alone = {n: (data["input_ids"][n].tolist(), [0] + [1] * (t - 1)) for n, t in enumerate(lengths)}
    for batch, indices in zip(
        train_batches(data, batch_size=8, seed=seed, arrange=rows.arrange), batches, strict=False
    ):
        assert len(batch["weight"]) in rows.counts
        assert batch["input_ids"].shape == (len(batch["weight"]), rows.length)
        assert batch["label"].shape == batch["weight"].shape == (len(batch["weight"]), rows.texts)
        assert texts_of(batch) == {n: alone[n] for n in indices}
    filled, places = rows.arrange_all(data)
    assert texts_of(filled) == alone
    np.testing.assert_array_equal(filled["label"][places[:, 0], places[:, 1]], np.arange(60))
    # Best-fit decreasing never needs more (arXiv math/9312214): 11/9 of the fewest rows, and 4.
    assert len(filled["weight"]) <= 11 / 9 * np.ceil(lengths.sum() / rows.length) + 4


def test_a_batch_that_needs_more_rows_than_were_chosen_has_a_multiple_of_them():
    rows = TextRows(length=4, texts=4, counts=(2, 4), multiple=2)
    counts = [len(rows.arrange(columns([4] * n + [1]), np.arange(n + 1))["weight"]) for n in (0, 1, 3, 4, 7)]
    assert counts == [2, 2, 4, 6, 8]


def test_numbers_of_rows_are_worth_their_programs():
    needed = {6: 50, 8: 40, 12: 10}
    # With 8: 90 of 100 batches save a third of the rows, 0.3; with 6 too: 50 save 2 rows of 12 more, 1/12.
    assert choose_counts(needed, 0.31) == (12,)
    assert choose_counts(needed, 0.29) == (8, 12)
    assert choose_counts(needed, 0.08) == (6, 8, 12)
    assert choose_counts({7: 3}, 0.0) == (7,)
    assert len(choose_counts(dict.fromkeys(range(1, 20), 1), 0.0)) == 4


def test_the_share_of_text_is_that_of_the_batches():
    lengths = np.array([3, 1, 4, 2])
    rows = TextRows.fitting(lengths).for_batches(lengths, [np.array([0, 1]), np.array([2, 3])], 1, 0.0)
    assert (rows.counts, rows.full) == ((1, 2), 10 / 12)


def test_rows_are_added_and_batches_even():
    batch = add_rows({"weight": np.ones((2, 3)), "label": np.ones(2)}, 4)
    assert {name: x.sum(axis=tuple(range(1, x.ndim))).tolist() for name, x in batch.items()} == {
        "weight": [3, 3, 0, 0],
        "label": [1, 1, 0, 0],
    }
    assert [even_batch_size(rows, 64, 8) for rows in (1, 64, 65, 130)] == [8, 64, 40, 48]
