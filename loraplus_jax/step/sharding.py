"""Device meshes, and the shardings of all arrays of a run.

A mesh has three axes. `"data"` splits only the batch. `"fsdp"` splits the batch and the weights, which are
all-gathered layer by layer when they are used. `"tensor"` splits the weights, and each device computes with its own
part, as in Megatron-LM (arXiv 1909.08053). GSPMD (arXiv 2105.04663) inserts the communication.

Rules, defined with each model, shard the base. Adapters and optimizer state are sharded like the parameters that
they belong to.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from flax.core import meta
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..adapter.adapter_stack import ROW_AXES
from ..adapter.spec import Specs
from ..adapter.tree import leaves_by_path
from ..quantization.packed_array import is_packed

DATA_AXIS = "data"
AXES = (DATA_AXIS, "fsdp", "tensor")
BATCH_AXES = AXES[:2]
"""The axes that split the rows of a batch."""

Axes: TypeAlias = tuple[str | None, ...]
Rules: TypeAlias = Sequence[tuple[str, Axes]]
"""Pairs (regular expression, axes). The first expression that matches a leaf's whole path, without its collection,
sets the mesh axis that splits each dimension. Dimensions without an axis are not split."""

MIN_SHARDED_SIZE = 2**16
"""Without rules, leaves with fewer values are replicated: they are not worth an all-gather."""


class Shardings(NamedTuple):
    """The shardings of a step's inputs, as trees of `NamedSharding`.

    Attributes:
      state, frozen: those of the `TrainState` and of the frozen variables.
    """

    state: Any
    frozen: Any


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[Any] | None = None
) -> Mesh:
    """Makes a mesh with the axes `"data"`, `"fsdp"` and `"tensor"`, following the hardware topology if it is known.

    Args:
      data, fsdp, tensor: sizes of the axes; one of them may be -1, for the remaining devices.
      devices: by default those of all processes, which must all be used; a single process may use 1/n of them.

    Returns:
      A `jax.sharding.Mesh` with all three axes, also those of size 1.

    Raises:
      ValueError: the sizes do not match the devices; the message says which size to change.

    >>> dict(make_mesh(1).shape)
    {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else devices
    sizes, count = dict(zip(AXES, (data, fsdp, tensor), strict=True)), len(devices)
    for name, size in sizes.items():
        if size != -1 and not 1 <= size <= count:
            raise ValueError(f"mesh.{name} must be 1 to {count} devices, or -1 for all, got {size}")
    product = " x ".join(f"{name} {size}" for name, size in sizes.items())
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"only one of mesh.data, mesh.fsdp and mesh.tensor may be -1, got {product}")
    fixed = {name: size for name, size in sizes.items() if size != -1}
    used = math.prod(fixed.values())
    # All processes run the same program, so each needs its devices in the mesh.
    needs_all = not free and len({device.process_index for device in devices}) > 1
    if count % used or (needs_all and used < count):
        largest = max(fixed, key=lambda axis: fixed[axis])
        others = used // fixed[largest]
        allowed = [n for n in range(1, count + 1) if count % (n * others) == 0]
        allowed = [n for n in allowed if not needs_all or n * others == count]
        rule = (
            f"but several processes must use all {count} devices"
            if needs_all
            else f"which must divide the {count} devices"
        )
        sizes_allowed = ", ".join([*map(str, allowed), *([] if free else ["-1"])])
        advice = f"; change mesh.{largest} to {sizes_allowed}" if allowed else ""
        raise ValueError(f"mesh {product} uses {used} devices, {rule}{advice}")
    shape = [count // used if size == -1 else size for size in sizes.values()]
    grid = mesh_utils.create_device_mesh(shape, devices[: math.prod(shape)], allow_split_physical_axes=True)
    return Mesh(grid, AXES)


def check_tensor(mesh: Mesh, sizes: Mapping[str, int]) -> None:
    """Raises ValueError unless the mesh's tensor axis divides all of a model's named sizes.

    >>> check_tensor(make_mesh(1), {"num_attention_heads": 3})
    """
    tensor = mesh.shape.get("tensor", 1)
    for name, size in sizes.items():
        if size % tensor:
            divisor = math.gcd(*sizes.values())
            allowed = ", ".join(str(n) for n in range(1, divisor + 1) if divisor % n == 0)
            raise ValueError(
                f"mesh.tensor must divide the model's {name} {size}, got {tensor}; use one of {allowed}"
            )


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Replicates a tree on every device of the mesh.

    Returns:
      A tree like `tree` of `jax.Array`.
    """
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def distribute(tree: Any, shardings: Any) -> Any:
    """Moves each array of a tree to its sharding in `shardings`, a tree of the same structure.

    All processes must pass the same values. Each process copies only the parts that its own devices hold.

    Returns:
      A tree like `tree` of `jax.Array`; those that have their sharding already are not copied.
    """

    def put(array: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(array, jax.Array) and array.sharding.is_equivalent_to(sharding, array.ndim):
            return array
        if jax.process_count() == 1:
            return jax.device_put(array, sharding)
        # device_put to devices of other processes would first compare the whole array between all processes.
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree, shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch, whose rows are split over the axes `"data"` and `"fsdp"` that the mesh has."""
    return NamedSharding(mesh, PartitionSpec(tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Moves a process's rows of a batch (see `local_rows`) to its devices.

    Returns:
      A tree like `batch` of `jax.Array` over the whole mesh, with the rows of all processes.
    """
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def local_rows(mesh: Mesh, size: int) -> np.ndarray:
    """Finds the rows of a batch of `size` rows that this process's devices hold.

    Returns:
      Indices of the rows, int (n,), in ascending order.

    >>> local_rows(make_mesh(1), 3).tolist()
    [0, 1, 2]
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((size,))
    return np.unique(np.concatenate([np.arange(size)[index] for index in indices.values()]))


def take_local(batch: Any, mesh: Mesh) -> Any:
    """A process's rows of a global batch, for `shard_batch`."""
    return jax.tree.map(lambda x: x[local_rows(mesh, len(x))], batch)


def with_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """The function, for positional arguments, traced with the mesh that `constrain_rows` and others see."""

    @functools.wraps(function)
    def inside(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return inside


def constrain_rows(x: jax.Array) -> jax.Array:
    """Shards the leading axis like a batch and no other axis; has no effect without a mesh.

    Returns:
      An array equal to `x`.
    """
    # For models, where rows meet weights that are split over the same axis: GSPMD may all-gather either of them,
    # and without this constraint it often gathers the rows.
    return constrain(x, [BATCH_AXES])


def constrain(x: jax.Array, axes: Sequence[Sequence[str]]) -> jax.Array:
    """`x` with its axes split over the mesh axes in `axes`, the others not at all; without a mesh as it is."""
    free = automatic_axes()
    automatic = [tuple(axis for axis in names if axis in free) for names in axes]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*automatic)) if any(automatic) else x


def automatic_axes() -> list[str]:
    """The axes of the ambient mesh that GSPMD splits, without those of the rows of an enclosing `apply_rows`."""
    mesh = jax.sharding.get_abstract_mesh()
    # Under pmap and inside shard_map, axes are Manual: rows are split already.
    return [
        axis
        for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == jax.sharding.AxisType.Auto and axis not in (ROW_AXES.value or ())
    ]


def mesh_axes_of_rows() -> tuple[str, ...]:
    """Those of `"data"` and `"fsdp"` that the ambient mesh has, as `mesh_axes` of `apply_rows`."""
    free = automatic_axes()
    return tuple(axis for axis in BATCH_AXES if axis in free)


def gather_over_fsdp(x: jax.Array, axes: Axes) -> jax.Array:
    """`x`, which a rule splits over `"fsdp"`, gathered over it; without a mesh as it is."""
    # For weights that a loop uses: otherwise GSPMD gathers them in every iteration.
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if kinds.get("fsdp") != jax.sharding.AxisType.Auto or mesh.shape["fsdp"] == 1:
        return x
    # A dimension that tensor does not divide is not split anyway.
    kept = (
        a if a == "tensor" and n % mesh.shape[a] == 0 else None for a, n in zip(axes, x.shape, strict=True)
    )
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*kept))


