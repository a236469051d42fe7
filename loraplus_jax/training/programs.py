"""The programs of a run, compiled from shapes alone."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..interpreter.unstack import OnLayers, join_layers, split_layers
from ..settings.schema import Settings
from ..step.sharding import Shardings, make_shardings
from ..step.train_step import LossFn, TrainState, init_state, jit_step, make_eval
from ..tasks.interface import AdaptedModel, BatchPlan, Shapes, TaskData
from .estimate import count_flops
from .theory_metrics import count_rows, lower_theory
from .xla import ProgramByShape, compiler_options


@dataclasses.dataclass(frozen=True)
class AbstractRun:
    """A run before its weights are read: all that its programs are compiled from.

    Attributes:
      settings, data: see `Run`.
      mesh: the device mesh.
      steps: the total number of optimizer steps.
      batches: the shapes of the batches.
      parts: the model, with shapes as variables.
      tx: the optimizer.
    """

    settings: Settings
    data: TaskData
    mesh: Mesh
    steps: int
    batches: BatchPlan
    parts: AdaptedModel
    tx: optax.GradientTransformationExtraArgs

    @functools.cached_property
    def state(self) -> TrainState:
        """The shapes of the training state."""

        def init() -> TrainState:
            # Traced and never computed: an optimizer makes its state from arrays only.
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.parts.trainable)
            return init_state(zeros, self.tx, jax.random.key(0))

        return jax.eval_shape(init)

    @functools.cached_property
    def shardings(self) -> Shardings:
        """The shardings of the state and the frozen variables."""
        parts = self.parts
        return make_shardings(self.mesh, self.state, parts.frozen, specs=parts.specs, rules=parts.base.rules)

    @property
    def layers(self) -> int:
        """The number of stacked layers whose arrays step and evaluation take one by one, or 0; see `OnLayers`."""
        return self.parts.base.layers if reads_layers(self.mesh) else 0

    @property
    def layout(self) -> dict[str, Any]:
        """The mesh, and the shardings of step and evaluation."""
        shardings, whole = self.shardings, NamedSharding(self.mesh, PartitionSpec())
        split = split_layers(self.parts.frozen, self.layers)
        of_leaf = lambda place, leaf: len(leaf) * (whole,) if isinstance(leaf, tuple) else place  # noqa: E731
        frozen = jax.tree.map(of_leaf, shardings.frozen, split)
        return {"mesh": self.mesh, "shardings": Shardings(shardings.state, frozen)}


class Programs(NamedTuple):
    """The compiled programs of a run.

    Attributes:
      step: `(state, frozen, batch) -> (state, metrics)`, see `step.make_step`; a `ProgramByShape`.
      evaluate: `(trainable, frozen, batch) -> pairs`, see `step.make_eval`.
      theory: `(trainable, before, frozen, batch) -> terms`, see `step.make_theory`; None if disabled.
      step_work: FLOPs of a training step over those of an evaluation batch.
    """

    step: Any
    evaluate: Any
    theory: Any = None
    step_work: float = 1.0

    @property
    def compiled(self) -> list[Any]:
        """The programs that need the most memory."""
        return [p for p in (self.step and self.step.largest, self.evaluate, self.theory) if p is not None]


def compile_programs(run: AbstractRun) -> Programs:
    """Compiles step, evaluation and, if enabled, theory measurement from shapes."""
    settings, task, parts, batches, mesh = run.settings, run.data.task, run.parts, run.batches, run.mesh
    theory = None
    if settings.train.theory_every is not None:
        rows = theory_rows(batches, mesh)
        # Its rows are no micro-batch of a step, so they may have more positions with a loss.
        unbounded = task.make_losses(settings.task_options, parts, mesh)
        layout = {"mesh": mesh, "shardings": run.shardings}
        theory = lower_theory(unbounded.train, parts.specs, run.state, parts.frozen, rows, **layout).compile()
    options = compiler_options(mesh, unrolled=bool(settings.model.unroll))

    traced = trace_step(run)

    def compile_step(batch: Shapes) -> OnLayers:
        lowered = (traced if batch is batches.train else trace_step(run, batch)).lower()
        return OnLayers(lowered.compile(options), run.layers)

    step = ProgramByShape(compile_step, batches.train)
    evaluation = trace_evaluation(run)
    step_work = count_flops(traced.jaxpr) / count_flops(evaluation.jaxpr)
    return Programs(step, OnLayers(evaluation.lower().compile(), run.layers), theory, step_work)


def trace_step(run: AbstractRun, batch: Shapes | None = None) -> jax.stages.Traced:
    """Traces the training step for a batch of these shapes, by default the run's."""
    losses = run.data.task.make_losses(run.settings.task_options, run.parts, run.mesh, run.batches.scored)
    accumulate = run.settings.train.accumulate
    step = jit_step(
        with_layers(losses.train), run.tx, accumulate=accumulate, skip_nonfinite=True, **run.layout
    )
    frozen = split_layers(run.parts.frozen, run.layers)
    return step.trace(run.state, frozen, batch or run.batches.train)


def trace_evaluation(run: AbstractRun) -> jax.stages.Traced:
    """Traces the evaluation of a batch."""
    losses = run.data.task.make_losses(run.settings.task_options, run.parts, run.mesh, run.batches.scored)
    evaluate = make_eval(with_layers(losses.evaluate), **run.layout)
    return evaluate.trace(
        run.state.trainable, split_layers(run.parts.frozen, run.layers), run.batches.evaluate
    )


def reads_layers(mesh: Mesh) -> bool:
    """Whether programs on this mesh may take each layer's arrays instead of stacks: on a single CPU device."""
    return mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


def with_layers(loss_fn: LossFn) -> LossFn:
    """The loss function, also for variables from `split_layers`."""
    return lambda variables, batch, rng: loss_fn(join_layers(variables), batch, rng)


def theory_rows(batches: BatchPlan, mesh: Mesh) -> Shapes:
    """The shapes of the rows of a batch to measure for the theory."""
    count = count_rows(batches.train_rows, mesh)
    return {name: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype) for name, x in batches.train.items()}
