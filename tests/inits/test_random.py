"""The distribution of the initial factors: uniform within PEFT's bound, whatever the layer; float factors."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import loraplus_jax.nnx as adapted_nnx
from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora

KEY = jax.random.key(0)
ROW = jnp.ones((1, 400))


class Bare(nn.Module):
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        weight = self.param("layer", nn.initializers.zeros, self.shape)
        return jnp.sum(x) * jnp.matmul(jnp.ones(self.shape[-2]), weight)


class Typed(nn.Module):
    dtype: str

    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, param_dtype=self.dtype, name="layer")(x)


class One(nnx.Module):
    def __init__(self, layer):
        self.layer = layer


def linen(model, x, **fields):
    config = LoRAPlusConfig(**({"target_modules": ".*"} | fields), rank=8)
    return init_lora(apply_lora_plus(model, config), KEY, x)[0]


def of_nnx(layer, **fields):
    model = One(layer)
    config = LoRAPlusConfig(**({"target_modules": ["layer"]} | fields), rank=8)
    adapted_nnx.apply_lora_plus(model, config, rngs=nnx.Rngs(0))
    return adapted_nnx.lora_tree(model)


def stacked():
    make = lambda rngs: nnx.Linear(400, 16, rngs=rngs)  # noqa: E731
    return nnx.split_rngs(splits=3)(nnx.vmap(make, in_axes=(0,), out_axes=0))(nnx.Rngs(0))


# Adapters of weights with 400 inputs each.
LAYERS = {
    "Linen Dense": lambda f: linen(nn.Dense(16), ROW, **f),
    "Linen two input axes": lambda f: linen(nn.DenseGeneral(16, axis=(-2, -1)), jnp.ones((1, 20, 20)), **f),
    "Linen convolution in groups": lambda f: linen(
        nn.Conv(16, (2, 2), feature_group_count=2), jnp.ones((1, 4, 4, 200)), **f
    ),
    "Linen Embed": lambda f: linen(nn.Embed(400, 16), jnp.ones((1, 1), int), **f),
    "Linen parameter with a batch axis": lambda f: linen(
        Bare((3, 400, 16)), ROW, **f | {"target_modules": (), "target_parameters": {"layer": "bio"}}
    ),
    "NNX stacked": lambda f: of_nnx(stacked(), **f),
    "NNX convolution": lambda f: of_nnx(nnx.Conv(100, 16, (2, 2), rngs=nnx.Rngs(0)), **f),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    # PEFT: `kaiming_uniform_` with a = √5, whose bound is √(6 / ((1 + 5) · in)) = 1/20 for 400 inputs.
    ("init", "bound", "layers"),
    [("lora", 0.05, LAYERS), ("he_uniform", 0.122474487, ("Linen Dense",))],
)
def test_a_is_uniform_by_fan_in_and_b_zero(init, bound, layers):
    for name in layers:
        b, a = sorted(jax.tree.leaves(LAYERS[name]({"init": init})), key=lambda leaf: bool(leaf.any()))
        assert not b.any(), name
        layers_of_a = a.reshape(-1, 400 * 8)
        assert len(np.unique(layers_of_a[:, 0])) == (3 if "stacked" in name or "batch" in name else 1), name
        for values in layers_of_a:
            assert 0.99 * bound < abs(values).max() <= bound, name
            np.testing.assert_allclose(values.std(), bound / math.sqrt(3), rtol=0.04, err_msg=name)  # uniform
            np.testing.assert_allclose(abs(values).mean(), bound / 2, rtol=0.04, err_msg=name)


def test_orthogonal_factors_have_the_sizes_of_peft_and_no_product():
    """As in PEFT: normal combinations of half of 8 orthonormal rows, over 10, so a variance of 1/200."""
    lora = linen(nn.Dense(400), ROW, init="orthogonal")
    a, b = np.asarray(lora["lora_a"]), np.asarray(lora["lora_b"])
    np.testing.assert_allclose([a.std(), b.std()], 200**-0.5, rtol=0.05)
    np.testing.assert_allclose(a @ b, 0, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_linen_and_nnx_give_a_weight_factors_of_one_dtype_and_one_output(dtype):
    with jax.enable_x64(True):
        x = jnp.sin(jnp.arange(40.0)).reshape(4, 10).astype(dtype)
        config = LoRAPlusConfig(target_modules=["layer"], rank=3)
        wrapped = apply_lora_plus(Typed(dtype), config)
        lora, _ = init_lora(wrapped, KEY, x)
        model = One(nnx.Linear(10, 6, param_dtype=dtype, rngs=nnx.Rngs(0)))
        adapted_nnx.apply_lora_plus(model, config, rngs=nnx.Rngs(1))
        wanted = jnp.dtype("float64" if dtype == "float64" else "float32")
        assert {leaf.dtype for leaf in jax.tree.leaves((lora, adapted_nnx.lora_tree(model)))} == {wanted}
        lora = jax.tree.map(
            lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape).astype(wanted), lora
        )
        adapted_nnx.set_lora(model, lora)
        y = wrapped.apply(adapted_nnx.base_variables(model) | {"lora": lora}, x)
        assert y.dtype == dtype
        np.testing.assert_array_equal(y, model.layer(x))
