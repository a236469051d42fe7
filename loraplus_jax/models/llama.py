"""The Llama family: Llama 2 and 3, SmolLM2, Mistral, Qwen2 and Qwen3, selected by config; without LoRA code.

transformers 5 has no Flax models any more, and no other package has these in Linen, so the tests compare this file
with transformers' torch models (`tests/golden/make_llama.py`).

Axes in the comments: B sequences, T tokens, D hidden, N heads, K key heads, H head size, L layers, S cache slots.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from .._validation import check_choice
from ..quantization import is_packed
from ..sharding import Rules, constrain_rows
from .attention import ATTENTION_NAMES, Attention, cached_attention, causal_attention
from .llama_config import LlamaConfig
from .name_table import NameTable, Rule, embedding_rules, linear_rules, norm_rules
from .rope import Rope, apply_rope

Remat = Literal["none", "dots", "full"]

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
      key, value: (L, B, S, K, H).
      segment_ids: int32 (B, S), 0 for padding and empty slots.
      length: int32 scalar, number of used slots.
    """

    key: jax.Array
    value: jax.Array
    segment_ids: jax.Array
    length: jax.Array


def init_cache(config: LlamaConfig, batch: int, slots: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache for `batch` sequences of `slots` tokens each, including padding."""
    shape = (config.num_hidden_layers, batch, slots, config.num_key_value_heads, config.head_dim)
    empty = jnp.zeros((batch, slots), jnp.int32)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), empty, jnp.zeros((), jnp.int32))


class _Shared(NamedTuple):
    """Inputs that all layers share.

    Attributes:
      rope: cosines and sines of the tokens' positions.
      segment_ids: (B, T), or None if each row is one sequence.
      mask: (B, T, S) for a step on a non-empty cache, else None.
      start: the cache's length before these tokens.
    """

    rope: Rope
    segment_ids: jax.Array | None
    mask: jax.Array | None = None
    start: jax.Array | None = None


class LlamaPart(nn.Module):
    """Base class of the modules below: config, compute dtype and parameter dtype."""

    config: LlamaConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.nowrap
    def dense(self, features: int, name: str, *, bias: bool = False) -> nn.Dense:
        """A Dense layer with the family's initialization."""
        init = nn.initializers.normal(self.config.initializer_range)
        return nn.Dense(features, bias, self.dtype, self.param_dtype, kernel_init=init, name=name)

    @nn.nowrap
    def norm(self, name: str) -> nn.RMSNorm:
        """An RMSNorm that computes in float32."""
        return nn.RMSNorm(self.config.rms_norm_eps, self.dtype, self.param_dtype, name=name)


class LlamaAttention(LlamaPart):
    """Grouped-query attention with rotary positions."""

    attention: Attention = "auto"

    @nn.compact
    def __call__(
        self, x: jax.Array, shared: _Shared, cache: Cache | None, layer: jax.Array
    ) -> tuple[jax.Array, Cache | None]:
        """(B, T, D) from (B, T, D), and the cache updated with this layer's keys and values."""
        c = self.config
        sizes = {"q": c.num_attention_heads, "k": c.num_key_value_heads, "v": c.num_key_value_heads}
        query, key, value = (
            self.dense(heads * c.head_dim, f"{name}_proj", bias=c.qkv_bias)(x).reshape(
                *x.shape[:2], heads, c.head_dim
            )
            for name, heads in sizes.items()
        )
        if c.qk_norm:
            query, key = self.norm("q_norm")(query), self.norm("k_norm")(key)
        query = checkpoint_name(apply_rope(query, shared.rope), "query")
        key, value = checkpoint_name(apply_rope(key, shared.rope), "key"), checkpoint_name(value, "value")
        if cache is not None:
            cache = _update_cache(cache, key, value, layer, shared.start)
        if cache is not None and shared.mask is not None:
            y = cached_attention(query, cache.key[layer], cache.value[layer], shared.mask)
        else:
            y = causal_attention(
                query,
                key,
                value,
                shared.segment_ids,
                window=c.sliding_window,
                implementation=self.attention,
            )
        return self.dense(c.hidden_size, "o_proj", bias=c.attention_bias)(y.reshape(*x.shape[:2], -1)), cache


def _update_cache(cache: Cache, key: jax.Array, value: jax.Array, layer: jax.Array, start: Any) -> Cache:
    """Writes new tokens' keys and values (B, T, K, H) to one layer's slots from `start`."""
    at = (layer, 0, start, 0, 0)
    key, value = (
        jax.lax.dynamic_update_slice(old, x[None].astype(old.dtype), at)
        for old, x in ((cache.key, key), (cache.value, value))
    )
    return cache._replace(key=key, value=value)


class LlamaMLP(LlamaPart):
    """SwiGLU (arXiv 2002.05202)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, T, D) from (B, T, D)."""
        c = self.config
        gate, up = (
            checkpoint_name(self.dense(c.intermediate_size, f"{name}_proj", bias=c.mlp_bias)(x), name)
            for name in ("gate", "up")
        )
        return self.dense(c.hidden_size, "down_proj", bias=c.mlp_bias)(nn.silu(gate) * up)


class LlamaLayer(LlamaPart):
    """Attention and MLP, each with pre-norm and a residual connection; the body of an `nn.scan`."""

    attention: Attention = "auto"

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Cache | None], shared: _Shared, layer: jax.Array
    ) -> tuple[tuple[jax.Array, Cache | None], None]:
        """Hidden states (B, T, D) and cache to the same; None is the scan's empty output."""
        x, cache = constrain_rows(carry[0]), carry[1]
        args = (self.config, self.dtype, self.param_dtype)
        y, cache = LlamaAttention(*args, attention=self.attention, name="self_attn")(
            self.norm("input_layernorm")(x), shared, cache, layer
        )
        x = checkpoint_name(x + y, "attended")
        x = x + LlamaMLP(*args, name="mlp")(self.norm("post_attention_layernorm")(x))
        return (x, cache), None


