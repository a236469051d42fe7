"""Weights packed in 4 to 8 bits that stay packed on the device: nf4, int8, and the block formats of GGUF files.

Packing runs in NumPy on the host, unpacking in JAX where a layer uses the values.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FormatName = Literal["nf4", "int8", "q4_0", "q4_1", "q8_0", "q4_k", "q6_k"]
QuantizeTo = Literal["nf4", "int8"]

# arXiv 2305.14314, appendix E: quantiles of a normal distribution with an exact zero, scaled to [-1, 1].
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_NF4_BLOCK, _GROUP = 64, 256
_BYTES, _TINY = np.arange(256), np.finfo(np.float32).tiny


class Format(NamedTuple):
    """A packed format.

    Attributes:
      block: number of values that a row's length must divide into.
      pack: the parts of a matrix (rows, columns) of values; for a format of GGUF, of uint8 (rows, blocks, bytes).
      values: the values (..., rows, columns), float32, of parts and the number of columns.
    """

    block: int
    pack: Callable[[np.ndarray], dict[str, np.ndarray]]
    values: Callable[[Mapping[str, Any], int], jax.Array]


def pack_matrix(kind: FormatName, matrix: np.ndarray) -> dict[str, np.ndarray]:
    """The parts by name, `codes` and the scales, of floating values (rows, columns) or GGUF bytes (rows, bytes).

    Bytes are only sorted into parts, and keep their bits.
    """
    if size := BLOCK_BYTES.get(kind):
        matrix = matrix.reshape(len(matrix), -1, size)
    return FORMATS[kind].pack(matrix)


def part_shapes(kind: FormatName, rows: int, columns: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of the parts of a matrix (rows, columns), by the names of `pack_matrix`."""
    # A short row shows the shapes of any: a config.json may name sizes for which a whole row would not fit.
    sample = min(columns, 1024)
    size = sample // FORMATS[kind].block * BLOCK_BYTES.get(kind, 1)
    parts = pack_matrix(kind, np.zeros((1, size), np.uint8 if kind in BLOCK_BYTES else np.float32))

    def shape(part: np.ndarray) -> tuple[int, ...]:
        if part.ndim != 2 or part.shape[1] == 1:  # one scale for each row
            return (rows, 1) if part.ndim == 2 else part.shape
        return (rows, -(-columns * part.shape[1] // sample))

    shapes = {name: jax.ShapeDtypeStruct(shape(part), part.dtype) for name, part in parts.items()}
    if "steps" in shapes:
        groups = -(-math.prod(shapes["scales"].shape) // _GROUP)
        shapes["steps"] = jax.ShapeDtypeStruct((groups,), np.float32)
    return shapes


def packed_values(kind: FormatName, matrix: np.ndarray) -> np.ndarray:
    """The values that a matrix has once it is packed, float32; for a format of GGUF `matrix` itself."""
    if kind in BLOCK_BYTES:  # values from a GGUF file, where they were packed
        return matrix
    return np.array(FORMATS[kind].values(pack_matrix(kind, matrix), matrix.shape[1]))


def pack_codes(kind: FormatName, codes: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
    """Makes the parts of a weight from the codes and float scales of another library, every value the same.

    Args:
      kind: `nf4`, or `q4_0` and `int8` for integers.
      codes: (..., rows, columns), integers.
      scales: (..., rows, blocks), floating.

    Returns:
      A dict with `codes`, packed by twos except for `int8`, and the scales under `scales` or for `q4_0` under `d`.
    """
    if kind == "int8":
        return {"codes": codes.astype(np.int8), "scales": scales}
    bytes_ = (codes + 8 if kind == "q4_0" else codes).astype(np.uint8)
    return {"codes": _in_bytes(bytes_), "d" if kind == "q4_0" else "scales": scales}


def _in_bytes(codes: np.ndarray) -> np.ndarray:
    # Two codes a byte, of the two halves of each row: unpacking then concatenates instead of interleaving. An odd
    # row gets one more code.
    codes = np.pad(codes, (*((0, 0),) * (codes.ndim - 1), (0, codes.shape[-1] % 2)))
    low, high = np.split(codes, 2, axis=-1)
    return low | high << 4


def _of_bytes(codes: Any, levels: Sequence[float], columns: int) -> jax.Array:
    """The levels of the codes in bytes (..., rows, columns / 2)."""

    # On CPU one lookup for a byte and half is quickest; accelerators look nothing up without memory traffic.
    def by_table(codes: Any) -> jax.Array:
        index = codes.astype(jnp.int32)
        tables = (jnp.asarray(np.array(levels, np.float32)[half]) for half in (_BYTES & 15, _BYTES >> 4))
        return jnp.concatenate([table.at[index].get(mode="promise_in_bounds") for table in tables], -1)

    def by_bits(codes: Any) -> jax.Array:
        # Bytes are concatenated, not float32: where rows are split over devices, these send a part of it.
        halves = jnp.concatenate([codes & 15, codes >> 4], -1)
        return _select(halves.astype(jnp.int32), levels)

    return jax.lax.platform_dependent(codes, cpu=by_table, default=by_bits)[..., :columns]


def _select(codes: jax.Array, levels: Sequence[float]) -> jax.Array:
    # By four selections of half of what is left.
    if isinstance(levels, range):
        return codes.astype(jnp.float32) + levels.start
    values: list[Any] = [jnp.float32(level) for level in levels]
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _spread(scales: Any, columns: int, block: int | None = None) -> jax.Array:
    """Scales (..., rows, blocks) for every column, float32; `block` where the last one may be shorter."""
    each = columns // scales.shape[-1] if block is None else block
    return jnp.repeat(scales.astype(jnp.float32), each, axis=-1)[..., :columns]


def _nf4_block(columns: int) -> int:
    return min(_NF4_BLOCK, columns)


def _absmax(rows: np.ndarray, block: int) -> np.ndarray:
    """The largest magnitude of every block, (rows, blocks)."""
    starts = np.arange(0, rows.shape[1], block)
    absmax = [np.maximum.reduceat(np.abs(part), starts, axis=1) for part, _ in _pieces(rows, rows)]
    if not np.isfinite(found := np.concatenate(absmax)).all():
        raise ValueError("the weight has values that are not finite")
    return found


def _pieces(rows: np.ndarray, scales: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    # A few MiB at a time, since a float32 copy of all rows could take more memory than the weight itself.
    step = max(1, (1 << 20) // rows.shape[1])
    for start in range(0, len(rows), step):
        yield rows[start : start + step].astype(np.float32), scales[start : start + step]


def _pack_nf4(rows: np.ndarray) -> dict[str, np.ndarray]:
    columns = rows.shape[1]
    block = _nf4_block(columns)
    absmax = _absmax(rows, block)
    mean = absmax.mean(dtype=np.float64).astype(np.float32)
    offset = absmax.reshape(-1) - mean
    groups = np.pad(offset, (0, -offset.size % _GROUP)).reshape(-1, _GROUP)
    steps = np.maximum(np.abs(groups).max(-1) / 127, _TINY).astype(np.float32)
    scales = np.rint(groups / steps[:, None]).astype(np.int8).reshape(-1)[: offset.size].reshape(absmax.shape)
    parts = {"scales": scales, "steps": steps, "mean": mean}
    stored = np.maximum(np.asarray(_nf4_scales(parts, np)), _TINY)
    edges = np.convolve(np.array(NF4, np.float32), [0.5, 0.5], "valid").astype(np.float32)
    codes = [
        _in_bytes(
            np.searchsorted(edges, part / np.repeat(scale, block, axis=1)[:, :columns]).astype(np.uint8)
        )
        for part, scale in _pieces(rows, stored)
    ]
    return {"codes": np.concatenate(codes), **parts}


def _nf4_scales(parts: Mapping[str, Any], xp: Any) -> Any:
    # The largest magnitudes of blocks, (..., rows, blocks), from their 8 bits.
    scales, mean = parts["scales"], parts["mean"][..., None, None]
    steps = xp.repeat(parts["steps"], _GROUP, axis=-1)[..., : math.prod(scales.shape[-2:])]
    return xp.maximum(scales.astype(np.float32) * steps.reshape(scales.shape) + mean, 0)


def _nf4_values(p: Mapping[str, Any], columns: int) -> jax.Array:
    # Another library's scales are not quantized once more.
    scales = (
        _spread(_nf4_scales(p, jnp), columns, _nf4_block(columns))
        if "steps" in p
        else _spread(p["scales"], columns)
    )
    return _of_bytes(p["codes"], NF4, columns) * scales


def _pack_int8(rows: np.ndarray) -> dict[str, np.ndarray]:
    scales = np.maximum(_absmax(rows, rows.shape[1]) / 127, _TINY).astype(np.float32)
    codes = [np.rint(part / scale).astype(np.int8) for part, scale in _pieces(rows, scales)]
    return {"codes": np.concatenate(codes), "scales": scales}


# GGUF's blocks: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h


def _halves(data: np.ndarray, count: int) -> np.ndarray:
    # A byte of a block holds values `count` apart; the low 4 bits come first.
    data = data.reshape(*data.shape[:-1], -1, 1, count)
    return np.concatenate([data & 15, data >> 4], -2).reshape(len(data), -1)


def _half_floats(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).view("<f2")[..., 0]


def _pack_q4_0(blocks: np.ndarray) -> dict[str, np.ndarray]:
    return {"codes": _in_bytes(_halves(blocks[..., 2:], 16)), "d": _half_floats(blocks[..., :2])}


def _pack_q4_1(blocks: np.ndarray) -> dict[str, np.ndarray]:
    codes = _in_bytes(_halves(blocks[..., 4:], 16))
    return {"codes": codes, "d": _half_floats(blocks[..., :2]), "m": _half_floats(blocks[..., 2:4])}


def _pack_q8_0(blocks: np.ndarray) -> dict[str, np.ndarray]:
    codes = np.ascontiguousarray(blocks[..., 2:]).view(np.int8).reshape(len(blocks), -1)
    return {"codes": codes, "d": _half_floats(blocks[..., :2])}


def _pack_q4_k(blocks: np.ndarray) -> dict[str, np.ndarray]:
    # Twelve bytes hold the 6 bits of eight scales and eight minima.
    first, second, rest = np.split(blocks[..., 4:16], 3, axis=-1)
    scales = np.concatenate([first & 63, (rest & 15) | (first >> 6 << 4)], -1)
    mins = np.concatenate([second & 63, (rest >> 4) | (second >> 6 << 4)], -1)
    return {
        "codes": _in_bytes(_halves(blocks[..., 16:], 32)),
        "d": _half_floats(blocks[..., :2]),
        "dmin": _half_floats(blocks[..., 2:4]),
        "scales": scales.reshape(len(blocks), -1),
        "mins": mins.reshape(len(blocks), -1),
    }


def _pack_q6_k(blocks: np.ndarray) -> dict[str, np.ndarray]:
    low, high = blocks[..., :128], blocks[..., 128:192].reshape(*blocks.shape[:-1], 2, 1, 32)
    pairs = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], -2).reshape(len(blocks), -1)
    quarter = pairs.shape[1] // 4
    parts = [pairs[:, n * quarter : (n + 1) * quarter] << 2 * n for n in range(4)]
    return {
        "codes": _in_bytes(_halves(low, 64)),
        "high": parts[0] | parts[1] | parts[2] | parts[3],
        "scales": np.ascontiguousarray(blocks[..., 192:208]).view(np.int8).reshape(len(blocks), -1),
        "d": _half_floats(blocks[..., 208:]),
    }


def _q4_k_values(p: Mapping[str, Any], columns: int) -> jax.Array:
    scale, low = (
        _spread(p[d], columns // 32) * p[sixes].astype(jnp.float32)
        for d, sixes in (("d", "scales"), ("dmin", "mins"))
    )
    return _of_bytes(p["codes"], range(16), columns) * _spread(scale, columns) - _spread(low, columns)


def _q6_k_values(p: Mapping[str, Any], columns: int) -> jax.Array:
    high = jnp.concatenate([p["high"] >> shift & 3 for shift in (0, 2, 4, 6)], -1).astype(jnp.float32)
    codes = _of_bytes(p["codes"], range(16), columns) + (16 * high - 32)
    scale = _spread(p["d"], columns // 16) * p["scales"].astype(jnp.float32)
    return codes * _spread(scale, columns)


BLOCK_BYTES = {"q4_0": 18, "q4_1": 20, "q8_0": 34, "q4_k": 144, "q6_k": 210}
"""Bytes of a block in a GGUF file."""
FORMATS: Mapping[str, Format] = {
    "nf4": Format(1, _pack_nf4, _nf4_values),
    "int8": Format(1, _pack_int8, lambda p, n: p["codes"].astype(jnp.float32) * _spread(p["scales"], n)),
    "q4_0": Format(32, _pack_q4_0, lambda p, n: _of_bytes(p["codes"], range(-8, 8), n) * _spread(p["d"], n)),
    "q4_1": Format(
        32,
        _pack_q4_1,
        lambda p, n: _of_bytes(p["codes"], range(16), n) * _spread(p["d"], n) + _spread(p["m"], n),
    ),
    "q8_0": Format(32, _pack_q8_0, lambda p, n: p["codes"].astype(jnp.float32) * _spread(p["d"], n)),
    "q4_k": Format(256, _pack_q4_k, _q4_k_values),
    "q6_k": Format(256, _pack_q6_k, _q6_k_values),
}
"""The formats by name."""
