"""An adapted NNX model as the trees that the rest of the package takes, and as a pure function of them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from .._utils.validation import check_choice
from ..adapter.lora import SCALE, adapted_weight
from ..adapter.lora import disabled as disabled_tree
from ..adapter.merge import check_dequantize
from ..adapter.spec import Specs
from ..adapter.tree import flatten, join_path, unflatten
from ..quantization.packed_array import is_packed
from .adapted_module import (
    OPTIONAL,
    adapters_by_path,
    attribute_of,
    factor_attributes,
    part_of,
    remove_adapters,
)

AnyModule = TypeVar("AnyModule", bound=nnx.Module)


def lora_tree(model: nnx.Module) -> dict[str, Any]:
    """The adapters as a tree of arrays with string keys, like the collection `"lora"` of a Linen model.

    Args:
      model: a model with adapters.

    Returns:
      The tree that `save_adapter`, `save_peft` and `merge` take, with the paths of the specs.

    Raises:
      ValueError: the model has no adapters.
    """
    return unflatten({name: variable.get_value() for name, variable in _factors(model).items()})


def set_lora(model: nnx.Module, lora: Mapping[str, Any], *, specs: Specs | None = None) -> None:
    """Sets all factors of a model, from a tree like that of `lora_tree`, such as one from `load_adapter`.

    Args:
      model: a model with adapters.
      lora: the factors; the scale of s A B stays the model's.
      specs: the table of the adapter, to check that the model has the same scales.

    Raises:
      ValueError: the tree does not have the factors of the model, or their shapes, or the model's table is not
        `specs`. The model is unchanged then.
    """
    factors, new = _factors(model), flatten(lora)
    if differing := sorted(factors.keys() ^ new.keys()):
        raise ValueError(f"the adapters and the model differ at {', '.join(differing[:5])}")
    for name, value in new.items():
        if tuple(value.shape) != (shape := tuple(factors[name].get_value().shape)):
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    if specs is not None:
        _check_specs(model, specs)
    for name, value in new.items():
        factors[name].set_value(jnp.asarray(value, factors[name].get_value().dtype))


def _check_specs(model: nnx.Module, specs: Specs) -> None:
    """Raises ValueError unless the specs are the model's: with equal shapes, another scale would go unnoticed."""
    for path, adapted in adapters_by_path(model).items():
        spec = specs.get(path)
        if spec is None:
            raise ValueError(f"specs must contain {path!r}, which the model adapts")
        for field in dataclasses.fields(spec):
            own, given = getattr(adapted.spec, field.name), getattr(spec, field.name)
            if own != given:
                raise ValueError(
                    f"{path}: {field.name} must be {own}, the model's, got {given}; adapt the model with the "
                    "adapter's config"
                )


def base_variables(model: nnx.Module) -> dict[str, Any]:
    """Collects the parameters of a model without its adapters.

    Returns:
      Variables like those of a Linen model, with string keys in the collection `"params"`. A packed weight is a
      `PackedArray`.
    """
    params = nnx.to_flat_state(nnx.state(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))))
    return {"params": unflatten({join_path(path): variable.get_value() for path, variable in params})}


def functional(model: nnx.Module) -> Callable[..., Any]:
    """The model as a pure function of its variables, for `jit_step`, `make_theory`, sweeps and `jax.vmap`.

    Args:
      model: a model with adapters; it stays unchanged. Other state (batch statistics, caches) keeps its values.

    Returns:
      `apply(variables, *args, method=None, rngs=None, **kwargs)`, like `apply` of a Linen model. `variables` is
      `{"params": base, "lora": lora}`, and may hold `"lora_scale"` from `scale_variables`; what it leaves out
      keeps the model's values. `rngs` reseeds the model's streams: a key for all of them, or a dict of keys by
      stream name; without it the model is in eval mode.

    Raises:
      ValueError: the model has no adapters. A call raises it for a variable or stream that the model does not have.

    Example:
      >>> from loraplus_jax import LoRAPlusConfig
      >>> from loraplus_jax.nnx import apply_lora_plus
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> _ = apply_lora_plus(model, LoRAPlusConfig(target_modules=".*", rank=1), rngs=nnx.Rngs(1))
      >>> variables = base_variables(model) | {"lora": lora_tree(model)}
      >>> functional(model)(variables, jnp.ones((3, 2))).shape
      (3, 1)
    """
    _factors(model)  # raises without adapters
    graph, state = nnx.split(model)

    def apply(
        variables: Mapping[str, Any], *args: Any, method: str | None = None, rngs: Any = None, **kwargs: Any
    ) -> Any:
        # A copy: a call may change variables, and those of another trace must not leak into the model.
        module = nnx.merge(graph, state, copy=True)
        _set_variables(module, variables)
        if rngs is None:
            module.eval()
        else:
            module.train()
            _reseed(module, rngs)
        return getattr(module, method or "__call__")(*args, **kwargs)

    return apply


