"""Trains many runs as one program: members differ in rates, lambda, scale, rank and seed and share one frozen base.

All differences are inputs of the program, so one compilation serves every member. A member trains as its single run
would: same step function, initial values, batches and dropout keys.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..adapter.config import BASE_INITS
from ..adapter.lora import SCALE, scale_variables
from ..adapter.spec import Specs
from ..data.fetch import resolve
from ..models.checkpoints.hf import check_params, load_params
from ..optim.lora_plus import LoRAPlusTransform
from ..settings.schema import split_settings
from ..step.checkpoint import describe_run
from ..step.fingerprints import fingerprint
from ..step.sharding import make_mesh, replicate
from ..step.train_step import LossFn, TrainState, init_state, make_eval, make_step
from ..tasks.interface import AdaptedModel, Losses, TaskData, row_count
from ..training.adapter_start import begin_from, make_start
from ..training.memory import check_memory
from ..training.optimizer import check_rates, make_optimizer
from ..training.provenance import model_identity
from ..training.setup import build_model, count_steps, params_of, set_weights, start_magnitudes, task_module
from ..training.xla import one_thread_per_device
from .halving import check_rungs
from .settings import SweepRun, Trial

MEMBER_AXIS = "members"
"""Mesh axis that splits the members."""
MIN_SPEEDUP_SHARE = 0.95
"""Doubling the parallel members must cut the time per member to less than this share of the former time."""


class Members(struct.PyTreeNode):
    """One run, or several stacked along the first axis of every leaf.

    Attributes:
      state: training state; `rng` holds the key's data, uint32.
      learning_rate: peak eta_A, float32.
      lr_ratio: lambda, float32.
      scales: adapted module's path to its scale s, float32.
      skipped: consecutive skipped steps, int32.
      alive: whether the member still trains; false for empty slots and diverged members.
    """

    state: TrainState
    learning_rate: Any
    lr_ratio: Any
    scales: dict[str, Any]
    skipped: Any
    alive: Any


class Programs(NamedTuple):
    """Compiled programs for one chunk of members.

    Attributes:
      at_once: members that a device computes in parallel.
      chunk: members per program call.
      eval_batch_size: examples per evaluation batch.
      step: `(members, frozen, batches) -> members`, one batch per member.
      evaluate: `(members, frozen, batch) -> {name: (sums, weights)}`, one batch for all members.
    """

    at_once: int
    chunk: int
    eval_batch_size: int
    step: Any
    evaluate: Any


class Population(NamedTuple):
    """Everything a sweep trains with.

    Attributes:
      run: settings of the sweep.
      data: data of the sweep.
      parts: the model with adapters of the largest rank.
      steps: optimizer steps of a full run.
      mesh: the devices, along the axis `"members"`.
      programs: the compiled step and evaluation for all members.
      programs_for: maps a number of members to the programs that compute them with the fewest empty slots.
      first: maps `(trial, seed)` to the initial member.
      metadata: metadata of the checkpoints.
    """

    run: SweepRun
    data: TaskData
    parts: AdaptedModel
    steps: int
    mesh: Mesh
    programs: Programs
    programs_for: Callable[[int], Programs]
    first: Callable[[Trial, int], Members]
    metadata: dict[str, Any]


class AbstractPopulation(NamedTuple):
    """A population before weights are read; `shapes` is the model of the largest rank with shapes as variables."""

    directory: Path
    data: TaskData
    steps: int
    widest: SweepRun
    shapes: AdaptedModel


def abstract_population(run: SweepRun, loaded: TaskData | None = None) -> AbstractPopulation:
    """Downloads model and data, and checks that they, the steps, the adapters and the rates fit together.

    Args:
      run: settings of the sweep.
      loaded: its data, if already loaded.
    """
    directory = resolve(run.model.path, "model")
    data = task_module(run).load_data(run, directory) if loaded is None else loaded
    if "test" not in data.splits:
        raise ValueError(
            "a sweep selects on the validation split and reports on the test split; set data.test with "
            "data.train, or data.test_fraction with data.path"
        )
    steps = count_steps(run, row_count(data.splits["train"]))
    check_rungs(run.sweep, steps, run.optimizer.warmup_steps)
    widest = dataclasses.replace(run, lora=dataclasses.replace(run.lora, rank=max(run.ranks)))
    shapes = build_model(widest, directory, data.task, widest.applied)
    tx = make_optimizer(run.shared_optimizer, widest.lr_ratio, steps, shapes.specs)
    check_rates(run.optimizer, tx, shapes.trainable)
    check_params(directory, shapes.base.table, params_of(shapes), new=shapes.base.new)
    return AbstractPopulation(directory, data, steps, widest, shapes)


def prepare_population(run: SweepRun, places: int, at_once: int | None = None) -> Population:
    """Downloads, checks, compiles and loads everything, as `prepare` does for a single run.

    Args:
      run: settings of the sweep.
      places: maximum number of members.
      at_once: members that a device computes in parallel; None measures which number is fastest.

    Raises:
      ValueError, OSError: settings, model and data do not match, memory is too small, or a file cannot be read.
    """
    devices = make_mesh(run.mesh.data).devices.reshape(-1)
    mesh = Mesh(devices, (MEMBER_AXIS,))
    directory, data, steps, widest, shapes = abstract_population(run)
    config = widest.applied
    programs, programs_for = _compile_programs(run, data, shapes, steps, mesh, places, at_once)
    weights = load_params(directory, shapes.base.table, params_of(shapes), new=shapes.base.new)
    # Of all weights: members begin with them in both stages, with what is trained in full too.
    base = fingerprint(weights)
    parts = set_weights(widest, shapes, weights)
    parts = parts._replace(frozen=replicate(mesh, parts.frozen))
    start = None
    if config is not None and config.init in BASE_INITS:
        start = make_start(widest, parts, directory, {})
        parts = begin_from(parts, start, config)
    values = functools.cache(functools.partial(_initial_values, run, directory, data, parts, weights, start))
    first = functools.partial(_initial_member, values, run, parts.specs, steps)
    metadata = describe_run(
        parts.specs,
        config,
        base=base,
        settings=split_settings(run.to_json(), "", run.resumable_fields)[0],
        task=data.task.notes(),
        identity=model_identity(run, directory, data.task) | {"data": data.digests},
        **({} if start is None else {"start": fingerprint(start)}),
    )
    return Population(run, data, parts, steps, mesh, programs, programs_for, first, metadata)


def make_member_step(run: SweepRun, losses: Losses, specs: Specs, steps: int) -> Callable[..., Members]:
    """Returns `(member, frozen, batch) -> member`: a single run's step, with rates and scales as traced values.

    After `train.max_skipped` consecutive skipped steps (non-finite loss or gradient) a member stops training.
    """

    def step(member: Members, frozen: Any, batch: Any) -> Members:
        tx = _optimizer(run, specs, steps, member.learning_rate, member.lr_ratio)
        single_step = make_step(losses.train, tx, accumulate=run.train.accumulate, skip_nonfinite=True)
        state = member.state.replace(rng=jax.random.wrap_key_data(member.state.rng))
        state, metrics = single_step(state, add_scales(frozen, specs, member), batch)
        skipped = jnp.where(metrics["skipped"] > 0, member.skipped + 1, 0)
        alive = skipped < run.train.max_skipped
        return member.replace(state=state.replace(rng=member.state.rng), skipped=skipped, alive=alive)

    def step_if_alive(member: Members, frozen: Any, batch: Any) -> Members:
        return jax.lax.cond(member.alive, step, lambda member, *_: member, member, frozen, batch)

    return step_if_alive


def make_member_eval(evaluate: LossFn, specs: Specs) -> Callable[..., Any]:
    """Returns `(member, frozen, batch) -> {name: (sum, weight)}`, zeros for a member that is not alive."""
    single_eval = make_eval(evaluate)

    def pairs(member: Members, frozen: Any, batch: Any) -> Any:
        return single_eval(member.state.trainable, add_scales(frozen, specs, member), batch)

    def pairs_if_alive(member: Members, frozen: Any, batch: Any) -> Any:
        shapes = jax.eval_shape(pairs, member, frozen, batch)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.cond(member.alive, pairs, lambda *_: zeros, member, frozen, batch)

    return pairs_if_alive


def map_members(
    one: Callable[..., Any], mesh: Mesh, at_once: int, *, own_batch: bool, donate: bool
) -> jax.stages.Wrapped:
    """Jits `(members, frozen, batch) -> results`: each device maps over its members, sharing one copy of the base.

    Args:
      one: the function of one member, `(member, frozen, batch) -> result`.
      mesh: devices; the axis `"members"` splits the members.
      at_once: members that a device computes in parallel.
      own_batch: whether each member has its own batch, or all share one.
      donate: whether to donate the members' buffers.
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


