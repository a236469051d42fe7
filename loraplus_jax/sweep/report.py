"""What a sweep leaves: `report.json` with all numbers, and `report.html`, one file with pictures, made from it."""

import base64
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from ..training.metrics_log import write_text
from .figures import PICTURES
from .halving import comparison_steps, mean_losses, member_steps
from .settings import ARM_LABELS, METHODS, SweepRun, Trial
from .statistics import compare_arms, lora_label, recommended_arm, report_runs, verdict

REPORT, PAGE, WINNER = "report.json", "report.html", "winner.yaml"
ReportRow = dict[str, Any]


def make_report(
    run: SweepRun,
    rows: Sequence[ReportRow],
    chosen: Mapping[str, Trial],
    steps: int,
    metric: str,
    curve: Mapping[str, int],
) -> dict[str, Any]:
    """All numbers of a sweep, as plain JSON values; a loss that was not finite is null.

    Args:
      run: the sweep.
      rows: what was evaluated so far.
      chosen: arm to the setting that the search has found best, empty before its end.
      steps: of a whole run.
      metric: the task's.
      curve: `curve_every` and `test_rows`: the steps between, and the rows of, evaluations in the report.
    """
    runs = report_runs(rows, steps, run.sweep.target)
    report: dict[str, Any] = {
        "complete": False,
        "protocol": _protocol(run, steps, metric) | dict(curve),
        "member_steps": _member_steps(run, rows, steps),
        "search": _search(rows),
        "chosen": {arm: trial._asdict() for arm, trial in chosen.items()},
        "at_the_edge": values_at_edge(run.trials, chosen),
        "runs": runs,
        "comparisons": [],
    }
    if not runs or any(run["test"] is None for run in runs):
        return report
    others = [arm for arm in run.arms if arm != "lora_plus"]
    comparisons = [compare_arms(runs, "lora_plus", other, metric) for other in others]
    best, why = recommended_arm(comparisons[0])
    lora = lora_label(report["protocol"]["settings"], report["at_the_edge"])
    path = Path(run.output_dir).expanduser() / WINNER
    return {
        **report,
        "complete": True,
        "comparisons": comparisons,
        "verdict": verdict(comparisons[0], chosen, run.sweep.target, lora),
        "winner": None if best is None else {"arm": best, **chosen[best]._asdict()},
        "why": why,
        "command": None if best is None else f"loraplus train {shlex.quote(str(path))}",
    }


def write_report(directory: Path, report: Mapping[str, Any], *, page: bool = False) -> None:
    """`report.json`, and for a complete one `report.html` with the pictures that are in the directory."""
    write_text(directory / REPORT, json.dumps(report, indent=1, allow_nan=False) + "\n")
    if page:
        write_text(directory / PAGE, render_page(directory, report))


def render_page(directory: Path, report: Mapping[str, Any]) -> str:
    """The page: everything in one file, so that it can be sent and needs no network."""
    files = {name: directory / f"{name}.png" for name in PICTURES}
    images = {name: base64.b64encode(file.read_bytes()).decode("ascii") for name, file in files.items()}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": format_number, "steps": format_steps}
    template = environment.from_string((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))
    return template.render(report=report, images=images, names=ARM_LABELS, captions=PICTURES)


def format_number(value: float | None, sign: bool = False) -> str:
    """For the page: four digits, and a dash for none.

    >>> format_number(0.123456), format_number(None), format_number(12.0)
    ('0.1235', '-', '12')
    """
    if value is None:
        return "-"
    text = f"{value:+.4g}" if sign else f"{value:.4g}"
    return re.sub(r"e([+-])0", r"e\1", text)


def format_steps(value: float | None) -> str:
    """Steps, rounded; what was never reached is said."""
    return "never" if value is None else f"{value:.0f}"


def values_at_edge(trials: Sequence[Trial], chosen: Mapping[str, Trial]) -> list[str]:
    """Where the best setting of an arm has the least or largest value tried: a better one may lie beyond.

    A lambda alone was the user's choice; a rate alone was not tuned.

    >>> tried = [Trial(rate, 1.0, 16.0, 8) for rate in (1e-4, 1e-3, 1e-2)]
    >>> values_at_edge(tried, {"lora": tried[2]})
    ['LoRA: learning_rate 0.01 is the largest tried']
    """
    lines = []
    for arm, best in chosen.items():
        for name in ("learning_rate", "lr_ratio"):
            values = {getattr(trial, name) for trial in trials if trial.arm == arm}
            value = getattr(best, name)
            if len(values) == 1:
                lines += [f"{ARM_LABELS[arm]}: {name} {value:g} is the only one tried"] * (
                    name == "learning_rate"
                )
            elif value in (min(values), max(values)):
                end = "largest" if value == max(values) else "least"
                lines.append(f"{ARM_LABELS[arm]}: {name} {value:g} is the {end} tried")
    return lines


def _protocol(run: SweepRun, steps: int, metric: str) -> ReportRow:
    settings = {arm: sum(trial.arm == arm for trial in run.trials) for arm in METHODS}
    return {
        "model": run.model.path,
        "data": run.data.path or run.data.train,
        "init": run.lora.init,
        "steps": steps,
        "method": run.sweep.method,
        "stops": comparison_steps(run.sweep, steps),
        "settings": settings,
        "equal_budgets": settings["lora"] == settings["lora_plus"],
        "seeds": list(run.seeds),
        "report_seeds": list(run.report_seeds),
        "target": run.sweep.target,
        "metric": metric,
    }


def _member_steps(run: SweepRun, rows: Sequence[ReportRow], steps: int) -> ReportRow:
    """Steps of all members: of the search, of the full grid it stands for, of the report, so far."""
    search = [row for row in rows if row["stage"] == "search"]
    stops = sorted({row["step"] for row in search})
    counts = [sum(row["step"] == stop for row in search) for stop in stops]
    ends: dict[tuple[str, int], int] = {}
    for row in rows:
        if row["stage"] == "report":
            ends[row["arm"], row["seed"]] = row["step"]
    return {
        "search": member_steps(counts, stops),
        "grid": len(run.trials) * len(run.seeds) * steps,
        "report": sum(ends.values()),
    }


def _search(rows: Sequence[ReportRow]) -> list[ReportRow]:
    """Each setting at each stop that it came to: the mean loss over the seeds, null if one of them diverged."""
    results = []
    search = [row for row in rows if row["stage"] == "search"]
    for stop in sorted({row["step"] for row in search}):
        at_stop = [row for row in search if row["step"] == stop]
        losses = {
            (Trial(*row["trial"]), row["seed"]): math.nan if row["loss"] is None else row["loss"]
            for row in at_stop
        }
        for trial, loss in mean_losses(losses).items():
            value = loss if math.isfinite(loss) else None
            results.append({"step": stop, "arm": trial.arm, **trial._asdict(), "loss": value})
    return results
