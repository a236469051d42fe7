"""Weights packed in 4 to 8 bits that stay packed on the device: nf4, int8, and the block formats of GGUF files.

A packed weight is a pytree, so it is sharded, saved, sliced by `nn.scan` and passed to a jitted step like an array.
Its values exist only while a layer uses them; see `low_rank` and `linen.adapter`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from ._validation import check_choice

Kind = Literal["nf4", "int8", "q4_0", "q4_1", "q8_0", "q4_k", "q6_k"]
QuantizeTo = Literal["nf4", "int8"]

# arXiv 2305.14314, appendix E: quantiles of a normal distribution with an exact zero, scaled to [-1, 1].
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_NF4_BLOCK, _GROUP = 64, 256
_BYTES = np.arange(256)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedArray:
    """A weight in a packed format; `dequantize` gives the array that it stands for.

    The values lie in rows of blocks: one row for each output, and blocks along the inputs, so that blocks of a
    checkpoint's `(out, in)` matrix keep their bits. Axes that `nn.scan` or `vmap` stack come first in every part,
    and are not in `sizes`.

    Attributes:
      parts: arrays by name; `codes` is (..., rows, blocks, bytes of a block), the scales depend on the format.
      kind: the format.
      sizes: shape of one layer's weight.
      order: the axes of one layer's weight in the order in which the values lie.
      inner: how many of them, from the last, make up a row.
      dtype: dtype of `dequantize`, and what `x.dtype` says.
    """

    parts: dict[str, Any]
    kind: Kind = dataclasses.field(metadata={"static": True})
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    order: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    inner: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the stacked axes."""
        return tuple(self.parts["codes"].shape[:-3])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that this stands for, with stacked axes first."""
        return (*self.stack, *self.sizes)

    @property
    def ndim(self) -> int:
        """The number of its axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of its values."""
        return math.prod(self.shape)

    def part_axes(self, axes: Sequence[Any]) -> dict[str, tuple[Any, ...]]:
        """How the parts are split over a mesh if the weight is: its rows and blocks with the first axis of each.

        Args:
          axes: mesh axis or None for each axis of `shape`; the last ones may be left out.
        """
        lead, own = len(self.stack), [*axes, *(None,) * self.ndim]
        stored = [own[lead + axis] for axis in self.order]
        rows, columns = stored[0] if self.inner < len(stored) else None, stored[len(stored) - self.inner]
        is_row = FORMATS[self.kind].block is None  # one block, whose values are split
        split = (rows, None, columns) if is_row else (rows, columns, None)
        return {
            name: (*own[:lead], *split[: part.ndim - lead])
            if part.ndim - lead > 1
            else (*own[:lead], *(None,) * (part.ndim - lead))
            for name, part in self.parts.items()
        }

    @property
    def nbytes(self) -> int:
        """The size of all parts in bytes."""
        return sum(part.size * part.dtype.itemsize for part in self.parts.values())

    def astype(self, dtype: Any) -> "PackedArray":
        """The same weight, with another dtype of `dequantize`."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def transpose(self, axes: Sequence[int]) -> "PackedArray":
        """The weight of one layer with its axes in another order; no value moves."""
        place = {axis: n for n, axis in enumerate(axes)}
        sizes, order = tuple(self.sizes[axis] for axis in axes), tuple(place[axis] for axis in self.order)
        return dataclasses.replace(self, sizes=sizes, order=order)

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The array, with stacked axes first; computed in float32, or float16 and bfloat16 of it.

        Args:
          dtype: of the result; by default `self.dtype`.
        """
        blocks = FORMATS[self.kind].values(self.parts).astype(self.dtype if dtype is None else dtype)
        stored = [self.sizes[axis] for axis in self.order]
        rows = blocks.reshape(*blocks.shape[:-2], -1)[..., : math.prod(stored[len(stored) - self.inner :])]
        lead = len(self.stack)
        back = (*range(lead), *(lead + int(axis) for axis in np.argsort(self.order)))
        return rows.reshape(*self.stack, *stored).transpose(back)


def is_packed(value: Any) -> bool:
    """Whether a value is a `PackedArray`; an `is_leaf` for `jax.tree.map`."""
    return isinstance(value, PackedArray)


class Format(NamedTuple):
    """A packed format.

    Attributes:
      block: number of values in a block; None if a row is one block.
      values: computes the values (..., rows, blocks, block), float32, from the parts.
      split: for GGUF, the parts in a block's bytes: name to dtype and count, in order; a count of 0 is one scalar.
    """

    block: int | None
    values: Callable[[Mapping[str, Any]], jax.Array]
    split: Mapping[str, tuple[str, int]] = {}


def quantize(
    weight: Any,
    kind: QuantizeTo,
    *,
    axes: str = "io",
    embedding: bool = False,
    stacked: int = 0,
    dtype: Any = None,
) -> PackedArray:
    """Packs a weight.

    `nf4` (arXiv 2305.14314, section 3): blocks of 64 inputs with 16 levels, and the blocks' largest magnitudes
    quantized once more, to 8 bits in groups of 256: 4.127 bits a value. The second step is linear around the mean,
    and the levels are those nearest under the scales as stored. `int8`: one scale for each output.

    Args:
      weight: array or numpy array (stacked..., axes of the weight...), floating.
      kind: the format.
      axes: one letter per axis of one layer's weight, as in `AdapterSpec`.
      embedding: whether it is a table of rows, `(num_embeddings, features)`, which is packed row by row.
      stacked: number of stacked axes, which lead.
      dtype: `dtype` of the result; by default the weight's.

    Raises:
      ValueError: unknown `kind`, or the weight has another number of axes or values that are not finite.
    """
    check_choice("kind", kind, get_args(QuantizeTo))
    shape = tuple(weight.shape)
    if len(shape) != stacked + len(axes):
        raise ValueError(f"axes must have {len(shape) - stacked} letters for a weight {shape}, got {axes!r}")
    order, inner = storage_order(axes, embedding=embedding)
    sizes = shape[stacked:]
    rows = math.prod(sizes[axis] for axis in order[: len(order) - inner])
    permuted = np.asarray(weight).transpose((*range(stacked), *(stacked + axis for axis in order)))
    matrices = permuted.reshape(-1, rows, math.prod(sizes) // rows)
    packed = [pack_matrix(kind, matrix) for matrix in matrices]
    parts = {name: np.stack([p[name] for p in packed]) for name in packed[0]}
    parts = {name: jnp.asarray(x.reshape((*shape[:stacked], *x.shape[1:]))) for name, x in parts.items()}
    return PackedArray(parts, kind, sizes, order, inner, jnp.dtype(weight.dtype if dtype is None else dtype))


def pack_matrix(kind: Kind, matrix: np.ndarray) -> dict[str, np.ndarray]:
    """The parts of one matrix: from floating values (rows, columns), or for a format of GGUF from its bytes.

    Args:
      kind: the format.
      matrix: the values, or uint8 (rows, bytes of a row); those are only sorted into parts, and keep their bits.
    """
    if kind in _QUANTIZE:
        return _QUANTIZE[kind](matrix)
    widths = {name: np.dtype(d).itemsize * max(count, 1) for name, (d, count) in FORMATS[kind].split.items()}
    blocks, parts, start = matrix.reshape(matrix.shape[0], -1, sum(widths.values())), {}, 0
    for name, width in widths.items():
        dtype, count = FORMATS[kind].split[name]
        part = np.ascontiguousarray(blocks[..., start : start + width]).view(dtype)
        parts[name], start = part if count else part[..., 0], start + width
    return parts


def packed_shape(
    kind: Kind, shape: Sequence[int], *, transposed: bool, stacked: int = 0, dtype: Any = jnp.float32
) -> PackedArray:
    """A `PackedArray` of shapes instead of arrays.

    Args:
      kind: the format.
      shape: of the weight, with stacked axes first and then two.
      transposed: whether it is a kernel (columns, rows), or an embedding (rows, columns).
      stacked: number of stacked axes.
      dtype: of `dequantize`.
    """
    lead, sizes = tuple(shape[:stacked]), tuple(shape[stacked:])
    rows, columns = sizes[::-1] if transposed else sizes
    parts = {
        name: jax.ShapeDtypeStruct((*lead, *part), jnp.dtype(kind_of))
        for name, (part, kind_of) in _part_shapes(kind, rows, columns).items()
    }
    return PackedArray(parts, kind, sizes, (1, 0) if transposed else (0, 1), 1, jnp.dtype(dtype))


def _part_shapes(kind: Kind, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], str]]:
    block, split = FORMATS[kind].block, FORMATS[kind].split
    if block is None:
        return {"codes": ((rows, 1, columns), "i1"), "scales": ((rows, 1), "f4")}
    if split:
        if columns % block:
            raise ValueError(f"{kind} has blocks of {block} values, which do not divide rows of {columns}")
        blocks = (rows, columns // block)
        return {
            name: ((*blocks, count) if count else blocks, dtype) for name, (dtype, count) in split.items()
        }
    block = _nf4_block(columns)
    blocks = (rows, -(-columns // block))
    return {
        "codes": ((*blocks, block // 2), "u1"),
        "scales": (blocks, "i1"),
        "steps": ((-(-math.prod(blocks) // _GROUP),), "f4"),
        "mean": ((), "f4"),
    }


def _nf4_block(columns: int) -> int:
    return min(_NF4_BLOCK, 2 * -(-columns // 2))


def storage_order(axes: str, *, embedding: bool = False) -> tuple[tuple[int, ...], int]:
    """The order in which the axes of a weight are stored, and how many from the last make up a row.

    >>> storage_order("ioo"), storage_order("io", embedding=True)
    (((1, 2, 0), 1), ((0, 1), 1))
    """
    row_roles = "o" if embedding else "i"
    inner = [n for n, role in enumerate(axes) if role == row_roles]
    return (*(n for n, role in enumerate(axes) if role != row_roles), *inner), len(inner)


def _quantize_nf4(rows: np.ndarray) -> dict[str, np.ndarray]:
    block = _nf4_block(rows.shape[1])
    count = -(-rows.shape[1] // block)
    absmax = np.concatenate(
        [np.abs(part).max(-1) for part in _in_blocks(rows, block)] or [np.zeros((0, count), np.float32)]
    )
    if not np.isfinite(absmax).all():
        raise ValueError("the weight has values that are not finite")
    mean = absmax.mean(dtype=np.float64).astype(np.float32)
    offset = absmax.reshape(-1) - mean
    groups = np.pad(offset, (0, -offset.size % _GROUP)).reshape(-1, _GROUP)
    steps = np.maximum(np.abs(groups).max(-1) / 127, np.finfo(np.float32).tiny).astype(np.float32)
    scales = np.rint(groups / steps[:, None]).astype(np.int8).reshape(-1)[: offset.size].reshape(absmax.shape)
    parts = {"scales": scales, "steps": steps, "mean": mean}
    stored = np.maximum(np.asarray(_nf4_scales(parts, np)), np.finfo(np.float32).tiny)
    edges = np.convolve(np.array(NF4, np.float32), [0.5, 0.5], "valid").astype(np.float32)
    codes, start = np.empty((*absmax.shape, block // 2), np.uint8), 0
    for part in _in_blocks(rows, block):
        stop = start + len(part)
        levels = np.searchsorted(edges, part / stored[start:stop, :, None]).astype(np.uint8)
        codes[start:stop] = levels[..., : block // 2] | levels[..., block // 2 :] << 4
        start = stop
    return {"codes": codes, **parts}


def _in_blocks(rows: np.ndarray, block: int) -> Any:
    """Yields float32 blocks (some rows, blocks, block), zeros after a row's end; a few MiB at a time."""
    count = -(-rows.shape[1] // block)
    step = max(1, (1 << 20) // (count * block))
    for start in range(0, len(rows), step):
        part = rows[start : start + step].astype(np.float32)
        yield np.pad(part, ((0, 0), (0, count * block - part.shape[1]))).reshape(len(part), count, block)


def _nf4_scales(parts: Mapping[str, Any], xp: Any) -> Any:
    """The largest magnitude of every block, (..., rows, blocks), from its 8 bits; at least 0."""
    scales, steps = parts["scales"], parts["steps"]
    group = np.arange(math.prod(scales.shape[-2:])).reshape(scales.shape[-2:]) // _GROUP
    mean = parts["mean"][..., None, None]
    return xp.maximum(scales.astype(np.float32) * xp.take(steps, group, axis=-1) + mean, 0)


def _quantize_int8(rows: np.ndarray) -> dict[str, np.ndarray]:
    absmax = np.abs(rows).max(-1).astype(np.float32)
    if not np.isfinite(absmax).all():
        raise ValueError("the weight has values that are not finite")
    scales = np.maximum(absmax / 127, np.finfo(np.float32).tiny).astype(np.float32)
    codes = np.empty(rows.shape, np.int8)
    for start in range(len(rows)):
        codes[start] = np.rint(rows[start].astype(np.float32) / scales[start])
    return {"codes": codes[:, None], "scales": scales[:, None]}


_QUANTIZE = {"nf4": _quantize_nf4, "int8": _quantize_int8}


def _nibbles(codes: Any, levels: Sequence[float]) -> jax.Array:
    """Values (..., n) of bytes (..., n / 2): the low halves, then the high ones.

    One lookup by the byte for each half is the quickest of the ways that XLA compiles on CPU.
    """
    table = np.array(levels, np.float32)
    halves = (jnp.asarray(table[half]) for half in (_BYTES & 15, _BYTES >> 4))
    index = codes.astype(jnp.int32)
    return jnp.concatenate([half.at[index].get(mode="promise_in_bounds") for half in halves], -1)


def _f32(part: Any) -> jax.Array:
    return part.astype(jnp.float32)[..., None]


def _nf4(p: Mapping[str, Any]) -> jax.Array:
    return _nibbles(p["codes"], NF4) * _nf4_scales(p, jnp)[..., None]


def _int8(p: Mapping[str, Any]) -> jax.Array:
    return p["codes"].astype(jnp.float32) * p["scales"][..., None]


def _q4_0(p: Mapping[str, Any]) -> jax.Array:
    return _nibbles(p["codes"], range(-8, 8)) * _f32(p["d"])


def _q4_1(p: Mapping[str, Any]) -> jax.Array:
    return _nibbles(p["codes"], range(16)) * _f32(p["d"]) + _f32(p["m"])


def _q8_0(p: Mapping[str, Any]) -> jax.Array:
    return p["codes"].astype(jnp.float32) * _f32(p["d"])


def _q4_k(p: Mapping[str, Any]) -> jax.Array:
    # Twelve bytes hold the 6 bits of eight scales and eight minima.
    first, second, rest = jnp.split(p["scales"], 3, axis=-1)
    scale = jnp.concatenate([first & 63, (rest & 15) | (first >> 6 << 4)], -1)
    low = jnp.concatenate([second & 63, (rest >> 4) | (second >> 6 << 4)], -1)
    codes = p["codes"].reshape(*p["codes"].shape[:-1], 4, 32)
    values = _nibbles(codes, range(16))
    values = values.reshape(*values.shape[:-2], 8, 32)
    scale, low = (_f32(p[d]) * part.astype(jnp.float32) for d, part in (("d", scale), ("dmin", low)))
    return (scale[..., None] * values - low[..., None]).reshape(*p["codes"].shape[:-1], 256)


def _q6_k(p: Mapping[str, Any]) -> jax.Array:
    lead = p["codes"].shape[:-1]
    low = p["codes"].reshape(*lead, 2, 1, 64)
    low = jnp.concatenate([low & 15, low >> 4], -2).reshape(*lead, 2, 4, 32)
    high = p["high"].reshape(*lead, 2, 1, 32)
    high = jnp.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], -2) << 4
    values = (low | high).astype(jnp.float32) - 32
    scale = _f32(p["d"]) * p["scales"].astype(jnp.float32)
    return (values.reshape(*lead, 16, 16) * scale[..., None]).reshape(*lead, 256)


FORMATS: Mapping[str, Format] = {
    "nf4": Format(_NF4_BLOCK, _nf4),
    "int8": Format(None, _int8),
    "q4_0": Format(32, _q4_0, {"d": ("<f2", 0), "codes": ("u1", 16)}),
    "q4_1": Format(32, _q4_1, {"d": ("<f2", 0), "m": ("<f2", 0), "codes": ("u1", 16)}),
    "q8_0": Format(32, _q8_0, {"d": ("<f2", 0), "codes": ("i1", 32)}),
    "q4_k": Format(
        256, _q4_k, {"d": ("<f2", 0), "dmin": ("<f2", 0), "scales": ("u1", 12), "codes": ("u1", 128)}
    ),
    "q6_k": Format(
        256, _q6_k, {"codes": ("u1", 128), "high": ("u1", 64), "scales": ("i1", 16), "d": ("<f2", 0)}
    ),
}
"""The formats by name."""
