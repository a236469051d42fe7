"""Which weights are packed, and that the blocks of a file stay as they are."""

import numpy as np
import pytest

from loraplus_jax.adapter.tree import flatten, unflatten
from loraplus_jax.inference.write_gguf import write_gguf
from loraplus_jax.models.checkpoints.params import load_params
from loraplus_jax.models.checkpoints.quantized import choose_formats, pack_shapes
from loraplus_jax.models.files import open_files
from loraplus_jax.models.gpt2.model import name_table

from ...messages import mentions
from .gguf.files import gguf_of

PRODUCTS = {f"layers/{name}/kernel" for name in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")}


def test_products_are_packed_unless_they_are_excluded(models, tmp_path):
    table = name_table(models("gpt2_tied")[1].config)
    assert choose_formats(table, "none", None, open_files(tmp_path)) == {}
    assert choose_formats(table, "nf4", None, open_files(tmp_path)) == dict.fromkeys(PRODUCTS, "nf4")
    some = choose_formats(table, "int8", ["attn/c_proj", "embed_positions"], open_files(tmp_path))
    embedding = {"embed_tokens/embedding"}
    assert some == dict.fromkeys(PRODUCTS - {"layers/attn/c_proj/kernel"} | embedding, "int8")
    with pytest.raises(ValueError, match=mentions("model.quantize_exclude", "'c_prj'", "layers/mlp/c_proj")):
        choose_formats(table, "nf4", ["c_prj"], open_files(tmp_path))


def test_only_a_gguf_file_with_blocks_has_blocks(models, base, tmp_path):
    table = name_table(models("gpt2_tied")[1].config)
    for path, words in (
        (base[0], ["GGUF", "nf4", "int8"]),
        (gguf_of(base[0], tmp_path / "m.gguf"), ["blocks"]),
    ):
        with pytest.raises(ValueError, match=mentions(path, *words)):
            choose_formats(table, "file", None, open_files(path))


@pytest.mark.slow
def test_the_blocks_of_a_file_stay_as_they_are(split, base, tmp_path):
    (model, shapes), (folder, merge) = split, base
    table, file = name_table(model.config), tmp_path / "q8.gguf"
    write_gguf(file, open_files(gguf_of(folder, tmp_path / "m.gguf")), merge, "q8_0")
    formats = choose_formats(table, "file", None, open_files(file))
    assert {f"layers/attn/{name}_attn/kernel" for name in "qkv"} <= formats.keys()
    packed = unflatten(pack_shapes(flatten(shapes), formats, table))
    blocks, values = (load_params(open_files(file), table, tree) for tree in (packed, shapes))
    for name in "qkv":
        kernels = (tree["layers"]["attn"][f"{name}_attn"]["kernel"] for tree in (blocks, values))
        np.testing.assert_array_equal(next(kernels).dequantize(), next(kernels))
