"""Converts adapter trees of other JAX libraries to ours: matches factors by side and checks shapes."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from .._utils.validation import check_number
from ..adapter.spec import Specs, reject_magnitude
from ..adapter.tree import leaves_by_path, unflatten
from ..optim.factor_pairs import factor_pairs

_SUFFIXES = ("/lora", "/kernel", "/embedding", "/w")
"""What may follow a module's path before its factors' names: gemma's own module, or the weight for qwix."""


def import_adapters(tree: Mapping[str, Any], specs: Specs, *, scale: float) -> dict[str, Any]:
    """Converts an adapter tree of `flax.nnx.LoRA`, qwix, gemma, keras or lorax (with its weights) to our tree.

    A and B are identified by name if it is unambiguous (`lora_a`, `kernel_lora_a`, `lora/a`), and otherwise by
    the weight next to them. A pair belongs to the spec with the same path. Nothing is transposed automatically:
    the shapes must equal those of the specs, so kernels with another order of axes raise an error.

    Args:
      tree: nested dicts with factors at any depth; `value` levels of containers are skipped, and other leaves
        ignored.
      specs: the table of our model, from `init_lora`.
      scale: the scale of A B in the other library, 1 for `nnx.LoRA`, alpha / rank for qwix; it must equal that of
        the specs.

    Returns:
      The tree for the collection `"lora"`.

    Raises:
      ValueError: a factor has no spec, a spec has no factors, or shapes or scale differ; the message lists all.

    Example:
      >>> from loraplus_jax.adapter.spec import AdapterSpec
      >>> spec = AdapterSpec(leaf="params/fc/kernel", kind="dense", axes="io", shape=(4, 3), rank=2, scale=1.0)
      >>> theirs = {"fc": {"kernel_lora_a": jnp.ones((4, 2)), "kernel_lora_b": jnp.zeros((2, 3))}}
      >>> sorted(import_adapters(theirs, {"fc": spec}, scale=1.0)["fc"])
      ['lora_a', 'lora_b']
    """
    check_number("scale", scale, above=0.0)
    reject_magnitude("import_adapters", specs)
    leaves = leaves_by_path(tree)
    factors, problems = {}, []
    for module, (a, b) in factor_pairs(leaves).items():
        key = _find_key(module, specs)
        if key is None:
            problems.append(f"+ {module} is not in the specs")
            continue
        shapes = tuple(tuple(leaves[path].shape) for path in (a, b))
        if shapes != specs[key].factor_shapes:
            problems.append(f"~ {module}: factors must have shapes {specs[key].factor_shapes}, got {shapes}")
        for name, path in zip(specs[key].factor_paths(key), (a, b), strict=True):
            factors[name] = jnp.asarray(leaves[path])
    problems += [
        f"- {key} has no factors" for key, spec in specs.items() if spec.factor_paths(key)[0] not in factors
    ]
    problems += [
        f"~ {key}: the scale must be {spec.scale:g} as in the specs, got {scale:g}"
        for key, spec in specs.items()
        if not math.isclose(spec.scale, scale, rel_tol=1e-6)
    ]
    if problems:
        raise ValueError(
            "\n  ".join([f"the adapters do not match the specs: {problems[0]}", *problems[1:20]])
        )
    return unflatten(factors)


def _find_key(module: str, specs: Specs) -> str | None:
    if module in specs:
        return module
    owner = next((module.removesuffix(end) for end in _SUFFIXES if module.endswith(end)), None)
    root = "" if f"/{module}" in _SUFFIXES else None
    return next((key for key in (owner, root) if key is not None and key in specs), None)
