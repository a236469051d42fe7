"""Evaluates a program with some inputs kept as W + s A B, without adding the parts up where it can.

Products (`products`) of such a weight cost the base operation and two thin ones, moves of its axes (`moves`) move A
and B too, in loops, branches and on the shards of a mesh. Every other operation gets the sum: correct for any
program, but as expensive as the whole weight.

W may be packed. Each of these operations then makes its values, and its backward pass makes them again. XLA on CPU
merges the two outside loops, and keeps the values of unrolled layers; inside loops it cannot.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal

from ..quantization.packed_array import PackedArray, dense_shapes
from .dataflow import Callers, rounds
from .equations import run_equation, scan_counts
from .moves import base_values, move
from .products import RULES, Use
from .weight import LowRankWeight

_TRANSPARENT = ("copy", "copy_p", "sharding_constraint", "reshard", "optimization_barrier", "pvary", "pcast")
"""Operations that the factors pass unchanged."""


def call(fn: Callable[..., Any], *args: Any) -> Any:
    """Calls `fn` with arguments that contain `LowRankWeight`, in whose place it sees plain arrays.

    Args:
      fn: any function; it may change those arrays and pass them on as it likes.
      args: trees; their other leaves keep whatever trace they belong to.

    Returns:
      What `fn` returns.
    """
    leaves, structure = jax.tree.flatten(args, is_leaf=is_low_rank)
    weights = [leaf for leaf in leaves if is_low_rank(leaf)]
    if not weights:
        return fn(*args)
    results: list[Any] = []

    def program(*values: jax.Array) -> list[jax.Array]:
        given = iter(values)
        filled = [next(given) if is_low_rank(leaf) else leaf for leaf in leaves]
        results[:] = jax.tree.flatten(fn(*structure.unflatten(filled)))
        # make_jaxpr takes arrays only; a model may also return text, None or numbers.
        return [leaf for leaf in results[0] if isinstance(leaf, jax.Array)]

    shapes = dense_shapes([weight.w for weight in weights])
    arrays = iter(evaluate(jax.make_jaxpr(program)(*shapes), weights))
    return results[1].unflatten(next(arrays) if isinstance(leaf, jax.Array) else leaf for leaf in results[0])


def is_low_rank(value: Any) -> bool:
    """Whether a value is a `LowRankWeight`; an `is_leaf` for `jax.tree.map`."""
    return isinstance(value, LowRankWeight)


def evaluate(program: ClosedJaxpr, inputs: Sequence[Any]) -> list[jax.Array]:
    """Runs a program on inputs of which some are `LowRankWeight`; returns its outputs as arrays."""
    return [_array(value) for value in _evaluate(program, inputs)]


def _array(value: Any, user: str = "output") -> Any:
    return value.sum(user) if isinstance(value, LowRankWeight) else value


def _evaluate(program: Any, inputs: Sequence[Any], callers: Callers = ()) -> list[Any]:
    """The outputs of a program that these callers run as a call."""
    jaxpr, consts = getattr(program, "jaxpr", program), getattr(program, "consts", ())
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs), strict=True))
    read = lambda atom: atom.val if isinstance(atom, Literal) else values[atom]  # noqa: E731
    for eqn in jaxpr.eqns:
        values |= zip(
            eqn.outvars, _evaluate_eqn(eqn, [read(atom) for atom in eqn.invars], jaxpr, callers), strict=True
        )
    return [read(atom) for atom in jaxpr.outvars]


def _evaluate_eqn(eqn: Any, inputs: list[Any], jaxpr: Any, callers: Callers) -> Sequence[Any]:
    name, weights = eqn.primitive.name, [x for x in inputs if isinstance(x, LowRankWeight)]
    run = lambda values: run_equation(eqn, values, jaxpr)  # noqa: E731
    if not weights:
        return run(inputs)
    if name in ("jit", "pjit", "closed_call", "core_call"):
        return _evaluate(
            eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")), inputs, ((jaxpr, eqn), *callers)
        )
    if name in ("checkpoint", "remat", "remat2"):
        return _checkpoint(eqn, inputs, ((jaxpr, eqn), *callers))
    if name in _CONTROL and (results := _CONTROL[name](eqn, inputs)) is not None:
        return results
    if len(weights) == 1:
        (weight,) = weights
        w = weight.w
        if _is_passed(eqn, weight) and not rounds(eqn, jaxpr, callers):
            if not isinstance(w, PackedArray):
                (w,) = base_values(eqn, [w if x is weight else x for x in inputs], run)
            elif name == "convert_element_type":
                w = w.astype(eqn.params["new_dtype"])
            return [dataclasses.replace(weight, w=w)]
        if name == "stop_gradient" and weight.stops and weight.a is not None:
            (w,) = base_values(eqn, [w], run)
            factors = {each: getattr(weight, each) for each in ("a", "b", "c", "scale")}
            return [dataclasses.replace(weight, w=w, **jax.lax.stop_gradient(factors))]
        if name == "transpose":
            order = eqn.params["permutation"]
            is_packed = isinstance(w, PackedArray) and not w.stack
            w = w.transpose(order) if is_packed else base_values(eqn, [w], run)[0]
            return [dataclasses.replace(weight, w=w, letters="".join(weight.letters[n] for n in order))]
        if weight.a is None:
            return _base_product(inputs, weight, run)
        # A result of integers would round the low-rank term away.
        is_thin = name in RULES and jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact)
        use = RULES[name](eqn, inputs, weight) if is_thin else None
        if use is not None:
            return [_use(use, inputs, weight, run)]
    if (moved := move(eqn, inputs, run)) is not None:
        return moved
    if name == "gather":  # a lookup has no dropout
        inputs = [dataclasses.replace(x, key=None) if isinstance(x, LowRankWeight) else x for x in inputs]
    return run([_array(value, name) for value in inputs])


def _use(use: Use, inputs: list[Any], weight: LowRankWeight, run: Callable[..., Any]) -> jax.Array:
    """The operation with W plus its low-rank term, times c, or of c x where it contracts the weight's outputs."""
    scaled = use.scaled or (lambda y: weight.scale_outputs(y, use.letters))
    x = inputs[use.position]
    if use.contracts_outputs:
        x = scaled(x)
        inputs = [x if n == use.position else value for n, value in enumerate(inputs)]
    (y,) = _base_product(inputs, weight, run)
    y += weight.low_rank_term(use.term, x).astype(y.dtype)
    return y if use.contracts_outputs else scaled(y)


