"""Adapters that start from the base: made once, kept in the run, and subtracted from it if the init says so."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from .._utils.multihost import gather_to_host
from ..adapter.config import BASE_INITS, LoRAPlusConfig
from ..adapter.spec import Specs
from ..adapter.tree import combine, factors_by_module, flatten, replace_leaves
from ..inits.from_weights import as_difference, make_factors, subtract_start
from ..interop.adapter_directory import load_adapter, save_adapter
from ..models.checkpoints.model_files import ModelFiles
from ..models.checkpoints.params import check_params, read_leaf
from ..quantization.packed_array import PackedArray, is_packed
from ..step.sharding import shard_batch, take_local
from ..tasks.interface import AdaptedModel
from .programs import AbstractRun
from .run_files import START


def read_start(directory: Path, specs: Specs) -> dict[str, Any] | None:
    """The tree of factors that a run in this directory started from, if any.

    Raises:
      ValueError: it is damaged, or of other adapters.
    """
    path = directory / START
    if not path.exists():
        return None
    start = load_adapter(path).lora
    factors_by_module(str(path), start, specs)
    return start


def write_start(
    directory: Path,
    start: Mapping[str, Any],
    specs: Specs,
    config: LoRAPlusConfig | None,
    origin: Mapping[str, Any],
) -> None:
    """Writes the factors before the first step, for the run to resume with, unless they are there.

    `origin` says of which base they are, for a run with `init_adapter`.
    """
    if not (directory / START).exists():
        save_adapter(directory / START, {"lora": start}, specs, config, **origin)


def saved_form(
    trained: dict[str, Any], specs: Specs, config: LoRAPlusConfig | None, start: Mapping[str, Any] | None
) -> tuple[dict[str, Any], Specs, LoRAPlusConfig | None, Mapping[str, Any] | None]:
    """Trained values, specs, config and start to save an adapter with, so that it fits the original base."""
    init = None if config is None else BASE_INITS.get(config.init)
    if config is None or init is None or start is None:
        return trained, specs, config, start
    if init.subtracted:
        lora, specs, config = as_difference(trained["lora"], start, specs, config)
        return trained | {"lora": lora}, specs, config, None
    # The start of lora_one is a step of training: nothing is subtracted from the base.
    return trained, specs, config, None if config.init == "lora_one" else start


def make_start(
    config: LoRAPlusConfig, parts: AdaptedModel, files: ModelFiles, gradients: Mapping[str, Any]
) -> dict[str, Any]:
    """Makes the tree of factors, float32, that an init of `BASE_INITS` starts from; see `make_factors`.

    Args:
      config, parts: the adapters' config and the model, with its weights.
      files: the base's files, which have the values before packing.
      gradients: the loss's gradient by each adapted weight, by the weight's path; for lora_ga and lora_one.
    """
    flat, init = flatten(parts.frozen), BASE_INITS[config.init]
    for spec in parts.specs.values():
        if config.init == "loftq" and not is_packed(meta.unbox(flat[spec.leaf])):
            raise ValueError(
                f"lora.init loftq requires quantized weights, but {spec.leaf} is not: take it out of "
                "model.quantize_exclude, or set lora.init lora"
            )
        if spec.layers is not None:
            raise ValueError(
                f"lora.init {config.init} requires lora.layers_to_transform null, got {spec.layers}"
            )
        if init.subtracted and 2 * spec.rank > min(spec.sides):
            raise ValueError(
                f"lora.rank must be at most {min(spec.sides) // 2} for lora.init {config.init}, half the smaller "
                f"side of {spec.leaf}, since the saved adapter has twice the rank; got {spec.rank}"
            )
    arrays = gradients if init.source == "gradients" else flat
    read = lambda leaf: meta.unbox(arrays[leaf])  # noqa: E731
    if init.source == "quantization errors":
        read = _read_errors(parts, files)
    return make_factors(config.init, parts.specs, read, iterations=config.init_iterations)


def _read_errors(parts: AdaptedModel, files: ModelFiles) -> Callable[[str], np.ndarray]:
    """Returns a function that reads a weight of the files, less the packed values, by its path."""
    base, params = parts.base, combine(parts.trainable, parts.frozen)["params"]
    _, tensors = check_params(files, base.table, params, new=base.new)
    rules = {f"params/{rule.path}": rule for rule in base.table.rules}
    flat, dequantize = flatten(parts.frozen), jax.jit(PackedArray.dequantize)

    def read(leaf: str) -> np.ndarray:
        packed = gather_to_host(dequantize(meta.unbox(flat[leaf])))
        wide = jax.ShapeDtypeStruct(packed.shape, np.float32)
        return read_leaf(rules[leaf], wide, tensors) - np.asarray(packed, np.float32)

    return read


def first_gradients(run: AbstractRun, parts: AdaptedModel, init: str, seed: int) -> dict[str, Any]:
    """The gradient by every adapted weight, by path, for the first micro-batch, before adapters have an effect."""
    if BASE_INITS[init].source != "gradients":
        return {}
    problem, mesh = run.problem, run.mesh
    assert problem.batch is not None
    batch = take_local(problem.batch(seed, 0), mesh)
    count = len(batch["weight"]) // problem.accumulate
    batch = shard_batch({name: column[:count] for name, column in batch.items()}, mesh)
    flat, places = flatten(parts.frozen), flatten(run.shardings.frozen)
    weights = {spec.leaf: flat[spec.leaf] for spec in parts.specs.values()}
    key = jax.random.fold_in(jax.random.key(seed), 1)

    # The weights are an argument of their own: jax.grad by all of `frozen` would need its memory once more.
    def loss(weights: Any, trainable: Any, frozen: Any, batch: Any, key: jax.Array) -> jax.Array:
        (total, weight), _ = problem.unbounded_loss(
            combine(trainable, replace_leaves(frozen, weights)), batch, key
        )
        return total / weight

    # Sharded like the weights; where this is left to XLA, each device may hold all of a gradient.
    out = {leaf: places[leaf] for leaf in weights}
    return jax.jit(jax.grad(loss), out_shardings=out)(weights, parts.trainable, parts.frozen, batch, key)


def begin_from(parts: AdaptedModel, start: Mapping[str, Any], config: LoRAPlusConfig) -> AdaptedModel:
    """The model with its adapters at the start, which is subtracted from the base if the init says so."""
    # A copy: training takes the memory of these, and the start is saved with the adapter.
    trainable = parts.trainable | {"lora": jax.tree.map(lambda x: jnp.array(np.asarray(x)), dict(start))}
    frozen = subtract_start(config.init, parts.frozen, start, parts.specs)
    return parts._replace(trainable=trainable, frozen=frozen)
