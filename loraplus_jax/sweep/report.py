"""Reports of a sweep: `report.json` with all numbers, and `report.html`, one self-contained page made from it."""

import base64
import math
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from .._utils.atomic import write_text
from .._utils.records import write_record
from .._utils.validation import expand_path
from ..tasks.interface import TaskData
from .arms import Arm
from .edges import edges
from .figures import PICTURES, pictures_of
from .halving import comparison_steps, curve_steps, mean_losses, member_steps
from .settings import SweepRun
from .statistics import (
    CONFIDENCE,
    REPORT_CONFIDENCE,
    compare_arms,
    decision,
    lora_label,
    not_above_constant,
    recommended_arm,
    report_runs,
    t_interval,
    untrained,
    verdict,
    verdict_of_methods,
)
from .trial import Trial

REPORT, PAGE, WINNER = "report.json", "report.html", "winner.yaml"
ReportRow = dict[str, Any]


def make_report(
    run: SweepRun,
    arms: Sequence[Arm],
    rows: Sequence[ReportRow],
    chosen: Mapping[str, Trial],
    diverged: Collection[str],
    steps: int,
    data: TaskData,
    measurements: Mapping[str, Mapping[str, Any]],
    allowed_differences: Sequence[str] = (),
) -> dict[str, Any]:
    """All numbers of a sweep as plain JSON values; a non-finite loss is null.

    Args:
      run: settings of the sweep.
      arms: all arms.
      rows: evaluations so far.
      chosen: maps an arm to its selected setting, once there is one.
      diverged: arms of which every setting diverged.
      steps: optimizer steps of a full run.
      data: data of the sweep.
      measurements: what `measured` found of each arm whose report has ended.
      allowed_differences: those of base and data between its units that `--allow_different` has accepted.
    """
    metric, confidence = data.task.metric, REPORT_CONFIDENCE
    if run.sweep.methods is not None:
        # Bonferroni's inequality: the intervals of test loss of all comparisons hold together.
        confidence = 1 - (1 - CONFIDENCE) / max(1, len(arms) - 1)
    of_arm = {arm.name: [row for row in rows if row["arm"] == arm.name] for arm in arms}
    tried, search, runs = dict[str, list[Trial]](), list[ReportRow](), dict[str, list[ReportRow]]()
    for arm in arms:
        searched = [row for row in of_arm[arm.name] if row["stage"] == "search"]
        if arm.trials:
            # With those that `sweep.widen` added.
            tried[arm.name] = list(dict.fromkeys([*arm.trials, *mean_losses(searched)]))
        for stop in {row["step"] for row in searched}:
            for trial, loss in mean_losses(row for row in searched if row["step"] == stop).items():
                key = {"step": stop, "arm": arm.name, **trial._asdict()}
                search.append({**key, "loss": loss if math.isfinite(loss) else None})
        # Two arms have a target in common, which decides the steps of both. The control has that of LoRA+, as has
        # LoRA if it is compared with nothing else.
        other = arm.name if run.sweep.methods is not None or arm.name == "lora_plus" else "lora_plus"
        runs[arm.name] = report_runs(rows, steps, run.sweep.target, ("lora", other))
    counts = {name: len(trials) for name, trials in tried.items()}
    report: dict[str, Any] = {
        "complete": False,
        "protocol": {
            "model": run.model.path,
            "data": ", ".join(run.data.sources),
            "init": run.lora.init,
            "steps": steps,
            "method": run.sweep.method,
            "stops": comparison_steps(run.sweep, steps),
            "settings": counts,
            "equal_budgets": len(set(counts.values())) == 1,
            "seeds": list(run.seeds),
            "report_seeds": list(run.report_seeds),
            "confidence": confidence,
            "target": run.sweep.target,
            "metric": metric,
            "curve_steps": curve_steps(steps, run.sweep.curve_points),
            "test_rows": data.examples["test"],
            "constant": dict(data.constant),
            "untrained": untrained(of_arm["lora"], metric),
            "unrelated_text": run.sweep.unrelated_text,
            "allowed_differences": list(allowed_differences),
        },
        "member_steps": _member_steps(rows, sum(counts.values()) * len(run.seeds) * steps),
        "search": sorted(search, key=lambda row: row["step"]),
        "chosen": {arm: trial._asdict() for arm, trial in chosen.items()},
        "at_the_edge": [
            line
            for arm in arms
            if arm.name in chosen
            for line in edge_lines(run, arm, tried[arm.name], chosen[arm.name])
        ],
        "runs": [
            one | {name: values[one["seed"]] for name, values in texts.items() if one["seed"] in values}
            for arm in arms
            for texts in [measurements.get(arm.name, {}).get("texts", {})]
            for one in runs[arm.name]
            if one["arm"] == arm.name
        ],
        "methods": {},
        "comparisons": [],
    }
    ended = {one["arm"] for one in report["runs"] if one["test"] is not None}
    if not ended or any(one["test"] is None for one in report["runs"]):
        return report
    if any(arm.name not in ended and arm.name not in diverged for arm in arms):
        return report
    methods, comparisons = report["methods"], report["comparisons"]
    for arm in arms:
        best = edges(tried[arm.name], chosen[arm.name]) if arm.name in chosen else {}
        methods[arm.name] = {
            "label": arm.label,
            "at_the_edge": list(best),
            **_results([one for one in report["runs"] if one["arm"] == arm.name], data, confidence),
            **({"diverged": None} if arm.name in diverged else {}),
            **_measurements(measurements.get(arm.name, {}), measurements.get("lora", {}), confidence),
        }
        if arm.name != "lora":
            # All are compared with LoRA but the control, which is expected to do what LoRA+ does.
            pair = ("lora_plus", "control") if arm.name == "control" else (arm.name, "lora")
            comparisons.append(compare_arms(runs[arm.name], *pair, metric, confidence))
    report |= {"complete": True, "decision": None, "winner": None, "command": None}
    if run.sweep.methods is not None:
        return report | {"verdict": verdict_of_methods(methods, comparisons, confidence)}
    best, _ = recommended_arm(comparisons[0])
    lora = lora_label(counts, methods["lora"]["at_the_edge"])
    path = expand_path("output_dir", run.output_dir) / WINNER
    said = decision(comparisons[0], chosen)
    if best is not None and len(not_above_constant(methods)) == len(methods):
        said += (
            " But no method is significantly better than a constant answer, so a difference says little: first "
            "train longer, or on more data."
        )
    return {
        **report,
        "decision": said,
        "verdict": verdict(comparisons[0], chosen, run.sweep.target, lora),
        "winner": None if best is None else {"arm": best, **chosen[best]._asdict()},
        "command": None if best is None else f"loraplus train {shlex.quote(str(path))}",
    }


