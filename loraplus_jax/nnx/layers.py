"""Which weight of an NNX layer is adapted, and the roles of its axes, read from the layer's fields."""

import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flax import nnx

from ..adapter.einsum_letters import split_equation


class LayerWeight(NamedTuple):
    """The weight of a supported layer.

    Attributes:
      kind: layer kind, as in `AdapterSpec`.
      leaf: the weight's attribute.
      axes: one letter per axis, as in `AdapterSpec`.
      shape: shape without stacked axes, where the fields tell it.
    """

    kind: str
    leaf: str
    axes: str
    shape: tuple[int, ...] | None = None


def layer_weight(module: nnx.Module) -> LayerWeight | None:
    """Finds the weight of a supported layer.

    Besides Flax's layers, it knows modules with one weight and its equation in `einsum_str` (tunix, bonsai), and
    with the shapes of its two sides in `in_features_shape` and `out_features_shape` (maxtext).

    Returns:
      A `LayerWeight`, or None for another module.

    Raises:
      ValueError: an Einsum's equation cannot be adapted, or is given only in the call.
    """
    fields = vars(module)
    if isinstance(module, nnx.Linear):
        return LayerWeight("dense", "kernel", "io", (module.in_features, module.out_features))
    if isinstance(module, nnx.LinearGeneral):
        return _linear_general(module)
    if isinstance(module, nnx.Conv):
        return LayerWeight("conv", "kernel", "i" * (len(_sequence(module.kernel_size)) + 1) + "o")
    if isinstance(module, nnx.ConvTranspose):
        sides = "oi" if module.transpose_kernel else "io"
        return LayerWeight("conv_transpose", "kernel", "i" * len(_sequence(module.kernel_size)) + sides)
    if isinstance(module, nnx.Embed):
        return LayerWeight("embed", "embedding", "io", (module.num_embeddings, module.features))
    if isinstance(module, nnx.Einsum):
        return LayerWeight("einsum", "kernel", _equation_axes(module.einsum_str), tuple(module.kernel_shape))
    weights = matrices(module)
    if "einsum_str" in fields and len(weights) == 1:
        return LayerWeight("einsum", weights[0], _equation_axes(fields["einsum_str"]))
    if {"in_features_shape", "out_features_shape"} <= fields.keys() and len(weights) == 1:
        sides = (_sequence(fields[name]) for name in ("in_features_shape", "out_features_shape"))
        inputs, outputs = sides
        axes = "i" * len(inputs) + "o" * len(outputs)
        return LayerWeight("dense_general", weights[0], axes, (*inputs, *outputs))
    return None


def matrices(module: nnx.Module) -> list[str]:
    """The names of a module's parameters with two or more axes, also of those that qwix quantized."""
    return [
        name
        for name, value in vars(module).items()
        if (isinstance(value, nnx.Param) and not isinstance(value, nnx.LoRAParam))
        or hasattr(getattr(value, "array", None), "qvalue")
        if len(getattr(value, "shape", ())) >= 2
    ]


def _linear_general(module: nnx.LinearGeneral) -> LayerWeight:
    batch = module.batch_axis
    batch_shape = tuple(batch.values()) if isinstance(batch, Mapping) else ()
    inputs, outputs = _sequence(module.in_features), _sequence(module.out_features)
    letters = "efghjklm"[: len(batch_shape)]  # as split_equation names them
    axes = letters + "i" * len(inputs) + "o" * len(outputs)
    return LayerWeight("dense_general", "kernel", axes, (*batch_shape, *inputs, *outputs))


def _equation_axes(equation: Any) -> str:
    if not isinstance(equation, str):
        raise ValueError(
            "its einsum_str is only given in the call; name its weight in target_parameters instead"
        )
    equation = equation.replace(" ", "")
    rest = next(c for c in string.ascii_uppercase if c not in equation)
    return split_equation(equation.replace("...", rest))[0]


def _sequence(value: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)
