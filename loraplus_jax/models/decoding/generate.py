"""Generates text from a causal language model with a KV cache: greedy, or with temperature and nucleus sampling."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..._utils.validation import check_int, check_number
from ...adapter.adapter_stack import AdapterStack, apply_rows, select_adapters
from ...interpreter.unstack import Layers, jit_unstacked, run_unstacked
from ...step.sharding import constrain_rows, mesh_axes_of_rows, with_mesh
from ..decoder import Cache, Config, init_cache

Generate = Callable[..., jax.Array]
"""`generate(variables, input_ids, segment_ids, sampling, keys, adapters=None) -> tokens`, see `make_generate`."""

SlotsOfRows = tuple[AdapterStack, jax.Array]
"""Several adapters, and the slot of each prompt, int32 (B,)."""

PAD_AFTER_END, NONFINITE_LOGITS = -1, -2
"""Token values after a sequence's end, and where the logits are not finite."""


class Sampling(NamedTuple):
    """How the next token is chosen. Changing the values does not recompile.

    Attributes:
      temperature: divides the logits; 0 is greedy decoding.
      top_p: samples from the smallest set of most likely tokens with at least this probability (arXiv 1904.09751).
    """

    temperature: float | jax.Array = 0.0
    top_p: float | jax.Array = 1.0


def check_sampling(sampling: Sampling) -> None:
    """Raises ValueError unless the temperature is at least 0 and top_p is in (0, 1]."""
    check_number("temperature", sampling.temperature, at_least=0.0)
    check_number("top_p", sampling.top_p, above=0.0)
    if sampling.top_p > 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {sampling.top_p}")


def make_generate(
    model: nn.Module,
    config: Config,
    *,
    new_tokens: int,
    stop: Sequence[int],
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
) -> Generate:
    """A jitted generate function; compiles once per prompt shape.

    Args:
      model: a `CausalLM`, with or without adapters.
      config: its config.
      new_tokens: maximum number of tokens; generation stops earlier when all sequences have ended.
      stop: ids that end a sequence.
      dtype: dtype of the cache.
      mesh: device mesh of the variables. Prompts and cache are split over its `"data"` and `"fsdp"`, which must
        divide B, and the cache's heads over `"tensor"`.

    Returns:
      `generate(variables, input_ids, segment_ids, sampling, keys, adapters=None)`. Takes left-padded prompts, int32
      (B, T), with `segment_ids` 1 on tokens and 0 on padding, as from `pad_left`, one key per prompt (B,), and for
      a model with the config of an `AdapterStack` that stack and the slot of each prompt. Returns int32
      (B, new_tokens): tokens up to and including one of `stop` or `NONFINITE_LOGITS`, then `PAD_AFTER_END`. A
      row's tokens depend only on its prompt, key and adapter.

    Raises:
      ValueError: `new_tokens` below 1.
    """
    check_int("new_tokens", new_tokens, at_least=1)
    stops = jnp.array(list(stop), jnp.int32)

    def generate(
        variables: Any,
        layers: list[Layers],
        input_ids: jax.Array,
        segment_ids: jax.Array,
        sampling: Sampling,
        keys: jax.Array,
        adapters: SlotsOfRows | None = None,
    ) -> jax.Array:
        rows, length = input_ids.shape
        input_ids, segment_ids, keys = map(constrain_rows, (input_ids, segment_ids, keys))
        extend = extend_by_row(model, adapters)
        cache = init_cache(config, rows, length + new_tokens, dtype)
        logits, cache = extend(variables, input_ids, segment_ids, cache, first=True)
        extend_by_one = functools.partial(
            run_unstacked, functools.partial(extend, first=False), variables, layers
        )
        ones = jnp.ones((rows, 1), jnp.int32)

        def choose(logits: jax.Array, done: jax.Array, i: Any) -> tuple[jax.Array, jax.Array]:
            # By row and step, so that a row's draws do not depend on the other rows.
            token = _next(logits, sampling, jax.vmap(jax.random.fold_in, (0, None))(keys, i))
            nonfinite = ~jnp.all(jnp.isfinite(logits), axis=-1)
            token = jnp.where(nonfinite, NONFINITE_LOGITS, token)
            return jnp.where(done, PAD_AFTER_END, token), done | nonfinite | jnp.isin(token, stops)

        def has_next(carry: tuple) -> jax.Array:
            i, done = carry[0], carry[1]
            return (i < new_tokens) & ~jnp.all(done)

        def step(carry: tuple) -> tuple:
            i, done, tokens, cache = carry
            # A row that has ended holds no id there.
            last = jnp.maximum(jax.lax.dynamic_slice_in_dim(tokens, i - 1, 1, axis=1), 0)
            logits, cache = extend_by_one(last, ones, cache)
            token, done = choose(logits, done, i)
            tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], i, axis=1)
            return i + 1, done, tokens, cache

        # Not a scan, which would continue after all rows have ended.
        tokens = jnp.full((rows, new_tokens), PAD_AFTER_END, jnp.int32)
        token, done = choose(logits, jnp.zeros(rows, bool), 0)
        carry = (jnp.int32(1), done, tokens.at[:, 0].set(token), cache)
        return jax.lax.while_loop(has_next, step, carry)[2]

    return jit_on_mesh(generate, config, mesh)


