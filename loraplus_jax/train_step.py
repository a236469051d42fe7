"""One pure training step, and the two ways to run it: `jit_step` over a mesh, `pmap_step` over local devices.

Losses are pairs (sum, weight), and so are metrics: means are taken once, over all devices and micro-batches, so
that the result does not depend on how a batch is cut.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ._validation import check_int
from .roles import find_states, labels_of, role_norms
from .sharding import DATA_AXIS, Shardings, batch_sharding, with_mesh
from .tree import combine

SumAndWeight = tuple[jax.Array, jax.Array]
LossFn = Callable[[dict[str, Any], Any, jax.Array], tuple[SumAndWeight, Mapping[str, SumAndWeight]]]
"""`loss_fn(variables, batch, rng) -> (sum, weight), {name: (sum, weight)}`."""
StepFn = Callable[["TrainState", Any, Any], tuple["TrainState", dict[str, jax.Array]]]
"""`step(state, frozen, batch) -> state, metrics`."""


class TrainState(struct.PyTreeNode):
    """All that changes in training, as arrays only.

    Attributes:
      trainable: the variables trained: adapters, and extras under their own paths.
      opt_state: the optimizer's.
      step: int32, steps done.
      rng: the key from which each step folds its own.
    """

    trainable: Any
    opt_state: Any
    step: jax.Array
    rng: jax.Array


def init_state(trainable: Any, tx: optax.GradientTransformation, rng: jax.Array) -> TrainState:
    """The state before the first step. The arrays are copies: a step gives its state's memory away."""
    trainable = jax.tree.map(jnp.array, trainable)
    return TrainState(
        trainable=trainable, opt_state=tx.init(trainable), step=jnp.zeros((), jnp.int32), rng=jnp.array(rng)
    )


def make_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    skip_nonfinite: bool = False,
    axis_name: str | None = None,
) -> StepFn:
    """The pure step `(state, frozen, batch) -> (state, metrics)`, to be compiled by `jit_step` or `pmap_step`.

    Only `state.trainable` is differentiated: no gradient, moment or copy of `frozen` is ever made.

    Args:
      loss_fn: takes the combined variables, a batch and a key; see `LossFn`. Sums, never means.
      tx: any optax transform; its update sees the mean gradient.
      accumulate: how many micro-batches a batch is cut into, along the leading axis of every leaf.
      skip_nonfinite: leave trainable and optimizer as they were when the loss, or the norm of a gradient or of an
        update, is not finite.
      axis_name: the pmap axis that sums go over, if any.

    Returns:
      A step whose metrics are `loss`, the means of the loss function's own, and for the roles that occur
      `grad_norm/ROLE`, `update_norm/ROLE` and, with an optimizer from `lora_plus_adamw`, the learning rate
      `rate/ROLE`; float32 scalars. With `skip_nonfinite` also `skipped`, 1 or 0.

    Raises:
      ValueError: `accumulate` below 1, or, when traced, one that does not divide the batch.
    """
    check_int("accumulate", accumulate, at_least=1)

    def sums(trainable: Any, frozen: Any, batch: Any, rng: jax.Array) -> tuple[jax.Array, Any]:
        (total, weight), metrics = loss_fn(combine(trainable, frozen), batch, rng)
        return total, _with_loss((total, weight), metrics)

    gradients = jax.grad(sums, has_aux=True)

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(state.rng, state.step)
        if axis_name is not None:
            rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
        compute = functools.partial(gradients, state.trainable, frozen)
        grads, totals = _accumulated(compute, batch, rng, accumulate)
        if axis_name is not None:
            grads, totals = jax.lax.psum((grads, totals), axis_name)
        weight = totals["loss"][1]
        grads = jax.tree.map(lambda g: (g / _nonzero(weight)).astype(g.dtype), grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = weighted_means(totals) | _optimizer_metrics(opt_state, grads, updates)
        if skip_nonfinite:
            fine = _all_finite(metrics)
            metrics["skipped"] = 1.0 - fine.astype(jnp.float32)
            old, new = (state.trainable, state.opt_state), (trainable, opt_state)
            trainable, opt_state = jax.tree.map(lambda o, n: jnp.where(fine, n, o), old, new)
        return TrainState(trainable, opt_state, state.step + 1, state.rng), metrics

    return step


def jit_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    shardings: Shardings | None = None,
    accumulate: int = 1,
    skip_nonfinite: bool = False,
) -> jax.stages.Wrapped:
    """The compiled `StepFn`; its state is donated. With a mesh the batch is split over `"data"` and `"fsdp"`.

    State and frozen variables lie as `shardings` says, or are replicated over the mesh. Place them there once, by
    `distribute(tree, shardings)` or `replicate(mesh, tree)`, or the first step, whose state lies elsewhere, is
    compiled for itself.

    Args:
      loss_fn, tx, accumulate, skip_nonfinite: as for `make_step`.
      mesh: the devices; one device without.
      shardings: from `make_shardings`, for the same mesh.

    Raises:
      ValueError: a mesh without a `"data"` axis, or shardings without a mesh.
    """
    step = make_step(loss_fn, tx, accumulate=accumulate, skip_nonfinite=skip_nonfinite)
    places = _places(mesh, shardings)
    if mesh is None or places is None:
        return jax.jit(step, donate_argnums=0)
    (state, frozen), split, whole = places
    return jax.jit(
        with_mesh(step, mesh),
        donate_argnums=0,
        in_shardings=(state, frozen, split),
        out_shardings=(state, whole),
    )


