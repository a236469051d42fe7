"""What a sweep has found: pairs of runs with the same seed, steps to a target, intervals, and a sentence.

Settings were chosen on the validation split with other seeds; here they are compared on the test split and new
ones. The runs of one seed share first values and batches, so that their difference says more than two means would.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from .settings import ARM_LABELS, Trial

CONFIDENCE = 0.95
Curve = Sequence[tuple[int, float | None]]
"""Steps and test losses; None where the loss was not finite."""
RunRow = dict[str, Any]


def t_interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean and two-sided 95 % t-interval of independent values, `low` and `high` None for fewer than two.

    >>> found = t_interval([1.0, 2.0, 3.0])
    >>> round(found["low"], 4), found["mean"], round(found["high"], 4)
    (-0.4841, 2.0, 4.4841)
    """
    count = len(values)
    if not count:
        return {"mean": None, "low": None, "high": None, "pairs": 0}
    mean = float(np.mean(values))
    if count < 2:
        return {"mean": mean, "low": None, "high": None, "pairs": count}
    half = (
        float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * float(np.std(values, ddof=1)) / math.sqrt(count)
    )
    return {"mean": mean, "low": mean - half, "high": mean + half, "pairs": count}


def ratio_interval(over: Sequence[float], under: Sequence[float]) -> dict[str, Any]:
    """The same of paired ratios, geometric: the interval of their logarithms.

    >>> ratio_interval([4.0, 4.0], [2.0, 2.0])["mean"]
    2.0
    """
    logs = t_interval([math.log(a / b) for a, b in zip(over, under, strict=True)])
    return {k: v if k == "pairs" or v is None else math.exp(v) for k, v in logs.items()}


