"""Meshes of devices, and where every array of a run lies on one.

A mesh has three axes. `"data"` splits the batch alone; `"fsdp"` splits the batch and the weights, which are
gathered layer by layer when they are used; `"tensor"` splits the weights so that each device computes with its own
part, as in Megatron-LM (arXiv 1909.08053). GSPMD (arXiv 2105.04663) makes the communication from that.

The base is placed by rules, which stand beside each model; adapters and optimizer by what they belong to.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .spec import AdapterSpec, Specs
from .tree import leaves_by_path

DATA_AXIS = "data"
AXES = (DATA_AXIS, "fsdp", "tensor")
BATCH_AXES = AXES[:2]
"""Those that the rows of a batch are split over."""

Axes: TypeAlias = tuple[str | None, ...]
Rules: TypeAlias = Sequence[tuple[str, Axes]]
"""(regular expression, axes): the first expression that is a leaf's whole path, without its collection, says which
mesh axis each of its dimensions is split over. Fewer axes than dimensions: the rest is whole."""

MIN_SHARDED_SIZE = 2**16
"""Leaves of fewer values than this are not worth gathering: where no rule is given, every device has them whole."""


class Shardings(NamedTuple):
    """Where the arrays of a step lie, trees of `NamedSharding`.

    Attributes:
      state: of the `TrainState`.
      frozen: of the frozen variables.
    """

    state: Any
    frozen: Any


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with the axes `"data"`, `"fsdp"` and `"tensor"`, neighbours in the hardware where that is known.

    Args:
      data, fsdp, tensor: the sizes; one of them may be -1, for all devices that the others leave.
      devices: those of all processes by default. A half, a third … of them may be used, but by one process alone.

    Raises:
      ValueError: the sizes do not fit the devices; the message says which to change.

    >>> dict(make_mesh(1).shape)
    {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else devices
    sizes = _sizes(dict(zip(AXES, (data, fsdp, tensor), strict=True)), len(devices))
    used = math.prod(sizes)
    if used < len(devices) and len({device.process_index for device in devices}) > 1:
        fixed: dict[str, int] = dict(zip(AXES, sizes, strict=True))
        raise ValueError(
            f"mesh {_product(fixed)} is {used} devices, and all {len(devices)} must be used, as they belong to "
            f"several hosts: set one of the three to -1{_advice(fixed, len(devices), whole=True)}"
        )
    grid = mesh_utils.create_device_mesh(sizes, devices[:used], allow_split_physical_axes=True)
    return Mesh(grid, AXES)


def _sizes(given: Mapping[str, int], count: int) -> tuple[int, ...]:
    for name, size in given.items():
        if size != -1 and not 1 <= size <= count:
            raise ValueError(f"mesh.{name} must be -1 or from 1 to the {count} devices here, got {size}")
    free = [name for name, size in given.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"only one of mesh.data, mesh.fsdp and mesh.tensor may be -1, got {_product(given)}")
    fixed = {name: size for name, size in given.items() if size != -1}
    taken = math.prod(fixed.values())
    if free and count % taken:
        raise ValueError(
            f"mesh {_product(fixed)} does not divide the {count} devices, so there is no size for mesh.{free[0]}"
            f"{_advice(fixed, count)}"
        )
    if taken > count or count % taken:
        verb = "needs" if taken > count else "is"
        raise ValueError(
            f"mesh {_product(given)} {verb} {taken} devices, and there are {count}{_advice(fixed, count)}"
        )
    return tuple(count // taken if name in free else size for name, size in given.items())


def _product(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in sizes.items())


def _advice(fixed: Mapping[str, int], count: int, *, whole: bool = False) -> str:
    """The largest axis is the one to change: what else it may be, to use a part or the whole of the devices."""
    name = max(fixed, key=lambda axis: fixed[axis])
    others = math.prod(fixed.values()) // fixed[name]
    fits = [
        n for n in range(1, count + 1) if count % (n * others) == 0 and (not whole or n * others == count)
    ]
    which = "one of " if len(fits) > 1 else ""
    return (
        f"{' or' if whole else ';'} change mesh.{name} to {which}{', '.join(map(str, fits))}" if fits else ""
    )


def check_tensor(mesh: Mesh, sizes: Mapping[str, int]) -> None:
    """Raises ValueError if the mesh's tensor axis does not divide one of a model's named sizes.

    >>> check_tensor(make_mesh(1), {"num_attention_heads": 3})
    """
    tensor = mesh.shape.get("tensor", 1)
    for name, size in sizes.items():
        if size % tensor:
            whole = math.gcd(*sizes.values())
            fits = ", ".join(str(n) for n in range(1, whole + 1) if whole % n == 0)
            raise ValueError(
                f"mesh.tensor is {tensor}, which does not divide the model's {name}, {size}; "
                f"change mesh.tensor to one of {fits}"
            )


def replicate(mesh: Mesh, tree: Any) -> Any:
    """The tree on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def distribute(tree: Any, shardings: Any) -> Any:
    """The tree's arrays, each where a sharding of the same tree says.

    With several processes every one of them must have the same values; only the parts that lie on a process's own
    devices are copied.
    """
    return jax.tree.map(_put, tree, shardings)


