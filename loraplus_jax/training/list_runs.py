"""`loraplus runs`: lists runs with their state, their result and how to resume them, without loading JAX."""

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._utils.atomic import to_json
from .._utils.json_files import check_file, read_text
from .._utils.validation import expand_path
from .metrics_log import METRICS, SUMMARY
from .run_files import (
    CHECKPOINTS,
    CONFIG,
    FAILURE,
    owner_pid,
    read_summary,
    saved_settings,
    saved_steps,
)

MARKS = {CONFIG, SUMMARY, CHECKPOINTS}
WINNER = "winner"
"""The directory in a sweep's for the run with its winner."""
BETTER = {
    "matthews": max,
    "f1": max,
    "pearson": max,
    "accuracy": max,
    "mse": min,
    "perplexity": min,
    "loss": min,
}
"""Metrics that select the best evaluation, the decisive one of a run first, and which value of each is better."""


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
    """Yields the directories of runs, in order; those within a run only if it is a sweep's winner."""
    try:
        names = {path.name for path in directory.iterdir() if path.name in MARKS or path.is_dir()}
    except OSError:  # `describe_run` says why
        yield directory
        return
    if names & MARKS:
        yield directory
        names &= {WINNER}
    for name in sorted(names):
        if not name.startswith(".") and not (directory / name).is_symlink():
            yield from find_runs(directory / name)


def describe_run(directory: Path) -> dict[str, Any]:
    """What there is to know about a run, as JSON values; of an unreadable one only `problem`."""
    row = {"path": str(directory)}
    try:
        return row | _read_run(directory)
    except (ValueError, OSError, LookupError, TypeError, AttributeError) as error:
        return row | {"state": "unreadable", "problem": f"{error}".partition("\n")[0]}


def _read_run(directory: Path) -> dict[str, Any]:
    config = saved_settings(directory, "start over with --fresh")
    methods = config.get("sweep", {}).get("methods")
    train, summary = config["train"], read_summary(directory)
    kind = "run" if "sweep" not in config else "comparison" if methods else "sweep"
    if kind == "comparison":
        members = [directory / name for name in dict.fromkeys(("lora", *methods))]
        step, steps = sum(read_summary(member) is not None for member in members), len(members)
        results = [result for member in members if (result := _best_member(member)) is not None]
        best: dict[str, Any] | None = min(results, key=lambda result: result["value"], default=None)
    else:
        rows = read_rows(directory / METRICS)
        step, steps = max(saved_steps(directory), default=0), train.get("steps")
        if kind == "sweep":
            # Checkpoints of a sweep count evaluations too, after the first of which there are rows.
            step, best = rows[-1]["step"] if rows else step, _best_member(directory)
        elif summary is not None:
            step = steps = summary["steps"]
            best = _pick(summary["after"]) | {
                "split": summary["held_out"]["split"],
                "step": summary["selected_step"],
            }
        else:
            best = best_row(rows)
    problem = None
    if summary is not None:
        state, pid = "finished", None
    elif (pid := owner_pid(directory)) is not None:
        state = "running"
    elif (directory / FAILURE).exists():
        state, problem = "failed", read_text(directory / FAILURE).partition("\n")[0]
    else:
        state = "stopped"
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
        "resume": _resume(directory, config) if state in ("stopped", "failed") else None,
    }


def _resume(directory: Path, config: Mapping[str, Any]) -> str:
    """The command that resumes a run; it names the directory if that was moved."""
    words = ["loraplus", "sweep" if "sweep" in config else "train", str(directory / CONFIG)]
    if expand_path("output_dir", config["output_dir"]).absolute() != directory.absolute():
        words += ["--output_dir", str(directory)]
    return shlex.join(words)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of `metrics.jsonl`, with NaN for null; none if there is no file."""
    if not path.exists():
        return []
    check_file(path)
    lines = path.read_bytes().split(b"\n")[:-1]  # a kill may have cut the last line off
    return [{k: math.nan if v is None else v for k, v in json.loads(line).items()} for line in lines]


def best_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The best validation by the decisive metric, and its step."""
    evaluations = [
        _pick({k.removeprefix("validation/"): v for k, v in row.items() if k.startswith("validation/")})
        | {"split": "validation", "step": row["step"]}
        for row in rows
        if "validation/loss" in row
    ]
    finite = [row for row in evaluations if math.isfinite(row["value"])]
    return BETTER[finite[0]["name"]](finite, key=lambda row: row["value"]) if finite else None


def _pick(values: Mapping[str, float]) -> dict[str, Any]:
    """The decisive metric of an evaluation."""
    name = next(name for name in BETTER if name in values)
    return {"name": name, "value": values[name]}


def _best_member(directory: Path) -> dict[str, Any] | None:
    """The lowest loss of a sweep's settings, a mean over seeds, at the last evaluation; None before the first."""
    rows = read_rows(directory / METRICS)
    losses: dict[Any, list[float]] = {}
    for row in rows:
        if (row["stage"], row["step"]) == (rows[-1]["stage"], rows[-1]["step"]):
            losses.setdefault((row["arm"], *row["trial"]), []).append(row["loss"])
    means = {setting: sum(values) / len(values) for setting, values in losses.items()}
    finite = {setting: mean for setting, mean in means.items() if math.isfinite(mean)}
    if not finite:
        return None
    setting = min(finite, key=finite.__getitem__)
    last = {name: rows[-1][name] for name in ("split", "step")}
    return {
        "name": "loss",
        "value": finite[setting],
        **last,
        "setting": dict(zip(SETTING, setting, strict=True)),
    }


SETTING = ("arm", "learning_rate", "lr_ratio", "alpha", "rank")
"""What a row of a sweep calls `arm` and `trial`."""


def format_runs(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats the rows as an aligned table without a header, a line each."""
    table = [_cells(row) for row in rows]
    readable = [cells for cells in table if len(cells) > 2]
    widths = [max(map(len, column)) for column in zip(*readable, strict=True)]
    return "\n".join("  ".join(map(str.ljust, cells, [*widths, 0])).rstrip() for cells in table)


def _cells(row: Mapping[str, Any]) -> list[str]:
    if row["state"] == "unreadable":
        return [row["path"], f"unreadable: {row['problem']}"]
    unit = "methods" if row["kind"] == "comparison" else "steps"
    total = f"{row['steps']} {unit}" if row["steps"] else f"{row['epochs'] or 3:g} epochs"
    state = row["state"] + (f" (pid {row['pid']})" if row["pid"] else "")
    best = row["best"]
    result = f"{best['name']} {best['value']:.4f} ({best['split']}, step {best['step']})" if best else ""
    end = "; ".join(filter(None, (row["problem"], row["resume"] and f"resume: {row['resume']}")))
    progress = f"{row['step']} of {total}" if row["steps"] else f"step {row['step']} ({total})"
    return [row["path"], row["model"], row["method"], progress, state, result, end]
