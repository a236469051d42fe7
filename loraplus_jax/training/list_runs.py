"""`loraplus runs`: lists runs with their state, their result and how to resume them, without loading JAX."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._utils.atomic import to_json
from .._utils.validation import escape_controls
from .metrics_log import METRICS, SUMMARY
from .run_files import (
    CHECKPOINTS,
    CONFIG,
    FAILURE,
    owner_pid,
    read_lines,
    read_summary,
    resume_command,
    saved_settings,
    saved_steps,
)

MARKS = {CONFIG, SUMMARY, CHECKPOINTS}
WINNER = "winner"
"""The directory in a sweep's for the run with its winner."""
BETTER = {
    "matthews": max,
    "f1": max,
    "macro_f1": max,
    "pearson": max,
    "spearman": max,
    "accuracy": max,
    "mse": min,
    "mae": min,
    "perplexity": min,
    "loss": min,
}
"""Metrics that select the best evaluation, and which value of each is better.

The decisive one of a run is the first that it has, unless its settings choose one.
"""


def list_runs(directory: Path, *, json: bool = False) -> str | None:
    """Lists the runs, sweeps and comparisons in a directory and below it.

    Args:
      directory: a directory of runs, or a run.
      json: whether to return a JSON object a line instead of a table.

    Returns:
      A line for each; None if there are none and `json` is set.

    Raises:
      ValueError: there is no such directory.
    """
    if not directory.is_dir():
        raise ValueError(
            f"{directory} is not a directory; name the directory of your runs: loraplus runs DIRECTORY"
        )
    rows = [describe_run(path) for path in find_runs(directory)]
    if json:
        return "\n".join(map(to_json, rows)) or None
    return format_runs(rows) or f"no runs in {directory}"


def find_runs(directory: Path) -> Iterator[Path]:
    """Yields the directories of runs, in order; those within a run only if it is a sweep's winner.

    Nothing below a link is searched, so that there are no loops, but a run may be linked.
    """
    waiting = [directory]
    while waiting:
        path = waiting.pop()
        try:
            names = {part.name for part in path.iterdir() if part.name in MARKS or os.path.isdir(part)}
        except OSError:  # `describe_run` says why
            yield path
            continue
        if names & MARKS:
            yield path
            # The winner's run of a sweep, or of each method of a comparison.
            methods = [path / name for name in names if not (path / name).is_symlink()]
            found = [part / WINNER for part in (path, *methods)]
            names = {str(part.relative_to(path)) for part in found if part.is_dir()}
        if path == directory or not path.is_symlink():
            waiting += [path / name for name in sorted(names, reverse=True) if not name.startswith(".")]


def describe_run(directory: Path) -> dict[str, Any]:
    """What there is to know about a run, as JSON values; of an unreadable one only `problem`."""
    path = {"path": str(directory)}
    try:
        row = path | _read_run(directory)
        to_json(row)
        _cells(row)  # what cannot be shown is unreadable too
        return row
    except Exception as error:  # untrusted files cause any; they must not end the list
        problem = f"{error}" if isinstance(error, ValueError | OSError) else f"unexpected content: {error!r}"
        return path | {"state": "unreadable", "problem": problem.partition("\n")[0]}


def _read_run(directory: Path) -> dict[str, Any]:
    config = saved_settings(directory, "start over with --fresh")
    methods = config.get("sweep", {}).get("methods")
    train, summary = config["train"], read_summary(directory)
    metrics = config.get("data", {}).get("metrics", ())
    kind = "run" if "sweep" not in config else "comparison" if methods else "sweep"
    step, steps = max(saved_steps(directory), default=0), train.get("steps")
    if kind != "run":
        # Checkpoints of a sweep count evaluations too, after the first of which there are rows.
        evaluated, best = _best_member(directory)
        step = step if evaluated is None else evaluated
    elif summary is not None:
        step = steps = summary["steps"]
        best = _pick(summary["after"], metrics) | {
            "split": summary["held_out"]["split"],
            "step": summary["selected_step"],
        }
        if best["name"] in (constant := summary.get("constant", {})):
            best["constant"] = constant[best["name"]]
    else:
        best = best_row(read_rows(directory / METRICS), metrics)
    state, pid, problem = _state(directory) if summary is None else ("finished", None, None)
    return {
        "kind": kind,
        "model": config["model"]["path"],
        "method": config["method"] if kind == "run" else kind,
        "step": step,
        "steps": steps,
        "epochs": train.get("epochs"),
        "state": state,
        "pid": pid,
        "problem": problem,
        "best": best,
        "verdict": None if summary is None else summary.get("verdict"),
        "resume": resume_command(directory, config) if state in ("stopped", "failed") else None,
    }