def batch_parts(mesh: Mesh) -> int:
    """The number of parts that a batch is split into: the sizes of `"data"` and `"fsdp"`, multiplied."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES if axis in mesh.axis_names)


def make_shardings(
    mesh: Mesh, state: Any, frozen: Any, *, specs: Specs | None = None, rules: Rules | None = None
) -> Shardings:
    """Makes the shardings of everything that a step takes.

    Args:
      mesh: device mesh.
      state: a `TrainState` of arrays or shapes.
      frozen: frozen variables, arrays or shapes.
      specs: the table from `init_lora`; None without adapters.
      rules: the model's rules, as for `base_shardings`.

    Returns:
      Shardings by `base_shardings` for the base and fully trained parameters, by `adapter_shardings` for
      adapters, and for moments those of the leaves that they belong to; the rest of the state is replicated.
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
    """Makes shardings for a base `{"params": ...}` of arrays or shapes.

    A dimension that its mesh axis does not divide is not split. Without rules, every leaf of at least
    `MIN_SHARDED_SIZE` values is split over `"fsdp"` along its longest, last such dimension, but never along one
    that `nn.scan` stacked according to `specs`.

    Returns:
      A `NamedSharding` by path, such as `"params/head/kernel"`; for a packed leaf also by the path of each part,
      `LEAF/parts/NAME`.

    Raises:
      ValueError: no rule matches a leaf, or a rule has more axes than its leaf.
    """
    letters = {spec.leaf: spec.base_letters for spec in (specs or {}).values()}
    shardings = {}
    # Flax's boxes add `/value` to a path.
    is_leaf = lambda x: is_packed(x) or isinstance(x, meta.AxisMetadata)  # noqa: E731
    names = leaves_by_path(variables, is_leaf=is_leaf)
    for (path, leaf), name in zip(leaves_by_path(variables, is_leaf=is_packed).items(), names, strict=True):
        if rules is None:
            axes = _split_longest(mesh, leaf.shape, letters.get(name, ""))
        else:
            axes = _apply_rule(name, leaf.shape, rules)
        shardings[path] = shardings[name] = _sharding(mesh, leaf.shape, axes)
        for part, part_axes in leaf.part_axes(axes).items() if is_packed(leaf) else ():
            shardings[f"{path}/parts/{part}"] = _sharding(mesh, leaf.parts[part].shape, part_axes)
    return shardings


