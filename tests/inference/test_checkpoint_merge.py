import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax.adapter.spec import AdapterSpec
from loraplus_jax.adapter.tree import unflatten
from loraplus_jax.inference.checkpoint_merge import CheckpointMerge, merged_tensors
from loraplus_jax.models.checkpoints import params
from loraplus_jax.models.files import open_files

from ..messages import mentions
from ..models.checkpoints.test_params import EXPECTED, TABLE, tensors, write

LEAF = "params/layers/up/kernel"


def spec_of(axes, stacked=()):
    shape = {"shape": (2, 3, 4), "rank": 2, "scale": 0.5, "stacked": stacked}
    return AdapterSpec(leaf=LEAF, kind="parameter", axes=axes, **shape)


@pytest.mark.parametrize(("axes", "stacked"), [("lio", ()), ("io", (0,))])
def test_layers_are_a_stacked_axis_or_one_with_a_letter_of_its_own(axes, stacked, tmp_path):
    spec, rng = spec_of(axes, stacked), np.random.default_rng(0)
    lora = {f.path: jnp.array(rng.normal(size=f.shape)) for f in spec.factors_of("layers/up/kernel")}
    files = open_files(write(tmp_path, tensors()))
    leaves, _ = params.check_params(files, TABLE, EXPECTED, new=("head",))
    merge = CheckpointMerge(TABLE, leaves, {"layers/up/kernel": spec}, unflatten(lora), {})
    merged = {
        name: np.concatenate([*tensor.rows()])
        for tensor, name in merged_tensors(files, merge)
        if "fc.w" in name
    }
    a, b = lora.values()
    for layer in range(2):
        name = f"h.{layer}.fc.weight"
        expected = tensors()[name] + 0.5 * (a[layer] @ b[layer]).T
        np.testing.assert_allclose(merged[name], expected, atol=1e-6)


def test_layers_that_share_a_factor_are_not_merged_into_files(tmp_path):
    leaves, _ = params.check_params(open_files(write(tmp_path, tensors())), TABLE, EXPECTED, new=("head",))
    with pytest.raises(ValueError, match=mentions(LEAF, "'iio'", "lora.target_parameters", "'lio'")):
        CheckpointMerge(TABLE, leaves, {"layers/up/kernel": spec_of("iio")}, {}, {})


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
