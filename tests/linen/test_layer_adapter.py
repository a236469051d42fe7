"""The adapter of a layer in a wrapped model: its factors, dropout, dtypes and scale."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax import LoRAPlusConfig, apply_lora_plus
from loraplus_jax.adapter.lora import scale_variables

from ..messages import mentions
from ..zoo.linen_toys import Scanned
from .models import CONFIG, KEY, X, adapters_of, variables_of


@pytest.mark.slow
def test_dropout_acts_when_a_key_is_given():
    model = apply_lora_plus(Scanned(split=True), LoRAPlusConfig(target_modules=["up"], rank=2, dropout=0.5))
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


@pytest.mark.slow
def test_dtypes_follow_the_layer():
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(6, dtype="bfloat16", name="up")(x)

    model = apply_lora_plus(Half(), CONFIG)
    variables = variables_of(model)
    variables["lora"]["up"]["lora_b"] *= 0
    for x in (X, X.astype(jnp.bfloat16)):
        y, expected = model.apply(variables, x), Half().apply({"params": variables["params"]}, x)
        assert y.dtype == expected.dtype
        np.testing.assert_array_equal(y, expected)


@pytest.mark.slow
def test_a_scale_per_layer():
    model, inner = apply_lora_plus(Scanned(), CONFIG), Scanned()
    base, (lora, specs) = variables_of(inner), adapters_of(model)
    scale = scale_variables(specs, np.array([1.5, 0.0, 0.0]).reshape(3, 1, 1))
    first = jax.tree.map(lambda x: x.at[1:].set(0.0), lora)
    got = model.apply({**base, "lora": lora, "lora_scale": scale}, X)
    np.testing.assert_allclose(got, model.apply({**base, "lora": first}, X), rtol=1e-5, atol=1e-5)
