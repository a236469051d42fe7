"""An adapted NNX module: its adapters, and the subclass whose calls use them."""

import dataclasses
import functools
import inspect
import string
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from ..adapter.einsum_letters import factor_letters
from ..adapter.lora import SCALE
from ..adapter.spec import AdapterSpec
from ..adapter.taps import PREVIOUS_FACTORS, TAP
from ..interpreter.low_rank import evaluate
from ..interpreter.weight import LowRankWeight
from ..quantization.packed_array import dense_shapes, is_packed

ADAPTERS, DROPOUT = "lora_plus_adapters", "lora_plus_dropout"
"""Attributes of an adapted module: its specs, and an `nnx.Dropout` if the config has dropout. The specs are part of
the graph definition; each has the weight's attribute as `leaf`, so that like layers share compiled programs."""
OMIT_WEIGHTS: Any = jax.make_user_context(False)
"""Whether calls leave out the adapted weights and mark them, for `check_reads`; nnx.jit respects it."""
OPTIONAL = (SCALE, TAP, *PREVIOUS_FACTORS)
"""What may stand beside a module's factors while `functional` runs the model."""


class Adapted(NamedTuple):
    """An adapted weight.

    Attributes:
      module, path: its module, and the module's path.
      own: the spec that the module holds, with the weight's attribute as `leaf`.
      spec: the spec in the model's table.
    """

    module: nnx.Module
    path: str
    own: AdapterSpec
    spec: AdapterSpec


def adapters_by_path(model: nnx.Module) -> dict[str, Adapted]:
    """Finds the adapted weights of a model.

    Returns:
      A dict from the path in the table of specs to an `Adapted`.

    Raises:
      ValueError: the model has no adapters.
    """
    found = {
        path_of(own, path): Adapted(
            module, path, own, dataclasses.replace(own, leaf=f"params/{join(path, own.leaf)}")
        )
        for path, module, specs in adapted_modules(model)
        for own in specs
    }
    if not found:
        raise ValueError("the model has no adapters; call apply_lora_plus first")
    return found


def adapted_modules(model: nnx.Module) -> Iterator[tuple[str, nnx.Module, tuple[AdapterSpec, ...]]]:
    """Yields path, module and specs of each module with adapters, or, with no specs, with packed weights only."""
    for parts, module in nnx.iter_modules(model):
        if (specs := vars(module).get(ADAPTERS)) is not None:
            yield "/".join(map(str, parts)), module, specs


def join(module: str, name: str) -> str:
    """The path of a module's attribute; its name alone for the model itself, whose path is empty."""
    return f"{module}/{name}" if module else name


def path_of(own: AdapterSpec, module: str) -> str:
    """The path of an adapter in the table of specs, for a module at the path `module`."""
    return join(module, own.leaf) if own.kind == "parameter" else module


def attribute_of(own: AdapterSpec, name: str) -> str:
    """The attribute of a factor, scale or tap on the module, which may have several adapted parameters."""
    return f"{own.leaf}_{name}" if own.kind == "parameter" else name


def factor_attributes(own: AdapterSpec) -> tuple[str, ...]:
    """The attributes of an adapter's factors on its module."""
    return tuple(attribute_of(own, name) for name in own.factors)


def remove_adapters(model: nnx.Module) -> None:
    """Removes all adapters in place; the model is then as before `apply_lora_plus`."""
    for _, module, specs in list(adapted_modules(model)):
        for own in specs:
            for name in factor_attributes(own):
                delattr(module, name)
        if DROPOUT in vars(module):
            delattr(module, DROPOUT)
        if packed_leaves(module):  # which only the subclass can use
            setattr(module, ADAPTERS, ())
        else:
            delattr(module, ADAPTERS)
            set_class(module, type(module).__bases__[0])


def set_adapters(module: nnx.Module, specs: tuple[AdapterSpec, ...]) -> None:
    """Gives a module its adapters, none if its weights are only packed, and the subclass whose calls use them."""
    if ADAPTERS not in vars(module):
        set_class(module, adapted_class(type(module)))
    setattr(module, ADAPTERS, specs)


