"""Follows weights through a program, from a jaxpr's inputs to its outputs, without computing anything.

A model whose adapted layers return only their low-rank terms (`Mode.LOW_RANK_ONLY`) does not need the adapted
weights. If one still reaches an output, the model reads it outside its layer, where no adapter acts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from .equations import scan_counts

Tags = frozenset[tuple[int, bool]]
"""The inputs that a value depends on, by number, each with whether the value is an unchanged part of it."""

NOTHING: Tags = frozenset()
_MARK = "loraplus_weight_of_a_layer"
_MARK_WHOLE = f"{_MARK}_as_one_array"
# Operations that return parts of a weight unchanged, except for their order or precision.
_MOVES = (
    *("transpose", "squeeze", "slice", "dynamic_slice", "broadcast_in_dim", "convert_element_type", "copy"),
    *("stop_gradient", "sharding_constraint", "pvary", "pcast", "all_gather", "device_put"),
)


class Dataflow(NamedTuple):
    """How a program uses its inputs, by their numbers.

    Attributes:
      read: inputs that reach an output.
      changed: inputs that are changed before they reach `mark_weight`.
      whole: inputs that reach `mark_weight` where a layer needs W + s A B as one array.
    """

    read: frozenset[int]
    changed: frozenset[int]
    whole: frozenset[int]


def mark_weight(weight: jax.Array, *, whole: bool = False) -> jax.Array:
    """Returns a zero that marks a layer's use of a weight for `trace_dataflow`, without passing on its values."""
    return _mark_whole(weight) if whole else _mark(weight)


def _marker(name: str) -> Any:
    def zero(weight: jax.Array) -> jax.Array:
        return jnp.zeros(())

    zero.__name__ = name
    return jax.jit(zero)


_mark, _mark_whole = _marker(_MARK), _marker(_MARK_WHOLE)


def trace_dataflow(program: ClosedJaxpr) -> Dataflow:
    """Follows the inputs of a program to its outputs, through loops, branches and calls.

    Assumes that every input of an operation reaches all its outputs, so an input counts as unread only if no output
    uses it. Effects such as printing do not count as outputs.
    """
    marks = _Marks(set(), set())
    inputs = [frozenset({(n, True)}) for n in range(len(program.jaxpr.invars))]
    outputs = _propagate(program, inputs, marks)
    read = frozenset(n for tags in outputs for n, _ in tags)
    return Dataflow(read, frozenset(marks.changed), frozenset(marks.whole))


class _Marks(NamedTuple):
    """The inputs that reach a mark, changed or where a whole weight is needed."""

    changed: set[int]
    whole: set[int]


def _propagate(program: ClosedJaxpr | Jaxpr, inputs: Sequence[Tags], marks: _Marks) -> list[Tags]:
    """Computes the tags of a program's outputs from those of its inputs; adds to `marks`."""
    jaxpr: Any = getattr(program, "jaxpr", program)
    tags = dict(zip(jaxpr.invars, inputs, strict=True))

    def tags_of(atoms: Sequence[Any]) -> list[Tags]:
        return [NOTHING if isinstance(atom, Literal) else tags.get(atom, NOTHING) for atom in atoms]

    for eqn in jaxpr.eqns:
        if any(eqn_inputs := tags_of(eqn.invars)):
            tags |= zip(eqn.outvars, _propagate_eqn(eqn, eqn_inputs, marks), strict=True)
    return tags_of(jaxpr.outvars)


def _propagate_eqn(eqn: Any, inputs: list[Tags], marks: _Marks) -> list[Tags]:
    """Computes the tags of one operation's outputs."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return _scan(eqn, inputs, marks)
    if name == "while":
        return _while(params, inputs, marks)
    if name == "cond":
        branches = [_propagate(branch, inputs[1:], marks) for branch in params["branches"]]
        return [_as_changed(inputs[0]).union(*tags) for tags in zip(*branches, strict=True)]
    if name == "optimization_barrier":
        return inputs
    if _MARK in (called := str(params.get("name"))):
        marks.changed.update(n for tags in inputs for n, unchanged in tags if not unchanged)
        if _MARK_WHOLE in called:
            marks.whole.update(n for tags in inputs for n, _ in tags)
    inner = [value for value in params.values() if isinstance(value, ClosedJaxpr | Jaxpr)]
    if len(inner) == 1 and _fits(inner[0], eqn):  # a call, whatever its name
        return _propagate(inner[0], inputs, marks)
    tags = NOTHING.union(*inputs)
    return [tags if name in _MOVES else _as_changed(tags)] * len(eqn.outvars)


def _fits(program: ClosedJaxpr | Jaxpr, eqn: Any) -> bool:
    jaxpr: Any = getattr(program, "jaxpr", program)
    return len(jaxpr.invars) == len(eqn.invars) and len(jaxpr.outvars) == len(eqn.outvars)


def _scan(eqn: Any, inputs: list[Tags], marks: _Marks) -> list[Tags]:
    body, (consts, carried) = eqn.params["jaxpr"], scan_counts(eqn)
    carry = inputs[consts : consts + carried]
    while True:
        outputs = _propagate(body, inputs[:consts] + carry + inputs[consts + carried :], marks)
        if (new_carry := _union(carry, outputs)) == carry:
            return carry + outputs[carried:]
        carry = new_carry


def _while(params: Any, inputs: list[Tags], marks: _Marks) -> list[Tags]:
    cond_consts, body_consts = params["cond_nconsts"], params["body_nconsts"]
    carry = inputs[cond_consts + body_consts :]
    while True:
        (condition,) = _propagate(params["cond_jaxpr"], inputs[:cond_consts] + carry, marks)
        body_inputs = inputs[cond_consts : cond_consts + body_consts] + carry
        outputs = _propagate(params["body_jaxpr"], body_inputs, marks)
        if (new_carry := _union(carry, [tags | _as_changed(condition) for tags in outputs])) == carry:
            return carry
        carry = new_carry


def _union(first: list[Tags], second: list[Tags]) -> list[Tags]:
    return [a | b for a, b in zip(first, second, strict=False)]


def _as_changed(tags: Tags) -> Tags:
    return frozenset((n, False) for n, _ in tags)