def adapter_shardings(specs: Specs, base: Mapping[str, NamedSharding]) -> dict[str, NamedSharding]:
    """The shardings of the factors by path, such as `"lora/query/lora_a"`, from those of the base by path.

    A is split like the input side of its base weight, B and magnitudes like the output side, the rank not at all:
    the product A B has the base's sharding, and no factor has to move.
    """
    shardings = {}
    for module, spec in specs.items():
        sharding = base[spec.leaf]
        axes = dict(zip(spec.base_letters, sharding.spec, strict=False))  # a spec may leave out the last axes
        for factor in spec.factors_of(module):
            spec_of_factor = PartitionSpec(*factor.along(axes))
            shardings[f"lora/{factor.path}"] = NamedSharding(sharding.mesh, spec_of_factor)
    return shardings


def _apply_rule(path: str, shape: tuple[int, ...], rules: Rules) -> Axes:
    name = path.partition("/")[2]
    axes = next((axes for pattern, axes in rules if re.fullmatch(pattern, name)), None)
    if axes is None:
        raise ValueError(f"no sharding rule matches {name}; to replicate all others, add (r'.*', ())")
    if len(axes) > len(shape):
        raise ValueError(f"the sharding rule for {name} has {len(axes)} axes, but its shape is {shape}")
    return axes


def _split_longest(mesh: Mesh, shape: tuple[int, ...], letters: str) -> Axes:
    parts = mesh.shape.get("fsdp", 1)
    # Not a stacked axis, whose letter is a capital: a scan over a split axis would gather it in every iteration.
    candidates = [
        axis
        for axis, size in enumerate(shape)
        if size % parts == 0 and not letters[axis : axis + 1].isupper()
    ]
    if math.prod(shape) < MIN_SHARDED_SIZE or not candidates:
        return ()
    longest = max(candidates, key=lambda axis: (shape[axis], axis))
    return tuple("fsdp" if axis == longest else None for axis in range(len(shape)))


def _sharding(mesh: Mesh, shape: tuple[int, ...], axes: Axes) -> NamedSharding:
    kept = [
        axis if axis in mesh.axis_names and size % mesh.shape[str(axis)] == 0 else None
        for axis, size in zip(axes, shape, strict=False)
    ]
    return NamedSharding(mesh, PartitionSpec(*kept))


def _tree(like: Any, by_path: Mapping[str, Any]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(like), [by_path[path] for path in leaves_by_path(like)])


def _state_shardings(mesh: Mesh, state: Any, trainable: Mapping[str, NamedSharding]) -> Any:
    # An optax state has no link to the parameters: a moment's path ends in that of the leaf that it belongs to. The
    # longest such end counts, since one trainable path may end another.
    shapes = {path: leaf.shape for path, leaf in leaves_by_path(state.trainable).items()}
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = {}
    for path, leaf in leaves_by_path(state).items():
        segments = path.split("/")
        ends = ("/".join(segments[n:]) for n in range(len(segments)))
        owner = next((end for end in ends if end in trainable), "")
        shardings[path] = trainable[owner] if shapes.get(owner) == leaf.shape else replicated
    return _tree(state, shardings)
