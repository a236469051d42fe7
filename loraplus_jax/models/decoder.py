"""What the families of causal language models share: inputs, the loop over layers, KV cache and head.

Axes in the comments: B sequences, T tokens, D hidden, N heads, K key heads, H head size, L layers, S cache slots.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .._utils.validation import check_choice
from ..quantization.packed_array import is_packed
from ..step.sharding import BATCH_AXES, constrain, constrain_rows
from .attention import causal_attention, head_major_attention
from .attention_common import ATTENTION_NAMES, window_mask
from .choices import Attention, Remat
from .gpt2.config import GPT2Config
from .llama.config import LlamaConfig
from .part import Part, check_inputs

Config = LlamaConfig | GPT2Config

# What a layer saves for the backward pass besides its input; "none" means no remat. Saved by name, because
# `dots_saveable` would save an adapted layer's sum and both of its terms.
_SAVED_NAMES = ("query", "key", "value", *ATTENTION_NAMES, "attended", "gate", "up")
_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(*_SAVED_NAMES),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Cache(NamedTuple):
    """The KV cache for generation; see `init_cache`.

    Attributes:
      key, value: (B, L, K, S, H).
      segment_ids: int32 (B, S), 0 for padding and empty slots.
      length: int32 scalar, number of used slots.
    """

    key: jax.Array
    value: jax.Array
    segment_ids: jax.Array
    length: jax.Array


def project(
    x: jax.Array, config: Config, fused: str, dense: Callable[[int, str], nn.Dense]
) -> list[jax.Array]:
    """The parts (..., size) of one of the config's `projections` of x (..., D), from one layer or from one each.

    `dense` makes a layer of an output size and a name.
    """
    sizes = config.projections[fused]
    if not config.fused:
        return [dense(size, name)(x) for name, size in sizes.items()]
    *ends, total = np.cumsum(list(sizes.values())).tolist()
    return jnp.split(dense(total, fused)(x), ends, axis=-1)


def init_cache(config: Config, batch: int, slots: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache for `batch` sequences of `slots` tokens each, including padding, sharded by `shard_cache`."""
    # Heads before slots, so that products read the slots of a head without a transposed copy.
    # Sequences before layers, so that `jax.vmap` over sequences moves no axis.
    shape = (batch, config.num_hidden_layers, config.num_key_value_heads, slots, config.head_dim)
    empty = jnp.zeros((batch, slots), jnp.int32)
    return shard_cache(
        Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), empty, jnp.zeros((), jnp.int32))
    )


def shard_cache(cache: Cache) -> Cache:
    """Shards sequences like the rows of a batch and heads over `"tensor"`; has no effect without a mesh."""
    key, value = (constrain(x, [BATCH_AXES, (), ("tensor",)]) for x in (cache.key, cache.value))
    return cache._replace(key=key, value=value, segment_ids=constrain_rows(cache.segment_ids))


class Shared(NamedTuple):
    """Inputs that all layers share.

    Attributes:
      segment_ids: (B, T), or None if each row is one sequence.
      mask: the cache slots that hold tokens of each sequence, (B, S), for a step on a non-empty cache; else None.
      start: the cache's length before these tokens.
      rope: cosines and sines of the tokens' positions, in a family with rotary positions.
    """

    segment_ids: jax.Array | None
    mask: jax.Array | None = None
    start: Any = None
    rope: Any = None


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    shared: Shared,
    cache: Cache | None,
    layer: jax.Array,
    *,
    window: int | jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: Attention = "auto",
) -> tuple[jax.Array, Cache | None]:
    """Attention of new tokens to themselves and to a cache: (B, T, N, H), and the cache with their keys and values.

    Args:
      query: (B, T, N, H).
      key, value: (B, T, K, H).
      shared: segments and mask.
      cache: the cache, or None without one.
      layer: this layer's index in the cache.
      window, scale, softcap, implementation: see `causal_attention`.
    """
    scores: Any = {"scale": scale, "softcap": softcap}
    if cache is not None:
        cache = _update_cache(cache, key, value, layer, shared.start)
    # On an empty cache the keys are the tokens' own, so the kernels and the blocked form can be used.
    if cache is not None and shared.mask is not None:
        slots = shared.start + jnp.arange(query.shape[1])
        mask = shared.mask[:, None] & window_mask(slots, shared.mask.shape[1], window)[None]
        keys, values = (_read_layer(x, layer) for x in (cache.key, cache.value))
        return head_major_attention(query, keys, values, mask, **scores), cache
    options: Any = {"window": window, "implementation": implementation} | scores
    return causal_attention(query, key, value, shared.segment_ids, **options), cache


