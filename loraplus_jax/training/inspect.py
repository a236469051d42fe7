"""`loraplus inspect`: what a run would train, and at which rates, without training."""

from ..optim.diagnostics import describe
from ..settings.schema import Settings
from .setup import abstract_run


def inspect(settings: Settings) -> str:
    """What would be trained, at which rate: role, group's peak rate, decay and size of every leaf, and the totals.

    Raises:
      ValueError, OSError: as training would.
    """
    if (address := settings.distributed.coordinator) is not None:
        raise ValueError(
            f"distributed.coordinator is {address}, and inspect joins no other process: give "
            "--distributed.coordinator null to look at the run with the devices here"
        )
    run = abstract_run(settings)
    peak = settings.optimizer.warmup_steps
    parts = run.shapes
    table = describe(parts.trainable, run.tx, parts.specs, frozen=parts.frozen, step=peak)
    sizes = ", ".join(f"{size:,} {name}" for name, size in run.data.examples.items())
    steps = f"{run.steps} steps of {settings.train.batch_size}"
    return f"{table}\n{steps}; rates are those of step {peak}; data: {sizes}"
