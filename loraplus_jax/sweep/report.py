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
from .figures import PICTURES
from .halving import comparison_steps, mean_losses, member_steps
from .sequential import interval_confidence, reason_to_end, seed_groups
from .settings import ARM_LABELS, METHODS, SweepRun, Trial
from .statistics import compare_arms, lora_label, recommended_arm, report_runs, verdict

REPORT, PAGE, WINNER = "report.json", "report.html", "winner.yaml"
RATE_OPTIONS = {
    ("lora", "learning_rate"): "lora_learning_rates",
    ("lora_plus", "learning_rate"): "learning_rates",
    ("lora_plus", "lr_ratio"): "lr_ratios",
}
"""Field of the section sweep that lists the values of an arm's rate or ratio."""
MIN_WIDENING, MAX_WIDENING = 2.0, 10.0
"""Limits of the factor between the best value and the one suggested beyond it."""
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
      curve: `curve_steps` and `test_rows`: steps of the test evaluations in the report stage, and their rows.
    """
    runs = report_runs(rows, steps, run.sweep.target)
    report: dict[str, Any] = {
        "complete": False,
        "protocol": _protocol(run, steps, metric) | dict(curve),
        "member_steps": _member_steps(run, rows, steps),
        "search": _search(rows),
        "chosen": {arm: trial._asdict() for arm, trial in chosen.items()},
        "at_the_edge": values_at_edge(run.trials, chosen, run.rate_lists),
        "runs": runs,
        "comparisons": [],
        "ended": None,
    }
    if not runs or any(run["test"] is None for run in runs):
        return report
    others = [arm for arm in run.arms if arm != "lora_plus"]
    confidence = report["protocol"]["confidence"]
    comparisons = [compare_arms(runs, "lora_plus", other, metric, confidence) for other in others]
    report["comparisons"] = comparisons
    if (reason := reason_to_end(run, comparisons[0])) is None:
        return report
    best, why = recommended_arm(comparisons[0])
    lora = lora_label(report["protocol"]["settings"], report["at_the_edge"])
    path = expand_path("output_dir", run.output_dir) / WINNER
    return {
        **report,
        "complete": True,
        "ended": {"seeds": comparisons[0]["pairs"], "reason": reason},
        "verdict": verdict(comparisons[0], chosen, run.sweep.target, lora),
        "winner": None if best is None else {"arm": best, **chosen[best]._asdict()},
        "why": why,
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


def values_at_edge(
    trials: Sequence[Trial], chosen: Mapping[str, Trial], lists: Mapping[str, Sequence[float]] | None = None
) -> list[str]:
    """Best values at the edge of the search range, each with the option that widens it.

    A single learning rate counts as an edge, since it was not tuned; a single lambda is the user's choice.

    Args:
      trials: every setting of the search.
      chosen: maps an arm to its selected setting.
      lists: `SweepRun.rate_lists`, the values to extend; None extends those of the trials.

    >>> tried = [Trial(rate, 1.0, 16.0, 8) for rate in (1e-4, 1e-3, 1e-2)]
    >>> values_at_edge(tried, {"lora": tried[2]})
    ['LoRA: learning_rate 0.01 is the largest tried; widen: --sweep.lora_learning_rates [0.0001,0.001,0.01,0.1]']
    """
    lines = []
    for arm, best in chosen.items():
        for name in ("learning_rate", "lr_ratio"):
            tried = {getattr(trial, name) for trial in trials if trial.arm == arm}
            value = getattr(best, name)
            line = f"{ARM_LABELS[arm]}: {name} {value:g} is the"
            if len(tried) == 1 and name == "learning_rate":
                lines.append(f"{line} only one tried; {_advise_tuning(arm, value, lists)}")
            elif len(tried) > 1 and value in (min(tried), max(tried)):
                end = "largest" if value == max(tried) else "smallest"
                option, values = _option_of(arm, name, tuple(tried), lists)
                wider = _widen(option, values, end)
                hint = f"; widen: {_format_option(option, wider)}" if wider else ""
                lines.append(f"{line} {end} tried{hint}")
    return lines


def _option_of(
    arm: str, name: str, tried: Sequence[float], lists: Mapping[str, Sequence[float]] | None
) -> tuple[str, Sequence[float]]:
    """The option that lists an arm's values, and its values."""
    option = RATE_OPTIONS[arm, name]
    if lists is not None and option not in lists:
        option = "learning_rates"  # the default rates of plain LoRA follow from those of LoRA+
    return option, tried if lists is None else lists[option]


def _advise_tuning(arm: str, value: float, lists: Mapping[str, Sequence[float]] | None) -> str:
    """How to try more than one learning rate."""
    option, values = _option_of(arm, "learning_rate", (value,), lists)
    if len(values) > 1:
        return "tune: a larger --sweep.samples"
    return f"tune: {_format_option(option, (values[0] / 2, values[0], 2 * values[0]))}"


def _widen(option: str, values: Sequence[float], end: str) -> list[float]:
    """The values and one beyond the end, spaced like the two values there; empty if three digits cannot tell it.

    A single value (one rate of LoRA+ gives plain LoRA several, by the lambdas) gets another at twice or half of it.

    >>> _widen("lr_ratios", (2.0, 4.0, 8.0), "largest"), _widen("lr_ratios", (2.0, 4.0), "smallest")
    ([2.0, 4.0, 8.0, 16.0], [1.41, 2.0, 4.0])
    """
    ordered = sorted(values, reverse=end == "largest")
    edge, neighbour = ordered[0], ordered[:2][-1]
    factor = min(max(edge / neighbour, neighbour / edge, MIN_WIDENING), MAX_WIDENING)
    beyond = edge * factor if end == "largest" else edge / factor
    if option == "lr_ratios" and (edge - 1) * (beyond - 1) <= 0:
        beyond = math.sqrt(edge)  # lambda 1 is plain LoRA, so stop half way to it
    beyond = float(f"{beyond:.3g}")
    is_new = beyond != float(f"{edge:.3g}") and (option, beyond) != ("lr_ratios", 1.0)
    return sorted((*values, beyond)) if is_new else []


def _format_option(option: str, values: Sequence[float]) -> str:
    return f"--sweep.{option} [{','.join(f'{value:g}' for value in values)}]"


def _protocol(run: SweepRun, steps: int, metric: str) -> ReportRow:
    settings = {arm: sum(trial.arm == arm for trial in run.trials) for arm in METHODS}
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
        "interim_seeds": list(run.sweep.interim_seeds),
        "confidence": interval_confidence(len(seed_groups(run))),
        "target": run.sweep.target,
        "metric": metric,
    }


def _member_steps(run: SweepRun, rows: Sequence[ReportRow], steps: int) -> ReportRow:
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
        "grid": len(run.trials) * len(run.seeds) * steps,
        "report": sum(ends.values()),
    }


def _search(rows: Sequence[ReportRow]) -> list[ReportRow]:
    """Each setting at each comparison it reached: mean loss over the seeds, null if one of them diverged."""
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
