"""Packed weights against values by hand, an independent float64 implementation, and the gguf package."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax.quantization.formats import NF4
from loraplus_jax.quantization.packed_array import packed_shape, quantize, storage_order

from ..refusals import refusals


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4.13), ("int8", 8.1)])
def test_bits_on_the_device(kind, bits):
    packed = quantize(draw(3, 576, 1536), kind, stacked=1)
    live = sum(shard.data.nbytes for part in packed.parts.values() for shard in part.addressable_shards)
    assert live == packed.nbytes
    assert 8 * live / packed.size <= bits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "axes", "shape", "stacked", "embedding"),
    [
        ("nf4", "oio", (2, 64, 3), 0, False),
        ("int8", "eio", (3, 64, 5), 0, False),
        ("nf4", "iiio", (3, 3, 5, 6), 0, False),
        ("int8", "io", (9, 64), 0, True),
        ("nf4", "io", (2, 3, 64, 6), 2, False),
    ],
)
def test_axes_keep_their_place(kind, axes, shape, stacked, embedding):
    weight = draw(*shape)
    packed = quantize(weight, kind, axes=axes, stacked=stacked, embedding=embedding)
    assert (packed.shape, packed.stack, packed.ndim, packed.size) == (
        shape,
        shape[:stacked],
        len(shape),
        weight.size,
    )
    # At most half of the widest gap between levels, and the error of the magnitudes themselves.
    error, gap = (
        np.abs(np.asarray(packed.dequantize()) - weight),
        np.diff(NF4).max() if kind == "nf4" else 1 / 127,
    )
    assert 0 < error.max() < (gap / 2 + 0.01) * np.abs(weight).max()
    assert error.mean() < (0.1 if kind == "nf4" else 0.01)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("shape", [(64, 6), (3, 100, 7), (2, 33, 300)])
def test_shapes_without_values(kind, shape):
    packed = quantize(draw(*shape), kind, stacked=len(shape) - 2)
    expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), packed)
    assert packed_shape(kind, shape, transposed=True, stacked=len(shape) - 2) == expected


@pytest.mark.slow
def test_scan_vmap_and_jit_take_the_layers_of_a_stack():
    weight = draw(3, 64, 6)
    packed = quantize(weight, "nf4", stacked=1)
    whole = packed.dequantize()
    _, scanned = jax.lax.scan(lambda _, layer: (None, layer.dequantize()), None, packed)
    np.testing.assert_allclose(scanned, whole, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(lambda layer: layer.dequantize())(packed), whole, rtol=1e-6)
    assert jax.eval_shape(lambda p: p.dequantize(jnp.bfloat16), packed).dtype == jnp.bfloat16
    assert packed.astype(jnp.bfloat16).dequantize().dtype == jnp.bfloat16


def test_storage_order():
    assert storage_order("eio") == ((0, 2, 1), 1)
    assert storage_order("iiio") == ((3, 0, 1, 2), 3)


test_what_cannot_be_packed = refusals(
    (lambda: quantize(draw(64, 6), "int4"), "kind", "nf4", "int8", "'int4'"),
    (lambda: quantize(draw(64, 6), "nf4", axes="ioo"), "axes", 2, "(64, 6)", "'ioo'"),
    (lambda: quantize(np.full((64, 6), np.nan, np.float32), "nf4"), "finite"),
    error=ValueError,
)
