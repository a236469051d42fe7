"""Learning rate schedules, and their values at a step."""

from typing import Literal, get_args

import jax
import optax

from .._utils.validation import check_choice, check_int, check_number

Rate = float | jax.Array | optax.Schedule
"""A learning rate: a number, a traced scalar, or a schedule from step to rate."""


Schedule = Literal["constant", "linear", "cosine", "wsd"]


def make_schedule(
    name: Schedule,
    peak: float | jax.Array,
    steps: int,
    *,
    warmup_steps: int = 0,
    final_fraction: float = 0.0,
    decay_steps: int | None = None,
) -> optax.Schedule:
    """Makes a schedule for `learning_rate`; B's rate is `lr_ratio` times it at every step, including the last.

    Args:
      name: `"constant"`, `"linear"`, `"cosine"`, or `"wsd"` (warmup, stable, then linear decay).
      peak: learning rate after warmup.
      steps: total number of optimizer steps.
      warmup_steps: steps of linear warmup from 0.
      final_fraction: final learning rate as a fraction of the peak; not for constant.
      decay_steps: steps of decay at the end, a fifth of all steps by default; only for wsd.

    Returns:
      An `optax.Schedule`, from the step, which counts from 0, to the learning rate; it is constant after `steps`.

    Raises:
      ValueError: the name is unknown, or warmup and decay do not fit into the steps.

    >>> schedule = make_schedule("wsd", 1.0, 10, warmup_steps=2, decay_steps=4, final_fraction=0.5)
    >>> [float(schedule(step)) for step in (0, 1, 2, 6, 8, 10, 11)]
    [0.0, 0.5, 1.0, 1.0, 0.75, 0.5, 0.5]
    """
    check_choice("schedule", name, get_args(Schedule))
    if name != "wsd" and decay_steps is not None:
        raise ValueError(f"decay_steps requires schedule wsd, got {name} and decay_steps {decay_steps}")
    if name == "constant" and final_fraction:
        raise ValueError(
            f"final_fraction requires schedule linear, cosine or wsd, got constant and {final_fraction}"
        )
    check_int("steps", steps, at_least=1)
    check_int("warmup_steps", warmup_steps, at_least=0)
    check_number("final_fraction", final_fraction, at_least=0.0, below=1.0)
    decay = max(1, steps // 5) if decay_steps is None else decay_steps
    check_int("decay_steps", decay, at_least=1)
    rest = steps - warmup_steps
    if rest < (decay if name == "wsd" else 1):
        end = f" + decay_steps {decay}" if name == "wsd" else " + 1"
        raise ValueError(f"steps must be at least warmup_steps {warmup_steps}{end}, got {steps}")
    if name == "constant":
        main = optax.constant_schedule(peak)
    elif name == "cosine":
        main = optax.cosine_decay_schedule(peak, rest, final_fraction)
    else:
        length = decay if name == "wsd" else rest
        main = optax.linear_schedule(peak, peak * final_fraction, length, rest - length)
    if not warmup_steps:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), main], [warmup_steps])