def extend_by_row(model: nn.Module, adapters: SlotsOfRows | None) -> Callable[..., Any]:
    """`model.extend` as a function of variables, ids, segments and cache; with `adapters`, one for each prompt.

    The rows of a call are one or more for each prompt, such as its beams.
    """
    if adapters is None:
        return functools.partial(model.apply, method="extend")
    stack, index = adapters
    own = select_adapters(stack, constrain_rows(index))  # once for all tokens

    def extend(variables: Any, ids: jax.Array, segments: jax.Array, cache: Cache, *, first: bool) -> Any:
        return apply_rows(
            model.apply,
            variables,
            own,
            *(ids, segments, cache),
            out_axes=(0, Cache(0, 0, 0, None)),  # pyright: ignore[reportArgumentType]
            mesh_axes=mesh_axes_of_rows(),
            method="extend",
            first=first,
        )

    return extend


def jit_on_mesh(program: Callable[..., Any], config: Config, mesh: Mesh | None) -> Callable[..., Any]:
    """`jit_unstacked` for a mesh; every device gets the whole result."""
    if mesh is None:
        return jit_unstacked(program, config.num_hidden_layers)
    # Of a split array a process could read only its own part.
    replicated = NamedSharding(mesh, PartitionSpec())
    return jit_unstacked(with_mesh(program, mesh), config.num_hidden_layers, out_shardings=replicated)


def pad_left(prompts: Sequence[Sequence[int]], *, multiple: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Pads B token lists to `input_ids` and `segment_ids` (B, T); T is the longest, rounded up to `multiple`.

    >>> ids, segments = pad_left([[5, 6, 7], [8]], multiple=4)
    >>> ids.tolist(), segments.tolist()
    ([[0, 5, 6, 7], [0, 0, 0, 8]], [[0, 1, 1, 1], [0, 0, 0, 1]])
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        lengths = [len(prompt) for prompt in prompts]
        raise ValueError(f"prompts must be non-empty token lists, at least one, got lengths {lengths!s:.80}")
    length = -(-max(map(len, prompts)) // multiple) * multiple
    ids = np.zeros((len(prompts), length), np.int32)
    segments = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt
        segments[row, length - len(prompt) :] = 1
    return ids, segments


def _next(logits: jax.Array, sampling: Sampling, keys: jax.Array) -> jax.Array:
    # A condition, as sampling sorts the vocabulary, which greedy decoding need not.
    def sample() -> jax.Array:
        scaled = logits / jnp.maximum(sampling.temperature, 1e-6)
        return jax.vmap(jax.random.categorical)(keys, _nucleus(scaled, sampling.top_p))

    argmax = functools.partial(jnp.argmax, logits, axis=-1)
    return jax.lax.cond(sampling.temperature > 0, sample, argmax).astype(jnp.int32)


def _nucleus(logits: jax.Array, top_p: float | jax.Array) -> jax.Array:
    """Sets logits (B, V) outside the nucleus to minus infinity; the most likely token is always inside."""
    descending = -jnp.sort(-logits, axis=-1)
    probs = jax.nn.softmax(descending, axis=-1)
    mass_before = jnp.cumsum(probs, axis=-1) - probs
    threshold = jnp.min(jnp.where(mass_before < top_p, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < threshold, -jnp.inf, logits)