def _places(
    mesh: Mesh | None, shardings: Shardings | None
) -> tuple[Shardings, NamedSharding, NamedSharding] | None:
    """Where state and frozen variables, a batch, and what is whole everywhere lie; None without a mesh."""
    if mesh is None:
        if shardings is not None:
            raise ValueError("shardings need the mesh that they were made for: give mesh=")
        return None
    if DATA_AXIS not in mesh.axis_names:
        raise ValueError(f"the mesh needs an axis {DATA_AXIS!r}, it has {mesh.axis_names}")
    whole = NamedSharding(mesh, PartitionSpec())
    return shardings or Shardings(whole, whole), batch_sharding(mesh), whole


def pmap_step(
    loss_fn: LossFn, tx: optax.GradientTransformation, *, accumulate: int = 1, skip_nonfinite: bool = False
) -> StepFn:
    """The data-parallel step over the local devices by `jax.pmap`; its state is donated.

    State and frozen variables carry a leading device axis (`flax.jax_utils.replicate`), a batch the shape
    `(devices, batch / devices, ...)`. Per step it equals `jit_step` when there is no dropout, whose masks differ.
    """
    step = make_step(loss_fn, tx, accumulate=accumulate, skip_nonfinite=skip_nonfinite, axis_name=DATA_AXIS)
    return jax.pmap(step, axis_name=DATA_AXIS, donate_argnums=0)


def make_eval(
    loss_fn: LossFn, *, mesh: Mesh | None = None, shardings: Shardings | None = None
) -> jax.stages.Wrapped:
    """Compiled `(trainable, frozen, batch) -> {name: (sum, weight)}`, without dropout if the loss function makes
    none without a key: it is called with `rng=None`. Add the pairs of all batches and take `weighted_means`.

    Mesh and shardings as for `jit_step`.
    """

    def evaluate(trainable: Any, frozen: Any, batch: Any) -> dict[str, SumAndWeight]:
        loss, metrics = loss_fn(combine(trainable, frozen), batch, None)  # pyright: ignore[reportArgumentType]
        return _with_loss(loss, metrics)

    places = _places(mesh, shardings)
    if mesh is None or places is None:
        return jax.jit(evaluate)
    (state, frozen), split, whole = places
    trainable = state if shardings is None else state.trainable
    return jax.jit(with_mesh(evaluate, mesh), in_shardings=(trainable, frozen, split), out_shardings=whole)


def weighted_means(totals: Mapping[str, SumAndWeight]) -> dict[str, jax.Array]:
    """Sum over weight for every pair; 0 where the weight is 0.

    >>> weighted_means({"loss": (jnp.array(6.0), jnp.array(4.0))})["loss"].item()
    1.5
    """
    return {name: jnp.asarray(total, jnp.float32) / _nonzero(w) for name, (total, w) in totals.items()}


def _with_loss(loss: SumAndWeight, metrics: Mapping[str, SumAndWeight]) -> dict[str, SumAndWeight]:
    if "loss" in metrics:
        raise ValueError("a loss function's metrics must not be called 'loss': that is the loss itself")
    return {"loss": loss, **metrics}


def _nonzero(weight: jax.Array) -> jax.Array:
    return jnp.where(weight == 0, 1, weight).astype(jnp.float32)


def _accumulated(
    compute: Callable[[Any, jax.Array], tuple[Any, Any]], batch: Any, rng: jax.Array, parts: int
) -> tuple[Any, Any]:
    """Gradients and totals summed over micro-batches. Example i goes to part i mod parts: a batch split over
    devices stays where it is.
    """
    if parts == 1:
        return compute(batch, rng)
    sizes = {x.shape[0] for x in jax.tree.leaves(batch)}
    if any(size % parts for size in sizes):
        raise ValueError(f"accumulate={parts} does not divide a batch of {sorted(sizes)}")
    micro = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)

    def add(carry: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, compute(*part)), None

    keys = jax.random.split(rng, parts)
    first = jax.tree.map(lambda x: x[0], (micro, keys))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(compute, *first))
    return jax.lax.scan(add, zeros, (micro, keys))[0]


def _all_finite(metrics: Mapping[str, jax.Array]) -> jax.Array:
    """Whether the loss is, and every gradient and update: a norm is finite only if all that it sums is."""
    norms = ("grad_norm/", "update_norm/")
    watched = [value for name, value in metrics.items() if name == "loss" or name.startswith(norms)]
    return jnp.all(jnp.isfinite(jnp.stack(watched)))


def _optimizer_metrics(opt_state: Any, grads: Any, updates: Any) -> dict[str, jax.Array]:
    labels, states = labels_of(opt_state, grads), find_states(opt_state)
    named = {"grad_norm": role_norms(grads, labels), "update_norm": role_norms(updates, labels)}
    if len(states) == 1 and not states[0].relative:
        named["rate"] = dict(states[0].rates)
    return {f"{name}/{role}": value for name, values in named.items() for role, value in values.items()}
