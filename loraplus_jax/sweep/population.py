"""Many runs as one program: members that differ in rates, lambda, scale, rank and seed, over one frozen base.

What the members differ in are values, inputs of the program, so that all share one compilation. A member's steps
are those of its single run: the same step, the same first values, batches and dropout keys.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..checkpoint import describe_run, fingerprint
from ..data.batches import digest
from ..data.fetch import resolve
from ..lora import SCALE, scale_variables
from ..models.hf import check_params, load_params
from ..optim.lora_plus import LoRAPlusTransform
from ..settings.schema import split_settings
from ..sharding import make_mesh, replicate
from ..spec import Specs
from ..tasks.interface import AdaptedModel, Losses, TaskData, row_count
from ..train_step import LossFn, TrainState, init_state, make_eval, make_step
from ..training.memory import check_memory
from ..training.optimizer import check_rates, make_optimizer
from ..training.setup import build_model, count_steps, params_of, set_weights, task_module
from .halving import check_rungs
from .settings import MAY_CHANGE, SweepRun, Trial

MEMBER_AXIS = "members"
"""The mesh axis over which members are split."""
MIN_SPEEDUP_SHARE = 0.95
"""More members at once must take less than this share of the time a member."""


class Members(struct.PyTreeNode):
    """Runs side by side; every leaf has them along its first axis.

    Attributes:
      state: of training; `rng` as the key's data, uint32.
      learning_rate: eta_A, the peak, float32.
      lr_ratio: lambda, float32.
      scales: path of an adapted module to its s, float32.
      skipped: steps skipped in a row, int32.
      alive: whether steps are still taken; false for an empty place and for a member that has diverged.
    """

    state: TrainState
    learning_rate: Any
    lr_ratio: Any
    scales: dict[str, Any]
    skipped: Any
    alive: Any


class Programs(NamedTuple):
    """What runs on the devices, compiled for a chunk of members.

    Attributes:
      step: `(members, frozen, batches) -> members`, each member with a batch of its own.
      evaluate: `(members, frozen, batch) -> {name: (sums, weights)}`, all with the same batch.
    """

    step: Any
    evaluate: Any


class Population(NamedTuple):
    """All that a sweep trains with.

    Attributes:
      run: the sweep.
      data: its data.
      parts: the model with adapters of the largest rank.
      steps: optimizer steps of a whole run.
      mesh: the devices, along `"members"`.
      at_once: members that a device computes side by side.
      chunk: members of one call of the programs.
      programs: see there.
      first: `(trial, seed)` to a member before its first step.
      metadata: what checkpoints say of themselves.
    """

    run: SweepRun
    data: TaskData
    parts: AdaptedModel
    steps: int
    mesh: Mesh
    at_once: int
    chunk: int
    programs: Programs
    first: Callable[[Trial, int], Members]
    metadata: dict[str, Any]


def prepare_population(run: SweepRun, places: int, at_once: int | None = None) -> Population:
    """Fetches, checks, compiles and loads everything, as `prepare` does for a single run.

    Args:
      run: the sweep.
      places: how many members there are at most.
      at_once: members that a device computes side by side; None lets a measurement choose.

    Raises:
      ValueError, OSError: something does not fit, in memory either, or cannot be read; the message says what.
    """
    devices = make_mesh(run.mesh.data).devices.reshape(-1)
    mesh = Mesh(devices, (MEMBER_AXIS,))
    directory = resolve(run.model.path, "model")
    data = task_module(run).load_data(run, directory)
    if "test" not in data.splits:
        raise ValueError(
            "a sweep chooses on the validation split and reports on the test split: give data.test"
        )
    steps = count_steps(run, row_count(data.splits["train"]))
    check_rungs(run.sweep, steps, run.optimizer.warmup_steps)
    widest = dataclasses.replace(run, lora=dataclasses.replace(run.lora, rank=max(run.ranks)))
    config = widest.applied
    shapes = build_model(widest, directory, data.task, config)
    tx = make_optimizer(run.shared_optimizer, config, steps, shapes.specs)
    check_rates(run.optimizer, tx, shapes.trainable)
    check_params(directory, shapes.base.table, params_of(shapes), new=shapes.base.new)
    at_once, chunk, programs = _compile_programs(run, data, shapes, steps, mesh, places, at_once)
    weights = load_params(directory, shapes.base.table, params_of(shapes), new=shapes.base.new)
    parts = set_weights(widest, shapes, weights, config)
    parts = parts._replace(frozen=replicate(mesh, parts.frozen))
    values = functools.cache(functools.partial(_initial_values, run, directory, data, parts, weights))
    first = functools.partial(_initial_member, values, run, parts.specs, steps)
    metadata = describe_run(
        parts.specs,
        config,
        base=fingerprint(parts.frozen) if parts.frozen else None,
        settings=split_settings(run.to_json(), "", MAY_CHANGE)[0],
        task=data.task.notes(),
        data=digest(data.splits),
    )
    return Population(run, data, parts, steps, mesh, at_once, chunk, programs, first, metadata)


def make_member_step(run: SweepRun, losses: Losses, specs: Specs, steps: int) -> Callable[..., Members]:
    """`(member, frozen, batch) -> member`: the step of a single run, with rates and scales that are values.

    A member that has skipped `train.max_skipped` steps in a row (loss or gradient not finite) takes no more.
    """

    def step(member: Members, frozen: Any, batch: Any) -> Members:
        tx = _optimizer(run, specs, steps, member.learning_rate, member.lr_ratio)
        single_step = make_step(losses.train, tx, accumulate=run.train.accumulate, skip_nonfinite=True)
        state = member.state.replace(rng=jax.random.wrap_key_data(member.state.rng))
        state, metrics = single_step(state, _with_scales(frozen, specs, member), batch)
        skipped = jnp.where(metrics["skipped"] > 0, member.skipped + 1, 0)
        alive = skipped < run.train.max_skipped
        return member.replace(state=state.replace(rng=member.state.rng), skipped=skipped, alive=alive)

    def step_if_alive(member: Members, frozen: Any, batch: Any) -> Members:
        return jax.lax.cond(member.alive, step, lambda member, *_: member, member, frozen, batch)

    return step_if_alive


def make_member_eval(evaluate: LossFn, specs: Specs) -> Callable[..., Any]:
    """`(member, frozen, batch) -> {name: (sum, weight)}`; zeros for a member that is not alive."""
    single_eval = make_eval(evaluate)

    def pairs(member: Members, frozen: Any, batch: Any) -> Any:
        return single_eval(member.state.trainable, _with_scales(frozen, specs, member), batch)

    def pairs_if_alive(member: Members, frozen: Any, batch: Any) -> Any:
        shapes = jax.eval_shape(pairs, member, frozen, batch)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.cond(member.alive, pairs, lambda *_: nothing, member, frozen, batch)

    return pairs_if_alive


def map_members(
    one: Callable[..., Any], mesh: Mesh, at_once: int, *, own_batch: bool, donate: bool
) -> jax.stages.Wrapped:
    """`(members, frozen, batch) -> results`: each device maps over its members, over one copy of the base.

    Args:
      one: for one member, `(member, frozen, batch) -> result`.
      mesh: its axis `"members"` splits them.
      at_once: how many a device computes side by side.
      own_batch: whether each member has a batch of its own, or all share one.
      donate: whether the members' memory is given away.
    """
    size = None if at_once == 1 else at_once

    def local(members: Members, frozen: Any, batch: Any) -> Any:
        if own_batch:
            return jax.lax.map(lambda pair: one(pair[0], frozen, pair[1]), (members, batch), batch_size=size)
        return jax.lax.map(lambda member: one(member, frozen, batch), members, batch_size=size)

    split, same = PartitionSpec(MEMBER_AXIS), PartitionSpec()
    specs = (split, same, split if own_batch else same)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
    shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
    return jax.jit(
        mapped,
        donate_argnums=0 if donate else (),
        in_shardings=shardings,
        out_shardings=NamedSharding(mesh, split),
    )


def fastest_batch_size(seconds: Callable[[int], float], most: int) -> int:
    """How many members at once take the least time each: 1, 2, 4 ... as long as it gets clearly shorter.

    Args:
      seconds: of one member's step when so many are computed at once; infinite where it does not fit.
      most: no more than this.

    >>> fastest_batch_size({1: 1.0, 2: 0.6, 4: 0.4, 8: 0.39}.get, 16)
    4
    """
    best, least = 1, seconds(1)
    while 2 * best <= most and (seconds_each := seconds(2 * best)) < MIN_SPEEDUP_SHARE * least:
        best, least = 2 * best, seconds_each
    return best


def _optimizer(
    run: SweepRun, specs: Specs, steps: int, learning_rate: jax.Array, lr_ratio: jax.Array
) -> LoRAPlusTransform:
    """A member's. Its rates are arrays, so that groups that differ in some member are apart in all."""
    return make_optimizer(
        run.shared_optimizer, None, steps, specs, learning_rate=learning_rate, lr_ratio=lr_ratio
    )


