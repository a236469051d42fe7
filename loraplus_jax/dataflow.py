"""Where weights go in a program: a walk over a jaxpr that follows inputs to outputs, and computes nothing.

A model whose adapted layers return only their low-rank terms (`Mode.LOW_RANK_ONLY`) no longer needs an
adapted weight. If it reaches an output all the same, the model reads it past the layer, where no adapter acts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

Tags = frozenset[tuple[int, bool]]
"""Which inputs a value depends on, by their number, and whether it is a part of each and nothing else."""

NOTHING: Tags = frozenset()
_MARK = "loraplus_weight_of_a_layer"
# What hands on parts of a weight as they are, in another order or precision at most.
_MOVES = (
    *("transpose", "squeeze", "slice", "dynamic_slice", "broadcast_in_dim", "convert_element_type", "copy"),
    *("stop_gradient", "sharding_constraint", "pvary", "pcast", "all_gather", "device_put"),
)


class Dataflow(NamedTuple):
    """What a program does with its inputs, by their numbers.

    Attributes:
      read: those that reach an output.
      changed: those that are changed before they come to `mark_weight`.
    """

    read: frozenset[int]
    changed: frozenset[int]


def mark_weight(weight: jax.Array) -> jax.Array:
    """A zero that marks, for `trace_dataflow`, a layer's use of this weight; no value reaches it."""
    return _noted(weight)


def _zero(weight: jax.Array) -> jax.Array:
    return jnp.zeros(())


_zero.__name__ = _MARK
_noted = jax.jit(_zero)


def trace_dataflow(program: ClosedJaxpr) -> Dataflow:
    """Follows the inputs of a program to its outputs, through loops, branches and calls.

    Everything that an operation is given reaches all that it gives; only what is never used for an output is seen
    to be so. Effects such as printing are no outputs.
    """
    changed: set[int] = set()
    inputs = [frozenset({(n, True)}) for n in range(len(program.jaxpr.invars))]
    outputs = _through(program, inputs, changed)
    return Dataflow(frozenset(n for tags in outputs for n, _ in tags), frozenset(changed))


def _through(program: ClosedJaxpr | Jaxpr, inputs: Sequence[Tags], changed: set[int]) -> list[Tags]:
    """The outputs' tags, given those of the inputs; adds to `changed`."""
    jaxpr: Any = getattr(program, "jaxpr", program)
    tags = dict(zip(jaxpr.invars, inputs, strict=True))

    def of(atoms: Sequence[Any]) -> list[Tags]:
        return [NOTHING if isinstance(atom, Literal) else tags.get(atom, NOTHING) for atom in atoms]

    for eqn in jaxpr.eqns:
        if any(given := of(eqn.invars)):
            tags |= zip(eqn.outvars, _step(eqn, given, changed), strict=True)
    return of(jaxpr.outvars)


def _step(eqn: Any, inputs: list[Tags], changed: set[int]) -> list[Tags]:
    """One operation."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return _scan(eqn, inputs, changed)
    if name == "while":
        return _while(params, inputs, changed)
    if name == "cond":
        ways = [_through(branch, inputs[1:], changed) for branch in params["branches"]]
        return [_changed(inputs[0]).union(*tags) for tags in zip(*ways, strict=True)]
    if name == "optimization_barrier":
        return inputs
    if _MARK in str(params.get("name")):
        changed |= {n for tags in inputs for n, whole in tags if not whole}
    inner = [value for value in params.values() if isinstance(value, ClosedJaxpr | Jaxpr)]
    if len(inner) == 1 and _fits(inner[0], eqn):  # a call, whatever its name
        return _through(inner[0], inputs, changed)
    tags = NOTHING.union(*inputs)
    return [tags if name in _MOVES else _changed(tags)] * len(eqn.outvars)


def _fits(program: ClosedJaxpr | Jaxpr, eqn: Any) -> bool:
    jaxpr: Any = getattr(program, "jaxpr", program)
    return len(jaxpr.invars) == len(eqn.invars) and len(jaxpr.outvars) == len(eqn.outvars)


def _scan(eqn: Any, inputs: list[Tags], changed: set[int]) -> list[Tags]:
    program = eqn.params["jaxpr"]
    body: Any = getattr(program, "jaxpr", program)
    # Counted by shapes, since the numbers have other names in other versions of jax: what is sliced or stacked has
    # an axis more outside than inside. Constants come first, then the carry.
    sliced, carried = _longer(eqn.invars, body.invars), len(body.outvars) - _longer(eqn.outvars, body.outvars)
    consts = len(body.invars) - sliced - carried
    carry = inputs[consts : consts + carried]
    while True:
        outputs = _through(body, inputs[:consts] + carry + inputs[consts + carried :], changed)
        if (more := _union(carry, outputs)) == carry:
            return carry + outputs[carried:]
        carry = more


def _longer(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """How many have more axes outside."""
    return sum(len(o.aval.shape) > len(i.aval.shape) for o, i in zip(outside, inside, strict=True))


def _while(params: Any, inputs: list[Tags], changed: set[int]) -> list[Tags]:
    of_cond, of_body = params["cond_nconsts"], params["body_nconsts"]
    carry = inputs[of_cond + of_body :]
    while True:
        (goes_on,) = _through(params["cond_jaxpr"], inputs[:of_cond] + carry, changed)
        outputs = _through(params["body_jaxpr"], inputs[of_cond : of_cond + of_body] + carry, changed)
        if (more := _union(carry, [tags | _changed(goes_on) for tags in outputs])) == carry:
            return carry
        carry = more


def _union(some: list[Tags], others: list[Tags]) -> list[Tags]:
    return [one | other for one, other in zip(some, others, strict=False)]


def _changed(tags: Tags) -> Tags:
    return frozenset((n, False) for n, _ in tags)
