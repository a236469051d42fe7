"""LoftQ: packs weights and starts their adapters from what the packing lost (arXiv 2310.08659, algorithm 1)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from .._utils.validation import check_number
from ..adapter.lora import weight_delta
from ..adapter.spec import AdapterSpec, Specs, reject_magnitude
from ..adapter.tree import flatten, rebox, replace_leaves, unflatten
from ..quantization.formats import QuantizeTo
from ..quantization.packed_array import PackedArray, quantize
from .from_weights import make_factors


def loftq(
    base: Mapping[str, Any], kind: QuantizeTo, specs: Specs, *, steps: int = 5
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Quantizes the adapted weights so that Q + s A B is near W, instead of Q alone.

    Alternates `steps` times between Q, the quantized W - s A B, and s A B, the best approximation of W - Q of the
    adapter's rank. The adapter belongs to the quantized base.

    Args:
      base: variables without adapters, `{"params": ...}`.
      kind: the format, as in `quantize`.
      specs: the table from `init_lora`.
      steps: number of alternations.

    Returns:
      The variables with quantized weights, as from `quantize_base`, and the tree of factors, float32, for `"lora"`.

    Raises:
      ValueError: `steps` is below 1, an adapter is of variant dora or on some layers of a stack only, or a weight's
        layers are stacked along another axis than the first.
    """
    check_number("steps", steps, at_least=1)
    reject_magnitude("loftq", specs)
    flat, packed, lora = flatten(base), {}, {}
    for module, spec in specs.items():
        if spec.layers is not None:
            raise ValueError(f"{spec.leaf}: loftq needs adapters on all layers of the stack")
        if spec.stacked != (0,) * len(spec.stacked):
            raise ValueError(f"{spec.leaf}: stacked axes of a packed weight must lead, got {spec.stacked}")
        weight = meta.unbox(flat[spec.leaf])
        # Layer by layer: the decomposition of a stack would take the memory of all its layers together.
        one = dataclasses.replace(spec, shape=spec.shape[len(spec.stacked) :], stacked=())
        layers = np.asarray(weight, np.float32).reshape(-1, *one.shape)
        residuals, *factors = zip(*(_alternate(layer, kind, one, steps) for layer in layers), strict=True)
        residual = np.stack(residuals).reshape(spec.shape)
        packed[spec.leaf] = rebox(flat[spec.leaf], _packed(residual, kind, spec, weight.dtype))
        for side, path in enumerate(spec.factor_paths(module)):
            lora[path] = jnp.asarray(np.stack(factors[side]).reshape(spec.factor_shapes[side]))
    return replace_leaves(base, packed), unflatten(lora)


def _packed(weight: np.ndarray, kind: QuantizeTo, spec: AdapterSpec, dtype: Any) -> PackedArray:
    options: Any = {"embedding": spec.kind == "embed", "stacked": len(spec.stacked), "dtype": dtype}
    return quantize(weight, kind, axes=spec.axes, **options)


def _alternate(
    weight: np.ndarray, kind: QuantizeTo, spec: AdapterSpec, steps: int
) -> tuple[np.ndarray, jax.Array, jax.Array]:
    """What to pack of one layer's weight, and A and B."""
    a, b = (jnp.zeros(shape) for shape in spec.factor_shapes)
    residual = weight
    for _ in range(steps):
        residual = weight - np.asarray(weight_delta(a, b, spec))
        values = np.asarray(_packed(residual, kind, spec, np.float32).dequantize())
        a, b = make_factors("loftq", {"": spec}, lambda _, lost=weight - values: lost).values()
    return residual, a, b
