"""Causal attention within segments: XLA's, blocked over queries so that later keys are skipped, or a kernel's.

Axes in the comments: B sequences, T tokens, N query heads, K key heads, G = N / K, H head size, S keys in a chunk.
"""

import functools
import math
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from .._utils.validation import check_choice
from .attention_common import ATTENTION_NAMES, target_platform, token_mask
from .choices import Attention

# From here on blocked is faster on CPU (benchmarks/step_cost.py); it needs less memory on every device.
MIN_BLOCKED_LENGTH = 64
# From here on splash accesses fewer bytes than either (benchmarks/plans.py attention); not measured for cuDNN.
MIN_KERNEL_LENGTH = 128
# Minimum queries per block, and maximum number of blocks: each block is compiled separately.
MIN_BLOCK, MAX_BLOCKS = 64, 8
# Up to MAX_WHOLE_KEYS tokens a block reads all its keys at once, without a loop; beyond, KEY_CHUNK at a time.
MAX_WHOLE_KEYS, KEY_CHUNK = 2048, 512
KERNEL_PLATFORMS = {"splash": "tpu", "cudnn": "gpu"}
"""Maps each kernel to the platform that runs it."""
# Finite, so that exp(x - max) is 0 and never NaN.
_MASKED = -1e30


def causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    window: int | jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: Attention = "auto",
) -> jax.Array:
    """Softmax attention of every token to itself and to earlier tokens of its segment.

    Args:
      query: (B, T, N, H).
      key, value: (B, T, K, H), where K divides N: each key head serves N / K query heads.
      segment_ids: int32 (B, T), or None if each row is one segment.
      window: sliding window in tokens, including the token itself; None attends to all. An int32 scalar where it
        differs between the layers of a loop.
      scale: factor of the scores q·k; by default 1 / sqrt(H).
      softcap: c, for scores `c * tanh(x / c)` (arXiv 2408.00118, section 2).
      implementation: `"xla"` computes all T² scores at once; `"blocked"` skips keys that a block of queries cannot
        attend to and saves no probabilities for the backward pass (arXiv 2205.14135), so memory grows with T, not
        T²; keys outside a window that is an array are masked, not skipped. `"splash"` is JAX's Pallas kernel for
        TPUs and `"cudnn"` the kernel for NVIDIA GPUs; neither takes a window that is an array. `"auto"` uses the
        platform's kernel from 128 tokens on if it supports the inputs; otherwise blocked from 64 tokens on, and
        xla below. Kernels run on each device's rows and heads, so with several devices auto uses them only on an
        ambient mesh, as `jit_step` sets it, under `pmap` and in `shard_map`.

    Returns:
      (B, T, N, H) in the query's dtype; scores and softmax are float32.

    Raises:
      ValueError: shapes are incompatible, the implementation is unknown, or it does not support the inputs.
    """
    check_choice("attention", implementation, get_args(Attention))
    if key.shape != value.shape or query.shape[2] % key.shape[2] or query.shape[1] != key.shape[1]:
        raise ValueError(
            f"key {key.shape} and value {value.shape} do not fit query {query.shape}; "
            "both must be (batch, tokens, key heads, head size), and key heads must divide query heads"
        )
    length = query.shape[1]
    options: Any = {
        "window": window,
        "scale": _default_scale(query) if scale is None else scale,
        "softcap": softcap,
    }
    if implementation == "auto":
        ours = "blocked" if length >= MIN_BLOCKED_LENGTH else "xla"
        attend = functools.partial(causal_attention, **options)
        kernels = {
            platform: functools.partial(attend, implementation=kernel)
            for platform, kernel in _kernels(query, window, softcap).items()
        }
        default = functools.partial(attend, implementation=ours)
        if not kernels:
            return default(query, key, value, segment_ids)
        # A program of a machine with accelerators may be for its CPU.
        return jax.lax.platform_dependent(query, key, value, segment_ids, default=default, **kernels)
    if implementation in KERNEL_PLATFORMS:
        # Here, as importing Pallas takes a while.
        from .attention_kernels import KERNELS, map_over_mesh

        kernel = functools.partial(KERNELS[implementation], **options)
        return map_over_mesh(kernel, query, key, value, segment_ids)
    if implementation == "xla":
        mask = token_mask(segment_ids, length, window)
        y = masked_attention(query, key, value, mask, scale=scale, softcap=softcap)
        return checkpoint_name(y, ATTENTION_NAMES[0])
    block = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    chunk = length if length <= MAX_WHOLE_KEYS else KEY_CHUNK
    reach = window if isinstance(window, int) else None
    blocks = _Blocks(block, chunk, reach, options["scale"], softcap)
    return _blocked(query, key, value, segment_ids, window, blocks)


def _kernels(query: jax.Array, window: int | jax.Array | None, softcap: float | None) -> dict[str, Any]:
    """The kernel that `"auto"` uses, by its platform; empty without one."""
    mesh = jax.sharding.get_abstract_mesh()
    platform = target_platform()
    # GSPMD cannot partition a kernel, and without a mesh, this program may be partitioned.
    is_opaque = jax.device_count() > 1 if mesh.empty else jax.sharding.AxisType.Explicit in mesh.axis_types
    if platform == "cpu" or is_opaque or query.shape[1] < MIN_KERNEL_LENGTH:
        return {}
    from .attention_kernels import choose_kernel

    return choose_kernel(platform, query, window, softcap)


