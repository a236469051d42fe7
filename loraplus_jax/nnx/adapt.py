"""Adds adapters to an NNX model in place: its layers get factors, and a subclass whose calls use them."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..config import ALL_LINEAR, LoRAPlusConfig, matches
from ..inits import factor_inits
from ..lora import PREVIOUS_FACTORS, SCALE, TAP
from ..low_rank import LowRankWeight, evaluate
from ..rules import (
    TracedModule,
    check_coverage,
    is_adapted,
    is_target,
    layer_index,
    parameter_rule,
    parameter_spec,
)
from ..spec import AdapterSpec, check_rank, factor_letters, layer_axis
from .layers import LayerWeight, layer_weight, matrices

ADAPTERS, DROPOUT = "lora_plus_adapters", "lora_plus_dropout"
"""Attributes of an adapted module: its `LayerAdapter` objects, and an `nnx.Dropout` if the config has dropout."""
OMIT_WEIGHTS: Any = jax.make_user_context(False)
"""Whether calls leave out the adapted weights and mark them, for `check_reads`; nnx.jit respects it."""
OPTIONAL = (SCALE, TAP, *PREVIOUS_FACTORS)
"""What may stand beside a module's factors while `functional` runs the model."""
_SHARDING = ("out_sharding", "sharding", "sharding_names", "shd")
"""Names under which Flax versions and libraries keep the mesh axes of a weight."""
_SCAN_AXIS = "param_scan_axis"
"""The name under which maxtext keeps the axis of a weight along which its layers lie."""


@dataclasses.dataclass(frozen=True)
class LayerAdapter:
    """One adapted weight of a module; static, so it is part of the module's graph definition.

    Attributes:
      spec: the spec in the model's table, but with the weight's attribute as `leaf`: like layers have equal
        adapters, and share compiled programs.
    """

    spec: AdapterSpec

    @property
    def leaf(self) -> str:
        """The weight's attribute."""
        return self.spec.leaf

    @property
    def prefix(self) -> str:
        """What precedes `lora_a` and `lora_b` in the factors' attributes: a module may have several parameters."""
        return f"{self.leaf}_" if self.spec.kind == "parameter" else ""

    def path(self, module: str) -> str:
        """The path in the table of specs, for a module at the path `module`."""
        return join(module, self.leaf) if self.spec.kind == "parameter" else module

    def spec_at(self, module: str) -> AdapterSpec:
        """The spec in the model's table."""
        return dataclasses.replace(self.spec, leaf=f"params/{join(module, self.leaf)}")

    def attribute(self, name: str) -> str:
        """The attribute of a factor, scale or tap on the module."""
        return f"{self.prefix}{name}"

    @property
    def factors(self) -> tuple[str, str]:
        """The attributes of A and B."""
        a, b = (self.attribute(name) for name in self.spec.factors)
        return a, b


