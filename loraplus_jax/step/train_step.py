"""A pure training step, and two ways to run it: `jit_step` over a mesh, `pmap_step` over local devices.

Losses and metrics are pairs (sum, weight). Means are taken once, over all devices and micro-batches, so the result
does not depend on how a batch is split.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._utils.validation import check_int
from ..adapter.tree import combine
from ..optim.roles import find_states, labels_of, role_norms
from .sharding import DATA_AXIS, Shardings, batch_sharding, with_mesh

SumAndWeight = tuple[jax.Array, jax.Array]


class Rows(NamedTuple):
    """Values to keep, without a sum: one for each row of a batch, or for each text or choice in its rows.

    Attributes:
      values: values, `(B,)`, `(B, S)` for texts or `(B, S, V)` for choices.
      weights: their weights, of the same shape.
    """

    values: jax.Array
    weights: jax.Array


LossFn = Callable[[dict[str, Any], Any, jax.Array], tuple[SumAndWeight, Mapping[str, SumAndWeight]]]
"""`loss_fn(variables, batch, rng) -> (sum, weight), {name: (sum, weight)}`."""
StepFn = Callable[["TrainState", Any, Any], tuple["TrainState", dict[str, jax.Array]]]
"""`step(state, frozen, batch) -> state, metrics`."""


class CompiledStep(jax.stages.Wrapped, Protocol):
    """A compiled `StepFn`."""

    def __call__(
        self, state: "TrainState", frozen: Any, batch: Any
    ) -> tuple["TrainState", dict[str, jax.Array]]:
        """Makes one step."""
        ...


class CompiledEval(jax.stages.Wrapped, Protocol):
    """A compiled evaluation of one batch."""

    def __call__(self, trainable: Any, frozen: Any, batch: Any) -> dict[str, SumAndWeight]:
        """Returns `(sum, weight)` by name."""
        ...


class TrainState(struct.PyTreeNode):
    """Everything that training changes, as arrays.

    Attributes:
      trainable: tree of adapters, and fully trained parameters under their own paths.
      opt_state: optimizer state.
      step: number of completed steps, int32 scalar.
      rng: base key, from `jax.random.key` or `PRNGKey`; each step folds its number into it.
    """

    trainable: Any
    opt_state: Any
    step: jax.Array
    rng: jax.Array


def init_state(trainable: Any, tx: optax.GradientTransformation, rng: jax.Array) -> TrainState:
    """Makes the state before the first step. Copies the arrays, since a step donates the memory of its state.

    Returns:
      A `TrainState` with `step` 0 and the new state of `tx`.
    """
    trainable = jax.tree.map(jnp.array, trainable)
    # The optimizer may hold arrays of its own, such as a learning rate. Outside jit one at a time, to limit memory.
    leaves, structure = jax.tree.flatten(tx.init(trainable))
    for n, leaf in enumerate(leaves):
        leaves[n] = jnp.array(leaf)
    opt_state = jax.tree.unflatten(structure, leaves)
    return TrainState(trainable, opt_state, step=jnp.zeros((), jnp.int32), rng=jnp.array(rng))


def make_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    skip_nonfinite: bool = False,
    axis_name: str | None = None,
) -> StepFn:
    """Makes the pure step `(state, frozen, batch) -> (state, metrics)`, to compile with `jit_step` or `pmap_step`.

    Differentiates only `state.trainable`: there is no gradient, moment or copy of `frozen`.

    Args:
      loss_fn: function of the combined variables, a batch and a key, see `LossFn`; returns sums, not means.
      tx: any optax transform; it gets the mean gradient, and the mean loss as `value` if it takes that.
      accumulate: number of micro-batches per batch, split along the leading axis of every leaf.
      skip_nonfinite: whether to keep variables and optimizer state unchanged if the loss, or the norm of a gradient
        or update, is not finite.
      axis_name: pmap axis to sum over, if any.

    Returns:
      A step with float32 scalars as metrics, which are `loss`, the means of the loss function's metrics, and for
      each role that occurs `grad_norm/ROLE`, `update_norm/ROLE` and, with an optimizer from `lora_plus_adamw`, the
      learning rate `rate/ROLE`. With `skip_nonfinite` also `skipped`, 1 or 0.

    Raises:
      ValueError: `accumulate` is below 1 or, when traced, does not divide the leading axis of every leaf.
    """
    check_int("accumulate", accumulate, at_least=1)

    def sums(trainable: Any, frozen: Any, batch: Any, rng: jax.Array) -> tuple[jax.Array, Any]:
        loss, metrics = loss_fn(combine(trainable, frozen), batch, rng)
        return loss[0], _with_loss(loss, metrics)

    gradients = jax.grad(sums, has_aux=True)
    update = optax.with_extra_args_support(tx).update

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(state.rng, state.step)
        if axis_name is not None:
            rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
        compute = functools.partial(gradients, state.trainable, frozen)
        grads, totals = _accumulate_gradients(compute, batch, rng, accumulate)
        if axis_name is not None:
            # After the micro-batches, so that a step communicates once.
            grads, totals = jax.lax.psum((grads, totals), axis_name)
        weight = totals["loss"][1]
        grads = jax.tree.map(lambda g: (g / _nonzero(weight)).astype(g.dtype), grads)
        means = weighted_means(totals)
        updates, opt_state = update(grads, state.opt_state, state.trainable, value=means["loss"])
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = means | _optimizer_metrics(opt_state, grads, updates)
        if skip_nonfinite:
            # A norm is finite only if all its terms are: no leaf has to be read again.
            names = ("grad_norm/", "update_norm/")
            checked = [x for name, x in metrics.items() if name == "loss" or name.startswith(names)]
            finite = jnp.all(jnp.isfinite(jnp.stack(checked)))
            metrics["skipped"] = 1.0 - finite.astype(jnp.float32)
            old, new = (state.trainable, state.opt_state), (trainable, opt_state)
            trainable, opt_state = jax.tree.map(lambda o, n: jnp.where(finite, n, o), old, new)
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
) -> CompiledStep:
    """Compiles the `StepFn`, which donates its state. With a mesh, the batch is split over `"data"` and `"fsdp"`.

    State and frozen variables are sharded by `shardings`, or replicated over the mesh. Move them there before the
    first step (`distribute`, `replicate`); otherwise that step compiles a second program for their placement.

    Args:
      loss_fn, tx, accumulate, skip_nonfinite: as for `make_step`.
      mesh: device mesh; by default a single device.
      shardings: shardings from `make_shardings` for the same mesh.

    Returns:
      A `jax.jit` function with the signature of `StepFn`; its metrics are those of `make_step`.

    Raises:
      ValueError: the mesh has no `"data"` axis, or shardings are passed without a mesh.
    """
    step = make_step(loss_fn, tx, accumulate=accumulate, skip_nonfinite=skip_nonfinite)
    _check_mesh(mesh, shardings)
    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    replicated = NamedSharding(mesh, PartitionSpec())
    state, frozen = shardings or Shardings(replicated, replicated)
    return jax.jit(
        with_mesh(step, mesh),
        donate_argnums=0,
        in_shardings=(state, frozen, batch_sharding(mesh)),
        out_shardings=(state, replicated),
    )


def _check_mesh(mesh: Mesh | None, shardings: Shardings | None) -> None:
    if mesh is None and shardings is not None:
        raise ValueError("shardings require mesh=, the mesh that they were made for")
    if mesh is not None and DATA_AXIS not in mesh.axis_names:
        raise ValueError(f"mesh must have an axis {DATA_AXIS!r}, got {mesh.axis_names}")


def pmap_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    skip_nonfinite: bool = False,
    devices: Sequence[Any] | None = None,
) -> StepFn:
    """Compiles a data-parallel step with `jax.pmap`; it donates its state.

    State and frozen variables need a leading device axis (`flax.jax_utils.replicate`); a batch has the shape
    `(devices, batch / devices, ...)`. Without dropout, whose masks differ, each step equals that of `jit_step`.

    Args:
      loss_fn, tx, accumulate, skip_nonfinite: as for `make_step`.
      devices: devices to run on; by default the local ones.

    Returns:
      A `StepFn`, whose new state and metrics also have the leading device axis.
    """
    step = make_step(loss_fn, tx, accumulate=accumulate, skip_nonfinite=skip_nonfinite, axis_name=DATA_AXIS)
    return jax.pmap(step, axis_name=DATA_AXIS, donate_argnums=0, devices=devices)


def make_eval(
    loss_fn: LossFn, *, mesh: Mesh | None = None, shardings: Shardings | None = None
) -> CompiledEval:
    """Compiles an evaluation of one batch.

    It calls the loss function with `rng=None`, which must turn off dropout. Add the pairs of all batches and
    concatenate `Rows`, then call `weighted_means`. `mesh` and `shardings` are as for `jit_step`.

    Returns:
      A `jax.jit` function of `(trainable, frozen, batch)` to a dict of `(sum, weight)` by name, with `"loss"` and
      the loss function's metrics, some of which may be `Rows`.
    """

    def evaluate(trainable: Any, frozen: Any, batch: Any) -> dict[str, SumAndWeight]:
        loss, metrics = loss_fn(combine(trainable, frozen), batch, None)  # pyright: ignore[reportArgumentType]
        return _with_loss(loss, metrics)

    _check_mesh(mesh, shardings)
    if mesh is None:
        return jax.jit(evaluate)
    replicated = NamedSharding(mesh, PartitionSpec())
    trainable, frozen = (
        (shardings.state.trainable, shardings.frozen) if shardings else (replicated, replicated)
    )
    inputs = (trainable, frozen, batch_sharding(mesh))
    return jax.jit(with_mesh(evaluate, mesh), in_shardings=inputs, out_shardings=replicated)


def weighted_means(totals: Mapping[str, SumAndWeight]) -> dict[str, jax.Array]:
    """Every sum divided by its weight, float32; 0 where the weight is 0.

    >>> weighted_means({"loss": (jnp.array(6.0), jnp.array(4.0))})["loss"].item()
    1.5
    """
    return {name: jnp.asarray(total, jnp.float32) / _nonzero(w) for name, (total, w) in totals.items()}


def _with_loss(loss: SumAndWeight, metrics: Mapping[str, SumAndWeight]) -> dict[str, SumAndWeight]:
    if "loss" in metrics:
        raise ValueError("the loss function must not return a metric 'loss', the name of the loss itself")
    return {"loss": loss, **metrics}


def _nonzero(weight: jax.Array) -> jax.Array:
    return jnp.where(weight == 0, 1, weight).astype(jnp.float32)


def _accumulate_gradients(
    compute: Callable[[Any, jax.Array], tuple[Any, Any]], batch: Any, rng: jax.Array, parts: int
) -> tuple[Any, Any]:
    """Sums gradients and totals over micro-batches."""
    if parts == 1:
        return compute(batch, rng)
    sizes = {jnp.shape(x)[0] if jnp.ndim(x) else 1 for x in jax.tree.leaves(batch)}
    if any(size % parts for size in sizes):
        raise ValueError(
            f"accumulate must divide the leading axis of every leaf of the batch, got {parts} for {sorted(sizes)}"
        )
    # Example i goes to micro-batch i mod parts. A micro-batch of consecutive examples would be on few devices, and
    # GSPMD would move examples between them.
    micro = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)

    def add(carry: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, compute(*part)), None

    keys = jax.random.split(rng, parts)
    first = jax.tree.map(lambda x: x[0], (micro, keys))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(compute, *first))
    return jax.lax.scan(add, zeros, (micro, keys))[0]


def _optimizer_metrics(opt_state: Any, grads: Any, updates: Any) -> dict[str, jax.Array]:
    labels, states = labels_of(opt_state, grads), find_states(opt_state)
    named = {"grad_norm": role_norms(grads, labels), "update_norm": role_norms(updates, labels)}
    if len(states) == 1 and not states[0].relative:
        named["rate"] = dict(states[0].rates)
    return {f"{name}/{role}": value for name, values in named.items() for role, value in values.items()}
