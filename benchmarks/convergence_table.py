"""The table of `convergence.py`: means over the report seeds, and paired differences with their intervals."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from common import RESULTS, machine, table
from convergence_plan import CONTROL, REPORT_SEEDS, TUNING_SEEDS, Experiment, choose, point_of
from scipy import stats

from loraplus_jax.sweep.statistics import ratio_interval

Rows = Sequence[Mapping[str, Any]]
Curve = Sequence[float | None]
"""The training loss of every step; None where it was not finite."""
WINDOW = 10
"""Steps over which a training loss is averaged before it is called reached."""


def paired(values: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % t interval of the differences `values - others`.

    >>> [round(x, 3) for x in paired([1.0, 2.0, 3.0], [0.0, 1.5, 1.5])]
    [1.0, -0.242, 2.242]
    """
    differences = np.subtract(values, others)
    mean, error = float(differences.mean()), float(stats.sem(differences))
    if len(differences) < 2 or error == 0:
        return mean, mean, mean
    low, high = stats.t.interval(0.95, len(differences) - 1, mean, error)
    return mean, float(low), float(high)


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
        "tuned over": f"{len(method.points)} x {len(TUNING_SEEDS)}"
        if method.points
        else f"as {_source(name)}",
        "at the grid's edge": _is_edge(point.rate, [p.rate for p in method.points]),
        "lambda at the edge": _is_edge(point.ratio, [p.ratio for p in method.points]),
        "seeds": len(runs),
    }
    for metric in plan.metrics:
        values = [run[metric] for run in runs.values()]
        row[metric] = [float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0]
    rival = reported.get(method.rival or "", {})
    seeds = sorted(runs.keys() & rival.keys())
    row["against"], row["pairs"] = method.rival, len(seeds)
    for metric in plan.metrics if len(seeds) > 1 else ():
        row[f"{metric} difference"] = paired(
            [runs[s][metric] for s in seeds], [rival[s][metric] for s in seeds]
        )
    if len(seeds) > 1:
        row["steps saved"] = steps_saved([(runs[s]["curve"], rival[s]["curve"]) for s in seeds])
    return row


def _is_edge(value: float, tried: Sequence[float]) -> bool:
    """Whether better ones may lie beyond what was tried; a value that alone was tried is the method itself."""
    return len(set(tried)) > 1 and value in (min(tried), max(tried))


def _source(name: str) -> str:
    return "lora+" if name == CONTROL else name


def steps_saved(curves: Sequence[tuple[Curve, Curve]]) -> dict[str, Any]:
    """How many times fewer steps the first of two methods needs, one pair of training curves a seed.

    On each seed both must come to the worse of their two final losses, so both do, and which of the two is called
    the rival does not matter: a target of the rival's alone would drop the seeds in which the other ends worse. A
    pair in which a run's last losses are not finite does not count. `ratio` and its interval are those of the mean
    logarithm over the `pairs`; None for fewer than two.
    """
    own, its = [], []
    for pair in curves:
        target = max(_means(curve)[-1] for curve in pair)
        if np.isfinite(target):
            steps = [steps_to(curve, target) for curve in pair]
            own.append(steps[0])
            its.append(steps[1])
    found = ratio_interval(its, own)
    ratio = None if found["low"] is None else [found[name] for name in ("mean", "low", "high")]
    return {"ratio": ratio, "pairs": found["pairs"]}


def write_table(results: Mapping[str, tuple[Experiment, Rows]]) -> None:
    """Prints the tables and writes them to `convergence.json` and `convergence.md`."""
    found, text = {}, []
    for task, (plan, rows) in results.items():
        methods = summarize(plan, rows)
        count = {phase: sum(r["phase"] == phase for r in rows) for phase in ("tune", "report")}
        # Runs are not kept by machine, so no times: the budget is counted in runs and steps.
        found[task] = {
            "budget": _budget(plan, count),
            "settings": plan.settings.to_json(),
            "methods": methods,
        }
        text += [f"## {task}", "", found[task]["budget"], ""]
        text += [table([_shown(plan, row) for row in methods]) if methods else "No report run yet.", ""]
    print("\n".join(text))
    path = RESULTS / "convergence.json"
    path.write_text(json.dumps({"machine": machine(), **found}, indent=1) + "\n")
    command = "Written by `python benchmarks/convergence.py table`; runs are rows of `convergence.jsonl`."
    (RESULTS / "convergence.md").write_text("\n".join(["# LoRA against LoRA+", "", command, "", *text]))


def _budget(plan: Experiment, count: Mapping[str, int]) -> str:
    points = max(len(m.points) for m in plan.methods.values())
    train, data = plan.settings.train, plan.settings.data
    share = "the validation split" if plan.stride == 1 else f"1 in {plan.stride} validation rows"
    return (
        f"{plan.settings.model.path} on {data.path}: {train.steps} steps of {train.batch_size} x {data.max_length} "
        f"tokens a run. Each method: {points} points x {len(TUNING_SEEDS)} tuning seeds, chosen by mean loss on "
        f"{share}; reported on the test split with {len(REPORT_SEEDS)} other seeds. "
        f"Runs so far: {count['tune']} of tuning, {count['report']} of report."
    )


def _shown(plan: Experiment, row: Mapping[str, Any]) -> dict[str, str]:
    """A row with its numbers laid out: mean ± standard deviation, and difference [95 % interval]."""
    shown = {name: row[name] for name in ("method", "rate of A", "lambda", "alpha factor", "tuned over")}
    shown = {name: f"{value:g}" if isinstance(value, float) else value for name, value in shown.items()}
    shown["rate of A"] += " (edge)" if row["at the grid's edge"] else ""
    shown["lambda"] += " (lambda at the edge)" if row["lambda at the edge"] else ""
    for metric in plan.metrics:
        mean, deviation = row[metric]
        shown[f"test {metric}"] = f"{mean:.4f} ± {deviation:.4f}"
    shown["seeds"] = f"{row['seeds']}" + (f", {row['diverged']} diverged" if row["diverged"] else "")
    shown["against"] = row["against"] or "-"
    for metric in plan.metrics:
        found = row.get(f"{metric} difference")
        shown[f"{metric} difference"] = "-" if found is None else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*found)
    saved = row.get("steps saved")
    shown["fewer steps"] = "-"
    if saved is not None and saved["ratio"] is not None:
        shown["fewer steps"] = "{:.2f} x [{:.2f}, {:.2f}], {} pairs".format(*saved["ratio"], saved["pairs"])
    return shown