class Llama(nn.Module):
    """A causal language model (arXiv 2302.13971, 2407.21783; 2310.06825; 2407.10671, 2505.09388).

    Attributes:
      config: sizes and options.
      dtype: compute dtype; normalization, softmax, attention scores and rotations use at least float32.
      param_dtype: dtype of the parameters.
      unroll: unroll the loop over layers (same stacked parameters), so that XLA's cost analysis counts every
        layer; slower to compile.
      remat: what the backward pass recomputes: `"none"`; `"dots"`, all but the outputs of large matmuls; `"full"`,
        everything but each layer's input.
      attention: see `causal_attention`.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    unroll: bool = False
    remat: Remat = "none"
    attention: Attention = "auto"

    def setup(self) -> None:
        """Embedding, layers, final norm, and a head unless it is tied to the embedding."""
        c = self.config
        check_choice("remat", self.remat, get_args(Remat))
        init = nn.initializers.normal(c.initializer_range)
        self.embed_tokens = nn.Embed(
            c.vocab_size, c.hidden_size, self.dtype, self.param_dtype, embedding_init=init
        )
        layer = LlamaLayer
        if self.remat != "none":
            # Inside a loop CSE cannot merge forward and backward computations anyway.
            layer = nn.remat(layer, policy=_POLICIES[self.remat], prevent_cse=self.unroll)
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
            length=c.num_hidden_layers,
            unroll=c.num_hidden_layers if self.unroll else 1,
        )(c, self.dtype, self.param_dtype, attention=self.attention)
        self.norm = nn.RMSNorm(c.rms_norm_eps, self.dtype, self.param_dtype)
        if not c.tie_word_embeddings:
            self.lm_head = nn.Dense(c.vocab_size, False, self.dtype, self.param_dtype, kernel_init=init)

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
        return self._logits(self.hidden(input_ids, segment_ids, positions))

    def hidden(
        self,
        input_ids: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Input of the head, (B, T, D) in `dtype`; arguments as for `__call__`."""
        _check_inputs(input_ids, segment_ids, positions)
        if positions is None:
            positions = segment_positions(segment_ids, input_ids.shape[1])
        shared = _Shared(self.config.rope(positions), segment_ids)
        return self._run(input_ids, shared, None)[0]

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
        segments = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, cache.length))
        positions = jnp.cumsum(segment_ids, axis=1) - 1
        if not first:
            positions += jnp.sum(cache.segment_ids, axis=1, keepdims=True)
        # Positions of padding matter only to dynamic rotary scaling, which uses the largest of all.
        rope = self.config.rope(jnp.maximum(positions, 0))
        mask = None if first else self._cache_mask(segments, cache.length, input_ids.shape[1])
        shared = _Shared(rope, segment_ids, mask, cache.length)
        x, cache = self._run(input_ids, shared, cache._replace(segment_ids=segments))
        return self._logits(x[:, -1:])[:, 0], cache._replace(length=cache.length + input_ids.shape[1])

    def _cache_mask(self, segments: jax.Array, start: jax.Array, length: int) -> jax.Array:
        """The cache slots that each new token attends to: boolean (B, T, S)."""
        slot = jnp.arange(segments.shape[1])[None, :]
        query = start + jnp.arange(length)[:, None]
        mask = slot <= query
        if self.config.sliding_window is not None:
            mask &= query - slot < self.config.sliding_window
        return mask[None] & (segments > 0)[:, None, :]

    def _run(self, input_ids: jax.Array, shared: _Shared, cache: Any) -> tuple[jax.Array, Any]:
        layers = jnp.arange(self.config.num_hidden_layers)
        (x, cache), _ = self.layers((self.embed_tokens(input_ids), cache), shared, layers)
        return self.norm(constrain_rows(x)), cache

    def _logits(self, x: jax.Array) -> jax.Array:
        logits = self.embed_tokens.attend(x) if self.config.tie_word_embeddings else self.lm_head(x)
        return logits.astype(jnp.float32)


