import numpy as np
import pytest

from loraplus_jax.models.checkpoints import params
from loraplus_jax.models.checkpoints.merge import CheckpointMerge, merged_tensors
from loraplus_jax.models.files import open_files

from .test_params import EXPECTED, TABLE, tensors, write


@pytest.mark.parametrize(("values_per_read", "tok_rows"), [(6, [2, 2, 2, 1]), (1, [1] * 7), (100, [7])])
def test_unadapted_tensors_are_copied_in_pieces(values_per_read, tok_rows, tmp_path, monkeypatch):
    monkeypatch.setattr(params, "_PIECE", 4 * values_per_read)
    content = tensors()
    files = open_files(write(tmp_path, content))
    leaves, found = params.check_params(files, TABLE, EXPECTED, new=("head",))
    merge = CheckpointMerge(TABLE, leaves, {}, {}, {})
    copied = {tensor.name: list(tensor.rows()) for tensor, _ in list(merged_tensors(files, merge))}
    assert [len(piece) for piece in copied["tok.weight"]] == tok_rows
    assert {name: np.shape(pieces[0]) for name, pieces in copied.items()}["lm_head.bias"] == ()
    for name, pieces in copied.items():
        np.testing.assert_array_equal(
            np.concatenate(pieces) if np.ndim(pieces[0]) else pieces[0], content[name]
        )
    digest = params.values_digest(found)
    monkeypatch.undo()
    assert params.values_digest(found) == digest