def _put(array: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(array, jax.Array) and array.sharding.is_equivalent_to(sharding, array.ndim):
        return array
    if jax.process_count() == 1:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the axes `"data"` and `"fsdp"`, those that the mesh has."""
    return NamedSharding(mesh, PartitionSpec(tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """A process's rows of a batch (see `local_rows`) on its devices, as arrays over the whole mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def local_rows(mesh: Mesh, size: int) -> np.ndarray:
    """Which rows of a batch of `size` lie on this process's devices, in order.

    >>> local_rows(make_mesh(1), 3).tolist()
    [0, 1, 2]
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((size,))
    return np.unique(np.concatenate([np.arange(size)[index] for index in places.values()]))


def with_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """The function, with the mesh known to `constrain_rows` while it is traced."""

    @functools.wraps(function)
    def inside(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return inside


def constrain_rows(x: jax.Array) -> jax.Array:
    """Keeps the leading axis split as a batch's is, and all others whole; without a mesh in use, does nothing.

    A model calls it where rows meet weights that are split over the same axis. GSPMD is free to gather either of
    them, and left alone it often gathers the rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    # Under pmap, and inside of shard_map, an axis is Manual: rows are split already.
    axes = tuple(axis for axis in BATCH_AXES if kinds.get(axis) == jax.sharding.AxisType.Auto)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x


def gather_over_fsdp(x: jax.Array, axes: Axes) -> jax.Array:
    """Gathers over `"fsdp"` what a rule splits over it; without a mesh in use, does nothing.

    For weights that a loop uses in every round: left alone, GSPMD gathers them in every round.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if kinds.get("fsdp") != jax.sharding.AxisType.Auto or mesh.shape["fsdp"] == 1:
        return x
    # What tensor does not divide is whole anyway.
    kept = (
        a if a == "tensor" and n % mesh.shape[a] == 0 else None for a, n in zip(axes, x.shape, strict=True)
    )
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*kept))


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts a batch is split.

    >>> batch_parts(make_mesh(1))
    1
    """
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES if axis in mesh.axis_names)


def make_shardings(
    mesh: Mesh, state: Any, frozen: Any, *, specs: Specs | None = None, rules: Rules | None = None
) -> Shardings:
    """Where everything that a step takes lies.

    Args:
      mesh: the devices.
      state: a `TrainState` of arrays or shapes.
      frozen: the frozen variables, likewise.
      specs: the table from `init_lora`, None if there are no adapters.
      rules: those of the model; without any see `base_shardings`.

    Returns:
      Base and extras as `base_shardings` says, adapters as `adapter_shardings` does. A leaf of the optimizer that
      has path and shape of a trainable one, such as a moment, lies where that does; all else is on every device.
    """
    factors = (spec.factor_paths(module) for module, spec in (specs or {}).items())
    names = {f"lora/{path}" for pair in factors for path in pair}
    extras = {path: x for path, x in leaves_by_path(state.trainable).items() if path not in names}
    base = base_shardings(mesh, extras, rules, specs=specs)
    base |= base_shardings(mesh, frozen, rules, specs=specs)
    factors = adapter_shardings(specs or {}, base)
    trainable = {path: factors.get(path) or base[path] for path in leaves_by_path(state.trainable)}
    return Shardings(_state_shardings(mesh, state, trainable), _tree(frozen, base))


