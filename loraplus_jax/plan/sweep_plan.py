"""How many runs of a sweep a device holds, and how long the sweep takes on a number of workers.

Memory and the time of a step are those of the plan of a single run on one device: the frozen weights exist once,
all else once for each run. The time is a lower bound, as a plan's; evaluations, starts and compilation come on top.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax

from ..settings.schema import MeshSettings
from ..sweep.makespan import Schedule, schedule
from ..sweep.method_comparison import TABLE, method_run
from ..sweep.settings import SweepRun
from ..sweep.unit import Unit
from ..training.estimate import format_seconds
from .devices import Chip, target_devices
from .plan import Plan, plan_for

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
      schedule: the units on the workers; None if a step's time is unknown, without a topology.
    """

    plans: dict[str, Plan]
    held: dict[str, int]
    group_size: int
    devices: int
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
            "schedule": times,
        }


def plan_sweep(run: SweepRun, workers: int, topology: str | None = None) -> SweepPlan:
    """Compiles a run of each method, and schedules the sweep.

    Args:
      run: settings of the sweep.
      workers: number of workers.
      topology: devices of one worker, such as `"h100:1"`; None plans for local devices, without times.

    Raises:
      ValueError, OSError: as `make_plan`; or a run of some method does not fit; or `train.steps` is not set.
    """
    if workers < 1:
        raise ValueError(f"--workers must be at least 1, got {workers}")
    if run.train.steps is None:
        raise ValueError("plan --workers reads no data, which epochs need; set train.steps")
    chip, devices = (None, jax.devices()) if topology is None else target_devices(topology)
    names = dict.fromkeys(("lora", *run.sweep.methods)) if run.sweep.methods else ("",)
    runs = {name: method_run(run, name) if name else run for name in names}
    plans = {name: _plan(one, chip, devices[:1]) for name, one in runs.items()}
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
    seconds = [max(plan.roofline.values(), default=0.0) for plan in plans.values()]

    def time_of(sweep: int, unit: Unit) -> float:
        each = -(-len(unit.members) // len(devices))
        return seconds[sweep] * (unit.stops[-1] - unit.start) * each

    found = None
    if all(seconds):
        found = schedule(list(runs.values()), run.train.steps, group_size, workers, time_of)
    return SweepPlan(plans, held, group_size, len(devices), found)


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
    if (found := plan.schedule) is None:
        return "\n".join([*lines, "pass --topology, such as h100:1, for the time"])
    stages = Counter((span.unit.stage, span.unit.start) for span in found.spans)
    counts = ", ".join(
        f"{units} from step {start} of the {stage}" for (stage, start), units in stages.items()
    )
    at_most = "at most " if run.sweep.interim_seeds else ""
    return "\n".join(
        [
            *lines,
            f"{len(found.spans):,} units of up to {plan.group_size} runs: {counts}",
            f"training on {found.workers:,} workers: {at_most}{format_seconds(found.makespan)}; no schedule takes "
            f"less than {format_seconds(found.bound)}, one worker {format_seconds(found.work)}",
            "these are lower bounds of steps; evaluations, reading the model and compiling come on top",
        ]
    )


def _plan(run: SweepRun, chip: Chip | None, devices: Sequence[Any]) -> Plan:
    widest = max(run.trials, key=lambda trial: trial.rank)
    settings = run.settings_of(widest, run.seed)
    return plan_for(dataclasses.replace(settings, mesh=MeshSettings(data=1)), chip, devices)
