"""Packs the weights of an NNX model in place, or takes over what qwix packed."""

from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx

from ..adapter.quantize_base import quantize_base as quantize_tree
from ..adapter.spec import Specs
from ..adapter.tree import flatten
from ..linen.from_qwix import check_rules, packed, stack_counts
from ..quantization.formats import QuantizeTo
from ..quantization.packed_array import is_from_qwix
from .adapted_module import ADAPTERS, join, set_adapters, set_class
from .variables import base_variables


def quantize_base(
    model: nnx.Module, kind: QuantizeTo, targets: Specs | Mapping[str, str], *, dtype: Any = None
) -> None:
    """Packs weights of a model in place, one after the other; before or after `apply_lora_plus`.

    Args:
      model: the model.
      kind: the format, as in `loraplus_jax.quantization.packed_array.quantize`.
      targets: the specs from `apply_lora_plus`, for all adapted weights; or a mapping from a regular expression for
        a weight's path, such as `".*/kernel"`, to one letter per axis.
      dtype: dtype in which the layers see the weights; by default their own.

    Raises:
      ValueError: as `quantize_base` of a tree. The model is unchanged then.
    """
    variables = base_variables(model)
    old, new = map(flatten, (variables, quantize_tree(variables, kind, targets, dtype=dtype)))
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


def from_qwix(model: nnx.Module, rules: Sequence[Any], *, stacked: Mapping[str, int] | None = None) -> None:
    """Packs what `qwix.quantize_model` quantized in place, one weight after the other; every value stays the same.

    The model then runs without qwix, and `apply_lora_plus` takes it like any other.

    Args:
      model: the model from `qwix.quantize_model` with a `PtqProvider`.
      rules, stacked: as in `loraplus_jax.linen.from_qwix`.

    Raises:
      ValueError, TypeError: as `loraplus_jax.linen.from_qwix`. The model is unchanged then.
    """
    check_rules(rules)
    modules = list(nnx.iter_modules(model))
    found = {
        (n, name): (join("/".join(map(str, parts)), name), value)
        for n, (parts, module) in enumerate(modules)
        for name, value in vars(module).items()
        if is_from_qwix(value)
    }
    counts = stack_counts(stacked, [path for path, _ in found.values()])
    new = {place: packed(value, path, counts[path]) for place, (path, value) in found.items()}
    for _, module in modules:
        if plain := vars(type(module)).get("_unquantized_type"):
            set_class(module, plain)
        for name in vars(module).keys() & _QWIX_ATTRIBUTES:
            delattr(module, name)
    for (n, name), value in new.items():
        module = modules[n][1]
        # The codes' variable has the weight's type and metadata.
        setattr(module, name, vars(module)[name].array.qvalue.replace(value))
        set_adapters(module, vars(module).get(ADAPTERS, ()))


_QWIX_ATTRIBUTES = {"qwix_path", "qwix_rngs", "disable_quant_stats_update"}
