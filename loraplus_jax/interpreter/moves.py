"""Operations that only move a weight's values: the same moves of A and B keep the parts of W + s A B apart.

An expert's matrix by its index, a slice, a split, a reshape of heads, experts stacked or gate and up in one array:
each acts on A and B as on W, along the axes that they share with it.
"""

import dataclasses
import math
import string
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..adapter.lora import is_explicit
from .weight import LowRankWeight

Run = Callable[[Sequence[Any]], Sequence[Any]]
Side = tuple[str, jax.Array]
"""The letters that a factor shares with W, in W's order, and the factor with an axis for each letter of W, of size
1 where it has none, and the rank's last."""
Moved = list[tuple[str, list[Side]]]
"""For each output the letters of its axes, and its sides."""


@dataclasses.dataclass(frozen=True, eq=False)
class Deferred:
    """The values of a packed weight after moves, made where an operation needs them."""

    dequantize: Callable[[], jax.Array]
    shape: tuple[int, ...]
    dtype: Any

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)


def move(eqn: Any, inputs: Sequence[Any], run: Run) -> list[Any] | None:
    """Moves the axes of weights.

    Args:
      eqn: the equation of a jaxpr.
      inputs: its inputs, of which at least one is a `LowRankWeight`.
      run: computes the equation with other values of its inputs.

    Returns:
      The outputs as weights, or None if the operation is none of these moves, or moves A and B in another way.
    """
    weights = [x for x in inputs if isinstance(x, LowRankWeight)]
    if any(w.a is None or w.tap is not None or is_explicit(w.w, w.a, w.b) for w in weights):
        return None
    name = eqn.primitive.name
    if name in ("concatenate", "stack"):
        return _join(eqn, inputs, run)
    rule = _MOVES.get(name)
    if rule is None or inputs[0] is not weights[0] or len(weights) > 1:
        return None
    moved = rule(eqn, weights[0], inputs[1:])
    if moved is None:
        return None
    values = _values(eqn, [weights[0].w, *inputs[1:]], run)
    return [_weight(weights[0], w, letters, sides) for w, (letters, sides) in zip(values, moved, strict=True)]


def _values(eqn: Any, inputs: Sequence[Any], run: Run) -> Sequence[Any]:
    """W after the move, deferred if it is packed."""
    if not any(hasattr(x, "dequantize") for x in inputs):
        return run(inputs)

    def value(n: int) -> jax.Array:
        return run([_dense(x) for x in inputs])[n]

    return [
        Deferred(lambda n=n: value(n), tuple(x.aval.shape), x.aval.dtype) for n, x in enumerate(eqn.outvars)
    ]


def _sides(weight: LowRankWeight) -> list[Side]:
    """A, B and DoRA's c, if there is one."""
    parts = list(zip(weight.factor_letters, (weight.a, weight.b), strict=True))
    if weight.c is not None:
        parts.append((weight.outputs + "r", weight.c[..., None]))
    sides = []
    for letters, x in parts:
        own = "".join(c for c in weight.letters if c in letters)
        x = x.transpose([letters.index(c) for c in (*own, "r")])
        sides.append((own, jnp.expand_dims(x, [n for n, c in enumerate(weight.letters) if c not in own])))
    return sides


def _weight(weight: LowRankWeight, w: Any, letters: str, sides: Sequence[Side]) -> LowRankWeight:
    """The weight with other letters, and the sides that belong to them."""
    a, b, *c = (jnp.squeeze(x, [n for n, name in enumerate(letters) if name not in own]) for own, x in sides)
    (left, _), (right, _), *_ = sides
    # B as an `AdapterSpec` has it: batch axes, the rank, outputs. DoRA's factor has its axes without the rank's.
    shared = [name for name in right if name in left]
    order = [*shared, "r", *(name for name in right if name not in left)]
    places = [(right + "r").index(name) for name in order]
    return dataclasses.replace(
        weight,
        w=w,
        a=a,
        b=b.transpose(places),
        c=jnp.squeeze(c[0].transpose(places), len(shared)) if c else None,
        letters=letters,
        factor_letters=(left + "r", "".join(order)),
    )


def _squeeze(eqn: Any, weight: LowRankWeight, _: Any) -> Moved | None:
    gone = [n % len(weight.letters) for n in eqn.params["dimensions"]]
    left = "".join(c for n, c in enumerate(weight.letters) if n not in gone)
    sides = [("".join(c for c in own if c in left), jnp.squeeze(x, gone)) for own, x in _sides(weight)]
    return [(left, sides)]


def _slice(eqn: Any, weight: LowRankWeight, _: Any) -> Moved | None:
    names = ("start_indices", "limit_indices", "strides")
    return [(weight.letters, _sliced(weight, *(eqn.params[name] for name in names)))]


