"""qwix's weights, code by code, from arrays in its form; tests/others has qwix itself."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax.linen import from_qwix

from ..refusals import refusals

RULES = [SimpleNamespace(act_qtype=None)]


def quantized(codes, scale, qtype="int8", zero_point=None):
    return SimpleNamespace(
        array=SimpleNamespace(
            qvalue=jnp.asarray(codes), scale=jnp.asarray(scale), qtype=qtype, zero_point=zero_point
        )
    )


def drawn(shape, scales, bits=8):
    rng, half = np.random.default_rng(0), 2 ** (bits - 1)
    return rng.integers(-half + 1, half, shape).astype(np.int8), rng.uniform(0.5, 2, scales).astype(
        np.float32
    )


@pytest.mark.parametrize(
    ("shape", "scales", "bits", "stacked"),
    [
        ((6, 4), (1, 4), 8, {}),  # one scale for each output
        ((64, 3), (2, 3), 4, {}),  # blocks of 32 inputs
        ((2, 3, 8), (2, 3, 1), 8, {}),  # the last axis is the input
        ((2, 6, 4), (2, 1, 4), 8, {"kernel": 1}),  # stacked layers
    ],
)
def test_every_value_stays_the_same(shape, scales, bits, stacked):
    codes, scale = drawn(shape, scales, bits)
    bias = jnp.ones(4)
    tree = {"params": {"up": {"kernel": quantized(codes, scale, f"int{bits}"), "bias": bias}}}
    packed = from_qwix(tree, RULES, stacked=stacked)["params"]["up"]
    blocks = [size // count for size, count in zip(shape, scales, strict=True)]
    for axis, count in enumerate(blocks):
        scale = scale.repeat(count, axis)
    np.testing.assert_array_equal(packed["kernel"].dequantize(), codes * scale)
    assert packed["kernel"].shape == shape
    assert packed["bias"] is bias


def packed(weight, rules=RULES, **options):
    return from_qwix({"params": {"up": {"kernel": weight}}}, rules, **options)


CODES = drawn((6, 4), (1, 4))
WEIGHT = quantized(*CODES)
INTEGERS = [SimpleNamespace(act_qtype="int8")]

test_what_has_no_packed_form_is_named = refusals(
    (lambda: packed(quantized(*CODES, "float8_e4m3fn")), "up/kernel", "float8_e4m3fn", "nf4"),
    (lambda: packed(quantized(*CODES, zero_point=jnp.ones((1, 4)))), "up/kernel", "zero point"),
    (lambda: packed(quantized(*drawn((8, 8, 3), (2, 2, 3)))), "up/kernel", "(2, 2, 3)", "(8, 8, 3)"),
    (lambda: packed(WEIGHT, stacked={"down": 1}), "stacked", "'down'"),
    (lambda: packed(jnp.ones((6, 4))), "no weight", "qwix"),
    (lambda: packed(WEIGHT, INTEGERS), "rules", "activations", "int8", "weight_qtype"),
    (lambda: packed(WEIGHT, "int8"), "rules", "QuantizationRule", "'int8'"),
)
