"""Causal attention within segments, whole or in blocks of queries that never see later keys.

Axes in the comments: B sequences, T tokens, N query heads, K key heads, G = N / K, H head size, S keys of a block.
"""

import functools
import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

Attention = Literal["auto", "xla", "blocked"]

# Blocked is quicker and smaller on a CPU from here on (benchmarks/step_time.py), and smaller everywhere.
LONG = 256
# Queries of a block: at least so many, and at most so many blocks, each of which is compiled for itself.
LEAST_BLOCK, MOST_BLOCKS = 64, 8
ATTENTION_NAMES = ("attention", "attention_norm")
"""What a remat policy should keep by name, so that attention is not computed again for the gradient."""
_MASKED = -1e30  # finite, so that exp(x - max) is 0 and never NaN


def causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    window: int | None = None,
    implementation: Attention = "auto",
) -> jax.Array:
    """Softmax attention of every token to itself and to earlier tokens of its segment.

    Args:
      query: (B, T, N, H).
      key, value: (B, T, K, H), where K divides N: each serves N / K query heads.
      segment_ids: int32 (B, T), or None where each row is one segment.
      window: how many tokens are seen at most, the token itself included; None for all.
      implementation: `"xla"` is `jax.nn.dot_product_attention`; `"blocked"` skips the keys that a block of queries
        cannot see and keeps no probabilities for the gradient (arXiv 2205.14135), so that memory grows with T and
        not with T²; `"auto"` takes blocked from 256 tokens on.

    Returns:
      (B, T, N, H) in the query's dtype; scores and softmax are float32.

    Raises:
      ValueError: shapes do not fit, or an unknown implementation.
    """
    if implementation not in get_args(Attention):
        raise ValueError(f"attention must be one of {', '.join(get_args(Attention))}, got {implementation!r}")
    if key.shape != value.shape or query.shape[2] % key.shape[2] or query.shape[1] != key.shape[1]:
        raise ValueError(f"query {query.shape} does not go with key {key.shape} and value {value.shape}")
    length = query.shape[1]
    if implementation == "xla" or (implementation == "auto" and length < LONG):
        y = jax.nn.dot_product_attention(
            query, key, value, mask=_whole_mask(segment_ids, length, window), is_causal=True
        )
        return checkpoint_name(y, ATTENTION_NAMES[0])
    block = max(LEAST_BLOCK, -(-length // MOST_BLOCKS))
    return _blocked(query, key, value, segment_ids, _Blocks(block, window))


def cached_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention of new tokens (B, T, N, H) to a cache of keys and values (B, S, K, H); the mask is (B, T, S)."""
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])


def _whole_mask(segment_ids: jax.Array | None, length: int, window: int | None) -> jax.Array | None:
    """What a mask has to say beside causality: boolean (B or 1, 1, T, T), or nothing."""
    same = None if segment_ids is None else segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    if window is None or window >= length:
        return same
    index = jnp.arange(length)
    near = (index[:, None] - index[None, :] < window)[None, None]
    return near if same is None else same & near


class _Blocks(NamedTuple):
    """Queries a block, and the window."""

    size: int
    window: int | None

    def spans(self, length: int) -> list[tuple[int, int, int]]:
        """First and last query of each block (the last exclusive), and the first key that any of them sees."""
        starts = range(0, length, self.size)
        first = [0 if self.window is None else max(0, start - self.window + 1) for start in starts]
        return [
            (start, min(start + self.size, length), key) for start, key in zip(starts, first, strict=True)
        ]

    def mask(self, segment_ids: jax.Array | None, span: tuple[int, int, int], groups: int) -> jax.Array:
        """Boolean (B or 1, 1, t * G, S) for a block of t queries."""
        start, stop, first = span
        rows = jnp.repeat(jnp.arange(start, stop), groups)[:, None]
        columns = jnp.arange(first, stop)[None, :]
        seen = columns <= rows
        if self.window is not None:
            seen &= rows - columns < self.window
        seen = seen[None, None]
        if segment_ids is None:
            return seen
        of_rows = jnp.repeat(segment_ids[:, start:stop], groups, axis=1)
        return seen & (of_rows[:, None, :, None] == segment_ids[:, None, None, first:stop])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocked(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array | None, blocks: _Blocks
) -> jax.Array:
    return _forward(query, key, value, segment_ids, blocks)[0]


def _forward(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array | None, blocks: _Blocks
) -> tuple[jax.Array, tuple]:
    groups = query.shape[2] // key.shape[2]
    q, k, v = _rows(query, groups), _rows(key, 1), _rows(value, 1)
    outs, norms = [], []
    for span in blocks.spans(query.shape[1]):
        _, stop, first = span
        scores = _scores(q, k, segment_ids, blocks, span, groups)
        top = jnp.max(scores, axis=-1, keepdims=True)
        shares = jnp.exp(scores - top)
        total = jnp.sum(shares, axis=-1, keepdims=True)
        out = _dot("bkrs,bksh->bkrh", shares.astype(v.dtype), v[:, :, first:stop]) / total
        outs.append(out.astype(query.dtype))
        norms.append(top + jnp.log(total))
    out = checkpoint_name(jnp.concatenate(outs, axis=2), ATTENTION_NAMES[0])
    norm = checkpoint_name(jnp.concatenate(norms, axis=2), ATTENTION_NAMES[1])
    return _heads(out, groups), (q, k, v, segment_ids, out, norm)


def _backward(blocks: _Blocks, saved: tuple, gradient: jax.Array) -> tuple:
    """arXiv 2205.14135, section 3.1: the scores of a block are computed again, from the norm that was kept."""
    q, k, v, segment_ids, out, norm = saved
    groups = q.shape[2] // k.shape[2]
    d_out = _rows(gradient, groups)
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    d_q, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for span in blocks.spans(k.shape[2]):
        start, stop, first = span
        rows = slice(start * groups, stop * groups)
        shares = jnp.exp(_scores(q, k, segment_ids, blocks, span, groups) - norm[:, :, rows])
        d_shares = _dot("bkrh,bksh->bkrs", d_out[:, :, rows], v[:, :, first:stop])
        d_scores = (shares * (d_shares - inner[:, :, rows]) * _scale(q)).astype(q.dtype)
        d_q.append(_dot("bkrs,bksh->bkrh", d_scores, k[:, :, first:stop]).astype(q.dtype))
        seen = (slice(None), slice(None), slice(first, stop))
        d_k = d_k.at[seen].add(_dot("bkrs,bkrh->bksh", d_scores, q[:, :, rows]))
        d_v = d_v.at[seen].add(_dot("bkrs,bkrh->bksh", shares.astype(v.dtype), d_out[:, :, rows]))
    d_key, d_value = _heads(d_k.astype(k.dtype), 1), _heads(d_v.astype(v.dtype), 1)
    return _heads(jnp.concatenate(d_q, axis=2), groups), d_key, d_value, None


_blocked.defvjp(_forward, _backward)


def _scores(
    q: jax.Array,
    k: jax.Array,
    segment_ids: jax.Array | None,
    blocks: _Blocks,
    span: tuple[int, int, int],
    groups: int,
) -> jax.Array:
    """Float32 (B, K, t * G, S), very negative where the mask is off."""
    start, stop, first = span
    scores = _dot("bkrh,bksh->bkrs", q[:, :, start * groups : stop * groups], k[:, :, first:stop])
    return jnp.where(blocks.mask(segment_ids, span, groups), scores * _scale(q), _MASKED)


def _dot(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


def _scale(q: jax.Array) -> float:
    return 1.0 / math.sqrt(q.shape[-1])


def _rows(x: jax.Array, groups: int) -> jax.Array:
    """(B, T, K * G, H) to (B, K, T * G, H): a block of tokens is a block of rows, all heads of a key together."""
    batch, length, heads, size = x.shape
    x = x.reshape(batch, length, heads // groups, groups, size)
    return x.transpose(0, 2, 1, 3, 4).reshape(batch, heads // groups, length * groups, size)


def _heads(x: jax.Array, groups: int) -> jax.Array:
    """The inverse of `_rows`."""
    batch, heads, rows, size = x.shape
    x = x.reshape(batch, heads, rows // groups, groups, size).transpose(0, 2, 1, 3, 4)
    return x.reshape(batch, rows // groups, heads * groups, size)
