"""Prepares a population from the settings of a sweep: data, model, programs, weights and initial values."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ..adapter.config import BASE_INITS
from ..data.fetch import resolve
from ..models.checkpoints.model_files import ModelFiles
from ..models.checkpoints.params import load_params
from ..models.files import open_files
from ..step.fingerprints import fingerprint
from ..step.population import MEMBER_AXIS
from ..step.run_metadata import describe_run
from ..step.sharding import make_mesh, replicate
from ..tasks.causal_lm import load_text
from ..tasks.interface import AdaptedModel, BatchPlan, TaskData, row_count
from ..training.adapter_start import begin_from, make_start
from ..training.optimizer import check_rates, make_optimizer
from ..training.provenance import Origin, model_identity
from ..training.setup import (
    build_model,
    count_steps,
    make_problem,
    params_of,
    set_weights,
    start_magnitudes,
    task_class,
)
from .halving import check_rungs
from .member_programs import Members, Programs, compile_programs, first_member, make_member_step
from .settings import SweepRun
from .trial import Trial


class Population(NamedTuple):
    """Everything a sweep trains with.

    Attributes:
      run: settings of the sweep.
      data: data of the sweep.
      parts: the model with adapters of the largest rank.
      steps: optimizer steps of a full run.
      batches: the shapes of a member's batches.
      mesh: the devices, along the axis `"members"`.
      programs: the compiled step and evaluation for all members.
      programs_for: maps a number of members to the programs that compute them with the fewest zeros.
      first: maps `(trial, seed)` to the initial member.
      origin: base and data, which everything that a sweep continues from must share.
      metadata: metadata of the checkpoints.
    """

    run: SweepRun
    data: TaskData
    parts: AdaptedModel
    steps: int
    batches: BatchPlan
    mesh: Mesh
    programs: Programs
    programs_for: Callable[[int], Programs]
    first: Callable[[Trial, int], Members]
    origin: Origin
    metadata: dict[str, Any]


class AbstractPopulation(NamedTuple):
    """A population before weights are read.

    Attributes:
      run: settings of the sweep.
      files: the model's files.
      data: data of the sweep.
      steps: optimizer steps of a full run.
      widest: settings of the sweep with the largest rank.
      shapes: the model of that rank, with shapes as variables.
    """

    run: SweepRun
    files: ModelFiles
    data: TaskData
    steps: int
    widest: SweepRun
    shapes: AdaptedModel


def abstract_population(run: SweepRun, loaded: TaskData | None = None) -> AbstractPopulation:
    """Downloads model and data, and checks that they, the steps, the adapters and the rates fit together.

    Args:
      run: settings of the sweep.
      loaded: its data, if already loaded.
    """
    files = open_files(resolve(run.model.path, "model"))
    data, steps = load_sweep_data(run, files, loaded)
    widest = dataclasses.replace(run, lora=dataclasses.replace(run.lora, rank=max(run.ranks)))
    shapes = build_model(widest, files, data.task, widest.applied)
    make_optimizer(run.shared_optimizer, widest.lr_ratio, steps, shapes.specs)  # for its errors
    check_rates(run.optimizer, shapes.trainable)
    return AbstractPopulation(run, files, data, steps, widest, shapes)


def load_sweep_data(run: SweepRun, files: ModelFiles, loaded: TaskData | None = None) -> tuple[TaskData, int]:
    """The data of a sweep, by the model's tokenizer, and the optimizer steps of a full run.

    Raises:
      ValueError, OSError: the data cannot be read, has no test split, or does not fit the steps and rungs.
    """
    data = loaded
    if data is None:
        data = task_class(run).load(run.task_options, files)
        if (path := run.sweep.unrelated_text) is not None:
            try:
                unrelated = load_text(run.task_options, files, path)
            except (ValueError, OSError) as error:
                raise ValueError(f"sweep.unrelated_text: {error}") from None
            digests = data.digests | {"unrelated": unrelated.digest}
            data = data._replace(unrelated=unrelated, digests=digests)
    if "test" not in data.splits:
        raise ValueError(
            "a sweep selects on the validation split and reports on the test split; set data.test with "
            "data.train, or data.test_fraction with data.path"
        )
    steps = count_steps(run, row_count(data.splits["train"]))
    check_rungs(run.sweep, steps, run.optimizer.warmup_steps)
    return data, steps


def load_weights(abstract: AbstractPopulation) -> Any:
    """Reads the base's weights."""
    shapes = abstract.shapes
    return load_params(abstract.files, shapes.base.table, params_of(shapes), new=shapes.base.new)


