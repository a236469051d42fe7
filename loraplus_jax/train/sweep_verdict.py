"""What a sweep has found: pairs of runs with the same seed, steps to a target, intervals, and a sentence.

Settings were chosen on the validation split with other seeds; here they are compared on new ones. The runs of one
seed share first values and batches, so that their difference says more than two means would.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from .sweep_settings import NAMES, Trial

LEVEL = 0.95
Curve = Sequence[tuple[int, float | None]]
"""Steps and validation losses; None where the loss was not finite."""
Row = dict[str, Any]


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean and two-sided 95 % t-interval of independent values, `low` and `high` None for fewer than two.

    >>> found = interval([1.0, 2.0, 3.0])
    >>> round(found["low"], 4), found["mean"], round(found["high"], 4)
    (-0.4841, 2.0, 4.4841)
    """
    count = len(values)
    if not count:
        return {"mean": None, "low": None, "high": None, "pairs": 0}
    mean = float(np.mean(values))
    if count < 2:
        return {"mean": mean, "low": None, "high": None, "pairs": count}
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return {"mean": mean, "low": mean - half, "high": mean + half, "pairs": count}


def ratio_interval(over: Sequence[float], under: Sequence[float]) -> dict[str, Any]:
    """The same of paired ratios, geometric: the interval of their logarithms.

    >>> ratio_interval([4.0, 4.0], [2.0, 2.0])["mean"]
    2.0
    """
    found = interval([math.log(a / b) for a, b in zip(over, under, strict=True)])
    return {k: v if k == "pairs" or v is None else math.exp(v) for k, v in found.items()}


def steps_to(curve: Curve, target: float) -> float | None:
    """When a validation loss first is at most the target, on straight lines between evaluations; None if never.

    At least 1, so that ratios exist.

    >>> steps_to([(0, 1.0), (10, 0.5), (20, 0.3)], 0.4), steps_to([(0, 1.0), (10, 0.5)], 0.2)
    (15.0, None)
    """
    before: tuple[int, float] | None = None
    for step, loss in curve:
        if loss is None:
            return None
        if loss <= target:
            if before is None:
                return 1.0
            share = (before[1] - target) / (before[1] - loss)
            return max(1.0, before[0] + share * (step - before[0]))
        before = (step, loss)
    return None


def runs_of(rows: Sequence[Row], steps: int, target: float | None) -> list[Row]:
    """The report's runs, from its rows: curve, test result and steps to the target, one for each arm and seed.

    Without a target given it is, on each seed, the worse of the final losses of LoRA and LoRA+: both reach it, and
    which of the two is called which does not matter, as it would if it were LoRA's own.
    """
    runs: dict[tuple[str, int], Row] = {}
    for row in rows:
        if row["stage"] != "report":
            continue
        run = runs.setdefault(
            (row["arm"], row["seed"]), {"arm": row["arm"], "seed": row["seed"], "curve": [], "test": None}
        )
        if row["split"] == "test":
            run["test"] = {name: row[name] for name in row if name not in _KEYS}
        else:
            run["curve"].append([row["step"], row["loss"]])
    for run in runs.values():
        run["diverged"] = any(loss is None for _, loss in run["curve"])
        run["target"] = _target(runs, run["seed"], steps) if target is None else target
        reached = None if run["target"] is None else steps_to(run["curve"], run["target"])
        run["steps_to_target"] = None if run["diverged"] else reached
    return list(runs.values())


_KEYS = ("stage", "arm", "trial", "seed", "step", "split")


def _target(runs: Mapping[tuple[str, int], Row], seed: int, steps: int) -> float | None:
    """The worse of the two final losses; None where one of the two has none."""
    curves = [runs[arm, seed]["curve"] for arm in ("lora", "lora_plus") if (arm, seed) in runs]
    finals = [loss for curve in curves for step, loss in curve if step == steps and loss is not None]
    return max(finals) if len(finals) == 2 else None


