"""Packs the weights of a tree of variables."""

import re
from collections.abc import Mapping
from typing import Any

from flax.core import meta

from .._utils.validation import suggest
from ..quantization.formats import QuantizeTo
from ..quantization.packed_array import is_packed, quantize
from .spec import AdapterSpec, Specs
from .tree import flatten, rebox, replace_leaves, weight_of


def quantize_base(
    base: Mapping[str, Any], kind: QuantizeTo, targets: Specs | Mapping[str, str], *, dtype: Any = None
) -> dict[str, Any]:
    """Packs weights of variables, one after the other; what `apply_lora_plus` makes of a model runs on them.

    Args:
      base: variables without adapters, `{"params": tree}`; they stay as they are.
      kind: the format, as in `quantize`.
      targets: the specs of `init_lora`, for all adapted weights; or a mapping from a regular expression for a
        weight's path, such as `".*/kernel"`, to one letter per axis as in `target_parameters`. Axes before those
        with a letter are stacked layers.
      dtype: dtype in which the layers see the weights; by default their own.

    Returns:
      The variables with a `PackedArray` in place of each of these weights.

    Raises:
      ValueError: a rule matches nothing or has more letters than the weight has axes, or a weight is missing or
        packed.

    Example:
      >>> import jax.numpy as jnp
      >>> base = {"params": {"up": {"kernel": jnp.ones((64, 4)), "bias": jnp.zeros(4)}}}
      >>> packed = quantize_base(base, "nf4", {".*/kernel": "io"})["params"]["up"]["kernel"]
      >>> packed.kind, packed.shape, packed.parts["codes"].shape
      ('nf4', (64, 4), (4, 32))
    """
    flat, new = flatten(base), {}
    for path, rule in _targets(flat, targets).items():
        weight = meta.unbox(flat[path])
        axes, embedding, stacked = rule
        if is_packed(weight):
            raise ValueError(f"{path} is packed already, in {weight.kind}")
        if stacked is None and len(weight.shape) < len(axes):
            raise ValueError(
                f"{path}: a weight with shape {weight.shape} has fewer axes than letters, {axes!r}"
            )
        # Leading batch axes are a stack too: of layers, which a scan slices, or of experts, which an index does.
        axes = axes.lstrip("abcdefghjklmnpqrstuvwxyz")  # all but i and o
        stacked = len(weight.shape) - len(axes)
        packed = quantize(weight, kind, axes=axes, embedding=embedding, stacked=stacked, dtype=dtype)
        new[path] = rebox(flat[path], packed)
    return replace_leaves(base, new)


def _targets(flat: Mapping[str, Any], targets: Any) -> dict[str, tuple[str, bool, int | None]]:
    # By path: the axes of a weight, whether it is a table of rows, and the number of stacked axes if known.
    found = {}
    for key, target in targets.items():
        if isinstance(target, AdapterSpec):
            if target.stacked != (0,) * len(target.stacked):
                raise ValueError(
                    f"{target.leaf}: its layers are stacked along axes {target.stacked}; packed ones must lead"
                )
            weight_of("base", flat, target)
            found[target.leaf] = target.axes, target.kind == "embed", len(target.stacked)
            continue
        paths = [path for path in flat if re.fullmatch(key, path.removeprefix("params/"))]
        if not paths:
            raise ValueError(f"targets: {key!r} matches no parameter{suggest(key, flat)}")
        for path in paths:
            found[path] = target, path.endswith("/embedding"), None
    return found
