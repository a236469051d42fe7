"""What `step_time.py` makes of its measurements: the table, the goals, and whether the losses agree."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from common import median_ratio

# By backend and shape, what may be measured at most: ours over another run's.
_CPU = {"time / no adapters": 1.05, "memory / peft": 0.70, "time / qwix": 0.88}
GOALS = {
    "cpu": {
        "8x64": _CPU | {"time / peft": 0.90, "time / tunix": 0.70},
        "2x512": _CPU | {"time / peft": 0.95, "time / tunix": 0.55},
    },
    "gpu": {shape: {"time / peft": 0.67, "time / qwix": 1.0} for shape in ("8x64", "2x512")},
}
FLOPS_GOAL, DEPTH_GOAL, PEAK_GOAL = 1.03, 1.3, 0.78
UNTRAINED = ("no adapters",)
"""Runs whose loss stays as it was."""
COLUMNS = (
    "step, s",
    "time / PEFT",
    "peak, MB",
    "memory / PEFT",
    "peak in steps, MB",
    "to first step, s",
    "compile, s",
    "share of peak",
    "first loss",
    "last loss",
)


def rows_of(
    shape: str, runs: Mapping[str, Mapping[str, Any]], flops: Mapping[str, float]
) -> list[dict[str, str]]:
    """The table's lines; a dash where there is nothing to say. `flops` is what `ideal_flops` gives."""
    peak, rows = peak_of(runs), []
    for name, run in runs.items():
        cells = {"step, s": run.get("no run", "-")}
        if "seconds" in run:
            cells = _times(run, runs.get("peft", {}))
            if peak:
                cells["share of peak"] = (
                    f"{work_of(name, flops) / float(np.median(run['seconds'])) / peak:.3f}"
                )
            if name != "matmul":
                cells |= _rest(run, runs.get("peft", {}))
        label = f"{name} (eager)" if "eager" in run else name
        rows.append({"shape": shape, "run": label} | dict.fromkeys(COLUMNS, "-") | cells)
    return rows


def peak_of(runs: Mapping[str, Mapping[str, Any]]) -> float | None:
    """FLOPs per second of one large product, None where it was not measured."""
    rates = runs.get("matmul", {}).get("gflop_per_s")
    return 1e9 * float(np.median(rates)) if rates else None


def work_of(name: str, flops: Mapping[str, float]) -> float:
    """The FLOPs that a run cannot do without, from `ideal_flops`."""
    parts = {"matmul": ("weights",), "no adapters": ("weights", "attention")}
    return sum(flops[part] for part in parts.get(name, flops))


def _times(run: Mapping[str, Any], peft: Mapping[str, Any]) -> dict[str, str]:
    cells = {"step, s": f"{np.median(run['seconds']):.4f}"}
    if "seconds" in peft:
        cells["time / PEFT"] = f"{median_ratio(run['seconds'], peft['seconds']):.3f}"
    return cells


def _rest(run: Mapping[str, Any], peft: Mapping[str, Any]) -> dict[str, str]:
    cells = {
        "peak, MB": f"{memory_of(run) / 1e6:,.0f}",
        "to first step, s": f"{run['to_first_step_s']:.1f}",
        "first loss": f"{run['first']['loss']:.6f}",
        "last loss": f"{run['last']['loss']:.6f}",
    }
    if "seconds" in peft:
        cells["memory / PEFT"] = f"{memory_of(run) / memory_of(peft):.3f}"
    if not run["device_peak_bytes"]:
        cells["peak in steps, MB"] = f"{run['steps_peak_bytes'] / 1e6:,.0f}"
    if "compile_s" in run["about"]:
        cells["compile, s"] = f"{run['about']['compile_s']:.1f}"
    return cells


def memory_of(run: Mapping[str, Any]) -> float:
    """The peak that counts: the accelerator's if there is one."""
    return run["device_peak_bytes"] or run["peak_bytes"]


def losses_differ(runs: Mapping[str, Mapping[str, Any]]) -> float:
    """The largest relative difference of first or last losses between two runs; infinite if one is not finite."""
    found = 0.0
    for when in ("first", "last"):
        kept = [run for name, run in runs.items() if when == "first" or name not in UNTRAINED]
        losses = [run[when]["loss"] for run in kept if "loss" in run.get(when, {})]
        if not np.all(np.isfinite(losses)):
            return float("inf")
        if losses:
            found = max(found, (max(losses) - min(losses)) / min(losses))
    return found


def goals_of(
    shape: str, backend: str, ours: str, runs: Mapping[str, Mapping[str, Any]], flops: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Each goal of a shape with what was measured. `flops` is what `ideal_flops` gives."""
    run, found = runs[ours], []
    if "seconds" not in run:
        return found
    for what, bound in GOALS[backend].get(shape, {}).items():
        quantity, peer = what.split(" / ")
        if "seconds" in (other := runs.get(peer, {})):
            ratio = median_ratio(run["seconds"], other["seconds"])
            measured = ratio if quantity == "time" else memory_of(run) / memory_of(other)
            found.append(goal(f"{shape} {what}", measured, bound))
    if backend == "cpu" and (peak := peak_of(runs)):
        share = work_of(ours, flops) / float(np.median(run["seconds"])) / peak
        found.append(goal(f"{shape} share of peak", share, PEAK_GOAL, at_least=True))
    return found


def goal(what: str, measured: float, bound: float, *, at_least: bool = False) -> dict[str, Any]:
    met = measured >= bound if at_least else measured <= bound
    return {
        "what": what,
        "measured": round(measured, 4),
        "bound": "at least" if at_least else "at most",
        "goal": bound,
        "met": "met" if met else "missed",
    }
