"""Initializers of the two factors. Their product is zero, so that an adapter starts as a no-op."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ..adapter.config import BASE_INITS, Init

Initializer = jax.nn.initializers.Initializer
Axes = list[int] | range


def factor_inits(init: Init, rank: int, axes: str = "io") -> tuple[Initializer, Initializer]:
    """Chooses the initializers of A `(in, r)` and B `(r, out)`, or of factors with more axes.

    `"lora"`: A ~ U(-sqrt(1/in), sqrt(1/in)), B = 0; PEFT's default, and Init[1] of arXiv 2402.12354, section 3.
    `"he_uniform"`: A ~ U(-sqrt(6/in), sqrt(6/in)), B = 0.
    `"lora_b"`: A = 0, B ~ U(-sqrt(6/r), sqrt(6/r)); Init[2], with which the paper found lambda near 16.
    `"gaussian"`: A ~ N(0, 1/r^2), B = 0.
    `"orthogonal"`: A = N₁ Q₁ / 10 and B = Q₂ᵀ N₂ / 10, where Q₁ and Q₂ are the halves of an orthogonal matrix
    (r, r), and N₁ and N₂ standard normal; the sizes are PEFT's.

    Args:
      init: name of the initialization.
      rank: r.
      axes: the weight's axes, as in `AdapterSpec`; `in` is the product of its input axes: for a convolution, the
        window times the inputs of a group; for an embedding, the number of rows.

    Returns:
      The initializers of A and of B, functions of a key, a shape and a dtype, as in `jax.nn.initializers`.

    Raises:
      ValueError: `init` needs the base's weights, or an odd rank cannot be halved.

    >>> a, b = factor_inits("lora", rank=2)
    >>> float(abs(b(jax.random.key(0), (2, 5))).max())
    0.0
    """
    if init in BASE_INITS:
        raise ValueError(f"init {init} starts from the base: use init lora, then loraplus_jax.inits")
    if init == "orthogonal":
        if rank % 2:
            raise ValueError(f"rank must be even for init orthogonal, got {rank}")
        b_axis = sum(role not in "io" for role in axes)
        return functools.partial(_orthogonal, -1, True), functools.partial(_orthogonal, b_axis, False)
    zeros = jax.nn.initializers.zeros
    if init == "gaussian":
        return jax.nn.initializers.normal(1.0 / rank), zeros
    batch = [role for role in axes if role not in "io"]
    if init == "lora_b":
        size = len(batch)
        outputs = range(size + 1, size + 1 + axes.count("o"))
        return zeros, _uniform(6.0, [size], outputs, range(size))
    roles = [role for role in axes if role != "o"]
    inputs = [n for n, role in enumerate(roles) if role == "i"]
    batch_axes = [n for n, role in enumerate(roles) if role != "i"]
    return _uniform(6.0 if init == "he_uniform" else 1.0, inputs, [len(roles)], batch_axes), zeros


def factor_dtype(weight: Any) -> Any:
    """Chooses the dtype of new factors: that in which small updates are not lost, however the weight is stored.

    Args:
      weight: the weight, or anything with its `dtype`.

    Returns:
      float64 for a float64 weight, float32 for every other.
    """
    return jnp.float64 if weight.dtype == jnp.float64 else jnp.float32


def _uniform(squared_bound: float, inputs: Axes, outputs: Axes, batch: Axes) -> Initializer:
    """Uniform within ±sqrt(squared_bound / fan-in)."""
    # JAX scales the variance, which is a third of the squared bound.
    return jax.nn.initializers.variance_scaling(
        squared_bound / 3, "fan_in", "uniform", list(inputs), list(outputs), batch_axis=list(batch)
    )


def _orthogonal(axis: int, first: bool, key: Any, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    """Random combinations, along an axis, of half of the rows of an orthogonal matrix."""
    rank = shape[axis]
    # One matrix for every pair of this rank, as the two factors must share it but have keys of their own.
    turn, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (rank, rank)))
    rows = turn[: rank // 2] if first else turn[rank // 2 :]
    values = jax.random.normal(key, (*(n for i, n in enumerate(shape) if i != axis % len(shape)), rank // 2))
    return jnp.moveaxis(values @ rows / 10, -1, axis).astype(dtype)
