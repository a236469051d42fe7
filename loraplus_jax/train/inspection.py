"""`loraplus inspect`: what a run would train, and at which rates, without training."""

import dataclasses

from ..diagnostics import describe
from ..sharding import check_tensor, make_mesh
from .family import rows_of
from .fetch import resolve
from .prepare import build, check_mesh, count_steps, family_of, make_optimizer
from .settings import Settings


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
    mesh = make_mesh(**dataclasses.asdict(settings.mesh))
    check_mesh(settings, mesh)
    directory = resolve(settings.model.path, "model")
    data = family_of(settings).load_data(settings, directory)
    steps = count_steps(settings, rows_of(data.splits["train"]))
    config = settings.applied
    parts = build(settings, directory, data.task, config)
    check_tensor(mesh, parts.base.tensor_sizes)
    tx = make_optimizer(settings.optimizer, config, steps, parts.specs)
    peak = settings.optimizer.warmup_steps
    table = describe(parts.trainable, tx, parts.specs, frozen=parts.frozen, step=peak)
    sizes = ", ".join(f"{size:,} {name}" for name, size in data.examples.items())
    return f"{table}\n{steps} steps of {settings.train.batch_size}; rates are those of step {peak}; data: {sizes}"
