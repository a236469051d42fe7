"""What runs on a quantized base hold: which weights, in which blocks; `test_language.py` has their properties."""

import gguf
import jax
import pytest
from safetensors.numpy import load_file

from loraplus_jax.data.fetch import resolve
from loraplus_jax.models.files import open_files
from loraplus_jax.quantization.packed_array import is_packed
from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.training.setup import build_model, load_model

from ..messages import assert_mentions
from . import language_world as tiny
from .runs import flags

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]

NF4 = ("--model.quantize", "nf4")


def parts_of(world, *overrides):
    """The loaded model of the world's settings."""
    settings = parse_settings(world.config, [*overrides])
    files = open_files(resolve(settings.model.path, "model"))
    return load_model(settings, files, build_model(settings, files, None, settings.applied))


def packed_paths(parts):
    leaves = jax.tree_util.tree_leaves_with_path(parts.frozen, is_leaf=is_packed)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves if is_packed(x)}


def test_what_trains_whole_is_not_quantized(talk):
    saved = flags("--lora.target_modules [q_proj] --lora.modules_to_save [o_proj]")
    names = [f"self_attn/{n}_proj" for n in "qkv"] + [f"mlp/{n}_proj" for n in ("gate", "up", "down")]
    assert set(packed_paths(parts_of(talk, *NF4, *saved))) == {f"params/layers/{n}/kernel" for n in names}


def gguf_of(talk, kinds):
    """The world's model as a GGUF file with matrices in blocks: names in a layer to the type in each layer."""
    weights, raw = load_file(talk.model / "model.safetensors"), {}
    for layer in range(tiny.LAYERS):
        for (ours, theirs), types in kinds.items():
            number = gguf.GGMLQuantizationType[types[layer]]
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            raw[f"blk.{layer}.{theirs}.weight"] = types[layer], gguf.quants.quantize(weight, number)
    return tiny.write_gguf_of(talk.model, talk.directory / "tiny.gguf", raw=raw)


def test_loading_holds_one_layer_s_values(talk, monkeypatch):
    """Every read is of one layer, and what stays is packed."""
    from loraplus_jax.models.checkpoints import quantized as packing

    sizes, original = [], packing.pack_matrix
    monkeypatch.setattr(
        packing, "pack_matrix", lambda kind, rows: (sizes.append(rows.shape), original(kind, rows))[1]
    )
    parts_of(talk, *NF4)
    assert len(sizes) == 7 * tiny.LAYERS
    assert max(sizes) == (tiny.INNER, tiny.HIDDEN)


def test_a_file_with_mixed_layers_is_named(talk, capsys):
    path = gguf_of(talk, {("self_attn.v_proj", "attn_v"): ("Q4_1", "Q8_0")})
    error = talk.rejected(capsys, "--model.path", str(path), "--model.quantize", "file")
    assert_mentions(error, "v_proj", "Q4_1", "Q8_0", "model.quantize_exclude")
