"""From settings to everything a run needs: data, model, adapters, optimizer. Nothing is written here."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..checkpoint import describe_run, fingerprint, leaf_dtypes_and_shapes
from ..config import LoRAPlusConfig
from ..data.batches import Batch, digest
from ..data.fetch import resolve
from ..linen.wrap import apply_lora_plus, init_lora
from ..models.hf import check_params, load_params, rows_digest
from ..optim.lora_plus import LoRAPlusTransform
from ..settings.schema import MAX_STEPS, Settings, split_settings
from ..sharding import (
    BATCH_AXES,
    Shardings,
    base_shardings,
    batch_parts,
    check_tensor,
    make_mesh,
    make_shardings,
)
from ..spec import Specs
from ..tasks import causal_lm, encoder
from ..tasks.interface import AdaptedModel, BaseModel, Losses, TaskData, row_count
from ..tasks.language_losses import LanguageTask
from ..tasks.sample_answers import SamplePrompt
from ..train_step import TrainState, init_state, jit_step, make_eval
from ..tree import combine, split_trainable
from .distributed import check_same_everywhere, raise_together
from .init_adapter import adapter_digest, check_init_adapter, load_init_adapter
from .memory import check_memory
from .optimizer import check_rates, make_optimizer, schedule_for
from .theory_metrics import count_rows, lower_theory
from .xla import compiler_options


class Run(NamedTuple):
    """All that training needs.

    Attributes:
      settings: what was asked for.
      config: what is really applied, None for method full.
      data, parts: see there.
      steps: optimizer steps in all.
      tx: the optimizer.
      mesh: the devices.
      shardings: where state and frozen variables lie.
      programs: the compiled step and evaluation.
      sample_prompt: the prompt of the settings, answered before and after training, if any.
      metadata: what checkpoints and adapters say of themselves.
    """

    settings: Settings
    config: LoRAPlusConfig | None
    data: TaskData
    parts: AdaptedModel
    steps: int
    tx: LoRAPlusTransform
    mesh: Mesh
    shardings: Shardings
    programs: "Programs"
    sample_prompt: SamplePrompt | None
    metadata: dict[str, Any]


class Programs(NamedTuple):
    """What runs on the devices, compiled for a run's shapes.

    Attributes:
      step: `(state, frozen, batch) -> (state, metrics)`, see `train_step.make_step`.
      evaluate: `(trainable, frozen, batch) -> pairs`, see `train_step.make_eval`.
      theory: `(trainable, before, frozen, batch) -> terms`, see `theory.make_theory`; None if it is not asked for.
    """

    step: Any
    evaluate: Any
    theory: Any = None


def prepare(settings: Settings) -> Run:
    """Fetches, checks, compiles and loads everything, in this order.

    Of several processes each does so for itself; then they compare what they read.

    Raises:
      ValueError, OSError: something does not fit, in memory either, or cannot be read; the message says what.
    """
    several = jax.process_count() > 1
    with raise_together():
        mesh, directory, data, steps, shapes, tx = abstract_run(settings)
        _, tensors = check_params(directory, shapes.base.table, params_of(shapes), new=shapes.base.new)
        if settings.init_adapter is not None:
            check_init_adapter(settings, shapes, params_of(shapes), data.task)
        sample_prompt = None
        if isinstance(data.task, LanguageTask) and settings.train.prompt is not None:
            sample_prompt = SamplePrompt.from_settings(settings, directory, data.task, shapes.model)
        shardings = state_shardings(shapes, tx, mesh)
        programs = compile_programs(settings, data, shapes, tx, mesh, shardings)
        check_memory([p for p in programs if p is not None], mesh.local_devices[0], len(mesh.local_devices))
        parts = load_model(settings, directory, shapes, settings.applied, mesh)
        inputs = {
            "data": digest(data.splits),
            "task": data.task.notes(),
            "weights": leaf_dtypes_and_shapes(parts.frozen),
            "rows of the weights": rows_digest(tensors) if several else None,
            "init_adapter": adapter_digest(settings) if several else None,
        }
    check_same_everywhere(inputs)
    # From here on the processes compute together.
    base = fingerprint(parts.frozen) if parts.frozen else None
    metadata = describe_run(
        parts.specs,
        settings.applied,
        base=base,
        settings=split_settings(settings.to_json())[0],
        task=inputs["task"],
        data=inputs["data"],
    )
    if settings.init_adapter is not None:
        with raise_together():
            parts = load_init_adapter(settings, parts, params_of(parts), base)
        metadata["init_adapter"] = fingerprint(parts.trainable)
    if several:
        check_same_everywhere({"base": base, "trained": fingerprint(parts.trainable)})
    return Run(
        settings, settings.applied, data, parts, steps, tx, mesh, shardings, programs, sample_prompt, metadata
    )


class AbstractRun(NamedTuple):
    """A run before any weight is looked at; see `Run`. `shapes` is the model with shapes for all values."""

    mesh: Mesh
    directory: Path
    data: TaskData
    steps: int
    shapes: AdaptedModel
    tx: LoRAPlusTransform


def abstract_run(settings: Settings) -> AbstractRun:
    """Fetches model and data, and checks devices, data, steps, adapters and rates against each other."""
    mesh = make_mesh(**dataclasses.asdict(settings.mesh))
    check_mesh(settings, mesh)
    directory = resolve(settings.model.path, "model")
    data = task_module(settings).load_data(settings, directory)
    steps = count_steps(settings, row_count(data.splits["train"]))
    shapes = build_model(settings, directory, data.task, settings.applied)
    check_tensor(mesh, shapes.base.tensor_sizes)
    tx = make_optimizer(settings.optimizer, settings.applied, steps, shapes.specs)
    check_rates(settings.optimizer, tx, shapes.trainable)
    return AbstractRun(mesh, directory, data, steps, shapes, tx)


def task_module(settings: Settings) -> Any:
    """The module that knows the kind of model: it has `load_data`, `load_split`, `make_base` and `make_losses`."""
    return causal_lm if settings.is_language else encoder


def count_steps(settings: Settings, examples: int) -> int:
    """Optimizer steps in all, checked against the batch size and the warm-up."""
    batch = settings.train.batch_size
    if batch > examples:
        raise ValueError(f"train.batch_size is {batch}, the train split has only {examples} rows")
    epochs = 3.0 if settings.train.epochs is None else settings.train.epochs
    steps = settings.train.steps or max(1, math.ceil(epochs * (examples // batch)))
    if steps > MAX_STEPS:
        raise ValueError(
            f"train.epochs is {epochs:g}, which makes {steps:g} steps; at most {MAX_STEPS} are counted"
        )
    if settings.optimizer.warmup_steps >= steps:
        raise ValueError(
            f"optimizer.warmup_steps is {settings.optimizer.warmup_steps}, of {steps} steps in all"
        )
    try:
        schedule_for(settings.optimizer, steps, 1.0)
    except ValueError as error:
        raise ValueError(f"optimizer: {error}") from None
    return steps


def build_model(
    settings: Settings, directory: Path, task: Any, config: LoRAPlusConfig | None
) -> AdaptedModel:
    """The model with its adapters; shapes stand for all weights but the adapters."""
    return add_adapters(
        settings, task_module(settings).make_base(settings, directory, task), config, init_lora
    )


def add_adapters(
    settings: Settings, base: BaseModel, config: LoRAPlusConfig | None, make_adapters: Callable[..., Any]
) -> AdaptedModel:
    """A base with its adapters, which `make_adapters` makes as `init_lora` does, or as shapes."""
    model = base.model if config is None else apply_lora_plus(base.model, config)
    new_key, lora_key = jax.random.split(jax.random.key(settings.seed))
    variables = {"params": jax.eval_shape(base.model.init, new_key, *base.inputs)["params"]}
    specs: Specs = {}
    if config is not None:
        lora, specs = make_adapters(model, lora_key, *base.inputs)
        variables |= {"lora": lora} if lora else {}
    trainable, frozen = _split(variables, config)
    return AdaptedModel(base, model, specs, _float32(trainable), frozen)


def base_parts(settings: Settings, directory: Path, task: Any) -> AdaptedModel:
    """The model without adapters and without variables."""
    base: BaseModel = task_module(settings).make_base(settings, directory, task)
    return AdaptedModel(base, base.model, {}, {}, {})


def load_model(
    settings: Settings,
    directory: Path,
    parts: AdaptedModel,
    config: LoRAPlusConfig | None,
    mesh: Mesh | None = None,
) -> AdaptedModel:
    """The same with weights from a directory, and first values of what that has not.

    With a mesh the weights go straight to where they lie on it, and a process reads its own parts alone.

    Raises:
      ValueError: the weights do not fit; the message lists all that is missing, extra or misshapen.
    """
    base = parts.base
    params = params_of(parts)
    places = {} if mesh is None else base_shardings(mesh, {"params": params}, base.rules)
    shardings = {path.removeprefix("params/"): place for path, place in places.items()}
    params = load_params(directory, base.table, params, new=base.new, shardings=shardings)
    return set_weights(settings, parts, params, config)


def set_weights(
    settings: Settings, parts: AdaptedModel, params: Mapping[str, Any], config: LoRAPlusConfig | None
) -> AdaptedModel:
    """The same with weights that are loaded already, which are not copied, and first values of what they lack."""
    base = parts.base
    new_key, _ = jax.random.split(jax.random.key(settings.seed))
    variables = {"params": combine(params, {name: _init_new(base, name, new_key) for name in base.new})}
    variables |= {"lora": parts.trainable["lora"]} if "lora" in parts.trainable else {}
    trainable, frozen = _split(variables, config)
    return parts._replace(trainable=_float32(trainable), frozen=frozen)


def params_of(parts: AdaptedModel) -> dict[str, Any]:
    """All parameters of the model without adapters."""
    return combine(parts.trainable, parts.frozen)["params"]


def state_shardings(parts: AdaptedModel, tx: LoRAPlusTransform, mesh: Mesh) -> Shardings:
    """Where state and frozen variables lie on a mesh."""
    return make_shardings(
        mesh, state_shapes(parts, tx), parts.frozen, specs=parts.specs, rules=parts.base.rules
    )


def compile_programs(
    settings: Settings,
    data: TaskData,
    parts: AdaptedModel,
    tx: LoRAPlusTransform,
    mesh: Mesh,
    shardings: Shardings,
) -> Programs:
    """Step and evaluation, compiled from shapes alone; nothing else is compiled later."""
    losses: Losses = task_module(settings).make_losses(settings, data.task, parts, mesh)
    placed = {"mesh": mesh, "shardings": shardings}
    evaluate = make_eval(losses.evaluate, **placed)
    batch = batch_shapes(data.splits["validation"], settings.train.eval_batch_size)
    state, theory = state_shapes(parts, tx), None
    if settings.train.theory_every is not None:
        rows = batch_shapes(data.splits["train"], count_rows(settings.train.batch_size, mesh))
        theory = lower_theory(losses.train, parts.specs, state, parts.frozen, rows, **placed).compile()
    options = compiler_options(mesh, unrolled=settings.model.unroll)
    return Programs(
        lower_step(settings, data, parts, tx, mesh, shardings).compile(options),
        evaluate.lower(state.trainable, parts.frozen, batch).compile(),
        theory,
    )


def lower_step(
    settings: Settings,
    data: TaskData,
    parts: AdaptedModel,
    tx: LoRAPlusTransform,
    mesh: Mesh,
    shardings: Shardings,
) -> jax.stages.Lowered:
    """The step before it is compiled; of the data only the columns' shapes matter."""
    losses: Losses = task_module(settings).make_losses(settings, data.task, parts, mesh)
    step = jit_step(
        losses.train,
        tx,
        mesh=mesh,
        shardings=shardings,
        accumulate=settings.train.accumulate,
        skip_nonfinite=True,
    )
    batch = batch_shapes(data.splits["train"], settings.train.batch_size)
    return step.lower(state_shapes(parts, tx), parts.frozen, batch)