def apply_lora_plus(
    model: nnx.Module,
    config: LoRAPlusConfig,
    *,
    rngs: nnx.Rngs,
    stacked: Mapping[str, tuple[int, ...]] | None = None,
    dtype: Any = jnp.float32,
) -> dict[str, AdapterSpec]:
    """Adds adapters to the layers of an NNX model that the config selects; changes the model in place.

    The paths and values of the base, `isinstance` and the model's methods stay as they are. The factors are
    `nnx.LoRAParam` variables of the adapted modules, so that `nnx.state(model, nnx.LoRAParam)` is the adapters and
    `nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)` trains them.

    Args:
      model: the model; it may be abstract (from `nnx.eval_shape`).
      config: the rules; paths are the attributes from the model to a module, joined by "/".
      rngs: the stream `params` initializes the factors; `dropout` is for the adapters' dropout.
      stacked: the axes that `nnx.vmap` added to a module's weights, by name or path, innermost first; by default
        those that the weight's metadata or the layer's fields tell, or the leading ones.
      dtype: dtype of the factors.

    Returns:
      The table of specs, from path to `AdapterSpec`, as `init_lora` returns for Linen.

    Raises:
      TypeError: `model` is not an NNX module.
      ValueError: the model already has adapters, a rule matches nothing, the axes of a weight are unknown, a rank
        is above min(in, out), or modules share the variable of an adapted weight. The model is unchanged then.

    Example:
      >>> model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
      >>> config = LoRAPlusConfig(target_modules=".*", rank=2)
      >>> specs = apply_lora_plus(model, config, rngs=nnx.Rngs(1))
      >>> specs[""].leaf, model.lora_a.shape, model.lora_b.shape
      ('params/kernel', (3, 2), (2, 4))
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be a flax.nnx.Module, got {type(model).__name__}")
    for module, adapters in _find(model, config, stacked or {}):
        for adapter in adapters:
            _make_factors(module, adapter, config, rngs, dtype)
        setattr(module, ADAPTERS, adapters)
        if config.dropout:
            setattr(module, DROPOUT, _make_dropout(config.dropout, rngs, adapters[0].spec))
        _set_class(module, _adapted_class(type(module)))
    return {
        adapter.path(path): adapter.spec_at(path)
        for path, _, adapters in adapted_modules(model)
        for adapter in adapters
    }


def adapted_modules(model: nnx.Module) -> Iterator[tuple[str, nnx.Module, tuple[LayerAdapter, ...]]]:
    """The modules of a model with adapters, and their paths."""
    for parts, module in nnx.iter_modules(model):
        if (adapters := vars(module).get(ADAPTERS)) is not None:
            yield "/".join(map(str, parts)), module, adapters


def join(module: str, name: str) -> str:
    """The path of an attribute of a module."""
    return f"{module}/{name}" if module else name


def remove_adapters(model: nnx.Module) -> None:
    """Removes all adapters in place; the model is then as before `apply_lora_plus`."""
    for _, module, adapters in list(adapted_modules(model)):
        for adapter in adapters:
            for name in adapter.factors:
                delattr(module, name)
        delattr(module, ADAPTERS)
        if DROPOUT in vars(module):
            delattr(module, DROPOUT)
        _set_class(module, type(module).__bases__[0])


def _find(
    model: nnx.Module, config: LoRAPlusConfig, stacked: Mapping[str, tuple[int, ...]]
) -> list[tuple[nnx.Module, tuple[LayerAdapter, ...]]]:
    """The modules to adapt, with their adapters; checks all rules."""
    seen: dict[str, TracedModule] = {}
    leaves: set[str] = set()
    stacks: dict[str, int] = {}
    found = []
    for parts, module in nnx.iter_modules(model):
        path = "/".join(map(str, parts))
        if ADAPTERS in vars(module):
            raise ValueError(f"{path or 'the model'!r} already has an adapter; name all layers in one config")
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
            if config.target_parameters and (rule := parameter_rule(config, join(path, leaf))) is not None:
                spec = parameter_spec(config, join(path, leaf), rule, _shape(module, leaf), leaf)
                check_rank(spec, repr(join(path, leaf)))
                specs.append(spec)
        if specs:
            found.append((path, module, tuple(map(LayerAdapter, specs))))
    check_coverage(config, seen, leaves, stacks)
    if unused := [name for name in stacked if not any(matches((name,), path) for path, _, _ in found)]:
        raise ValueError(f"stacked: {unused[0]!r} matches no adapted module")
    _check_not_shared(model, found)
    return [(module, adapters) for _, module, adapters in found]


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
    axes = next((axes for name, axes in stacked.items() if matches((name,), path)), None)
    if axes is None:
        axes = _stacked_axes(module, weight, path)
    spec = AdapterSpec(
        leaf=weight.leaf,
        kind=weight.kind,
        axes=weight.axes,
        shape=shape,
        rank=config.rank_of(path),
        scale=config.scale_of(path),
        stacked=axes,
    )
    check_rank(spec, repr(path or "the model"))
    if (layers := config.layers_to_transform) is None:
        return spec
    if not axes:
        return spec if layer_index(path) in layers else None
    stacks[path] = size = shape[layer_axis(spec.base_letters, spec.stacked)]
    return dataclasses.replace(spec, layers=tuple(n for n in layers if n < size))


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
    return tuple(getattr(module, leaf).get_value().shape)


def _check_not_shared(model: nnx.Module, found: list[Any]) -> None:
    """Raises ValueError if another module holds the variable of an adapted weight: it would not see the adapter."""
    owners: dict[int, list[str]] = {}
    for parts, module in nnx.iter_modules(model):
        for name, value in vars(module).items():
            if isinstance(value, nnx.Variable):
                owners.setdefault(id(value), []).append("/".join((*map(str, parts), name)))
    for path, module, adapters in found:
        for adapter in adapters:
            if len(places := owners[id(vars(module)[adapter.leaf])]) > 1:
                raise ValueError(
                    f"{adapter.path(path)!r} has an adapter, but its weight is one variable in "
                    f"{' and '.join(places)}, and only one of them would use the adapter; share the module "
                    "instead of the variable"
                )


def _make_factors(
    module: nnx.Module, adapter: LayerAdapter, config: LoRAPlusConfig, rngs: nnx.Rngs, dtype: Any
) -> None:
    """Sets the initial factors of one weight, an independent draw for every stacked layer."""
    spec, weight = adapter.spec, getattr(module, adapter.leaf)
    inits: Any = factor_inits(config.init, spec.rank, spec.axes)
    for side, name in enumerate(adapter.factors):
        letters, shape = spec.factor_letters[side], spec.factor_shapes[side]
        stack = [n for n, letter in enumerate(letters) if letter.isupper()]
        sizes = [shape[n] for n in stack]
        one = tuple(size for n, size in enumerate(shape) if n not in stack)
        keys = jax.random.split(rngs.params(), math.prod(sizes))
        values = jax.vmap(lambda key, make=inits[side], one=one: make(key, one, dtype))(keys)
        value = jnp.moveaxis(values.reshape(*sizes, *one), range(len(stack)), stack)
        if spec.layers is not None:
            axis = layer_axis(letters, spec.stacked)
            kept = np.isin(np.arange(shape[axis]), spec.layers)
            value = jnp.where(np.expand_dims(kept, [n for n in range(len(shape)) if n != axis]), value, 0)
        # With sharding metadata, the constructor would ask for a mesh.
        factor = nnx.LoRAParam(value)
        if metadata := _sharding_of_factor(weight, spec, side):
            factor.set_metadata(**metadata)
        setattr(module, name, factor)


def _sharding_of_factor(weight: nnx.Variable, spec: AdapterSpec, side: int) -> dict[str, Any]:
    """The mesh axes of a factor, from those of its weight; the rank has none."""
    metadata = {}
    for key in _SHARDING:
        names = weight.get_metadata().get(key)
        if isinstance(names, tuple | list | jax.sharding.PartitionSpec):
            padded = (*names, *(None,) * (len(spec.shape) - len(names)))
            by_letter = dict(zip(spec.base_letters, padded, strict=True))
            factor = [by_letter.get(letter) for letter in spec.factor_letters[side]]
            metadata[key] = (
                jax.sharding.PartitionSpec(*factor)
                if isinstance(names, jax.sharding.PartitionSpec)
                else type(names)(factor)
            )
    return metadata


def _make_dropout(rate: float, rngs: nnx.Rngs, spec: AdapterSpec) -> nnx.Dropout:
    """A dropout whose key has the weight's stacked axes, as `nnx.vmap` makes it."""
    make: Callable[[nnx.Rngs], nnx.Dropout] = lambda rngs: nnx.Dropout(rate, rngs=rngs)  # noqa: E731
    for axis in spec.stacked:
        size = spec.shape[axis]
        make = nnx.split_rngs(splits=size)(nnx.vmap(make, in_axes=(0,), out_axes=0))
    return make(rngs)