def packed_leaves(module: nnx.Module) -> list[str]:
    """The names of the packed weights of a module."""
    variables = {name: value for name, value in vars(module).items() if isinstance(value, nnx.Param)}
    return [name for name, variable in variables.items() if is_packed(variable.get_value())]


@functools.cache
def adapted_class(base: type[nnx.Module]) -> type[nnx.Module]:
    """The subclass of a class whose methods use the factors, with its name and docstring.

    There is one for each class, so that graph definitions compare equal.
    """
    methods = {name: _adapted_method(base, method) for name, method in _public_methods(base)}

    # The name by which users know the class.
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), names | methods)


def _public_methods(base: type[nnx.Module]) -> Iterator[tuple[str, Any]]:
    """`__call__` and the public methods of a class, also those that are no functions, as under `nnx.jit`."""
    others = (type, staticmethod, classmethod, property)
    for name, value in inspect.getmembers_static(base):
        if name != "__call__" and (name.startswith("_") or hasattr(nnx.Module, name)):
            continue
        if callable(value) and hasattr(value, "__get__") and not isinstance(value, others):
            yield name, value


def set_class(module: nnx.Module, new: type[nnx.Module]) -> None:
    """Changes a module's class."""
    object.__setattr__(
        module, "__class__", new
    )  # setattr of nnx.Module (0.12.8) would record it as an attribute


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
    specs: dict[str, AdapterSpec] = {own.leaf: own for own in vars(self)[ADAPTERS]}
    key = _dropout_key(self)
    inputs = self, args, kwargs
    leaves = (*specs, *(name for name in packed_leaves(self) if name not in specs))
    graph, weights, rest = nnx.split(inputs, _is_weight(leaves), ...)
    program, structure = _trace((base, method, leaves, graph), dense_shapes(weights), rest)
    values = [
        _low_rank(self, specs.get(str(path[1])), variable.get_value(), key)
        for path, variable in nnx.to_flat_state(weights)
    ]
    results = evaluate(program, [*values, *jax.tree.leaves(rest)])
    y, state = jax.tree.unflatten(structure, results)
    _, new = jax.tree.unflatten(structure, program.jaxpr.outvars)
    # A variable that the program returns as it came in is not written: writing would fail under an outer trace.
    before = jax.tree.unflatten(jax.tree.structure(rest), program.jaxpr.invars[len(values) :])
    old = dict(nnx.to_flat_state(before))
    for (path, variable), (_, atoms) in zip(nnx.to_flat_state(state), nnx.to_flat_state(new), strict=True):
        if isinstance(variable, nnx.Variable) and jax.tree.leaves(old.get(path)) != jax.tree.leaves(atoms):
            _write_back(inputs, path, variable)
    is_static = lambda x: isinstance(x, _Static)  # noqa: E731
    return jax.tree.map(lambda x: x.value if is_static(x) else x, y, is_leaf=is_static)


def _is_weight(leaves: tuple[str, ...]) -> Callable[[Any, Any], bool]:
    """Selects the adapted weights of the module among (module, args, kwargs)."""
    return lambda path, _: len(path) == 2 and path[0] == 0 and path[1] in leaves


def _trace(static: tuple[Any, ...], weights: nnx.State, rest: nnx.State) -> tuple[Any, Any]:
    # Tracing takes most of an eager call's time, so calls that are alike share a program.
    try:
        # The graph definition holds the fields of all modules, and a user's field may be a list or a dataclass.
        hash(static)
    except TypeError:  # a field or an argument that nothing can be looked up by
        traced = None
    else:
        traced = _program.trace(static, weights, rest)
    if traced is not None and len(traced.jaxpr.jaxpr.invars) == len(jax.tree.leaves((weights, rest))):
        return traced.jaxpr, jax.tree.structure(traced.out_info)
    # Also where jit added inputs: an argument closes over values of an outer trace, which differ from call to call.
    run = functools.partial(_run, static)
    program, shapes = jax.make_jaxpr(run, return_shape=True)(weights, rest)
    return program, jax.tree.structure(shapes)


