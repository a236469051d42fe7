"""From settings to everything a run needs: data, model, adapters, optimizer. Nothing is written here."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from tokenizers import Tokenizer

from ..adapt import apply_lora_plus, init_lora
from ..checkpoint import describe_run, fingerprint
from ..config import LoRAPlusConfig
from ..diagnostics import describe
from ..models.bert import BertConfig, BertForSequence, name_table
from ..models.hf import check_params, load_config, load_params
from ..optim import LoRAPlusTransform, lora_plus_adamw, make_schedule
from ..sharding import make_mesh
from ..spec import Specs
from ..train_step import init_state, jit_step, make_eval
from ..tree import combine, split_trainable
from .data import Batch, Rows, encode, load_splits, load_tokenizer
from .fetch import resolve
from .memory import check_memory
from .settings import ModelSettings, OptimizerSettings, Settings, apart
from .tasks import Task


class Data(NamedTuple):
    """The task that the data poses, and its splits as arrays.

    Attributes:
      task: what is learned.
      splits: split name to columns `input_ids`, `attention_mask`, `token_type_ids` `(N, T)` and `label` `(N,)`.
      truncated: split name to how many of its texts were longer than T.
    """

    task: Task
    splits: dict[str, Batch]
    truncated: dict[str, int]


class Parts(NamedTuple):
    """A model ready to train or to use.

    Attributes:
      plain: the model without adapters.
      model: with its adapters on.
      specs: what is adapted.
      trainable, frozen: its variables, apart.
    """

    plain: nn.Module
    model: nn.Module
    specs: Specs
    trainable: dict[str, Any]
    frozen: dict[str, Any]


class Run(NamedTuple):
    """All that training needs.

    Attributes:
      settings: what was asked for.
      config: what is really applied, None for method full.
      data, parts: see there.
      steps: optimizer steps in all.
      tx: the optimizer.
      mesh: the devices.
      programs: the compiled step and evaluation.
      metadata: what checkpoints and adapters say of themselves.
    """

    settings: Settings
    config: LoRAPlusConfig | None
    data: Data
    parts: Parts
    steps: int
    tx: LoRAPlusTransform
    mesh: Mesh
    programs: "Programs"
    metadata: dict[str, Any]


class Programs(NamedTuple):
    """What runs on the devices, compiled for a run's shapes.

    Attributes:
      step: `(state, frozen, batch) -> (state, metrics)`, see `train_step.make_step`.
      evaluate: `(trainable, frozen, batch) -> pairs`, see `train_step.make_eval`.
    """

    step: Any
    evaluate: Any


def prepare(settings: Settings) -> Run:
    """Fetches, checks, compiles and loads everything, in this order.

    Raises:
      ValueError, OSError: something does not fit, in memory either, or cannot be read; the message says what.
    """
    mesh = make_mesh(settings.mesh.data)
    _check_mesh(settings, mesh)
    directory = resolve(settings.model.path, "model")
    data = load_data(settings, directory)
    steps = count_steps(settings, len(data.splits["train"]["label"]))
    config = settings.applied
    shapes = build(settings, directory, data.task, config)
    tx = make_optimizer(settings.optimizer, config, steps, shapes.specs)
    check_params(directory, name_table(settings.model.pooling), params_of(shapes), new=("head",))
    programs = compile_programs(settings, data, shapes, tx, mesh)
    check_memory(programs, mesh.devices.flat[0], len(mesh.local_devices))
    parts = load(settings, directory, shapes, config)
    base = fingerprint(parts.frozen) if parts.frozen else None
    metadata = describe_run(
        config,
        parts.specs,
        base=base,
        settings=apart(settings.to_json())[0],
        task={**dataclasses.asdict(data.task), "names": list(data.task.names)},
        data=digest(data.splits),
    )
    return Run(settings, config, data, parts, steps, tx, mesh, programs, metadata)


def inspect(settings: Settings) -> str:
    """What would be trained, at which rate: role, group's peak rate, decay and size of every leaf, and the totals.

    Raises:
      ValueError, OSError: as training would.
    """
    directory = resolve(settings.model.path, "model")
    data = load_data(settings, directory)
    steps = count_steps(settings, len(data.splits["train"]["label"]))
    config = settings.applied
    parts = build(settings, directory, data.task, config)
    tx = make_optimizer(settings.optimizer, config, steps, parts.specs)
    peak = settings.optimizer.warmup_steps
    table = describe(parts.trainable, tx, parts.specs, frozen=parts.frozen, step=peak)
    sizes = ", ".join(f"{len(arrays['label']):,} {name}" for name, arrays in data.splits.items())
    return f"{table}\n{steps} steps of {settings.train.batch_size}; rates are those of step {peak}; data: {sizes}"


def load_data(settings: Settings, directory: Path) -> Data:
    """Reads, checks and tokenizes the splits with the tokenizer of a model directory."""
    tokenizer = tokenizer_for(settings, directory)
    rows = load_splits(settings.data, functools.partial(resolve, kind="data"))
    task = Task.from_splits(settings.task, rows)
    encoded = {name: encode(split.texts, split.pairs, tokenizer) for name, split in rows.items()}
    splits = {name: arrays | {"label": task.labels(rows[name])} for name, (arrays, _) in encoded.items()}
    return Data(task, splits, {name: cut for name, (_, cut) in encoded.items()})


def tokenizer_for(settings: Settings, directory: Path) -> Tokenizer:
    """The directory's tokenizer at `data.max_length`, which the model must be able to take."""
    config = model_config(settings.model, directory)
    if settings.data.max_length > config.max_length:
        raise ValueError(
            f"data.max_length is {settings.data.max_length}, the model takes {config.max_length} tokens at most"
        )
    tokenizer = load_tokenizer(directory, settings.data.max_length)
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= config.vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer does not fit the model: {token!r} has the id {largest}, the model's "
            f"vocab_size is {config.vocab_size}"
        )
    return tokenizer