def _with_scales(frozen: Mapping[str, Any], specs: Specs, member: Members) -> dict[str, Any]:
    """The frozen variables with the member's scales."""
    return {**frozen, SCALE: scale_variables(specs, member.scales)}


def _initial_member(
    values: Callable[[int, int], Any], run: SweepRun, specs: Specs, steps: int, trial: Trial, seed: int
) -> Members:
    """A member before its first step: that of its single run."""
    config = run.settings_of(trial, seed).lora
    tx = _optimizer(run, specs, steps, jnp.float32(trial.learning_rate), jnp.float32(trial.lr_ratio))
    key = jax.random.fold_in(jax.random.key(seed), 1)
    state = init_state(values(trial.rank, seed), tx, jax.random.key_data(key))
    return _member(state, trial, {module: config.scale_of(module) for module in specs})


def _initial_values(
    run: SweepRun,
    directory: Path,
    data: TaskData,
    widest: AdaptedModel,
    weights: Mapping[str, Any],
    rank: int,
    seed: int,
) -> Any:
    """What a single run of the rank trains, before its first step, filled up with zeros to the largest rank.

    Zeros stay zero to the bit: the gradient of either factor is a product with the other one.
    """
    settings = run.settings_of(run.trials[0]._replace(rank=rank), seed)
    shapes = build_model(settings, directory, data.task, settings.applied)
    trainable = set_weights(settings, shapes, weights, settings.applied).trainable
    return jax.tree.map(_pad_to, trainable, widest.trainable)


