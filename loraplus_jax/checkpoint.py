"""Checkpoints of a training run with orbax: everything that changes, and never the frozen base.

A checkpoint holds the trainable variables, the optimizer's state, step and rng, the position in the input, and
metadata that says what they belong to: format version, config, specs, package versions and a fingerprint of the
base. Restoring compares it and refuses what does not fit. Checksums of all of it, the metrics included, lie beside
it, since neither orbax nor tensorstore would notice a changed byte of an array.
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from ._validation import check_int, suggest
from .atomic import to_json, write_text
from .config import LoRAPlusConfig
from .multihost import allgather, is_lost_process
from .spec import Specs, specs_to_json
from .train_step import TrainState
from .tree import leaves_by_path

FORMAT = 1
ITEM_HANDLERS = {
    "state": ocp.StandardCheckpointHandler,
    **dict.fromkeys(("input_position", "metadata", "contents"), ocp.JsonCheckpointHandler),
}
"""The items of a checkpoint, a directory each, and what reads and writes them."""
PACKAGES = ("loraplus_jax", "jax", "flax", "optax", "orbax-checkpoint")


class DamagedCheckpoint(Exception):
    """A checkpoint that cannot be read; an older one may do."""


class Restored(NamedTuple):
    """Result of `restore_checkpoint`.

    Attributes:
      state: the `TrainState`, placed as the one it was restored like.
      input_position: as it was saved.
      metadata: as it was saved.
    """

    state: TrainState
    input_position: Any
    metadata: dict[str, Any]


def describe_run(
    specs: Specs, config: LoRAPlusConfig | None, *, base: str | None = None, **more: Any
) -> dict[str, Any]:
    """The metadata saved with a checkpoint or an adapter, as plain JSON values.

    Args:
      specs: the table from `init_lora`.
      config: what was applied; None when the whole model is trained.
      base: `fingerprint` of the frozen variables.
      **more: the caller's own fields, JSON-able, compared on restore like the others.
    """
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "format": FORMAT,
        "config": None if config is None else config.to_json(),
        "specs": specs_to_json(specs),
        "base": base,
        "versions": versions,
        **more,
    }


def open_manager(
    directory: str | Path,
    *,
    keep: int = 2,
    best: str | None = None,
    mode: Literal["min", "max"] = "min",
) -> ocp.CheckpointManager:
    """An orbax manager that saves in the background, atomically, and keeps the newest and the best.

    Args:
      directory: made if absent.
      keep: how many of the newest to keep.
      best: the metric, of those given to `save_checkpoint`, by which one more is kept; None keeps none for its
        metric. A checkpoint whose metrics are damaged is never the best.
      mode: whether the best is the smallest or the largest.

    Raises:
      ValueError: `keep` below 1.
    """
    check_int("keep", keep, at_least=1)
    policies: list[Any] = [checkpoint_managers.LatestN(keep)]
    metric = functools.partial(_metric, best, mode) if best else None
    if metric is not None:
        policies.append(
            checkpoint_managers.BestN(
                get_metric_fn=metric, reverse=mode == "min", n=1, keep_checkpoints_without_metrics=False
            )
        )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
        best_fn=metric,
        best_mode=mode,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
    )
    handlers = {name: make() for name, make in ITEM_HANDLERS.items()}
    return _Manager(Path(directory).absolute(), options=options, item_handlers=handlers)


class _Manager(ocp.CheckpointManager):
    """Orbax's, except that all checkpoints can be opened though the date or the metrics of one are damaged."""

    def _load_checkpoint_infos(self, skip_metadata_read: bool = False) -> list[Any]:
        infos = super()._load_checkpoint_infos(skip_metadata_read=True)
        date = datetime.datetime.now(datetime.UTC)  # for orbax's statistics; no policy here needs it
        return [dataclasses.replace(info, time=date, metrics=self.metrics(info.step)) for info in infos]

    def __contextmanager__(self) -> Iterator["_Manager"]:
        # Closing would wait for a lost process, and its errors would hide the first one.
        try:
            yield self
        except BaseException as error:
            if not is_lost_process(error):
                with contextlib.suppress(Exception):
                    self.close()
            raise
        self.close()

    def metrics(self, step: int) -> Any:
        """As saved; None where they are absent or damaged."""
        try:
            metrics = dict(super().metrics(step) or {})
            return metrics if metrics.pop("digest") == _digest([step, metrics]) else None
        except Exception:  # absent, bad JSON, bad UTF-8, another type: whatever the bytes lead to
            return None


