"""Adds adapters to an NNX model in place: its layers get factors, and a subclass whose calls use them."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..adapter.config import ALL_LINEAR, LoRAPlusConfig, matches
from ..adapter.dora import output_norms
from ..adapter.einsum_letters import layer_axis
from ..adapter.spec import AdapterSpec, check_floating_weight, check_rank
from ..adapter.target_rules import (
    TracedModule,
    check_coverage,
    is_adapted,
    is_target,
    layer_index,
    parameter_rule,
    parameter_spec,
)
from ..inits.random import factor_dtype, factor_inits
from ..interpreter.dataflow import warn_of_whole
from .adapted_module import (
    ADAPTERS,
    DROPOUT,
    adapted_class,
    adapters_by_path,
    factor_attributes,
    join,
    path_of,
    remove_adapters,
    set_adapters,
)
from .check_reads import check_reads
from .layers import LayerWeight, layer_weight, matrices

_SHARDING = ("out_sharding", "sharding", "sharding_names", "shd")
"""Names under which Flax versions and libraries keep the mesh axes of a weight."""
_SCAN_AXIS = "param_scan_axis"
"""The name under which maxtext keeps the axis of a weight along which its layers lie."""


def apply_lora_plus(
    model: nnx.Module,
    config: LoRAPlusConfig,
    *,
    rngs: nnx.Rngs,
    stacked: Mapping[str, tuple[int, ...]] | None = None,
    dtype: Any = None,
    check: tuple[Any, ...] | None = None,
) -> dict[str, AdapterSpec]:
    """Adds adapters to the layers of an NNX model that the config selects; changes the model in place.

    The paths and values of the base, `isinstance` and the model's methods stay as they are. The factors are
    `nnx.LoRAParam` variables of the adapted modules, so that `nnx.state(model, nnx.LoRAParam)` is the adapters and
    `nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)` trains them.

    Args:
      model: the model; it may be abstract (from `nnx.eval_shape`).
      config: the rules; paths are the attributes from the model to a module, joined by "/".
      rngs: the stream `params` initializes the factors; `dropout` is for the adapters' dropout.
      stacked: the axes that `nnx.vmap` added to the weights, by name or path of a layer or of a parameter in
        `target_parameters`, innermost first. By default those that the weight's metadata or the layer's fields
        tell, or the leading ones; a parameter has them as batch axes among its letters.
      dtype: dtype of the factors; by default float64 for a float64 weight and float32 for every other, as in Linen.
      check: arguments of a call of the model, for `check_reads`; arrays may be `jax.ShapeDtypeStruct`.

    Returns:
      The table of specs, from path to `AdapterSpec`, as `init_lora` returns for Linen.

    Raises:
      TypeError: `model`, `config` or `rngs` is of another type.
      ValueError: the model already has adapters, of ours or of another library, or a module has attributes of their
        names; `rngs` lacks a stream; a rule matches nothing, the axes of a weight are unknown, a rank
        is above min(in, out), modules share the variable of an adapted weight, or `check` shows that the model uses
        one outside its module, or variant dora meets an abstract model. The model is unchanged then.

    Example:
      >>> model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
      >>> config = LoRAPlusConfig(target_modules=".*", rank=2)
      >>> specs = apply_lora_plus(model, config, rngs=nnx.Rngs(1))
      >>> specs[""].leaf, model.lora_a.shape, model.lora_b.shape
      ('params/kernel', (3, 2), (2, 4))
    """
    kinds = {"model": (model, nnx.Module), "config": (config, LoRAPlusConfig), "rngs": (rngs, nnx.Rngs)}
    for name, (value, kind) in kinds.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
    for name in ("params", *(("dropout",) if config.dropout else ())):
        if name not in rngs and "default" not in rngs:
            raise ValueError(
                f"rngs must have the stream {name!r}, as nnx.Rngs(0) does, got {', '.join(rngs)}"
            )
    # All that may fail comes before the first change.
    made = []
    for module, specs in _find(model, config, stacked or {}):
        new = {}
        for spec in specs:
            new |= _draw_factors(module, spec, config, rngs, dtype)
        layers = [spec for spec in specs if spec.kind != "parameter"]
        if config.dropout and layers:  # a parameter has no input of its own
            new[DROPOUT] = _make_dropout(config.dropout, rngs, layers[0])
        if taken := sorted(new.keys() & vars(module).keys()):
            raise ValueError(
                f"a {type(module).__name__} of the model already has the attribute {taken[0]!r}, which its adapter "
                "needs; rename it, or leave the module out by exclude_modules"
            )
        adapted_class(type(module))
        made.append((module, specs, new))
    for module, specs, new in made:
        for name, value in new.items():
            setattr(module, name, value)
        set_adapters(module, specs)
    if check is not None:
        try:
            for path, users in check_reads(model, *check).items():
                warn_of_whole(path, adapters_by_path(model)[path].spec.shape, users)
        except BaseException:
            remove_adapters(model)
            raise
    return {path: adapted.spec for path, adapted in adapters_by_path(model).items()}


def _find(
    model: nnx.Module, config: LoRAPlusConfig, stacked: Mapping[str, tuple[int, ...]]
) -> list[tuple[nnx.Module, tuple[AdapterSpec, ...]]]:
    """The modules to adapt, with the specs that they will hold; checks all rules."""
    seen: dict[str, TracedModule] = {}
    leaves: set[str] = set()
    stacks: dict[str, int] = {}
    found = []
    for parts, module in nnx.iter_modules(model):
        path = "/".join(map(str, parts))
        if vars(module).get(ADAPTERS):
            raise ValueError(f"{path or 'the model'!r} already has an adapter; name all layers in one config")
        if others := [name for name, value in vars(module).items() if isinstance(value, nnx.LoRAParam)]:
            raise ValueError(
                f"{join(path, others[0])!r} is a factor of another library's adapter, which an optimizer takes for "
                "ours; specs_of reads it for save_peft and merge"
            )
        entry = seen.setdefault(path, TracedModule(type(module).__name__))
        own = {n for n, v in vars(module).items() if isinstance(v, nnx.Param)}
        leaves |= {join(path, name) for name in own}
        specs = []
        if (weight := _target(module, path, config, entry)) is not None:
            spec = _layer_spec(module, path, weight, config, stacked, stacks)
            if spec is not None:
                entry.adapted = True
                specs.append(spec)
        for leaf in matrices(module):
            name = join(path, leaf)
            if config.target_parameters and (rule := parameter_rule(config, name)) is not None:
                # The rule has no letters for the axes that `stacked` names.
                shape, axes = _shape(module, leaf), _given_axes(stacked, name) or ()
                dtype = getattr(module, leaf).get_value().dtype
                spec = parameter_spec(config, name, rule, _without(shape, axes), dtype, leaf)
                specs.append(dataclasses.replace(spec, shape=shape, stacked=axes))
                check_rank(specs[-1], repr(name))
        if specs:
            found.append((path, module, tuple(specs)))
    check_coverage(config, seen, leaves, stacks)
    names = [path_of(own, path) for path, _, specs in found for own in specs]
    if unused := [name for name in stacked if not any(matches((name,), path) for path in names)]:
        raise ValueError(f"stacked: {unused[0]!r} matches no adapted module")
    owners: dict[int, list[str]] = {}
    for parts, module in nnx.iter_modules(model):
        for name, value in vars(module).items():
            if isinstance(value, nnx.Variable):
                owners.setdefault(id(value), []).append("/".join((*map(str, parts), name)))
    for path, module, specs in found:
        for own in specs:
            # Another module that holds the variable would not see the adapter.
            if len(places := owners[id(vars(module)[own.leaf])]) > 1:
                raise ValueError(
                    f"{path_of(own, path)!r} has an adapter, but its weight is one variable in "
                    f"{' and '.join(places)}, and only one of them would use the adapter; share the module "
                    "instead of the variable"
                )
    return [(module, specs) for _, module, specs in found]


def _target(module: nnx.Module, path: str, config: LoRAPlusConfig, entry: TracedModule) -> LayerWeight | None:
    """The weight of a layer that the config adapts, or None; records in `entry` what the rules are checked with."""
    targeted = is_target(config, path)
    try:
        weight = layer_weight(module)
    except ValueError as error:
        entry.adaptable = True
        if not targeted or config.target_modules == ALL_LINEAR:
            return None
        raise ValueError(f"target_modules matches {path!r}, a {type(module).__name__}: {error}") from None
    if weight is None:
        entry.weights = matrices(module)
        return None
    entry.adaptable, entry.kind, entry.axes = True, weight.kind, weight.axes
    return weight if targeted and is_adapted(config, path, weight.kind) else None


def _layer_spec(
    module: nnx.Module,
    path: str,
    weight: LayerWeight,
    config: LoRAPlusConfig,
    stacked: Mapping[str, tuple[int, ...]],
    stacks: dict[str, int],
) -> AdapterSpec | None:
    """The spec of a layer; None if `layers_to_transform` leaves it out. Adds the size of a stack to `stacks`."""
    shape = _shape(module, weight.leaf)
    axes = _given_axes(stacked, path)
    if axes is None:
        axes = _stacked_axes(module, weight, path)
    elif weight.shape not in (None, _without(shape, axes)):
        raise ValueError(
            f"stacked[{path!r}] {axes}: without these axes of {shape} the weight is {_without(shape, axes)}, "
            f"but the layer's fields say {weight.shape}"
        )
    spec = AdapterSpec(
        leaf=weight.leaf,
        kind=weight.kind,
        axes=weight.axes,
        shape=shape,
        rank=config.rank_of(path),
        scale=config.scale_of(path),
        stacked=axes,
        magnitude=config.variant == "dora",
    )
    check_rank(spec, where := repr(path or "the model"))
    check_floating_weight(f"the {weight.leaf} of {where}", getattr(module, weight.leaf).get_value().dtype)
    if (layers := config.layers_to_transform) is None:
        return spec
    if not axes:
        return spec if layer_index(path) in layers else None
    stacks[path] = size = shape[layer_axis(spec.base_letters, spec.stacked)]
    return dataclasses.replace(spec, layers=tuple(n for n in layers if n < size))


def _without(shape: tuple[int, ...], stacked: tuple[int, ...]) -> tuple[int, ...]:
    one = list(shape)
    for axis in reversed(stacked):
        if -len(one) <= axis < len(one):
            del one[axis]
    return tuple(one)


def _given_axes(stacked: Mapping[str, tuple[int, ...]], path: str) -> tuple[int, ...] | None:
    axes = next((axes for name, axes in stacked.items() if matches((name,), path)), None)
    if axes is not None and (not isinstance(axes, tuple) or not all(type(axis) is int for axis in axes)):
        raise ValueError(f"stacked[{path!r}] must be a tuple of axes such as (0,), got {axes!r:.80}")
    return axes


def _stacked_axes(module: nnx.Module, weight: LayerWeight, path: str) -> tuple[int, ...]:
    """The axes of a stack, as in `AdapterSpec`: by the weight's metadata, or else by the layer's fields."""
    shape, axis = _shape(module, weight.leaf), getattr(module, weight.leaf).get_metadata().get(_SCAN_AXIS)
    extra = len(shape) - len(weight.axes)
    if extra == 1 and isinstance(axis, int):
        return (axis,)
    if extra >= 0 and weight.shape is None:
        return (0,) * extra
    # Several axes are sought in front only.
    starts = range(len(shape)) if extra == 1 else range(int(extra >= 0))
    fitting = [n for n in starts if shape[:n] + shape[n + extra :] == weight.shape]
    if len(fitting) == 1:
        return (fitting[0],) * extra
    raise ValueError(
        f"{path or 'the model'!r}: the weight has shape {shape}, and the layer's fields say "
        f"{weight.shape or weight.axes}"
        + (f", so its layers may lie along any axis of {fitting}" if fitting else "")
        + f"; pass stacked={{{path!r}: axes}} for the axes that nnx.vmap added"
    )


def _shape(module: nnx.Module, leaf: str) -> tuple[int, ...]:
    variable = getattr(module, leaf)
    if not isinstance(variable, nnx.Variable):
        raise ValueError(
            f"the {leaf} of a {type(module).__name__} is a {type(variable).__name__}, as of a model that qwix "
            "quantized; call from_qwix(model, rules) first, which keeps every value"
        )
    return tuple(variable.get_value().shape)


def _draw_factors(
    module: nnx.Module, spec: AdapterSpec, config: LoRAPlusConfig, rngs: nnx.Rngs, dtype: Any
) -> dict[str, nnx.LoRAParam]:
    """The initial factors of one weight by attribute, an independent draw for every stacked layer."""
    weight = getattr(module, spec.leaf)
    inits: Any = factor_inits(config.init, spec.rank, spec.axes)
    dtype = factor_dtype(weight.get_value()) if dtype is None else dtype
    values = []
    for of, init in zip(spec.factors_of(""), inits, strict=False):  # the magnitudes need no draw
        letters, shape = of.letters, of.shape
        stack = [n for n, letter in enumerate(letters) if letter.isupper()]
        sizes = [shape[n] for n in stack]
        one = tuple(size for n, size in enumerate(shape) if n not in stack)
        keys = jax.random.split(rngs.params(), math.prod(sizes))
        # One draw for each layer: an init takes the shape of one, and an orthogonal A must be so in each.
        drawn = jax.vmap(lambda key, make=init, one=one: make(key, one, dtype))(keys)
        value = jnp.moveaxis(drawn.reshape(*sizes, *one), range(len(stack)), stack)
        if spec.layers is not None:
            axis = layer_axis(letters, spec.stacked)
            kept = np.isin(np.arange(shape[axis]), spec.layers)
            value = jnp.where(np.expand_dims(kept, [n for n in range(len(shape)) if n != axis]), value, 0)
        values.append(value)
    if spec.magnitude:
        if isinstance(weight.get_value(), jax.ShapeDtypeStruct):
            raise ValueError(
                f"variant dora starts from the norms of the weights, but the model is abstract at {spec.leaf}: "
                "load the weights before apply_lora_plus"
            )
        values.append(output_norms(weight.get_value(), spec.base_letters, spec.factor_letters))
    factors = {}
    for of, name, value in zip(spec.factors_of(""), factor_attributes(spec), values, strict=True):
        along = lambda names, of=of: of.along(dict(zip(spec.base_letters, names, strict=False)))  # noqa: E731
        metadata = _sharding_of_factor(weight, along)
        # On a mesh, as the weight is; of a tracer's sharding the mesh is abstract, and device_put rejects it.
        on = getattr(weight.get_value(), "sharding", None)
        if isinstance(on, jax.sharding.NamedSharding) and isinstance(on.mesh, jax.sharding.Mesh):
            value = jax.device_put(value, on.update(spec=jax.P(*along(on.spec))))
        # Without a mesh the constructor raises an error for metadata that names mesh axes.
        if jax.sharding.get_abstract_mesh().empty:
            factor = nnx.LoRAParam(value)
            for key, names in metadata.items():
                factor.set_metadata(key, names)
        else:
            factor = nnx.LoRAParam(value, **metadata)
        factors[name] = factor
    return factors


def _sharding_of_factor(weight: nnx.Variable, along: Callable[[Any], Any]) -> dict[str, Any]:
    """The mesh axes of a factor as metadata, from those of its weight; the rank has none."""
    metadata = weight.get_metadata()
    found = {key: metadata[key] for key in ("mesh", "sharding_rules") if metadata.get(key) is not None}
    for key in _SHARDING:
        names, spec_type = metadata.get(key), jax.sharding.PartitionSpec
        if isinstance(names, jax.sharding.NamedSharding):
            found[key] = names.update(spec=spec_type(*along(names.spec)))
        elif isinstance(names, spec_type):
            found[key] = spec_type(*along(names))
        elif isinstance(names, tuple | list):
            found[key] = type(names)(along(names))
    return found


def _make_dropout(rate: float, rngs: nnx.Rngs, spec: AdapterSpec) -> nnx.Dropout:
    make: Callable[[nnx.Rngs], nnx.Dropout] = lambda rngs: nnx.Dropout(rate, rngs=rngs)  # noqa: E731
    # nnx.scan slices the state of every module, so the key of a stack must be one for each layer.
    # The innermost axis is A; see `AdapterSpec.base_letters`.
    sizes = spec.sizes
    for size in (sizes[letter] for letter in sorted(sizes) if letter.isupper()):
        make = nnx.split_rngs(splits=size)(nnx.vmap(make, in_axes=(0,), out_axes=0))
    return make(rngs)