def _is_passed(eqn: Any, weight: LowRankWeight) -> bool:
    name, outputs = eqn.primitive.name, eqn.outvars
    if name == "convert_element_type":
        return jnp.issubdtype(outputs[0].aval.dtype, jnp.inexact)  # an integer is not a sum of its parts
    return len(outputs) == 1 and (name in _TRANSPARENT or (name == "stop_gradient" and not weight.stops))


def _base_product(inputs: list[Any], weight: LowRankWeight, run: Callable[..., Any]) -> Sequence[Any]:
    # Under jax.checkpoint the backward pass unpacks a packed W again, instead of keeping its values till then.
    others = [None if x is weight else x for x in inputs]

    def product(others: list[Any]) -> Sequence[Any]:
        values = weight.base()
        return run([values if x is None else x for x in others])

    return (jax.checkpoint(product) if hasattr(weight.w, "dequantize") else product)(others)


def _checkpoint(eqn: Any, inputs: list[Any], callers: Callers) -> Sequence[Any]:
    # Evaluated equation by equation the body is no checkpoint any more, so it gets another.
    options = {name: eqn.params[name] for name in ("policy", "prevent_cse")}
    return jax.checkpoint(lambda: _evaluate(eqn.params["jaxpr"], inputs, callers), **options)()


def _scan(eqn: Any, inputs: list[Any]) -> Sequence[Any]:
    # Weights that every step reads stay whole; of those that it slices, a step gets one index of a batch axis.
    consts, carried = scan_counts(eqn)
    before, carry, after = inputs[:consts], inputs[consts : consts + carried], inputs[consts + carried :]
    slices = [_slices(value) for value in after]

    def step(carry: list[Any], arrays: list[Any]) -> tuple[list[Any], list[Any]]:
        values = [make(*slice) for (make, _), slice in zip(slices, arrays, strict=True)]
        results = evaluate(eqn.params["jaxpr"], [*before, *carry, *values])
        return results[:carried], results[carried:]

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    last, outputs = jax.lax.scan(
        step, [_array(value, "scan") for value in carry], [arrays for _, arrays in slices], **options
    )
    return [*last, *outputs]


