"""`loraplus inspect`: shows trainable parameters and learning rates without training."""

from ..optim.diagnostics import describe
from ..settings.schema import Settings
from .saved_adapter import check_init_adapter
from .setup import abstract_run, params_of


def inspect(settings: Settings) -> str:
    """Returns a table of all trainable parameters with role, peak learning rate, weight decay and size, and totals.

    Raises:
      ValueError, OSError: as in training.
    """
    if (address := settings.distributed.coordinator) is not None:
        raise ValueError(
            f"distributed.coordinator is {address}, but inspect runs in a single process; set "
            "--distributed.coordinator null to inspect the run with the local devices"
        )
    run = abstract_run(settings)
    if settings.init_adapter is not None:
        check_init_adapter(settings, run.shapes, params_of(run.shapes), run.data.task)
    peak = settings.optimizer.warmup_steps
    parts = run.shapes
    table = describe(parts.trainable, run.tx, parts.specs, frozen=parts.frozen, step=peak)
    lines = [f"{table}"]
    layers = next((spec.layers for spec in parts.specs.values() if spec.layers is not None), None)
    if layers is not None:
        names = ", ".join(map(str, layers))
        lines.append(f"lora.layers_to_transform: only layers {names} are adapted, the others stay zero")
    sizes = ", ".join(f"{size:,} {name}" for name, size in run.data.examples.items())
    steps = f"{run.steps} steps of batch size {settings.train.batch_size}"
    return "\n".join([*lines, f"{steps}; learning rates at step {peak}; data: {sizes}"])