def _add_digest(step: int, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Metrics as orbax stores them; a value that is not finite is null."""
    values = json.loads(to_json(metrics))
    return {**values, "digest": _digest([step, values])}


def save_checkpoint(
    manager: ocp.CheckpointManager,
    state: TrainState,
    *,
    metadata: Mapping[str, Any],
    input_position: Any = None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Starts saving under the state's step; the arrays are copied before it returns, so training may go on.

    Args:
      manager: from `open_manager`; its `wait_until_finished()` and `close()` end the writing.
      state: what to save.
      metadata: from `describe_run`.
      input_position: JSON-able state of the input iterator, of the batch consumed last.
      metrics: numbers by which `open_manager` may keep the best.

    Raises:
      ValueError: there is a checkpoint of that step already, or the metric to keep the best by is missing.
    """
    step, fields = int(state.step), _to_fields(state)
    notes = {"input_position": {"position": input_position}, "metadata": dict(metadata)}
    notes["contents"] = {"leaves": leaf_dtypes_and_shapes(fields), "state": fingerprint(fields)}
    notes["contents"]["notes"] = _digest(notes)
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(fields),
        **{name: ocp.args.JsonSave(values) for name, values in notes.items()},
    )
    manager.save(step, args=items, metrics=_add_digest(step, metrics) if metrics else None, force=True)


def add_metrics(manager: ocp.CheckpointManager, step: int, metrics: Mapping[str, float]) -> None:
    """Gives a checkpoint that was saved without metrics those of an evaluation made up later, all or none."""
    path = Path(manager.directory) / str(step) / "metrics" / "metrics"  # where orbax keeps its own
    if jax.process_index() == 0:
        path.parent.mkdir(exist_ok=True)
        write_text(path, json.dumps(_add_digest(step, metrics)))
    allgather(None)  # no process reads before they are there
    manager.reload()


def restore_checkpoint(
    manager: ocp.CheckpointManager,
    like: TrainState,
    *,
    metadata: Mapping[str, Any],
    step: int | None = None,
) -> Restored:
    """Restores a checkpoint made by the same run.

    Args:
      manager: from `open_manager`.
      like: a state of the same structure, shapes and shardings.
      metadata: from `describe_run`; every field but `versions` must equal the checkpoint's.
      step: which checkpoint, the newest by default.

    Raises:
      FileNotFoundError: there is none.
      DamagedCheckpoint: it cannot be read, or is not what was saved.
      ValueError: the checkpoint does not fit; the message names the fields that differ, with both values.
    """
    step = manager.latest_step() if step is None else step
    if step is None or step not in manager.all_steps():
        raise FileNotFoundError(
            f"no checkpoint{'' if step is None else f' of step {step}'} in {manager.directory}"
        )
    names = ("input_position", "metadata", "contents")
    notes = _read(
        manager,
        step,
        lambda notes: notes["contents"].pop("notes") == _digest({name: notes[name] for name in names}),
        **{name: ocp.args.JsonRestore() for name in names},
    )
    leaves = notes["contents"]["leaves"], leaf_dtypes_and_shapes(_to_fields(like))
    if differing := field_differences(notes["metadata"], metadata) or field_differences(*leaves):
        raise ValueError(f"the checkpoint of step {step} does not fit: {join_first(differing)}")
    target = jax.tree.map(_shape_and_sharding, _to_fields(like))
    read = _read(
        manager,
        step,
        lambda read: fingerprint(read["state"]) == notes["contents"]["state"],
        state=ocp.args.StandardRestore(target),
    )
    return Restored(_from_fields(read["state"], like), notes["input_position"]["position"], notes["metadata"])


def field_differences(
    saved: Mapping[str, Any],
    given: Mapping[str, Any],
    places: tuple[str, str] = ("in the checkpoint", "here"),
    prefix: str = "",
) -> list[str]:
    """Which fields differ, innermost names and both values, package versions left aside.

    >>> field_differences({"config": {"rank": 8}}, {"config": {"rank": 4}})
    ['config.rank is 8 in the checkpoint and 4 here']
    """
    lines = []
    for name in dict.fromkeys((*saved, *given)):
        if not prefix and name == "versions":
            continue
        old, new = saved.get(name, "absent"), given.get(name, "absent")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += field_differences(old, new, places, f"{prefix}{name}.")
        elif json.dumps(old) != json.dumps(new):
            values = (f"{json.dumps(value)} {place}" for value, place in zip((old, new), places, strict=True))
            lines.append(f"{prefix}{name} is {' and '.join(values)}")
    return lines


def join_first(problems: Sequence[str]) -> str:
    """The first five problems and how many more there are."""
    rest = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
    return "; ".join([*problems[:5], *rest])


def fingerprint(tree: Any) -> str:
    """A short hex digest of a tree's paths, shapes, dtypes and bits, the same on any device layout.

    Every 32-bit word is hashed together with its index, and the hashes are summed on the device in integers: no
    weight is copied to the host, and the order of summation does not matter.
    """
    # One leaf at a time: of programs that run at once each process may start another first, and two processes that
    # wait for each other in different ones wait for ever.
    return digest_of_lines(
        {path: fingerprint_line(path, leaf) for path, leaf in leaves_by_path(tree).items()}
    )


