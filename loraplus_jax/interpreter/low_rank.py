"""Evaluates a program with some inputs kept as W + s A B, without adding the parts up where it can.

A contraction of all input axes (or all output axes) of such a weight, a lookup of its rows and a convolution with
it cost the base operation and two thin ones, in loops too. Every other operation gets the sum: correct for any
program, but as dear as the whole weight.

W may be packed. Each of these operations then makes its values, and its backward pass makes them again. XLA on CPU
merges the two outside loops, and keeps the values of unrolled layers; inside loops it cannot.
"""

import dataclasses
import functools
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal

from ..adapter.dora import output_scale
from ..adapter.lora import is_explicit, low_rank_output
from ..adapter.taps import inject_gradient, update_squares
from ..quantization.packed_array import PackedArray
from .dataflow import mark_weight
from .equations import run_equation, scan_counts

Term = Callable[[Any, jax.Array, jax.Array, Any], jax.Array]
"""`term(x, a, b, scale)`: s (x A) B for the input of an operation or a layer, and factors without stacked axes."""
_TRANSPARENT = ("copy", "copy_p", "sharding_constraint", "reshard", "optimization_barrier")
"""Operations that the factors pass unchanged."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["w", "a", "b", "scale", "c", "key", "tap", "before"],
    meta_fields=["letters", "factor_letters", "dropout", "omit", "stops"],
)
@dataclasses.dataclass(frozen=True)
class LowRankWeight:
    """A weight W + s A B, or a packed W alone.

    Attributes:
      w: W, in any order of axes; an array or a `PackedArray`.
      a, b: the factors; they may have another dtype than W. Both None for a packed W alone.
      letters: the einsum letters of W's axes.
      factor_letters: those of A and B, with `r` for the rank.
      scale: s.
      c: DoRA's factor for each output, with B's axes without the rank's; the weight is then c (W + s A B).
      dropout: rate of dropout on the input of a contraction; 0 for none.
      key: its key.
      tap, before: for `make_theory`, the leaf whose gradient is the measurement, and A and B of the previous step.
      omit: whether to leave W out and mark it for `trace_dataflow` instead.
      stops: whether the program's `stop_gradient` of the weight stops the gradients of A and B too; otherwise it
        freezes W alone, as a layer does that is made to be adapted.
    """

    w: Any
    a: Any = None
    b: Any = None
    letters: str = ""
    factor_letters: tuple[str, str] = ("", "")
    scale: Any = 1.0
    c: Any = None
    dropout: float = 0.0
    key: Any = None
    tap: Any = None
    before: Any = None
    omit: bool = False
    stops: bool = False

    @property
    def outputs(self) -> str:
        """The letters of the batch and output axes, in B's order."""
        return self.factor_letters[1].replace("r", "")

    def with_magnitude(self, magnitude: Any = None) -> "LowRankWeight":
        """The weight with DoRA's magnitudes, or itself if they are None."""
        if magnitude is None or self.omit:  # which omits W, and with it its norms
            return self
        arguments = (self.w, self.a, self.b, magnitude, self.scale, self.letters, self.factor_letters)
        return dataclasses.replace(self, c=output_scale(*arguments))

    def sum(self) -> jax.Array:
        """W + s A B, times c if there is one, in W's dtype, computed in float32 or wider.

        Raises:
          ValueError: dropout is on; it applies to the input of the low-rank term.
        """
        if self.key is not None:
            raise ValueError(
                "dropout of an adapter is not supported where an operation needs the whole weight, here of shape "
                f"{self.w.shape}: set dropout=0, or leave the layer out of target_modules"
            )
        base = self.base(whole=True)
        if self.a is None:
            return base
        # On TPU a product of float32 arrays rounds them to bfloat16 unless the precision is HIGHEST, and a sum in
        # bfloat16 would lose a small s A B beside W.
        a, b = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (self.a, self.b))
        left, right = self.factor_letters
        delta = jnp.einsum(
            f"{left},{right}->{self.letters}",
            *(a, b),
            precision=jax.lax.Precision.HIGHEST,
            out_sharding=jax.typeof(base).sharding if is_explicit(base, a, b) else None,
        ) * jnp.asarray(self.scale, a.dtype)
        total = base + delta
        return self.scale_outputs(total, self.letters).astype(base.dtype)

    def base(self, *, whole: bool = False) -> jax.Array:
        """W, or with `omit` zeros in its place; `whole` tells `trace_dataflow` that the sum is needed."""
        w = self.w.dequantize() if isinstance(self.w, PackedArray) else self.w
        if not self.omit:
            return w
        return jnp.zeros_like(w) + mark_weight(w, whole=whole).astype(w.dtype)

    def scale_outputs(
        self, y: jax.Array, letters: str | None = None, bias: jax.Array | None = None
    ) -> jax.Array:
        """c y + (1 - c) bias in y's dtype, or y if there is no c: scales all of y but the bias in it.

        Args:
          y: an array.
          letters: those of its axes, any others for axes that c lacks; None if c's are the last ones.
          bias: as many values as c has, in the order of `letters`.
        """
        if self.c is None:
            return y
        names: str = letters or "-" * (y.ndim - self.c.ndim) + self.outputs
        sizes = dict(zip(self.outputs, self.c.shape, strict=True))
        c = self.c.transpose([self.outputs.index(letter) for letter in names if letter in sizes])
        c = c.reshape([sizes.get(letter, 1) for letter in names])
        if is_explicit(c, y):  # a product takes arrays of one sharding only
            axes = zip(c.shape, (*jax.typeof(y).sharding.spec, *(None,) * y.ndim), strict=False)
            c = jax.sharding.reshard(c, jax.P(*(axis if size > 1 else None for size, axis in axes)))
        fixed = 0 if bias is None else (1 - c) * bias.reshape(c.shape)
        return (c * y + fixed).astype(y.dtype)

    def low_rank_term(self, term: Term, x: jax.Array) -> jax.Array:
        """The term with dropout, unless x are indices; with a tap, the tap's gradient becomes `update_squares`."""
        if self.key is not None and jnp.issubdtype(x.dtype, jnp.floating):
            keep = 1.0 - self.dropout
            x = jnp.where(jax.random.bernoulli(self.key, keep, x.shape), x / keep, jnp.zeros_like(x))
        y = term(x, self.a, self.b, self.scale)
        if self.tap is None or self.before is None:
            return y
        left, right = self.factor_letters
        batch_axes = len(set(left) & set(right)) - 1
        # The measurement is no part of the loss: no gradient may reach x through it.
        inputs = jax.lax.stop_gradient(x)
        squares = update_squares(term, inputs, self.before, (self.a, self.b), self.scale, batch_axes)
        return inject_gradient(y, self.tap, squares.reshape(self.tap.shape))


