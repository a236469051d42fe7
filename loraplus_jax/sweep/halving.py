"""Which settings go on: successive halving, for LoRA and LoRA+ apart, so that both keep a best one.

Every member has the schedule of the whole run, so that one that goes on after a rung is where its single run would
be. They are compared at equal steps by their loss on the validation split. A rung comes before the rate has
decayed, and favours rates that learn fast and noisily: so the last choice is made at the end.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

from .settings import SweepSettings, Trial


def comparison_steps(settings: SweepSettings, steps: int) -> list[int]:
    """The steps at which the settings are compared: the rungs for halving, and the end.

    >>> comparison_steps(SweepSettings(rungs=(0.125, 0.25)), 300)
    [38, 75, 300]
    """
    rungs = () if settings.method == "grid" else settings.rungs
    return sorted({*(rung_step(share, steps) for share in rungs), steps})


def check_rungs(settings: SweepSettings, steps: int, warmup_steps: int) -> None:
    """Rungs look at members that have had their peak rate, each at another step.

    Raises:
      ValueError: what is wrong with which rungs, and what may be given.
    """
    if settings.method == "grid":
        return
    stops = {share: rung_step(share, steps) for share in settings.rungs}
    for (share, stop), (next_share, next_stop) in itertools.pairwise(stops.items()):
        if stop == next_stop:
            raise ValueError(
                f"sweep.rungs {share:g} and {next_share:g} are both step {stop} of {steps}: give one of them, or "
                "rungs that are further apart"
            )
    share, stop = next(reversed(stops.items()))
    if stop == steps:
        raise ValueError(
            f"sweep.rungs {share:g} is step {stop} of {steps}, the end, where the last choice is made anyway: give "
            "rungs before it"
        )
    share, stop = next(iter(stops.items()))
    if stop <= warmup_steps:
        least = math.ceil(1000 * warmup_steps / steps) / 1000
        raise ValueError(
            f"sweep.rungs {share:g} is step {stop} of {steps}, and up to step {warmup_steps} rates still grow "
            f"(optimizer.warmup_steps), so that it would favour large ones: give rungs above {least:g}, or fewer "
            "steps of warm-up"
        )


def rung_step(share: float, steps: int) -> int:
    """The step after which a rung is."""
    return max(1, math.ceil(share * steps))


MIN_CURVE_POINTS = 10
"""Points of a curve at least: steps to a target are counted on straight lines between them."""


def curve_every(eval_every: int, steps: int) -> int:
    """Steps between the evaluations of the report.

    >>> curve_every(50, 300), curve_every(20, 300)
    (30, 20)
    """
    return min(eval_every, math.ceil(steps / MIN_CURVE_POINTS))


def survivors(scores: Mapping[Trial, float], keep: float) -> list[Trial]:
    """The share `keep` of each arm's settings with the lowest scores, at least one, in the order given.

    Of equals the first counts. A setting whose score is not finite has diverged and never goes on.

    >>> scores = {Trial(rate, 1.0, 16.0, 8): loss for rate, loss in [(1e-4, 0.7), (1e-3, 0.5), (1e-2, math.nan)]}
    >>> [trial.learning_rate for trial in survivors(scores, 0.25)]
    [0.001]
    """
    kept: list[Trial] = []
    for arm in dict.fromkeys(trial.arm for trial in scores):
        trials = [trial for trial in scores if trial.arm == arm]
        finite = [trial for trial in trials if math.isfinite(scores[trial])]
        kept += sorted(finite, key=scores.__getitem__)[: max(1, math.ceil(keep * len(trials) - 1e-9))]
    return [trial for trial in scores if trial in kept]


def split_at_rung(scores: Mapping[Trial, float], keep: float) -> tuple[dict[str, Trial], list[Trial]]:
    """Arm to its setting where one alone survives, which is chosen, and the settings that go on, of the other arms.

    Of one that is alone nothing is to be learned by training it on.
    """
    by_arm: dict[str, list[Trial]] = {}
    for trial in survivors(scores, keep):
        by_arm.setdefault(trial.arm, []).append(trial)
    alone = {arm: trials[0] for arm, trials in by_arm.items() if len(trials) == 1}
    return alone, [trial for arm, trials in by_arm.items() if arm not in alone for trial in trials]


def best_trial(scores: Mapping[Trial, float], arm: str) -> Trial | None:
    """The setting of an arm with the lowest score; None if all have diverged."""
    finite = [trial for trial, score in scores.items() if trial.arm == arm and math.isfinite(score)]
    return min(finite, key=scores.__getitem__, default=None)


def mean_losses(losses: Mapping[tuple[Trial, int], float]) -> dict[Trial, float]:
    """Each setting's mean over its seeds; not finite if that of one seed is not.

    >>> one = Trial(1e-3, 1.0, 16.0, 8)
    >>> mean_losses({(one, 0): 1.0, (one, 1): 2.0})[one]
    1.5
    """
    by_trial: dict[Trial, list[float]] = {}
    for (trial, _), loss in losses.items():
        by_trial.setdefault(trial, []).append(loss)
    return {trial: sum(values) / len(values) for trial, values in by_trial.items()}


def member_steps(counts: Sequence[int], stops: Sequence[int]) -> int:
    """The steps taken in all, where `counts[i]` members are trained up to `stops[i]`.

    >>> member_steps([16, 4], [38, 75])
    756
    """
    lengths = [stop - before for before, stop in zip([0, *stops], stops, strict=False)]
    return sum(count * length for count, length in zip(counts, lengths, strict=True))