def origin_of(abstract: AbstractPopulation, base: str | None) -> Origin:
    """Base and data of a sweep; `base` is the fingerprint of the weights, None if they are not read."""
    identity = model_identity(abstract.widest, abstract.files, abstract.data.task)
    return {"base": base, "identity": identity | {"data": abstract.data.digests}}


def prepare_population(abstract: AbstractPopulation, places: int, at_once: int | None = None) -> Population:
    """Compiles and loads everything, as `prepare` does for a single run.

    Args:
      abstract: the population from `abstract_population`.
      places: maximum number of members.
      at_once: members that a device computes in parallel; None measures which number is fastest.

    Raises:
      ValueError, OSError: settings, model and data do not match, memory is too small, or a file cannot be read.
    """
    run, files, data, steps, widest, shapes = abstract
    mesh = Mesh(make_mesh(run.mesh.data).devices.reshape(-1), (MEMBER_AXIS,))
    config = widest.applied
    # From shapes, before weights are read: what is too large is known in seconds.
    seeds = (*run.seeds, *run.report_seeds)
    batches = data.task.plan_batches(widest.task_options, data, steps, seeds, mesh)
    problem = make_problem(widest, data.task, shapes, batches, steps)
    # Members give it arrays, so parameter groups whose rates differ in any member stay separate in every member.
    optimizer = functools.partial(make_optimizer, run.shared_optimizer, steps=steps, specs=shapes.specs)

    def begin(trial: Trial, seed: int, trainable: Any) -> Members:
        lora = widest.settings_of(trial, seed).lora
        scales = {module: lora.scale_of(module) for module in shapes.specs}
        rates = {"learning_rate": trial.learning_rate, "lr_ratio": trial.lr_ratio}
        return first_member(trainable, optimizer, **rates, scales=scales, seed=seed)

    step = make_member_step(problem, optimizer, run.train.max_skipped)
    like = functools.partial(begin, run.trials[0], 0)
    programs, programs_for = compile_programs(problem, step, like, mesh, places, at_once)
    weights = load_weights(abstract)
    # Of all weights: members begin with them in both stages, with what is trained in full too.
    base = fingerprint(weights)
    parts = set_weights(widest, shapes, weights)
    parts = parts._replace(frozen=replicate(mesh, parts.frozen))
    start = None
    if config is not None and config.init in BASE_INITS:
        start = make_start(config, parts, files, {})
        parts = begin_from(parts, start, config)

    # Members of one rank and seed begin alike, and there are as many of them as settings.
    # Of rate, lambda and alpha the initial values do not depend.
    @functools.cache
    def shapes_of(rank: int) -> AdaptedModel:
        if rank == widest.lora.rank:
            return shapes
        settings = run.settings_of(run.trials[0]._replace(rank=rank), run.seeds[0])
        return build_model(settings, files, data.task, settings.applied)

    @functools.cache
    def trainable(rank: int, seed: int) -> Any:
        """Initial values of a single run of this rank, zero-padded to the largest."""
        settings = run.settings_of(run.trials[0]._replace(rank=rank), seed)
        values = start_magnitudes(set_weights(settings, shapes_of(rank), weights)).trainable
        # The padding stays bitwise zero: the gradient of either factor is a product with the other factor.
        return jax.tree.map(_pad_to, values if start is None else values | {"lora": start}, parts.trainable)

    def first(trial: Trial, seed: int) -> Members:
        return begin(trial, seed, trainable(trial.rank, seed))

    metadata = describe_run(parts.specs, config, task=data.task.notes())
    if start is not None:
        metadata["start"] = fingerprint(start)
    origin = origin_of(abstract, base)
    return Population(run, data, parts, steps, batches, mesh, programs, programs_for, first, origin, metadata)


def _pad_to(leaf: Any, like: Any) -> np.ndarray:
    padding = [(0, wide - size) for size, wide in zip(leaf.shape, like.shape, strict=True)]
    return np.pad(np.asarray(leaf), padding)
