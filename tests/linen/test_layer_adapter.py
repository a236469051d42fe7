"""The adapter of a layer in a wrapped model: its factors, dropout, dtypes and scale."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax import LoRAPlusConfig, LoRAPlusDense, apply_lora_plus, init_lora, merge
from loraplus_jax.adapter.lora import scale_variables

from ..messages import mentions
from .models import CONFIG, KEY, Raw, Scanned, Setup, X, adapters_of, config, variables_of


def test_every_layer_of_a_stack_starts_with_its_own_draw():
    a = init_lora(apply_lora_plus(Scanned(), CONFIG), KEY, X)[0]["layers"]["up"]["lora_a"]
    assert (a[0] != a[1]).all()
    assert (a[1] != a[2]).all()


@pytest.mark.parametrize("inner", [Setup(), Scanned(split=True)], ids=["flat", "scanned"])
def test_dropout_acts_when_a_key_is_given(inner):
    model = apply_lora_plus(inner, LoRAPlusConfig(target_modules=["up"], rank=2, dropout=0.5))
    variables = variables_of(model)
    run = lambda *seed: model.apply(variables, X, rngs={"dropout": jax.random.key(*seed)} if seed else {})  # noqa: E731
    np.testing.assert_array_equal(run(1), run(1))
    assert (run(1) != run()).any()
    assert (run(1) != run(2)).any()


def test_a_key_that_does_not_reach_a_target_is_an_error():
    model = apply_lora_plus(Scanned(), LoRAPlusConfig(target_modules=["up"], rank=2, dropout=0.5))
    variables = variables_of(model)
    model.apply(variables, X)
    with pytest.raises(ValueError, match=mentions("'layers/up'", "nn.scan", "nn.vmap", "'dropout'")):
        model.apply(variables, X, rngs={"dropout": KEY})
    apply_lora_plus(Scanned(), CONFIG).apply(
        variables, X, rngs={"dropout": KEY}
    )  # dropout=0: nothing to reach


@pytest.mark.parametrize(("dtype", "param_dtype"), [("bfloat16", "float32"), (None, "bfloat16")])
def test_dtypes_follow_the_layer(dtype, param_dtype):
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(6, dtype=dtype, param_dtype=param_dtype, name="up")(x)

    model = apply_lora_plus(Half(), CONFIG)
    variables = variables_of(model)
    variables["lora"]["up"]["lora_b"] *= 0
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(variables["params"])} == {param_dtype}
    for x in (X, X.astype(jnp.bfloat16)):
        y, expected = model.apply(variables, x), Half().apply({"params": variables["params"]}, x)
        assert y.dtype == expected.dtype
        np.testing.assert_array_equal(y, expected)


def test_a_loraplus_layer_inside_keeps_its_own_adapter():
    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="up")(LoRAPlusDense(5, rank=1, alpha=1.0, name="own")(x))

    model = apply_lora_plus(Both(), CONFIG)
    lora, specs = adapters_of(model)
    assert {path: (spec.rank, spec.scale) for path, spec in specs.items()} == {
        "own": (1, 1.0),
        "up": (2, 1.5),
    }
    base = {"params": variables_of(model)["params"]}
    plain = nn.Sequential([nn.Dense(5), nn.Dense(4)])
    merged = merge(base, lora, specs)["params"]
    expected = plain.apply({"params": {"layers_0": merged["own"], "layers_1": merged["up"]}}, X)
    np.testing.assert_allclose(model.apply({**base, "lora": lora}, X), expected, rtol=1e-5, atol=1e-5)


def test_gradients_reach_both_factors_of_every_layer():
    model = apply_lora_plus(Scanned(remat=True), CONFIG)
    variables = variables_of(model)
    loss = lambda lora: model.apply({**variables, "lora": lora}, X).sum()  # noqa: E731
    grads = jax.jit(jax.grad(loss))(variables["lora"])
    assert all((abs(leaf).max(axis=(1, 2)) > 0).all() for leaf in jax.tree.leaves(grads))


MODELS = {
    "flat": (Setup(), CONFIG),
    "scanned": (Scanned(1), CONFIG),
    "parameter": (Raw(), config(target_parameters={"w": "oi"})),
}


@pytest.mark.parametrize("name", MODELS)
def test_scales_are_values_and_a_population_compiles_once(name):
    inner, rules = MODELS[name]
    model = apply_lora_plus(inner, rules)
    base, (lora, specs) = variables_of(inner), adapters_of(model)
    traces = []

    @jax.jit
    @jax.vmap
    def run(scale):
        traces.append(scale)
        return model.apply({**base, "lora": lora, "lora_scale": scale_variables(specs, scale)}, X)

    scales = jnp.array([0.0, 0.5, 1.5])
    outputs = run(scales)
    run(scales + 1)
    assert len(traces) == 1
    np.testing.assert_allclose(outputs[0], inner.apply(base, X), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outputs[2], model.apply({**base, "lora": lora}, X), rtol=1e-5, atol=1e-5)
    thirds = jax.tree.map(lambda x: x / 3**0.5, lora)
    np.testing.assert_allclose(outputs[1], model.apply({**base, "lora": thirds}, X), rtol=1e-4, atol=1e-4)


def test_a_scale_per_layer():
    model, inner = apply_lora_plus(Scanned(), CONFIG), Scanned()
    base, (lora, specs) = variables_of(inner), adapters_of(model)
    scale = scale_variables(specs, np.array([1.5, 0.0, 0.0]).reshape(3, 1, 1))
    first = jax.tree.map(lambda x: x.at[1:].set(0.0), lora)
    got = model.apply({**base, "lora": lora, "lora_scale": scale}, X)
    np.testing.assert_allclose(got, model.apply({**base, "lora": first}, X), rtol=1e-5, atol=1e-5)