def digest(splits: Mapping[str, Batch]) -> str:
    """A short hex digest of all arrays, by which a run that goes on knows its data again."""
    total = hashlib.sha256()
    for split, arrays in splits.items():
        for name, array in arrays.items():
            total.update(f"{split} {name} {array.shape}".encode())
            total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()[:16]


def encode_rows(rows: Rows, task: Task, tokenizer: Tokenizer) -> Batch:
    """Token arrays and labels of rows."""
    return encode(rows.texts, rows.pairs, tokenizer)[0] | {"label": task.labels(rows)}


def count_steps(settings: Settings, examples: int) -> int:
    """Optimizer steps in all, checked against the batch size and the warm-up."""
    batch = settings.train.batch_size
    if batch > examples:
        raise ValueError(f"train.batch_size is {batch}, the train split has only {examples} rows")
    epochs = 3.0 if settings.train.epochs is None else settings.train.epochs
    steps = settings.train.steps or max(1, math.ceil(epochs * (examples // batch)))
    if settings.optimizer.warmup_steps >= steps:
        raise ValueError(
            f"optimizer.warmup_steps is {settings.optimizer.warmup_steps}, of {steps} steps in all"
        )
    try:
        schedule_for(settings.optimizer, steps, 1.0)
    except ValueError as error:
        raise ValueError(f"optimizer: {error}") from None
    return steps


def model_config(settings: ModelSettings, directory: Path) -> BertConfig:
    """The encoder's config, its dropout rates replaced where the settings give one."""
    config = BertConfig.from_hf(load_config(directory))
    if settings.dropout is None:
        return config
    return dataclasses.replace(
        config, hidden_dropout_prob=settings.dropout, attention_probs_dropout_prob=settings.dropout
    )


def build(settings: Settings, directory: Path, task: Task, config: LoRAPlusConfig | None) -> Parts:
    """The model with its new head and its adapters; shapes stand for all weights but the adapters."""
    plain = make_model(settings.model, directory, task)
    model = plain if config is None else apply_lora_plus(plain, config)
    head_key, lora_key = jax.random.split(jax.random.key(settings.seed))
    variables = {"params": jax.eval_shape(plain.init, head_key, *_inputs(settings))["params"]}
    specs: Specs = {}
    if config is not None:
        lora, specs = init_lora(model, lora_key, *_inputs(settings))
        variables |= {"lora": lora} if lora else {}
    trainable, frozen = _split(variables, config)
    return Parts(plain, model, specs, _float32(trainable), frozen)


def load(settings: Settings, directory: Path, parts: Parts, config: LoRAPlusConfig | None) -> Parts:
    """The same with weights from a directory and the new head's first values.

    Raises:
      ValueError: the weights do not fit; the message lists all that is missing, extra or misshapen.
    """
    params = load_params(directory, name_table(settings.model.pooling), params_of(parts), new=("head",))
    head_key, _ = jax.random.split(jax.random.key(settings.seed))
    variables = {"params": combine(params, {"head": _head(parts.plain, head_key, _inputs(settings))})}
    variables |= {"lora": parts.trainable["lora"]} if "lora" in parts.trainable else {}
    trainable, frozen = _split(variables, config)
    return parts._replace(trainable=_float32(trainable), frozen=frozen)


def params_of(parts: Parts) -> dict[str, Any]:
    """All parameters of the model without adapters."""
    return combine(parts.trainable, parts.frozen)["params"]


def compile_programs(
    settings: Settings, data: Data, parts: Parts, tx: LoRAPlusTransform, mesh: Mesh
) -> Programs:
    """Step and evaluation, compiled from shapes alone; nothing else is compiled later."""
    loss_fn = data.task.loss_fn(parts.model)
    train = settings.train
    step = jit_step(loss_fn, tx, mesh=mesh, accumulate=train.accumulate, skip_nonfinite=True)
    evaluate = make_eval(loss_fn, mesh=mesh)
    state = jax.eval_shape(lambda: init_state(_zeros(parts.trainable), tx, jax.random.key(0)))

    def batch(size: int) -> dict[str, jax.ShapeDtypeStruct]:
        columns = data.splits["train"] | {"weight": np.ones(1, np.float32)}
        return {name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for name, x in columns.items()}

    return Programs(
        step.lower(state, parts.frozen, batch(train.batch_size)).compile(),
        evaluate.lower(state.trainable, parts.frozen, batch(train.eval_batch_size)).compile(),
    )


def _inputs(settings: Settings) -> tuple[jax.ShapeDtypeStruct, ...]:
    """One example's `input_ids`, `attention_mask` and `token_type_ids`."""
    return 3 * (jax.ShapeDtypeStruct((1, settings.data.max_length), jnp.int32),)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def make_model(settings: ModelSettings, directory: Path, task: Task) -> BertForSequence:
    """The model without adapters."""
    return BertForSequence(
        model_config(settings, directory),
        task.num_outputs,
        settings.pooling,
        jnp.dtype(settings.dtype),
        jnp.dtype(settings.param_dtype),
        settings.unroll,
        settings.head_dropout,
    )


def make_optimizer(
    settings: OptimizerSettings, config: LoRAPlusConfig | None, steps: int, specs: Specs
) -> LoRAPlusTransform:
    """AdamW with the scheduled rate of every group; without adapters every parameter has the base rate."""
    schedule = functools.partial(schedule_for, settings, steps)
    rates = {"extra": settings.head_learning_rate, "embedding": settings.embedding_learning_rate}
    return lora_plus_adamw(
        schedule(settings.learning_rate),
        lr_ratio=1.0 if config is None else config.lr_ratio,
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        decay=settings.decay,
        max_grad_norm=settings.max_grad_norm,
        rates={role: schedule(rate) for role, rate in rates.items() if rate is not None},
        policy=settings.policy,
        specs=specs,
    )


def schedule_for(settings: OptimizerSettings, steps: int, peak: float) -> optax.Schedule:
    """The named schedule with a peak rate."""
    return make_schedule(
        settings.schedule,
        peak,
        steps,
        warmup_steps=settings.warmup_steps,
        final_fraction=settings.final_fraction,
        decay_steps=settings.decay_steps,
    )


def _check_mesh(settings: Settings, mesh: Mesh) -> None:
    micro = settings.train.batch_size // settings.train.accumulate
    for name, size in (
        ("batch_size / accumulate", micro),
        ("eval_batch_size", settings.train.eval_batch_size),
    ):
        if size % mesh.size:
            raise ValueError(
                f"train.{name} is {size}, which the {mesh.size} devices of mesh.data do not divide"
            )
    if settings.method == "full" and settings.model.param_dtype != "float32":
        raise ValueError("method full trains every weight, in float32: model.param_dtype must be float32")


def _head(model: nn.Module, key: jax.Array, inputs: tuple[Any, ...]) -> Any:
    """The new head's first values; XLA leaves the rest of the model out."""
    zeros = [jnp.zeros(x.shape, x.dtype) for x in inputs]
    return jax.jit(lambda key: model.init(key, *zeros)["params"]["head"])(key)


def _split(variables: Mapping[str, Any], config: LoRAPlusConfig | None) -> tuple[dict, dict]:
    if config is None:
        return dict(variables), {}
    return split_trainable(variables, config.modules_to_save, bias=config.bias)


def _float32(tree: Any) -> Any:
    """Trained leaves in float32, whatever the frozen weights are kept in."""

    def cast(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, np.float32)
        return jnp.asarray(leaf, jnp.float32)

    return jax.tree.map(cast, tree)
