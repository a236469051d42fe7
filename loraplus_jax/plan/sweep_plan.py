"""How many runs of a sweep a device holds, and how long the sweep takes on a number of workers.

Memory and the time of a step are those of the plan of a single run on one device: the frozen weights exist once,
all else once for each run. The data is read, as the numbers of steps and evaluation batches follow from it. The
time is a lower bound, as a plan's; reading the model, compiling, generating texts and the loss on
`sweep.unrelated_text` come on top.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ..data.fetch import TOKENIZER_FILES, resolve
from ..settings.schema import MeshSettings, Settings
from ..step.sharding import make_mesh
from ..sweep.makespan import Schedule, schedule
from ..sweep.method_comparison import TABLE, method_run
from ..sweep.population import load_sweep_data
from ..sweep.settings import SweepRun
from ..sweep.unit import Unit
from ..tasks.interface import BatchPlan, TaskData
from ..training.estimate import batches_of, format_seconds
from ..training.setup import task_module
from .devices import Chip, target_devices
from .plan import Plan, count_evaluation, plan_for, roofline

SHARED = "frozen weights"
"""What all runs on a device share, among the parts of a plan's memory."""


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """What a sweep needs.

    Attributes:
      plans: the plan of a run of each method by its name, or of the sweep of λ by `""`.
      held: the runs that a device holds in parallel, by method.
      group_size: most runs of a unit.
      devices: devices of a worker.
      steps: optimizer steps of a full run.
      batches: evaluation batches of the validation and of the test split.
      seconds: seconds of a run's step and of its evaluation batch, by method; 0 if unknown.
      schedule: the units on the workers; None if a step's time is unknown, without a topology.
    """

    plans: dict[str, Plan]
    held: dict[str, int]
    group_size: int
    devices: int
    steps: int
    batches: dict[str, int]
    seconds: dict[str, tuple[float, float]]
    schedule: Schedule | None

    def to_json(self) -> dict[str, Any]:
        """All numbers as plain values."""
        times = None
        if (found := self.schedule) is not None:
            times = {name: getattr(found, name) for name in ("makespan", "chain", "work", "bound", "workers")}
            times["units"] = len(found.spans)
        return {
            "plans": {name: plan.to_json() for name, plan in self.plans.items()},
            "held": self.held,
            "group_size": self.group_size,
            "devices": self.devices,
            "steps": self.steps,
            "batches": self.batches,
            "seconds": {
                name: dict(zip(("step", "batch"), pair, strict=True)) for name, pair in self.seconds.items()
            },
            "schedule": times,
        }


def plan_sweep(run: SweepRun, workers: int, topology: str | None = None) -> SweepPlan:
    """Compiles a step and an evaluation of each method, and schedules the sweep.

    Args:
      run: settings of the sweep; of the model only its `config.json` and its tokenizer are read.
      workers: number of workers.
      topology: devices of one worker, such as `"h100:1"`; None plans for local devices, without times.

    Raises:
      ValueError, OSError: as `make_plan`; or a run of some method does not fit; or the data cannot be read or does
        not fit the settings, as in a sweep.
    """
    if workers < 1:
        raise ValueError(f"--workers must be at least 1, got {workers}")
    chip, devices = (None, jax.devices()) if topology is None else target_devices(topology)
    directory = resolve(run.model.path, "model", files=TOKENIZER_FILES)
    data, steps = load_sweep_data(run, directory)
    names = dict.fromkeys(("lora", *run.sweep.methods)) if run.sweep.methods else ("",)
    runs = {name: method_run(run, name) if name else run for name in names}
    widest = {name: _single_run(one) for name, one in runs.items()}
    plans = {name: plan_for(one, chip, devices[:1]) for name, one in widest.items()}
    held = {name: runs_held(plan) for name, plan in plans.items()}
    if too_large := [name for name, count in held.items() if count < 1]:
        plan = plans[too_large[0]]
        of_method = f" of {too_large[0]}" if too_large[0] else ""
        raise ValueError(
            f"{plan.device} has {plan.room / 1e9:.1f} GB, and a run{of_method} needs "
            f"{plan.most / 1e9:.1f} GB; a sweep shards no run: choose a larger device, or model.quantize"
        )
    # A device that one run keeps busy; the workers measure whether several in parallel are faster.
    at_once = run.sweep.members_at_once or 1
    group_size = run.sweep.group_size or at_once * len(devices)
    mesh = make_mesh(1, devices=devices[:1])
    shapes = task_module(run).plan_batches(run, data, steps, (*run.seeds, *run.report_seeds), mesh)
    batches = {split: batches_of(data.splits[split], shapes.eval_rows) for split in ("validation", "test")}
    seconds = {name: (max(plan.roofline.values(), default=0.0), 0.0) for name, plan in plans.items()}
    found = None
    if chip is not None and all(step for step, _ in seconds.values()):
        for name, one in widest.items():
            seconds[name] = seconds[name][0], _batch_seconds(one, directory, data, shapes, mesh, chip)
        found = schedule(
            list(runs.values()),
            steps,
            group_size,
            workers,
            _times(list(seconds.values()), batches, len(devices)),
        )
    return SweepPlan(plans, held, group_size, len(devices), steps, batches, seconds, found)