def fingerprint_line(path: str, leaf: jax.Array) -> str:
    """What one leaf adds to the `fingerprint` of its tree, so that leaves may come one by one."""
    return f"{path} {leaf.shape} {leaf.dtype} {jax.device_get(_checksum(leaf)).tolist()}"


def digest_of_lines(lines: Mapping[str, str]) -> str:
    """The `fingerprint` of a tree from the lines of its leaves, by path."""
    return hashlib.sha256("\n".join(lines[path] for path in sorted(lines)).encode()).hexdigest()[:16]


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    """Two sums, uint32 `(2,)`, of hashes of the leaf's 32-bit words."""
    words = _to_uint32(leaf)
    index = jnp.arange(words.size, dtype=jnp.uint32).reshape(words.shape)
    return jnp.stack([jnp.sum(_hash_words(words, index, seed), dtype=jnp.uint32) for seed in (1, 2)])


def _to_uint32(leaf: jax.Array) -> jax.Array:
    """The bits of a leaf as uint32; narrower values one a word, wider ones in several."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.iscomplexobj(leaf):
        leaf = jnp.stack([leaf.real, leaf.imag])
    if leaf.dtype == bool or jnp.issubdtype(leaf.dtype, jnp.integer):
        leaf = leaf.astype(jnp.int8) if leaf.dtype.itemsize == 1 else leaf
    width = min(32, 8 * leaf.dtype.itemsize)
    return jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{width}")).astype(jnp.uint32)


def _hash_words(words: jax.Array, index: jax.Array, seed: int) -> jax.Array:
    """A hash of each word and its index: two rounds of multiply and shift, as in murmur3's finalizer."""
    h = words ^ (index * jnp.uint32(0x9E3779B9) + jnp.uint32(seed))
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        h = (h ^ (h >> 16)) * jnp.uint32(factor)
    return h ^ (h >> 15)


def _metric(name: str, mode: str, metrics: Mapping[str, float | None]) -> float:
    """The metric to keep the best by; one that was not finite is the worst."""
    if name not in metrics:
        raise ValueError(
            f"the manager keeps the best {name!r}, which is not in the metrics{suggest(name, metrics)}"
        )
    value = metrics[name]
    return (math.inf if mode == "min" else -math.inf) if value is None else value


def _to_fields(state: TrainState) -> dict[str, Any]:
    """The state as orbax stores it: named fields, the key as its data."""
    fields = {name: getattr(state, name) for name in ("trainable", "opt_state", "step", "rng")}
    if jnp.issubdtype(state.rng.dtype, jax.dtypes.prng_key):
        fields["rng"] = jax.random.key_data(state.rng)
    return fields


def _from_fields(fields: Mapping[str, Any], like: TrainState) -> TrainState:
    state = TrainState(**fields)
    if jnp.issubdtype(like.rng.dtype, jax.dtypes.prng_key):
        return state.replace(rng=jax.random.wrap_key_data(state.rng, impl=jax.random.key_impl(like.rng)))
    return state


def _read(
    manager: ocp.CheckpointManager, step: int, is_saved: Callable[[Any], bool], **items: Any
) -> dict[str, Any]:
    """Reads items of a checkpoint; orbax and tensorstore raise many kinds of errors for a damaged one.

    Each process reads its own parts, and a single one may fail. The manager would leave the others at its barrier;
    its handlers, which are called here, have no barrier, and afterwards every process raises the same error.
    """
    values, reason = {}, None
    try:
        directory = manager.directory / str(step)
        values = {
            name: ITEM_HANDLERS[name]().restore(directory / name, args=args) for name, args in items.items()
        }
        if not is_saved(values):
            reason = "the arrays, or what is noted beside them, are not those that were saved"
    except Exception as error:
        # Out of memory, or a lost process: the checkpoint is not to blame.
        if isinstance(error, MemoryError | jax.errors.JaxRuntimeError) or is_lost_process(error):
            raise
        reason = str(error).strip() or type(error).__name__
    for words in allgather(reason):
        if words is not None:
            raise DamagedCheckpoint(
                f"the checkpoint of step {step} in {manager.directory} cannot be read: "
                f"{words.splitlines()[0]:.200}"
            )
    return values


def _digest(notes: Any) -> str:
    """A short hex digest of JSON values, the same before writing and after reading."""
    return hashlib.sha256(json.dumps(notes).encode()).hexdigest()[:16]


def _shape_and_sharding(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=getattr(leaf, "sharding", None))


def leaf_dtypes_and_shapes(tree: Any) -> dict[str, str]:
    """Path to dtype and shape as text, such as `"float32 (2, 3)"`."""
    leaves = leaves_by_path(tree)
    return {path: f"{jnp.dtype(leaf.dtype).name} {tuple(leaf.shape)}" for path, leaf in leaves.items()}
