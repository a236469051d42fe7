"""An array that stays packed in 4 to 8 bits: a pytree whose values exist only while a layer uses them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from .._utils.validation import check_choice
from .formats import FORMATS, FormatName, QuantizeTo, pack_matrix, part_shapes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedArray:
    """A weight in a packed format; `dequantize` gives the array that it stands for.

    A pytree, so it is sharded, saved, sliced by `nn.scan` and passed to a jitted step like an array. The values are
    stored in rows, one for each output, as in the `(out, in)` matrices of checkpoints; blocks that share a scale
    run along the inputs. Axes that `nn.scan` or `vmap` stack come first in every part, and are not in `sizes`.

    Attributes:
      parts: arrays by name; `codes` is (..., rows, columns or bytes), the scales depend on the format.
      kind: the format.
      sizes: shape of one layer's weight.
      order: the axes of one layer's weight in the order in which the values are stored.
      inner: how many of them, from the last, make up a row.
      dtype: dtype of `dequantize`, and what `x.dtype` says.
    """

    # All but the parts is static: `nn.scan` and `vmap` may slice only arrays, and jit compiles once a format.
    parts: dict[str, Any]
    kind: FormatName = dataclasses.field(metadata={"static": True})
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    order: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    inner: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the stacked axes."""
        return tuple(self.parts["codes"].shape[:-2])

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

    @property
    def nbytes(self) -> int:
        """The size of all parts in bytes."""
        return sum(part.size * part.dtype.itemsize for part in self.parts.values())

    def part_axes(self, axes: Sequence[Any]) -> dict[str, tuple[Any, ...]]:
        """How the parts are split over a mesh if the weight is: rows and columns as the first axis of each.

        `axes` are a mesh axis or None for each axis of `shape`; the last ones may be left out.
        """
        lead, own = len(self.stack), [*axes, *(None,) * self.ndim]
        stored = [own[lead + axis] for axis in self.order]
        rows = stored[0] if self.inner < len(stored) else None
        split = {2: (rows, stored[len(stored) - self.inner]), 1: (None,), 0: ()}
        return {name: (*own[:lead], *split[part.ndim - lead]) for name, part in self.parts.items()}

    def astype(self, dtype: Any) -> "PackedArray":
        """The same weight, with another dtype of `dequantize`."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def transpose(self, axes: Sequence[int]) -> "PackedArray":
        """The weight of one layer with its axes in another order; no value moves."""
        sizes = tuple(self.sizes[axis] for axis in axes)
        return dataclasses.replace(self, sizes=sizes, order=tuple(map(list(axes).index, self.order)))

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The array, with stacked axes first, in a dtype (by default `self.dtype`); computed in float32."""
        stored, lead = [self.sizes[axis] for axis in self.order], len(self.stack)
        rows = FORMATS[self.kind].values(self.parts, math.prod(stored[len(stored) - self.inner :]))
        back = (*range(lead), *(lead + int(axis) for axis in np.argsort(self.order)))
        return (
            rows.astype(self.dtype if dtype is None else dtype).reshape(*self.stack, *stored).transpose(back)
        )


def is_packed(value: Any) -> bool:
    """Detects a packed weight; an `is_leaf` for `jax.tree.map`.

    Returns:
      Whether `value` is a `PackedArray`.
    """
    return isinstance(value, PackedArray)


def is_from_qwix(value: Any) -> bool:
    """Whether a value is a quantized weight of qwix."""
    return hasattr(getattr(value, "array", None), "qvalue")


def dense_shapes(tree: Any) -> Any:
    """Replaces each packed weight in a tree by the shape of the array that it stands for.

    Returns:
      A tree like `tree` with a `jax.ShapeDtypeStruct` for each `PackedArray`; other leaves are the same.
    """
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if is_packed(x) else x  # noqa: E731
    return jax.tree.map(shape, tree, is_leaf=is_packed)


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

    `nf4` (arXiv 2305.14314, section 3): blocks of 64 inputs with 16 levels, and the blocks' largest magnitudes in 8
    bits around their mean, with a step for each group of 256: 4.127 bits a value. `int8`: one scale an output.

    Args:
      weight: array or numpy array (stacked..., axes of the weight...), floating.
      kind: the format.
      axes: one letter per axis of one layer's weight, as in `AdapterSpec`.
      embedding: whether it is a table of rows, `(num_embeddings, features)`, which is packed row by row.
      stacked: number of stacked axes, which lead.
      dtype: `dtype` of the result; by default the weight's.

    Returns:
      A `PackedArray` with the shape of `weight` and JAX arrays as parts.

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


def packed_shape(
    kind: FormatName, shape: Sequence[int], *, transposed: bool, stacked: int = 0, dtype: Any = jnp.float32
) -> PackedArray:
    """Describes a packed weight by shapes instead of arrays.

    Args:
      kind, stacked, dtype: as for `quantize`.
      shape: of the weight, with stacked axes first and then two.
      transposed: whether it is a kernel (columns, rows), or an embedding (rows, columns).

    Returns:
      A `PackedArray` with `jax.ShapeDtypeStruct` as parts.
    """
    lead, sizes = tuple(shape[:stacked]), tuple(shape[stacked:])
    rows, columns = sizes[::-1] if transposed else sizes
    if columns % FORMATS[kind].block:
        raise ValueError(f"{kind} packs {FORMATS[kind].block} values, which do not divide rows of {columns}")
    parts = {
        name: jax.ShapeDtypeStruct((*lead, *part.shape), part.dtype)
        for name, part in part_shapes(kind, rows, columns).items()
    }
    return PackedArray(parts, kind, sizes, (1, 0) if transposed else (0, 1), 1, jnp.dtype(dtype))


def storage_order(axes: str, *, embedding: bool = False) -> tuple[tuple[int, ...], int]:
    """The axes of a weight as they are stored, and how many of the last ones make up a row.

    >>> storage_order("ioo"), storage_order("io", embedding=True)
    (((1, 2, 0), 1), ((0, 1), 1))
    """
    row_roles = "o" if embedding else "i"
    inner = [n for n, role in enumerate(axes) if role == row_roles]
    return (*(n for n, role in enumerate(axes) if role != row_roles), *inner), len(inner)
