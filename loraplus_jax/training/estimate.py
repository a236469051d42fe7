"""Estimates before the first step how long a run takes and how much memory it needs.

The time of a step is that of an evaluation batch, which is measured, times the ratio of the FLOPs of their matmuls.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..settings.schema import Settings
from ..tasks.interface import row_count


class Estimate(NamedTuple):
    """What a run is expected to take from here on.

    Attributes:
      seconds: seconds of what is counted.
      memory: peak memory in bytes: of the process on a CPU, otherwise of a device.
      counts: what is counted, such as `{"steps": 300, "evaluations": 4}`.
      bound: `"about"`, `"at most"` or `"at least"`.
      also: what takes time beside it.
    """

    seconds: float
    memory: int
    counts: Mapping[str, int]
    bound: str = "about"
    also: str = ""

    def __str__(self) -> str:
        counts = " and ".join(f"{count:,} {name}" for name, count in self.counts.items())
        size = f"{format_seconds(self.seconds)} and {self.memory / 1e9:.1f} GB"
        return f"estimate: {self.bound} {size} for {counts}" + (f", plus {self.also}" if self.also else "")


def count_flops(jaxpr: Any) -> float:
    """FLOPs of the matmuls of a jaxpr; those in the body of a scan count for each of its iterations."""
    total = 0.0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2.0 * inner * math.prod(eqn.outvars[0].aval.shape)
            continue
        values = (x for v in eqn.params.values() for x in (v if isinstance(v, tuple | list) else (v,)))
        bodies = [count_flops(x) for x in values if hasattr(x, "eqns") or hasattr(x, "jaxpr")]
        if eqn.primitive.name == "cond":  # one of its branches runs
            bodies = [max(bodies)]
        total += (eqn.params["length"] if eqn.primitive.name == "scan" else 1) * sum(bodies)
    return total


def batches_of(columns: Mapping[str, Any], rows: int) -> int:
    """Batches of so many rows that evaluate these columns."""
    return -(-row_count(columns) // rows)


def estimate_run(run: Any, held_out: str, batch_seconds: float, memory: int) -> Estimate:
    """Estimates a run before its first step.

    Args:
      run: the prepared `Run`.
      held_out: the split that is evaluated after training.
      batch_seconds: seconds of an evaluation batch.
      memory: peak memory in bytes.
    """
    settings: Settings = run.settings
    validations, splits = -(-run.steps // settings.train.eval_every), run.data.splits
    batches = {name: batches_of(splits[name], run.batches.eval_rows) for name in ("validation", held_out)}
    total = run.steps * run.programs.step_work + validations * batches["validation"] + batches[held_out]
    counts = {"steps": run.steps, "evaluations": validations + 1}
    bound = "about" if settings.train.early_stopping is None else "at most"
    also = "" if run.held_out_texts is None else "generating texts"
    return Estimate(total * batch_seconds, memory, counts, bound, also)


def estimate_rest(steps: int, speeds: Sequence[float], memory: int) -> Estimate:
    """Estimates the steps that remain of a resumed run, from the logged steps per second."""
    return Estimate(steps / statistics.median(speeds), memory, {"steps": steps}, also="evaluations")


def format_seconds(seconds: float) -> str:
    """Seconds, minutes or hours to about two digits.

    >>> [format_seconds(x) for x in (0.2, 42, 100, 1234, 40000)]
    ['1 s', '42 s', '100 s', '21 min', '11 h']
    """
    if seconds < 119.5:
        return f"{max(1, seconds):.0f} s"
    if seconds < 119.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds > 36e3 else f"{seconds / 3600:.1f} h"
