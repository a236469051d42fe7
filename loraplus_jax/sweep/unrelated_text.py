"""`sweep.unrelated_text`: the loss on texts unlike the training data, which shows how much a method forgets."""

from collections.abc import Callable

from ..step.sharding import batch_parts, make_mesh, replicate
from ..step.train_step import make_eval
from ..tasks.causal_lm import LanguageTask
from ..training.evaluation import evaluate
from .member_programs import Members, add_scales
from .population import Population


def make_unrelated_loss(
    population: Population, between: Callable[[], None]
) -> Callable[[Members], float] | None:
    """Returns a function from a member to its mean loss per token of the text; None if there is no text.

    It calls `between` before each batch, which may raise.
    """
    run, parts, text = population.run, population.parts, population.data.unrelated
    if text is None:
        return None
    mesh = make_mesh(run.mesh.data)
    # Of all tokens of a text, whatever the task of the sweep.
    losses = LanguageTask(kind="instruction").make_losses(run.task_options, parts, mesh)
    evaluate_batch = make_eval(losses.evaluate, mesh=mesh)
    # One row a device: the members fill the memory, and a trained head computes the logits of all tokens.
    size = batch_parts(mesh)

    def loss(member: Members) -> float:
        trainable = replicate(mesh, member.state.trainable)
        frozen = add_scales(parts.frozen, parts.specs, member)
        values = evaluate(evaluate_batch, trainable, frozen, text.columns, size, mesh, between=between)
        return values["loss"]

    return loss
