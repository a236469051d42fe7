"""Prepares a run from its settings: data, model, adapters, optimizer, compiled programs. Writes no files."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from .._utils.allocator import release_memory
from .._utils.validation import expand_path
from ..adapter.config import BASE_INITS, LoRAPlusConfig
from ..adapter.dora import set_magnitudes
from ..adapter.target_rules import try_rules
from ..adapter.tree import combine, flatten, split_trainable, unflatten
from ..data.fetch import resolve
from ..linen.wrap import abstract_lora, apply_lora_plus
from ..models.attention import KERNEL_PLATFORMS
from ..models.checkpoints.model_files import ModelFiles
from ..models.checkpoints.params import check_params, load_params, rows_digest, values_digest
from ..models.checkpoints.quantized import pack_shapes
from ..models.files import open_files
from ..settings.schema import MAX_STEPS, Settings
from ..step.checkpoint import leaf_dtypes_and_shapes
from ..step.fingerprints import fingerprint
from ..step.problem import Problem
from ..step.run_metadata import describe_run
from ..step.sharding import (
    BATCH_AXES,
    Shardings,
    base_shardings,
    batch_parts,
    check_tensor,
    make_mesh,
)
from ..tasks.causal_lm import LanguageTask
from ..tasks.chat_generation import ChatModel, prompt_chat
from ..tasks.encoder import EncoderTask
from ..tasks.held_out_generation import HeldOutTexts
from ..tasks.interface import (
    AdaptedModel,
    BaseModel,
    BatchPlan,
    Task,
    TaskData,
    params_of,
    row_count,
)
from .adapter_start import begin_from, first_gradients, make_start, read_start
from .distributed import check_same_everywhere, raise_together
from .memory import check_memory
from .optimizer import check_rates, make_optimizer, schedule_for
from .programs import AbstractRun, Programs, compile_programs
from .provenance import Origin, model_identity
from .saved_adapter import (
    adapter_digest,
    check_init_adapter,
    check_init_identity,
    find_init_adapter,
    load_init_adapter,
)


class Run(NamedTuple):
    """Everything that training needs.

    Attributes:
      settings: the settings; `settings.applied` is the effective config of the adapters.
      data, parts: see `TaskData` and `AdaptedModel`.
      steps: the total number of optimizer steps.
      batches: the shapes of the batches.
      tx: the optimizer.
      mesh: the device mesh.
      shardings: the shardings of the state and the frozen variables.
      programs: the compiled training step and evaluation.
      chat_model: answers `train.prompt` before and after training, if it is set.
      held_out_texts: the inputs for which to generate texts before and after training (task generation).
      origin: base and data, as saved with the run's directory and its adapter.
      metadata: the metadata saved with checkpoints.
      start: the tree of factors that the adapters started from, if they took it from the base.
      differences: those of the base of `init_adapter` that `--allow_different` has accepted, as text.
    """

    settings: Settings
    data: TaskData
    parts: AdaptedModel
    steps: int
    batches: BatchPlan
    tx: optax.GradientTransformationExtraArgs
    mesh: Mesh
    shardings: Shardings
    programs: Programs
    chat_model: ChatModel | None
    held_out_texts: HeldOutTexts | None
    origin: Origin
    metadata: dict[str, Any]
    start: dict[str, Any] | None
    differences: Sequence[str] = ()


def prepare(settings: Settings, allow_different: Sequence[str] = (), *, fresh: bool = False) -> Run:
    """Downloads, checks, compiles and loads everything, in this order.

    With several processes each does all of it, then they compare what they read. `allow_different` names the parts
    of the identity in which `init_adapter` may differ; `fresh` disregards the start of an older run.
    """
    is_distributed, differences = jax.process_count() > 1, list[str]()
    with raise_together():
        mesh = make_mesh(**dataclasses.asdict(settings.mesh))
        check_mesh(settings, mesh)
        init = find_init_adapter(settings)
        files = open_files(resolve(settings.model.path, "model"))
        data = task_class(settings).load(settings.task_options, files)
        abstract = abstract_run(settings, files, data, mesh)
        shapes, run = abstract.parts, abstract.run
        identity = model_identity(settings, files, data.task) | {"data": data.digests}
        if init is not None:
            as_saved = model_identity(settings, files, data.task, saved=init.notes)
            differences += check_init_identity(init, as_saved, None, allow_different)
        _, tensors = check_params(files, shapes.base.table, params_of(shapes), new=shapes.base.new)
        if settings.model.quantize in ("nf4", "int8"):
            # What an exported model is merged into. The quantized weights do not show a small change of these.
            identity["base"]["unquantized"] = values_digest(tensors)
        if init is not None:
            check_init_adapter(init, settings, shapes, data.task)
        chat_model = held_out_texts = None
        if isinstance(data.task, LanguageTask) and settings.train.prompt is not None:
            new_tokens = settings.train.prompt_tokens
            chat_model = ChatModel.from_options(
                settings.task_options, files, data.task, shapes.model, new_tokens, mesh=mesh
            )
            chat_model.encode([prompt_chat(settings.train.prompt, settings.task)])  # raises if it is too long
        if isinstance(data.task, LanguageTask) and data.task.kind == "generation":
            held_out_texts = HeldOutTexts.from_options(
                settings.task_options, files, data.task, shapes.model, data.inputs, mesh
            )
        # Compiled from shapes: a program that does not fit is an error before the weights are read, which takes
        # minutes.
        theory = settings.train.theory_every is not None
        programs = compile_programs(run, theory=theory, unrolled=bool(settings.model.unroll))
        release_memory()  # the compiler's
        check_memory(programs.compiled, mesh.local_devices)
        parts = load_model(settings, files, shapes, mesh)
        inputs = {
            **identity,
            "task": data.task.notes(),
            "weights": leaf_dtypes_and_shapes(parts.frozen),
            "rows of the weights": rows_digest(tensors) if is_distributed else None,
            "init_adapter": adapter_digest(init) if init and is_distributed else None,
        }
    # Processes that read different files would train a mixture, without an error.
    check_same_everywhere(inputs)
    # From here on, computations run on all processes together.
    base = fingerprint(parts.frozen) if parts.frozen else None
    metadata = describe_run(parts.specs, settings.applied, task=inputs["task"])
    if settings.optimizer.target_rank is not None:
        metadata["steps"] = run.problem.steps  # by which AdaLoRA's ranks fall
    parts, start = start_magnitudes(parts), None
    if init is not None:
        with raise_together():
            differences += check_init_identity(init, {}, base, allow_different)
            parts, start = load_init_adapter(init, parts)
        metadata["init_adapter"] = fingerprint(parts.trainable)
    elif settings.applied is not None and settings.applied.init in BASE_INITS:
        if not fresh:
            output = expand_path("output_dir", settings.output_dir)
            start = read_start(output, parts.specs)
        if start is None:
            gradients = first_gradients(run, parts, settings.applied.init, settings.seed)
            start = make_start(settings.applied, parts, files, gradients)
        parts = begin_from(parts, start, settings.applied)
        metadata["start"] = fingerprint(start)
    if is_distributed:
        check_same_everywhere({"base": base, "trained": fingerprint(parts.trainable)})
    return Run(
        settings=settings,
        data=data,
        parts=parts,
        steps=run.problem.steps,
        batches=abstract.batches,
        tx=run.tx,
        mesh=mesh,
        shardings=run.shardings,
        programs=programs,
        chat_model=chat_model,
        held_out_texts=held_out_texts,
        origin={"base": base, "identity": identity},
        metadata=metadata,
        start=start,
        differences=differences,
    )


class Described(NamedTuple):
    """A run before its weights are read.

    Attributes:
      parts: the model, with shapes as variables.
      batches: the shapes of the batches.
      run: what its programs are compiled from.
    """

    parts: AdaptedModel
    batches: BatchPlan
    run: AbstractRun


def abstract_run(settings: Settings, files: ModelFiles, data: TaskData, mesh: Mesh) -> Described:
    """A run from shapes; checks that steps, batches, model and optimizer fit together."""
    steps = count_steps(settings, row_count(data.splits["train"]))
    shapes = build_model(settings, files, data.task, settings.applied)
    check_tensor(mesh, shapes.base.tensor_sizes)
    tx = make_optimizer(settings.optimizer, settings.lr_ratio, steps, shapes.specs, seed=settings.seed)
    check_rates(settings.optimizer, shapes.trainable)
    if settings.optimizer.target_rank is not None:
        try:
            # AdaLoRA checks ranks and steps when it makes its state; of shapes that costs nothing.
            jax.eval_shape(tx.init, shapes.trainable)
        except ValueError as error:
            raise ValueError(f"optimizer.{error}") from None
    batches = data.task.plan_batches(settings.task_options, data, steps, (settings.seed,), mesh)
    problem = make_problem(settings, data.task, shapes, batches, steps, mesh)
    return Described(shapes, batches, AbstractRun(problem, mesh, tx))


def make_problem(
    settings: Settings,
    task: Task,
    parts: AdaptedModel,
    batches: BatchPlan,
    steps: int,
    mesh: Mesh | None = None,
) -> Problem:
    """What is trained, from shapes; with a mesh, its losses are for variables on it."""
    losses = task.make_losses(settings.task_options, parts, mesh, batches.scored)
    return Problem(
        loss=losses.train,
        unbounded_loss=task.make_losses(settings.task_options, parts, mesh).train,
        evaluate=losses.evaluate,
        specs=parts.specs,
        trainable=parts.trainable,
        frozen=parts.frozen,
        train_batch=batches.train,
        eval_batch=batches.evaluate,
        batch=batches.batch,
        steps=steps,
        accumulate=settings.train.accumulate,
        rules=parts.base.rules,
        layers=parts.base.layers,
    )


def task_class(settings: Settings) -> type[Task]:
    """The class of the task for the kind of model."""
    return LanguageTask if settings.is_language else EncoderTask


def count_steps(settings: Settings, examples: int) -> int:
    """The total number of optimizer steps; checks batch size, warmup and decay against it."""
    batch = settings.train.batch_size
    if batch > examples:
        raise ValueError(f"train.batch_size is {batch}, but the train split has only {examples} rows")
    epochs = 3.0 if settings.train.epochs is None else settings.train.epochs
    steps = settings.train.steps or max(1, math.ceil(epochs * (examples // batch)))
    if steps > MAX_STEPS:
        raise ValueError(f"train.epochs {epochs:g} gives {steps:g} steps; the maximum is {MAX_STEPS}")
    if settings.optimizer.warmup_steps >= steps:
        raise ValueError(
            f"optimizer.warmup_steps must be below the {steps} steps in total, "
            f"got {settings.optimizer.warmup_steps}"
        )
    try:
        schedule_for(settings.optimizer, steps, 1.0)
    except ValueError as error:
        raise ValueError(f"optimizer: {error}") from None
    return steps


def make_base(settings: Settings, files: ModelFiles, task: Task | None) -> BaseModel:
    """The model without adapters; without a task it is a language model."""
    return (task or LanguageTask(kind="instruction")).make_base(settings.task_options, files)


def build_model(
    settings: Settings, files: ModelFiles, task: Task | None, config: LoRAPlusConfig | None
) -> AdaptedModel:
    """The model with adapters; all variables are shapes."""
    return add_adapters(make_base(settings, files, task), config, files)


def add_adapters(
    base: BaseModel, config: LoRAPlusConfig | None, files: ModelFiles | None = None
) -> AdaptedModel:
    """Adds adapters to a base model, of shapes alone; `files` have the weights, with which it is compared first."""
    key = jax.random.key(0)  # of which only the kind counts: nothing is computed
    variables = {"params": jax.eval_shape(base.model.init, key, *base.inputs)["params"]}
    if files is not None:
        check_params(files, base.table, variables["params"], new=base.new)
    if config is None:
        return AdaptedModel(base, base.model, {}, _float32(variables), {})
    if config.init in BASE_INITS:  # whose values come with the weights
        config = dataclasses.replace(config, init="lora", init_iterations=None)
    model = apply_lora_plus(base.model, config)
    leaves = [path.split("/") for path in flatten(variables["params"])]
    paths = {"/".join(path[:n]) for path in leaves for n in range(1, len(path) + 1)}
    try_rules("lora", config.to_json(), sorted(paths))  # which an adapter of others may bring
    try:
        lora, specs, draw = abstract_lora(model, key, *base.inputs, base=variables)
    except ValueError as error:
        # The library names a field of its config; in the settings it is one of a section.
        if re.split(r"\W", str(error))[0] in config.to_json():
            raise ValueError("; ".join(filter(None, (f"lora.{error}", base.hint)))) from None
        raise
    trainable, frozen = split_trainable(variables | ({"lora": lora} if lora else {}), config)
    if "params" in frozen:  # what is trained in full is not packed
        packed = pack_shapes(flatten(frozen["params"]), base.formats, base.table)
        frozen = frozen | {"params": unflatten(packed)}
    return AdaptedModel(base, model, specs, _float32(trainable), frozen, draw)


def base_parts(settings: Settings, files: ModelFiles, task: Task | None) -> AdaptedModel:
    """The model without adapters, with frozen shapes as variables."""
    base = make_base(settings, files, task)
    shapes = jax.eval_shape(base.model.init, jax.random.key(0), *base.inputs)["params"]
    packed = pack_shapes(flatten(shapes), base.formats, base.table)
    return AdaptedModel(base, base.model, {}, {}, {"params": unflatten(packed)})


def load_model(
    settings: Settings, files: ModelFiles, parts: AdaptedModel, mesh: Mesh | None = None
) -> AdaptedModel:
    """Loads the weights, with a mesh into their shardings, and initializes what it lacks."""
    params = read_params(files, parts.base, params_of(parts), mesh)
    return set_weights(settings, parts, params)


def read_params(
    files: ModelFiles, base: BaseModel, shapes: Mapping[str, Any], mesh: Mesh | None
) -> dict[str, Any]:
    """Reads the parameters of a base model that its files have, with a mesh into their shardings."""
    # Each process reads only the shards of its own devices: no host has room for all weights of a large model.
    by_path = {} if mesh is None else base_shardings(mesh, {"params": shapes}, base.rules)
    shardings = {path.removeprefix("params/"): sharding for path, sharding in by_path.items()}
    return load_params(files, base.table, shapes, new=base.new, shardings=shardings)


def set_weights(settings: Settings, parts: AdaptedModel, params: Mapping[str, Any]) -> AdaptedModel:
    """Sets loaded weights, without a copy, and initializes the adapters and parameters that they lack.

    Magnitudes of variant dora stay zero until `start_magnitudes`.
    """
    base = parts.base
    key = jax.random.key(settings.seed)
    new, lora = _draw(key, model=base.model, inputs=base.inputs, new=base.new, factors=parts.draw)
    values, trained = flatten({"params": combine(params, new)}), flatten(parts.trainable)
    drawn = values | flatten({"lora": lora})
    trainable = {path: drawn[path] for path in trained}
    frozen = {path: leaf for path, leaf in values.items() if path not in trained}
    return parts._replace(trainable=_float32(unflatten(trainable)), frozen=unflatten(frozen))


# Runs once per seed: optimizing the program would take longer than running it.
@functools.partial(
    jax.jit,
    static_argnames=("model", "inputs", "new", "factors"),
    compiler_options={"xla_backend_optimization_level": 1},
)
def _draw(
    key: jax.Array,
    *,
    model: nn.Module,
    inputs: tuple[jax.ShapeDtypeStruct, ...],
    new: tuple[str, ...],
    factors: Callable[[jax.Array], dict[str, Any]] | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters that the files lack, by module, and the factors."""
    new_key, lora_key = jax.random.split(key)
    # XLA drops all of the model's init that these parameters do not need.
    zeros = [jnp.zeros(x.shape, x.dtype) for x in inputs]
    params = model.init(new_key, *zeros)["params"] if new else {}
    return {name: params[name] for name in new}, {} if factors is None else factors(lora_key)