def evaluate(program: ClosedJaxpr, inputs: Sequence[Any]) -> list[jax.Array]:
    """Runs a program on inputs of which some are `LowRankWeight`; returns its outputs as arrays."""
    return [_array(value) for value in _evaluate(program, inputs)]


def _array(value: Any) -> Any:
    return value.sum() if isinstance(value, LowRankWeight) else value


def _evaluate(program: Any, inputs: Sequence[Any]) -> list[Any]:
    jaxpr, consts = getattr(program, "jaxpr", program), getattr(program, "consts", ())
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs), strict=True))
    read = lambda atom: atom.val if isinstance(atom, Literal) else values[atom]  # noqa: E731
    for eqn in jaxpr.eqns:
        values |= zip(
            eqn.outvars, _evaluate_eqn(eqn, [read(atom) for atom in eqn.invars], jaxpr), strict=True
        )
    return [read(atom) for atom in jaxpr.outvars]


def _evaluate_eqn(eqn: Any, inputs: list[Any], jaxpr: Any) -> Sequence[Any]:
    name, weights = eqn.primitive.name, [x for x in inputs if isinstance(x, LowRankWeight)]
    if not weights:
        return run_equation(eqn, inputs, jaxpr)
    if name in ("jit", "pjit", "closed_call", "core_call"):
        return _evaluate(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")), inputs)
    if name == "scan":
        return _scan(eqn, inputs)
    if name in ("checkpoint", "remat", "remat2"):
        # Evaluated equation by equation the body is no checkpoint any more, so it gets another.
        inner = functools.partial(_evaluate, eqn.params["jaxpr"])
        options = {name: eqn.params[name] for name in ("policy", "prevent_cse")}
        return jax.checkpoint(lambda *values: inner(values), **options)(*inputs)
    if len(weights) == 1:
        (weight,) = weights
        of = lambda w: run_equation(eqn, [w if x is weight else x for x in inputs], jaxpr)[0]  # noqa: E731
        if _is_passed(eqn, weight):
            w = weight.w
            if not isinstance(w, PackedArray):
                w = of(w)
            elif name == "convert_element_type":
                w = w.astype(eqn.params["new_dtype"])
            return [dataclasses.replace(weight, w=w)]
        if name == "transpose" and not (isinstance(weight.w, PackedArray) and weight.w.stack):
            order = eqn.params["permutation"]
            w = weight.w.transpose(order) if isinstance(weight.w, PackedArray) else of(weight.w)
            return [dataclasses.replace(weight, w=w, letters="".join(weight.letters[n] for n in order))]
        if weight.a is None:
            return _base_product(eqn, inputs, weight, jaxpr)
        use = _RULES[name](eqn, inputs, weight) if name in _RULES else None
        if use is not None:
            return [_use(use, eqn, inputs, weight, jaxpr)]
    if name == "gather":  # a lookup has no dropout
        inputs = [dataclasses.replace(x, key=None) if isinstance(x, LowRankWeight) else x for x in inputs]
    return run_equation(eqn, [_array(value) for value in inputs], jaxpr)


class _Use(NamedTuple):
    """How an operation uses a weight.

    Attributes:
      term: the low-rank term for the other input.
      position: the other input's.
      letters: the letters of the axes of the other input if the operation contracts the weight's outputs, and of
        the result otherwise.
      contracts_outputs: whether it does.
    """

    term: Term
    position: int
    letters: str
    contracts_outputs: bool = False


def _use(use: _Use, eqn: Any, inputs: list[Any], weight: LowRankWeight, jaxpr: Any) -> jax.Array:
    """The operation with W plus its low-rank term, times c, or of c x where it contracts the weight's outputs."""
    x = inputs[use.position]
    if use.contracts_outputs:
        x = weight.scale_outputs(x, use.letters)
        inputs = [x if n == use.position else value for n, value in enumerate(inputs)]
    (y,) = _base_product(eqn, inputs, weight, jaxpr)
    y += weight.low_rank_term(use.term, x).astype(y.dtype)
    return y if use.contracts_outputs else weight.scale_outputs(y, use.letters)


def _is_passed(eqn: Any, weight: LowRankWeight) -> bool:
    name, (output, *rest) = eqn.primitive.name, (x.aval for x in eqn.outvars)
    if name == "convert_element_type":
        return jnp.issubdtype(output.dtype, jnp.inexact)  # an integer is not a sum of its parts
    return not rest and (name in _TRANSPARENT or (name == "stop_gradient" and not weight.stops))


def _base_product(eqn: Any, inputs: list[Any], weight: LowRankWeight, jaxpr: Any) -> Sequence[Any]:
    # Under jax.checkpoint the backward pass unpacks a packed W again, instead of keeping its values till then.
    others = [None if x is weight else x for x in inputs]

    def run(w: Any, others: list[Any]) -> Sequence[Any]:
        values = dataclasses.replace(weight, w=w).base()
        return run_equation(eqn, [values if x is None else x for x in others], jaxpr)

    return (jax.checkpoint(run) if isinstance(weight.w, PackedArray) else run)(weight.w, others)


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
        step, [_array(value) for value in carry], [arrays for _, arrays in slices], **options
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
        return lambda x: x, (value.sum(),)
    arrays = (*factors, *(() if value.c is None else (value.c,)))
    parts = [jnp.moveaxis(x, side.index(axis), 0) for x, side in zip(arrays, (*sides, *c_sides), strict=True)]
    left, right = (side.replace(axis, "") for side in sides)
    rest = dataclasses.replace(value, letters=value.letters[1:], factor_letters=(left, right))
    return lambda w, a, b, c=None: dataclasses.replace(rest, w=w, a=a, b=b, c=c), (value.w, *parts)


def _contraction(eqn: Any, inputs: list[Any], weight: LowRankWeight) -> _Use | None:
    """The use by a `dot_general` over all input axes or over all output axes, batch axes being those of both."""
    position = 0 if inputs[0] is weight else 1
    x, dimensions = inputs[1 - position], eqn.params["dimension_numbers"]
    (contracted, x_contracted), (batch, x_batch) = (
        pair if position == 0 else pair[::-1] for pair in dimensions
    )
    left, right = map(set, weight.factor_letters)
    common = left & right - {"r"}
    used = {weight.letters[n] for n in contracted} - common
    if not {weight.letters[n] for n in batch} <= common or used not in (left - right, right - left):
        return None
    letters = list(string.ascii_uppercase[: x.ndim])  # the weight's are lower case
    for n, m in (*zip(x_contracted, contracted, strict=True), *zip(x_batch, batch, strict=True)):
        letters[n] = weight.letters[m]
    shared = [weight.letters[n] for n in batch]
    free = [c for c in letters if c.isupper()]
    outputs = [c for n, c in enumerate(weight.letters) if n not in (*contracted, *batch)]
    result = "".join((*shared, *outputs, *free) if position == 0 else (*shared, *free, *outputs))
    middle = "".join((*shared, *sorted(common.difference(shared)), *free, "r"))
    order = weight.factor_letters if used == left - right else weight.factor_letters[::-1]
    equations = f"{''.join(letters)},{order[0]}->{middle}", f"{middle},{order[1]}->{result}"
    if (
        position == 1
        and not shared
        and x_contracted == (x.ndim - 1,)
        and order[0][0] in used
        and len(weight.letters) == 2
    ):
        equations = None  # a plain product, which is quicker to trace
    precision, shardings = eqn.params["precision"], (None, None)
    # A product over an explicitly sharded axis must say how its result is sharded; JAX does not choose.
    if is_explicit(x, weight.w, weight.a, weight.b):
        of_x = jax.typeof(x).sharding
        axes = dict(zip(letters, of_x.spec, strict=True))
        shardings = of_x.update(spec=jax.P(*(axes.get(c) for c in middle))), eqn.outvars[0].aval.sharding

    # Integer inputs would round the factors to zero.
    dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else eqn.outvars[0].aval.dtype

    def term(x: Any, a: jax.Array, b: jax.Array, scale: Any) -> jax.Array:
        first, second = (a, b) if used == left - right else (b, a)
        if equations is None and used != left - right:
            first, second = first.T, second.T
        x, first, second = (value.astype(dtype) for value in (x, first, second))
        return low_rank_output(x, first, second, scale, equations, precision, shardings)

    contracts_outputs = used != left - right
    # c has an axis that x or the result lacks.
    is_summed = any(weight.letters[n] in common for n in contracted)
    if weight.c is not None and (not common <= set(shared) if contracts_outputs else is_summed):
        return None
    axes_scaled = "".join(letters) if contracts_outputs else result
    return _Use(term, 1 - position, axes_scaled, contracts_outputs)


def _lookup(eqn: Any, inputs: list[Any], weight: LowRankWeight) -> _Use | None:
    """The use by a `gather` of whole rows of a matrix whose rows are its input axis."""
    numbers, rank = eqn.params["dimension_numbers"], weight.a.shape[-1]
    if (
        inputs[0] is not weight
        or is_explicit(weight.w, weight.a, weight.b)
        or weight.factor_letters != (f"{weight.letters[0]}r", f"r{weight.letters[1:]}")
        or len(weight.letters) != 2
        or (numbers.collapsed_slice_dims, numbers.start_index_map) != ((0,), (0,))
        or eqn.params["slice_sizes"] != (1, weight.w.shape[1])
        or numbers.offset_dims != (eqn.outvars[0].aval.ndim - 1,)
    ):
        return None
    options = {
        name: eqn.params[name] for name in ("mode", "fill_value", "unique_indices", "indices_are_sorted")
    }

    def term(rows: Any, a: jax.Array, b: jax.Array, scale: Any) -> jax.Array:
        h = jax.lax.gather(a, rows, numbers, slice_sizes=(1, rank), **options)
        return jnp.matmul(h * jnp.asarray(scale, h.dtype), b)

    free = string.ascii_uppercase[: eqn.outvars[0].aval.ndim - 1]
    return _Use(term, 1, free + weight.letters[1])


def _convolution(eqn: Any, inputs: list[Any], weight: LowRankWeight) -> _Use | None:
    """The use by a convolution with a kernel `(window..., in / groups, out)`: to the rank, then to the outputs."""
    params, last = eqn.params, weight.w.ndim - 1
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    if (
        inputs[1] is not weight
        or is_explicit(inputs[0], weight.a, weight.b)
        or weight.letters != "".join(sorted(weight.letters))
        or weight.factor_letters[1] != f"r{weight.letters[-1]}"
        or (numbers.rhs_spec[0], numbers.out_spec[1]) != (last, last)
        or params["batch_group_count"] != 1
    ):
        return None
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers", "precision")
    options = {name: params[name] for name in names}

    def term(x: Any, a: jax.Array, b: jax.Array, scale: Any) -> jax.Array:
        # All groups share A; each has its own part of B's outputs.
        kernel = jnp.tile(a, groups).astype(x.dtype)
        h = jax.lax.conv_general_dilated(x, kernel, feature_group_count=groups, **options)
        h = h.reshape(*h.shape[:-1], groups, -1) * jnp.asarray(scale, h.dtype)
        b = b.astype(h.dtype).reshape(b.shape[0], groups, -1)
        y = jnp.einsum("...gr,rgo->...go", h, b, precision=params["precision"])
        return y.reshape(*y.shape[:-2], -1)

    free = string.ascii_uppercase[:last]
    return _Use(term, 0, free + weight.letters[-1])


_RULES = {"dot_general": _contraction, "gather": _lookup, "conv_general_dilated": _convolution}