@functools.cache
def _adapted_class(base: type[nnx.Module]) -> type[nnx.Module]:
    """The subclass whose methods use the factors: one for each class, so that graph definitions compare equal."""
    methods = {
        name: _adapted_method(base, method)
        for name, method in inspect.getmembers(base, inspect.isfunction)
        if name == "__call__" or not (name.startswith("_") or hasattr(nnx.Module, name))
    }

    def reduce(self: Any, protocol: Any) -> Any:
        # pickle looks a class up by its name, which finds the base.
        _, _, *rest = nnx.Module.__reduce_ex__(self, protocol)
        return (_new, (base,), *rest)

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), names | methods | {"__reduce_ex__": reduce})


def _set_class(module: nnx.Module, new: type[nnx.Module]) -> None:
    object.__setattr__(module, "__class__", new)  # Flax would record it among the module's attributes


def _new(base: type[nnx.Module]) -> nnx.Module:
    return object.__new__(_adapted_class(base))


def _adapted_method(base: type[nnx.Module], method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def adapted(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _call(base, method, self, args, kwargs)

    return adapted


def _call(base: type[nnx.Module], method: Callable[..., Any], self: Any, args: Any, kwargs: Any) -> Any:
    """Runs a method of a module with its adapted weights kept as W + s A B.

    The call becomes a function of the module's and the arguments' arrays, and its program is evaluated. What the
    call changes in their variables is written back.
    """
    adapters: dict[str, LayerAdapter] = {adapter.leaf: adapter for adapter in vars(self)[ADAPTERS]}
    key = _dropout_key(self)
    inputs = self, args, kwargs
    graph, weights, rest = nnx.split(inputs, _is_weight(tuple(adapters)), ...)
    # One trace for all calls that are alike; jit knows what else a trace depends on.
    traced = _program.trace((base, method, tuple(adapters), graph), weights, rest)
    program, structure = traced.jaxpr, jax.tree.structure(traced.out_info)
    values = [
        _low_rank(self, adapters[str(path[1])], value, key)
        for (path, _), value in zip(nnx.to_flat_state(weights), jax.tree.leaves(weights), strict=True)
    ]
    results = evaluate(program, [*values, *jax.tree.leaves(rest)])
    y, state = jax.tree.unflatten(structure, results)
    _, new = jax.tree.unflatten(structure, program.jaxpr.outvars)
    old = dict(
        nnx.to_flat_state(jax.tree.unflatten(jax.tree.structure(rest), program.jaxpr.invars[len(values) :]))
    )
    for (path, variable), (_, atoms) in zip(nnx.to_flat_state(state), nnx.to_flat_state(new), strict=True):
        if isinstance(variable, nnx.Variable) and jax.tree.leaves(old.get(path)) != jax.tree.leaves(atoms):
            _write_back(inputs, path, variable)
    is_static = lambda x: isinstance(x, _Static)  # noqa: E731
    return jax.tree.map(lambda x: x.value if is_static(x) else x, y, is_leaf=is_static)


def _is_weight(leaves: tuple[str, ...]) -> Callable[[Any, Any], bool]:
    """Selects the adapted weights of the module among (module, args, kwargs)."""
    return lambda path, _: len(path) == 2 and path[0] == 0 and path[1] in leaves


@functools.partial(jax.jit, static_argnums=0)
def _program(static: tuple[Any, ...], weights: nnx.State, rest: nnx.State) -> tuple[Any, nnx.State]:
    """A call as a function of arrays: its result, and the state of module and arguments after it."""
    base, method, leaves, graph = static
    merged = nnx.merge(graph, weights, rest)
    module, args, kwargs = merged
    _set_class(module, base)
    y = method(module, *args, **kwargs)
    is_array = lambda x: isinstance(x, jax.Array | np.ndarray | np.generic)  # noqa: E731
    y = jax.tree.map(lambda x: x if is_array(x) else _Static(x), y)
    return y, nnx.state(merged, nnx.Not(_is_weight(leaves)))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """A result of a call that is no array."""

    value: Any


def _low_rank(module: nnx.Module, adapter: LayerAdapter, value: Any, key: Any) -> LowRankWeight:
    """A weight of a module with its factors, and what `functional` may have added to them."""
    spec = adapter.spec
    a, b = (getattr(module, name)[...] for name in adapter.factors)
    if spec.kind == "parameter":  # has no input of its own
        key = None
    if len(spec.axes) != value.ndim:
        raise ValueError(
            f"the {spec.leaf} of a {type(module).__name__} has {value.ndim} axes in a call, but its letters "
            f"are {spec.axes!r}; run stacked layers by nnx.scan or nnx.vmap"
        )
    letters = dataclasses.replace(spec, stacked=(), shape=value.shape, layers=None).base_letters
    beside: Any = [vars(module).get(adapter.attribute(name)) for name in OPTIONAL]
    scale, tap, *before = beside
    return LowRankWeight(
        w=value,
        a=a,
        b=b,
        letters=letters,
        factor_letters=factor_letters(spec.axes),
        scale=spec.scale if scale is None else scale[...].reshape(()),
        dropout=0.0 if key is None else vars(module)[DROPOUT].rate,
        key=key,
        tap=None if tap is None else tap[...],
        before=None if tap is None else tuple(factor[...] for factor in before),
        omit=OMIT_WEIGHTS.value,
    )


def _dropout_key(module: nnx.Module) -> jax.Array | None:
    """A new key if the module's adapter has dropout that is active."""
    dropout = vars(module).get(DROPOUT)
    if dropout is None or dropout.deterministic or dropout.rngs is None:
        return None
    if dropout.rngs.key.shape:
        raise ValueError(
            "the keys of the adapters' dropout are stacked like the layers, but the call got all of them; slice "
            "them with the parameters: nnx.StateAxes({(nnx.Param, nnx.RngState): 0, ...: None})"
        )
    return dropout.rngs()


def _write_back(inputs: Any, path: tuple[Any, ...], variable: nnx.Variable) -> None:
    """Writes a variable that a call changed or made into the module and its arguments."""
    owner = inputs
    for part in path[:-1]:
        owner = _part(owner, part)
    old = _part(owner, path[-1])
    if isinstance(old, nnx.Variable):
        old.set_value(variable.get_value())
    else:
        setattr(owner, path[-1], variable)


def _part(owner: Any, name: Any) -> Any:
    return owner[name] if isinstance(owner, tuple | list | Mapping | nnx.List) else vars(owner).get(name)
