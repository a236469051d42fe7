"""Checks of numbers and names that users give, and the messages for those that cannot be used."""

import difflib
import math
from collections.abc import Iterable
from typing import Any

import numpy as np


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
) -> None:
    """Raises ValueError unless `value` is a finite number within the bounds, which float32 can hold."""
    finite = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
    holds = finite and in_float32(value)
    inside = (
        finite
        and (above is None or value > above)
        and (at_least is None or value >= at_least)
        # XLA computes in float32, for which 1 - 1e-9 is 1.
        and (below is None or (value < below and (not holds or np.float32(value) < below)))
    )
    if not inside or not holds:
        bounds = [("above", above), ("at least", at_least), ("below", below)]
        allowed = " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
        why = ", which float32 cannot hold" if inside else ""
        raise ValueError(f"{name} must be a finite number {allowed}".rstrip() + f", got {value!r}{why}")


def in_float32(value: float) -> bool:
    """Whether XLA can compute with a finite number: neither infinite in float32 nor so small that it counts as 0.

    >>> in_float32(1e-8), in_float32(1e-60), in_float32(1e300), in_float32(0.0)
    (True, False, False, True)
    """
    return value == 0 or MIN_FLOAT32 <= abs(value) <= LARGEST


MIN_FLOAT32, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def check_int(name: str, value: Any, *, at_least: int, at_most: int | None = None) -> None:
    """Raises ValueError unless `value` is an int within the bounds given that fits in 64 bits."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < at_least or (at_most is not None and value > at_most):
        bounds = f"at least {at_least}" + (f" and at most {at_most}" if at_most is not None else "")
        raise ValueError(f"{name} must be a whole number of {bounds}, got {value!r}")
    if value >= 2**63:
        raise ValueError(f"{name} must be below 2**63, got {value!r}")


def suggest(name: str, known: Iterable[str], *, fallback: bool = True) -> str:
    """`"; did you mean 'x'?"` with the nearest of `known`, or the list of all when none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; known: {', '.join(known)}" if known and fallback else ""
