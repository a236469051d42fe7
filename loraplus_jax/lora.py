"""The maths of an adapter as pure functions: its forward term, and merging it into plain weights."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from .spec import AdapterSpec, Specs
from .tree import flatten, unflatten

SCALE = "lora_scale"
"""Name of the optional collection, and of its leaves, that overrides scales."""


def delta(
    x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array | float, precision: Any = None
) -> jax.Array:
    """The adapter's term s (x A) B for x `(..., in)`, a `(in, r)`, b `(r, out)`, all of one dtype.

    The scale acts on the r-wide product: the cheapest place, and it may be a traced array.
    """
    h = jnp.matmul(x, a, precision=precision)
    return jnp.matmul(h * jnp.asarray(scale, h.dtype), b, precision=precision)


def weight_delta(a: jax.Array, b: jax.Array, spec: AdapterSpec) -> jax.Array:
    """s A B in the shape of the base leaf, float32, stacked layers and batch axes included."""
    left, right = spec.factor_letters
    equation = f"{left},{right}->{spec.letters(spec.axes)}"
    highest = jax.lax.Precision.HIGHEST
    return spec.scale * jnp.einsum(equation, a.astype(jnp.float32), b.astype(jnp.float32), precision=highest)


def scale_variables(specs: Specs, scale: jax.Array | float | Mapping[str, Any]) -> dict[str, Any]:
    """The optional read-only collection `"lora_scale"`, which overrides the scale s of every adapter at apply time.

    `model.apply({"params": base, "lora": lora, "lora_scale": scale_variables(specs, s)}, x)` with a traced `s`
    runs a whole population of scales in one compiled program.

    Args:
      specs: the table from `init_lora`.
      scale: s (alpha / rank, not alpha), a scalar or broadcastable to the stacked layers; or module path to s.
    """
    flat = {}
    for module, spec in specs.items():
        letters = spec.letters("ir")
        size = dict(zip(spec.letters(spec.axes), spec.shape, strict=True))
        shape = tuple(size[c] if c.isupper() else 1 for c in letters)
        value = scale[module] if isinstance(scale, Mapping) else scale
        flat[_factor(module, SCALE)] = jnp.broadcast_to(jnp.asarray(value), shape)
    return unflatten(flat)


def merge(base: Mapping[str, Any], lora: Mapping[str, Any], specs: Specs) -> dict[str, Any]:
    """Base variables with every adapter added into its weight; no adapter is needed afterwards.

    The sum is made in float32 and stored in the base leaf's dtype. `base` itself is left as it was: keep it to
    take the adapter out again exactly.

    Args:
      base: variables without adapters, `{"params": ...}`.
      lora: the tree of adapters, `lora_a (in, r)` and `lora_b (r, out)` under each module of `specs`.
      specs: the table from `init_lora` or `load_adapter`.

    Raises:
      ValueError: the three do not fit each other; the message names the path.
    """
    flat = flatten(base)
    factors = flatten(lora)
    _check_fit(flat, factors, specs)
    for module, spec in specs.items():
        a, b = (factors[_factor(module, name)] for name in ("lora_a", "lora_b"))
        box, leaf = flat[spec.leaf], meta.unbox(flat[spec.leaf])
        merged = (leaf.astype(jnp.float32) + weight_delta(a, b, spec)).astype(leaf.dtype)
        flat[spec.leaf] = box.replace_boxed(merged) if isinstance(box, meta.AxisMetadata) else merged
    return unflatten(flat)


def _factor(module: str, name: str) -> str:
    return f"{module}/{name}" if module else name


def _check_fit(flat: Mapping[str, Any], factors: Mapping[str, Any], specs: Specs) -> None:
    known = {_factor(module, name) for module in specs for name in ("lora_a", "lora_b")}
    if odd := sorted(known ^ factors.keys()):
        raise ValueError(f"the adapters and the specs differ at {', '.join(odd)}")
    for module, spec in specs.items():
        shape = tuple(meta.unbox(flat[spec.leaf]).shape) if spec.leaf in flat else None
        if shape != spec.shape:
            raise ValueError(f"{spec.leaf}: the adapter is for shape {spec.shape}, the base has {shape}")
        shapes = tuple(tuple(factors[_factor(module, name)].shape) for name in ("lora_a", "lora_b"))
        if shapes != spec.factor_shapes:
            raise ValueError(f"{module}: factors {shapes} do not fit the specs' {spec.factor_shapes}")
