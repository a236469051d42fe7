"""Programs that a plan compiles from shapes alone (step and evaluation, as `train` would), and their memory."""

import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from ..settings.schema import Settings
from ..step.sharding import batch_sharding
from ..tasks.interface import AdaptedModel, BaseModel, Task
from ..training.optimizer import check_rates, make_optimizer
from ..training.programs import AbstractRun, lower_measurement, trace_evaluation, trace_step
from ..training.setup import add_adapters, count_steps, make_problem

ASSUMED_STEPS = 10**9
"""Training steps assumed if the settings count in epochs, whose length depends on the data."""


class LoweredStep(NamedTuple):
    """A training step before compilation.

    Attributes:
      parts: the model, with shapes for all values.
      run: what the step is made of.
      jaxpr: the traced step.
      lowered: the lowered step.
      held: the step's inputs by purpose: trees of shapes and of shardings.
    """

    parts: AdaptedModel
    run: AbstractRun
    jaxpr: Any
    lowered: jax.stages.Lowered
    held: dict[str, tuple[Any, Any]]


def plan_step(settings: Settings, base: BaseModel, task: Task, mesh: Mesh) -> LoweredStep:
    """Lowers the step that `train` would compile, for a base without weights."""
    parts = add_adapters(base, settings.applied)
    # The steps are only numbers in the schedule, so any will do.
    train = dataclasses.replace(settings.train, steps=settings.train.steps or ASSUMED_STEPS, epochs=None)
    steps = count_steps(dataclasses.replace(settings, train=train), train.batch_size)
    tx = make_optimizer(settings.optimizer, settings.lr_ratio, steps, parts.specs)
    check_rates(settings.optimizer, parts.trainable)
    batches = task.full_batches(settings.task_options)
    batch = batches.train
    run = AbstractRun(make_problem(settings, task, parts, batches, steps, mesh), mesh, tx)
    state, shardings = run.state, run.shardings
    held = {
        "frozen weights": (parts.frozen, shardings.frozen),
        "trained": (state.trainable, shardings.state.trainable),
        "optimizer": (state.opt_state, shardings.state.opt_state),
        "batch": (batch, jax.tree.map(lambda _: batch_sharding(mesh), batch)),
    }
    traced = trace_step(run)
    return LoweredStep(parts, run, traced.jaxpr, traced.lower(), held)


def bytes_between_steps(
    settings: Settings, step: LoweredStep, workspace: int = 0
) -> dict[str, tuple[int | None, str | None]]:
    """What the programs need that run between steps: `"evaluation"`, `"theory"` (`train.theory_every`).

    Each is the total bytes, optimizer state and `workspace` included, and the compiler's message if it ran out of
    memory. The bytes are None if theory is not set, and for the evaluation of multiple choice, whose rows depend on
    the data.
    """
    weights, trained, optimizer = (
        local_bytes(*step.held[name]) for name in ("frozen weights", "trained", "optimizer")
    )
    needed: dict[str, tuple[int | None, str | None]] = {"evaluation": (None, None), "theory": (None, None)}

    def add(name: str, lowered: jax.stages.Lowered) -> None:
        program, problem = try_compile(lowered)
        size = memory_sizes(program, problem, weights + trained)[1] + optimizer + workspace
        needed[name] = size, problem and f"{name}: {problem}"

    if settings.task != "multiple_choice":
        add("evaluation", trace_evaluation(step.run).lower())
    if settings.train.theory_every is not None:
        add("theory", lower_measurement(step.run))
    return needed


def local_bytes(tree: Any, shardings: Any) -> int:
    """Bytes that one device holds of a tree of arrays or shapes."""
    local = jax.tree.map(
        lambda x, sharding: math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize, tree, shardings
    )
    return sum(jax.tree.leaves(local))


def try_compile(lowered: jax.stages.Lowered, options: dict[str, Any] | None = None) -> tuple[Any, str | None]:
    """The compiled program and None, or None and the compiler's message if it ran out of memory."""
    try:
        return lowered.compile(compiler_options=options), None
    except jax.errors.JaxRuntimeError as error:
        # XLA has no class for it, only a status at the start of the message.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, " ".join(str(error).split())


def memory_sizes(program: Any, problem: str | None, held: int) -> tuple[int, int, int]:
    """Bytes of temporaries, in total, and at the peak."""
    if program is None:
        # The TPU compiler reports the total, or only the temporaries if these alone are too large.
        used = re.search(r"Used ([\d.]+)([KMGT]) of|temporaries \(([\d.]+)([KMGT])\)", problem or "")
        needed = held
        if used is not None:
            number, unit = used.group(1, 2) if used[1] else used.group(3, 4)
            needed = int(float(number) * 2 ** (10 * " KMGT".index(unit))) + (0 if used[1] else held)
        return max(0, needed - held), needed, 0
    # Outputs that alias donated inputs need no memory of their own.
    stats = program.memory_analysis()
    fresh = stats.output_size_in_bytes - stats.alias_size_in_bytes
    temporaries = stats.temp_size_in_bytes + fresh
    needed = stats.argument_size_in_bytes + temporaries + stats.generated_code_size_in_bytes
    return temporaries, needed, getattr(stats, "peak_memory_in_bytes", 0)
