"""The product of a dense layer: rounded once, and on a CPU as XLA computes it with bfloat16 instructions."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from loraplus_jax.models.bert.model import BertEncoder
from loraplus_jax.models.dot import dot_general

from .bert.test_model import TINY

DENSE = (((2,), (0,)), ((), ()))
"""How `nn.Dense` multiplies inputs (rows, tokens, in) by a kernel (in, out)."""


def arrays(dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    return tuple(
        jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((2, 5, 64), (64, 32), (2, 5, 32))
    )


def with_gradients(product, x, kernel, gradient):
    y, pull_back = jax.vjp(lambda x, kernel: product(x, kernel, DENSE), x, kernel)
    return y, *pull_back(gradient)


def result_types(lowered):
    """The element types of the results of all dot_generals of a program."""
    return re.findall(r"dot_general.*-> tensor<[0-9x]*(\w+)>", lowered.as_text() or "")


def test_product_and_gradients_are_those_of_float64_rounded_once():
    found = with_gradients(dot_general, *arrays())
    x, kernel, gradient = (np.asarray(array, np.float64) for array in arrays())
    exact = x @ kernel, gradient @ kernel.T, np.einsum("bti,bto->io", x, gradient)
    for own, value in zip(found, exact, strict=True):
        assert own.dtype == jnp.bfloat16
        # Half of the distance of two bfloat16 numbers, 2**-8, and what float32 loses where terms cancel.
        np.testing.assert_allclose(np.asarray(own, np.float64), value, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(("platform", "result"), [("cpu", "f32"), ("cuda", "bf16"), ("tpu", "bf16")])
def test_results_are_float32_on_a_cpu_alone(platform, result):
    program = jax.jit(lambda *values: with_gradients(dot_general, *values)).trace(*arrays())
    assert result_types(program.lower(lowering_platforms=(platform,))) == [result] * 3


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (jnp.float32, {}),
        (jnp.float16, {}),
        (jnp.bfloat16, {"precision": "highest"}),
        (jnp.bfloat16, {"preferred_element_type": jnp.float32}),
    ],
)
def test_any_other_product_is_that_of_jax(dtype, options):
    x, kernel, _ = arrays(dtype)
    own, jaxs = (
        str(jax.make_jaxpr(lambda x, kernel: product(x, kernel, DENSE, **options))(x, kernel))  # noqa: B023
        for product in (dot_general, lax.dot_general)
    )
    assert own == jaxs


def test_bfloat16_by_a_transposed_kernel_is_that_of_jax():
    _, kernel, gradient = arrays()
    transposed = (((2,), (1,)), ((), ()))
    own, jaxs = (product(gradient, kernel, transposed) for product in (dot_general, lax.dot_general))
    np.testing.assert_array_equal(own, jaxs)


@pytest.mark.slow
def test_the_gradient_of_a_frozen_kernel_is_not_computed():
    x, kernel, _ = arrays()

    def loss(x, kernel):
        return jnp.sum(jnp.square(dot_general(jnp.sin(x), kernel, DENSE).astype(jnp.float32)))

    def products(argnums):
        text = jax.jit(jax.grad(loss, argnums)).lower(x, kernel).compile().as_text() or ""
        return len(re.findall(r"= f32\S* dot\(", text))

    assert (products((0, 1)), products(0)) == (3, 2)


def products_by_kernel(model, params, *inputs):
    """The element types of the results of the model's products with a kernel, in its program for a CPU."""
    program = jax.jit(model.clone(dtype=jnp.bfloat16).apply).trace({"params": params}, *inputs)
    text = program.lower(lowering_platforms=("cpu",)).as_text() or ""
    return re.findall(r"dot_general.*, tensor<\d+x\d+xbf16>\) -> tensor<[0-9x]*(\w+)>", text)


@pytest.mark.slow
def test_all_layers_of_the_models_use_it(models):
    ids, encoder = np.ones((1, 8), np.int32), BertEncoder(TINY, unroll=False)
    params = jax.eval_shape(encoder.init, jax.random.key(0), ids, ids)["params"]
    assert products_by_kernel(encoder, params, ids, ids) == ["f32"] * 6
    assert products_by_kernel(*models("llama_mistral")[1:], ids) == ["f32"] * 8
    # The head of gpt2_scaled is its embedding, which multiplies by itself.
    assert sorted(products_by_kernel(*models("gpt2_scaled")[1:], ids)) == ["bf16", *["f32"] * 4]
