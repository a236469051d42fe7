"""Detects loss spikes and non-finite steps, and advises which settings to change."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from .run_files import TrainingFailed
from .setup import Run

MIN_SPIKE_RATIO, NOISE, HISTORY_STEPS = 2.0, 6.0, 20
"""A loss is a spike if it is above MIN_SPIKE_RATIO times the median of the previous HISTORY_STEPS losses, and above
that median by more than NOISE times their median absolute deviation: losses of small batches are noisy.
"""


class SpikeHistory(NamedTuple):
    """The losses of the last `HISTORY_STEPS` steps that were not skipped, and the number of skipped ones since.

    Saved in checkpoints, so that a resumed run finds the same spikes.
    """

    losses: tuple[float, ...] = ()
    skipped: int = 0


class LossSpike(NamedTuple):
    """A step with its loss, the median of the previous losses, and its gradient and update norms by role."""

    step: int
    loss: float
    median: float
    norms: Mapping[str, float]

    def values(self) -> dict[str, float]:
        """The spike as a row of `metrics.jsonl`; its names differ from those of an ordinary row."""
        values = {"loss": self.loss, "median": self.median, **self.norms}
        return {f"spike/{name}": value for name, value in values.items()}

    def __str__(self) -> str:
        norms = ", ".join(f"{name} {value:.3g}" for name, value in self.norms.items())
        return f"step {self.step}: loss spike, {self.loss:.4f} (previous median {self.median:.4f}); {norms}"


def metrics_to_host(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Copies the metrics of steps to the host as floats."""
    # Of the whole list at once: device_get begins all copies before it waits for the first.
    return [{name: float(value) for name, value in row.items()} for row in jax.device_get(list(metrics))]


def find_spikes(
    history: SpikeHistory, first: int, rows: Sequence[Mapping[str, float]]
) -> tuple[SpikeHistory, list[LossSpike]]:
    """Finds the spikes in the metrics of the steps from `first` on; returns the new history and the spikes."""
    losses, skipped, spikes = list(history.losses), history.skipped, []
    for step, row in enumerate(rows, first):
        skipped = skipped + 1 if row["skipped"] else 0
        if skipped:
            continue
        if len(losses) >= 3:
            loss, median = row["loss"], statistics.median(losses)
            spread = statistics.median(abs(value - median) for value in losses)
            if loss > MIN_SPIKE_RATIO * median and loss > median + NOISE * spread:
                norms = {name: value for name, value in row.items() if "_norm/" in name}
                spikes.append(LossSpike(step, loss, median, norms))
        losses = [*losses, row["loss"]][-HISTORY_STEPS:]
    return SpikeHistory(tuple(losses), skipped), spikes


def index_of_skip_limit(history: SpikeHistory, rows: Sequence[Mapping[str, float]], most: int) -> int | None:
    """The index of the row at which `most` consecutive steps have been skipped, or None.

    >>> skipped, done = {"skipped": 1.0}, {"skipped": 0.0}
    >>> index_of_skip_limit(SpikeHistory(skipped=1), [skipped, skipped], 3)
    1
    >>> index_of_skip_limit(SpikeHistory(skipped=2), [done, skipped, skipped], 3)
    """
    consecutive = history.skipped
    for index, row in enumerate(rows):
        consecutive = consecutive + 1 if row["skipped"] else 0
        if consecutive >= most:
            return index
    return None


def check_skipped(
    run: Run, history: SpikeHistory, first: int, rows: Sequence[Mapping[str, float]], kept: int
) -> None:
    """Raises TrainingFailed after `train.max_skipped` consecutive skipped steps; names the non-finite values.

    `history` is that before the rows, the metrics of the steps from `first` on; `kept` is the newest checkpoint.
    """
    most = run.settings.train.max_skipped
    if (index := index_of_skip_limit(history, rows, most)) is not None:
        names = nonfinite_names(rows[index])
        raise TrainingFailed(
            f"skipped {most} steps in a row up to step {first + index} (train.max_skipped): non-finite "
            f"{', '.join(names)}; {advice(run, names)}; checkpoints up to step {kept} are kept"
        )


def nonfinite_names(row: Mapping[str, float]) -> list[str]:
    """The non-finite metrics of a step. Update norms count only if all else is finite, since they follow from it.

    >>> nonfinite_names({"loss": math.nan, "update_norm/a": math.nan})
    ['loss']
    >>> nonfinite_names({"loss": 1.0, "update_norm/a": math.inf})
    ['update_norm/a']
    """
    names = [name for name, value in row.items() if not math.isfinite(value)]
    return [name for name in names if not name.startswith("update_norm/")] or names


def advice(run: Run, nonfinite: Sequence[str]) -> str:
    """Suggests settings to change, given the names of the non-finite metrics."""
    optimizer, ratio = run.settings.optimizer, run.settings.lr_ratio
    only_updates = all(name.startswith("update_norm/") for name in nonfinite)
    tips = []
    if ratio > 1 and "grad_norm/a" in nonfinite:
        tips.append(f"lora.lr_ratio below {ratio:g} (A's gradient grows with B)")
    elif ratio > 1 and "update_norm/b" in nonfinite:
        tips.append(f"lora.lr_ratio below {ratio:g} (B's rate is its product with learning_rate)")
    tips.append(f"optimizer.learning_rate below {optimizer.learning_rate:g}")
    if optimizer.max_grad_norm is None and not only_updates:  # clipping does not help if gradients are finite
        tips.append("optimizer.max_grad_norm 1.0")
    if not optimizer.warmup_steps:
        tips.append("optimizer.warmup_steps above 0")
    return "try " + ", or ".join(tips)
