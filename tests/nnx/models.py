"""What the tests of NNX models share beside the toys of tests/zoo: random factors, and comparisons."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from loraplus_jax.nnx import apply_lora_plus, lora_tree, set_lora


def build(toy, **fields):
    """The adapted model of a toy."""
    model = toy.make(nnx.Rngs(0))
    apply_lora_plus(model, toy.config(**fields), rngs=nnx.Rngs(1), **toy.options)
    return model


def randomise(model, seed=7):
    """Sets normal draws, so that no factor is zero, small enough for float32 to hold the outputs to 1e-5."""
    random = np.random.default_rng(seed)
    set_lora(model, jax.tree.map(lambda x: random.normal(size=x.shape) / 3, lora_tree(model)))
    return model


def assert_close(got, expected, tolerance=1e-5):
    scale = float(jnp.abs(jnp.asarray(expected, jnp.float32)).max())
    np.testing.assert_allclose(np.float32(got), np.float32(expected), rtol=0, atol=tolerance * scale)
