"""Adapters that start from the base: made once, kept in the run, and taken off the base where the init says so."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.sharding import Mesh

from .._utils.multihost import gather_to_host
from ..adapter.config import LoRAPlusConfig
from ..adapter.lora import weight_delta
from ..adapter.spec import AdapterSpec, Specs
from ..adapter.tree import combine, flatten, rebox, replace_leaves, unflatten
from ..data.batches import train_batches
from ..inits.from_weights import MatrixPair, gradient_pair, olora_pair, pissa_pair, to_factors, to_matrix
from ..inits.loftq import loftq_pair
from ..interop.adapter_files import check_factors, load_adapter, read_adapter_json, save_adapter
from ..models.checkpoints.hf import check_params, read_leaf
from ..quantization.packed_array import is_packed
from ..settings.schema import Settings
from ..step.sharding import Shardings, local_rows, shard_batch
from ..tasks.interface import AdaptedModel, LossFn, TaskData
from .provenance import check_identity
from .run_directory import START

TAKEN_OFF = ("pissa", "olora", "lora_ga")
"""The inits whose s A B is taken off the base, so that the model starts as the base."""
GRADIENT_INITS = ("lora_ga", "lora_one")


def read_start(
    directory: Path, specs: Specs, metadata: Mapping[str, Any], allow: Sequence[str]
) -> dict[str, Any] | None:
    """The tree of factors that a run in this directory started from, if any.

    Args:
      directory: the run's directory.
      specs: the table of adapted weights.
      metadata: that of the current run; its base and data must be those that the start was made with.
      allow: parts of the identity that may differ, as in `--allow_different`.

    Raises:
      ValueError: the start is damaged, of other adapters, or was made with another base or other data.
    """
    path = directory / START
    if not path.exists():
        return None
    start = load_adapter(path).lora
    check_identity(path, read_adapter_json(path), metadata["identity"], weights=metadata["base"], allow=allow)
    check_factors(str(path), start, specs)
    return start


def write_start(
    directory: Path,
    start: Mapping[str, Any],
    specs: Specs,
    config: LoRAPlusConfig,
    metadata: Mapping[str, Any],
) -> None:
    """Writes the factors before the first step, for the run to resume with, unless they are there."""
    if not (directory / START).exists():
        notes = {name: metadata[name] for name in ("base", "identity")}
        save_adapter(directory / START, {"lora": start}, specs, config, **notes)


def make_start(
    settings: Settings, parts: AdaptedModel, directory: Path, gradients: Mapping[str, Any]
) -> dict[str, Any]:
    """Makes the tree of factors, float32, that `lora.init` starts from, one weight after the other.

    Args:
      settings: the settings, with an init of `BASE_INITS`.
      parts: the model, with its weights.
      directory: the base's files, which have the values before packing.
      gradients: the loss's gradient by each adapted weight, by the weight's path; for lora_ga and lora_one.

    Raises:
      ValueError: a rank is too large for the init, or only some layers of a stack are adapted.
    """
    config = settings.applied
    assert config is not None
    flat, lora = flatten(parts.frozen), {}
    by_leaf = {spec.leaf: (module, spec) for module, spec in parts.specs.items()}
    for leaf, weight in _weights(parts, directory, config, flat, by_leaf):
        module, spec = by_leaf[leaf]
        if config.init == "loftq" and not is_packed(meta.unbox(flat[leaf])):
            raise ValueError(
                f"lora.init loftq requires packed weights, but {leaf} is not: take it out of "
                "model.quantize_exclude, or set lora.init lora"
            )
        if spec.layers is not None:
            raise ValueError(
                f"lora.init {config.init} requires lora.layers_to_transform null, got {spec.layers}"
            )
        if config.init in TAKEN_OFF and 2 * spec.rank > min(spec.sides):
            raise ValueError(
                f"lora.rank must be at most {min(spec.sides) // 2} for lora.init {config.init}, half the smaller "
                f"side of {leaf}, since the saved adapter has twice the rank; got {spec.rank}"
            )
        pair = to_factors(*_pair(config, spec, weight, flat[leaf], gradients.get(leaf)), spec)
        lora |= dict(zip(spec.factor_paths(module), map(np.asarray, pair), strict=True))
    return unflatten(lora)


def _weights(
    parts: AdaptedModel, directory: Path, config: LoRAPlusConfig, flat: Mapping[str, Any], leaves: Mapping
) -> Iterator[tuple[str, np.ndarray]]:
    """The adapted weights on the host, one at a time; those of the files for loftq."""
    if config.init != "loftq":
        yield from ((leaf, gather_to_host(meta.unbox(flat[leaf]))) for leaf in leaves)
        return
    base, params = parts.base, combine(parts.trainable, parts.frozen)["params"]
    shapes, tensors = check_params(directory, base.table, params, new=base.new)
    for rule in base.table.rules:
        if (leaf := f"params/{rule.path}") in leaves:
            wide = jax.ShapeDtypeStruct(shapes[rule.path].shape, np.float32)
            yield leaf, read_leaf(rule, wide, tensors)


def _pair(
    config: LoRAPlusConfig, spec: AdapterSpec, weight: np.ndarray, leaf: Any, gradient: Any
) -> MatrixPair:
    if config.init == "pissa":
        return pissa_pair(to_matrix(weight, spec), spec, config.init_iterations)
    if config.init == "olora":
        return olora_pair(to_matrix(weight, spec), spec)
    if config.init == "loftq":
        packed = gather_to_host(jax.jit(lambda w: w.dequantize())(meta.unbox(leaf)))
        lost = weight - np.asarray(packed, np.float32)
        return loftq_pair(to_matrix(lost, spec), spec, config.init_iterations)
    return gradient_pair(gather_to_host(gradient), spec, config.init, config.init_iterations)


def first_gradients(
    settings: Settings,
    data: TaskData,
    parts: AdaptedModel,
    loss_fn: LossFn,
    mesh: Mesh,
    shardings: Shardings,
) -> dict[str, Any]:
    """The gradient by every adapted weight, by path, for the first micro-batch, before adapters have an effect.

    Takes the memory of these weights once more.
    """
    if settings.lora.init not in GRADIENT_INITS:
        return {}
    columns, size = data.splits["train"], settings.train.batch_size
    rows = local_rows(mesh, size)
    batch = next(train_batches(columns, batch_size=size, seed=settings.seed, rows=rows))
    count = len(rows) // settings.train.accumulate
    batch = shard_batch({name: column[:count] for name, column in batch.items()}, mesh)
    flat, places = flatten(parts.frozen), flatten(shardings.frozen)
    weights = {spec.leaf: flat[spec.leaf] for spec in parts.specs.values()}
    key = jax.random.fold_in(jax.random.key(settings.seed), 1)

    def loss(weights: Any, trainable: Any, frozen: Any, batch: Any, key: jax.Array) -> jax.Array:
        (total, weight), _ = loss_fn(combine(trainable, replace_leaves(frozen, weights)), batch, key)
        return total / weight

    out = {leaf: places[leaf] for leaf in weights}
    return jax.jit(jax.grad(loss), out_shardings=out)(weights, parts.trainable, parts.frozen, batch, key)


def begin_from(parts: AdaptedModel, start: Mapping[str, Any], config: LoRAPlusConfig) -> AdaptedModel:
    """The model with its adapters at the start, which is taken off the base if the init says so."""
    parts = parts._replace(trainable=parts.trainable | {"lora": jax.tree.map(jnp.asarray, dict(start))})
    if config.init not in TAKEN_OFF:
        return parts
    flat, factors, rest = flatten(parts.frozen), flatten(start), {}
    for module, spec in parts.specs.items():
        weight = meta.unbox(flat[spec.leaf])
        assert not is_packed(weight)
        a, b = (factors[path] for path in spec.factor_paths(module))
        rest[spec.leaf] = rebox(flat[spec.leaf], _take_off(weight, a, b, spec))
    return parts._replace(frozen=replace_leaves(parts.frozen, rest))


def _take_off(weight: jax.Array, a: Any, b: Any, spec: AdapterSpec) -> jax.Array:
    """W - s A B in W's dtype and sharding."""

    def rest(weight: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return (weight.astype(jnp.float32) - weight_delta(a, b, spec)).astype(weight.dtype)

    return jax.jit(rest, out_shardings=weight.sharding)(weight, a, b)
