"""Follows weights through a program, from a jaxpr's inputs to its outputs, without computing anything.

A model whose adapted layers return only their low-rank terms (`Tracing.low_rank_only`) does not need the adapted
weights. If one still reaches an output, the model reads it outside its layer, where no adapter acts.
"""

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from .equations import scan_counts

Tags = frozenset[tuple[int, bool]]
"""The inputs that a value depends on, by number, each with whether the value is an unchanged part of it."""

NOTHING: Tags = frozenset()
_MARK = "loraplus_weight_of_a_layer"
_MARK_WHOLE = f"{_MARK}_as_one_array_for_"
# Operations that return parts of a weight unchanged, except for their order or precision.
_KEEPS_VALUES = (
    *("transpose", "squeeze", "slice", "dynamic_slice", "broadcast_in_dim", "convert_element_type", "copy"),
    *("gather", "reshape", "split", "concatenate", "stack", "rev"),
    *("stop_gradient", "sharding_constraint", "pvary", "pcast", "all_gather", "device_put"),
)


class Dataflow(NamedTuple):
    """How a program uses its inputs, by their numbers.

    Attributes:
      read: inputs that reach an output.
      changed: inputs that are changed before they reach `mark_weight`.
      sums: inputs that reach `mark_weight` where W + s A B is needed as one array, the operations there, and how
        many values they need.
      whole: those of `sums` whose operations need as many values as the input has, or more.
      custom: inputs that reach `mark_weight` in a function with a gradient of its own, as `custom_vjp` makes.
    """

    read: set[int]
    changed: set[int]
    sums: dict[int, dict[str, float]]
    whole: dict[int, set[str]]
    custom: set[int]

    def add_sums(self, sums: Mapping[int, Mapping[str, float]], times: float = 1) -> None:
        """Adds the sums of a part of the program that runs so many times."""
        for n, users in sums.items():
            own = self.sums.setdefault(n, {})
            for user, size in users.items():
                own[user] = own.get(user, 0) + times * size


def mark_weight(weight: jax.Array, *, whole: str = "") -> jax.Array:
    """Returns a zero that marks a layer's use of a weight for `trace_dataflow`, without passing on its values.

    `whole` is the operation that needs it as one array.
    """
    return _marker(_MARK_WHOLE + whole if whole else _MARK)(weight)


@functools.cache
def _marker(name: str) -> Any:
    def zero(weight: jax.Array) -> jax.Array:
        return jnp.zeros(())

    # Under jit, since a call keeps its name in the jaxpr, through transformations too.
    zero.__name__ = name
    return jax.jit(zero)


def trace_dataflow(program: ClosedJaxpr) -> Dataflow:
    """Follows the inputs of a program to its outputs, through loops, branches and calls.

    Assumes that every input of an operation reaches all its outputs, so an input counts as unread only if no output
    uses it. Effects such as printing do not count as outputs.
    """
    flow = Dataflow(set(), set(), {}, {}, set())
    outputs = _propagate(program, [frozenset({(n, True)}) for n in range(len(program.jaxpr.invars))], flow)
    flow.read.update(n for tags in outputs for n, _ in tags)
    for n, users in flow.sums.items():
        if sum(users.values()) >= program.jaxpr.invars[n].aval.size:
            flow.whole[n] = set(users)
    return flow


Callers = tuple[tuple[Jaxpr, Any], ...]
"""The programs and equations that a program is called by, the innermost first."""


def rounds(eqn: Any, program: Jaxpr, callers: Callers = ()) -> bool:
    """Whether an equation of a program rounds a value: casts it to 8 bits, or to fewer bits and then to more.

    A cast to 16 bits alone is for a product of that precision.
    """
    if eqn.primitive.name != "convert_element_type":
        return False
    before, after = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    return _bits(after) < _bits(before) and (
        after.itemsize == 1 or _is_widened(program, eqn.outvars[0], callers)
    )


def _bits(dtype: Any) -> int:
    """The bits of a float's mantissa; 0 for an integer."""
    return jnp.finfo(dtype).nmant if jnp.issubdtype(dtype, jnp.inexact) else 0


def _is_widened(program: Jaxpr, value: Any, callers: Callers = ()) -> bool:
    """Whether a program or one of its callers casts a value, or moves of it, to more bits."""
    if callers and value in program.outvars:
        (caller, call), *rest = callers
        if _is_widened(caller, call.outvars[program.outvars.index(value)], tuple(rest)):
            return True
    for eqn, n in _users(program).get(value, ()):
        outputs, name = eqn.outvars, eqn.primitive.name
        if name == "convert_element_type" and _bits(outputs[0].aval.dtype) > _bits(value.aval.dtype):
            return True
        if name in _KEEPS_VALUES and any(_is_widened(program, out, callers) for out in outputs):
            return True
        for inner in jax.tree.leaves(
            tuple(eqn.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr)
        ):
            inner = getattr(inner, "jaxpr", inner)
            # The inputs of a branch are the last ones, behind its index.
            m = n - len(eqn.invars) + len(inner.invars) if isinstance(inner, Jaxpr) else -1
            if m >= 0 and _is_widened(inner, inner.invars[m]):
                return True
    return False


@functools.lru_cache(maxsize=16)  # each cast asks
def _users(program: Jaxpr) -> dict[Any, list[tuple[Any, int]]]:
    """The equations of a program that use each value, with its position among their inputs."""
    users: dict[Any, list[tuple[Any, int]]] = {}
    for eqn in program.eqns:
        for n, atom in enumerate(eqn.invars):
            if not isinstance(atom, Literal):
                users.setdefault(atom, []).append((eqn, n))
    return users


