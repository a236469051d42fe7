"""`sweep.unrelated_text`: the loss on texts unlike the training data, which shows how much a method forgets."""

from collections.abc import Callable

from ..data.batches import round_up
from ..step.sharding import batch_parts, make_mesh
from ..step.train_step import make_eval
from ..tasks.causal_lm import LanguageTask, make_losses
from ..training.evaluation import evaluate
from .population import Members, Population, add_scales


def make_unrelated_loss(population: Population) -> Callable[[Members], float] | None:
    """Returns a function to a member's mean loss per token of the text; None if none is set."""
    run, parts, text = population.run, population.parts, population.abstract.unrelated
    if text is None:
        return None
    mesh = make_mesh(run.mesh.data)
    size = round_up(run.train.eval_batch_size, batch_parts(mesh))
    # Of all tokens of a text, whatever the task of the sweep.
    losses = make_losses(run, LanguageTask(kind="instruction"), parts, mesh)
    evaluate_batch = make_eval(losses.evaluate, mesh=mesh)

    def loss(member: Members) -> float:
        frozen = add_scales(parts.frozen, parts.specs, member)
        return evaluate(evaluate_batch, member.state.trainable, frozen, text.columns, size, mesh)["loss"]

    return loss