def _slices(value: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What a loop takes slices of, along the first axis, and how it makes its value of one slice of each."""
    if not isinstance(value, LowRankWeight):
        return lambda x: x, (value,)
    axis, sides = value.letters[0], value.factor_letters
    factors: Any = value.a, value.b
    c_sides = () if value.c is None else (value.outputs,)
    if isinstance(value.w, PackedArray) and value.a is None and value.w.stack:
        rest = dataclasses.replace(value, letters=value.letters[1:])
        return lambda w: dataclasses.replace(rest, w=w), (value.w,)
    if value.key is not None or value.tap is not None or not all(axis in side for side in sides):
        return lambda x: x, (value.sum("scan"),)
    arrays = (*factors, *(() if value.c is None else (value.c,)))
    parts = [jnp.moveaxis(x, side.index(axis), 0) for x, side in zip(arrays, (*sides, *c_sides), strict=True)]
    left, right = (side.replace(axis, "") for side in sides)
    rest = dataclasses.replace(value, letters=value.letters[1:], factor_letters=(left, right))
    is_whole = isinstance(value.w, PackedArray) and value.w.stack
    w = value.w.dequantize() if hasattr(value.w, "dequantize") and not is_whole else value.w
    return lambda w, a, b, c=None: dataclasses.replace(rest, w=w, a=a, b=b, c=c), (w, *parts)


def _while(eqn: Any, inputs: list[Any]) -> Sequence[Any]:
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    of_cond, of_body, carry = inputs[:first], inputs[first : first + second], inputs[first + second :]
    return jax.lax.while_loop(
        lambda carry: evaluate(eqn.params["cond_jaxpr"], [*of_cond, *carry])[0],
        lambda carry: evaluate(eqn.params["body_jaxpr"], [*of_body, *carry]),
        [_array(value, "while") for value in carry],
    )


def _cond(eqn: Any, inputs: list[Any]) -> Sequence[Any] | None:
    if eqn.params.get("branches_platforms") is not None:  # chosen by the device, which only jax knows
        return None
    index, *values = inputs
    return jax.lax.switch(index, [lambda b=b: evaluate(b, values) for b in eqn.params["branches"]])


def _shard_map(eqn: Any, inputs: list[Any]) -> Sequence[Any] | None:
    """On each shard of W those of A and B; sums over a mesh axis that splits the inputs are the program's own."""
    params = eqn.params
    for x in inputs:
        if is_low_rank(x) and (x.key is not None or x.tap is not None or x.a is None):
            return None
    arrays, specs = [], []
    for x, spec in zip(inputs, params["in_specs"], strict=True):
        if not is_low_rank(x):
            arrays.append(x)
            specs.append(spec)
            continue
        axes = dict(zip(x.letters, spec, strict=False))
        w = x.w.dequantize() if hasattr(x.w, "dequantize") else x.w
        arrays.append((w, x.a, x.b, jnp.asarray(x.scale), x.c))
        sides = (*x.factor_letters, "", x.outputs)
        specs.append((spec, *(jax.P(*map(axes.get, side)) for side in sides)))

    def body(*shards: Any) -> Any:
        values = [
            dataclasses.replace(x, w=own[0], a=own[1], b=own[2], scale=own[3], c=own[4])
            if is_low_rank(x)
            else own
            for x, own in zip(inputs, shards, strict=True)
        ]
        return evaluate(params["jaxpr"], values)

    options = {"mesh": params["mesh"], "check_vma": params["check_vma"]}
    names = params.get("newly_manual_axes", params.get("manual_axes"))
    mapped = jax.shard_map(
        body, in_specs=tuple(specs), out_specs=list(params["out_specs"]), axis_names=set(names), **options
    )
    return mapped(*arrays)


_CONTROL = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
