"""Detects loss spikes and non-finite steps, and advises which settings to change."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from .run_files import TrainingFailed
from .setup import Run

SPIKE_RATIO, SPIKE_STEPS, HISTORY_STEPS = 2.0, 5, 20
"""A spike is SPIKE_STEPS losses in a row that are all above each of the HISTORY_STEPS losses before (at the start
of a run: SPIKE_STEPS or more), and above SPIKE_RATIO times their median.

A batch of hard texts is a single high loss, however high; after a step that damages the model there are several. If
all losses come from one distribution, whichever it is, the last 5 of 25 are the highest once in 53,130 steps,
and of the first 10 once in 252.
"""


class SpikeHistory(NamedTuple):
    """The last losses of steps that were not skipped, since the last spike, and the number of skipped steps since.

    Saved in checkpoints, so that a resumed run finds the same spikes.
    """

    losses: tuple[float, ...] = ()
    skipped: int = 0


class LossSpike(NamedTuple):
    """The last step of a spike: its loss, its gradient and update norms by role, and the median loss before."""

    step: int
    loss: float
    median: float
    norms: Mapping[str, float]

    def values(self) -> dict[str, float]:
        """The spike as a row of `metrics.jsonl`; its names differ from those of an ordinary row."""
        values = {"loss": self.loss, "median": self.median, **self.norms}
        return {f"spike/{name}": value for name, value in values.items()}

    def __str__(self) -> str:
        return f"step {self.step}: loss spike, {self.loss:.4f} after a median of {self.median:.4f}"


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
        losses = [*losses, row["loss"]][-HISTORY_STEPS - SPIKE_STEPS :]
        before, recent = losses[:-SPIKE_STEPS], losses[-SPIKE_STEPS:]
        if len(before) < SPIKE_STEPS:
            continue
        median = statistics.median(before)
        if min(recent) > max(SPIKE_RATIO * median, *before):
            norms = {name: value for name, value in row.items() if "_norm/" in name}
            spikes.append(LossSpike(step, row["loss"], median, norms))
            losses = []  # so that each spike is reported once
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
    """Suggests settings to change, given the names of the non-finite metrics, if there are any."""
    optimizer, ratio = run.settings.optimizer, run.settings.lr_ratio
    only_updates = nonfinite and all(name.startswith("update_norm/") for name in nonfinite)
    tips = []
    if ratio > 1 and "grad_norm/a" in nonfinite:
        tips.append(f"lora.lr_ratio below {ratio:g} (A's gradient grows with B)")
    elif ratio > 1 and "update_norm/b" in nonfinite:
        tips.append(f"lora.lr_ratio below {ratio:g} (B's rate is its product with learning_rate)")
    elif ratio > 1 and not nonfinite:
        tips.append(f"lora.lr_ratio below {ratio:g}")
    tips.append(f"optimizer.learning_rate below {optimizer.learning_rate:g}")
    if optimizer.max_grad_norm is None and not only_updates:  # clipping does not help if gradients are finite
        tips.append("optimizer.max_grad_norm 1.0")
    if not optimizer.warmup_steps:
        tips.append("optimizer.warmup_steps above 0")
    return "try " + ", or ".join(tips)