def _sliced(
    weight: LowRankWeight, starts: Sequence[int], limits: Sequence[int], strides: Any = None
) -> list[Side]:
    sides = []
    for own, x in _sides(weight):
        axes = [n for n, c in enumerate(weight.letters) if c in own]
        first, last, step = [0] * x.ndim, list(x.shape), [1] * x.ndim
        for n in axes:
            first[n], last[n], step[n] = starts[n], limits[n], strides[n] if strides else 1
        sides.append((own, jax.lax.slice(x, first, last, step)))
    return sides


def _split(eqn: Any, weight: LowRankWeight, _: Any) -> Moved | None:
    axis, shape = eqn.params["axis"], weight.w.shape
    result, first = [], 0
    for size in map(int, eqn.params["sizes"]):
        starts, limits = [0] * len(shape), list(shape)
        starts[axis], limits[axis] = first, first + size
        result.append((weight.letters, _sliced(weight, starts, limits)))
        first += size
    return result


def _dynamic_slice(eqn: Any, weight: LowRankWeight, starts: Sequence[Any]) -> Moved:
    sizes = eqn.params["slice_sizes"]
    sides = []
    for own, x in _sides(weight):
        has = [c in own for c in weight.letters]
        own_sizes = [size if h else 1 for size, h in zip(sizes, has, strict=True)]
        first = [start if h else jnp.zeros_like(start) for start, h in zip(starts, has, strict=True)]
        last = jnp.zeros_like(starts[0]) if len(starts) else 0
        sides.append((own, jax.lax.dynamic_slice(x, (*first, last), (*own_sizes, x.shape[-1]))))
    return [(weight.letters, sides)]


