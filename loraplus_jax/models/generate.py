"""Text from a `Llama`, token by token with a cache: greedy, or sampled by temperature and nucleus."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .._validation import check_int, check_number
from .llama import init_cache
from .llama_config import LlamaConfig

Generate = Callable[..., jax.Array]
"""`generate(variables, input_ids, segment_ids, sampling, keys) -> tokens`, see `make_generate`."""

PAD_AFTER_END, NONFINITE_LOGITS = -1, -2
"""What stands in place of tokens after a sequence's end, and of the token where the scores are not finite."""


class Sampling(NamedTuple):
    """How the next token is chosen; values, not constants: others need no new compilation.

    Attributes:
      temperature: logits are divided by it; 0 takes the likeliest token.
      top_p: draws are from the fewest likeliest tokens whose probabilities sum to so much (arXiv 1904.09751).
    """

    temperature: float | jax.Array = 0.0
    top_p: float | jax.Array = 1.0


def check_sampling(sampling: Sampling) -> None:
    """Raises ValueError unless the temperature is 0 or more and top_p in (0, 1]."""
    check_number("temperature", sampling.temperature, at_least=0.0)
    check_number("top_p", sampling.top_p, above=0.0)
    if sampling.top_p > 1:
        raise ValueError(f"top_p must be at most 1, got {sampling.top_p}")


def make_generate(
    model: nn.Module, config: LlamaConfig, *, new_tokens: int, stop: Sequence[int], dtype: Any = jnp.float32
) -> Generate:
    """Compiled generation, once for each shape of prompts.

    Args:
      model: a `Llama`, with adapters or without.
      config: its config.
      new_tokens: how many tokens at most; all sequences having ended ends it earlier.
      stop: the ids that end a sequence.
      dtype: of the cache.

    Returns:
      `generate(variables, input_ids, segment_ids, sampling, keys)`, for prompts int32 (B, T) padded on the left,
      with `segment_ids` 1 on tokens and 0 on padding, as `pad_left` makes them, and a key for each (B,). It
      gives int32 (B, new_tokens): tokens up to and including one of `stop`, or `NONFINITE_LOGITS`, then
      `PAD_AFTER_END`. A row's tokens depend on its prompt and its key, and not on the other rows; but with rotary
      positions of the kind `dynamic` also on the longest of them, as in transformers.

    Raises:
      ValueError: `new_tokens` below 1.
    """
    check_int("new_tokens", new_tokens, at_least=1)
    stops = jnp.array(list(stop), jnp.int32)

    @jax.jit
    def generate(
        variables: Any, input_ids: jax.Array, segment_ids: jax.Array, sampling: Sampling, keys: jax.Array
    ) -> jax.Array:
        rows, length = input_ids.shape
        extend = functools.partial(model.apply, variables, method="extend")
        cache = init_cache(config, rows, length + new_tokens, dtype)
        logits, cache = extend(input_ids, segment_ids, cache, first=True)
        ones = jnp.ones((rows, 1), jnp.int32)

        def choose(logits: jax.Array, done: jax.Array, i: Any) -> tuple[jax.Array, jax.Array]:
            token = _next(logits, sampling, jax.vmap(jax.random.fold_in, (0, None))(keys, i))
            broken = ~jnp.all(jnp.isfinite(logits), axis=-1)
            token = jnp.where(broken, NONFINITE_LOGITS, token)
            return jnp.where(done, PAD_AFTER_END, token), done | broken | jnp.isin(token, stops)

        def unfinished(carry: tuple) -> jax.Array:
            i, done = carry[0], carry[1]
            return (i < new_tokens) & ~jnp.all(done)

        def step(carry: tuple) -> tuple:
            i, done, tokens, cache = carry
            last = jnp.maximum(jax.lax.dynamic_slice_in_dim(tokens, i - 1, 1, axis=1), 0)
            logits, cache = extend(last, ones, cache, first=False)
            token, done = choose(logits, done, i)
            tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], i, axis=1)
            return i + 1, done, tokens, cache

        tokens = jnp.full((rows, new_tokens), PAD_AFTER_END, jnp.int32)
        token, done = choose(logits, jnp.zeros(rows, bool), 0)
        carry = (jnp.int32(1), done, tokens.at[:, 0].set(token), cache)
        return jax.lax.while_loop(unfinished, step, carry)[2]

    return generate


def pad_left(prompts: Sequence[Sequence[int]], *, multiple: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of B token lists as `input_ids` and `segment_ids` (B, T), T the next multiple that holds the longest.

    >>> ids, segments = pad_left([[5, 6, 7], [8]], multiple=4)
    >>> ids.tolist(), segments.tolist()
    ([[0, 5, 6, 7], [0, 0, 0, 8]], [[0, 1, 1, 1], [0, 0, 0, 1]])
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("there must be a prompt, and none without tokens")
    length = -(-max(map(len, prompts)) // multiple) * multiple
    ids = np.zeros((len(prompts), length), np.int32)
    segments = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt
        segments[row, length - len(prompt) :] = 1
    return ids, segments


def _next(logits: jax.Array, sampling: Sampling, keys: jax.Array) -> jax.Array:
    """Each row's next token, int32 (B,), from logits (B, V) and the rows' keys."""

    def sampled() -> jax.Array:
        scaled = logits / jnp.maximum(sampling.temperature, 1e-6)
        return jax.vmap(jax.random.categorical)(keys, _nucleus(scaled, sampling.top_p))

    likeliest = functools.partial(jnp.argmax, logits, axis=-1)
    return jax.lax.cond(sampling.temperature > 0, sampled, likeliest).astype(jnp.int32)


def _nucleus(logits: jax.Array, top_p: float | jax.Array) -> jax.Array:
    """Logits (B, V) with all below the nucleus at minus infinity; the likeliest token is always in it."""
    descending = -jnp.sort(-logits, axis=-1)
    shares = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    least = jnp.min(jnp.where(before < top_p, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)
