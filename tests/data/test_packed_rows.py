"""Sequences packed and padded into rows."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplus_jax.data.packed_rows import fill, lengths_of, plan_packing, ragged


def _sequences(lengths):
    """Tokens that all differ."""
    ends = np.cumsum(lengths)
    ids = [np.arange(e - n, e, dtype=np.int32) + 1 for e, n in zip(ends, lengths, strict=True)]
    return {"input_ids": ragged(ids), "loss_mask": ragged((i % 3 == 0).astype(np.float32) for i in ids)}


def pack(sequences, length):
    rows = plan_packing(lengths_of(sequences["input_ids"]), length)
    return fill(sequences, rows, len(rows), length)[0]


def pad(sequences, length):
    rows = [[index] for index in range(len(sequences["input_ids"]))]
    return fill(sequences, rows, len(rows), length)[0]


def _unpacked(arrays):
    found = []
    for ids, segments, mask in zip(
        *(arrays[k] for k in ("input_ids", "segment_ids", "loss_mask")), strict=True
    ):
        for segment in range(1, segments.max() + 1):
            (places,) = np.nonzero(segments == segment)
            assert (np.diff(places) == 1).all()
            found.append((ids[places].tolist(), mask[places].tolist()))
        assert not ids[segments == 0].any()
        assert not mask[segments == 0].any()
    return sorted(found)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(1, 16), max_size=40))
def test_packing_moves_no_token_between_sequences(lengths):
    sequences = _sequences(lengths)
    packed, padded = pack(sequences, 16), pad(sequences, 16)
    assert _unpacked(packed) == _unpacked(padded)
    assert len(_unpacked(padded)) == len(lengths)
    rows = len(packed["input_ids"])
    assert rows <= len(lengths)
    assert all((np.diff(np.nonzero(s)[0]) == 1).all() for s in packed["segment_ids"])
    filled = sorted((packed["segment_ids"] > 0).sum(1))
    assert rows < 2 or filled[0] + filled[1] > 16  # no two rows could be one
    again = pack(sequences, 16)
    assert all((again[k] == packed[k]).all() for k in packed)


def test_packing_by_hand():
    packed = pack(_sequences([3, 5, 2, 4, 1]), 6)
    assert packed["input_ids"].tolist() == [[1, 2, 3, 0, 0, 0], [4, 5, 6, 7, 8, 15], [9, 10, 11, 12, 13, 14]]
    assert packed["segment_ids"].tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 2], [1, 1, 2, 2, 2, 2]]
    assert packed["loss_mask"].tolist() == [[0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 1], [1, 0, 0, 1, 0, 0]]
    assert (packed["segment_ids"] == 0).sum() == 3
    assert (pad(_sequences([3, 5, 2, 4, 1]), 6)["segment_ids"] == 0).sum() == 15
    assert pack(_sequences([]), 6)["segment_ids"].size == 0


def test_a_hundred_thousand_sequences_are_packed_almost_without_padding():
    lengths = np.random.default_rng(0).integers(1, 512, 100_000).tolist()
    rows = plan_packing(lengths, 512)
    assert sorted(i for row in rows for i in row) == list(range(100_000))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 512
    assert len(rows) < 1.01 * sum(lengths) / 512