def _gather(eqn: Any, weight: LowRankWeight, rest: Sequence[Any]) -> Moved | None:
    """Slices along batch axes by index, of all else: an expert's matrix for each token or each step."""
    (indices,), numbers, sizes = rest, eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    batch = set.intersection(*map(set, weight.factor_letters)) - {"r"}
    chosen = {n for n, size in enumerate(sizes) if size < weight.w.shape[n]}
    chosen |= {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    if not all(weight.letters[n] in batch and sizes[n] == 1 for n in chosen):
        return None
    # Along an axis that is taken whole every index means 0, the one that fits; a factor may lack the axis.
    kept = jnp.array([n in chosen for n in numbers.start_index_map], indices.dtype)
    indices = indices * jnp.expand_dims(kept, range(indices.ndim - 1))
    rank, offset = eqn.outvars[0].aval.ndim, numbers.offset_dims
    own_numbers = jax.lax.GatherDimensionNumbers(
        (*offset, rank),
        *(numbers.collapsed_slice_dims, numbers.start_index_map),
        *(numbers.operand_batching_dims, numbers.start_indices_batching_dims),
    )
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    left = iter(c for n, c in enumerate(weight.letters) if n not in gone)
    new = iter(c for c in string.ascii_lowercase if c not in weight.letters + "r")
    letters = "".join(next(left if n in offset else new) for n in range(rank))
    options = {name: eqn.params[name] for name in ("mode", "unique_indices", "indices_are_sorted")}
    sides = []
    for own, x in _sides(weight):
        own_sizes = [min(size, x.shape[n]) for n, size in enumerate((*sizes, x.shape[-1]))]
        moved = jax.lax.gather(
            x, indices, own_numbers, own_sizes, fill_value=eqn.params["fill_value"], **options
        )
        sides.append(("".join(c for c in letters if c in own or c not in weight.letters), moved))
    return [(letters, sides)]


def _reshape(eqn: Any, weight: LowRankWeight, _: Any) -> Moved | None:
    if eqn.params.get("dimensions") is not None:
        return None
    return _regrouped(weight, eqn.outvars[0].aval.shape)


def _expand(eqn: Any, weight: LowRankWeight, _: Any) -> Moved | None:
    shape, kept = eqn.outvars[0].aval.shape, eqn.params["broadcast_dimensions"]
    is_larger = any(shape[n] != size for n, size in zip(kept, weight.w.shape, strict=True))
    if is_larger or any(size > 1 for n, size in enumerate(shape) if n not in kept):
        return None
    return _regrouped(weight, shape)


def _regrouped(weight: LowRankWeight, shape: Sequence[int]) -> Moved | None:
    """Splits and merges neighbouring axes of one side; new axes of size 1 belong to both."""
    sides, spare = _sides(weight), iter(c for c in string.ascii_lowercase if c not in weight.letters + "r")
    letters, owns, shapes = "", ["" for _ in sides], [[] for _ in sides]
    old, n, m = weight.w.shape, 0, 0
    while n < len(old) or m < len(shape):
        is_new, is_gone = (
            k < len(own) and own[k] == 1 and not (k_other < len(other) and other[k_other] == 1)
            for own, k, other, k_other in ((shape, m, old, n), (old, n, shape, m))
        )
        i, j = n + (not is_new), m + (not is_gone)
        while (before := math.prod(old[n:i])) != (after := math.prod(shape[m:j])):
            i, j = i + (before < after), j + (after < before)
        large = [c for c, size in zip(weight.letters[n:i], old[n:i], strict=True) if size > 1]
        own = (
            [not group or group[0] in side for side, _ in sides]
            if (group := large or weight.letters[n:i])
            else [True] * len(sides)
        )
        if any((c in side) != has for (side, _), has in zip(sides, own, strict=True) for c in large):
            return None
        names = weight.letters[n:i] if i - n == j - m == 1 else "".join(next(spare) for _ in range(m, j))
        letters += names
        for k, has in enumerate(own):
            owns[k] += names if has else ""
            shapes[k] += shape[m:j] if has else [1] * (j - m)
        n, m = i, j
    moved = [x.reshape((*sizes, x.shape[-1])) for (_, x), sizes in zip(sides, shapes, strict=True)]
    return [(letters, list(zip(owns, moved, strict=True)))]


def _join(eqn: Any, inputs: Sequence[Any], run: Run) -> list[LowRankWeight] | None:
    """Weights, and arrays without an adapter, one after another along an axis.

    Along a batch axis so are A and B; along another, those of all weights lie side by side in the rank, with zeros
    where a weight has no part.
    """
    parts = [x for x in inputs if isinstance(x, LowRankWeight)]
    (w,) = _values(eqn, [x.w if isinstance(x, LowRankWeight) else x for x in inputs], run)
    parts = [x if isinstance(x, LowRankWeight) else _plain(x, parts[0]) for x in inputs]
    axis = eqn.params.get("axis", eqn.params.get("dimension"))
    if eqn.primitive.name == "stack":
        shape = list(parts[0].w.shape)
        shape.insert(axis, 1)
        moved = [(x, _regrouped(x, shape)) for x in parts]
        parts = [_weight(x, jnp.expand_dims(_dense(x.w), axis), *found[0]) for x, found in moved if found]
    first = parts[0]
    roles = {tuple(tuple(c in own for own, _ in _sides(x)) for c in x.letters) for x in parts}
    if len(roles) > 1 or len({(x.stops, x.omit) for x in parts}) > 1 or any(x.key is not None for x in parts):
        return None
    shares = [first.letters[axis] in own for own, _ in _sides(first)]
    if first.c is not None and not shares[1]:  # the factors of the outputs differ from input to input
        return None
    sides: list[list[jax.Array]] = [[] for _ in shares]
    rank, offset = max(x.a.shape[x.factor_letters[0].index("r")] for x in parts), 0
    for x in parts:
        values = [value for _, value in _sides(x)]
        values[1] = values[1] * jnp.asarray(x.scale, values[1].dtype)
        for n, value in enumerate(values):
            width = [(0, 0)] * value.ndim
            if n < 2 and all(shares[:2]):
                width[-1] = (0, rank - value.shape[-1])
            elif n < 2 and shares[n]:
                width[axis] = (offset, w.shape[axis] - offset - x.w.shape[axis])
            sides[n].append(jnp.pad(value, width))
        offset += x.w.shape[axis]
    along = [axis if all(shares[:2]) else -1] * 2 + [axis]
    joined = [
        (own, jnp.concatenate(values, to))
        for (own, _), values, to in zip(_sides(first), sides, along, strict=False)
    ]
    return [_weight(dataclasses.replace(first, scale=1.0), w, first.letters, joined)]


def _plain(x: jax.Array, like: LowRankWeight) -> LowRankWeight:
    """An array without an adapter as a weight with zeros for A and B, with the letters of another."""
    size = dict(zip(like.letters, x.shape, strict=True)) | {"r": 1}
    a, b = (jnp.zeros([size[c] for c in side], like.b.dtype) for side in like.factor_letters)
    c = None if like.c is None else jnp.ones([size[c] for c in like.outputs], like.c.dtype)
    return dataclasses.replace(like, w=x, a=a, b=b, c=c)


def _dense(w: Any) -> jax.Array:
    return w.dequantize() if hasattr(w, "dequantize") else w


_MOVES = {
    "squeeze": _squeeze,
    "slice": _slice,
    "split": _split,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "reshape": _reshape,
    "broadcast_in_dim": _expand,
}
