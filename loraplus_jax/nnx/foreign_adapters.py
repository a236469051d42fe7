"""Adapters that other libraries put into a model: their factors in our form, and their specs."""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from .._utils.validation import check_number, suggest
from ..adapter.config import LoRAPlusConfig
from ..adapter.spec import LEAVES, AdapterSpec
from ..adapter.target_rules import config_of
from ..adapter.tree import leaves_by_path, unflatten
from ..optim.find_pairs import factor_pairs
from .adapted_module import join
from .layers import layer_weight


class ForeignAdapters(NamedTuple):
    """Adapters of another library.

    Attributes:
      lora: the tree of factors, as in the collection `"lora"`.
      specs: the table of specs, from path to `AdapterSpec`.
      config: a config that gives these specs, for `save_peft` and `save_adapter`.
    """

    lora: dict[str, Any]
    specs: dict[str, AdapterSpec]
    config: LoRAPlusConfig


def specs_of(source: Any, *, scale: float, axes: Mapping[str, str] | None = None) -> ForeignAdapters:
    """Reads the adapters of qwix (so of tunix), `nnx.LoRA`, `nnx.LoRALinear`, gemma or keras.

    With the result `save_peft` writes a PEFT directory from their runs, `merge` merges them, and `describe` shows
    them. Factors that the library flattens, such as (in, heads · size), get the axes of their weight.

    Args:
      source: an NNX model, or a tree of parameters with factors and weights, such as `nnx.state` of a model, the
        `"params"` of a Linen model or `{v.path: v.value for v in model.variables}` of a keras model.
      scale: the library's scale of A B: alpha / rank for qwix and keras, 1 for `nnx.LoRA` and gemma.
      axes: one letter per axis of weights of which neither layer nor shapes tell, by a regular expression for the
        weight's path, as in `target_parameters`: `{".*/q_einsum/w": "oio"}`.

    Returns:
      A `ForeignAdapters`: the tree of factors, with the shapes in the specs; the table of specs; and a config.

    Raises:
      ValueError: there are no adapters, a weight's axes are unknown (the message proposes letters), a rule of
        `axes` matches no adapted weight, or factors do not fit their weight.
    """
    check_number("scale", scale, above=0.0)
    is_model = isinstance(source, nnx.Module)
    # Without the levels that variables and qwix add: a weight that qwix quantized counts with its codes.
    leaves = {
        re.sub(r"^params/|(/array/qvalue)?(/value)?$", "", path): leaf
        for path, leaf in leaves_by_path(nnx.state(source, nnx.Param) if is_model else source).items()
    }
    letters = {
        join("/".join(map(str, parts)), weight.leaf): weight.axes
        for parts, module in (nnx.iter_modules(source) if is_model else ())
        if (weight := layer_weight(module)) is not None
    }
    lora, specs = {}, {}
    for key, pair in factor_pairs(leaves).items():
        leaf, path = _weight(key, leaves)
        weight, (a, b) = leaves[leaf], (leaves[path] for path in pair)
        found = _axes(leaf, weight, (a, b), axes or {}, letters)
        is_table = leaf.endswith(("embedding", "embeddings"))
        spec = AdapterSpec(
            leaf=f"params/{leaf}",
            kind="parameter"
            if leaf == path
            else "embed"
            if is_table
            else "dense"
            if found == "io"
            else "einsum",
            axes=found,
            shape=tuple(weight.shape),
            rank=a.shape[-1],
            scale=scale,
            stacked=(0,) * (len(weight.shape) - len(found)),
        )
        for (factor, shape, _, batch), value in zip(spec.factors_of(path), (a, b), strict=True):
            # qwix makes one axis of all input axes, and one of all output axes.
            head, rest = shape[: len(batch)], shape[len(batch) :]
            flat = (math.prod(rest[:-1]), rest[-1]) if value is a else (rest[0], math.prod(rest[1:]))
            if tuple(value.shape) not in (shape, (*head, *flat)):
                raise ValueError(
                    f"{factor}: {tuple(value.shape)} does not fit {shape}, the shape for axes {found!r}"
                )
            lora[factor] = jnp.reshape(value, shape)
        specs[path] = spec
    if not specs:
        raise ValueError("the model contains no adapters of a known library")
    weights = [spec.leaf.removeprefix("params/") for spec in specs.values()]
    if unused := [rule for rule in axes or {} if not any(re.fullmatch(rule, path) for path in weights)]:
        raise ValueError(f"axes: {unused[0]!r} matches no adapted weight{suggest(unused[0], weights)}")
    config = config_of(specs)
    # The scale that follows from the config's alpha may differ in the last bit.
    specs = {path: dataclasses.replace(spec, scale=config.scale_of(path)) for path, spec in specs.items()}
    return ForeignAdapters(unflatten(lora), specs, config)


def _weight(key: str, leaves: Mapping[str, Any]) -> tuple[str, str]:
    """The path of the weight that a pair of factors adapts, and its path in the specs.

    The latter is the module's, or for a raw weight of a Linen module the weight's own.
    """
    if key in leaves:  # qwix: kernel_lora_a beside kernel
        return key, key.rpartition("/")[0]
    # gemma's Einsum has its factors in _LoRAEinsum_0/lora, or _LoRAEinsum_NAME/lora if the weight's name is not w.
    match = re.fullmatch(r"(?:(?P<owner>.*?)/)??(?:_LoRA[A-Za-z]+_(?P<name>\w+)/)?lora", key)
    owner, name = (match["owner"] or "", match["name"] or "0") if match else (key, "0")
    for module in (owner, join(owner, "base_module")):  # `nnx.LoRA` holds the layer in a field
        for weight in (*LEAVES, "embeddings", "w") if name.isdigit() else (name,):
            if (leaf := join(module, weight)) in leaves:
                return leaf, owner if weight in (*LEAVES, "embeddings") else leaf
    raise ValueError(f"{key}: there are factors, but the weight that they adapt is not in the model")


def _axes(
    path: str, weight: Any, factors: tuple[Any, Any], rules: Mapping[str, str], letters: Mapping[str, str]
) -> str:
    for rule, axes in rules.items():
        if re.fullmatch(rule, path):
            return axes
    if path in letters:
        return letters[path]
    a, b = factors
    # A square weight of another name may be (out, in), as PyTorch's `weight`.
    is_flax = path.rpartition("/")[2] in (*LEAVES, "embeddings", "w")
    if len(weight.shape) == 2 and a.shape[0] == weight.shape[0] and (is_flax or len(set(weight.shape)) == 2):
        return "io"
    sides = {}
    for axes in map("".join, itertools.product("io", repeat=len(weight.shape))):
        if len(set(axes)) == 2:
            sizes = list(zip(weight.shape, axes, strict=True))
            sides[axes] = tuple(tuple(n for n, role in sizes if role == side) for side in "io")
    exact = [axes for axes, shapes in sides.items() if shapes == (tuple(a.shape[:-1]), tuple(b.shape[1:]))]
    if len(exact) == 1:
        return exact[0]
    flat = [axes for axes, (inner, _) in sides.items() if math.prod(inner) * a.shape[-1] == a.size]
    proposals = exact or flat
    raise ValueError(
        f"{path}: the axes of its weight {tuple(weight.shape)} are unknown; pass axes={{{path!r}: LETTERS}} with i "
        f"for input and o for output axes, such as {' or '.join(map(repr, proposals)) or 'io'}"
    )