def compare(runs: Sequence[Row], first: str, second: str, metric: str) -> Row:
    """Two arms on the seeds that both have: differences in test loss and metric, first less second, and steps.

    `steps_ratio` is the second's steps to the target over the first's: above 1, the first needs fewer.
    """
    by_seed = {arm: {run["seed"]: run for run in runs if run["arm"] == arm} for arm in (first, second)}
    seeds = [seed for seed in by_seed[first] if seed in by_seed[second]]
    pairs = [(by_seed[first][seed], by_seed[second][seed]) for seed in seeds]
    ended = [(a["test"], b["test"]) for a, b in pairs if _ended(a) and _ended(b)]
    steps = [(a["steps_to_target"], b["steps_to_target"]) for a, b in pairs]
    reached = [(a, b) for a, b in steps if a is not None and b is not None]
    return {
        "first": first,
        "second": second,
        "pairs": len(pairs),
        "diverged": {arm: sum(run["diverged"] for run in by_seed[arm].values()) for arm in (first, second)},
        "never_reached": {first: sum(a is None for a, _ in steps), second: sum(b is None for _, b in steps)},
        "steps_ratio": ratio_interval([b for _, b in reached], [a for a, _ in reached]),
        "test_loss": interval([a["loss"] - b["loss"] for a, b in ended]),
        "test_metric": interval([a[metric] - b[metric] for a, b in ended]),
    }


def _ended(run: Row) -> bool:
    return run["test"] is not None and not run["diverged"]


def verdict(comparison: Row, chosen: Mapping[str, Trial], target: float | None) -> str:
    """One sentence: which of LoRA+ and tuned LoRA needs fewer steps and how surely, or that neither does."""
    ours = f"LoRA+ with lambda={chosen['lora_plus'].lr_ratio:g}"
    goal = "the same validation loss" if target is None else f"a validation loss of {target:g}"
    found, never = comparison["steps_ratio"], comparison["never_reached"]
    loss, evidence = _loss(comparison), f"95 % interval, {found['pairs']} paired seeds"
    if any(never.values()):
        counts = " and by ".join(f"{NAMES[arm]} on {count}" for arm, count in never.items())
        why = "diverged or never reached" if any(comparison["diverged"].values()) else "never reached"
        return f"No verdict on steps: {goal} was {why} by {counts} of {comparison['pairs']} seeds; {loss}."
    if found["low"] is None:
        return f"No verdict: only {found['pairs']} pairs of runs ended; {loss}."
    if found["low"] <= 1.0 <= found["high"]:
        return (
            f"No difference found: tuned LoRA takes {_range(found)} the steps of {ours} to {goal} "
            f"({evidence}); {loss}."
        )
    if found["low"] > 1.0:
        return f"{ours} needs {_range(found)} fewer steps than tuned LoRA to {goal} ({evidence}); {loss}."
    other = {k: 1 / found[j] for k, j in (("mean", "mean"), ("low", "high"), ("high", "low"))}
    return f"Tuned LoRA needs {_range(other)} fewer steps than {ours} to {goal} ({evidence}); {loss}."


def favoured(comparison: Row) -> str | None:
    """The arm that surely needs fewer steps, if one does."""
    found = comparison["steps_ratio"]
    if any(comparison["never_reached"].values()) or found["low"] is None:
        return None
    return "lora_plus" if found["low"] > 1.0 else "lora" if found["high"] < 1.0 else None


def _range(found: Mapping[str, Any]) -> str:
    return f"{found['mean']:.2f} x [{found['low']:.2f}, {found['high']:.2f}]"


def _loss(comparison: Row) -> str:
    found = comparison["test_loss"]
    if found["mean"] is None:
        return "no pair of runs has test results"
    text = f"test loss of LoRA+ minus LoRA's {found['mean']:+.4f}"
    return text if found["low"] is None else f"{text} [{found['low']:+.4f}, {found['high']:+.4f}]"