def segment_positions(segment_ids: jax.Array | None, length: int) -> jax.Array:
    """Each token's index in its segment, int32 (B or 1, T).

    >>> segment_positions(jnp.array([[0, 1, 1, 2, 2, 2]]), 6)
    Array([[0, 0, 1, 0, 1, 2]], dtype=int32)
    """
    index = jnp.arange(length, dtype=jnp.int32)[None]
    if segment_ids is None:
        return index
    before = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
    starts = jnp.where(segment_ids != before, index, 0)
    offset = index - jax.lax.cummax(starts, axis=1)
    return jnp.where(segment_ids == 0, 0, offset)


def head_kernel(params: Mapping[str, Any]) -> tuple[jax.Array, bool]:
    """The head in a `Llama`'s parameters, and whether it is transposed, for `chunked_cross_entropy`.

    The `lm_head` kernel (D, V), or the tied embedding (V, D).
    """
    name, leaf, transposed = (
        ("lm_head", "kernel", False) if "lm_head" in params else ("embed_tokens", "embedding", True)
    )
    head = params[name][leaf]
    return head.dequantize() if is_packed(head) else head, transposed


def _check_inputs(input_ids: jax.Array, segment_ids: jax.Array | None, positions: jax.Array | None) -> None:
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must have shape (batch, tokens), got {input_ids.shape}")
    for name, array in (("segment_ids", segment_ids), ("positions", positions)):
        if array is not None and array.shape != input_ids.shape:
            raise ValueError(f"{name} must have the shape of input_ids, {input_ids.shape}, got {array.shape}")


def name_table(config: LlamaConfig) -> NameTable:
    """Maps the tensors of a Hugging Face checkpoint to a `Llama`."""
    layer, layers = "layers.{layer}", "layers"
    rules: list[Rule] = [
        *embedding_rules("embed_tokens", "embed_tokens"),
        *norm_rules("norm", "norm", bias=False),
    ]
    for name in ("input_layernorm", "post_attention_layernorm"):
        rules += norm_rules(f"{layer}.{name}", f"{layers}/{name}", bias=False)
    has_bias = {"o_proj": config.attention_bias} | dict.fromkeys(
        ("q_proj", "k_proj", "v_proj"), config.qkv_bias
    )
    for name, bias in has_bias.items():
        rules += linear_rules(f"{layer}.self_attn.{name}", f"{layers}/self_attn/{name}", bias=bias)
    for name in ("q_norm", "k_norm") if config.qk_norm else ():
        rules += norm_rules(f"{layer}.self_attn.{name}", f"{layers}/self_attn/{name}", bias=False)
    for name in ("gate_proj", "up_proj", "down_proj"):
        rules += linear_rules(f"{layer}.mlp.{name}", f"{layers}/mlp/{name}", bias=config.mlp_bias)
    copies = ()
    if config.tie_word_embeddings:
        copies = (("lm_head.weight", "embed_tokens.weight"),)  # some files hold the embedding twice
    else:
        rules += linear_rules("lm_head", "lm_head", bias=False)
    ignore = (r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"rotary_emb\.inv_freq")
    return NameTable(rules=tuple(rules), renames=((r"^model\.", ""),), ignore=ignore, copies=copies)


SHARDING: Rules = (
    (r"embed_tokens/embedding", ("tensor", "fsdp")),
    (r"lm_head/kernel", ("fsdp", "tensor")),
    (r"layers/(self_attn/[qkv]|mlp/(gate|up))_proj/kernel", (None, "fsdp", "tensor")),
    (r"layers/(self_attn/[qkv]|mlp/(gate|up))_proj/bias", (None, "tensor")),
    (r"layers/(self_attn/o|mlp/down)_proj/kernel", (None, "tensor", "fsdp")),
    (r".*", ()),  # replicated: norms, and biases added to unsharded features
)
"""Shards heads, MLP width and vocabulary over `"tensor"`, and hidden size over `"fsdp"`."""


def tensor_sizes(config: LlamaConfig) -> dict[str, int]:
    """Sizes that the mesh's tensor axis must divide. The vocabulary is not one: it may stay replicated."""
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    return {name: getattr(config, name) for name in names}
