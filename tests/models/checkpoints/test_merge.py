import numpy as np
import pytest

from loraplus_jax.models.checkpoints import hf
from loraplus_jax.models.checkpoints.merge import CheckpointMerge, merged_tensors

from .test_hf import EXPECTED, TABLE, tensors, write


@pytest.mark.parametrize(("values_per_read", "tok_rows"), [(6, [2, 2, 2, 1]), (1, [1] * 7), (100, [7])])
def test_unadapted_tensors_are_copied_in_pieces(values_per_read, tok_rows, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "_PIECE", 4 * values_per_read)
    content = tensors()
    leaves, found = hf.check_params(write(tmp_path, content), TABLE, EXPECTED, new=("head",))
    merge = CheckpointMerge(TABLE, leaves, {}, {}, {})
    copied = {tensor.name: list(tensor.rows()) for tensor, _ in list(merged_tensors(tmp_path, merge))}
    assert [len(piece) for piece in copied["tok.weight"]] == tok_rows
    assert {name: np.shape(pieces[0]) for name, pieces in copied.items()}["lm_head.bias"] == ()
    for name, pieces in copied.items():
        np.testing.assert_array_equal(
            np.concatenate(pieces) if np.ndim(pieces[0]) else pieces[0], content[name]
        )
    digest = hf.values_digest(found)
    monkeypatch.undo()
    assert hf.values_digest(found) == digest