def _results(runs: Sequence[ReportRow], data: TaskData, confidence: float) -> ReportRow:
    """Means over the runs of an arm that did not diverge, and the advantage over the constant answer.

    Where no method is better than the constant answer that is best on the train split, a difference says little.
    """
    metric, constant = data.task.metric, data.constant
    sign = 1 if data.task.mode == "max" else -1
    ends = [one["test"] for one in runs if not one["diverged"]]
    return {
        "loss": float(np.mean([end["loss"] for end in ends])) if ends else None,
        "metric": float(np.mean([end[metric] for end in ends])) if ends else None,
        "diverged": sum(one["diverged"] for one in runs),
        "over_constant": t_interval([sign * (end[metric] - constant[metric]) for end in ends], confidence)
        if metric in constant
        else None,
    }


def measured(results: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> dict[str, ReportRow]:
    """What the units of a report have measured of each arm: the cost of a step, and by seed scores of texts.

    `texts` has the scores of generated texts as `text_scores`, and the loss on `sweep.unrelated_text` before and
    after training as `unrelated`.
    """

    def by_seed(rows: Sequence[ReportRow], arm: str) -> dict[int, ReportRow]:
        own = (row for row in rows if row["arm"] == arm)
        return {row["seed"]: {n: v for n, v in row.items() if n not in ("arm", "seed")} for row in own}

    scored = [result for result in results if "cost" in result]
    return {
        arm: {
            "cost": one["cost"],
            "texts": {
                name: by_seed([row for result in scored for row in result[name]], arm)
                for name in ("text_scores", "unrelated")
            },
        }
        for arm in arms
        # Arms that share a program take the same time.
        for one in sorted(
            (result for result in scored if arm in {name for name, *_ in result["members"]}),
            key=lambda result: result["cost"]["step_seconds"] is None,  # of members that have all diverged
        )[:1]
    }


def _measurements(own: Mapping[str, Any], lora: Mapping[str, Any], confidence: float) -> ReportRow:
    """The cost of a step, each score of generated texts, and the loss on `sweep.unrelated_text`.

    Scores are means over the report's seeds, with the difference to LoRA's by seed. The change of the loss is a
    mean with its interval, and that minus LoRA's.
    """
    (scores, losses), (its_scores, its_losses) = (
        [one.get("texts", {}).get(name, {}) for name in ("text_scores", "unrelated")] for one in (own, lora)
    )
    texts = {
        name: {
            "mean": float(np.mean([row[name] for row in scores.values()])),
            "gain": t_interval(
                [scores[seed][name] - its_scores[seed][name] for seed in scores if seed in its_scores],
                confidence,
            ),
        }
        for name in next(iter(scores.values()), {})
    }
    changes, its = (
        {seed: row["after"] - row["before"] for seed, row in found.items()} for found in (losses, its_losses)
    )
    unrelated = None
    if changes:
        means = {when: np.mean([row[when] for row in losses.values()]) for when in ("before", "after")}
        unrelated = {f"perplexity_{when}": float(np.exp(mean)) for when, mean in means.items()} | {
            "change": t_interval(list(changes.values()), confidence),
            "against_lora": t_interval([changes[s] - its[s] for s in changes if s in its], confidence),
        }
    return {"cost": own.get("cost"), "text_scores": texts, "unrelated": unrelated}


def write_report(directory: Path, report: Mapping[str, Any], *, page: bool = False) -> None:
    """Writes `report.json`, and with `page` also `report.html` with the figures in the directory."""
    write_record(directory / REPORT, report)
    if page:
        write_text(directory / PAGE, render_page(directory, report))


def render_page(directory: Path, report: Mapping[str, Any]) -> str:
    """Renders the page with its figures embedded, so that one file can be sent and needs no network."""
    captions = {name: PICTURES[name] for name in pictures_of(report)}
    files = {name: directory / f"{name}.png" for name in captions}
    images = {name: base64.b64encode(file.read_bytes()).decode("ascii") for name, file in files.items()}
    # Strict: a name that the report lacks raises, where jinja would leave a gap in the page.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": format_number, "steps": format_steps}
    text, style = ((Path(__file__).parent / name).read_text(encoding="utf-8") for name in (PAGE, "page.css"))
    return environment.from_string(text).render(report=report, images=images, captions=captions, style=style)


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


def edge_lines(run: SweepRun, arm: Arm, tried: Sequence[Trial], best: Trial) -> list[str]:
    """The `edges` of an arm as lines, each with the option that widens the range."""
    lines = []
    for name, end in edges(tried, best).items():
        values = sorted({getattr(trial, name) for trial in tried})
        lines.append(
            f"{arm.label}: {name} {getattr(best, name):g} is the {end} tried of {values}; widen: "
            f"--{widening_option(run, arm.name, name)}"
        )
    return lines


def widening_option(run: SweepRun, arm: str, name: str) -> str:
    """The setting that lists the values of an arm's rate or ratio."""
    if arm == "lora_plus" or name == "lr_ratio":
        return f"sweep.{name}s"
    return "sweep.lora_learning_rates" if run.sweep.methods is None else "sweep.method_learning_rates"


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
