"""Activation functions by their names in Hugging Face's configs."""

import math
from collections.abc import Callable, Mapping
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp


# Flax's takes erfc, and JAX's own gradient saves three arrays of x's shape; both cost much time on CPU.
@jax.custom_vjp
def exact_gelu(x: jax.Array) -> jax.Array:
    """The exact GELU x Φ(x), computed in float32 or wider; the backward pass needs only x."""
    wide = _widen(x)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return exact_gelu(x), x


def _gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    wide = _widen(x)
    density = jnp.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    return ((gradient * (_normal_cdf(wide) + wide * density)).astype(x.dtype),)


exact_gelu.defvjp(_gelu_forward, _gelu_backward)


def _widen(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": exact_gelu,
    "gelu_new": partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(nn.gelu, approximate=True),
    "gelu_fast": partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "tanh": nn.tanh,
}
"""`gelu_new`, `gelu_pytorch_tanh` and `gelu_fast` are three ways to compute the same function."""