def _times(
    seconds: Sequence[tuple[float, float]], batches: Mapping[str, int], devices: int
) -> Callable[[int, Unit], float]:
    """The function that maps the number of a sweep and a unit of it to seconds on a worker of so many devices."""

    def time_of(sweep: int, unit: Unit) -> float:
        step, batch = seconds[sweep]
        one = step * (unit.stops[-1] - unit.start) + batch * len(unit.stops) * batches[unit.split]
        return one * -(-len(unit.members) // devices)

    return time_of


def _single_run(run: SweepRun) -> Settings:
    """A run of the largest rank, on one device."""
    widest = max(run.trials, key=lambda trial: trial.rank)
    return dataclasses.replace(run.settings_of(widest, run.seed), mesh=MeshSettings(data=1))


def _batch_seconds(
    settings: Settings, directory: Path, data: TaskData, batches: BatchPlan, mesh: Mesh, chip: Chip
) -> float:
    base = task_module(settings).make_base(settings, directory, data.task)
    # The model's inputs are those of a plan; the rows of an evaluation batch are of the real data.
    columns = task_module(settings).placeholder_data(settings)._replace(task=data.task)
    if (work := count_evaluation(settings, base, columns, batches, mesh)) is None:
        raise ValueError(
            f"an evaluation of {batches.eval_rows} rows does not fit {chip.name}; set train.eval_batch_size lower"
        )
    return max(roofline(chip, work, ()).values())


def runs_held(plan: Plan) -> int:
    """Runs that a device holds in parallel, from the plan of one."""
    shared = plan.memory[SHARED]
    return max(0, int((plan.room - shared) // max(1, plan.most - shared)))


def format_sweep(plan: SweepPlan, run: SweepRun) -> str:
    """The text of a plan, for the console."""
    first = next(iter(plan.plans.values()))
    lines = [f"{first.model}: a sweep on workers of {plan.devices} x {first.device}"]
    for name, one in plan.plans.items():
        label = f"{TABLE[name].label}: " if name else ""
        shared = one.memory[SHARED] / 1e9
        lines.append(
            f"{label}a device holds {plan.held[name]:,} runs: {shared:.3f} GB of frozen weights, and "
            f"{one.most / 1e9 - shared:.3f} GB for each, of {one.room / 1e9:.1f} GB"
        )
    validation, test = plan.batches.values()
    lines.append(
        f"{plan.steps:,} steps a run; {validation:,} batches an evaluation in the search, {test:,} in the report"
    )
    if (found := plan.schedule) is None:
        return "\n".join([*lines, "pass --topology, such as h100:1, for the time"])
    stages = Counter((span.unit.stage, span.unit.start) for span in found.spans)
    counts = ", ".join(
        f"{units} from step {start} of the {stage}" for (stage, start), units in stages.items()
    )
    runs = "a run" if plan.group_size == 1 else f"up to {plan.group_size} runs"
    at_most = "at most " if run.sweep.interim_seeds and not run.sweep.widen else ""
    return "\n".join(
        [
            *lines,
            f"{len(found.spans):,} units of {runs}: {counts}",
            f"on {found.workers:,} workers: {at_most}{format_seconds(found.makespan)}; no schedule takes "
            f"less than {format_seconds(found.bound)}, one worker {format_seconds(found.work)}",
            "these are lower bounds for runs one at a time; reading the model and compiling come on top"
            + (", and so does generating texts" if run.task == "generation" else "")
            + (", and so does the loss on sweep.unrelated_text" if run.sweep.unrelated_text else "")
            + (", and so do the learning rates that sweep.widen adds" if run.sweep.widen else ""),
        ]
    )
