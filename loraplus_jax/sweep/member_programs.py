"""A population of members as one program: they differ in rates, lambda, scale, rank and seed and share one base.

All differences are inputs of the program, so one compilation serves every member. A member trains as its single run
would: same step function, initial values, batches and dropout keys. Nothing here knows settings or files.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh

from ..adapter.lora import SCALE, scale_variables
from ..adapter.spec import Specs
from ..interpreter.unstack import OnLayers, split_layers
from ..step.population import map_members
from ..step.problem import Problem, Shapes
from ..step.train_step import TrainState, init_state, make_eval, make_step
from ..training.estimate import count_flops
from ..training.memory import check_memory
from ..training.programs import reads_layers, with_layers
from ..training.xla import ProgramByShape, one_thread_per_device

MIN_SPEEDUP_SHARE = 0.95
"""Doubling the parallel members must cut the time per member to less than this share of the former time."""


Optimizer = Callable[..., optax.GradientTransformationExtraArgs]
"""`(lr_ratio, learning_rate=..., seed=0)` to the optimizer of a member."""


class Members(struct.PyTreeNode):
    """One run, or several stacked along the first axis of every leaf.

    Attributes:
      state: training state; `rng` holds the key's data, uint32.
      learning_rate: peak eta_A, float32.
      lr_ratio: lambda, float32.
      scales: adapted module's path to its scale s, float32.
      skipped: consecutive skipped steps, int32.
      alive: whether the member still trains; false for what fills up a program call and for diverged members.
    """

    state: TrainState
    learning_rate: Any
    lr_ratio: Any
    scales: dict[str, Any]
    skipped: Any
    alive: Any


class Programs(NamedTuple):
    """Compiled programs for the members of a unit.

    Attributes:
      at_once: members that a device computes in parallel.
      size: most members of a call.
      step: `(members, frozen, batches) -> members`, one batch per member; a `ProgramByShape`.
      evaluate: `(members, frozen, batch) -> {name: (sums, weights)}`, one batch for all members.
      step_work: FLOPs of a training step over those of an evaluation batch.
    """

    at_once: int
    size: int
    step: Any
    evaluate: Any
    step_work: float


def first_member(
    trainable: Any,
    optimizer: Optimizer,
    *,
    learning_rate: float,
    lr_ratio: float,
    scales: Mapping[str, float],
    seed: int,
) -> Members:
    """A member before its first step, in the initial state of its single run.

    Args:
      trainable: its initial values.
      optimizer: the optimizer by rate, lambda and seed.
      learning_rate, lr_ratio: eta_A and lambda.
      scales: adapted module's path to its scale s.
      seed: seed of its run.
    """
    rates = np.float32(learning_rate), np.float32(lr_ratio)
    tx = optimizer(jnp.asarray(rates[1]), learning_rate=jnp.asarray(rates[0]), seed=seed)
    key = jax.random.fold_in(jax.random.key(seed), 1)
    return Members(
        state=init_state(trainable, tx, jax.random.key_data(key)),
        learning_rate=rates[0],
        lr_ratio=rates[1],
        scales={module: np.float32(scale) for module, scale in scales.items()},
        skipped=np.int32(0),
        alive=np.bool_(True),
    )


def make_member_step(problem: Problem, optimizer: Optimizer, max_skipped: int) -> Callable[..., Members]:
    """Returns `(member, frozen, batch) -> member`: a single run's step, with rates and scales as traced values.

    After `max_skipped` consecutive skipped steps (non-finite loss or gradient) a member stops training.
    """
    loss, specs = with_layers(problem.loss), problem.specs

    def step(member: Members, frozen: Any, batch: Any) -> Members:
        tx = optimizer(member.lr_ratio, learning_rate=member.learning_rate)
        single_step = make_step(loss, tx, accumulate=problem.accumulate, skip_nonfinite=True)
        # NumPy can neither stack nor pad typed keys, so members hold a key's data.
        state = member.state.replace(rng=jax.random.wrap_key_data(member.state.rng))
        state, metrics = single_step(state, add_scales(frozen, specs, member), batch)
        skipped = jnp.where(metrics["skipped"] > 0, member.skipped + 1, 0)
        alive = skipped < max_skipped
        return member.replace(state=state.replace(rng=member.state.rng), skipped=skipped, alive=alive)

    # One member after another, a member that is not alive costs nothing; under the vmap of several, JAX turns cond
    # into a select, which computes both branches.
    def step_if_alive(member: Members, frozen: Any, batch: Any) -> Members:
        return jax.lax.cond(member.alive, step, lambda member, *_: member, member, frozen, batch)

    return step_if_alive


def make_member_eval(problem: Problem) -> Callable[..., Any]:
    """Returns `(member, frozen, batch) -> {name: (sum, weight)}`, zeros for a member that is not alive."""
    single_eval, specs = make_eval(with_layers(problem.evaluate)), problem.specs

    def pairs(member: Members, frozen: Any, batch: Any) -> Any:
        return single_eval(member.state.trainable, add_scales(frozen, specs, member), batch)

    def pairs_if_alive(member: Members, frozen: Any, batch: Any) -> Any:
        shapes = jax.eval_shape(pairs, member, frozen, batch)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.cond(member.alive, pairs, lambda *_: zeros, member, frozen, batch)

    return pairs_if_alive


def fastest_batch_size(seconds: Callable[[int], float], most: int) -> int:
    """Number of parallel members with the least time per member: 1, 2, 4 ... while each doubling clearly helps.

    Args:
      seconds: maps a number of parallel members to the time of one member's step; infinite if it does not fit.
      most: upper limit.

    >>> fastest_batch_size({1: 1.0, 2: 0.6, 4: 0.4, 8: 0.39}.get, 16)
    4
    """
    best, least = 1, seconds(1)
    while 2 * best <= most and (seconds_each := seconds(2 * best)) < MIN_SPEEDUP_SHARE * least:
        best, least = 2 * best, seconds_each
    return best


def add_scales(frozen: Mapping[str, Any], specs: Specs, member: Members) -> dict[str, Any]:
    """Frozen variables plus the member's scales."""
    return {**frozen, SCALE: scale_variables(specs, member.scales)}