def _optimizer(
    run: SweepRun, specs: Specs, steps: int, learning_rate: jax.Array, lr_ratio: jax.Array
) -> LoRAPlusTransform:
    """A member's optimizer.

    Rates are arrays, so parameter groups whose rates differ in any member stay separate in every member.
    """
    return make_optimizer(run.shared_optimizer, lr_ratio, steps, specs, learning_rate=learning_rate)


def add_scales(frozen: Mapping[str, Any], specs: Specs, member: Members) -> dict[str, Any]:
    """Frozen variables plus the member's scales."""
    return {**frozen, SCALE: scale_variables(specs, member.scales)}


def _initial_member(
    values: Callable[[int, int], Any], run: SweepRun, specs: Specs, steps: int, trial: Trial, seed: int
) -> Members:
    """A member before its first step, in the initial state of its single run."""
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
    start: Mapping[str, Any] | None,
    rank: int,
    seed: int,
) -> Any:
    """Initial trainable values of a single run of this rank, zero-padded to the largest rank.

    The padding stays bitwise zero: the gradient of either factor is a product with the other factor.
    """
    settings = run.settings_of(run.trials[0]._replace(rank=rank), seed)
    shapes = build_model(settings, directory, data.task, settings.applied)
    trainable = start_magnitudes(set_weights(settings, shapes, weights)).trainable
    if start is not None:
        trainable = trainable | {"lora": start}
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
    capacity: int,
    at_once: int | None,
) -> tuple[Programs, Callable[[int], Programs]]:
    """Returns the programs for all members and those for a number of members; checks that they fit in memory."""
    compile_step = functools.cache(functools.partial(_compile_step, run, data, shapes, steps, mesh, capacity))
    compile_evaluation = functools.partial(_compile_evaluation, run, data, shapes, steps, mesh)
    device, per_device = mesh.devices.flat[0], -(-capacity // mesh.size)
    if at_once is None and skips_measurement(device):
        at_once = 1
    if at_once is None:
        at_once = fastest_batch_size(lambda size: _measured(compile_step(size), mesh, size), per_device)
    rows = [row_count(data.splits[name]) for name in ("validation", "test")]

    @functools.cache
    def compile_for(size: int) -> Programs:
        step, chunk = compile_step(size), _chunk_of(size, capacity, mesh)
        compile_eval = functools.cache(functools.partial(compile_evaluation, chunk, size))
        examples = run.train.eval_batch_size
        if not skips_measurement(device):
            room = step.memory_analysis().temp_size_in_bytes
            examples = largest_eval_batch(
                examples, rows, room, lambda n: compile_eval(n).memory_analysis().temp_size_in_bytes
            )
        programs = Programs(size, chunk, examples, step, compile_eval(examples))
        check_memory((programs.step, programs.evaluate), device, len(mesh.local_devices))
        return programs

    return compile_for(at_once), lambda count: compile_for(parallel_members(count, at_once, mesh.size))


def parallel_members(count: int, most: int, devices: int) -> int:
    """Members that a device computes in parallel if `count` remain: no more than it takes, in powers of two.

    A call computes all its slots, so a program for many members would compute mostly empty ones after a rung.

    >>> [parallel_members(count, 8, 1) for count in (32, 8, 3, 1)], parallel_members(4, 8, 2)
    ([8, 8, 4, 1], 2)
    """
    each = -(-count // devices)
    return min(most, 1 << (each - 1).bit_length())


def largest_eval_batch(size: int, rows: Sequence[int], room: int, temporary: Callable[[int], int]) -> int:
    """The largest evaluation batch that needs no more temporary memory than the step, which does not run with it.

    Only powers of two times `size` that pad the splits the least are considered. The size for the room is estimated
    as proportional to the memory of `size`, then checked.

    Args:
      size: the configured examples per evaluation batch.
      rows: rows of each split.
      room: bytes of temporary memory of the step.
      temporary: maps a batch size to the bytes of temporary memory of its evaluation.

    >>> largest_eval_batch(64, [1004, 2008], 1000, lambda size: 2 * size)
    256
    """

    def computed(examples: int) -> int:
        return sum(-(-count // examples) * examples for count in rows)

    doublings = max(room // max(temporary(size), 1), 1).bit_length()
    fits = [size, *(size << n for n in range(1, doublings) if size << n < 2 * max(rows))]
    best = min(fits, key=lambda examples: (computed(examples), -examples))
    return best if best == size or temporary(best) <= room else size


def _chunk_of(at_once: int, capacity: int, mesh: Mesh) -> int:
    """Members per program call."""
    return mesh.size * (at_once if at_once > 1 else -(-capacity // mesh.size))


def _compile_step(
    run: SweepRun, data: TaskData, shapes: AdaptedModel, steps: int, mesh: Mesh, capacity: int, at_once: int
) -> Any:
    """Compiles the step of one call from shapes."""
    losses = task_module(run).make_losses(run, data.task, shapes)
    step = make_member_step(run, losses, shapes.specs, steps)
    chunk = _chunk_of(at_once, capacity, mesh)
    train = map_members(step, mesh, at_once, own_batch=True, donate=True)
    batches = _batch_shapes(data, (chunk, run.train.batch_size), "train")
    lowered = train.lower(_member_shapes(run, shapes, steps, chunk), shapes.frozen, batches)
    return lowered.compile(one_thread_per_device(mesh))


def _compile_evaluation(
    run: SweepRun,
    data: TaskData,
    shapes: AdaptedModel,
    steps: int,
    mesh: Mesh,
    chunk: int,
    at_once: int,
    examples: int,
) -> Any:
    """Compiles the evaluation of one call on a batch of `examples` from shapes."""
    losses = task_module(run).make_losses(run, data.task, shapes)
    test = map_members(
        make_member_eval(losses.evaluate, shapes.specs), mesh, at_once, own_batch=False, donate=False
    )
    batch = _batch_shapes(data, (examples,), "validation")
    lowered = test.lower(_member_shapes(run, shapes, steps, chunk), shapes.frozen, batch)
    return lowered.compile(one_thread_per_device(mesh))


def _member_shapes(run: SweepRun, shapes: AdaptedModel, steps: int, chunk: int) -> Members:
    members = jax.eval_shape(functools.partial(_zero_member, run, shapes, steps))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((chunk, *x.shape), x.dtype), members)


def _batch_shapes(data: TaskData, size: tuple[int, ...], split: str) -> dict[str, jax.ShapeDtypeStruct]:
    columns = data.splits[split] | {"weight": np.ones(1, np.float32)}
    return {name: jax.ShapeDtypeStruct((*size, *x.shape[1:]), x.dtype) for name, x in columns.items()}


def _zero_member(run: SweepRun, shapes: AdaptedModel, steps: int) -> Members:
    """A member of zeros; only its shapes matter."""
    trainable = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes.trainable)
    tx = _optimizer(run, shapes.specs, steps, jnp.float32(1.0), jnp.float32(1.0))
    state = init_state(trainable, tx, jax.random.key_data(jax.random.key(0)))
    return jax.tree.map(jnp.asarray, _member(state, run.trials[0], dict.fromkeys(shapes.specs, 1.0)))


def skips_measurement(device: Any) -> bool:
    """True on a CPU: one member keeps it busy, and several in parallel cost more time and memory each."""
    return device.platform == "cpu"


def _measured(step: Any, mesh: Mesh, at_once: int) -> float:
    """Seconds per member step, best of three calls on zeros; infinite if it does not fit in memory."""
    try:
        check_memory((step,), mesh.devices.flat[0], len(mesh.local_devices))
    except ValueError:
        if at_once == 1:
            raise
        return float("inf")
    shapes, _ = step.args_info
    members, frozen, batches = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    chunk = len(members.alive)
    shardings, _ = step.input_shardings
    members, frozen, batches = jax.device_put((members, frozen, batches), shardings)
    seconds = []
    for _ in range(4):  # the first call is slower and is dropped
        # Zeros have no finite loss, so a member would stop after train.max_skipped steps and take no time.
        fresh = {"alive": np.ones(chunk, bool), "skipped": np.zeros(chunk, np.int32)}
        members = members.replace(
            **{name: jax.device_put(value, getattr(shardings[0], name)) for name, value in fresh.items()}
        )
        start = time.perf_counter()
        members = jax.block_until_ready(step(members, frozen, batches))
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]) / (chunk // mesh.size)
