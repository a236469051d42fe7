"""Orbax checkpoints of a training run: everything that training changes, without the frozen base.

A checkpoint contains the `TrainState`, the input position, and metadata that identifies the run; restoring rejects
a checkpoint of another run. Checksums cover all of it, since neither orbax nor tensorstore detects a changed byte
in an array.
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from .._utils.atomic import to_json, write_text
from .._utils.json_files import check_directory_files, check_link
from .._utils.multihost import allgather, is_lost_process
from .._utils.validation import check_int, join_first, suggest
from ..adapter.tree import leaves_by_path
from .fingerprints import fingerprint
from .run_metadata import field_differences
from .train_step import TrainState

ITEM_HANDLERS = {
    "state": ocp.StandardCheckpointHandler,
    **dict.fromkeys(("input_position", "metadata", "contents"), ocp.JsonCheckpointHandler),
}
"""The items of a checkpoint, one directory each, and their orbax handlers."""


class DamagedCheckpoint(Exception):
    """A checkpoint is damaged and cannot be read; an older one may be intact."""


class Restored(NamedTuple):
    """Result of `restore_checkpoint`.

    Attributes:
      state: `TrainState`, sharded as `like`.
      input_position: JSON value as saved; None if none was.
      metadata: dict from `describe_run`, as saved.
    """

    state: TrainState
    input_position: Any
    metadata: dict[str, Any]


def open_manager(
    directory: str | Path,
    *,
    keep: int = 2,
    best: str | None = None,
    mode: Literal["min", "max"] = "min",
) -> ocp.CheckpointManager:
    """Opens an orbax manager that saves atomically in the background and keeps the newest and the best checkpoints.

    Args:
      directory: directory of the checkpoints; created if missing.
      keep: number of newest checkpoints to keep.
      best: name of a metric passed to `save_checkpoint`; the checkpoint with the best value is kept as well. None
        keeps only the newest. A checkpoint with damaged metrics is never the best.
      mode: `"min"` if the smallest value is the best, `"max"` if the largest is.

    Returns:
      An `orbax.checkpoint.CheckpointManager`; as a context manager it closes itself.

    Raises:
      ValueError: `keep` is below 1, or checkpoints cannot be written to a directory of this name.
    """
    check_int("keep", keep, at_least=1)
    check_directory_name("directory", Path(directory))
    policies: list[Any] = [checkpoint_managers.LatestN(keep)]
    metric = functools.partial(_metric, best, mode) if best else None
    if metric is not None:
        best_one = {"get_metric_fn": metric, "reverse": mode == "min", "n": 1}
        policies.append(checkpoint_managers.BestN(**best_one, keep_checkpoints_without_metrics=False))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
        best_fn=metric,
        best_mode=mode,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
    )
    handlers: dict[str, Any] = {name: make() for name, make in ITEM_HANDLERS.items()}
    # Orbax globs in `finalize`. Its own path type would read [ * ? in the directory's name as part of the pattern.
    # Not by a subclass: orbax finds a handler's arguments by its exact class. Read in orbax-checkpoint 0.12.8.
    finalize = handlers["state"].finalize
    handlers["state"].finalize = lambda path: finalize(Path(path))
    return _Manager(Path(directory).absolute(), options=options, item_handlers=handlers)


def check_directory_name(name: str, directory: Path) -> None:
    """Raises ValueError for a URL, and for what tensorstore cannot write to: not UTF-8, or with a backslash."""
    if re.match("[a-z][a-z0-9]+:/", str(directory)):
        url = str(directory).replace(":/", "://", 1)  # pathlib drops a slash
        raise ValueError(f"{name} must be a directory of a mounted file system, got {url}")
    if wrong := re.search(r"[\\\ud800-\udfff]", directory.absolute().as_posix()):
        raise ValueError(f"{name} {str(directory.absolute())!r}: checkpoints do not support {wrong[0]!r}")


class _Manager(ocp.CheckpointManager):
    """An orbax manager that opens even if the timestamp or the metrics of a checkpoint are damaged."""

    # Private in orbax-checkpoint 0.12.8, called by `__init__`, `reload` and `all_steps`. The public switch against
    # reading damaged timestamps, `lightweight_initialize`, also leaves out the metrics by which the best is kept,
    # and `reload` ignores it. The date is for orbax's statistics only.
    def _load_checkpoint_infos(self, skip_metadata_read: bool = False) -> list[Any]:
        infos = super()._load_checkpoint_infos(skip_metadata_read=True)
        date = datetime.datetime.now(datetime.UTC)
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
        """The metrics as saved; None if they are missing or damaged."""
        try:
            _check_item(Path(self.directory, str(step), "metrics"))
            metrics = dict(super().metrics(step) or {})
            return metrics if metrics.pop("digest") == _digest([step, metrics]) else None
        except Exception:  # damaged bytes can raise anything: invalid JSON, invalid UTF-8, a wrong type
            return None


def _add_digest(step: int, metrics: Mapping[str, float]) -> dict[str, Any]:
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
    """Starts saving a state under its step. Copies the arrays before it returns, so training can continue.

    Args:
      manager: from `open_manager`; its `wait_until_finished()` and `close()` wait for the writing.
      state: what to save.
      metadata: from `describe_run`.
      input_position: JSON value that resuming needs beside the state, such as the position in the data.
      metrics: numbers by which the manager may select the best checkpoint.

    Raises:
      ValueError: the step already has a checkpoint, or the metric that selects the best one is missing.
    """
    step, fields = int(state.step), _to_fields(state)
    json_items = {"input_position": {"position": input_position}, "metadata": dict(metadata)}
    json_items["contents"] = {"leaves": leaf_dtypes_and_shapes(fields), "state": fingerprint(fields)}
    json_items["contents"]["notes"] = _digest(json_items)
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(fields),
        **{name: ocp.args.JsonSave(values) for name, values in json_items.items()},
    )
    # Forced: orbax skips without a word a step that is not newer than its latest.
    numbers = {name: x.item() if isinstance(x, jax.Array) else x for name, x in (metrics or {}).items()}
    manager.save(step, args=items, metrics=_add_digest(step, numbers) if numbers else None, force=True)


def read_metadata(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The metadata of a checkpoint, from `describe_run`; raises DamagedCheckpoint if it cannot be read."""
    return _read_json_items(manager, step)["metadata"]