def _state(directory: Path) -> tuple[str, str | None, str | None]:
    """The state of an unfinished run, the pid of its process, and why it failed."""
    try:
        pid = owner_pid(directory)
    except OSError:  # another user's directory
        return "unknown", None, None
    problem = None if pid else next(read_lines(directory / FAILURE), None)
    return "running" if pid else "failed" if problem else "stopped", pid, problem


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of `metrics.jsonl`, with NaN for null; none if there is no file."""
    for line in read_lines(path):
        yield {k: math.nan if v is None else v for k, v in json.loads(line).items()}


def best_row(rows: Iterable[Mapping[str, Any]], metrics: Sequence[str] = ()) -> dict[str, Any] | None:
    """The best validation after a step by the decisive metric, and its step; `metrics` are of the settings."""
    best = None
    for row in rows:
        if "validation/loss" not in row:
            continue
        values = {k.removeprefix("validation/"): v for k, v in row.items() if k.startswith("validation/")}
        found = _pick(values, metrics) | {"split": "validation", "step": row["step"]}
        if math.isfinite(found["value"]):
            better = BETTER[found["name"]]
            # Among ties the latest, as the checkpoint that training selects.
            best = found if best is None else better(found, best, key=lambda one: one["value"])
    return best


def _pick(values: Mapping[str, float], metrics: Sequence[str]) -> dict[str, Any]:
    """The decisive metric of an evaluation."""
    name = next((name for name in (*metrics[:1], *BETTER) if name in values), "loss")
    return {"name": name, "value": values[name]}


def _best_member(directory: Path) -> tuple[int | None, dict[str, Any] | None]:
    """The step of a sweep's last evaluation and the lowest mean loss of a setting there, if any."""
    path = directory / METRICS
    # Rows are ordered by program, of which the last may be behind.
    end = max(read_rows(path), key=lambda row: (row["stage"] == "report", row["step"]), default=None)
    if end is None:
        return None, None
    losses: dict[Any, list[float]] = {}
    for row in read_rows(path):  # again: to keep all rows could need too much memory
        if (row["stage"], row["step"]) == (end["stage"], end["step"]):
            losses.setdefault((row["arm"], *row["trial"]), []).append(row["loss"])
    means = {setting: sum(values) / len(values) for setting, values in losses.items()}
    finite = {setting: mean for setting, mean in means.items() if math.isfinite(mean)}
    if not finite:
        return end["step"], None
    setting = min(finite, key=finite.__getitem__)
    best = {"name": "loss", "value": finite[setting], "split": end["split"], "step": end["step"]}
    return end["step"], best | {"setting": dict(zip(SETTING, setting, strict=True))}


SETTING = ("arm", "learning_rate", "lr_ratio", "alpha", "rank")
"""What a row of a sweep calls `arm` and `trial`."""


def format_runs(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats the rows as an aligned table without a header, a line each; the unreadable ones are not aligned."""
    table = [_cells(row) for row in rows]
    readable = [cells for cells in table if len(cells) > 2]
    widths = [max(map(len, column)) for column in zip(*readable, strict=True)]
    return "\n".join(
        "  ".join(map(str.ljust, cells, widths if len(cells) > 2 else (0, 0))).rstrip() for cells in table
    )


def _cells(row: Mapping[str, Any]) -> list[str]:
    if row["state"] == "unreadable":
        return [escape_controls(row["path"]), escape_controls(f"unreadable: {row['problem']}")]
    state = row["state"] + (f" (pid {row['pid']})" if row["pid"] else "")
    best = row["best"]
    result = ""
    if best:
        constant = f"; constant answer {_number(best['constant'])}" if "constant" in best else ""
        result = f"{best['name']} {_number(best['value'])} ({best['split']}, step {best['step']}{constant})"
    end = "; ".join(filter(None, (row["problem"], row["resume"] and f"resume: {row['resume']}")))
    epochs = f" ({float(row['epochs']):g} epochs)" if row["epochs"] else ""
    progress = f"{row['step']} of {row['steps']} steps" if row["steps"] else f"step {row['step']}{epochs}"
    cells = row["path"], row["model"], row["method"], progress, state, result, end
    return [escape_controls(cell) for cell in cells]


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"
