"""Several adapters over one base, with another adapter for each row of a batch, in one compiled program.

Factors are stacked over slots and gathered by row, and `jax.vmap` runs the model over rows. A product with a weight
that all rows share becomes one product of the whole batch; only products with gathered factors are separate. Any
model and any layer keeps its meaning: a row is computed as if it were a batch of its own.
"""

import dataclasses
import functools
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.core import Tracer

from .._utils.validation import check_int
from .config import LoRAPlusConfig
from .lora import SCALE
from .spec import AdapterSpec, Specs, form_differences
from .target_rules import config_of
from .tree import combine, factors_by_module, flatten, replace_leaves, unflatten

ROW_AXES: Any = jax.make_user_context(None)
"""The mesh axes that split the rows of `apply_rows`, inside of which a row must not be split over them again; None
outside."""
Room = tuple[tuple[str, AdapterSpec], ...]


class AdapterLike(Protocol):
    """An adapter with its specs, such as `interop.Adapter` from `load_adapter` or `load_peft`."""

    @property
    def lora(self) -> Mapping[str, Any]:
        """The tree of factors."""
        ...

    @property
    def specs(self) -> Mapping[str, AdapterSpec]:
        """The table of adapted weights."""
        ...

    @property
    def extras(self) -> Mapping[str, Any]:
        """Fully trained variables, `{"params": ...}`, or empty."""
        ...


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "rest"], meta_fields=["room"])
@dataclasses.dataclass(frozen=True)
class AdapterStack:
    """Adapters in slots, from `stack_adapters`; a pytree whose structure and shapes no change of a slot alters.

    Attributes:
      values: arrays by path, `lora/MODULE/lora_a`, `lora_scale/MODULE/lora_scale`, and `params/...` for fully
        trained parameters. The axis of slots follows the leading stacked axes of a factor, if it has any.
      rest: the base's values of the fully trained parameters that it has, without the axis of slots.
      room: the module paths with the specs that every slot has room for, sorted; their ranks are the largest.
    """

    values: dict[str, jax.Array]
    rest: dict[str, jax.Array]
    room: Room

    @property
    def slots(self) -> int:
        """The number of slots, empty ones included."""
        path, array = next(iter(self.values.items()))
        return array.shape[_row_axes(self.room).get(path, 0)]

    @property
    def specs(self) -> dict[str, AdapterSpec]:
        """The specs that every slot has room for."""
        return dict(self.room)

    @property
    def config(self) -> LoRAPlusConfig:
        """The config for `apply_lora_plus`, of Linen or NNX: it adapts what any slot may adapt.

        The model must be called by `apply_rows`, which also passes each adapter's own scale.
        """
        return config_of(self.specs)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "index"], meta_fields=["room"])
@dataclasses.dataclass(frozen=True)
class RowAdapters:
    """The adapters of the rows of a batch, from `select_adapters`, for `apply_rows`.

    Attributes:
      values: as in `AdapterStack`, with an axis of rows instead of slots.
      index: the slot of each row, `(rows,)`.
      room: as in `AdapterStack`.
    """

    values: dict[str, jax.Array]
    index: jax.Array
    room: Room


