"""Adapter trees that other JAX libraries made, as ours: roles by side, shapes checked, nothing reshaped."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from .._validation import check_number
from ..factor_pairs import factor_pairs
from ..spec import Specs
from ..tree import leaves_by_path, unflatten

_BEHIND = ("/lora", "/kernel", "/embedding", "/w")
"""What may stand between a module's path and its factors' names: gemma's own module, the weight for qwix."""


def import_adapters(tree: Mapping[str, Any], specs: Specs, *, scale: float) -> dict[str, Any]:
    """The factors in a tree of `flax.nnx.LoRA`, qwix, gemma or keras, or lorax's beside their weights, as our tree.

    Which factor is which follows from names where they tell it (`lora_a`, `kernel_lora_a`, `lora/a`), else from the
    weight beside; a pair goes to the entry of the specs whose path it has. Shapes must be those of the specs: a
    library that keeps a kernel's axes in another order is refused, not guessed at.

    Args:
      tree: nested dicts, factors at any depth; `value` levels of containers are looked through, and what is no
        factor is left out.
      specs: the table of the model here, from `init_lora`.
      scale: the factor on A B in the other library, 1 for `nnx.LoRA`, alpha / rank for qwix. The specs must have
        the same.

    Returns:
      The tree for the collection `"lora"`.

    Raises:
      ValueError: a factor has no place, a place no factor, or shapes or scale differ; all are listed.

    Example:
      >>> from loraplus_jax.spec import AdapterSpec
      >>> spec = AdapterSpec(leaf="params/fc/kernel", kind="dense", axes="io", shape=(4, 3), rank=2, scale=1.0)
      >>> theirs = {"fc": {"kernel_lora_a": jnp.ones((4, 2)), "kernel_lora_b": jnp.zeros((2, 3))}}
      >>> sorted(import_adapters(theirs, {"fc": spec}, scale=1.0)["fc"])
      ['lora_a', 'lora_b']
    """
    check_number("scale", scale, above=0.0)
    leaves = leaves_by_path(tree)
    factors, problems = {}, []
    for module, (a, b) in factor_pairs(leaves).items():
        key = _find_key(module, specs)
        if key is None:
            problems.append(f"+ {module} has no entry in the specs")
            continue
        shapes = tuple(tuple(leaves[path].shape) for path in (a, b))
        if shapes != specs[key].factor_shapes:
            problems.append(f"~ {module}: the factors are {shapes}, the specs say {specs[key].factor_shapes}")
        for name, path in zip(specs[key].factor_paths(key), (a, b), strict=True):
            factors[name] = jnp.asarray(leaves[path])
    problems += [
        f"- {key} has no factors" for key, spec in specs.items() if spec.factor_paths(key)[0] not in factors
    ]
    problems += [
        f"~ {key}: the scale is {spec.scale:g} in the specs, {scale:g} there"
        for key, spec in specs.items()
        if not math.isclose(spec.scale, scale, rel_tol=1e-6)
    ]
    if problems:
        raise ValueError("\n  ".join([f"the adapters do not fit the specs: {problems[0]}", *problems[1:20]]))
    return unflatten(factors)


def _find_key(module: str, specs: Specs) -> str | None:
    if module in specs:
        return module
    owner = next((module.removesuffix(end) for end in _BEHIND if module.endswith(end)), None)
    root = "" if f"/{module}" in _BEHIND else None
    return next((key for key in (owner, root) if key is not None and key in specs), None)
