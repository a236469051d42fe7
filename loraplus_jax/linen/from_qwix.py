"""Takes over the weights of a Linen model that qwix quantized, code by code."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.core import meta

from ..adapter.config import matches
from ..adapter.tree import flatten, rebox, replace_leaves
from ..quantization.formats import FormatName, pack_codes
from ..quantization.packed_array import PackedArray, is_from_qwix


def from_qwix(
    variables: Mapping[str, Any], rules: Sequence[Any], *, stacked: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Packs what qwix quantized, one weight after the other; every value stays the same.

    The result belongs to the model before `qwix.quantize_model`: pass that to `apply_lora_plus`.

    Args:
      variables: variables with the parameters from `qwix.quantize_params`, or from the `init` of a quantized model;
        they stay as they are.
      rules: those (`qwix.QuantizationRule`) of the provider that quantized the model.
      stacked: number of leading axes of weights that `nn.scan` or `nn.vmap` stacks, by the end of the
        weight's path, such as `"up/kernel"`.

    Returns:
      The variables with a `PackedArray` in place of each of these weights.

    Raises:
      ValueError: a weight is of a type other than nf4 and symmetric integers of up to 8 bits, or has scales along
        two input axes, or `stacked` matches no quantized weight, or a rule quantizes activations.
      TypeError: `rules` are not qwix's rules.
    """
    check_rules(rules)
    flat = flatten(variables)
    found = {path: leaf for path, leaf in flat.items() if is_from_qwix(leaf)}
    counts = stack_counts(stacked, found)
    new = {
        path: rebox(weight.array.qvalue, packed(weight, path, counts[path])) for path, weight in found.items()
    }
    return replace_leaves(variables, new)


def check_rules(rules: Sequence[Any]) -> None:
    """Raises ValueError if a rule of qwix quantizes activations, which the adapted model would not do."""
    # An argument: qwix quantizes activations as it runs, by rules in a closure, and the weights do not show it.
    if not isinstance(rules, Sequence) or not rules or not all(hasattr(r, "act_qtype") for r in rules):
        raise TypeError(
            f"rules must be the rules of qwix's provider, [QuantizationRule(...)], got {rules!r:.80}"
        )
    if types := [rule.act_qtype for rule in rules if rule.act_qtype is not None]:
        raise ValueError(
            f"rules: qwix quantizes activations of the model to {types[0]}, which adapters do not; quantize "
            "it with weight_qtype alone"
        )


def stack_counts(stacked: Mapping[str, int] | None, paths: Collection[str]) -> dict[str, int]:
    """The number of stacked axes of each weight; raises ValueError if there is none or an entry matches none."""
    if not paths:
        raise ValueError("found no weight that qwix quantized")
    for pattern in stacked or {}:
        if not any(matches((pattern,), path) for path in paths):
            raise ValueError(f"stacked: {pattern!r} matches no weight that qwix quantized")
    return {
        path: next((n for pattern, n in (stacked or {}).items() if matches((pattern,), path)), 0)
        for path in paths
    }


def packed(weight: Any, name: str, stacked: int = 0) -> PackedArray:
    """A `PackedArray` of the same values as a quantized weight of qwix; `name` is for errors."""
    array = weight.array
    codes, scale = (np.asarray(meta.unbox(x)) for x in (array.qvalue, array.scale))
    kinds: dict[str, FormatName] = {"nf4": "nf4"}
    kinds |= {f"int{bits}": "q4_0" if bits < 5 else "int8" for bits in range(2, 9)}
    form = array.qtype if isinstance(array.qtype, str) else jnp.dtype(array.qtype).name
    kind = kinds.get(form)
    if kind is None or array.zero_point is not None:
        raise ValueError(
            f"{name}: qwix quantized it to {form}{'' if array.zero_point is None else ' with a zero point'}; "
            "allowed are nf4 and symmetric integers of 2 to 8 bits"
        )
    lead, sizes, steps = codes.shape[:stacked], codes.shape[stacked:], scale.shape[stacked:]
    # Blocks lie along the axes with fewer scales than values; one that has several blocks comes first.
    inner = [n for n, (size, count) in enumerate(zip(sizes, steps, strict=True)) if count != size]
    inner.sort(key=lambda n: steps[n] == 1)
    if scale.shape[:stacked] != lead or any(steps[n] > 1 for n in inner[1:]):
        raise ValueError(f"{name}: scales {scale.shape} of a weight {codes.shape} lie along several axes")
    order = (*(n for n in range(len(sizes)) if n not in inner), *inner)
    rows = int(np.prod([sizes[n] for n in order[: len(order) - len(inner)]]))
    as_rows = lambda x: x.transpose(  # noqa: E731
        (*range(stacked), *(stacked + n for n in order))
    ).reshape(*lead, rows, -1)
    parts = pack_codes(kind, as_rows(codes.astype(np.int16)), as_rows(scale))
    parts = {part: jnp.asarray(value) for part, value in parts.items()}
    return PackedArray(parts, kind, sizes, order, len(inner), jnp.dtype(scale.dtype))
