"""Products with a weight kept as W + s A B: those whose low-rank term is two thin operations."""

import dataclasses
import functools
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ..adapter.lora import is_explicit, low_rank_output
from .moves import gather, sides_of, weight_of
from .weight import LowRankWeight, Term


class Use(NamedTuple):
    """How an operation uses a weight.

    Attributes:
      term: the low-rank term for the other input.
      position: the other input's.
      letters: the letters of the axes of the other input if the operation contracts the weight's outputs, and of
        the result otherwise.
      contracts_outputs: whether it does.
      scaled: multiplies by DoRA's factor c what `letters` are the axes of, where c has other ones.
    """

    term: Term
    position: int
    letters: str
    contracts_outputs: bool = False
    scaled: Callable[[jax.Array], jax.Array] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class _Own:
    """A product of a user's: `fn`, its low-rank term, the position of its weight and the roles of its axes."""

    fn: Callable[..., jax.Array]
    term: Callable[..., jax.Array]
    weight: int
    axes: str


def product(
    fn: Callable[..., jax.Array], term: Callable[..., jax.Array], *, weight: int = 1, axes: str = "io"
) -> Callable[..., jax.Array]:
    """Makes a product of one's own, such as a kernel with a `custom_vjp`, cheap where its weight has an adapter.

    Args:
      fn: `fn(x, w, ...)` of arrays, linear in `w`, with one array as its result.
      term: `term(x, a, b, ...)`: the same product with A B in place of `w`; A has the batch and input axes and the
        rank, B the batch axes, the rank and the output axes. `lambda x, a, b: fn(fn(x, a), b)` if `fn` takes any
        sizes.
      weight: the position of `w` among the arguments.
      axes: one letter per axis of `w`, as in `target_parameters`. A weight with other axes there is used as a
        whole, and so is one under a `vmap` or `grad` inside the model, which JAX takes apart.

    Returns:
      A function like `fn`.

    Example:
      >>> matmul = product(jnp.matmul, lambda x, a, b: (x @ a) @ b)
      >>> matmul(jnp.ones((2, 3)), jnp.ones((3, 4))).shape
      (2, 4)
    """
    own = _Own(fn, term, weight, axes)

    @functools.wraps(fn)
    def marked(*args: Any) -> jax.Array:
        return _PRODUCT.bind(*map(jnp.asarray, args), own=own)

    return marked


# An operation of our own, which the interpreter finds in a model's program; to everything else it is the function.
_PRODUCT: Any = Primitive("loraplus_product")
_PRODUCT.def_impl(lambda *args, own: own.fn(*args))
_PRODUCT.def_abstract_eval(lambda *avals, own: jax.make_jaxpr(own.fn)(*avals).out_avals[0])
batching.primitive_batchers[_PRODUCT] = lambda args, axes, own: (jax.vmap(own.fn, axes)(*args), 0)
ad.primitive_jvps[_PRODUCT] = lambda primals, tangents, own: jax.jvp(
    own.fn, primals, tuple(map(ad.instantiate_zeros, tangents))
)
mlir.register_lowering(_PRODUCT, mlir.lower_fun(lambda *args, own: own.fn(*args), multiple_results=False))


def _own_product(eqn: Any, inputs: list[Any], weight: LowRankWeight) -> Use | None:
    """The use by a function from `product`, of a weight with its axes; c would have to scale the result."""
    own, (left, right) = eqn.params["own"], weight.factor_letters
    roles = ["i" if c not in right else "o" if c not in left else "batch" for c in weight.letters]
    wanted = [c if c in "io" else "batch" for c in own.axes]
    if weight.c is not None or inputs[own.weight] is not weight or roles != wanted:
        return None
    x = 0 if own.weight else 1  # dropout is on the first other argument

    def term(value: Any, a: jax.Array, b: jax.Array, scale: Any) -> jax.Array:
        args = [value if n == x else each for n, each in enumerate(inputs)]
        y = own.term(*args[: own.weight], a, b, *args[own.weight + 1 :])
        return y * jnp.asarray(scale, y.dtype)

    return Use(term, x, "")


def _term_dtype(x: Any, eqn: Any) -> Any:
    """The dtype of the thin products: integers and 8 bits would round the factors away."""
    is_wide = jnp.issubdtype(x.dtype, jnp.inexact) and x.dtype.itemsize > 1
    return x.dtype if is_wide else eqn.outvars[0].aval.dtype


def _contraction(eqn: Any, inputs: list[Any], weight: LowRankWeight) -> Use | None:
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
        and {*order[0]} - {"r"} == used
        and len(weight.letters) == 2
    ):
        equations = None  # a plain product, which is quicker to trace
    precision, shardings = eqn.params["precision"], (None, None)
    # A product over an explicitly sharded axis must say how its result is sharded; JAX does not choose.
    if is_explicit(x, weight.w, weight.a, weight.b):
        of_x = jax.typeof(x).sharding
        axes = dict(zip(letters, of_x.spec, strict=True))
        shardings = of_x.update(spec=jax.P(*(axes.get(c) for c in middle))), eqn.outvars[0].aval.sharding

    dtype = _term_dtype(x, eqn)

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
    return Use(term, 1 - position, axes_scaled, contracts_outputs)


