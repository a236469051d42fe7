"""Statistics of a sweep's report: paired runs, steps to a target, confidence intervals and the verdict.

Settings are selected on the validation split with the search seeds and compared here on the test split with new
seeds. Runs with the same seed share initial values and batches, so paired differences vary less than means do.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from scipy import stats

from .trial import ARM_LABELS, Trial

CONFIDENCE = 0.95
REPORT_CONFIDENCE = 1 - (1 - CONFIDENCE) / 2
"""Of each interval of a report: the test loss and the steps to the target may both decide it, and by Bonferroni's
inequality both intervals hold together with `CONFIDENCE`. They are exact if the differences are normal; light tails
make them too narrow for few seeds (`benchmarks/false_verdicts.py`)."""
Curve = Sequence[tuple[int, float | None]]
"""Pairs of step and test loss; None if the loss was not finite."""
RunRow = dict[str, Any]


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> dict[str, Any]:
    """Mean and two-sided t-interval of independent values; `low` and `high` are None for fewer than two.

    >>> interval = t_interval([1.0, 2.0, 3.0])
    >>> round(interval["low"], 4), interval["mean"], round(interval["high"], 4)
    (-0.4841, 2.0, 4.4841)
    """
    count = len(values)
    if not count:
        return {"mean": None, "low": None, "high": None, "pairs": 0}
    mean = float(np.mean(values))
    if count < 2:
        return {"mean": mean, "low": None, "high": None, "pairs": count}
    half = (
        float(stats.t.ppf((1 + confidence) / 2, count - 1)) * float(np.std(values, ddof=1)) / math.sqrt(count)
    )
    return {"mean": mean, "low": mean - half, "high": mean + half, "pairs": count}


def ratio_interval(
    over: Sequence[float], under: Sequence[float], confidence: float = CONFIDENCE
) -> dict[str, Any]:
    """Geometric mean and interval of paired ratios: the t-interval of their logarithms.

    >>> ratio_interval([4.0, 4.0], [2.0, 2.0])["mean"]
    2.0
    """
    # In logarithms a ratio and its inverse have the same interval, turned round.
    logs = t_interval([math.log(a / b) for a, b in zip(over, under, strict=True)], confidence)
    return {k: v if k == "pairs" or v is None else math.exp(v) for k, v in logs.items()}


def steps_to(curve: Curve, target: float) -> float | None:
    """Step at which the loss first reaches the target, interpolated linearly between evaluations; None if never.

    Also None if the loss becomes non-finite first. At least 1, so that ratios exist.

    >>> steps_to([(0, 1.0), (10, 0.5), (20, 0.3)], 0.4), steps_to([(0, 1.0), (10, 0.5)], 0.2)
    (15.0, None)
    """
    previous: tuple[int, float] | None = None
    for step, loss in curve:
        if loss is None:
            return None
        if loss <= target:
            if previous is None:
                return 1.0
            share = (previous[1] - target) / (previous[1] - loss)
            return max(1.0, previous[0] + share * (step - previous[0]))
        previous = (step, loss)
    return None


def untrained(rows: Sequence[RunRow], metric: str) -> dict[str, float]:
    """Mean metric and loss before the first step, over the report seeds; empty before there are any.

    A new head starts with random values, others for each seed, so an encoder has no more than its chance level.
    """
    start = [row for row in rows if (row["stage"], row["step"]) == ("report", 0) and row["loss"] is not None]
    return {name: float(np.mean([row[name] for row in start])) for name in (metric, "loss") if start}


def report_runs(
    rows: Sequence[RunRow], steps: int, target: float | None, pair: tuple[str, str] = ("lora", "lora_plus")
) -> list[RunRow]:
    """Groups the report's rows into runs, one per arm and seed: curve, test result and steps to the target.

    If `target` is None, the target of a seed is the worse of the final losses of the two arms of `pair`. Both reach
    it, and swapping the two methods does not change it, as it would if it were LoRA's own final loss. A target that
    the initial values already meet says nothing about training, so it has no steps to target.
    """
    runs: dict[tuple[str, int], RunRow] = {}
    keys = ("stage", "arm", "trial", "seed", "step", "split")
    for row in rows:
        if row["stage"] != "report":
            continue
        run = runs.setdefault(
            (row["arm"], row["seed"]), {"arm": row["arm"], "seed": row["seed"], "curve": [], "test": None}
        )
        run["curve"].append([row["step"], row["loss"]])
        if row["step"] == steps:
            run["test"] = {name: row[name] for name in row if name not in keys}
    for run in runs.values():
        curve, goal = run["curve"], target
        if goal is None:
            curves = [runs[arm, run["seed"]]["curve"] for arm in pair if (arm, run["seed"]) in runs]
            finals = [loss for curve in curves for step, loss in curve if step == steps and loss is not None]
            goal = max(finals) if len(finals) == 2 else None
        start = curve[0][1] if curve else None
        run["target"], run["diverged"] = goal, any(loss is None for _, loss in curve)
        run["at_start"] = goal is not None and start is not None and start <= goal
        comparable = not run["diverged"] and not run["at_start"]
        run["steps_to_target"] = steps_to(curve, goal) if comparable and goal is not None else None
    return list(runs.values())


def compare_arms(
    runs: Sequence[RunRow], first: str, second: str, metric: str, confidence: float = CONFIDENCE
) -> RunRow:
    """Compares two arms on their common seeds: test loss and metric (first minus second), and steps to the target.

    `steps_ratio` is the second's steps over the first's, where both reach the target; above 1, the first needs
    fewer. `alone` counts seeds on which only one arm reaches it, `at_start` seeds whose target the initial values
    already meet.
    """
    by_seed = {arm: {run["seed"]: run for run in runs if run["arm"] == arm} for arm in (first, second)}
    seeds = [seed for seed in by_seed[first] if seed in by_seed[second]]
    pairs = [(by_seed[first][seed], by_seed[second][seed]) for seed in seeds]
    ended = [pair for pair in pairs if all(run["test"] and not run["diverged"] for run in pair)]
    tests = [(a["test"], b["test"]) for a, b in ended]
    steps = [(a["steps_to_target"], b["steps_to_target"]) for a, b in pairs]
    reached = [(a, b) for a, b in steps if a is not None and b is not None]
    return {
        "first": first,
        "second": second,
        "confidence": confidence,
        "pairs": len(pairs),
        "diverged": {arm: sum(run["diverged"] for run in by_seed[arm].values()) for arm in (first, second)},
        "at_start": sum(a["at_start"] or b["at_start"] for a, b in pairs),
        "alone": {
            first: sum(a is not None and b is None for a, b in steps),
            second: sum(a is None and b is not None for a, b in steps),
        },
        "steps_ratio": ratio_interval([b for _, b in reached], [a for a, _ in reached], confidence),
        "test_loss": t_interval([a["loss"] - b["loss"] for a, b in tests], confidence),
        "test_metric": t_interval([a[metric] - b[metric] for a, b in tests], confidence),
    }


def verdict(
    comparison: RunRow, chosen: Mapping[str, Trial], target: float | None, lora: str = "tuned LoRA"
) -> str:
    """One sentence: what decides between LoRA+ and LoRA comes first, then the other of steps and test loss.

    Args:
      comparison: LoRA+ compared with LoRA.
      chosen: the selected setting of each.
      target: the configured target loss, or None.
      lora: how to refer to LoRA, from `lora_label`.
    """
    names = {"lora_plus": f"LoRA+ with lambda={chosen['lora_plus'].lr_ratio:g}", "lora": lora}
    clauses = [_steps_clause(comparison, names, target), _loss_clause(comparison, names)]
    if decisive(comparison) == "test_loss":
        clauses.reverse()
    pairs = comparison["test_loss"]["pairs"]
    evidence = (
        f" ({100 * comparison['confidence']:.4g} % intervals, {pairs} paired seeds)" if pairs > 1 else ""
    )
    text = f"{'; '.join(clauses)}{evidence}."
    return text[0].upper() + text[1:]


def _steps_clause(comparison: RunRow, names: Mapping[str, str], target: float | None) -> str:
    goal = "the same test loss" if target is None else f"a test loss of {target:g}"
    ratio, pairs, faster = comparison["steps_ratio"], comparison["pairs"], faster_arm(comparison)

    def count(counts: Mapping[str, int], event: str) -> str:
        (first, first_count), (second, second_count) = counts.items()
        return f"{names[first]} {event} {first_count}, {names[second]} on {second_count} of {pairs} seeds"

    if any(comparison["diverged"].values()):
        return f"{count(comparison['diverged'], 'diverged on')}, so there is no verdict on steps"
    if comparison["at_start"]:
        reason = f"the initial values already reach {goal}"
        reason = "LoRA or LoRA+ ended no lower than it started" if target is None else reason
        return f"no verdict on steps: on {comparison['at_start']} of {pairs} seeds {reason}"
    if any(comparison["alone"].values()):
        reached = {arm: number + ratio["pairs"] for arm, number in comparison["alone"].items()}
        counts = count(reached, f"reached {goal} on")
        level = 1 - comparison["confidence"]
        return f"{counts} (sign test, p < {level:.3g})" if faster else f"no verdict on steps: {counts}"
    if ratio["low"] is None or ratio["pairs"] < pairs:
        return f"no verdict on steps: {goal} was reached on {ratio['pairs'] or 'none'} of {pairs} seeds"
    mean, low, high = (ratio[name] for name in ("mean", "low", "high"))
    if faster == "lora":
        mean, low, high = 1 / mean, 1 / high, 1 / low
    interval = f"{mean:.2f} x [{low:.2f}, {high:.2f}]"
    if faster is None:
        subject = "difference" if decisive(comparison) is None else "difference in steps"
        return (
            f"no significant {subject}: {names['lora']} takes {interval} the steps of "
            f"{names['lora_plus']} to reach {goal}"
        )
    other = names["lora" if faster == "lora_plus" else "lora_plus"]
    return f"{names[faster]} needs {interval} fewer steps than {other} to reach {goal}"


def faster_arm(comparison: RunRow) -> str | None:
    """The arm that needs significantly fewer steps to the target; None if neither does.

    If some runs never reach it, a sign test decides over the seeds on which only one arm does.
    """
    ratio, alone = comparison["steps_ratio"], comparison["alone"]
    if any(comparison["diverged"].values()) or comparison["at_start"]:
        return None
    if any(alone.values()):
        # No ratio of steps exists where one arm never arrives, so only who arrives counts.
        p = stats.binomtest(max(alone.values()), sum(alone.values())).pvalue
        significant = p < 1 - comparison["confidence"]
        return max(alone, key=alone.__getitem__) if significant else None
    if ratio["low"] is None or ratio["pairs"] < comparison["pairs"]:
        return None
    return comparison["first"] if ratio["low"] > 1 else comparison["second"] if ratio["high"] < 1 else None


def lower_loss_arm(comparison: RunRow) -> str | None:
    """The arm with the significantly lower test loss; None if neither has."""
    low, high = comparison["test_loss"]["low"], comparison["test_loss"]["high"]
    if low is None:
        return None
    return comparison["second"] if low > 0 else comparison["first"] if high < 0 else None


def decisive(comparison: RunRow) -> Literal["diverged", "test_loss", "steps"] | None:
    """What decides between two arms, in this order; None if nothing is significant.

    Fewer diverged runs; a significantly lower test loss; significantly fewer steps to the target.
    """
    if len(set(comparison["diverged"].values())) > 1:
        return "diverged"
    if lower_loss_arm(comparison) is not None:
        return "test_loss"
    return None if faster_arm(comparison) is None else "steps"


def recommended_arm(comparison: RunRow) -> tuple[str | None, str]:
    """Which of LoRA+ and LoRA to train with by `decisive`, and why; None if both diverged on every seed.

    If nothing decides, it is plain LoRA, which has one fewer hyperparameter.
    """
    diverged, pairs, reason = comparison["diverged"], comparison["pairs"], decisive(comparison)
    lower, faster = lower_loss_arm(comparison), faster_arm(comparison)
    if all(count == pairs for count in diverged.values()):
        return None, "both diverged on every seed"
    if reason == "diverged":
        worse = max(diverged, key=diverged.__getitem__)
        best = min(diverged, key=diverged.__getitem__)
        return best, f"{ARM_LABELS[worse]} diverged on {diverged[worse]} of {pairs} seeds"
    if reason == "test_loss":
        is_slower = faster not in (None, lower)
        by = comparison["test_loss"]
        low, high = sorted(map(abs, (by["low"], by["high"])))
        text = f"significantly lower test loss, by {abs(by['mean']):.4f} [{low:.4f}, {high:.4f}]"
        return lower, text + (", but more steps to the target" if is_slower else "")
    if reason == "steps":
        if any(comparison["alone"].values()):
            return faster, "significantly more seeds on which it reaches the target"
        ratio = [comparison["steps_ratio"][name] for name in ("mean", "low", "high")]
        mean, low, high = ratio if faster == "lora_plus" else (1 / ratio[0], 1 / ratio[2], 1 / ratio[1])
        return (
            faster,
            f"significantly fewer steps to the same test loss, {mean:.2f} x [{low:.2f}, {high:.2f}]",
        )
    return "lora", "no significant difference, and plain LoRA has one fewer hyperparameter"


def decision(comparison: RunRow, chosen: Mapping[str, Trial]) -> str:
    """One sentence: which of the two to train with, and why."""
    best, why = recommended_arm(comparison)
    if best is None:
        return f"There is no winner: {why}. Try lower learning rates."
    name = "plain LoRA" if best == "lora" else f"LoRA+, lambda {chosen[best].lr_ratio:g}"
    if decisive(comparison) != "diverged":
        pairs = comparison["test_loss"]["pairs"]
        why += f" ({100 * comparison['confidence']:.4g} % intervals, {pairs} paired seeds)"
    return f"Train with {name}: {why}."


def not_above_constant(methods: Mapping[str, Any]) -> list[str]:
    """Labels of the methods that are not significantly better than a constant answer, where there is one."""
    intervals = ((method["label"], method["over_constant"]) for method in methods.values())
    return [label for label, over in intervals if over is not None and not (over["low"] or 0) > 0]


def lora_label(counts: Mapping[str, int], at_the_edge: Collection[str]) -> str:
    """How a verdict refers to LoRA.

    It is "tuned" only with at least as many settings as LoRA+ and a best learning rate that is not at the edge.

    Args:
      counts: number of settings tried, by arm.
      at_the_edge: those of LoRA's best values that are smallest or largest tried.

    >>> lora_label({"lora": 4, "lora_plus": 4}, []), lora_label({"lora": 1, "lora_plus": 4}, [])
    ('tuned LoRA', 'LoRA (best of 1 setting, LoRA+ of 4)')
    """
    if counts["lora"] < counts["lora_plus"]:
        settings = "setting" if counts["lora"] == 1 else "settings"
        return f"LoRA (best of {counts['lora']} {settings}, LoRA+ of {counts['lora_plus']})"
    is_tuned = "learning_rate" not in at_the_edge
    return "tuned LoRA" if is_tuned else "LoRA (best learning rate at the edge of the search range)"


def _loss_clause(comparison: RunRow, names: Mapping[str, str]) -> str:
    difference, lower = comparison["test_loss"], lower_loss_arm(comparison)
    if difference["mean"] is None:
        return "no seed has a test loss for both methods"
    text = f"difference in test loss (LoRA+ - LoRA) {difference['mean']:+.4f}"
    if difference["low"] is not None:
        text += f" [{difference['low']:+.4f}, {difference['high']:+.4f}]"
    if lower is None:
        return text
    other = names["lora" if lower == "lora_plus" else "lora_plus"]
    return f"{names[lower]} ends with a significantly lower test loss than {other}: {text}"


def verdict_of_methods(methods: Mapping[str, Any], comparisons: Sequence[RunRow], confidence: float) -> str:
    """Which methods have a significantly lower, or higher, test loss than tuned LoRA, and what limits the answer.

    A method that diverged on a seed has no result: those on which it did not are no fair sample.

    Args:
      methods: the numbers of each method, as in a report.
      comparisons: each of them compared with LoRA.
      confidence: of each interval.
    """
    others = {name: method for name, method in methods.items() if name != "lora"}
    known = {comparison["first"]: comparison["test_loss"] for comparison in comparisons}
    seeds = max((comparison["pairs"] for comparison in comparisons), default=0)
    known = {n: i for n, i in known.items() if i["low"] is not None and i["pairs"] == seeds}
    better = {name for name, interval in known.items() if interval["high"] < 0}
    worse = [others[name]["label"] for name, interval in known.items() if interval["low"] > 0]
    count = "1 comparison" if len(others) == 1 else f"{len(others)} comparisons"
    evidence = f"{seeds} paired seeds, {count}, intervals of {100 * confidence:.1f} % each"
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
        "every setting diverged": [m["label"] for m in methods.values() if m["diverged"] is None],
        "diverged on a seed": [method["label"] for method in methods.values() if method["diverged"]],
        "no result": [method["label"] for name, method in others.items() if name not in known],
        "not significantly better than a constant answer": not_above_constant(methods),
        "not tuned to the end, best value at the edge of the search range": [
            f"{m['label']} ({', '.join(m['at_the_edge'])})" for m in methods.values() if m["at_the_edge"]
        ],
    }
    return "; ".join([text, *(f"{note}: {', '.join(names)}" for note, names in notes.items() if names)]) + "."