def base_shardings(
    mesh: Mesh, variables: Any, rules: Rules | None = None, *, specs: Specs | None = None
) -> dict[str, NamedSharding]:
    """Path in the variables to sharding, for arrays or shapes of a base `{"params": ...}`.

    A dimension that its mesh axis does not divide is left whole. Without rules every leaf of at least
    `MIN_SHARDED_SIZE` values is split over `"fsdp"` along its longest dimension that this divides, the last of
    equals, and never along one that `nn.scan` stacked, as far as `specs` tell.

    Raises:
      ValueError: a leaf that no rule is for, or a rule with more axes than the leaf has.
    """
    stacked = {spec.leaf: _stacked(spec) for spec in (specs or {}).values()}
    found = {}
    for path, leaf in leaves_by_path(variables).items():
        if rules is None:
            axes = _longest(mesh, leaf.shape, stacked.get(path, ()))
        else:
            axes = _by_rule(path, leaf.shape, rules)
        found[path] = _sharding(mesh, leaf.shape, axes)
    return found


def adapter_shardings(specs: Specs, base: Mapping[str, NamedSharding]) -> dict[str, NamedSharding]:
    """Path in the variables to sharding, for the factors of every adapter.

    A is split as the input side of its base is, B as the output side; batch and stacked dimensions are as in the
    base, and the rank is whole. So the product A B lies where the base does, and no factor has to move.
    """
    found = {}
    for module, spec in specs.items():
        place = base[spec.leaf]
        axes = dict(zip(spec.base_letters, _padded(place.spec, len(spec.shape)), strict=True)) | {"r": None}
        for path, letters in zip(spec.factor_paths(module), spec.factor_letters, strict=True):
            found[f"lora/{path}"] = NamedSharding(
                place.mesh, PartitionSpec(*(axes[letter] for letter in letters))
            )
    return found


def _by_rule(path: str, shape: tuple[int, ...], rules: Rules) -> Axes:
    name = path.partition("/")[2]
    axes = next((axes for pattern, axes in rules if re.fullmatch(pattern, name)), None)
    if axes is None:
        raise ValueError(
            f"no sharding rule is for {name}; add (r'.*', ()) for what is to be whole everywhere"
        )
    if len(axes) > len(shape):
        raise ValueError(f"the sharding rule for {name} names {len(axes)} axes, and its shape is {shape}")
    return axes


def _longest(mesh: Mesh, shape: tuple[int, ...], stacked: Sequence[int]) -> Axes:
    parts = mesh.shape.get("fsdp", 1)
    fits = [axis for axis, size in enumerate(shape) if size % parts == 0 and axis not in stacked]
    if math.prod(shape) < MIN_SHARDED_SIZE or not fits:
        return ()
    best = max(fits, key=lambda axis: (shape[axis], axis))
    return tuple("fsdp" if axis == best else None for axis in range(len(shape)))


def _stacked(spec: AdapterSpec) -> tuple[int, ...]:
    return tuple(axis for axis, letter in enumerate(spec.base_letters) if letter.isupper())


def _sharding(mesh: Mesh, shape: tuple[int, ...], axes: Axes) -> NamedSharding:
    kept = [
        axis if axis in mesh.axis_names and size % mesh.shape[str(axis)] == 0 else None
        for axis, size in zip(axes, shape, strict=False)
    ]
    return NamedSharding(mesh, PartitionSpec(*kept))


def _padded(spec: PartitionSpec, ndim: int) -> Axes:
    return (*spec, *(None,) * (ndim - len(spec)))


def _tree(like: Any, by_path: Mapping[str, Any]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(like), [by_path[path] for path in leaves_by_path(like)])


def _state_shardings(mesh: Mesh, state: Any, trainable: Mapping[str, NamedSharding]) -> Any:
    """Of a whole state: by the longest path of a trainable leaf that another's path ends with."""
    shapes = {path: leaf.shape for path, leaf in leaves_by_path(state.trainable).items()}
    whole = NamedSharding(mesh, PartitionSpec())
    found = {}
    for path, leaf in leaves_by_path(state).items():
        segments = path.split("/")
        ends = ("/".join(segments[n:]) for n in range(len(segments)))
        owner = next((end for end in ends if end in trainable), "")
        found[path] = trainable[owner] if shapes.get(owner) == leaf.shape else whole
    return _tree(state, found)
