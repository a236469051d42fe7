"""What interpreters of jaxprs share."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun


def run_equation(eqn: Any, inputs: Sequence[Any], jaxpr: Any) -> Sequence[jax.Array]:
    """Runs one equation of a jaxpr on arrays.

    As a program of its own: only jax's interpreter knows the context and nested functions of any operation.
    """
    values = {a: x for a, x in zip(eqn.invars, inputs, strict=True) if not isinstance(a, Literal)}
    one = jaxpr.replace(constvars=[], invars=list(values), outvars=eqn.outvars, eqns=[eqn])
    return jaxpr_as_fun(ClosedJaxpr(one, ()))(*values.values())


def scan_counts(eqn: Any) -> tuple[int, int]:
    """The numbers of a `scan`'s constants and of its carried values, its first inputs; the others are sliced."""
    body: Any = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
    # Count by shapes, since jax versions name the counts differently: sliced inputs and stacked outputs have one
    # more axis outside than inside.
    sliced = _count_longer(eqn.invars, body.invars)
    carried = len(body.outvars) - _count_longer(eqn.outvars, body.outvars)
    return len(body.invars) - sliced - carried, carried


def _count_longer(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    return sum(len(o.aval.shape) > len(i.aval.shape) for o, i in zip(outside, inside, strict=True))