def masked_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Attention of tokens (B, T, N, H) to keys and values (B, S, K, H) where a mask (B or 1, T, S) is true.

    `scale` and `softcap` as for `causal_attention`.
    """
    if softcap is not None:
        return head_major_attention(query, _rows(key, 1), _rows(value, 1), mask, scale=scale, softcap=softcap)
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None], scale=scale)


def head_major_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """`masked_attention` for keys and values (B, K, S, H), which products read without a transposed copy."""
    # A cache may have another dtype than the queries.
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    groups = query.shape[2] // key.shape[1]
    scores = _dot("bkrh,bksh->bkrs", _rows(query, groups), key)
    scores = scores * (_default_scale(query) if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    rows = jnp.repeat(mask, groups, axis=1)[:, None]
    weights = jax.nn.softmax(jnp.where(rows, scores, _MASKED), axis=-1)
    return _heads(_dot("bkrs,bksh->bkrh", weights.astype(value.dtype), value).astype(query.dtype), groups)


class _Blocks(NamedTuple):
    """Queries per block, keys per chunk, the furthest that any query reaches back, and the form of the scores."""

    size: int
    chunk: int
    reach: int | None
    scale: float
    softcap: float | None

    def spans(self, length: int) -> list[tuple[int, int, int]]:
        """Start and stop query of each block, and the first key that any of its queries attends to."""
        starts = range(0, length, self.size)
        first = [0 if self.reach is None else max(0, start - self.reach + 1) for start in starts]
        return [
            (start, min(start + self.size, length), key) for start, key in zip(starts, first, strict=True)
        ]

    def chunks(self, span: tuple[int, int, int]) -> tuple[range, int]:
        """Start of each chunk of keys that a block attends to, and keys per chunk."""
        _, stop, first = span
        size = min(self.chunk, stop - first)
        return range(first, stop, size), size

    def pad_keys(self, x: jax.Array) -> jax.Array:
        """Pads (B, K, T, H) so that a block's last chunk may reach past the end; padded keys are masked."""
        extra = self.chunk if x.shape[2] > self.chunk else 0
        return jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0))) if extra else x

    def mask(
        self,
        segment_ids: jax.Array | None,
        window: Any,
        span: tuple[int, int, int],
        at: Any,
        size: int,
        groups: int,
    ) -> jax.Array:
        """Boolean (B or 1, 1, t * G, S) for a block of t queries and `size` keys from `at`."""
        start, stop, _ = span
        rows = jnp.repeat(jnp.arange(start, stop), groups)[:, None]
        columns = at + jnp.arange(size)[None, :]
        mask = columns <= rows
        if window is not None:
            mask &= rows - columns < window
        mask = mask[None, None]
        if segment_ids is None:
            return mask
        query_segments = jnp.repeat(segment_ids[:, start:stop], groups, axis=1)
        key_segments = self.pad_keys(segment_ids[:, None, :, None])[:, 0, :, 0]
        key_segments = jax.lax.dynamic_slice_in_dim(key_segments, at, size, axis=1)
        return mask & (query_segments[:, None, :, None] == key_segments[:, None, None, :])


# JAX's own gradient would save every block's probabilities, so of the square of the length.
@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blocked(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    window: Any,
    blocks: _Blocks,
) -> jax.Array:
    return _forward(query, key, value, segment_ids, window, blocks)[0]


def _forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    window: Any,
    blocks: _Blocks,
) -> tuple[jax.Array, tuple]:
    groups = query.shape[2] // key.shape[2]
    q, k, v = _rows(query, groups), _rows(key, 1), _rows(value, 1)
    long_k, long_v = blocks.pad_keys(k), blocks.pad_keys(v)
    outs, norms = [], []
    for span in blocks.spans(query.shape[1]):
        starts, size = blocks.chunks(span)

        def part(at: Any, span: Any = span, size: int = size) -> tuple[jax.Array, jax.Array, jax.Array]:
            scores = _scores(q, long_k, segment_ids, window, blocks, span, at, size, groups)
            top = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            return top, total, _dot("bkrs,bksh->bkrh", weights.astype(v.dtype), _slice(long_v, at, size))

        # The first chunk makes the loop's first state, so that no row begins with a maximum of -inf.
        state = part(starts[0])
        if len(starts) > 1:
            rest = jnp.array(starts[1:])
            state = jax.lax.scan(lambda s, at, part=part: (_merge_chunks(s, part(at)), None), state, rest)[0]
        top, total, out = state
        outs.append((out / total).astype(query.dtype))
        # One number a row, of which the backward pass makes probabilities without a second maximum.
        norms.append(top + jnp.log(total))
    out = checkpoint_name(jnp.concatenate(outs, axis=2), ATTENTION_NAMES[0])
    norm = checkpoint_name(jnp.concatenate(norms, axis=2), ATTENTION_NAMES[1])
    return _heads(out, groups), (q, k, v, segment_ids, window, out, norm)


