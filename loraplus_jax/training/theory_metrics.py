"""The theory's terms as metrics of a run: when they are taken, on which rows, and what is read from them."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..config import LoRAPlusConfig
from ..data.batches import Batch
from ..lora import TERMS
from ..sharding import Shardings, batch_parts, batch_sharding, local_rows, with_mesh
from ..spec import Specs
from ..theory import make_theory, reading, terms_by_layer
from ..train_step import LossFn
from .metrics_log import LogRow

BATCH_FRACTION = 4
"""One row in so many of a batch is measured."""
METRIC_PREFIX = "theory"


def count_rows(batch_size: int, mesh: Mesh) -> int:
    """How many of a batch's rows are measured: a quarter, and a multiple of the parts that the mesh makes of it."""
    parts = batch_parts(mesh)
    return parts * math.ceil(batch_size / BATCH_FRACTION / parts)


def lower_theory(
    loss_fn: LossFn, specs: Specs, state: Any, frozen: Any, rows: Any, *, mesh: Mesh, shardings: Shardings
) -> jax.stages.Lowered:
    """`(trainable, before, frozen, batch) -> terms` before it is compiled; see `theory.make_theory`.

    Args:
      loss_fn, specs: as there.
      state, frozen, rows: shapes of the state, of the frozen variables and of the rows that are measured.
      mesh, shardings: as for `jit_step`.
    """
    trainable, whole = shardings.state.trainable, NamedSharding(mesh, PartitionSpec())
    places = (trainable, trainable["lora"], shardings.frozen, batch_sharding(mesh))
    measure = jax.jit(with_mesh(make_theory(loss_fn, specs), mesh), in_shardings=places, out_shardings=whole)
    return measure.lower(state.trainable, state.trainable["lora"], frozen, rows)


def is_due(every: int | None, step: int) -> bool:
    """Whether the step of this number, counted from 1, is measured."""
    return every is not None and step % every == 0


@jax.jit
def _copied(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def copy_adapters(trainable: Mapping[str, Any]) -> Any:
    """A copy of the adapters, which a step would give away."""
    return _copied(trainable["lora"])


def first_rows(batch: Batch, mesh: Mesh, batch_size: int) -> Batch:
    """The rows of a process's part of a batch that are measured."""
    count = len(local_rows(mesh, count_rows(batch_size, mesh)))
    return {name: column[:count] for name, column in batch.items()}


def to_metrics(found: Mapping[str, Mapping[str, Any]], specs: Specs) -> dict[str, float]:
    """`theory/LAYER/TERM` for every layer, and `theory/mean/TERM` over them."""
    layers = terms_by_layer(jax.device_get(found), specs)
    values = {
        f"{METRIC_PREFIX}/{path}/{name}": terms[name] for path, terms in layers.items() for name in TERMS
    }
    means = {
        f"{METRIC_PREFIX}/mean/{name}": float(np.mean([t[name] for t in layers.values()]))
        for name in TERMS
        if layers
    }
    return means | values


def read_metrics(rows: Iterable[LogRow], config: LoRAPlusConfig | None, from_adapter: bool) -> str | None:
    """`theory.reading` of the second half of a run's measurements; None without any.

    Args:
      rows: of the run's metrics.
      config: what is applied; None where nothing is.
      from_adapter: whether the run's first factors came from an adapter, and not from the config's `init`.
    """
    measured = [row for row in rows if any(name.startswith(f"{METRIC_PREFIX}/") for name in row)]
    if config is None or not measured:
        return None
    sums: dict[str, dict[str, float]] = {}
    for row in measured[len(measured) // 2 :]:
        for name, value in row.items():
            path, _, term = name.removeprefix(f"{METRIC_PREFIX}/").rpartition("/")
            if name.startswith(f"{METRIC_PREFIX}/") and path != "mean":
                layer = sums.setdefault(path, dict.fromkeys(TERMS, 0.0))
                layer[term] += value
    return reading(sums, config.lr_ratio, None if from_adapter else config.init)
