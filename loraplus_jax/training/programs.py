"""The programs of a run, compiled from shapes alone."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..interpreter.unstack import OnLayers, join_layers, split_layers
from ..step.problem import Problem, Shapes
from ..step.sharding import Shardings, make_shardings
from ..step.train_step import LossFn, TrainState, init_state, jit_step, make_eval
from .estimate import count_flops
from .theory_metrics import count_rows, lower_theory
from .xla import ProgramByShape, compiler_options


@dataclasses.dataclass(frozen=True)
class AbstractRun:
    """A run before its weights are read: all that its programs are compiled from.

    Attributes:
      problem: what is trained.
      mesh: the device mesh.
      tx: the optimizer.
    """

    problem: Problem
    mesh: Mesh
    tx: optax.GradientTransformationExtraArgs

    @functools.cached_property
    def state(self) -> TrainState:
        """The shapes of the training state."""

        def init() -> TrainState:
            # Traced and never computed: an optimizer makes its state from arrays only.
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.problem.trainable)
            return init_state(zeros, self.tx, jax.random.key(0))

        return jax.eval_shape(init)

    @functools.cached_property
    def shardings(self) -> Shardings:
        """The shardings of the state and the frozen variables."""
        problem = self.problem
        return make_shardings(self.mesh, self.state, problem.frozen, specs=problem.specs, rules=problem.rules)

    @property
    def layers(self) -> int:
        """The number of stacked layers whose arrays step and evaluation take one by one, or 0; see `OnLayers`."""
        return self.problem.layers if reads_layers(self.mesh) else 0

    @property
    def frozen(self) -> Any:
        """The shapes of the frozen variables, as step and evaluation take them."""
        return split_layers(self.problem.frozen, self.layers)

    @property
    def layout(self) -> dict[str, Any]:
        """The mesh, and the shardings of step and evaluation."""
        shardings, whole = self.shardings, NamedSharding(self.mesh, PartitionSpec())
        of_leaf = lambda place, leaf: len(leaf) * (whole,) if isinstance(leaf, tuple) else place  # noqa: E731
        frozen = jax.tree.map(of_leaf, shardings.frozen, self.frozen)
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


def compile_programs(run: AbstractRun, *, theory: bool, unrolled: bool) -> Programs:
    """Compiles step, evaluation and, if `theory`, its measurement, from shapes.

    `unrolled` says whether the layers are no loop of the step's program.
    """
    measurement = lower_measurement(run).compile() if theory else None
    options = compiler_options(run.mesh, unrolled=unrolled)
    traced, planned = trace_step(run), run.problem.train_batch

    def compile_step(batch: Shapes) -> OnLayers:
        lowered = (traced if batch is planned else trace_step(run, batch)).lower()
        return OnLayers(lowered.compile(options), run.layers)

    step = ProgramByShape(compile_step, planned)
    evaluation = trace_evaluation(run)
    step_work = count_flops(traced.jaxpr) / count_flops(evaluation.jaxpr)
    return Programs(step, OnLayers(evaluation.lower().compile(), run.layers), measurement, step_work)


def trace_step(run: AbstractRun, batch: Shapes | None = None) -> jax.stages.Traced:
    """Traces the training step for a batch of these shapes, by default the run's."""
    problem, loss = run.problem, with_layers(run.problem.loss)
    step = jit_step(loss, run.tx, accumulate=problem.accumulate, skip_nonfinite=True, **run.layout)
    return step.trace(run.state, run.frozen, batch or problem.train_batch)


def trace_evaluation(run: AbstractRun) -> jax.stages.Traced:
    """Traces the evaluation of a batch."""
    evaluate = make_eval(with_layers(run.problem.evaluate), **run.layout)
    return evaluate.trace(run.state.trainable, run.frozen, run.problem.eval_batch)


def lower_measurement(run: AbstractRun) -> jax.stages.Lowered:
    """Lowers the measurement for the theory, on some rows of a batch."""
    problem, layout = run.problem, {"mesh": run.mesh, "shardings": run.shardings}
    count = count_rows(problem.train_batch["weight"].shape[0], run.mesh)
    rows = {n: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype) for n, x in problem.train_batch.items()}
    return lower_theory(problem.unbounded_loss, problem.specs, run.state, problem.frozen, rows, **layout)


def reads_layers(mesh: Mesh) -> bool:
    """Whether programs on this mesh may take each layer's arrays instead of stacks: on a single CPU device."""
    return mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


def with_layers(loss_fn: LossFn) -> LossFn:
    """The loss function, also for variables from `split_layers`."""
    return lambda variables, batch, rng: loss_fn(join_layers(variables), batch, rng)