def _update_cache(cache: Cache, key: jax.Array, value: jax.Array, layer: jax.Array, start: Any) -> Cache:
    key, value = (
        _write_layer(old, x.swapaxes(1, 2)[:, None].astype(old.dtype), layer, start)
        for old, x in ((cache.key, key), (cache.value, value))
    )
    return cache._replace(key=key, value=value)


def _over_rows(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A function of arrays (rows, ...) and scalars, which `jax.vmap` runs once on the rows of all its batch.

    By itself, `jax.vmap` turns a slice at a traced index into a gather, and its update into a scatter, around which
    XLA copies the whole cache in every step.
    """
    mapped: Any = jax.custom_batching.custom_vmap(function)

    @mapped.def_vmap
    def run(axis_size: int, in_batched: Sequence[bool], *args: Any) -> tuple[jax.Array, bool]:
        def merge(x: Any, is_batched: bool) -> Any:
            if jnp.ndim(x) == 0:  # the layer or the length, which all rows share
                return x
            x = x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        y = mapped(*map(merge, args, in_batched))
        return y.reshape(axis_size, -1, *y.shape[1:]), True

    return mapped


@_over_rows
def _read_layer(x: jax.Array, layer: jax.Array) -> jax.Array:
    """The part (B, K, S, H) of a layer in x (B, L, K, S, H)."""
    return x[:, layer]


@_over_rows
def _write_layer(old: jax.Array, new: jax.Array, layer: jax.Array, start: jax.Array) -> jax.Array:
    """`old` (B, L, K, S, H) with `new` (B, 1, K, T, H) in a layer, from slot `start` on."""
    # XLA clamps the start of an update: beyond the last slot it would overwrite earlier ones, so callers make room.
    zero, layer, start = jnp.int32(0), jnp.int32(layer), jnp.int32(start)  # of one dtype, in 64-bit mode too
    return jax.lax.dynamic_update_slice(old, new, (zero, layer, zero, start, zero))


class CausalLM(Part):
    """Base class of the causal language models. A family makes its modules in `setup` and implements `run`.

    Attributes:
      config, dtype, param_dtype: see `Part`.
      unroll: unroll the loop over layers (same stacked parameters), so that XLA's cost analysis counts every
        layer; slower to compile.
      remat: what the backward pass recomputes: `"none"`; `"dots"`, all but the outputs of large matmuls; `"full"`,
        everything but each layer's input.
      attention: see `causal_attention`.
    """

    unroll: bool = False
    remat: Remat = "none"
    attention: Attention = "auto"

    @nn.nowrap
    def make_layers(self, layer: type[nn.Module]) -> nn.Module:
        """The loop over layers with stacked parameters; a layer's fields are config, dtypes and `attention`."""
        check_choice("remat", self.remat, get_args(Remat))
        c = self.config
        if self.remat != "none":
            # Inside a loop CSE cannot merge forward and backward computations anyway.
            layer = nn.remat(layer, policy=_POLICIES[self.remat], prevent_cse=self.unroll)
        # One compiled layer, whatever the depth; `shared` is the same for all, and the index of each is its own.
        stack: Any = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
            length=c.num_hidden_layers,
            # init runs at most once, and a loop over one layer is faster to trace and to compile.
            unroll=c.num_hidden_layers if self.unroll and not self.is_initializing() else 1,
        )
        return stack(c, self.dtype, self.param_dtype, attention=self.attention)

    def __call__(
        self,
        input_ids: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Logits at every position.

        Args:
          input_ids: int32 (B, T). An id outside the vocabulary gives NaN.
          segment_ids: int32 (B, T): 0 for padding, any other number for a sequence; a row may pack several, one
            after the other. Tokens attend only to earlier tokens of their own sequence. An attention mask works
            too. None: every row is one sequence.
          positions: int32 (B, T); by default each token's index in its sequence, so padding may be on either side.

        Returns:
          float32 (B, T, vocabulary); values at padding are finite but meaningless.

        Raises:
          ValueError: shapes differ.
        """
        return self.logits(self.hidden(input_ids, segment_ids, positions))

    def hidden(
        self,
        input_ids: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Input of the head, (B, T, D) in `dtype`; arguments as for `__call__`."""
        check_inputs(input_ids, segment_ids=segment_ids, positions=positions)
        if positions is None:
            positions = segment_positions(segment_ids, input_ids.shape[1])
        return self.run(input_ids, positions, Shared(segment_ids), None)[0]

    def logits_at(self, input_ids: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """Logits at S positions of each row only, float32 (B, S, vocabulary).

        Args:
          input_ids, segment_ids: int32 (B, T), as for `__call__`.
          positions: int32 (B, S), indices into T.
        """
        hidden = self.hidden(input_ids, segment_ids)
        return self.logits(jnp.take_along_axis(hidden, positions[..., None], axis=1))

    def extend(
        self, input_ids: jax.Array, segment_ids: jax.Array, cache: Cache, *, first: bool
    ) -> tuple[jax.Array, Cache]:
        """Appends tokens to a cache.

        Args:
          input_ids: int32 (B, T), for the slots from `cache.length`; does not check that they are free.
          segment_ids: int32 (B, T): 1, or 0 for padding, which must precede a sequence's first token.
          cache: keys and values of the earlier tokens.
          first: whether the cache is empty; attention then ignores it.

        Returns:
          Logits of the last token, float32 (B, vocabulary), and the cache.
        """
        segments = jax.lax.dynamic_update_slice_in_dim(cache.segment_ids, segment_ids, cache.length, axis=1)
        positions = jnp.cumsum(segment_ids, axis=1) - 1
        if not first:
            positions += jnp.sum(cache.segment_ids, axis=1, keepdims=True)
        shared = Shared(segment_ids, None if first else segments > 0, cache.length)
        # Padding before a row's first token would have position -1, which is in no table.
        positions, cache = jnp.maximum(positions, 0), cache._replace(segment_ids=segments)
        x, cache = self.run(input_ids, positions, shared, cache)
        return self.logits(x[:, -1:])[:, 0], cache._replace(length=cache.length + input_ids.shape[1])

    def run(self, input_ids: jax.Array, positions: jax.Array, shared: Shared, cache: Any) -> tuple[Any, Any]:
        """The input of the head (B, T, D), and the updated cache, from ids (B, T) and positions (B or 1, T)."""
        raise NotImplementedError

    def logits(self, x: jax.Array) -> jax.Array:
        """The logits, float32 (..., vocabulary), of inputs of the head (..., D)."""
        # Its modules are made by the family's `setup`.
        me: Any = self
        logits = me.embed_tokens.attend(x) if self.config.tie_word_embeddings else me.lm_head(x)
        # bfloat16's 8 bits would make the softmax over a vocabulary useless.
        logits, cap = logits.astype(jnp.float32), self.config.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def segment_positions(segment_ids: jax.Array | None, length: int) -> jax.Array:
    """Each token's index in its segment, int32 (B or 1, T); padding does not count.

    >>> segment_positions(jnp.array([[0, 1, 1, 2, 2, 2], [1, 1, 0, 0, 1, 1]]), 6)
    Array([[0, 0, 1, 0, 1, 2],
           [0, 1, 0, 0, 2, 3]], dtype=int32)
    """
    index = jnp.arange(length, dtype=jnp.int32)[None]
    if segment_ids is None:
        return index
    is_token = segment_ids != 0
    number = jnp.cumsum(is_token, axis=1, dtype=jnp.int32) - 1
    # A running maximum carries the last token's index over padding, and a segment's first number to its tokens.
    last = jax.lax.cummax(jnp.where(is_token, index, -1), axis=1)
    before = jnp.pad(last, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    is_other = segment_ids != jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
    starts = jnp.where(is_token & (is_other | (before < 0)), number, 0)
    return jnp.where(is_token, number - jax.lax.cummax(starts, axis=1), 0)


def head_kernel(params: Mapping[str, Any]) -> tuple[jax.Array, bool]:
    """The head in a model's parameters, and whether it is transposed, for `chunked_cross_entropy`.

    The `lm_head` kernel (D, V), or the tied embedding (V, D).
    """
    is_tied = "lm_head" not in params
    head = params["embed_tokens"]["embedding"] if is_tied else params["lm_head"]["kernel"]
    return head.dequantize() if is_packed(head) else head, is_tied
