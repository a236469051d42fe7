"""Checks of numbers and names that users give, and the messages for those that cannot be used."""

import difflib
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    allow_arrays: bool = False,
) -> None:
    """Checks a finite number within the bounds, which float32 can hold.

    With `allow_arrays` a scalar array counts as a number, and a traced one, whose value is not known, passes.

    Raises:
      TypeError: it is not a number.
      ValueError: it is out of range.
    """
    if allow_arrays and isinstance(value, Tracer):
        return
    bounds = [("above", above), ("at least", at_least), ("below", below)]
    allowed = " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
    expected = f"{name} must be a finite number {allowed}".rstrip()
    if allow_arrays and isinstance(value, jax.Array | np.ndarray) and value.ndim == 0:
        value = value.item()
    # numpy registers its scalars as Real.
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{expected}, got {value!r:.80}")
    number: Any = value
    finite = abs(number) < math.inf
    holds = finite and in_float32(number)
    inside = (
        finite
        and (above is None or number > above)
        and (at_least is None or number >= at_least)
        # XLA computes in float32, for which 1 - 1e-9 is 1.
        and (below is None or (number < below and (not holds or np.float32(number) < below)))
    )
    if not inside or not holds:
        why = ", which float32 cannot hold" if inside else ""
        raise ValueError(f"{expected}, got {value!r:.80}{why}")


def in_float32(value: float) -> bool:
    """Whether XLA can compute with a finite number: neither infinite in float32 nor so small that it counts as 0.

    >>> in_float32(1e-8), in_float32(1e-60), in_float32(1e300), in_float32(0.0)
    (True, False, False, True)
    """
    return value == 0 or MIN_FLOAT32 <= abs(value) <= LARGEST


MIN_FLOAT32, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def check_int(name: str, value: Any, *, at_least: int, at_most: int | None = None) -> None:
    """Checks an int within the bounds that fits in 64 bits.

    Raises:
      TypeError: it is not an int.
      ValueError: it is out of range.
    """
    bounds = f"at least {at_least}" + (f" and at most {at_most}" if at_most is not None else "")
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number of {bounds}, got {value!r:.80}")
    if value < at_least or (at_most is not None and value > at_most):
        raise ValueError(f"{name} must be a whole number of {bounds}, got {value!r:.80}")
    if value >= 2**63:
        raise ValueError(f"{name} must be below 2**63, got {value!r:.80}")


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raises ValueError unless the value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r:.80}")


def suggest(name: str, known: Iterable[str], *, fallback: bool = True) -> str:
    """`"; did you mean 'x'?"` with the nearest of `known`, or the list of all when none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; known: {', '.join(known)}" if known and fallback else ""