def compile_programs(
    problem: Problem,
    step: Callable[..., Members],
    first: Callable[[Any], Members],
    mesh: Mesh,
    capacity: int,
    at_once: int | None,
) -> tuple[Programs, Callable[[int], Programs]]:
    """Compiles, from shapes, the programs for all members; also returns a function that does for fewer.

    `step` is that of a member, and `first` maps initial values to a member.
    """
    layers = problem.layers if reads_layers(mesh) else 0
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), problem.trainable)  # noqa: E731
    # eval_shape traces without computing; asarray, as NumPy's scalars have no place in a trace's outputs.
    member = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, first(zeros())))
    device, each = mesh.devices.flat[0], -(-capacity // mesh.size)
    flops: dict[bool, list[float]] = {True: [], False: []}

    def rounds(count: int, size: int) -> int:
        # A device that computes one member at a time skips the places that a unit of fewer leaves free.
        return each if size == 1 else -(-count // (mesh.size * size))

    def compiled(one: Callable[..., Any], size: int, places: int, batch: Shapes, *, own_batch: bool) -> Any:
        members = jax.tree.map(lambda x: jax.ShapeDtypeStruct((places, *x.shape), x.dtype), member)
        # A step gives each member a batch and donates the members; an evaluation has one batch for all.
        axes, donate = ((0, None, 0), 0) if own_batch else ((0, None, None), ())
        mapped = map_members(one, axes, at_once=size, mesh=mesh, donate=donate)
        traced = mapped.trace(members, split_layers(problem.frozen, layers), batch)
        flops[own_batch].append(count_flops(traced.jaxpr) / places)
        return OnLayers(traced.lower().compile(one_thread_per_device(mesh)), layers)

    @functools.cache
    def compile_step(size: int, rounds: int) -> ProgramByShape:
        places = mesh.size * size * rounds
        stacked = {
            name: jax.ShapeDtypeStruct((places, *x.shape), x.dtype) for name, x in problem.train_batch.items()
        }
        return ProgramByShape(functools.partial(compiled, step, size, places, own_batch=True), stacked)

    @functools.cache
    def compile_for(size: int, rounds: int) -> Programs:
        one, places = make_member_eval(problem), mesh.size * size * rounds
        evaluate = compiled(one, size, places, problem.eval_batch, own_batch=False)
        train = compile_step(size, rounds)
        step_work = float(np.mean(flops[True]) / np.mean(flops[False]))
        programs = Programs(size, places, train, evaluate, step_work)
        check_memory((programs.step.largest, programs.evaluate), mesh.local_devices)
        return programs

    if at_once is None and skips_measurement(device):
        at_once = 1
    if at_once is None:
        at_once = fastest_batch_size(
            lambda size: _measured(compile_step(size, rounds(1, size)).largest.program, mesh, size), each
        )
    most = at_once

    def programs_for(count: int) -> Programs:
        size = parallel_members(count, most, mesh.size)
        return compile_for(size, rounds(count, size))

    return compile_for(most, rounds(1, most)), programs_for


def parallel_members(count: int, most: int, devices: int) -> int:
    """Members that a device computes in parallel if `count` remain: no more than it takes, in powers of two.

    A call computes all its arrays, so a program for many members would compute mostly zeros after a rung.

    >>> [parallel_members(count, 8, 1) for count in (32, 8, 3, 1)], parallel_members(4, 8, 2)
    ([8, 8, 4, 1], 2)
    """
    each = -(-count // devices)
    return min(most, 1 << (each - 1).bit_length())


def skips_measurement(device: Any) -> bool:
    """True on a CPU: one member keeps it busy, and several in parallel cost more time and memory each."""
    return device.platform == "cpu"


def _measured(step: Any, mesh: Mesh, at_once: int) -> float:
    """Seconds per member step, best of three calls on zeros; infinite if it does not fit in memory."""
    try:
        check_memory((step,), mesh.local_devices)
    except ValueError:
        if at_once == 1:
            raise
        return float("inf")
    shapes, _ = step.args_info
    members, frozen, batches = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    size = len(members.alive)
    shardings, _ = step.input_shardings
    members, frozen, batches = jax.device_put((members, frozen, batches), shardings)
    seconds = []
    for _ in range(4):  # the first call is slower and is dropped
        # Zeros have no finite loss, so a member would stop after train.max_skipped steps and take no time.
        fresh = {"alive": np.ones(size, bool), "skipped": np.zeros(size, np.int32)}
        members = members.replace(
            **{name: jax.device_put(value, getattr(shardings[0], name)) for name, value in fresh.items()}
        )
        start = time.perf_counter()
        members = jax.block_until_ready(step(members, frozen, batches))
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]) / (size // mesh.size)
