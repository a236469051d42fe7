"""The maths of an adapter as pure functions: its low-rank term, and merging it into the base weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .dora import output_scale, widen
from .spec import AdapterSpec, Specs
from .tree import unflatten

SCALE = "lora_scale"
"""Name of the optional collection, and of its leaves, that overrides scales."""


@jax.named_scope("lora")
def low_rank_output(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array | float,
    equations: tuple[str, str] | None = None,
    precision: Any = None,
    out_shardings: tuple[Any, Any] = (None, None),
) -> jax.Array:
    """Computes the low-rank term s (x A) B of a dense layer, for x `(..., in)`, a `(in, r)`, b `(r, out)`.

    Args:
      x, a, b: input and factors, of one dtype.
      scale: s, which may be traced.
      equations: for other layers, the two einsums of the term: of x and A, and of the result and B.
      precision: as in `jnp.einsum`.
      out_shardings: those of the two products, for a mesh with explicit axis types.

    Returns:
      An array `(..., out)` of that dtype; with `equations`, with the axes of the second one's result.
    """
    # The scale multiplies the r-wide product, where it is cheapest.
    first, second = ({"precision": precision, "out_sharding": sharding} for sharding in out_shardings)
    if equations is None:  # an einsum would give the same, but takes ten times as long to trace
        # One axis of rows: with more, XLA on CPU copies y's gradient, transposed, for the gradient of B. A reshape
        # of axes that are sharded explicitly would have to tell its sharding.
        rows = x if any(out_shardings) or is_explicit(x) else x.reshape(-1, x.shape[-1])
        h = jnp.matmul(rows, a, **first)
        return jnp.matmul(h * jnp.asarray(scale, h.dtype), b, **second).reshape(*x.shape[:-1], b.shape[-1])
    h = jnp.einsum(equations[0], x, a, **first)
    return jnp.einsum(equations[1], h * jnp.asarray(scale, h.dtype), b, **second)


def is_explicit(*arrays: Any) -> bool:
    """Whether an array, or a leaf of a tree, has an axis split over a mesh with explicit axis types."""
    return any(any(jax.typeof(x).sharding.spec) for x in jax.tree.leaves(arrays))


def weight_delta(
    a: jax.Array, b: jax.Array, spec: AdapterSpec, scale: jax.Array | float | None = None
) -> jax.Array:
    """Computes s A B, the product of an adapter's factors times its scale.

    With magnitudes this is not all that the adapter changes; see `adapted_weight`.
    `scale` overrides the spec's scale.

    Returns:
      float32 or wider, in the shape of the base leaf, with stacked and batch axes.
    """
    left, right = spec.factor_letters
    highest = jax.lax.Precision.HIGHEST
    product = jnp.einsum(
        f"{left},{right}->{spec.base_letters}",
        widen(a),
        widen(b),
        precision=highest,
    )
    return product * (spec.scale if scale is None else scale)


def adapted_weight(weight: Any, factors: Sequence[jax.Array], spec: AdapterSpec) -> jax.Array:
    """Computes W + s A B, or with magnitudes c (W + s A B).

    Args:
      weight: W, with stacked and batch axes.
      factors: A, B and with `spec.magnitude` m.
      spec: the spec.

    Returns:
      float32 or wider, in the shape of the base leaf.
    """
    a, b, *magnitude = factors
    total = widen(weight) + weight_delta(a, b, spec)
    if not magnitude:
        return total
    letters, outputs = spec.base_letters, spec.factor_letters[1].replace("r", "")
    c = output_scale(weight, a, b, magnitude[0], spec.scale, letters, spec.factor_letters)
    return jnp.einsum(f"{letters},{outputs}->{letters}", total, c)


def scale_variables(
    specs: Specs, scale: jax.Array | float | Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Makes the optional read-only collection `"lora_scale"`, which overrides each adapter's scale s at apply time.

    With a traced `s`, `model.apply({"params": base, "lora": lora, "lora_scale": scale_variables(specs, s)}, x)`
    runs many scales in one compiled program. `scale` is s (alpha / rank, not alpha), a scalar or, with one for each
    stacked layer, an array `(layers,)`; or a mapping from module path to s. By default it is the scales of
    `specs`, which a model of another config then computes with.

    Returns:
      A tree with a leaf `lora_scale` for each adapter, an array with A's axes, all but the stacked ones of size 1.
    """
    flat = {}
    for module, spec in specs.items():
        shape, sizes = spec.scale_shape, spec.sizes
        layers = tuple(sizes[c] for c in spec.factor_letters[0] if c.isupper())
        value = scale[module] if isinstance(scale, Mapping) else spec.scale if scale is None else scale
        value = jnp.asarray(value)
        if value.ndim <= len(layers):
            value = jnp.broadcast_to(value, layers).reshape(shape)
        flat[f"{module}/{SCALE}".removeprefix("/")] = jnp.broadcast_to(value, shape)
    return unflatten(flat)


def disabled(lora: Any) -> Any:
    """Turns adapters off without a recompilation of a compiled model.

    Returns:
      A tree like `lora`, all zeros, of the same shapes and dtypes.

    >>> disabled({"fc": {"lora_a": jnp.ones(2)}})["fc"]["lora_a"].tolist()
    [0.0, 0.0]
    """
    return jax.tree.map(jnp.zeros_like, lora)