def warn_of_whole(path: str, shape: Sequence[int], users: str) -> None:
    """Warns the caller's caller that operations need an adapted weight as one array, and what that costs."""
    warnings.warn(
        f"{path} {tuple(shape)}: {users} needs the whole weight, so each call adds up W + s A B, and its gradient "
        "is as large as W",
        stacklevel=3,
    )


def _propagate(program: ClosedJaxpr | Jaxpr, inputs: Sequence[Tags], flow: Dataflow) -> list[Tags]:
    """Computes the tags of a program's outputs from those of its inputs; adds to `changed` and `sums`."""
    jaxpr: Any = getattr(program, "jaxpr", program)
    tags = dict(zip(jaxpr.invars, inputs, strict=True))

    def tags_of(atoms: Sequence[Any]) -> list[Tags]:
        return [NOTHING if isinstance(atom, Literal) else tags.get(atom, NOTHING) for atom in atoms]

    for eqn in jaxpr.eqns:
        if any(eqn_inputs := tags_of(eqn.invars)):
            tags |= zip(eqn.outvars, _propagate_eqn(eqn, eqn_inputs, flow), strict=True)
    return tags_of(jaxpr.outvars)


def _propagate_eqn(eqn: Any, inputs: list[Tags], flow: Dataflow) -> list[Tags]:
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return _scan(eqn, inputs, flow)
    if name == "while":
        return _while(params, inputs, flow)
    if name == "cond":
        # The index decides which values come out, so it counts as read.
        parts = [flow._replace(sums={}) for _ in params["branches"]]
        branches = [
            _propagate(*each)
            for each in zip(params["branches"], len(parts) * [inputs[1:]], parts, strict=True)
        ]
        for n in set().union(*(part.sums for part in parts)):  # a call runs one of them
            most = max((part.sums.get(n, {}) for part in parts), key=lambda users: sum(users.values()))
            flow.add_sums({n: most})
        return [_as_changed(inputs[0]).union(*tags) for tags in zip(*branches, strict=True)]
    # Each output is the input of the same number; as an operation on all, it would mix the weights.
    if name == "optimization_barrier":
        return inputs
    if _MARK in (called := str(params.get("name"))):
        flow.changed.update(n for tags in inputs for n, unchanged in tags if not unchanged)
        if _MARK_WHOLE in called:
            users = {called.removeprefix(_MARK_WHOLE): eqn.invars[0].aval.size}
            flow.add_sums({n: users for tags in inputs for n, _ in tags})
    inner = [value for value in params.values() if isinstance(value, ClosedJaxpr | Jaxpr)]
    if name.startswith("custom_") and len(inner) == 1:
        marked = Dataflow(set(), set(), {}, {}, set())
        _propagate(inner[0], list(map(_as_changed, inputs)), marked)
        flow.custom.update(marked.changed)
    if len(inner) == 1:
        jaxpr: Any = getattr(inner[0], "jaxpr", inner[0])
        # A call, whatever its name: jax has many, and users may add their own.
        if (len(jaxpr.invars), len(jaxpr.outvars)) == (len(eqn.invars), len(eqn.outvars)):
            body = flow._replace(sums={})
            outputs = _propagate(inner[0], inputs, body)
            pairs = zip(eqn.invars, jaxpr.invars, inputs, strict=True)
            # A device of a mesh sees a shard of an input.
            flow.add_sums(body.sums, max(o.aval.size / max(i.aval.size, 1) for o, i, tags in pairs if tags))
            return outputs
    tags = NOTHING.union(*inputs)
    return [tags if name in _KEEPS_VALUES else _as_changed(tags)] * len(eqn.outvars)


def _scan(eqn: Any, inputs: list[Tags], flow: Dataflow) -> list[Tags]:
    consts, carried = scan_counts(eqn)

    def step(carry: list[Tags], flow: Dataflow) -> list[Tags]:
        return _propagate(eqn.params["jaxpr"], inputs[:consts] + carry + inputs[consts + carried :], flow)

    return _repeat(step, inputs[consts : consts + carried], flow, eqn.params["length"])


def _while(params: Any, inputs: list[Tags], flow: Dataflow) -> list[Tags]:
    cond_consts, body_consts = params["cond_nconsts"], params["body_nconsts"]

    def step(carry: list[Tags], flow: Dataflow) -> list[Tags]:
        (condition,) = _propagate(params["cond_jaxpr"], inputs[:cond_consts] + carry, flow)
        body_inputs = inputs[cond_consts : cond_consts + body_consts] + carry
        outputs = _propagate(params["body_jaxpr"], body_inputs, flow)
        return [tags | _as_changed(condition) for tags in outputs]

    return _repeat(step, inputs[cond_consts + body_consts :], flow, math.inf)


def _repeat(
    step: Callable[[list[Tags], Dataflow], list[Tags]], carry: list[Tags], flow: Dataflow, times: float
) -> list[Tags]:
    """The tags of a loop's carried values after any number of steps, and of what the last step adds to them."""
    while True:
        body = flow._replace(sums={})
        outputs = step(carry, body)
        new = [a | b for a, b in zip(carry, outputs, strict=False)]
        if new == carry:
            flow.add_sums(body.sums, times)
            return carry + outputs[len(carry) :]
        carry = new


def _as_changed(tags: Tags) -> Tags:
    return frozenset((n, False) for n, _ in tags)
