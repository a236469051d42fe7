"""LoRAPlusDense in every dtype; test_layer_table.py has what is true of all layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax import LoRAPlusDense, init_lora

from .models import KEY, assert_equal, drawn

X = jax.random.normal(jax.random.key(1), (4, 6))


def layer(**fields):
    return LoRAPlusDense(**({"features": 5, "rank": 2, "alpha": 3.0} | fields))


def variables_of(model, *args):
    """Random variables of a model, made without compiling its `init`."""
    return drawn(jax.eval_shape(model.init, KEY, *args), 7)


def dtypes(tree):
    return jax.tree.map(lambda leaf: leaf.dtype, tree)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"use_bias": False, "dtype": jnp.bfloat16},
        {"dtype": jnp.float32, "param_dtype": jnp.bfloat16},
        {"dtype": jnp.float16, "bias_init": nn.initializers.normal()},
        {"param_dtype": jnp.bfloat16, "kernel_init": nn.initializers.ones},
    ],
)
def test_at_init_it_is_dense_bit_for_bit(fields):
    x = X.astype(jnp.bfloat16) if "param_dtype" in fields else X
    plain = nn.Dense(5, **fields)
    expected = plain.init(KEY, x)
    variables = layer(**fields).init(KEY, x)
    assert dtypes(variables["params"]) == dtypes(expected["params"])
    assert_equal(variables["params"], expected["params"])
    got, wanted = layer(**fields).apply(variables, x), plain.apply(expected, x)
    assert got.dtype == wanted.dtype
    assert_equal(got, wanted)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["lora"])} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_bfloat16_compute_really_is_bfloat16():
    half = layer(dtype=jnp.bfloat16)
    variables = variables_of(half, X)
    rounded = jax.tree.map(lambda v: v.astype(jnp.bfloat16).astype(jnp.float32), variables)
    y = half.apply(variables, X)
    np.testing.assert_array_equal(y, half.apply(rounded, X.astype(jnp.bfloat16)))
    np.testing.assert_allclose(y.astype(jnp.float32), layer().apply(variables, X), rtol=0.05, atol=0.2)


@pytest.mark.slow
def test_lora_b_is_uniform_by_rank_and_gaussian_normal_by_rank():
    """tests/inits has the other inits."""
    inits = {init: layer(features=500, rank=4, init_factors=init) for init in ("lora_b", "gaussian")}
    lora = {init: jax.jit(model.init)(KEY, np.ones((1, 600)))["lora"] for init, model in inits.items()}
    lora = jax.device_get(lora)
    assert not lora["lora_b"]["lora_a"].any()
    size, bound = abs(lora["lora_b"]["lora_b"]), (6 / 4) ** 0.5
    assert 0.99 * bound < size.max() <= bound
    np.testing.assert_allclose(size.mean(), bound / 2, rtol=0.05)  # uniform
    assert not lora["gaussian"]["lora_b"].any()
    np.testing.assert_allclose(lora["gaussian"]["lora_a"].std(), 1 / 4, rtol=0.05)
    assert abs(lora["gaussian"]["lora_a"]).max() > 3 / 4


@pytest.mark.parametrize(
    "fields", [{"rank": 6}, {"rank": 0}, {"alpha": -1.0}, {"dropout": 1.0}, {"init_factors": "x"}]
)
def test_bad_values_are_rejected(fields):
    with pytest.raises(ValueError, match=next(iter(fields)).removesuffix("_factors")):
        layer(**fields).init(KEY, X)


def test_missing_factors_are_rejected():
    variables = layer().init(KEY, X)
    with pytest.raises(ValueError, match="init_lora"):
        layer().apply({"params": variables["params"]}, X)


@pytest.mark.slow
def test_dropout_acts_only_on_the_adapter_and_only_with_a_key():
    dense = layer(features=6, rank=6, alpha=6.0, dropout=0.5)
    eye = {"lora_a": jnp.eye(6), "lora_b": jnp.eye(6)}
    variables = {"params": {"kernel": 10 * jnp.eye(6), "bias": jnp.zeros(6)}, "lora": eye}
    ones = jnp.ones((50, 6))
    assert (dense.apply(variables, ones) == 11).all()
    y = dense.apply(variables, ones, rngs={"dropout": KEY})
    assert set(np.unique(y)) == {10.0, 12.0}
    assert 0.35 < float((y == 10).mean()) < 0.65
    assert (y != dense.apply(variables, ones, rngs={"dropout": jax.random.key(1)})).any()


@pytest.mark.slow
def test_specs_of_layers_without_a_wrapper():
    lora, specs = init_lora(nn.Sequential([layer(), nn.Dense(3), layer(features=2)]), KEY, X)
    assert {path: spec.leaf for path, spec in specs.items()} == {
        "layers_0": "params/layers_0/kernel",
        "layers_2": "params/layers_2/kernel",
    }
    assert specs["layers_0"].scale == 1.5
    assert jax.tree.map(jnp.shape, lora["layers_2"]) == {"lora_a": (3, 2), "lora_b": (2, 2)}
