import numpy as np
import pytest

from loraplus_jax.data.batches import add_rows, even_batch_size, first_batches, train_batches
from loraplus_jax.data.packed_rows import ragged
from loraplus_jax.data.text_rows import TextRows, fill_rows


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
    batches = first_batches(60, batch_size=8, seeds=[seed], count=7, lengths=lengths)
    rows = TextRows.for_batches(lengths, batches, 40, multiple=2)
    assert rows.length in (24, 32, 40)
    assert (rows.texts, rows.count % 2) == (rows.length // lengths.min(), 0)
    assert rows.full == lengths[batches].sum() / (7 * rows.count * rows.length)
    alone = {n: (data["input_ids"][n].tolist(), [0] + [1] * (t - 1)) for n, t in enumerate(lengths)}
    drawn = train_batches(data, batch_size=8, arrange=rows.arrange, lengths=lengths)
    for step, indices in enumerate(batches):
        batch = drawn(seed, step)
        assert batch["input_ids"].shape == (rows.count, rows.length)
        assert batch["label"].shape == batch["weight"].shape == (rows.count, rows.texts)
        assert texts_of(batch) == {n: alone[n] for n in indices}
    filled, places = rows.arrange_all(data)
    assert texts_of(filled) == alone
    np.testing.assert_array_equal(filled["label"][places[:, 0], places[:, 1]], np.arange(60))
    # Best-fit decreasing never needs more (arXiv math/9312214): 11/9 of the fewest rows, and 4.
    assert len(filled["weight"]) <= 11 / 9 * np.ceil(lengths.sum() / rows.length) + 4


def test_a_batch_that_needs_more_rows_than_were_chosen_has_a_multiple_of_them():
    rows = TextRows(length=4, texts=4, count=2, multiple=2)
    counts = [len(rows.arrange(columns([4] * n + [1]), np.arange(n + 1))["weight"]) for n in (0, 1, 3, 4, 7)]
    assert counts == [2, 2, 4, 6, 8]


def test_the_shortest_rows_are_of_eight_tokens_or_the_most():
    assert TextRows.fitting(np.array([3, 17]), 100) == TextRows(length=24, texts=8)
    assert TextRows.fitting(np.array([3, 17]), 20) == TextRows(length=20, texts=6)


def test_rows_are_as_long_as_makes_a_step_cheapest():
    lengths = np.array([9, 9, 9, 5, 4, 9])
    batches = np.array([[0, 1, 2, 3], [4, 5, 0, 1]])  # 32 and 31 tokens
    # Rows of 16 tokens: 9 and 5 or 4 fit into one, so 3; of 24: two of 9 and 5 or 4, so 2; of 32 one.
    # Their cost: 48 (1 + 16 / 600), 48 (1 + 24 / 600), 32 (1 + 32 / 600).
    chosen = TextRows.for_batches(lengths, batches, 512, 1)
    assert (chosen.length, chosen.texts, chosen.count, chosen.full) == (32, 8, 1, 63 / 64)
    assert TextRows.for_batches(lengths, batches, 24, 1).length == 16
    assert TextRows.for_batches(lengths, batches, 24, 2).count == 2  # rows of 24, as those of 16 would be 4
    assert TextRows.for_batches(lengths, batches, 12, 1) == TextRows(12, 3, 4, 1, 63 / 96)


def test_a_later_batch_counts_too():
    lengths = np.repeat([8, 16], [80, 2])
    batches = np.arange(80).reshape(40, 2).repeat(2, axis=0)  # more than are tried, each of one row of 16
    assert TextRows.for_batches(lengths, batches, 16, 1).count == 1
    assert TextRows.for_batches(lengths, np.concatenate([batches, [[80, 81]]]), 16, 1).count == 2


def test_rows_are_added_and_batches_even():
    batch = add_rows({"weight": np.ones((2, 3)), "label": np.ones(2)}, 4)
    assert {name: x.sum(axis=tuple(range(1, x.ndim))).tolist() for name, x in batch.items()} == {
        "weight": [3, 3, 0, 0],
        "label": [1, 1, 0, 0],
    }
    assert [even_batch_size(rows, 64, 8) for rows in (1, 64, 65, 130)] == [8, 64, 40, 48]
