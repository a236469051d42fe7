"""Successive halving, separately for each arm, so that each keeps a best setting.

Every member follows the learning-rate schedule of a full run, so a survivor of a rung is where its single run would
be. Settings are compared at equal steps by validation loss. At a rung the learning rate has not decayed yet, which
favours rates that learn fast but noisily; so the final selection among survivors happens at the end of training.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .settings import SweepSettings
from .trial import Trial


def comparison_steps(settings: SweepSettings, steps: int) -> list[int]:
    """Steps at which settings are compared: the rungs (halving only) and the end of training.

    >>> comparison_steps(SweepSettings(rungs=(0.125, 0.25)), 300)
    [38, 75, 300]
    """
    rungs = () if settings.method == "grid" else settings.rungs
    return sorted({*(rung_step(share, steps) for share in rungs), steps})


def check_rungs(settings: SweepSettings, steps: int, warmup_steps: int) -> None:
    """Checks that rungs come after the warmup and before the end, each at a different step.

    Raises:
      ValueError: a rung is within the warmup, at the last step, or at the same step as another.
    """
    if settings.method == "grid":
        return
    stops = {share: rung_step(share, steps) for share in settings.rungs}
    for (share, stop), (next_share, next_stop) in itertools.pairwise(stops.items()):
        if stop == next_stop:
            raise ValueError(
                f"sweep.rungs {share:g} and {next_share:g} both fall on step {stop} of {steps}; remove one "
                "or space them further apart"
            )
    share, stop = next(reversed(stops.items()))
    if stop == steps:
        raise ValueError(
            f"sweep.rungs {share:g} falls on step {stop} of {steps}, the end of training, where settings are "
            "compared anyway; use a smaller share"
        )
    share, stop = next(iter(stops.items()))
    if stop <= warmup_steps:
        least = math.ceil(1000 * warmup_steps / steps) / 1000
        raise ValueError(
            f"sweep.rungs {share:g} falls on step {stop} of {steps}, within the warmup "
            f"(optimizer.warmup_steps {warmup_steps}), which favours large rates; use rungs above {least:g} "
            "or a shorter warmup"
        )


def rung_step(share: float, steps: int) -> int:
    """Step after which a rung compares the settings."""
    return max(1, math.ceil(share * steps))


def curve_steps(steps: int, points: int) -> list[int]:
    """Steps at which a report run is evaluated on the test split; the last evaluation is also its result.

    Beside step 0, one of `points` is at a quarter of the steps and the others are spread over the second half: a
    method needs more than half of the steps to the other's final loss unless it is twice as fast.

    >>> curve_steps(300, 7), curve_steps(300, 2), curve_steps(300, 1)
    ([0, 75, 150, 180, 210, 240, 270, 300], [0, 150, 300], [0, 300])
    """
    early = [0.25] if points > 2 else []
    late = np.linspace(0.5, 1, points - len(early)) if points > 1 else [1.0]
    return sorted({0, *(round(share * steps) for share in (*early, *late))})


def survivors(scores: Mapping[Trial, float], keep: float) -> list[Trial]:
    """The best `keep` share of an arm's settings, at least one, in input order.

    Lower scores are better; the first wins a tie. A non-finite score means diverged and never survives.

    >>> scores = {Trial(rate, 1.0, 16.0, 8): loss for rate, loss in [(1e-4, 0.7), (1e-3, 0.5), (1e-2, math.nan)]}
    >>> [trial.learning_rate for trial in survivors(scores, 0.25)]
    [0.001]
    """
    finite = [trial for trial in scores if math.isfinite(scores[trial])]
    best = sorted(finite, key=scores.__getitem__)[: kept(len(scores), keep)]
    return [trial for trial in scores if trial in best]


def kept(count: int, keep: float) -> int:
    """How many of an arm's settings a rung keeps, if they do not diverge."""
    # Less an epsilon: 0.07 x 100 settings are 7.000000000000001 in floating point.
    return max(1, math.ceil(keep * count - 1e-9))


def best_trial(scores: Mapping[Trial, float]) -> Trial | None:
    """An arm's setting with the lowest score; None if all diverged."""
    finite = [trial for trial, score in scores.items() if math.isfinite(score)]
    return min(finite, key=scores.__getitem__, default=None)


def mean_losses(rows: Iterable[Mapping[str, Any]]) -> dict[Trial, float]:
    """Mean loss of each setting over the rows of its seeds at one step; NaN if any is None, not finite.

    >>> trial = Trial(1e-3, 1.0, 16.0, 8)
    >>> mean_losses([{"trial": list(trial), "loss": 1.0}, {"trial": list(trial), "loss": 2.0}])[trial]
    1.5
    """
    by_trial: dict[Trial, list[float]] = {}
    for row in rows:
        by_trial.setdefault(Trial(*row["trial"]), []).append(math.nan if row["loss"] is None else row["loss"])
    return {trial: sum(values) / len(values) for trial, values in by_trial.items()}


def member_steps(counts: Sequence[int], stops: Sequence[int]) -> int:
    """Total training steps if `counts[i]` members train up to `stops[i]`.

    >>> member_steps([16, 4], [38, 75])
    756
    """
    lengths = [stop - before for before, stop in zip([0, *stops], stops, strict=False)]
    return sum(count * length for count, length in zip(counts, lengths, strict=True))


def planned_members(settings: Sequence[int], seeds: int, stops: Sequence[int], keep: float) -> list[int]:
    """Members that train up to each stop, and are evaluated there, if nothing diverges.

    Args:
      settings: number of settings of each arm.
      seeds: seeds of the search.
      stops: steps after which settings are compared.
      keep: share of each arm's settings that is kept.

    >>> planned_members([16, 16], 1, [38, 300], 0.125)
    [32, 4]
    """
    remaining, counts = list(settings), []
    for _ in stops:
        counts.append(sum(remaining) * seeds)
        # One that is left alone is selected without further training.
        remaining = [kept(count, keep) for count in remaining if kept(count, keep) > 1]
    return counts