def _ragged(eqn: Any, inputs: list[Any], weight: LowRankWeight) -> Use | None:
    """The use by a `ragged_dot_general` whose rows are grouped by expert: two ragged products."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (x_contracted, contracted), batch = numbers.dot_dimension_numbers
    groups, (ragged,) = numbers.rhs_group_dimensions, numbers.lhs_ragged_dimensions
    left, right = map(set, weight.factor_letters)
    inner = [weight.letters[n] for n in contracted]
    contracts_outputs = set(inner) == right - left
    if (
        inputs[1] is not weight
        or len(groups) != 1
        or ragged in x_contracted
        or {weight.letters[n] for n in groups} != left & right - {"r"}
        or set(inner) not in (left - right, right - left)
        or any(batch)
        or len(inputs) > 3  # a group offset
        or is_explicit(inputs[0], weight.w, weight.a, weight.b)
    ):
        return None
    (x, _, sizes), (group,) = inputs, (weight.letters[n] for n in groups)
    outer = [c for c in weight.letters if c not in (group, *inner)]
    rows = [n for n in range(x.ndim) if n not in x_contracted].index(ragged)  # of the results
    options: Any = {name: eqn.params[name] for name in ("precision", "preferred_element_type")}

    def run(x: jax.Array, factor: jax.Array, axes: Sequence[int], ragged: int) -> jax.Array:
        dims = (axes, range(1, 1 + len(axes))), ((), ())
        own = jax.lax.RaggedDotDimensionNumbers(dims, (ragged,), (0,))
        return jax.lax.ragged_dot_general(x, factor.astype(x.dtype), sizes, own, **options)

    dtype = _term_dtype(x, eqn)

    def term(x: Any, a: jax.Array, b: jax.Array, scale: Any) -> jax.Array:
        of_a, of_b = weight.factor_letters
        pairs = [(a, of_a), (b, of_b)]
        (first, of_first), (second, of_second) = pairs[::-1] if contracts_outputs else pairs
        first = first.transpose([of_first.index(c) for c in (group, *inner, "r")])
        second = second.transpose([of_second.index(c) for c in (group, "r", *outer)])
        h = run(x.astype(dtype), first, x_contracted, ragged).astype(dtype)
        return run(h * jnp.asarray(scale, dtype), second, (h.ndim - 1,), rows)

    def scaled(y: jax.Array) -> jax.Array:
        """Times c of each row's expert, along the outputs of W in the result, or in x."""
        axes = x_contracted if contracts_outputs else range(y.ndim - len(outer), y.ndim)
        places = [ragged if contracts_outputs else rows, *axes]
        names = (group, *(inner if contracts_outputs else outer))
        c = weight.c.transpose([weight.outputs.index(name) for name in names])
        c = jnp.repeat(c, sizes, axis=0, total_repeat_length=y.shape[places[0]])
        c = c.transpose(sorted(range(c.ndim), key=places.__getitem__))
        return (c.reshape([y.shape[n] if n in places else 1 for n in range(y.ndim)]) * y).astype(y.dtype)

    return Use(term, 0, "", contracts_outputs, None if weight.c is None else scaled)


def _lookup(eqn: Any, inputs: list[Any], weight: LowRankWeight) -> Use | None:
    """The use by a `gather` of single rows, along all input axes: the product with a one-hot x."""
    sizes, (left, right) = eqn.params["slice_sizes"], weight.factor_letters
    if (
        inputs[0] is not weight
        or is_explicit(weight.w, weight.a, weight.b)
        or any(sizes[n] > 1 for n, c in enumerate(weight.letters) if c in left and c not in right)
        or (moved := gather(eqn, weight, inputs[1:], sides_of(weight))) is None
    ):
        return None
    [(_, [*_, (_, c)])] = moved

    def term(rows: Any, a: jax.Array, b: jax.Array, scale: Any) -> jax.Array:
        sides = sides_of(dataclasses.replace(weight, a=a, b=b, c=None))
        [(letters, moved)] = gather(eqn, weight, [rows], sides) or []
        own = weight_of(weight, None, letters, moved)
        equation = f"{','.join(own.factor_letters)}->{letters}"
        return jnp.einsum(equation, own.a * jnp.asarray(scale, own.a.dtype), own.b)

    return Use(term, 1, "", scaled=None if weight.c is None else lambda y: (c[..., 0] * y).astype(y.dtype))


def _convolution(eqn: Any, inputs: list[Any], weight: LowRankWeight) -> Use | None:
    """The use by a convolution whose kernel has one output axis: to the rank, then to the outputs."""
    params = eqn.params
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    to, features = numbers.rhs_spec[0], numbers.out_spec[1]
    if (
        inputs[1] is not weight
        or is_explicit(inputs[0], weight.a, weight.b)
        or weight.factor_letters[1] != f"r{weight.letters[to]}"
        or params["batch_group_count"] != 1
    ):
        return None
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers", "precision")
    options = {name: params[name] for name in names}
    order = [weight.factor_letters[0].index("r" if n == to else c) for n, c in enumerate(weight.letters)]
    dtype = _term_dtype(inputs[0], eqn)

    def term(x: Any, a: jax.Array, b: jax.Array, scale: Any) -> jax.Array:
        # All groups share A; each has its own part of B's outputs.
        kernel = jnp.concatenate([a.transpose(order)] * groups, to).astype(dtype)
        h = jax.lax.conv_general_dilated(x.astype(dtype), kernel, feature_group_count=groups, **options)
        h = jnp.moveaxis(h, features, -1)
        h = h.reshape(*h.shape[:-1], groups, -1) * jnp.asarray(scale, h.dtype)
        b = b.astype(h.dtype).reshape(b.shape[0], groups, -1)
        y = jnp.einsum("...gr,rgo->...go", h, b, precision=params["precision"])
        return jnp.moveaxis(y.reshape(*y.shape[:-2], -1), -1, features)

    free = string.ascii_uppercase[: weight.w.ndim - 1]
    return Use(term, 0, free[:features] + weight.letters[to] + free[features:])


RULES = {
    "loraplus_product": _own_product,
    "dot_general": _contraction,
    "ragged_dot_general": _ragged,
    "gather": _lookup,
    "conv_general_dilated": _convolution,
}
