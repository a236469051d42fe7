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
from ..quantization.packed_array import PackedArray
from .weight import LowRankWeight

Run = Callable[[Sequence[Any]], Sequence[Any]]
Side = tuple[str, jax.Array]
"""The letters that a factor shares with W, in W's order, and the factor with an axis for each letter of W, of size
1 where it has none, and the rank's last."""
Moved = list[tuple[str, list[Side]]]
"""For each output the letters of its axes, and its sides."""


@jax.tree_util.register_static  # without leaves: nothing may take it for an array
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
    (weight,) = weights
    # A reversal of other axes than the stacked ones would leave their letters and sizes as they are, and a value
    # that fills W is none of its codes.
    is_direct = name != "rev" and eqn.params.get("fill_value") is None
    packed = _packed_sides(weight.w, weight.letters) if is_direct else []
    moved = rule(eqn, weight, inputs[1:], [*sides_of(weight), *packed])
    if moved is None:
        return None
    values: list[Any] = [None]
    if packed:
        values = [_packed(weight, out.aval.shape, *m) for out, m in zip(eqn.outvars, moved, strict=True)]
    if any(w is None for w in values):
        values = list(base_values(eqn, [weight.w, *inputs[1:]], run))
    kept = 2 + (weight.c is not None)
    return [
        weight_of(weight, w, names, sides[:kept]) for w, (names, sides) in zip(values, moved, strict=True)
    ]


def base_values(eqn: Any, inputs: Sequence[Any], run: Run) -> Sequence[Any]:
    """W after an operation, for each output; a `Deferred` if it is packed."""
    if not any(hasattr(x, "dequantize") for x in inputs):
        return run(inputs)

    def value(n: int) -> jax.Array:
        return run([_dense(x) for x in inputs])[n]

    return [
        Deferred(lambda n=n: value(n), tuple(x.aval.shape), x.aval.dtype) for n, x in enumerate(eqn.outvars)
    ]


def sides_of(weight: LowRankWeight) -> list[Side]:
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


def _packed_sides(w: Any, letters: str) -> list[Side]:
    """The parts of a packed stack: they have W's stacked axes, and all their own in place of the rank's."""
    if not isinstance(w, PackedArray) or not w.stack:
        return []
    ones = [1] * (len(letters) - len(w.stack))
    return [
        (letters[: len(w.stack)], w.parts[name].reshape((*w.stack, *ones, -1))) for name in sorted(w.parts)
    ]


def _packed(
    weight: LowRankWeight, shape: Sequence[int], letters: str, sides: Sequence[Side]
) -> PackedArray | None:
    """The packed stack after a move of stacked axes alone, which unpacks nothing; None after any other."""
    w: Any = weight.w
    names, axes = sorted(w.parts), len(w.sizes)
    if tuple(shape[-axes:]) != w.sizes or letters[-axes:] != weight.letters[-axes:]:
        return None
    stack, parts = tuple(shape[: len(shape) - len(w.sizes)]), sides[-len(names) :]
    if any(own != letters[: len(stack)] for own, _ in parts):
        return None
    shapes = [w.parts[name].shape[len(w.stack) :] for name in names]
    new = {name: x.reshape((*stack, *s)) for name, (_, x), s in zip(names, parts, shapes, strict=True)}
    return dataclasses.replace(w, parts=new)


def weight_of(weight: LowRankWeight, w: Any, letters: str, sides: Sequence[Side]) -> LowRankWeight:
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


def _squeeze(eqn: Any, weight: LowRankWeight, _: Any, sides: list[Side]) -> Moved | None:
    gone = [n % len(weight.letters) for n in eqn.params["dimensions"]]
    left = "".join(c for n, c in enumerate(weight.letters) if n not in gone)
    return [(left, [("".join(c for c in own if c in left), jnp.squeeze(x, gone)) for own, x in sides])]


def _slice(eqn: Any, weight: LowRankWeight, _: Any, sides: list[Side]) -> Moved | None:
    names = ("start_indices", "limit_indices", "strides")
    return [(weight.letters, _sliced(weight, sides, *(eqn.params[name] for name in names)))]


def _sliced(
    weight: LowRankWeight,
    sides: list[Side],
    starts: Sequence[int],
    limits: Sequence[int],
    strides: Any = None,
) -> list[Side]:
    result = []
    for own, x in sides:
        first, last, step = [0] * x.ndim, list(x.shape), [1] * x.ndim
        for n in (n for n, c in enumerate(weight.letters) if c in own):
            first[n], last[n], step[n] = starts[n], limits[n], strides[n] if strides else 1
        result.append((own, jax.lax.slice(x, first, last, step)))
    return result