def stack_adapters(
    adapters: Sequence[AdapterLike | None],
    *,
    slots: int | None = None,
    room: Specs | None = None,
    base: Mapping[str, Any] | None = None,
) -> AdapterStack:
    """Stacks adapters of one base, of any targets, ranks and scales, for a batch with another adapter in each row.

    Ranks are padded with zeros, and an adapter's factors of modules that it does not adapt are zeros. An empty slot
    is the base, and NaN in a fully trained parameter that `base` lacks. DoRA is supported, also beside LoRA, and
    costs a product of A and W for each row.

    Args:
      adapters: the adapters of the first slots, as from `load_adapter`; None leaves a slot empty.
      slots: number of slots, fixed from here on; by default one for each of `adapters`.
      room: specs of further modules and larger ranks that later adapters may have, as from `init_lora`.
      base: variables without adapters, `{"params": ...}`; required if an adapter has fully trained parameters
        (`modules_to_save`, `bias`) that another lacks, which then has the base's. Every row of a batch gets its own
        copy of these parameters.

    Returns:
      The stack, for `select_adapters` and `put_adapter`. Its `config` is that of the model to call.

    Raises:
      ValueError: there is no adapter and no `room`; there are more adapters than slots; two adapters differ in the
        form of a weight, or adapt it in two ways; factors do not fit their specs; fully trained parameters differ
        in shape or lack the base's values.

    Example:
      >>> from types import SimpleNamespace
      >>> spec = AdapterSpec(leaf="params/q/kernel", kind="dense", axes="io", shape=(4, 6), rank=2, scale=0.5)
      >>> factors = {"q": {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 6))}}
      >>> stack = stack_adapters([SimpleNamespace(lora=factors, specs={"q": spec}, extras={})], slots=3)
      >>> stack.slots, stack.values["lora/q/lora_a"].shape, stack.config.target_modules
      (3, (3, 4, 2), 'q')
    """
    present = [adapter for adapter in adapters if adapter is not None]
    slots = len(adapters) if slots is None else slots
    if slots < max(len(adapters), 1):
        raise ValueError(f"slots must be at least 1 and the number of adapters, {len(adapters)}, got {slots}")
    common = _common_room([*(adapter.specs for adapter in present), *([] if room is None else [room])])
    shapes = _shapes(common)
    for adapter in present:
        shapes |= {path: np.shape(value) for path, value in flatten(adapter.extras).items()}
    in_base = {} if base is None else flatten(base)
    rest = {path: jnp.asarray(meta.unbox(in_base[path])) for path in shapes if path in in_base}
    if differing := [path for path, value in rest.items() if value.shape != shapes[path]]:
        path = differing[0]
        raise ValueError(
            f"base: {path} must have shape {shapes[path]}, as in the adapters, got {rest[path].shape}"
        )
    contents = [
        _slot_values(adapter, common, shapes, rest, f"adapters[{n}]") for n, adapter in enumerate(adapters)
    ]
    contents += [_slot_values(None, common, shapes, rest, "")] * (slots - len(adapters))
    axes, values = _row_axes(common), {}
    for path, shape in shapes.items():
        own = [content[path] for content in contents if path in content]
        blank = jnp.full(shape, _empty(path), jnp.result_type(*own) if own else jnp.float32)
        values[path] = jnp.stack([content.get(path, blank) for content in contents], axis=axes.get(path, 0))
    return AdapterStack(values, rest, common)


def put_adapter(stack: AdapterStack, slot: int, adapter: AdapterLike | None) -> AdapterStack:
    """Puts an adapter into a slot, instead of what it holds; None empties it.

    Returns:
      A stack of the same structure, shapes and dtypes, with which compiled functions run without a compilation.

    Raises:
      TypeError: `slot` is no integer.
      ValueError: there is no such slot, or the adapter does not fit the stack's room: it adapts another module, has
        a larger rank, or fully trains another parameter.
    """
    slot = int(slot) if isinstance(slot, np.integer) else slot
    check_int("slot", slot, at_least=0, at_most=stack.slots - 1)
    axes = _row_axes(stack.room)
    shapes = {path: tuple(np.delete(x.shape, axes.get(path, 0))) for path, x in stack.values.items()}
    new = _slot_values(adapter, stack.room, shapes, stack.rest, "the adapter")
    values = {}
    for path, old in stack.values.items():
        index = (*[slice(None)] * axes.get(path, 0), slot)
        values[path] = old.at[index].set(new[path].astype(old.dtype) if path in new else _empty(path))
    return dataclasses.replace(stack, values=values)


