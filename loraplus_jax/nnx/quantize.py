"""Packs the weights of an NNX model in place."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from ..quantization import QuantizeTo
from ..quantize_base import quantize_base as quantize_tree
from ..spec import Specs
from ..tree import flatten
from .adapted import ADAPTERS, set_adapters
from .views import base_variables


def quantize_base(
    model: nnx.Module, kind: QuantizeTo, targets: Specs | Mapping[str, str], *, dtype: Any = None
) -> None:
    """Packs weights of a model in place, one after the other; before or after `apply_lora_plus`.

    Args:
      model: the model.
      kind: the format, as in `loraplus_jax.quantization.quantize`.
      targets: the specs from `apply_lora_plus`, for all adapted weights; or a mapping from a regular expression for
        a weight's path, such as `".*/kernel"`, to one letter per axis.
      dtype: dtype in which the layers see the weights; by default their own.

    Raises:
      ValueError: as `loraplus_jax.quantize_base`. The model is unchanged then.
    """
    old = flatten(base_variables(model))
    new = flatten(quantize_tree(base_variables(model), kind, targets, dtype=dtype))
    for parts, module in list(nnx.iter_modules(model)):
        packed = {}
        for name, variable in vars(module).items():
            path = "/".join(("params", *map(str, parts), name))
            if isinstance(variable, nnx.Param) and new.get(path) is not old.get(path):
                packed[name] = new[path]
        for name, value in packed.items():
            vars(module)[name].set_value(value)
        if packed:
            set_adapters(module, vars(module).get(ADAPTERS, ()))
