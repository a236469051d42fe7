"""`loraplus inspect`: shows trainable parameters and learning rates without training."""

import dataclasses

from ..data.fetch import resolve
from ..models.files import open_files
from ..optim.diagnostics import describe
from ..settings.schema import Settings
from ..step.sharding import make_mesh
from .saved_adapter import check_init_adapter, find_init_adapter
from .setup import abstract_run, check_mesh, task_class


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
    mesh = make_mesh(**dataclasses.asdict(settings.mesh))
    check_mesh(settings, mesh)
    files = open_files(resolve(settings.model.path, "model"))
    data = task_class(settings).load(settings.task_options, files)
    parts, batches, run = abstract_run(settings, files, data, mesh)
    if (init := find_init_adapter(settings)) is not None:
        check_init_adapter(init, settings, parts, data.task)
    peak = settings.optimizer.warmup_steps
    table = describe(parts.trainable, run.tx, parts.specs, frozen=parts.frozen, step=peak)
    lines = [f"{table}"]
    layers = next((spec.layers for spec in parts.specs.values() if spec.layers is not None), None)
    if layers is not None:
        names = ", ".join(map(str, layers))
        lines.append(f"lora.layers_to_transform: only layers {names} are adapted, the others stay zero")
    sizes = ", ".join(f"{size:,} {name}" for name, size in data.examples.items())
    size = settings.train.batch_size
    lines.append(
        f"{run.problem.steps} steps of batch size {size}; learning rates at step {peak}; data: {sizes}"
    )
    return "\n".join((*lines, *batches.summary))