def _merge_chunks(left: tuple, right: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Merges maximum score, sum and weighted values of two chunks of keys (arXiv 2205.14135, algorithm 1)."""
    top = jnp.maximum(left[0], right[0])
    total, out = (
        x * jnp.exp(left[0] - top) + y * jnp.exp(right[0] - top)
        for x, y in zip(left[1:], right[1:], strict=True)
    )
    return top, total, out


def _backward(blocks: _Blocks, saved: tuple, gradient: jax.Array) -> tuple:
    """Backward pass: recomputes each block's scores and reuses the saved norm (arXiv 2205.14135, section 3.1)."""
    q, k, v, segment_ids, window, out, norm = saved
    groups, length = q.shape[2] // k.shape[2], k.shape[2]
    d_out = _rows(gradient, groups)
    # The sum of P dP over the keys, without the keys (arXiv 2205.14135, appendix B.2).
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    long_k, long_v = blocks.pad_keys(k), blocks.pad_keys(v)
    d_q, d_k, d_v = [], jnp.zeros(long_k.shape, jnp.float32), jnp.zeros(long_v.shape, jnp.float32)
    for span in blocks.spans(length):
        rows = slice(span[0] * groups, span[1] * groups)
        starts, size = blocks.chunks(span)

        def add(sums: tuple, at: Any, span: Any = span, rows: slice = rows, size: int = size) -> tuple:
            scores = _scores(q, long_k, segment_ids, window, blocks, span, at, size, groups)
            probs = jnp.exp(scores - norm[:, :, rows])
            d_probs = _dot("bkrh,bksh->bkrs", d_out[:, :, rows], _slice(long_v, at, size))
            d_scores = probs * (d_probs - inner[:, :, rows])
            # The slope of c tanh(x / c); masked scores are below -c.
            if blocks.softcap is not None:
                d_scores *= 1 - jnp.square(jnp.maximum(scores / blocks.softcap, -1))
            d_scores = (d_scores * blocks.scale).astype(q.dtype)
            of_q, of_k, of_v = sums
            of_q += _dot("bkrs,bksh->bkrh", d_scores, _slice(long_k, at, size))
            of_k = _add_at(of_k, at, _dot("bkrs,bkrh->bksh", d_scores, q[:, :, rows]))
            of_v = _add_at(of_v, at, _dot("bkrs,bkrh->bksh", probs.astype(v.dtype), d_out[:, :, rows]))
            return of_q, of_k, of_v

        sums = add((jnp.zeros(q[:, :, rows].shape, jnp.float32), d_k, d_v), starts[0])
        if len(starts) > 1:
            sums = jax.lax.scan(lambda s, at, add=add: (add(s, at), None), sums, jnp.array(starts[1:]))[0]
        of_q, d_k, d_v = sums
        d_q.append(of_q.astype(q.dtype))
    d_key, d_value = (_heads(x[:, :, :length].astype(k.dtype), 1) for x in (d_k, d_v))
    return _heads(jnp.concatenate(d_q, axis=2), groups), d_key, d_value, None, None


_blocked.defvjp(_forward, _backward)


def _scores(
    q: jax.Array,
    k: jax.Array,
    segment_ids: jax.Array | None,
    window: Any,
    blocks: _Blocks,
    span: tuple[int, int, int],
    at: Any,
    size: int,
    groups: int,
) -> jax.Array:
    """Scores of a block's queries and a chunk's keys, float32 (B, K, t * G, S), large and negative where masked."""
    start, stop, _ = span
    scores = _dot("bkrh,bksh->bkrs", q[:, :, start * groups : stop * groups], _slice(k, at, size))
    scores *= blocks.scale
    if blocks.softcap is not None:
        scores = blocks.softcap * jnp.tanh(scores / blocks.softcap)
    return jnp.where(blocks.mask(segment_ids, window, span, at, size, groups), scores, _MASKED)


def _slice(x: jax.Array, at: Any, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, at, size, axis=2)


def _add_at(x: jax.Array, at: Any, part: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, _slice(x, at, part.shape[2]) + part, at, axis=2)


def _dot(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    # XLA would otherwise round sums of bfloat16 products to bfloat16.
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


def _default_scale(query: jax.Array) -> float:
    return 1.0 / math.sqrt(query.shape[-1])


def _rows(x: jax.Array, groups: int) -> jax.Array:
    """(B, T, K * G, H) to (B, K, T * G, H), so that a block of tokens is a contiguous block of rows."""
    batch, length, heads, size = x.shape
    x = x.reshape(batch, length, heads // groups, groups, size)
    return x.transpose(0, 2, 1, 3, 4).reshape(batch, heads // groups, length * groups, size)


# The inverse of `_rows`.
def _heads(x: jax.Array, groups: int) -> jax.Array:
    batch, heads, rows, size = x.shape
    x = x.reshape(batch, heads, rows // groups, groups, size).transpose(0, 2, 1, 3, 4)
    return x.reshape(batch, rows // groups, heads * groups, size)