def select_adapters(stack: AdapterStack, index: jax.Array) -> RowAdapters:
    """Gathers the adapter of each row of a batch; call it once a batch, inside the compiled function.

    Args:
      stack: the stack.
      index: the slot of each row, integers `(rows,)`.

    Returns:
      The adapters of the rows, for `apply_rows`. A traced index that is no slot gives NaN.

    Raises:
      ValueError: the index has another shape or dtype, or, if it is not traced, is no slot.
    """
    index = jnp.asarray(index)
    if index.ndim != 1 or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(f"index must be integers of shape (rows,), got {index.dtype} {index.shape}")
    if not isinstance(index, Tracer):
        values = np.asarray(index)
        if np.any(bad := (values < 0) | (values >= stack.slots)):
            raise ValueError(f"index must be slots from 0 to {stack.slots - 1}, got {values[bad][0]}")
    axes, rows = _row_axes(stack.room), {}
    for path, array in stack.values.items():
        at = (*[slice(None)] * axes.get(path, 0), index)
        # A clamped or wrapped index would silently be another adapter.
        rows[path] = array.at[at].get(mode="fill", wrap_negative_indices=False)
    return RowAdapters(rows, index, stack.room)


def apply_rows(
    apply: Callable[..., Any],
    variables: Mapping[str, Any],
    adapters: RowAdapters,
    *args: Any,
    in_axes: Any = 0,
    out_axes: Any = 0,
    mesh_axes: Sequence[str] = (),
    **kwargs: Any,
) -> Any:
    """Calls a model on a batch in which each row has its own adapter.

    The model has the stack's config: `apply_lora_plus(model, stack.config)`.

    Args:
      apply: `model.apply` of Linen, or `functional(model)` of NNX.
      variables: variables of the model without adapters, `{"params": base}`.
      adapters: from `select_adapters`.
      *args: arguments of `apply`. Arrays with axes have R n rows, n consecutive ones with the adapter of one row of
        the R in `adapters`; n is the same for all, and 1 if each row has its own. All other arguments go to every
        row.
      in_axes: axis of the rows in arrays of `args`, as in `jax.vmap`; None for arrays that all rows share. In
        `kwargs` it is 0.
      out_axes: axis of the rows in the results; None for what is the same for all rows.
      mesh_axes: the mesh axes that the rows are split over, for models that constrain the sharding of rows.
      **kwargs: keyword arguments of `apply`, likewise.

    Returns:
      What `apply` returns, with R n rows.

    Raises:
      ValueError: the rows of an array are no multiple of R, or two arrays differ in their rows; `mutable` is
        passed, whose state would be another for each row.

    Example:
      >>> import flax.linen as nn
      >>> from loraplus_jax import apply_lora_plus, init_lora
      >>> from loraplus_jax.interop import Adapter
      >>> config = LoRAPlusConfig(target_modules=".*", rank=2, init="gaussian")
      >>> lora, specs = init_lora(apply_lora_plus(nn.Dense(4), config), jax.random.key(0), jnp.ones((1, 3)))
      >>> stack = stack_adapters([Adapter(lora, specs, config, {})], slots=2)
      >>> model = apply_lora_plus(nn.Dense(4), stack.config)
      >>> base = nn.Dense(4).init(jax.random.key(1), jnp.ones((1, 3)))
      >>> apply_rows(model.apply, base, select_adapters(stack, jnp.array([0, 1, 0])), jnp.ones((3, 3))).shape
      (3, 4)
    """
    if kwargs.get("mutable"):
        raise ValueError("apply_rows does not support mutable: the state would be another one for each row")
    rows = len(adapters.index)
    is_none = lambda x: x is None  # noqa: E731
    of_args = in_axes if isinstance(in_axes, tuple | list) else (in_axes,) * len(args)
    if len(of_args) != len(args):
        raise ValueError(f"in_axes must have an entry for each of {len(args)} arguments, got {len(of_args)}")
    spread = lambda axis, part: jax.tree.map(lambda _: _Axis(axis), part)  # noqa: E731
    axes = jax.tree.leaves((jax.tree.map(spread, tuple(of_args), args, is_leaf=is_none), spread(0, kwargs)))
    leaves, structure = jax.tree_util.tree_flatten_with_path((args, kwargs))
    flat, mapped, sizes, size = flatten(variables), {}, {}, 0
    for n, ((path, leaf), axis) in enumerate(zip(leaves, axes, strict=True)):
        if axis.axis is not None and isinstance(leaf, jax.Array | np.ndarray) and leaf.ndim:
            mapped[n] = axis.axis
            size = sizes[_argument(path)] = leaf.shape[axis.axis] if axis.axis < leaf.ndim else 0
            if not size or size % rows or size != next(iter(sizes.values())):
                raise ValueError(
                    f"{_argument(path)} has shape {leaf.shape}, but its axis {axis.axis} must have {rows} rows, "
                    f"one for each adapter, or a multiple that is the same in all arguments, got {sizes}; set "
                    "in_axes to the axis of the rows, or to None for an array that all rows share"
                )
    if not mapped:
        raise ValueError("apply_rows requires an array with the rows of the batch among the arguments")

    def split(x: Any, axis: int) -> jax.Array:
        return jnp.reshape(x, (*x.shape[:axis], rows, x.shape[axis] // rows, *x.shape[axis + 1 :]))

    def run_row(values: Mapping[str, jax.Array], arrays: Sequence[jax.Array]) -> Any:
        new = dict(zip(mapped, arrays, strict=True))
        inputs = [new.get(n, leaf) for n, (_, leaf) in enumerate(leaves)]
        own_args, own_kwargs = jax.tree.unflatten(structure, inputs)
        with ROW_AXES(tuple(mesh_axes)):
            # What the variables lack, factors or a new head, and then what replaces their values.
            own = unflatten({path: x for path, x in values.items() if path not in flat})
            both = combine(own, replace_leaves(variables, values))
            return apply(both, *own_args, **own_kwargs)

    of_values = _row_axes(adapters.room)
    result = jax.vmap(
        run_row,
        in_axes=({path: of_values.get(path, 0) for path in adapters.values}, list(mapped.values())),
        out_axes=out_axes,
        spmd_axis_name=tuple(mesh_axes) or None,
        axis_size=rows,
    )(adapters.values, [split(leaves[n][1], axis) for n, axis in mapped.items()])

    def join(axis: int | None, part: Any) -> Any:
        def one(y: jax.Array) -> jax.Array:
            if axis is None or y.ndim == 1:  # the same for all rows, or a number for each adapter
                return y
            if y.ndim < axis + 2 or y.shape[axis + 1] != size // rows:
                shape = (*y.shape[:axis], *y.shape[axis + 1 :])
                raise ValueError(
                    f"out_axes: axis {axis} of a result of shape {shape} must be the rows, {size // rows} for each "
                    "adapter"
                )
            return jnp.reshape(y, (*y.shape[:axis], -1, *y.shape[axis + 2 :]))

        return jax.tree.map(one, part)

    return jax.tree.map(join, out_axes, result, is_leaf=is_none)


@dataclasses.dataclass(frozen=True)
class _Axis:
    """The axis of the rows in an argument; not None itself, which `jax.tree` would take for no leaf."""

    axis: int | None


def _argument(path: tuple[Any, ...]) -> str:
    """Names an array among (args, kwargs)."""
    kind, *rest = path
    where = jax.tree_util.keystr(tuple(rest))
    return f"args{where}" if kind.idx == 0 else f"kwargs{where}"


def _check_form(name: str, spec: AdapterSpec, expected: AdapterSpec) -> None:
    """Raises ValueError unless two specs of a module agree in all of `form_differences`."""
    for field in form_differences(spec, expected):
        value, other = getattr(spec, field), getattr(expected, field)
        raise ValueError(f"{name}: {field} must be {other!r}, as in the other adapters, got {value!r}")


def _common_room(tables: Sequence[Specs]) -> Room:
    """The least specs that have room for those of every table."""
    room: dict[str, AdapterSpec] = {}
    owners: dict[str, str] = {}
    for table in tables:
        for path, spec in table.items():
            old = room.setdefault(path, dataclasses.replace(spec, scale=1.0, layers=None))
            _check_form(path or "the model", spec, old)
            if (owner := owners.setdefault(spec.leaf, path)) != path:
                raise ValueError(
                    f"{spec.leaf} is adapted as {owner!r} by one adapter and as {path!r} by another; adapt it as a "
                    "layer (target_modules) or as a parameter (target_parameters) in all"
                )
            room[path] = dataclasses.replace(old, rank=max(old.rank, spec.rank))
    if not room:
        raise ValueError("stack_adapters requires an adapter, or room, the specs of later ones; got neither")
    # The variant is one for the whole config; magnitudes of zero leave LoRA as it is.
    is_dora = any(spec.magnitude for table in tables for spec in table.values())
    return tuple((path, dataclasses.replace(room[path], magnitude=is_dora)) for path in sorted(room))


@functools.lru_cache(maxsize=64)
def _row_axes(room: Room) -> dict[str, int]:
    """The axis of slots or rows in the factors and scales; 0 in all other arrays.

    After leading stacked axes, as `nn.scan` slices those: there `jax.vmap` would move the axis in every call.
    """
    axes = {}
    for module, spec in room:
        for factor in reversed(spec.factors_of(module)):  # a scale has A's axes, the first factor's
            axis = len(factor.letters) - len(factor.letters.lstrip(string.ascii_uppercase))
            axes[f"lora/{factor.path}"] = axes[_scale_path(module)] = axis
    return axes


def _empty(path: str) -> float:
    """What an empty slot has where neither an adapter nor the base has a value: no change, or an error to see."""
    return np.nan if path.startswith("params/") else 0.0


def _scale_path(module: str) -> str:
    return "/".join(filter(None, (SCALE, module, SCALE)))


def _shapes(room: Room) -> dict[str, tuple[int, ...]]:
    """The shapes of the factors and scales of one slot by path."""
    shapes = {}
    for module, spec in room:
        shapes |= {f"lora/{factor.path}": factor.shape for factor in spec.factors_of(module)}
        shapes[_scale_path(module)] = spec.scale_shape
    return shapes


def _slot_values(
    adapter: AdapterLike | None,
    room: Room,
    shapes: Mapping[str, Sequence[int]],
    rest: Mapping[str, jax.Array],
    name: str,
) -> dict[str, jax.Array]:
    """The arrays of one slot by path, without those that are zero; `name` describes the adapter in messages."""
    if adapter is None:
        return dict(rest)
    specs, has_room, values = dict(adapter.specs), dict(room), {}
    factors = factors_by_module(name, {"lora": adapter.lora}, specs)
    for module, spec in specs.items():
        where = f"{name}: {module or 'the model'}"
        if (full := has_room.get(module)) is None:
            raise ValueError(f"{where} is adapted, for which the stack has no room; name it in room")
        _check_form(where, spec, full)
        if spec.rank > full.rank:
            raise ValueError(f"{where}: rank must be at most {full.rank}, the stack's, got {spec.rank}")
        if spec.magnitude and not full.magnitude:
            raise ValueError(f"{where}: variant must be lora in this stack, got dora; name it in room")
        for path, value in zip(spec.factor_paths(module), factors[module], strict=True):
            pad = [(0, size - old) for old, size in zip(value.shape, shapes[f"lora/{path}"], strict=True)]
            values[f"lora/{path}"] = jnp.pad(jnp.asarray(value), pad)
        values[_scale_path(module)] = jnp.full(shapes[_scale_path(module)], spec.scale, jnp.float32)
    extras = flatten(adapter.extras)
    for path in sorted({*extras, *(path for path in shapes if path.startswith("params/"))}):
        if path not in shapes:
            raise ValueError(f"{name} fully trains {path}, for which the stack has no room")
        if path not in extras and path not in rest:
            raise ValueError(
                f"{name} lacks {path}, which another adapter trains in full; pass base, the variables without "
                "adapters"
            )
        values[path] = value = jnp.asarray(extras.get(path, rest.get(path)))
        if value.shape != tuple(shapes[path]):
            raise ValueError(f"{name}: {path} must have shape {tuple(shapes[path])}, got {value.shape}")
    return values