def _member(state: TrainState, trial: Trial, scales: Mapping[str, float]) -> Members:
    return Members(
        state=state,
        learning_rate=np.float32(trial.learning_rate),
        lr_ratio=np.float32(trial.lr_ratio),
        scales={module: np.float32(scale) for module, scale in scales.items()},
        skipped=np.int32(0),
        alive=np.bool_(True),
    )


def _pad_to(leaf: Any, like: Any) -> np.ndarray:
    padding = [(0, wide - size) for size, wide in zip(leaf.shape, like.shape, strict=True)]
    return np.pad(np.asarray(leaf), padding)


def _compile_programs(
    run: SweepRun,
    data: TaskData,
    shapes: AdaptedModel,
    steps: int,
    mesh: Mesh,
    places: int,
    at_once: int | None,
) -> tuple[int, int, Programs]:
    """Members at once, members a call, and the programs; memory is checked."""
    compile_for = functools.cache(functools.partial(_programs, run, data, shapes, steps, mesh, places))
    device, per_device = mesh.devices.flat[0], -(-places // mesh.size)
    if at_once is None and skips_measurement(device):
        at_once = 1
    if at_once is None:
        at_once = fastest_batch_size(lambda size: _measured(*compile_for(size), mesh, size), per_device)
    chunk, programs = compile_for(at_once)
    check_memory(programs, device, len(mesh.local_devices))
    return at_once, chunk, programs


def _programs(
    run: SweepRun, data: TaskData, shapes: AdaptedModel, steps: int, mesh: Mesh, places: int, at_once: int
) -> tuple[int, Programs]:
    """Compiled from shapes alone; nothing else is compiled later."""
    losses = task_module(run).make_losses(run, data.task, shapes)
    step = make_member_step(run, losses, shapes.specs, steps)
    evaluate = make_member_eval(losses.evaluate, shapes.specs)
    chunk = mesh.size * (at_once if at_once > 1 else -(-places // mesh.size))
    members = jax.eval_shape(functools.partial(_zero_member, run, shapes, steps))
    members = jax.tree.map(lambda x: jax.ShapeDtypeStruct((chunk, *x.shape), x.dtype), members)

    def batch(size: tuple[int, ...], split: str) -> dict[str, jax.ShapeDtypeStruct]:
        columns = data.splits[split] | {"weight": np.ones(1, np.float32)}
        return {name: jax.ShapeDtypeStruct((*size, *x.shape[1:]), x.dtype) for name, x in columns.items()}

    train = map_members(step, mesh, at_once, own_batch=True, donate=True)
    test = map_members(evaluate, mesh, at_once, own_batch=False, donate=False)
    batches = batch((chunk, run.train.batch_size), "train")
    return chunk, Programs(
        train.lower(members, shapes.frozen, batches).compile(),
        test.lower(members, shapes.frozen, batch((run.train.eval_batch_size,), "validation")).compile(),
    )


def _zero_member(run: SweepRun, shapes: AdaptedModel, steps: int) -> Members:
    """A member of zeros, for its shapes."""
    trainable = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes.trainable)
    tx = _optimizer(run, shapes.specs, steps, jnp.float32(1.0), jnp.float32(1.0))
    state = init_state(trainable, tx, jax.random.key_data(jax.random.key(0)))
    return jax.tree.map(jnp.asarray, _member(state, run.trials[0], dict.fromkeys(shapes.specs, 1.0)))


def skips_measurement(device: Any) -> bool:
    """A CPU is busy with a single member, and takes more time and memory a member for several."""
    return device.platform == "cpu"


def _measured(chunk: int, programs: Programs, mesh: Mesh, at_once: int) -> float:
    """Seconds of a member's step, the best of three calls on zeros; infinite if it does not fit in memory."""
    try:
        check_memory(programs, mesh.devices.flat[0], len(mesh.local_devices))
    except ValueError:
        if at_once == 1:
            raise
        return float("inf")
    kinds, _ = programs.step.args_info
    members, frozen, batches = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), kinds)
    members = members.replace(alive=np.ones(chunk, bool))
    shardings, _ = programs.step.input_shardings
    members, frozen, batches = jax.device_put((members, frozen, batches), shardings)
    seconds = []
    for _ in range(4):  # the first one is slower
        start = time.perf_counter()
        members = jax.block_until_ready(programs.step(members, frozen, batches))
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]) / (chunk // mesh.size)
