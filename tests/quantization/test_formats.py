"""The packed formats against values by hand, an independent float64 implementation, and the gguf package."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax.quantization.formats import NF4, pack_matrix, part_shapes
from loraplus_jax.quantization.packed_array import packed_shape, quantize

from ..marks import slow


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# arXiv 2305.14314, appendix E, to the digits printed there.
PAPER = [-1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
PAPER += [0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0]


def test_the_levels_are_those_of_the_paper():
    np.testing.assert_allclose(NF4, PAPER, rtol=0, atol=6e-9)


@pytest.mark.slow
def test_a_block_by_hand():
    """One output of four inputs: the magnitude 2 is one group, so it is stored exactly as the mean."""
    packed = quantize(np.float32([[2.0], [-1.0], [0.2], [0.0]]), "nf4")
    # -1 / 2 is nearest to level 2, 0.2 / 2 to level 8, and 0 is level 7; the first half lies in the low bits.
    assert packed.parts["codes"].tolist() == [[15 | 8 << 4, 2 | 7 << 4]]
    expected = [[2.0], [2 * -0.5250730514526367], [2 * 0.07958029955625534], [0.0]]
    np.testing.assert_allclose(packed.dequantize(), expected, rtol=1e-6)


def reference_nf4(rows, double):
    """The method in float64 by loops over blocks: nearest level, magnitudes in 8 bits around their mean."""
    rows = np.asarray(rows, np.float64)
    count = -(-rows.shape[1] // 64)
    blocks = [[row[64 * n : 64 * n + 64] for n in range(count)] for row in rows]
    largest = np.array([[np.abs(block).max() for block in row] for row in blocks])
    if double:
        mean, flat = largest.mean(), largest.reshape(-1)
        for start in range(0, flat.size, 256):
            group = flat[start : start + 256] - mean
            step = np.abs(group).max() / 127
            flat[start : start + 256] = np.maximum(np.round(group / step) * step + mean, 0)
        largest = flat.reshape(largest.shape)
    levels = np.array(PAPER)
    out = np.zeros_like(rows)
    for r, row in enumerate(blocks):
        for n, block in enumerate(row):
            nearest = np.abs(block[:, None] / largest[r, n] - levels).argmin(1)
            out[r, 64 * n : 64 * n + len(block)] = levels[nearest] * largest[r, n]
    return out


@pytest.mark.parametrize("shape", [(64, 3), slow((576, 40)), (100, 7), slow((1600, 33))])
def test_nf4_against_float64(shape):
    weight = draw(*shape)
    found = np.asarray(quantize(weight, "nf4").dequantize(), np.float64)
    expected = reference_nf4(weight.T, double=True).T
    # A value midway between two levels may fall to either side.
    agree = np.abs(found - expected) < 1e-5
    assert agree.mean() > 0.999
    assert np.abs(found - weight).mean() == pytest.approx(np.abs(expected - weight).mean(), rel=1e-4)
    np.testing.assert_array_equal(quantize(found.astype(np.float32), "nf4").shape, shape)


@pytest.mark.slow
def test_the_second_step_costs_little():
    """Root mean square errors on normal draws: 8 bits for the blocks' magnitudes add less than 0.5 %."""
    weight = draw(1024, 256)
    rms = lambda x: float(np.sqrt(np.mean((np.asarray(x, np.float64) - weight) ** 2)))  # noqa: E731
    double, single = rms(quantize(weight, "nf4").dequantize()), rms(reference_nf4(weight.T, double=False).T)
    assert 0.09 < single < 0.095
    assert single * 0.999 < double < single * 1.005


def test_int8_rounds_to_127_steps_for_each_output():
    weight = draw(96, 5)
    scales = np.abs(weight).max(0) / 127
    found = np.asarray(quantize(weight, "int8").dequantize())
    np.testing.assert_allclose(found, np.round(weight / scales) * scales, rtol=0, atol=1e-6)


def test_accelerators_unpack_the_same_values(monkeypatch):
    packed = quantize(draw(100, 7), "nf4")
    expected = packed.dequantize()
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    np.testing.assert_array_equal(packed.dequantize(), expected)


@pytest.mark.slow
def test_zero_weights_stay_zero():
    weight = draw(128, 4)
    weight[:, 1] = 0
    for kind in ("nf4", "int8"):
        assert not np.any(np.asarray(quantize(weight, kind).dequantize())[:, 1])


HALF_FLOATS = {"q4_0": (0,), "q4_1": (0, 2), "q8_0": (0,), "q4_k": (0, 2), "q6_k": (208,)}
"""Where a block of GGUF has them."""


@pytest.mark.parametrize("platform", ["cpu", slow("tpu")])
@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0", "q4_k", "q6_k"])
def test_gguf_blocks_are_bit_identical(kind, platform, monkeypatch):
    if platform == "tpu":  # its way of unpacking, here
        choose = lambda *args, cpu, default: default(*args)  # noqa: E731
        monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    gguf = pytest.importorskip("gguf")
    number = gguf.GGMLQuantizationType[kind.upper()]
    _, size = gguf.GGML_QUANT_SIZES[number]
    data = np.random.default_rng(0).integers(0, 256, (6, 3, size), np.uint8)
    for start in HALF_FLOATS[kind]:  # random bytes would give scales that are not finite
        data[..., start : start + 2] = draw(6, 3, 1, seed=start).astype(np.float16).view(np.uint8)
    data = data.reshape(6, -1)
    expected = gguf.quants.dequantize(data, number)
    for transposed in (True, False):
        shape = expected.shape[::-1] if transposed else expected.shape
        parts = {name: jnp.asarray(part) for name, part in pack_matrix(kind, data).items()}
        shapes = packed_shape(kind, shape, transposed=transposed)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), parts) == jax.tree.map(
            lambda x: (x.shape, x.dtype), shapes.parts
        )
        packed = dataclasses.replace(shapes, parts=parts)
        found = jax.jit(lambda p: p.dequantize())(packed)
        np.testing.assert_array_equal(found.T if transposed else found, expected)
    assert packed.nbytes == data.nbytes + (6 * 3 * 4 if kind == "q4_k" else 0)  # whose 6 bits take 8 here


@pytest.mark.parametrize("columns", [1, 63, 1023, 1024, 1025, 1087, 4099])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_shapes_are_those_of_packed_parts(kind, columns):
    parts = pack_matrix(kind, draw(3, columns))
    shapes = part_shapes(kind, 3, columns)
    assert {name: (part.shape, part.dtype) for name, part in parts.items()} == {
        name: (x.shape, x.dtype) for name, x in shapes.items()
    }


def test_shapes_of_any_size_take_no_memory():
    assert part_shapes("nf4", 2, 2**45)["codes"].shape == (2, 2**44)
    assert part_shapes("q4_k", 2, 2**45)["d"].shape == (2, 2**37)
