"""Reports of a sweep: `report.json` with all numbers, and `report.html`, one self-contained page made from it."""

import base64
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from .._utils.atomic import write_text
from .._utils.records import write_record
from .._utils.validation import expand_path
from .edges import edges
from .figures import PICTURES
from .halving import comparison_steps, mean_losses, member_steps
from .settings import ARM_LABELS, METHODS, SweepRun, Trial
from .statistics import (
    REPORT_CONFIDENCE,
    compare_arms,
    decision,
    lora_label,
    recommended_arm,
    report_runs,
    untrained,
    verdict,
)

REPORT, PAGE, WINNER = "report.json", "report.html", "winner.yaml"
RATE_OPTIONS = {
    ("lora", "learning_rate"): "lora_learning_rates",
    ("lora_plus", "learning_rate"): "learning_rates",
    ("lora_plus", "lr_ratio"): "lr_ratios",
}
"""Field of the section sweep that lists the values of an arm's rate or ratio."""
ReportRow = dict[str, Any]


def make_report(
    run: SweepRun,
    rows: Sequence[ReportRow],
    chosen: Mapping[str, Trial],
    steps: int,
    metric: str,
    curve: Mapping[str, Any],
) -> dict[str, Any]:
    """All numbers of a sweep as plain JSON values; a non-finite loss is null.

    Args:
      run: settings of the sweep.
      rows: evaluations so far.
      chosen: maps an arm to its selected setting, once there is one.
      steps: optimizer steps of a full run.
      metric: name of the task's metric.
      curve: `curve_steps`, `test_rows` and `constant`: steps of the test evaluations in the report stage, their
        rows, and the metrics of a constant answer.
    """
    runs = report_runs(rows, steps, run.sweep.target)
    # With those that `sweep.widen` added.
    tried = list(dict.fromkeys([*run.trials, *mean_losses(row for row in rows if row["stage"] == "search")]))
    report: dict[str, Any] = {
        "complete": False,
        "protocol": _protocol(run, tried, steps, metric)
        | dict(curve)
        | {"untrained": untrained(rows, metric)},
        "member_steps": _member_steps(rows, len(tried) * len(run.seeds) * steps),
        "search": _search(rows),
        "chosen": {arm: trial._asdict() for arm, trial in chosen.items()},
        "at_the_edge": values_at_edge(tried, chosen),
        "runs": runs,
        "comparisons": [],
    }
    if not runs or any(run["test"] is None for run in runs):
        return report
    others = [arm for arm in run.arms if arm != "lora_plus"]
    confidence = report["protocol"]["confidence"]
    comparisons = [compare_arms(runs, "lora_plus", other, metric, confidence) for other in others]
    report["comparisons"] = comparisons
    best, _ = recommended_arm(comparisons[0])
    lora = lora_label(report["protocol"]["settings"], report["at_the_edge"])
    path = expand_path("output_dir", run.output_dir) / WINNER
    return {
        **report,
        "complete": True,
        "decision": decision(comparisons[0], chosen),
        "verdict": verdict(comparisons[0], chosen, run.sweep.target, lora),
        "winner": None if best is None else {"arm": best, **chosen[best]._asdict()},
        "command": None if best is None else f"loraplus train {shlex.quote(str(path))}",
    }


def write_report(directory: Path, report: Mapping[str, Any], *, page: bool = False) -> None:
    """Writes `report.json`, and with `page` also `report.html` with the figures in the directory."""
    write_record(directory / REPORT, report)
    if page:
        write_text(directory / PAGE, render_page(directory, report))