def add_metrics(manager: ocp.CheckpointManager, step: int, metrics: Mapping[str, float]) -> None:
    """Adds the metrics of a pending evaluation to a checkpoint that was saved without metrics, atomically."""
    path = Path(manager.directory) / str(step) / "metrics" / "metrics"  # the file that orbax writes
    if jax.process_index() == 0:
        path.parent.mkdir(exist_ok=True)
        write_text(path, json.dumps(_add_digest(step, metrics)))
    # A barrier: no process reads before the file exists.
    allgather(None)
    manager.reload()


def restore_checkpoint(
    manager: ocp.CheckpointManager,
    like: TrainState,
    *,
    metadata: Mapping[str, Any],
    step: int | None = None,
) -> Restored:
    """Restores a checkpoint of the same run.

    Args:
      manager: from `open_manager`.
      like: a state with the structure, shapes and shardings of the result.
      metadata: from `describe_run`; every field except `versions` must equal the checkpoint's.
      step: by default the newest.

    Returns:
      A `Restored`: the state, the input position and the metadata.

    Raises:
      FileNotFoundError: the checkpoint does not exist.
      DamagedCheckpoint: the checkpoint cannot be read or has changed since it was saved.
      ValueError: the checkpoint belongs to another run; the message names the differing fields with both values.
    """
    step = manager.latest_step() if step is None else step
    if step is None or step not in manager.all_steps():
        raise FileNotFoundError(
            f"no checkpoint{'' if step is None else f' of step {step}'} in {manager.directory}"
        )
    json_items = _read_json_items(manager, step)
    leaves = json_items["contents"]["leaves"], leaf_dtypes_and_shapes(_to_fields(like))
    if differences := field_differences(json_items["metadata"], metadata) or field_differences(*leaves):
        raise ValueError(f"the checkpoint of step {step} does not match this run: {join_first(differences)}")

    def shape_and_sharding(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=getattr(leaf, "sharding", None))

    fields = _read(
        manager,
        step,
        lambda read: fingerprint(read["state"]) == json_items["contents"]["state"],
        state=ocp.args.StandardRestore(jax.tree.map(shape_and_sharding, _to_fields(like))),
    )["state"]
    state = jax.tree.map(lambda x, y: _wrap_key_data(x, y) if _is_key(x) else y, like, TrainState(**fields))
    return Restored(state, json_items["input_position"]["position"], json_items["metadata"])