def _split(eqn: Any, weight: LowRankWeight, _: Any, sides: list[Side]) -> Moved | None:
    axis, shape = eqn.params["axis"], weight.w.shape
    result, first = [], 0
    for size in map(int, eqn.params["sizes"]):
        starts, limits = [0] * len(shape), list(shape)
        starts[axis], limits[axis] = first, first + size
        result.append((weight.letters, _sliced(weight, sides, starts, limits)))
        first += size
    return result


def _reverse(eqn: Any, weight: LowRankWeight, _: Any, sides: list[Side]) -> Moved | None:
    # An axis of size 1 that a side lacks may be reversed too.
    return [(weight.letters, [(own, jax.lax.rev(x, eqn.params["dimensions"])) for own, x in sides])]


def _all_gather(eqn: Any, weight: LowRankWeight, _: Any, sides: list[Side]) -> Moved | None:
    """The whole of an axis of the shards of a mesh."""
    params = eqn.params
    if not params["tiled"] or params["axis_index_groups"] is not None:
        return None
    axis, name = params["all_gather_dimension"], params["axis_name"]
    letter = weight.letters[axis]
    gather = lambda x: jax.lax.all_gather(x, name, axis=axis, tiled=True)  # noqa: E731
    return [(weight.letters, [(own, gather(x) if letter in own else x) for own, x in sides])]


def _dynamic_slice(eqn: Any, weight: LowRankWeight, starts: Sequence[Any], sides: list[Side]) -> Moved:
    sizes, result = eqn.params["slice_sizes"], []
    for own, x in sides:
        has = [c in own for c in weight.letters]
        own_sizes = [size if h else 1 for size, h in zip(sizes, has, strict=True)]
        first = [start if h else jnp.zeros_like(start) for start, h in zip(starts, has, strict=True)]
        last = jnp.zeros_like(starts[0]) if len(starts) else 0
        result.append((own, jax.lax.dynamic_slice(x, (*first, last), (*own_sizes, x.shape[-1]))))
    return [(weight.letters, result)]


def gather(eqn: Any, weight: LowRankWeight, rest: Sequence[Any], sides: list[Side]) -> Moved | None:
    """Slices by index: an expert's matrix for each token, some outputs, windows of inputs.

    A side with an indexed axis gets those of the indices, any other side stays. Along an axis that a side lacks
    every index means 0.
    """
    (indices,), numbers, sizes = rest, eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    fill, shape, old = eqn.params["fill_value"], weight.w.shape, weight.letters
    batching = dict(zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims, strict=True))
    # Along an axis that is taken whole the only index is 0, but with a value to fill in beyond the last.
    indexed = {old[n] for n in numbers.start_index_map if fill is not None or sizes[n] < shape[n]}
    spare = iter(c for c in string.ascii_lowercase if c not in old + "r")
    of_indices = [old[batching[n]] if n in batching else next(spare) for n in range(indices.ndim - 1)]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    left, new = iter(c for n, c in enumerate(old) if n not in gone), iter(of_indices)
    rank, offset = eqn.outvars[0].aval.ndim, numbers.offset_dims
    letters = "".join(next(left if n in offset else new) for n in range(rank))
    if weight.c is not None and indexed - set(weight.outputs) and fill and not math.isnan(fill):
        return None  # c, which has no input axis, would scale the value that fills W
    result = []
    for k, (own, x) in enumerate(sides):
        if not indexed & set(own):
            x = jnp.squeeze(x, [n for n, c in enumerate(old) if c not in letters])
            names = [c for c in old if c in letters]
            x = x.transpose([*(names.index(c) for c in letters if c in names), len(names)])
            x = jnp.expand_dims(x, [n for n, c in enumerate(letters) if c not in names])
            result.append(("".join(c for c in letters if c in own), x))
            continue
        has = [old[n] in own for n in numbers.start_index_map]
        shared = {n: m for n, m in batching.items() if old[m] in own}
        is_same = all(has) and shared == batching
        moved = jax.lax.gather(
            x,
            indices * jnp.expand_dims(jnp.array(has, indices.dtype), range(indices.ndim - 1)),
            jax.lax.GatherDimensionNumbers(
                offset_dims=(*offset, rank),
                collapsed_slice_dims=tuple(sorted(gone.difference(shared.values()))),
                start_index_map=numbers.start_index_map,
                operand_batching_dims=tuple(shared.values()),
                start_indices_batching_dims=tuple(shared),
            ),
            [min(size, x.shape[n]) for n, size in enumerate((*sizes, x.shape[-1]))],
            unique_indices=is_same and eqn.params["unique_indices"],
            indices_are_sorted=is_same and eqn.params["indices_are_sorted"],
            mode=eqn.params["mode"],
            # No term beyond the last index: A and B are 0 and c is 1 there, and W alone is what fills it.
            fill_value=None if fill is None else float(k == 2),
        )
        result.append(("".join(c for c in letters if c in own or c in of_indices), moved))
    return [(letters, result)]