def _run(static: tuple[Any, ...], weights: nnx.State, rest: nnx.State) -> tuple[Any, nnx.State]:
    """A call as a function of arrays: its result, and the state of module and arguments after it."""
    base, method, leaves, graph = static
    merged = nnx.merge(graph, weights, rest)
    module, args, kwargs = merged
    # Of the plain class, since other methods that this one calls would otherwise be traced and evaluated apart.
    set_class(module, base)
    y = method(module, *args, **kwargs)
    is_array = lambda x: isinstance(x, jax.Array | np.ndarray | np.generic)  # noqa: E731
    # A jitted function returns arrays only; what is static rides along in the structure of its results.
    y = jax.tree.map(lambda x: x if is_array(x) else _Static(x), y)
    return y, nnx.state(merged, nnx.Not(_is_weight(leaves)))


_program = jax.jit(_run, static_argnums=0)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """A result of a call that is no array."""

    value: Any


def _low_rank(module: nnx.Module, spec: AdapterSpec | None, value: Any, key: Any) -> LowRankWeight:
    """A weight of a module with its factors, if any, and what `functional` may have added to them."""
    if spec is None:
        return LowRankWeight(value, letters=string.ascii_lowercase[: value.ndim], omit=OMIT_WEIGHTS.value)
    a, b, *magnitude = (getattr(module, name)[...] for name in factor_attributes(spec))
    if spec.kind == "parameter":  # has no input of its own
        key = None
    axes = _axes_in_call(module, spec, value)
    letters = dataclasses.replace(spec, axes=axes, stacked=(), shape=value.shape, layers=None).base_letters
    beside: Any = [vars(module).get(attribute_of(spec, name)) for name in OPTIONAL]
    scale, tap, *before = beside
    return LowRankWeight(
        w=value,
        a=a,
        b=b,
        letters=letters,
        factor_letters=factor_letters(axes),
        scale=spec.scale if scale is None else scale[...].reshape(()),
        dropout=0.0 if key is None else vars(module)[DROPOUT].rate,
        key=key,
        tap=None if tap is None else tap[...],
        before=None if tap is None else tuple(factor[...] for factor in before),
        omit=OMIT_WEIGHTS.value,
    ).with_magnitude(*magnitude)


def _axes_in_call(module: nnx.Module, spec: AdapterSpec, value: Any) -> str:
    # nnx.scan and nnx.vmap slice what they are given: in their body a parameter lacks the batch axes of the stack.
    axes = spec.axes
    while len(axes) > value.ndim and (batch := [c for c in axes if c not in "io"]):
        axes = axes.replace(batch[0], "", 1)
    if len(axes) != value.ndim:
        raise ValueError(
            f"the {spec.leaf} of a {type(module).__name__} has {value.ndim} axes in a call, but its letters "
            f"are {spec.axes!r}; run stacked layers by nnx.scan or nnx.vmap"
        )
    return axes


def _dropout_key(module: nnx.Module) -> jax.Array | None:
    # Drawn before the call's program is traced: inside it, the stream's new count would be lost.
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
    owner = inputs
    for part in path[:-1]:
        if (owner := part_of(owner, part)) is None:
            made = "/".join(map(str, path[1:]))
            raise ValueError(
                f"a call of an adapted {type(inputs[0]).__name__} made {made!r}; make it in __init__"
            )
    old = part_of(owner, path[-1])
    if isinstance(old, nnx.Variable):
        old.set_value(variable.get_value())
    else:
        setattr(owner, path[-1], variable)


def part_of(owner: Any, name: Any) -> Any:
    """An attribute of a module, or an item of a container; None if a module lacks it."""
    return owner[name] if isinstance(owner, tuple | list | Mapping | nnx.List) else vars(owner).get(name)