def start_magnitudes(parts: AdaptedModel) -> AdaptedModel:
    """Sets the magnitudes of variant dora from the weights; on several processes, all of them must call it."""
    if not any(spec.magnitude for spec in parts.specs.values()):
        return parts
    lora = set_magnitudes(parts.trainable["lora"], {"params": params_of(parts)}, parts.specs)
    return parts._replace(trainable={**parts.trainable, "lora": lora})


def check_mesh(settings: Settings, mesh: Mesh) -> None:
    """Raises ValueError if a mesh cannot split a batch or run the attention, or the method excludes the dtype."""
    train, parts = settings.train, batch_parts(mesh)
    attention = settings.model.attention
    if (
        attention in KERNEL_PLATFORMS
        and (platform := mesh.devices.flat[0].platform) != KERNEL_PLATFORMS[attention]
    ):
        raise ValueError(
            f"model.attention {attention} runs on platform {KERNEL_PLATFORMS[attention]}, but the devices are of "
            f"platform {platform}; use auto, xla or blocked"
        )
    fitting = batch_sizes_for(train.batch_size, train.accumulate, train.eval_batch_size, parts)
    if changed := {name: size for name, size in fitting.items() if size != getattr(train, name)}:
        sizes = " x ".join(f"mesh.{axis} {mesh.shape[axis]}" for axis in BATCH_AXES)
        raise ValueError(
            f"{sizes} = {parts} must divide train.batch_size / accumulate ({train.batch_size} / "
            f"{train.accumulate}) and train.eval_batch_size ({train.eval_batch_size}); "
            f"try {' '.join(f'--train.{name} {size}' for name, size in changed.items())}"
        )
    if (dtype := settings.model.param_dtype) != "float32" and settings.method == "full":
        raise ValueError(
            f"method full trains all weights in float32: set model.param_dtype float32, got {dtype}"
        )


def batch_sizes_for(batch_size: int, accumulate: int, eval_batch_size: int, parts: int) -> dict[str, int]:
    """Rounds batch sizes up until a mesh can split them into `parts`, and `accumulate` down to a size that fits.

    >>> batch_sizes_for(16, 4, 4, 8)
    {'batch_size': 16, 'accumulate': 2, 'eval_batch_size': 8}
    >>> batch_sizes_for(16, 4, 4, 64)
    {'batch_size': 64, 'accumulate': 1, 'eval_batch_size': 64}
    """
    rounded = -(-batch_size // parts) * parts
    fitting = [n for n in range(1, accumulate + 1) if rounded % (n * parts) == 0]
    rounded_eval = -(-eval_batch_size // parts) * parts
    return {"batch_size": rounded, "accumulate": fitting[-1], "eval_batch_size": rounded_eval}


def _float32(tree: Any) -> Any:
    # In bfloat16 an update of less than 1/256 of a value is rounded away.
    def cast(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, np.float32)
        return jnp.asarray(leaf, jnp.float32)

    return jax.tree.map(cast, tree)