def _reshape(eqn: Any, weight: LowRankWeight, _: Any, sides: list[Side]) -> Moved | None:
    if eqn.params.get("dimensions") is not None:
        return None
    return _regrouped(weight, sides, eqn.outvars[0].aval.shape)


def _expand(eqn: Any, weight: LowRankWeight, _: Any, sides: list[Side]) -> Moved | None:
    shape, kept = eqn.outvars[0].aval.shape, eqn.params["broadcast_dimensions"]
    is_larger = any(shape[n] != size for n, size in zip(kept, weight.w.shape, strict=True))
    if is_larger or any(size > 1 for n, size in enumerate(shape) if n not in kept):
        return None
    return _regrouped(weight, sides, shape)


def _regrouped(weight: LowRankWeight, sides: list[Side], shape: Sequence[int]) -> Moved | None:
    """Splits and merges neighbouring axes of one side; new axes of size 1 belong to both."""
    if 0 in (*weight.w.shape, *shape):
        return None
    spare = iter(c for c in string.ascii_lowercase if c not in weight.letters + "r")
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
    (w,) = base_values(eqn, [x.w if isinstance(x, LowRankWeight) else x for x in inputs], run)
    parts = [x if isinstance(x, LowRankWeight) else _plain(x, parts[0]) for x in inputs]
    axis = eqn.params.get("axis", eqn.params.get("dimension"))
    if 0 in w.shape:
        return None
    if eqn.primitive.name == "stack":
        shape = list(parts[0].w.shape)
        shape.insert(axis, 1)
        one = jax.ShapeDtypeStruct(shape, parts[0].w.dtype)  # nothing reads its values
        parts = [weight_of(x, one, *_regrouped(x, sides_of(x), shape)[0]) for x in parts]  # pyright: ignore
    first = parts[0]
    roles = {tuple(tuple(c in own for own, _ in sides_of(x)) for c in x.letters) for x in parts}
    if len(roles) > 1 or len({(x.stops, x.omit) for x in parts}) > 1 or any(x.key is not None for x in parts):
        return None
    shares = [first.letters[axis] in own for own, _ in sides_of(first)]
    if first.c is not None and not shares[1]:  # the factors of the outputs differ from input to input
        return None
    adapted = [x for x in inputs if isinstance(x, LowRankWeight)]
    joint, size = sum(x.a.shape[x.factor_letters[0].index("r")] for x in adapted), w.shape
    if len(adapted) > 2 and not all(shares[:2]) and 3 * joint * sum(size[-2:]) > math.prod(size[-2:]):
        return None  # the zeros of the joint factors would cost more than the whole weight
    sides: list[list[jax.Array]] = [[] for _ in shares]
    rank, offset = max(x.a.shape[x.factor_letters[0].index("r")] for x in parts), 0
    for x in parts:
        values = [value for _, value in sides_of(x)]
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
        for (own, _), values, to in zip(sides_of(first), sides, along, strict=False)
    ]
    return [weight_of(dataclasses.replace(first, scale=1.0), w, first.letters, joined)]


def _plain(x: jax.Array, like: LowRankWeight) -> LowRankWeight:
    """An array without an adapter as a weight with zeros for A and B, with the letters of another."""
    size = dict(zip(like.letters, x.shape, strict=True)) | {"r": 1}
    a, b = (jnp.zeros([size[c] for c in side], like.b.dtype) for side in like.factor_letters)
    c = None if like.c is None else jnp.ones([size[c] for c in like.outputs], like.c.dtype)
    return dataclasses.replace(like, w=x, a=a, b=b, c=c)


def _dense(w: Any) -> jax.Array:
    return w.dequantize() if hasattr(w, "dequantize") else w


_MOVES = {
    "rev": _reverse,
    "all_gather": _all_gather,
    "squeeze": _squeeze,
    "slice": _slice,
    "split": _split,
    "dynamic_slice": _dynamic_slice,
    "gather": gather,
    "reshape": _reshape,
    "broadcast_in_dim": _expand,
}
