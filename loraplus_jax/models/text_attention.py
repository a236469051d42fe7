"""Attention from every token to all tokens of its text.

Axes in the comments: B rows, T tokens, N heads, H head size, S keys.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from .attention_common import target_platform

# Finite, so that exp(x - max) is 0 and never NaN.
_MASKED = -1e30


def text_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    *,
    window: int | None = None,
    drop: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Softmax attention of every token to the tokens of the same text, itself included.

    Args:
      query, key, value: (B, T, N, H).
      segments: int (B, T), the number of each token's text in its row; padding is a text of its own.
      window: the most tokens between two that attend to each other; None for all of the text.
      drop: dropout of the probabilities (B, N, T, T).

    Returns:
      (B, T, N, H) in the dtype of `value`; scores and softmax are float32.
    """
    if drop is not None:
        return _attend(query, key, value, text_mask(segments, window)[:, None], drop)
    # XLA on CPU makes several slow passes over the probabilities and keeps them for the backward pass.
    if target_platform() == "cpu":
        return _recomputed(window, query, key, value, segments)
    return jax.nn.dot_product_attention(query, key, value, mask=text_mask(segments, window)[:, None])


def text_mask(segments: jax.Array, window: int | None = None) -> jax.Array:
    """Boolean (B, T, T): whether two tokens are of the same text, and not further apart than the window.

    >>> text_mask(jnp.array([[1, 1, 0]]))[0].astype(int).tolist()
    [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """
    mask = segments[:, :, None] == segments[:, None, :]
    if window is None:
        return mask
    index = jnp.arange(segments.shape[1])
    return mask & (jnp.abs(index[:, None] - index[None, :]) <= window)[None]


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    drop: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    scores = jnp.einsum("BTNH,BSNH->BNTS", query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores * _scale(query), jnp.finfo(jnp.float32).min)
    weights = drop(jax.nn.softmax(scores, axis=-1)).astype(value.dtype)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recomputed(
    window: int | None, query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array
) -> jax.Array:
    return _forward(window, query, key, value, segments)[0]


def _forward(
    window: int | None, query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array
) -> tuple[jax.Array, tuple]:
    q, k, v = map(_head_major, (query, key, value))
    scores = _scores(q, k, segments, window)
    top = jnp.max(scores, axis=2, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=2, keepdims=True)
    out = jnp.einsum("BNST,BNSH->BNTH", weights, v) / jnp.swapaxes(total, 2, 3)
    out = _token_major(out, value.dtype)
    # One number a query, of which the backward pass makes probabilities without a second maximum.
    return out, (query, key, value, segments, out, top + jnp.log(total))


def _backward(window: int | None, saved: tuple, gradient: jax.Array) -> tuple:
    """Recomputes the probabilities (arXiv 2205.14135, section 3.1)."""
    *qkv, segments, out, norm = saved
    q, k, v, out, d_out = map(_head_major, (*qkv, out, gradient))
    probs = jnp.exp(_scores(q, k, segments, window) - norm)
    # The sum of P dP over the keys, without the keys (arXiv 2205.14135, appendix B.2).
    inner = jnp.sum(d_out * out, axis=-1)[:, :, None, :]
    d_scores = probs * (jnp.einsum("BNSH,BNTH->BNST", v, d_out) - inner)
    d_query = jnp.einsum("BNST,BNSH->BNTH", d_scores, k) * _scale(q)
    d_key = jnp.einsum("BNST,BNTH->BNSH", d_scores, q * _scale(q))
    d_value = jnp.einsum("BNST,BNTH->BNSH", probs, d_out)
    gradients = zip((d_query, d_key, d_value), qkv, strict=True)
    return *(_token_major(x, like.dtype) for x, like in gradients), None


_recomputed.defvjp(_forward, _backward)


def _scores(q: jax.Array, k: jax.Array, segments: jax.Array, window: int | None) -> jax.Array:
    """Scores (B, N, S, T), large and negative where masked."""
    # The keys first: XLA on CPU vectorizes a maximum over rows, but not one over columns.
    scores = jnp.einsum("BNSH,BNTH->BNST", k, q * _scale(q))
    return jnp.where(text_mask(segments, window)[:, None], scores, _MASKED)


def _scale(q: jax.Array) -> float:
    return 1 / math.sqrt(q.shape[-1])


def _head_major(x: jax.Array) -> jax.Array:
    """(B, T, N, H) to (B, N, T, H), in float32 or wider: products of bfloat16 are not faster on a CPU."""
    return jnp.swapaxes(x, 1, 2).astype(jnp.promote_types(x.dtype, jnp.float32))


def _token_major(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.swapaxes(x, 1, 2).astype(dtype)
