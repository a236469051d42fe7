"""The comparison of methods: paired differences to plain LoRA, a first line that answers, a page and a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..training.metrics_log import pyplot, save_figure
from .edges import edges
from .settings import SweepRun, Trial
from .statistics import CONFIDENCE, compare_arms, report_runs, t_interval, untrained

PICTURES = {
    "differences": "Test loss minus tuned LoRA's, paired by seed: mean and interval. Left of the line is better.",
    "curves": "Mean test loss of the selected settings over the report seeds.",
}
"""Name and caption of each picture."""
Results = Mapping[str, Mapping[str, Any]]


def compare(run: SweepRun, labels: Mapping[str, str], results: Results) -> dict[str, Any]:
    """All numbers of a comparison as plain JSON values.

    Every method is compared with LoRA on the same seeds, and with the constant answer that is best on the train
    split: where no method is better than that, a difference between methods says little. With k comparisons each
    interval has the confidence 1 - 0.05 / k (Bonferroni), so that those of test loss hold together with 95 %.

    Args:
      run: settings of the comparison.
      labels: display name of each method; "lora" is among them.
      results: what `MethodSweep` reported of each.
    """
    others = [name for name in labels if name != "lora"]
    confidence = 1 - (1 - CONFIDENCE) / max(1, len(others))
    metric, steps = results["lora"]["metric"], results["lora"]["steps"]
    constant = results["lora"]["constant"]
    sign = 1 if results["lora"]["mode"] == "max" else -1
    rows = {
        name: [row | {"arm": name} for row in result["rows"] if row["stage"] == "report"]
        for name, result in results.items()
    }
    methods = {}
    for name, label in labels.items():
        result, pair = results[name], ("lora", name)
        runs = report_runs(
            rows["lora"] + (rows[name] if name != "lora" else []), steps, run.sweep.target, pair
        )
        own = [one for one in runs if one["arm"] == name]
        search = [row for row in result["rows"] if row["stage"] == "search"]
        last = {(*row["trial"], row["seed"]): row for row in search}
        ends = [one["test"] for one in own if one["test"] is not None and not one["diverged"]]
        trials = list(dict.fromkeys(Trial(*row["trial"]) for row in search))
        chosen = next(iter(result["chosen"].values()), None)
        methods[name] = {
            "label": label,
            "chosen": chosen,
            "settings": len(trials),
            # Each setting and seed at its last comparison; the loss is null if it diverged.
            "search": [
                Trial(*row["trial"])._asdict() | {key: row[key] for key in ("seed", "step", "loss")}
                for row in last.values()
            ],
            "at_the_edge": [
                name
                for name, end in (edges(trials, Trial(**chosen)) if chosen else {}).items()
                if end != "only one"
            ],
            "runs": own,
            "loss": float(np.mean([end["loss"] for end in ends])) if ends else None,
            "metric": float(np.mean([end[metric] for end in ends])) if ends else None,
            "diverged": sum(one["diverged"] for one in own),
            "over_constant": t_interval([sign * (end[metric] - constant[metric]) for end in ends], confidence)
            if metric in constant
            else None,
            "cost": result.get("cost"),
            "text_scores": _text_scores(result, results["lora"], confidence),
            "unrelated": _unrelated(result, results["lora"], confidence),
            "against_lora": None if name == "lora" else compare_arms(runs, name, "lora", metric, confidence),
        }
    return {
        "verdict": verdict(methods, confidence),
        "protocol": {
            "model": run.model.path,
            "data": ", ".join(run.data.sources),
            "steps": steps,
            "settings": min(method["settings"] for method in methods.values()),
            "seeds": list(run.seeds),
            "report_seeds": list(run.report_seeds),
            "metric": metric,
            "constant": constant,
            "untrained": untrained(rows["lora"], metric),
            "confidence": confidence,
            "unrelated_text": run.sweep.unrelated_text,
        },
        "methods": methods,
    }


def _text_scores(
    own: Mapping[str, Any], lora: Mapping[str, Any], confidence: float
) -> dict[str, dict[str, Any]]:
    """The mean of each score of generated texts over the report seeds, and its difference to LoRA's by seed."""
    by_seed, its = ({row["seed"]: row for row in r.get("text_scores", ())} for r in (own, lora))
    names = [name for name in next(iter(by_seed.values()), {}) if name != "seed"]
    return {
        name: {
            "mean": float(np.mean([row[name] for row in by_seed.values()])),
            "gain": t_interval([by_seed[s][name] - its[s][name] for s in by_seed if s in its], confidence),
        }
        for name in names
    }


