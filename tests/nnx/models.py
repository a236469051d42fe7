"""What the tests of NNX models share: models of one layer, random factors, and comparisons."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from loraplus_jax import LoRAPlusConfig
from loraplus_jax.nnx import apply_lora_plus, lora_tree, set_lora

X = jax.random.normal(jax.random.key(1), (2, 5, 8))


IDS = jnp.arange(10).reshape(2, 5)


class One(nnx.Module):
    """A model of one layer, called `layer`."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


class Bare(nnx.Module):
    """Two parameters of one module; its method calls another one of its own."""

    def __init__(self, rngs):
        self.wq, self.wo = (nnx.Param(jax.random.normal(rngs.params(), (8, 8))) for _ in range(2))

    def inner(self, x):
        return x @ self.wq[...]

    def __call__(self, x):
        return jnp.tanh(self.inner(x)) @ self.wo[...].T


class Row(NamedTuple):
    make: object
    x: object = X
    rule: object = ("layer",)
    by_rank: bool = True
    wrap: type = One
    parameters: object = ()


def linear(**options):
    return lambda rngs: nnx.Linear(8, 6, rngs=rngs, **options)


def build(row, config=None, **options):
    model = row.wrap(row.make(nnx.Rngs(0)))
    fields = {"target_modules": row.rule, "target_parameters": row.parameters, "rank": 2, "alpha": 3.0}
    specs = apply_lora_plus(model, LoRAPlusConfig(**fields | (config or {})), rngs=nnx.Rngs(1), **options)
    return model, specs


def randomise(model, seed=7):
    """Sets normal draws, so that no factor is zero, small enough for float32 to hold the outputs to 1e-5."""
    random = np.random.default_rng(seed)
    set_lora(model, jax.tree.map(lambda x: random.normal(size=x.shape) / 3, lora_tree(model)))
    return model


def assert_close(got, expected, tolerance=1e-5):
    scale = float(jnp.abs(jnp.asarray(expected, jnp.float32)).max())
    np.testing.assert_allclose(np.float32(got), np.float32(expected), rtol=0, atol=tolerance * scale)


LINEAR = Row(linear())
ATTENTION = Row(lambda r: nnx.MultiHeadAttention(2, 8, decode=False, rngs=r), rule=("query", "out"))
PARAMETERS = Row(Bare, rule=(), parameters={"layer/w[qo]": "io"})


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))
