"""Adapters on parts of a PyTorch module: one adapter on the module, and back.

Let A_i (r_i, in) and B_i (out_i, r_i) be the factors of some of a module's outputs each.
In the module's A all A_i lie one below the other.
In its B each B_i lies in the rows of its outputs and the columns of its components; the rest of B is 0.
The function is the same.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .path_map import Outputs

Factors = tuple[np.ndarray, ...]
"""A (r, in), B (out, r), and with DoRA the magnitudes (out,)."""


class Part(NamedTuple):
    """The adapter of a part.

    Attributes:
      outputs: its outputs in the module.
      factors: its factors.
      scale: their scale s.
    """

    outputs: Outputs
    factors: Factors
    scale: float


def fuse(parts: Sequence[Part], scale: float) -> Factors:
    """Makes one adapter for a module from those of its parts; a part's own scale, if it differs, goes into its B.

    Returns:
      A (r, in) and B (out, r) in A's dtype, and with DoRA the magnitudes (out,). r is the sum of the parts' ranks,
      and out the number of the module's outputs.

    Raises:
      ValueError: the parts have magnitudes, but are not all of the module.

    Example:
      >>> q = Part(Outputs(0, 1, 2), (np.array([[1.0, 2.0]]), np.array([[3.0]])), 2.0)
      >>> v = Part(Outputs(1, 2, 2), (np.array([[4.0, 5.0]]), np.array([[6.0]])), 1.0)
      >>> for factor in fuse([q, v], 2.0):
      ...     print(factor)
      [[1. 2.]
       [4. 5.]]
      [[3. 0.]
       [0. 3.]]
    """
    parts = sorted(parts, key=lambda part: part.outputs)
    size = parts[0].outputs.size
    a = np.concatenate([part.factors[0] for part in parts])
    b, first = np.zeros((size, len(a)), a.dtype), 0
    for part in parts:
        last = first + len(part.factors[0])
        b[part.outputs.rows, first:last] = part.factors[1] * (part.scale / scale)
        first = last
    magnitudes = [part.factors[2] for part in parts if len(part.factors) > 2]
    if not magnitudes:
        return a, b
    if sum(map(len, magnitudes)) != size:
        raise ValueError(
            "PEFT needs the magnitudes of DoRA for all outputs of a module or none: adapt all its parts, or merge "
            "the adapter instead"
        )
    return a, b, np.concatenate(magnitudes)


def split(factors: Factors, parts: Sequence[tuple[Outputs, int]]) -> list[Factors]:
    """Splits the adapter of a module into those of its parts; the inverse of `fuse` but for the scales.

    `parts` are the outputs and highest rank of each part.

    If the ranks add up to the module's, each part gets its own components. Otherwise it gets all, as of an adapter
    made for the whole module, or those that it uses if they are too many.

    Returns:
      The factors of each part, in the order of `parts`: A (r, in) and B (out, r), and with DoRA the magnitudes
      (out,). out is the number of the part's outputs, and r at most its rank.

    Raises:
      ValueError: the shapes do not fit the outputs, or a part uses more components than its rank, or one of another
        part, or B is not 0 for other outputs.
    """
    a, b, *magnitudes = factors
    size = parts[0][0].size
    for factor, shape in zip((b, *magnitudes), ((size, len(a)), (size,)), strict=False):
        if factor.shape != shape:
            raise ValueError(f"B and magnitudes must be for {size} outputs, {shape}, got {factor.shape}")
    first, unused, result = 0, b != 0, {}
    for outputs, rank in sorted(parts):
        rows = b[outputs.rows]
        components = np.arange(len(a))
        if sum(rank for _, rank in parts) == len(a):
            components = components[first : first + rank]
        elif len(a) > rank:
            components = np.flatnonzero(rows.any(0))[:rank]
            components = components if len(components) else np.arange(1)
        first += rank
        unused[outputs.rows, components] = False
        result[outputs] = a[components], rows[:, components], *(m[outputs.rows] for m in magnitudes)
    if unused.any():
        ranges = ", ".join(
            f"{outputs.start}:{outputs.stop} with rank {rank}" for outputs, rank in sorted(parts)
        )
        raise ValueError(
            f"it has rank {len(a)} for {size} outputs, and the model has adapters for {ranges}, which are too few: "
            f"adapt all parts with rank {len(a)}"
        )
    return [result[outputs] for outputs, _ in parts]