def render_page(
    directory: Path,
    report: Mapping[str, Any],
    template: str = "report.html",
    pictures: Mapping[str, str] = PICTURES,
) -> str:
    """Renders a page with its figures embedded, so that one file can be sent and needs no network.

    Args:
      directory: where the figures are.
      report: the numbers.
      template: name of the template beside this module.
      pictures: name and caption of each figure.
    """
    files = {name: directory / f"{name}.png" for name in pictures}
    images = {name: base64.b64encode(file.read_bytes()).decode("ascii") for name, file in files.items()}
    # Strict: a name that the report lacks raises, where jinja would leave a gap in the page.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": format_number, "steps": format_steps}
    text, style = (
        (Path(__file__).parent / name).read_text(encoding="utf-8") for name in (template, "page.css")
    )
    return environment.from_string(text).render(
        report=report, images=images, names=ARM_LABELS, captions=pictures, style=style
    )


def format_number(value: float | None, sign: bool = False) -> str:
    """Four significant digits for the page; a dash for None.

    >>> format_number(0.123456), format_number(None), format_number(12.0)
    ('0.1235', '-', '12')
    """
    if value is None:
        return "-"
    text = f"{value:+.4g}" if sign else f"{value:.4g}"
    return re.sub(r"e([+-])0", r"e\1", text)


def format_steps(value: float | None) -> str:
    """Rounded steps; "never" for None."""
    return "never" if value is None else f"{value:.0f}"


def values_at_edge(trials: Sequence[Trial], chosen: Mapping[str, Trial]) -> list[str]:
    """The `edges` of each arm as lines, each with the option that widens the range.

    >>> tried = [Trial(rate, 1.0, 16.0, 8) for rate in (1e-3, 1e-2)]
    >>> values_at_edge(tried, {"lora": tried[1]})
    ['LoRA: learning_rate 0.01 is the largest tried of [0.001, 0.01]; widen: --sweep.lora_learning_rates']
    """
    lines = []
    for arm, best in chosen.items():
        tried = [trial for trial in trials if trial.arm == arm]
        for name, end in edges(tried, best).items():
            values = sorted({getattr(trial, name) for trial in tried})
            lines.append(
                f"{ARM_LABELS[arm]}: {name} {getattr(best, name):g} is the {end} tried of {values}; widen: "
                f"--sweep.{RATE_OPTIONS[arm, name]}"
            )
    return lines


def _protocol(run: SweepRun, tried: Sequence[Trial], steps: int, metric: str) -> ReportRow:
    settings = {arm: sum(trial.arm == arm for trial in tried) for arm in METHODS}
    return {
        "model": run.model.path,
        "data": ", ".join(run.data.sources),
        "init": run.lora.init,
        "steps": steps,
        "method": run.sweep.method,
        "stops": comparison_steps(run.sweep, steps),
        "settings": settings,
        "equal_budgets": settings["lora"] == settings["lora_plus"],
        "seeds": list(run.seeds),
        "report_seeds": list(run.report_seeds),
        "confidence": REPORT_CONFIDENCE,
        "target": run.sweep.target,
        "metric": metric,
    }


def _member_steps(rows: Sequence[ReportRow], grid: int) -> ReportRow:
    """Training steps of all members so far: the search, the full grid that it replaces, and the report."""
    search = [row for row in rows if row["stage"] == "search"]
    stops = sorted({row["step"] for row in search})
    counts = [sum(row["step"] == stop for row in search) for stop in stops]
    ends: dict[tuple[str, int], int] = {}
    for row in rows:
        if row["stage"] == "report":
            ends[row["arm"], row["seed"]] = row["step"]
    return {
        "search": member_steps(counts, stops),
        "grid": grid,
        "report": sum(ends.values()),
    }


def _search(rows: Sequence[ReportRow]) -> list[ReportRow]:
    """Each setting at each comparison it reached: mean loss over the seeds, null if one of them diverged."""
    results = []
    search = [row for row in rows if row["stage"] == "search"]
    for stop in sorted({row["step"] for row in search}):
        at_stop = [row for row in search if row["step"] == stop]
        for trial, loss in mean_losses(at_stop).items():
            value = loss if math.isfinite(loss) else None
            results.append({"step": stop, "arm": trial.arm, **trial._asdict(), "loss": value})
    return results
