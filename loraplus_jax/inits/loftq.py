"""LoftQ: quantizes weights and starts their adapters from the quantization error (arXiv 2310.08659)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from ..adapter.quantize_base import quantize_base
from ..adapter.spec import Specs
from ..adapter.tree import flatten
from ..quantization.formats import QuantizeTo
from .from_weights import make_factors


def loftq(base: Mapping[str, Any], kind: QuantizeTo, specs: Specs) -> tuple[dict[str, Any], dict[str, Any]]:
    """Quantizes the adapted weights, with adapters that bring Q + s A B near W, instead of Q alone.

    s A B is the best approximation of W - Q of the adapter's rank: algorithm 1 with T = 1, as PEFT by default. The
    adapter belongs to the quantized base.

    Args:
      base: variables without adapters, `{"params": ...}`.
      kind: the format, as in `quantize`.
      specs: the table from `init_lora`.

    Returns:
      The variables with quantized weights, as from `quantize_base`, and the tree of factors, float32, for `"lora"`.

    Raises:
      ValueError: an adapter is of variant dora or on some layers of a stack only, or a weight's layers are stacked
        along another axis than the first.
    """
    packed = quantize_base(base, kind, specs)
    weights, values = flatten(base), flatten(packed)

    def error(leaf: str) -> jax.Array:
        weight = jnp.asarray(meta.unbox(weights[leaf]), jnp.float32)
        return weight - meta.unbox(values[leaf]).dequantize().astype(jnp.float32)

    return packed, jax.tree.map(jnp.asarray, make_factors("loftq", specs, error))
