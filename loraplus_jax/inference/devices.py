"""The devices that a command computes on: the mesh of the run that it uses, of one process or several."""

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from .._utils.atomic import write_text
from .._utils.multihost import is_lead
from ..data.batches import digest
from ..settings.schema import MeshSettings
from ..step.sharding import AXES, DATA_AXIS, Shardings, check_tensor, distribute, make_mesh, make_shardings
from ..step.train_step import TrainState
from ..tasks.interface import AdaptedModel
from ..training.distributed import check_same_everywhere, raise_together

MeshSizes = Mapping[str, int] | None
"""Sizes by axis that replace those of a run's mesh, as in `{"data": 1, "fsdp": 8}`."""


def choose_mesh(trained: MeshSettings, changes: MeshSizes = None) -> Mesh:
    """Makes the mesh of a run; if the devices here are too few or too many for it, one of all of them.

    Prints the latter to stderr. A mesh with `changes` must fit the devices.

    Raises:
      ValueError: it does not.
    """
    sizes: dict[str, Any] = dataclasses.asdict(trained)
    if changes:
        sizes |= changes
        return make_mesh(**sizes)
    try:
        return make_mesh(**sizes)
    except ValueError:
        # All models can be split over fsdp, but not over tensor.
        axis = DATA_AXIS if trained.fsdp == trained.tensor == 1 else "fsdp"
    others: dict[str, Any] = dict.fromkeys(AXES, 1) | {axis: -1}
    mesh = make_mesh(**others)
    if is_lead():
        product = " x ".join(f"{name} {size}" for name, size in sizes.items())
        print(
            f"loraplus: the run's mesh {product} does not fit {mesh.size} devices; using {axis} {mesh.size} "
            "(choose another with --mesh.data, --mesh.fsdp and --mesh.tensor)",
            file=sys.stderr,
        )
    return mesh


def shardings_of(parts: AdaptedModel, mesh: Mesh) -> Shardings:
    """The shardings of a model on a mesh, those of training; its state has no optimizer."""
    state = TrainState(parts.trainable, (), (), ())  # pyright: ignore[reportArgumentType]
    return make_shardings(mesh, state, parts.frozen, specs=parts.specs, rules=parts.base.rules)


def to_mesh(parts: AdaptedModel, mesh: Mesh) -> AdaptedModel:
    """Moves the variables of a model to a mesh; what was loaded there is not copied."""
    check_tensor(mesh, parts.base.tensor_sizes)
    shardings = shardings_of(parts, mesh)
    return parts._replace(
        trainable=distribute(parts.trainable, shardings.state.trainable),
        frozen=distribute(parts.frozen, shardings.frozen),
    )


def check_same_rows(rows: Iterable[Any]) -> None:
    """Raises ValueError on every process unless all have read the same rows of JSON values."""
    if jax.process_count() > 1:
        check_same_everywhere({"data": digest(rows)})


def write_once(path: Path, text: str) -> None:
    """Writes a new file in the lead process; if that fails, every process raises the same error."""
    with raise_together():
        if is_lead():
            write_text(path, text, new=True)
