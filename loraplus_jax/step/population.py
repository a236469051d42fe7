"""One compiled step for many adapters on one base, each with its own data and optimizer settings."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._utils.validation import check_int
from .train_step import LossFn, TrainState, make_step

MEMBER_AXIS = "members"
"""Mesh axis that splits the members."""


def population_step(
    loss_fn: LossFn,
    make_tx: Callable[[Any], optax.GradientTransformation],
    *,
    accumulate: int = 1,
    skip_nonfinite: bool = False,
    at_once: int = 1,
    mesh: Mesh | None = None,
) -> jax.stages.Wrapped:
    """Compiles the steps of several adapters as one program, which donates their states.

    Every member's step is that of `jit_step` with its own optimizer, data and key; the members share `frozen`, of
    which there is one copy. Other values of hyperparameters, such as rates, compile nothing.

    Args:
      loss_fn, accumulate, skip_nonfinite: as for `jit_step`.
      make_tx: makes the optimizer of one member from its hyperparameters, a tree of traced scalars; such as
        `lambda own: lora_plus_adamw(own["learning_rate"], own["lr_ratio"])`.
      at_once: members that a device computes together, with `jax.vmap`, where one does not fill it; each needs
        memory for its activations. The others follow one after another.
      mesh: a mesh with the single axis `"members"`, to split the members over devices; by default one device.

    Returns:
      A `jax.jit` function `(states, hyperparams, frozen, batches) -> (states, metrics)`. Every leaf of `states` (a
      `TrainState`), `hyperparams`, `batches` and `metrics` has a leading axis of members; `frozen` has none. The
      metrics are those of `make_step`.

    Raises:
      ValueError: `at_once` is below 1, or the mesh has other axes.
    """
    if mesh is not None and mesh.axis_names != (MEMBER_AXIS,):
        raise ValueError(f"mesh must have the single axis {MEMBER_AXIS!r}, got {mesh.axis_names}")

    def step(state: TrainState, hyperparams: Any, frozen: Any, batch: Any) -> Any:
        tx = make_tx(hyperparams)
        return make_step(loss_fn, tx, accumulate=accumulate, skip_nonfinite=skip_nonfinite)(
            state, frozen, batch
        )

    return map_members(step, (0, 0, None, 0), at_once=at_once, mesh=mesh, donate=0)


def map_members(
    one: Callable[..., Any],
    in_axes: Sequence[int | None],
    *,
    at_once: int,
    mesh: Mesh | None = None,
    donate: int | tuple[int, ...] = (),
) -> jax.stages.Wrapped:
    """Jits a function of one member as a function of all: each device maps over its members.

    Args:
      one: the function of one member.
      in_axes: for each of its arguments 0 if every member has its own, None if all share it.
      at_once: members that a device computes in parallel.
      mesh: devices; the axis `"members"` splits the members.
      donate: the arguments whose buffers are donated.

    Returns:
      A `jax.jit` function whose arguments, where `in_axes` is 0, and results have a leading axis of members.
    """
    check_int("at_once", at_once, at_least=1)

    def local(*arguments: Any) -> Any:
        def call(own: list[Any]) -> Any:
            rest = iter(own)
            return one(
                *(x if axis is None else next(rest) for x, axis in zip(arguments, in_axes, strict=True))
            )

        own = [x for x, axis in zip(arguments, in_axes, strict=True) if axis is not None]
        if len(sizes := {leaf.shape[:1] for leaf in jax.tree.leaves(own)}) > 1:
            raise ValueError(
                f"every array must have a leading axis of as many members, got sizes {sorted(sizes)}"
            )
        # Without a batch size lax.map is a loop, with one a loop over vmaps.
        return jax.lax.map(call, own, batch_size=None if at_once == 1 else at_once)

    if mesh is None:
        return jax.jit(local, donate_argnums=donate)
    split = PartitionSpec(MEMBER_AXIS)
    specs = tuple(PartitionSpec() if axis is None else split for axis in in_axes)
    # Unchecked: zeros for a member that is not alive vary over no mesh axis and losses do, which cond would reject.
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
    return jax.jit(
        mapped,
        donate_argnums=donate,
        in_shardings=tuple(NamedSharding(mesh, spec) for spec in specs),
        out_shardings=NamedSharding(mesh, split),
    )
