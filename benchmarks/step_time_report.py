"""What `step_time.py` makes of its measurements: the table, the goals, and whether the losses agree."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from common import median_ratio

# Time and peak memory as shares of PEFT's, by backend and shape; None where nothing is asked for.
GOALS = {
    "cpu": {"8x64": (0.90, 0.85), "2x512": (0.95, 0.80)},
    "gpu": {"8x64": (0.67, None), "2x512": (0.67, None)},
}
FLOPS_GOAL, DEPTH_GOAL = 1.03, 1.3
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
    rates = runs.get("matmul", {}).get("gflop_per_s")
    peak = 1e9 * float(np.median(rates)) if rates else None
    rows = []
    for name, run in runs.items():
        cells = {"step, s": run.get("no run", "-")}
        if "seconds" in run:
            work = flops["weights"] if name == "matmul" else sum(flops.values())
            cells = _times(run, runs.get("peft", {}))
            if peak:
                cells["share of peak"] = f"{work / float(np.median(run['seconds'])) / peak:.3f}"
            if name != "matmul":
                cells |= _rest(run, runs.get("peft", {}))
        label = f"{name} (eager)" if "eager" in run else name
        rows.append({"shape": shape, "run": label} | dict.fromkeys(COLUMNS, "-") | cells)
    return rows


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
        losses = [run[when]["loss"] for run in runs.values() if "loss" in run.get(when, {})]
        if not np.all(np.isfinite(losses)):
            return float("inf")
        if losses:
            found = max(found, (max(losses) - min(losses)) / min(losses))
    return found


def goals_of(
    shape: str, backend: str, ours: str, runs: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Each goal of a shape with what was measured."""
    run, found = runs[ours], []
    if "seconds" not in run:
        return found
    time_goal, memory_goal = GOALS[backend].get(shape, (None, None))
    if "seconds" in runs.get("peft", {}):
        found.append(
            goal(f"{shape} time / PEFT", median_ratio(run["seconds"], runs["peft"]["seconds"]), time_goal)
        )
        found.append(goal(f"{shape} memory / PEFT", memory_of(run) / memory_of(runs["peft"]), memory_goal))
    if "seconds" in runs.get("qwix", {}):
        found.append(goal(f"{shape} time / qwix", median_ratio(run["seconds"], runs["qwix"]["seconds"]), 1.0))
    return [line for line in found if line["goal"] is not None]


def goal(what: str, measured: float, at_most: float | None) -> dict[str, Any]:
    met = at_most is None or measured <= at_most
    return {"what": what, "measured": round(measured, 4), "goal": at_most, "met": "met" if met else "missed"}
