"""The maths of an adapter against float64 numpy and hand-worked numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax.adapter.lora import low_rank_output, scale_variables, weight_delta
from loraplus_jax.adapter.spec import AdapterSpec


def spec(shape=(2, 2), scale=0.5, rank=1, leaf="params/q/kernel", **fields):
    return AdapterSpec(leaf=leaf, kind="dense", axes="io", shape=shape, rank=rank, scale=scale, **fields)


LORA = {"q": {"lora_a": jnp.array([[1.0], [2.0]]), "lora_b": jnp.array([[10.0, 20.0]])}}


def test_delta_by_hand():
    # x A = 1 * 1 + 3 * 2 = 7; times B times 0.5
    y = low_rank_output(jnp.array([[1.0, 3.0]]), LORA["q"]["lora_a"], LORA["q"]["lora_b"], 0.5)
    assert y.tolist() == [[35.0, 70.0]]


def test_the_gradient_of_b_copies_no_rows():
    """Such a copy has the transposed shape of the layer's output gradient; the first factor's has the rank's."""
    w, a, b = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((48, 80), (48, 3), (3, 80)))

    def loss(a, b, w, x):
        return jnp.sum(jnp.sin(x @ w + low_rank_output(x, a, b, 2.0)))

    for rows in ((128,), (4, 32), (2, 2, 32)):
        x = jax.ShapeDtypeStruct((*rows, 48), jnp.float32)
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(a, b, w, x).compile().as_text()
        assert "[128,80]" in str(compiled)
        assert "[80,128]" not in str(compiled)


@pytest.mark.parametrize(
    ("table", "value", "shape"),
    [
        (spec(), 3.0, (1, 1)),
        (spec((6, 2, 2), stacked=(0,)), None, (6, 1, 1)),  # its own
        (spec((6, 2, 2), stacked=(0,)), 3.0, (6, 1, 1)),
        (spec((2, 6, 2), stacked=(1,)), 3.0, (1, 6, 1)),
        (spec((6, 2, 2), stacked=(0,)), np.arange(6.0).reshape(6, 1, 1), (6, 1, 1)),
        (spec((6, 2, 2), stacked=(0,)), np.arange(6.0), (6, 1, 1)),
        (spec((2, 6, 2), stacked=(1,)), np.arange(6.0), (1, 6, 1)),
    ],
)
def test_scale_variables(table, value, shape):
    got = scale_variables({"layers/q": table}, value)["layers"]["q"]["lora_scale"]
    expected = 0.5 if value is None else value
    expected = np.reshape(expected, shape) if np.ndim(expected) else np.broadcast_to(expected, shape)
    np.testing.assert_array_equal(got, expected)


def test_scale_variables_by_module():
    got = scale_variables({"q": spec(), "": spec()}, {"q": 1.0, "": 2.0})
    assert (got["q"]["lora_scale"].item(), got["lora_scale"].item()) == (1.0, 2.0)


def test_weight_delta_has_float32_products_on_every_device():
    """TPUs multiply float32 arrays in bfloat16 unless told otherwise, also factors in bfloat16 once widened."""
    for dtype in (jnp.float32, jnp.bfloat16):
        factors = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((2, 1), (1, 2))]
        program = jax.make_jaxpr(lambda a, b: weight_delta(a, b, spec()))(*factors)
        products = [eqn for eqn in jax.tree.leaves(program.jaxpr.eqns) if eqn.primitive.name == "dot_general"]
        assert [eqn.params["precision"] for eqn in products] == [(jax.lax.Precision.HIGHEST,) * 2]
        assert program.out_avals[0].dtype == jnp.float32