def _metric(name: str, mode: str, metrics: Mapping[str, float | None]) -> float:
    """The metric to keep the best by; one that was not finite, which the file has as null, is the worst."""
    if name not in metrics:
        raise ValueError(f"metrics must contain {name!r}, which selects the best{suggest(name, metrics)}")
    value = metrics[name]
    return (math.inf if mode == "min" else -math.inf) if value is None else value


def _to_fields(state: TrainState) -> dict[str, Any]:
    """The state as orbax stores it: named fields, with keys as their data, since files have no key type."""
    data = jax.tree.map(lambda x: _key_data(x) if _is_key(x) else x, state)
    return {name: getattr(data, name) for name in ("trainable", "opt_state", "step", "rng")}


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_data(keys: Any) -> Any:
    is_shape = isinstance(keys, jax.ShapeDtypeStruct)
    return jax.eval_shape(jax.random.key_data, keys) if is_shape else jax.random.key_data(keys)


def _wrap_key_data(like: Any, data: jax.Array) -> jax.Array:
    """Keys of the type of `like`, which may be shapes."""
    if isinstance(like, jax.Array):
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like))
    names = ("threefry2x32", "rbg", "unsafe_rbg")
    impl = next(name for name in names if jax.random.key(0, impl=name).dtype == like.dtype)
    return jax.random.wrap_key_data(data, impl=impl)


def _read_json_items(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    names = ("input_position", "metadata", "contents")
    return _read(
        manager,
        step,
        lambda items: items["contents"].pop("notes") == _digest({name: items[name] for name in names}),
        **{name: ocp.args.JsonRestore() for name in names},
    )


def _read(
    manager: ocp.CheckpointManager, step: int, is_saved: Callable[[Any], bool], **items: Any
) -> dict[str, Any]:
    """Reads items of a checkpoint; raises DamagedCheckpoint on every process if one of them fails."""
    # Each process reads its own parts, so a single one may fail. The manager would leave the others waiting at its
    # barrier; its handlers have none. Orbax and tensorstore raise many types of errors.
    values, reason = {}, None
    try:
        directory = Path(manager.directory, str(step))
        for name in items:
            _check_item(directory / name)
        values = {
            name: ITEM_HANDLERS[name]().restore(directory / name, args=args) for name, args in items.items()
        }
        if not is_saved(values):
            reason = "the arrays or the metadata have changed since they were saved"
    except Exception as error:
        # Out of memory, or a lost process: the checkpoint is not to blame.
        if isinstance(error, MemoryError | jax.errors.JaxRuntimeError) or is_lost_process(error):
            raise
        reason = str(error).strip() or type(error).__name__
    for text in allgather(reason):
        if text is not None:
            raise DamagedCheckpoint(
                f"the checkpoint of step {step} in {manager.directory} cannot be read: "
                f"{text.splitlines()[0]:.200}"
            )
    return values


def _check_item(item: Path) -> None:
    """Raises ValueError unless the files of a checkpoint's item are regular and none is linked from elsewhere."""
    for path in (item.parent, item):
        check_link(path)
    check_directory_files(item)


def _digest(items: Any) -> str:
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()[:16]


def leaf_dtypes_and_shapes(tree: Any) -> dict[str, str]:
    """Dtype and shape of each leaf as text, such as `"float32 (2, 3)"`, by path."""
    leaves = leaves_by_path(tree)
    return {path: f"{jnp.dtype(leaf.dtype).name} {tuple(leaf.shape)}" for path, leaf in leaves.items()}
