"""Merges adapters into the weights of a base, and restores the base."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..quantization.packed_array import is_packed
from .lora import adapted_weight
from .spec import Specs, check_floating_weight
from .tree import factors_by_module, flatten, rebox, replace_leaves, weight_of


def merge(
    base: Mapping[str, Any],
    lora: Mapping[str, Any],
    specs: Specs,
    *,
    dtype: Any = None,
    dequantize: bool = False,
) -> dict[str, Any]:
    """Adds every adapter to its base weight, in float32.

    Args:
      base: variables without adapters, `{"params": ...}`.
      lora: the tree of adapters, or `{"lora": tree}`; pass fully trained parameters in `base`.
      specs: the table from `init_lora` or `load_adapter`.
      dtype: dtype of the merged leaves; by default each keeps its dtype.
      dequantize: whether to merge into the values that a packed weight stands for, which differ from the original
        ones by the rounding. By default pass the original weights.

    Returns:
      Variables like `base` that need no adapter; only the adapted leaves are new.

    Raises:
      ValueError: `base`, `lora` and `specs` do not match, or a weight is packed; the message names the path.
    """
    if dtype is not None:
        check_floating_weight("dtype: merged weights", jnp.dtype(dtype))
    flat = flatten(base)
    if "params" not in base:
        raise ValueError(f'base must be variables {{"params": ...}}, got the keys {list(base)[:5]}')
    factors = factors_by_module("lora", lora, specs)
    for module, spec in specs.items():
        leaf = weight_of("the base", flat, spec)
        if is_packed(leaf):
            leaf = check_dequantize(leaf, spec.leaf, allowed=dequantize)
        merged = adapted_weight(leaf, factors[module], spec)
        flat[spec.leaf] = rebox(flat[spec.leaf], merged.astype(leaf.dtype if dtype is None else dtype))
    return replace_leaves(base, flat)


def check_dequantize(weight: Any, path: str, *, allowed: bool) -> jax.Array:
    """The values of a packed weight, for a merge; raises ValueError unless that is `allowed`."""
    if not allowed:
        raise ValueError(
            f"{path} is packed in {weight.kind}: merge into the original weights, or into the quantized ones with "
            "dequantize=True"
        )
    return weight.dequantize()


def unmerge(merged: Mapping[str, Any], base: Mapping[str, Any], specs: Specs) -> dict[str, Any]:
    """Replaces the adapted weights in merged variables with those of `base`, so they are bit-identical.

    All other leaves come from `merged`, even if they have changed.

    Args:
      merged: from `merge`.
      base: the base variables that were merged, or any part of them with the adapted leaves.
      specs: the specs that were merged.

    Returns:
      Variables like `merged` with the adapted leaves of `base`.

    Raises:
      ValueError: an adapted leaf is missing in `merged` or `base`, or has another shape.
    """
    # Not by subtracting s A B, which would leave rounding errors.
    flat, kept = flatten(merged), flatten(base)
    for spec in specs.values():
        weight_of("merged", flat, spec)
        weight_of("base", kept, spec)
    return replace_leaves(merged, {spec.leaf: kept[spec.leaf] for spec in specs.values()})
