"""Beam search with a KV cache: token for token the beam search of transformers.

Axes in the comments: B prompts, K beams, T prompt tokens with padding, N new tokens, V vocabulary, C candidates.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..._utils.validation import check_choice, check_int, check_number
from ...interpreter.unstack import Layers, run_unstacked
from ...step.sharding import constrain_rows
from ..choices import MOST_PENALTY, EarlyStopping, NoRepeatIn
from ..decoder import Cache, Config, init_cache, shard_cache
from .generate import NONFINITE_LOGITS, PAD_AFTER_END, SlotsOfRows, extend_by_row, jit_on_mesh

BeamSearch = Callable[..., tuple[jax.Array, jax.Array]]
"""`search(variables, input_ids, segment_ids, adapters=None) -> (tokens, scores)`, see `make_beam_search`."""

# As in transformers: a score that no sequence reaches, but finite, so that sums and differences stay finite.
LOWEST = -1e9


# The carry of a while loop: a tree of arrays whose shapes and dtypes stay the same.
class _State(NamedTuple):
    """The beams of every prompt after `length` new tokens.

    Attributes:
      length: int32 scalar.
      tokens, scores: the open sequences, int32 (B, K, N), and their log-probabilities (B, K), best first.
      finished, finished_scores: the best finished sequences and their penalized scores, best first.
      is_finished: boolean (B, K), whether there is a finished sequence.
      improvable: boolean (B,), whether an open sequence may still become one of the best.
      parents: int32 (B, K), the beam of the step before that each open sequence continues.
      finite: boolean (B,), whether all logits were finite.
    """

    length: jax.Array
    tokens: jax.Array
    scores: jax.Array
    finished: jax.Array
    finished_scores: jax.Array
    is_finished: jax.Array
    improvable: jax.Array
    parents: jax.Array
    finite: jax.Array


def make_beam_search(
    model: nn.Module,
    config: Config,
    *,
    new_tokens: int,
    stop: Sequence[int],
    beams: int,
    length_penalty: float = 1.0,
    no_repeat_ngram: int = 0,
    no_repeat_in: NoRepeatIn = "all",
    early_stopping: EarlyStopping = "heuristic",
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
) -> BeamSearch:
    """A jitted beam search; compiles once per prompt shape.

    A sequence's score is its log-probability divided by its number of new tokens, the end included, to the power of
    `length_penalty`. With one beam the search is greedy decoding.

    Args:
      model: a `CausalLM`, with or without adapters.
      config: its config.
      new_tokens: N, maximum number of new tokens.
      stop: ids that end a sequence.
      beams: K, at most the size of the vocabulary.
      length_penalty: from -5 to 5; above 0 favours longer sequences, 0 compares log-probabilities.
      no_repeat_ngram: no n-gram of this size appears twice; 0 allows all.
      no_repeat_in: where n-grams are counted: `"all"`, in prompt and new tokens, as in transformers; `"new"`, in
        new tokens alone, which may then copy from the prompt, as in the code of LoRA's paper (arXiv 2106.09685).
      early_stopping: when the search for a prompt ends: `"complete"`, once K sequences have ended; `"heuristic"`,
        once no open sequence would beat the worst of K that have ended if it ended now; `"never"`, once none can
        beat it at any length. In transformers these are True, False and `"never"`.
      dtype: dtype of the cache.
      mesh: see `make_generate`; a prompt and its beams stay on one part of the mesh.

    Returns:
      `search(variables, input_ids, segment_ids, adapters=None)`. Takes left-padded prompts (B, T), as from
      `pad_left`, and `adapters` as `make_generate` does. Returns the best sequence of each, int32 (B, N), as there,
      and its score, float32 (B,).

    Raises:
      ValueError: an argument is out of range.
    """
    check_int("new_tokens", new_tokens, at_least=1)
    check_int("beams", beams, at_least=1)
    check_int("no_repeat_ngram", no_repeat_ngram, at_least=0)
    check_number("length_penalty", length_penalty)
    if abs(length_penalty) > MOST_PENALTY:
        raise ValueError(
            f"length_penalty must be from {-MOST_PENALTY} to {MOST_PENALTY}, got {length_penalty:g}"
        )
    check_choice("early_stopping", early_stopping, get_args(EarlyStopping))
    check_choice("no_repeat_in", no_repeat_in, get_args(NoRepeatIn))
    if beams > config.vocab_size:
        raise ValueError(
            f"beams must be at most {config.vocab_size}, the size of the vocabulary, got {beams}"
        )
    stops = jnp.array(list(stop), jnp.int32)
    ends_when_complete = early_stopping == "complete" or beams == 1
    # By number of new tokens; in float64 first, as in transformers.
    penalties = jnp.array(np.arange(1, new_tokens + 1) ** float(length_penalty), jnp.float32)
    longest = new_tokens if early_stopping == "never" and length_penalty > 0 else None

    def choose(prompts: jax.Array, segments: jax.Array, state: _State, logits: jax.Array) -> _State:
        """Extends every open sequence by a token, from logits (B K, V)."""
        i, rows = state.length, len(prompts)
        log_probs = jax.nn.log_softmax(logits)
        if no_repeat_ngram:
            history, end = state.tokens.reshape(-1, new_tokens), i
            first = jnp.zeros(len(history), jnp.int32)
            if no_repeat_in == "all":
                history = jnp.concatenate([jnp.repeat(prompts, beams, axis=0), history], axis=1)
                first, end = jnp.repeat(jnp.argmax(segments, axis=1), beams), prompts.shape[1] + i
            log_probs = _ban_repeats(log_probs, history, first, end, no_repeat_ngram)
        total = log_probs.reshape(rows, beams, -1) + state.scores[:, :, None]
        # As many candidates as leave K open sequences, whichever of them end here.
        scores, index = jax.lax.top_k(total.reshape(rows, -1), max(2, 1 + len(stops)) * beams)
        parents, token = jnp.divmod(index, total.shape[-1])
        tokens = _take(state.tokens, parents).at[:, :, i].set(token)
        ends = jnp.isin(token, stops) | (i + 1 == new_tokens)

        open_scores, order = jax.lax.top_k(jnp.where(ends, scores + LOWEST, scores), beams)
        among_best = jnp.arange(scores.shape[1])[None] < beams
        is_full = jnp.all(state.is_finished, axis=1) & ends_when_complete
        may_finish = ends & among_best & (state.improvable & ~is_full)[:, None]
        end_scores = jnp.where(may_finish, scores / penalties[i], LOWEST)
        finished_scores, best = jax.lax.top_k(jnp.concatenate([state.finished_scores, end_scores], 1), beams)
        is_finished = _take(jnp.concatenate([state.is_finished, may_finish], 1), best)

        limit = open_scores[:, :1] / penalties[i if longest is None else longest - 1]
        worst = jnp.where(is_finished, jnp.min(finished_scores, axis=1, keepdims=True), LOWEST)
        return _State(
            length=i + 1,
            tokens=_take(tokens, order),
            scores=open_scores,
            finished=_take(jnp.concatenate([state.finished, tokens], 1), best),
            finished_scores=finished_scores,
            is_finished=is_finished,
            improvable=state.improvable & jnp.any(limit > worst, axis=1),
            parents=_take(parents, order),
            finite=state.finite & jnp.all(jnp.isfinite(logits).reshape(rows, -1), axis=1),
        )

    def search(
        variables: Any,
        layers: list[Layers],
        input_ids: jax.Array,
        segment_ids: jax.Array,
        adapters: SlotsOfRows | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        rows, length = input_ids.shape
        input_ids, segment_ids = map(constrain_rows, (input_ids, segment_ids))
        extend = extend_by_row(model, adapters)
        empty = init_cache(config, rows, length + new_tokens, dtype)
        # Beams share their prompt: it is read once, and its part of the cache is never reordered.
        logits, cache = extend(variables, input_ids, segment_ids, empty, first=True)
        extend_by_one = functools.partial(
            run_unstacked, functools.partial(extend, first=False), variables, layers
        )
        logits, cache = jnp.repeat(logits, beams, axis=0), _repeat(cache, beams)
        step = functools.partial(choose, input_ids, segment_ids)

        def has_next(carry: tuple[_State, Cache]) -> jax.Array:
            state = carry[0]
            is_complete = jnp.all(state.is_finished) & ends_when_complete
            return (state.length < new_tokens) & jnp.any(state.improvable) & ~is_complete

        def body(carry: tuple[_State, Cache]) -> tuple[_State, Cache]:
            state, cache = carry
            if beams > 1:
                cache = _reorder(cache, state.parents, length)
            last = jax.lax.dynamic_slice_in_dim(state.tokens, state.length - 1, 1, axis=2).reshape(-1, 1)
            logits, cache = extend_by_one(last, jnp.ones_like(last), cache)
            return step(state, logits), cache

        sequences = jnp.full((rows, beams, new_tokens), PAD_AFTER_END, jnp.int32)
        start = _State(
            length=jnp.int32(0),
            tokens=sequences,
            # All beams are equal so far: only the first may be continued.
            scores=jnp.full((rows, beams), LOWEST).at[:, 0].set(0.0),
            finished=sequences,
            finished_scores=jnp.full((rows, beams), LOWEST),
            is_finished=jnp.zeros((rows, beams), bool),
            improvable=jnp.ones(rows, bool),
            parents=jnp.zeros((rows, beams), jnp.int32),
            finite=jnp.ones(rows, bool),
        )
        state, _ = jax.lax.while_loop(has_next, body, (step(start, logits), cache))
        nonfinite = jnp.full_like(state.finished[:, 0], PAD_AFTER_END).at[:, 0].set(NONFINITE_LOGITS)
        tokens = jnp.where(state.finite[:, None], state.finished[:, 0], nonfinite)
        return tokens, state.finished_scores[:, 0]

    return jit_on_mesh(search, config, mesh)


def _take(values: jax.Array, index: jax.Array) -> jax.Array:
    # From axis 1 of (B, K, ...) by an index (B, C): (B, C, ...).
    return jnp.take_along_axis(values, index.reshape(*index.shape, *[1] * (values.ndim - 2)), axis=1)


def _repeat(cache: Cache, beams: int) -> Cache:
    key, value = (jnp.repeat(x, beams, axis=0) for x in (cache.key, cache.value))
    return shard_cache(Cache(key, value, jnp.repeat(cache.segment_ids, beams, axis=0), cache.length))


def _reorder(cache: Cache, parents: jax.Array, start: int) -> Cache:
    # Only from slot `start` on: before it all beams of a prompt hold the same.
    index = parents[:, :, None, None, None, None]

    def reorder(x: jax.Array) -> jax.Array:
        # Within each prompt, so that on a mesh no sequence leaves its device.
        part = x[:, :, :, start:]
        moved = jnp.take_along_axis(part.reshape(*parents.shape, *part.shape[1:]), index, axis=1)
        return x.at[:, :, :, start:].set(moved.reshape(part.shape))

    return shard_cache(cache._replace(key=reorder(cache.key), value=reorder(cache.value)))


def _ban_repeats(
    log_probs: jax.Array, history: jax.Array, first: jax.Array, end: jax.Array, size: int
) -> jax.Array:
    """Sets to minus infinity the tokens that would complete an n-gram of `size` tokens for the second time.

    Args:
      log_probs: (R, V).
      history: int32 (R, H), tokens from index `first` (R,) up to `end`.
      first: (R,), end of the padding.
      end: scalar.
      size: n.
    """
    windows = history.shape[1] - size + 1
    if windows < 1:
        return log_probs
    start = jnp.arange(windows)[None]
    repeats = (start >= first[:, None]) & (start + size - 1 < end)
    for j in range(size - 1):
        last = jax.lax.dynamic_slice_in_dim(history, end - size + 1 + j, 1, axis=1)
        repeats &= history[:, j : j + windows] == last
    token = jnp.where(repeats, history[:, size - 1 :], log_probs.shape[1])
    # A static shape: what repeats nothing is sent to an id beyond the vocabulary, where the update is dropped.
    return log_probs.at[jnp.arange(len(token))[:, None], token].set(-jnp.inf, mode="drop")