def _unrelated(own: Mapping[str, Any], lora: Mapping[str, Any], confidence: float) -> dict[str, Any] | None:
    """A method's perplexity of `sweep.unrelated_text`, the change of the loss, and that minus LoRA's, by seed."""
    changes, its = (
        {row["seed"]: row["after"] - row["before"] for row in result.get("unrelated", ())}
        for result in (own, lora)
    )
    if not changes:
        return None
    return {
        **{
            f"perplexity_{when}": float(np.exp(np.mean([row[when] for row in own["unrelated"]])))
            for when in ("before", "after")
        },
        "change": t_interval(list(changes.values()), confidence),
        "against_lora": t_interval([changes[s] - its[s] for s in changes if s in its], confidence),
    }


def verdict(methods: Mapping[str, Any], confidence: float) -> str:
    """Which methods have a significantly lower, or higher, test loss than tuned LoRA, and what limits the answer.

    A method that diverged on a seed has no result: those on which it did not are no fair sample.
    """
    others = {name: method for name, method in methods.items() if name != "lora"}
    known = {n: m["against_lora"]["test_loss"] for n, m in others.items()}
    seeds = max(m["against_lora"]["pairs"] for m in others.values()) if others else 0
    known = {n: i for n, i in known.items() if i["low"] is not None and i["pairs"] == seeds}
    better = {name for name, interval in known.items() if interval["high"] < 0}
    worse = [others[name]["label"] for name, interval in known.items() if interval["low"] > 0]
    comparisons = "1 comparison" if len(others) == 1 else f"{len(others)} comparisons"
    evidence = f"{seeds} paired seeds, {comparisons}, intervals of {100 * confidence:.1f} % each"
    ranges = {
        n: f"{i['mean']:+.4f} [{i['low']:+.4f}, {i['high']:+.4f}]"
        for n, i in sorted(known.items(), key=lambda item: item[1]["mean"])
    }
    if better:
        found = ", ".join(f"{others[n]['label']} {ranges[n]}" for n in ranges if n in better)
        text = f"Lower test loss than tuned LoRA: {found} ({evidence})"
    else:
        text = "No method has a significantly lower test loss than tuned LoRA"
        if ranges:
            name, lowest = next(iter(ranges.items()))
            text += f"; the lowest difference is that of {others[name]['label']}, {lowest}"
        text += f" ({evidence})"
    notes = {
        "significantly higher": worse,
        "diverged on a seed": [method["label"] for method in methods.values() if method["diverged"]],
        "no result": [method["label"] for name, method in others.items() if name not in known],
        "not significantly better than a constant answer": [
            m["label"]
            for m in methods.values()
            if m["over_constant"] and not (m["over_constant"]["low"] or 0) > 0
        ],
        "not tuned to the end, best value at the edge of the search range": [
            f"{m['label']} ({', '.join(m['at_the_edge'])})" for m in methods.values() if m["at_the_edge"]
        ],
    }
    return "; ".join([text, *(f"{note}: {', '.join(names)}" for note, names in notes.items() if names)]) + "."


def draw(directory: Path, report: Mapping[str, Any]) -> None:
    """Draws the pictures as PNG files in a directory."""
    plt, methods = pyplot(), report["methods"]
    figure, axes = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    compared = [
        m for m in methods.values() if m["against_lora"] and m["against_lora"]["test_loss"]["low"] is not None
    ]
    compared.sort(key=lambda method: -method["against_lora"]["test_loss"]["mean"])
    for row, method in enumerate(compared):
        interval = method["against_lora"]["test_loss"]
        axes.hlines(row, interval["low"], interval["high"], color="#0b5fa5", linewidth=2)
        axes.plot(interval["mean"], row, "o", color="#0b5fa5", markersize=7)
    axes.axvline(0, color="black", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(compared)), [method["label"] for method in compared])
    axes.set(xlabel="test loss minus tuned LoRA's", title="Difference to tuned LoRA, paired by seed")
    axes.grid(axis="x", alpha=0.3)
    save_figure(figure, directory / "differences.png")
    figure, axes = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    styles = ["-", "--", "-.", ":"]
    for number, method in enumerate(methods.values()):
        curves = [run["curve"] for run in method["runs"] if not run["diverged"]]
        if curves:
            steps, losses = (
                [step for step, _ in curves[0]],
                np.mean([[loss for _, loss in c] for c in curves], 0),
            )
            axes.plot(steps, losses, styles[number // 10 % 4], color=f"C{number % 10}", label=method["label"])
    axes.set(xlabel="step", ylabel="test loss", title="Selected settings on the report seeds")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8)
    save_figure(figure, directory / "curves.png")