def merge(model: AnyModule, *, dequantize: bool = False) -> AnyModule:
    """Merges the adapters of a model into the weights of a copy; `model` is unchanged.

    Args:
      model: a model with adapters.
      dequantize: whether to merge into the values that a packed weight stands for, which differ from the original
        ones by the rounding.

    Returns:
      A model of the original class without adapters. The merged weights keep their dtypes, and a packed one becomes
      a dense array; all other variables share their arrays with `model`.

    Raises:
      ValueError: the model has no adapters, or a weight is packed.
    """
    merged = nnx.clone(model)
    for module, _, own, spec in adapters_by_path(merged).values():
        weight = getattr(module, own.leaf)
        factors = [getattr(module, name)[...] for name in factor_attributes(own)]
        value = weight.get_value()
        if is_packed(value):
            value = check_dequantize(value, spec.leaf, allowed=dequantize)
        weight.set_value(adapted_weight(value, factors, spec).astype(value.dtype))
    remove_adapters(merged)
    return merged


def unmerge(merged: nnx.Module, model: nnx.Module) -> None:
    """Gives a model from `merge` the adapted weights of `model` again, bit by bit, in place.

    Raises:
      ValueError: `merged` lacks one of the weights.
    """
    modules = {join_path(path): module for path, module in nnx.iter_modules(merged)}
    for module, path, own, spec in adapters_by_path(model).values():
        if path not in modules or own.leaf not in vars(modules[path]):
            raise ValueError(f"{spec.leaf} is missing in the merged model")
        getattr(modules[path], own.leaf).set_value(getattr(module, own.leaf).get_value())


def disabled(model: AnyModule) -> AnyModule:
    """Makes a copy of a model whose adapters have no effect.

    Returns:
      A model with the same graph definition, so that nothing is recompiled. Its factors are zeros; all other
      variables share their arrays with `model`.
    """
    copy = nnx.clone(model)
    set_lora(copy, disabled_tree(lora_tree(copy)))
    return copy


def _factors(model: nnx.Module) -> dict[str, nnx.Variable]:
    """The variables of the factors by their path in the tree of adapters."""
    return {
        name: getattr(module, attribute)
        for path, (module, _, own, spec) in adapters_by_path(model).items()
        for name, attribute in zip(spec.factor_paths(path), factor_attributes(own), strict=True)
    }


def _set_variables(model: nnx.Module, variables: Mapping[str, Any]) -> None:
    """Sets the variables of a model within one call of `functional`, with scales and taps beside the factors."""
    lora = flatten(variables.get("lora", {})) | flatten(variables.get(SCALE, {}))
    factors = _factors(model)
    for path, (module, _, own, _) in adapters_by_path(model).items():
        for name in OPTIONAL:
            if (value := lora.pop(f"{path}/{name}".removeprefix("/"), None)) is not None:
                setattr(module, attribute_of(own, name), nnx.LoRAParam(value))
    for name, value in lora.items():
        if name not in factors:
            raise ValueError(f"the variables contain {name!r}, which is not a factor of the model")
        factors[name].set_value(value)
    params = flatten(variables.get("params", {}))
    for path, _ in nnx.to_flat_state(nnx.state(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))):
        if (value := params.pop(join_path(path), None)) is not None:
            functools.reduce(part_of, path, model).set_value(value)
    if params:
        raise ValueError(f"the model has no parameter {next(iter(params))!r}")


def _reseed(model: nnx.Module, rngs: Any) -> None:
    # With nnx.Rngs(0) all streams are called default, so a key for "dropout" alone would change nothing.
    names = {node.key.tag for _, node in nnx.iter_graph(model) if isinstance(node, nnx.RngStream)}
    if not isinstance(rngs, Mapping):
        rngs = {name: jax.random.fold_in(rngs, n) for n, name in enumerate(sorted(names))}
    for name in rngs:
        check_choice("rngs", name, sorted(names))
    nnx.reseed(model, policy="match_shape", **rngs)