def steps_to(curve: Curve, target: float) -> float | None:
    """When a loss first is at most the target, on straight lines between evaluations; None if never.

    At least 1, so that ratios exist.

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


def report_runs(rows: Sequence[RunRow], steps: int, target: float | None) -> list[RunRow]:
    """The report's runs, from its rows: curve, test result and steps to the target, one for each arm and seed.

    Without a target given it is, on each seed, the worse of the final losses of LoRA and LoRA+: both reach it, and
    which of the two is called which does not matter, as it would if it were LoRA's own. A target that the first
    values meet says nothing about training: there are no steps to it.
    """
    runs: dict[tuple[str, int], RunRow] = {}
    for row in rows:
        if row["stage"] != "report":
            continue
        run = runs.setdefault(
            (row["arm"], row["seed"]), {"arm": row["arm"], "seed": row["seed"], "curve": [], "test": None}
        )
        run["curve"].append([row["step"], row["loss"]])
        if row["step"] == steps:
            run["test"] = {name: row[name] for name in row if name not in _KEYS}
    for run in runs.values():
        curve, goal = run["curve"], _shared_target(runs, run["seed"], steps) if target is None else target
        start = curve[0][1] if curve else None
        run["target"], run["diverged"] = goal, any(loss is None for _, loss in curve)
        run["at_start"] = goal is not None and start is not None and start <= goal
        fair = not run["diverged"] and not run["at_start"]
        run["steps_to_target"] = steps_to(curve, goal) if fair and goal is not None else None
    return list(runs.values())


_KEYS = ("stage", "arm", "trial", "seed", "step", "split")


def _shared_target(runs: Mapping[tuple[str, int], RunRow], seed: int, steps: int) -> float | None:
    """The worse of the two final losses; None where one of the two has none."""
    curves = [runs[arm, seed]["curve"] for arm in ("lora", "lora_plus") if (arm, seed) in runs]
    finals = [loss for curve in curves for step, loss in curve if step == steps and loss is not None]
    return max(finals) if len(finals) == 2 else None


def compare_arms(runs: Sequence[RunRow], first: str, second: str, metric: str) -> RunRow:
    """Two arms on the seeds that both have: differences in test loss and metric, first less second, and steps.

    `steps_ratio` is the second's steps to the target over the first's, where both reach it: above 1, the first
    needs fewer. `alone` counts the seeds on which only one of them does, `at_start` those whose target the first
    values meet.
    """
    by_seed = {arm: {run["seed"]: run for run in runs if run["arm"] == arm} for arm in (first, second)}
    seeds = [seed for seed in by_seed[first] if seed in by_seed[second]]
    pairs = [(by_seed[first][seed], by_seed[second][seed]) for seed in seeds]
    ended = [(a["test"], b["test"]) for a, b in pairs if _has_result(a) and _has_result(b)]
    steps = [(a["steps_to_target"], b["steps_to_target"]) for a, b in pairs]
    reached = [(a, b) for a, b in steps if a is not None and b is not None]
    return {
        "first": first,
        "second": second,
        "pairs": len(pairs),
        "diverged": {arm: sum(run["diverged"] for run in by_seed[arm].values()) for arm in (first, second)},
        "at_start": sum(a["at_start"] or b["at_start"] for a, b in pairs),
        "alone": {
            first: sum(a is not None and b is None for a, b in steps),
            second: sum(a is None and b is not None for a, b in steps),
        },
        "steps_ratio": ratio_interval([b for _, b in reached], [a for a, _ in reached]),
        "test_loss": t_interval([a["loss"] - b["loss"] for a, b in ended]),
        "test_metric": t_interval([a[metric] - b[metric] for a, b in ended]),
    }


def _has_result(run: RunRow) -> bool:
    return run["test"] is not None and not run["diverged"]


def verdict(
    comparison: RunRow, chosen: Mapping[str, Trial], target: float | None, lora: str = "tuned LoRA"
) -> str:
    """One sentence: which of LoRA+ and LoRA needs fewer steps and how surely, or that neither does.

    Args:
      comparison: of LoRA+ with LoRA.
      chosen: the setting of each.
      target: as given, or None.
      lora: what to call LoRA; tuned only if it was, see `lora_label`.
    """
    text = f"{_steps_clause(comparison, chosen, target, lora)}; {_loss_clause(comparison)}."
    return text[0].upper() + text[1:]


def _steps_clause(comparison: RunRow, chosen: Mapping[str, Trial], target: float | None, lora: str) -> str:
    ours = f"LoRA+ with lambda={chosen['lora_plus'].lr_ratio:g}"
    names = {"lora_plus": ours, "lora": lora}
    goal = "the same test loss" if target is None else f"a test loss of {target:g}"
    ratio, pairs, faster = comparison["steps_ratio"], comparison["pairs"], faster_arm(comparison)
    evidence = f"95 % interval, {ratio['pairs']} paired seeds"
    if any(comparison["diverged"].values()):
        return f"no verdict on steps: {_counts_clause(comparison['diverged'], names, pairs, 'diverged on')}"
    if comparison["at_start"]:
        what = (
            "LoRA or LoRA+ ended no lower than it started"
            if target is None
            else f"{goal} is met before any step"
        )
        return f"no verdict on steps: on {comparison['at_start']} of {pairs} seeds {what}"
    if any(comparison["alone"].values()):
        first = "" if faster else "no verdict on steps: "
        reached = {arm: count + ratio["pairs"] for arm, count in comparison["alone"].items()}
        return f"{first}{_counts_clause(reached, names, pairs, f'reached {goal} on')}"
    if not ratio["pairs"]:
        return f"no verdict on steps: {goal} was reached on none of {pairs} seeds"
    if ratio["low"] is None or ratio["pairs"] < pairs:
        return f"no verdict on steps: {goal} was reached on {ratio['pairs']} of {pairs} seeds"
    if faster is None:
        what = "difference" if lower_loss_arm(comparison) is None else "difference in steps"
        return (
            f"no {what} found: {lora} takes {_range_text(ratio)} the steps of {ours} to {goal} ({evidence})"
        )
    if faster == "lora":
        ratio = {k: 1 / ratio[j] for k, j in (("mean", "mean"), ("low", "high"), ("high", "low"))}
    other = names["lora" if faster == "lora_plus" else "lora_plus"]
    return f"{names[faster]} needs {_range_text(ratio)} fewer steps than {other} to {goal} ({evidence})"


def _counts_clause(counts: Mapping[str, int], names: Mapping[str, str], pairs: int, what: str) -> str:
    (first, first_count), (second, second_count) = counts.items()
    return f"{names[first]} {what} {first_count}, {names[second]} on {second_count} of {pairs} seeds"


def faster_arm(comparison: RunRow) -> str | None:
    """The arm that surely needs fewer steps to the target, if one does.

    Where some runs never reach it, the one that reaches it alone on so many seeds that a sign test is sure of it.
    """
    ratio, alone = comparison["steps_ratio"], comparison["alone"]
    if any(comparison["diverged"].values()) or comparison["at_start"]:
        return None
    if any(alone.values()):
        sure = stats.binomtest(max(alone.values()), sum(alone.values())).pvalue < 1 - CONFIDENCE
        return max(alone, key=alone.__getitem__) if sure else None
    if ratio["low"] is None or ratio["pairs"] < comparison["pairs"]:
        return None
    return _favoured_side(1.0, ratio, above=comparison["first"], below=comparison["second"])


def lower_loss_arm(comparison: RunRow) -> str | None:
    """The arm whose test loss is surely lower, if one is."""
    difference = comparison["test_loss"]
    return (
        None
        if difference["low"] is None
        else _favoured_side(0.0, difference, comparison["second"], comparison["first"])
    )


def _favoured_side(even: float, estimate: Mapping[str, Any], above: str, below: str) -> str | None:
    return above if estimate["low"] > even else below if estimate["high"] < even else None


def recommended_arm(comparison: RunRow) -> tuple[str | None, str]:
    """Which of LoRA+ and LoRA to train with, and why; None if both diverged on every seed.

    What diverged less; else what surely ends at a lower test loss; else what surely gets to the target sooner; else
    plain LoRA, which has a setting less.
    """
    diverged, pairs = comparison["diverged"], comparison["pairs"]
    if all(count == pairs for count in diverged.values()):
        return None, "both diverged on every seed"
    if len(set(diverged.values())) > 1:
        worse = max(diverged, key=diverged.__getitem__)
        best = min(diverged, key=diverged.__getitem__)
        return best, f"{ARM_LABELS[worse]} diverged on {diverged[worse]} of {pairs} seeds"
    if (arm := lower_loss_arm(comparison)) is not None:
        against = faster_arm(comparison) not in (None, arm)
        return (
            arm,
            f"its test loss is surely lower{', though it needs more steps to the target' if against else ''}",
        )
    if (arm := faster_arm(comparison)) is not None:
        return arm, "it surely needs fewer steps"
    return "lora", "no sure difference, and plain LoRA has a setting less"


def lora_label(counts: Mapping[str, int], edges: Sequence[str]) -> str:
    """What a verdict may call LoRA: tuned only after as many settings as LoRA+ had, and within its rates.

    Args:
      counts: how many settings of each were tried.
      edges: as `report.values_at_edge` finds them.

    >>> lora_label({"lora": 4, "lora_plus": 4}, []), lora_label({"lora": 1, "lora_plus": 4}, [])
    ('tuned LoRA', 'LoRA (best of 1, LoRA+ of 4)')
    """
    if counts["lora"] < counts["lora_plus"]:
        return f"LoRA (best of {counts['lora']}, LoRA+ of {counts['lora_plus']})"
    edge = next((e for e in edges if e.startswith(f"{ARM_LABELS['lora']}: learning_rate")), None)
    return "tuned LoRA" if edge is None else "LoRA, whose best rate lies at the edge of those tried,"


def _range_text(ratio: Mapping[str, Any]) -> str:
    return f"{ratio['mean']:.2f} x [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def _loss_clause(comparison: RunRow) -> str:
    difference = comparison["test_loss"]
    if difference["mean"] is None:
        return "no pair of runs has test results"
    text = f"test loss of LoRA+ minus LoRA's {difference['mean']:+.4f}"
    return (
        text if difference["low"] is None else f"{text} [{difference['low']:+.4f}, {difference['high']:+.4f}]"
    )