def batch_shapes(columns: Batch, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch of some columns' rows, with a weight a row."""
    weighed = columns | {"weight": np.ones(1, np.float32)}
    return {name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for name, x in weighed.items()}


def state_shapes(parts: AdaptedModel, tx: LoRAPlusTransform) -> TrainState:
    """The shapes of a run's state."""
    return jax.eval_shape(lambda: init_state(_zeros(parts.trainable), tx, jax.random.key(0)))


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def check_mesh(settings: Settings, mesh: Mesh) -> None:
    """Raises ValueError if a batch cannot be split over a mesh, or the dtype does not go with the method."""
    train, parts = settings.train, batch_parts(mesh)
    whole = batch_sizes_for(train.batch_size, train.accumulate, train.eval_batch_size, parts)
    given = {name: getattr(train, name) for name in whole}
    if changed := {name: size for name, size in whole.items() if size != given[name]}:
        sizes = " x ".join(f"mesh.{axis} {mesh.shape[axis]}" for axis in BATCH_AXES)
        raise ValueError(
            f"{parts} parts of a batch ({sizes}) must divide train.batch_size / accumulate, got "
            f"{train.batch_size} / {train.accumulate}, and train.eval_batch_size, got {train.eval_batch_size}; "
            f"these would do: {' '.join(f'--train.{name} {size}' for name, size in changed.items())}"
        )
    if settings.method == "full" and settings.model.param_dtype != "float32":
        raise ValueError("method full trains every weight, in float32: model.param_dtype must be float32")


def batch_sizes_for(batch_size: int, accumulate: int, eval_batch_size: int, parts: int) -> dict[str, int]:
    """The nearest sizes, upwards, that a mesh can split into `parts`; a batch that it can split keeps its size.

    >>> batch_sizes_for(16, 4, 4, 8)
    {'batch_size': 16, 'accumulate': 2, 'eval_batch_size': 8}
    >>> batch_sizes_for(16, 4, 4, 64)
    {'batch_size': 64, 'accumulate': 1, 'eval_batch_size': 64}
    """
    whole = -(-batch_size // parts) * parts
    fitting = [n for n in range(1, accumulate + 1) if whole % (n * parts) == 0]
    evaluated = -(-eval_batch_size // parts) * parts
    return {"batch_size": whole, "accumulate": fitting[-1], "eval_batch_size": evaluated}


def _init_new(base: BaseModel, name: str, key: jax.Array) -> Any:
    """First values of a new part; XLA leaves the rest of the model out."""
    zeros = [jnp.zeros(x.shape, x.dtype) for x in base.inputs]
    return jax.jit(lambda key: base.model.init(key, *zeros)["params"][name])(key)


def _split(variables: Mapping[str, Any], config: LoRAPlusConfig | None) -> tuple[dict, dict]:
    if config is None:
        return dict(variables), {}
    return split_trainable(variables, config)


def _float32(tree: Any) -> Any:
    """Trained leaves in float32, whatever the frozen weights are kept in."""

    def cast(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, np.float32)
        return jnp.asarray(leaf, jnp.float32)

    return jax.tree.map(cast, tree)
