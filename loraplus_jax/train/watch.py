"""What to say of training that goes wrong: loss spikes, and numbers that are not finite."""

import math
import statistics
from collections.abc import Mapping, Sequence

from .prepare import Run

SPIKE = 2.0
"""A mean loss this many times the median of the rows before it is said to be a spike."""


class TrainingFailed(Exception):
    """Training went wrong and was ended; the last good checkpoint is kept."""


def spike(older: Sequence[float], values: Mapping[str, float]) -> str | None:
    """Says when the loss jumps over the last rows' median, with the norms of that moment.

    >>> spike([1.0, 1.1, 0.9], {"loss": 3.0, "grad_norm/b": 7.0})
    'the loss jumped to 3.0000 (median before 1.0000); grad_norm/b 7'
    """
    recent = list(older)[-10:]
    if len(recent) < 3 or values["loss"] <= SPIKE * statistics.median(recent):
        return None
    norms = ", ".join(f"{name} {value:.3g}" for name, value in values.items() if "_norm/" in name)
    return f"the loss jumped to {values['loss']:.4f} (median before {statistics.median(recent):.4f}); {norms}"


def not_finite(row: Mapping[str, float]) -> list[str]:
    """What in a step's metrics is not finite; updates, which follow from the rest, only where the rest is.

    >>> not_finite({"loss": math.nan, "update_norm/a": math.nan})
    ['loss']
    >>> not_finite({"loss": 1.0, "update_norm/a": math.inf})
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
