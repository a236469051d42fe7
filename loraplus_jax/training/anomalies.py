"""What to say of training that goes wrong: loss spikes, and numbers that are not finite."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from .setup import Run

MIN_SPIKE_RATIO, NOISE, HISTORY_STEPS = 2.0, 6.0, 20
"""A spike: a loss above MIN_SPIKE_RATIO times the median of the HISTORY_STEPS steps before it, and above it by
more than NOISE times their median distance from it: the losses of small batches jump about.
"""


class TrainingFailed(Exception):
    """Training went wrong and was ended; the last good checkpoint is kept."""


class SpikeHistory(NamedTuple):
    """What is remembered of the steps before, kept in checkpoints: a run that goes on sees what it would have seen.

    Attributes:
      losses: of the last `HISTORY_STEPS` steps that were not skipped.
      skipped: how many steps were skipped in a row.
    """

    losses: tuple[float, ...] = ()
    skipped: int = 0


class LossSpike(NamedTuple):
    """A loss spike.

    Attributes:
      step: at which.
      loss: that step's.
      median: of the losses before.
      norms: that step's, of gradients and updates by role.
    """

    step: int
    loss: float
    median: float
    norms: Mapping[str, float]

    def values(self) -> dict[str, float]:
        """As a row of `metrics.jsonl`; no name is one of an ordinary row's."""
        values = {"loss": self.loss, "median": self.median, **self.norms}
        return {f"spike/{name}": value for name, value in values.items()}

    def __str__(self) -> str:
        norms = ", ".join(f"{name} {value:.3g}" for name, value in self.norms.items())
        return (
            f"step {self.step}: the loss jumped to {self.loss:.4f} (median before {self.median:.4f}); {norms}"
        )


def metrics_to_host(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Steps' metrics on the host."""
    return [{name: float(value) for name, value in row.items()} for row in jax.device_get(list(metrics))]


def find_spikes(
    history: SpikeHistory, first: int, rows: Sequence[Mapping[str, float]]
) -> tuple[SpikeHistory, list[LossSpike]]:
    """The spikes among the steps from `first` on, and what to remember after them."""
    losses, skipped, spikes = list(history.losses), history.skipped, []
    for step, row in enumerate(rows, first):
        skipped = skipped + 1 if row["skipped"] else 0
        if skipped:
            continue
        if is_spike(losses, row["loss"]):
            norms = {name: value for name, value in row.items() if "_norm/" in name}
            spikes.append(LossSpike(step, row["loss"], statistics.median(losses), norms))
        losses = [*losses, row["loss"]][-HISTORY_STEPS:]
    return SpikeHistory(tuple(losses), skipped), spikes


def is_spike(losses: Sequence[float], loss: float) -> bool:
    """Whether a loss spikes over those of the steps before it.

    >>> is_spike([1.0, 1.1, 0.9], 3.0), is_spike([1.0, 0.2, 3.0], 3.5)
    (True, False)
    """
    if len(losses) < 3:
        return False
    median = statistics.median(losses)
    spread = statistics.median(abs(value - median) for value in losses)
    return loss > MIN_SPIKE_RATIO * median and loss > median + NOISE * spread


def index_of_skip_limit(history: SpikeHistory, rows: Sequence[Mapping[str, float]], most: int) -> int | None:
    """The place of the row by which `most` steps in a row were skipped, if they were.

    >>> skipped, done = {"skipped": 1.0}, {"skipped": 0.0}
    >>> index_of_skip_limit(SpikeHistory(skipped=1), [skipped, skipped], 3)
    1
    >>> index_of_skip_limit(SpikeHistory(skipped=2), [done, skipped, skipped], 3)
    """
    in_a_row = history.skipped
    for place, row in enumerate(rows):
        in_a_row = in_a_row + 1 if row["skipped"] else 0
        if in_a_row >= most:
            return place
    return None


def check_skipped(
    run: Run, history: SpikeHistory, first: int, rows: Sequence[Mapping[str, float]], kept: int
) -> None:
    """Ends the run when too many steps in a row were skipped, naming what was not finite.

    Args:
      run: says how many are too many.
      history: of the steps before.
      first: the step of the first row.
      rows: steps' metrics.
      kept: the step of the newest checkpoint.
    """
    most = run.settings.train.max_skipped
    place = index_of_skip_limit(history, rows, most)
    if place is not None:
        odd = nonfinite_names(rows[place])
        raise TrainingFailed(
            f"{most} steps in a row up to step {first + place} were skipped: not finite were {', '.join(odd)}; "
            f"{advice(run, odd)}; checkpoints up to step {kept} are kept"
        )


def nonfinite_names(row: Mapping[str, float]) -> list[str]:
    """What in a step's metrics is not finite; updates, which follow from the rest, only where the rest is.

    >>> nonfinite_names({"loss": math.nan, "update_norm/a": math.nan})
    ['loss']
    >>> nonfinite_names({"loss": 1.0, "update_norm/a": math.inf})
    ['update_norm/a']
    """
    odd = [name for name, value in row.items() if not math.isfinite(value)]
    return [name for name in odd if not name.startswith("update_norm/")] or odd


def advice(run: Run, odd: Sequence[str]) -> str:
    """What the evidence supports."""
    optimizer, config = run.settings.optimizer, run.config
    updates = all(name.startswith("update_norm/") for name in odd)  # finite gradients: clipping is no help
    tips = []
    if config is not None and config.lr_ratio > 1:
        if "grad_norm/a" in odd:
            tips.append(f"a lower lora.lr_ratio than {config.lr_ratio:g} (A's gradient grows with B)")
        elif "update_norm/b" in odd:
            tips.append(f"a lower lora.lr_ratio than {config.lr_ratio:g} (B's rate is the product)")
    tips.append(f"a lower optimizer.learning_rate than {optimizer.learning_rate:g}")
    if optimizer.max_grad_norm is None and not updates:
        tips.append("optimizer.max_grad_norm: 1.0")
    if not optimizer.warmup_steps:
        tips.append("optimizer.warmup_steps")
    return "try " + ", or ".join(tips)
