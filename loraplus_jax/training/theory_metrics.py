"""Theory terms as metrics of a run: when and on which rows they are measured, and their interpretation."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..adapter.config import LoRAPlusConfig
from ..adapter.spec import Specs
from ..adapter.taps import TERMS
from ..data.batches import Batch
from ..step.sharding import Shardings, batch_parts, batch_sharding, local_rows, with_mesh
from ..step.theory import balance, make_theory, terms_by_layer
from ..step.train_step import LossFn
from .metrics_log import LogRow

BATCH_FRACTION = 4
"""A measurement uses one in this many rows of a batch."""
METRIC_PREFIX = "theory"


def count_rows(batch_rows: int, mesh: Mesh) -> int:
    """The number of rows of a batch to measure: a quarter, rounded up to a multiple of the batch shards."""
    parts = batch_parts(mesh)
    return parts * math.ceil(batch_rows / BATCH_FRACTION / parts)


def lower_theory(
    loss_fn: LossFn, specs: Specs, state: Any, frozen: Any, rows: Any, *, mesh: Mesh, shardings: Shardings
) -> jax.stages.Lowered:
    """Lowers the measurement `(trainable, before, frozen, batch) -> terms` of `step.make_theory`, from shapes."""
    # Replicated terms can be read on every process; of a split array a process holds only a part.
    trainable, replicated = shardings.state.trainable, NamedSharding(mesh, PartitionSpec())
    inputs = (trainable, trainable["lora"], shardings.frozen, batch_sharding(mesh))
    measure = jax.jit(
        with_mesh(make_theory(loss_fn, specs), mesh), in_shardings=inputs, out_shardings=replicated
    )
    return measure.lower(state.trainable, state.trainable["lora"], frozen, rows)


@jax.jit
def copy_adapters(trainable: Mapping[str, Any]) -> Any:
    """Copies the adapters, since a step donates its state."""
    # Without jnp.copy, jit would return the buffers of its inputs, which the step then donates.
    return jax.tree.map(jnp.copy, trainable["lora"])


def first_rows(batch: Batch, mesh: Mesh, rows: int) -> Batch:
    """The rows to measure of this process's part of a batch; `rows` are those of the run's batches."""
    count = len(local_rows(mesh, count_rows(rows, mesh)))
    return {name: column[:count] for name, column in batch.items()}


def to_metrics(terms: Mapping[str, Mapping[str, Any]], specs: Specs) -> dict[str, float]:
    """Returns the metrics `theory/LAYER/TERM` of every layer and their means `theory/mean/TERM`."""
    layers = terms_by_layer(jax.device_get(terms), specs)
    metrics = {}
    if layers:
        for name in TERMS:
            mean = np.mean([layer[name] for layer in layers.values()])
            metrics[f"{METRIC_PREFIX}/mean/{name}"] = float(mean)
    for path, layer in layers.items():
        metrics |= {f"{METRIC_PREFIX}/{path}/{name}": layer[name] for name in TERMS}
    return metrics


def read_metrics(rows: Iterable[LogRow], config: LoRAPlusConfig | None, from_adapter: bool) -> str | None:
    """Returns `theory.balance` of the second half of a run's measurements, or None without measurements.

    `from_adapter` says whether the run started from an adapter's factors instead of the config's `init`.
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
    # Which factor is zero at first.
    known = config.init in ("lora", "he_uniform", "lora_b", "gaussian") and not from_adapter
    return str(balance(sums, config.lr_ratio, config.init if known else None))
