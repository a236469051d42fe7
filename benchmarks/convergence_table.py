"""What `convergence.py` found: means over the report seeds, paired differences with their intervals, and curves."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from convergence_plan import TUNING_SEEDS, Experiment, choose, point_of

from loraplus_jax.sweep.statistics import ratio_interval, t_interval

Rows = Sequence[Mapping[str, Any]]
Curve = Sequence[float | None]
"""The training loss of every step; None where it was not finite."""
WINDOW = 10
"""Steps over which a training loss is averaged before it is called reached."""


def steps_to(curve: Curve, target: float) -> int | None:
    """The first step by which the mean of the last `WINDOW` losses is at most the target; None if never."""
    reached = np.flatnonzero(_means(curve) <= target)
    return WINDOW + int(reached[0]) if len(reached) else None


def _means(curve: Curve) -> np.ndarray:
    """The mean of the last `WINDOW` losses at every step that has so many; infinite where one was not finite."""
    losses = np.array([np.inf if loss is None else loss for loss in curve])
    return np.lib.stride_tricks.sliding_window_view(losses, WINDOW).mean(axis=1)


def summarize(plan: Experiment, rows: Rows) -> list[dict[str, Any]]:
    """A row for every method with report runs: its point, budget, results, and how it compares with its rival."""
    reported = {
        name: {row["seed"]: row for row in rows if row["phase"] == "report" and row["method"] == name}
        for name in plan.methods
    }
    # A point that was chosen before more rows came in is no longer the method's.
    chosen = {name: choose(plan, name, list(rows)) for name in plan.methods}
    found, diverged = [], {}
    for name, runs in reported.items():
        runs = {seed: row for seed, row in runs.items() if point_of(row) == chosen[name]}
        reported[name] = {seed: row for seed, row in runs.items() if row["loss"] is not None}
        diverged[name] = len(runs) - len(reported[name])
    for name in plan.methods:
        if reported[name]:
            found.append({**_row(plan, name, chosen[name], reported), "diverged": diverged[name]})
    return found


def _row(
    plan: Experiment, name: str, point: Any, reported: Mapping[str, Mapping[int, Any]]
) -> dict[str, Any]:
    runs, method = reported[name], plan.methods[name]
    row = {
        "method": name,
        "rate of A": point.rate,
        "lambda": point.ratio,
        "alpha factor": point.alpha,
        "tuned over": f"{len(method.points)} x {len(TUNING_SEEDS)}" if method.points else "as lora+",
        "rate at the edge": _is_edge(point.rate, [p.rate for p in method.points]),
        "lambda at the edge": _is_edge(point.ratio, [p.ratio for p in method.points]),
        "seeds": len(runs),
        "curve": _band([run["curve"] for run in runs.values()]),
    }
    for metric in plan.metrics:
        row[metric] = t_interval([run[metric] for run in runs.values()])
    rival = reported.get(method.rival or "", {})
    seeds = sorted(runs.keys() & rival.keys())
    row["against"], row["pairs"] = method.rival, len(seeds)
    if rival:
        for metric in plan.metrics:
            row[f"{metric} difference"] = t_interval([runs[s][metric] - rival[s][metric] for s in seeds])
        curves = [(runs[s]["curve"], rival[s]["curve"]) for s in seeds]
        row["steps saved"], row["share"] = steps_saved(curves), share_of_steps(curves)
    return row


def _is_edge(value: float, tried: Sequence[float]) -> bool:
    """Whether better ones may lie beyond what was tried; a value that alone was tried is the method itself."""
    return len(set(tried)) > 1 and value in (min(tried), max(tried))


def _band(curves: Sequence[Curve]) -> list[list[float]]:
    """Step, mean, least and largest smoothed training loss over the seeds."""
    smooth = np.array([_means(curve) for curve in curves])
    steps = range(WINDOW, WINDOW + smooth.shape[1])
    columns = (smooth.mean(0), smooth.min(0), smooth.max(0))
    return [[step, *(round(float(c[n]), 4) for c in columns)] for n, step in enumerate(steps)]


def steps_saved(curves: Sequence[tuple[Curve, Curve]]) -> dict[str, Any]:
    """How many times fewer steps the first of two methods needs, one pair of training curves a seed.

    On each seed both must come to the worse of their two final losses, so both do, and which of the two is called
    the rival does not matter: a target of the rival's alone would drop the seeds in which the other ends worse. A
    pair in which a run's last losses are not finite does not count.
    """
    own, its = [], []
    for pair in curves:
        target = max(_means(curve)[-1] for curve in pair)
        if np.isfinite(target):
            steps = [steps_to(curve, target) for curve in pair]
            own.append(steps[0])
            its.append(steps[1])
    return ratio_interval(its, own)


def share_of_steps(curves: Sequence[tuple[Curve, Curve]]) -> dict[str, Any]:
    """The share of the rival's steps after which the first method is at the rival's final loss, one pair a seed.

    This favors the first method, which may stop where it is lucky, and leaves out the seeds on which it never gets
    there: `median` is over the `reached` of the `pairs`; None for none.
    """
    shares = [(steps_to(own, float(_means(its)[-1])), len(its)) for own, its in curves]
    reached = [steps / of for steps, of in shares if steps is not None]
    return {
        "median": float(np.median(reached)) if reached else None,
        "reached": len(reached),
        "pairs": len(shares),
    }
