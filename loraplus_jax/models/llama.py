"""The Llama family: Llama 2 and 3, SmolLM2, Mistral, Qwen2 and Qwen3, selected by config; without LoRA code.

transformers 5 has no Flax models any more, and no other package has these in Linen, so the tests compare this file
with transformers' torch models (`tests/golden/make_llama.py`).

Axes in the comments: B sequences, T tokens, D hidden, N heads, K key heads, H head size, L layers, S cache slots.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ..sharding import Rules, constrain_rows
from .attention import Attention
from .decoder import Cache, CausalLM, Shared, attend
from .llama_config import LlamaConfig
from .name_table import NameTable, Rule, embedding_rules, linear_rules, norm_rules
from .rope import apply_rope


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
        self, x: jax.Array, shared: Shared, cache: Cache | None, layer: jax.Array
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
        y, cache = attend(
            query,
            key,
            value,
            shared,
            cache,
            layer,
            window=c.sliding_window,
            implementation=self.attention,
        )
        return self.dense(c.hidden_size, "o_proj", bias=c.attention_bias)(y.reshape(*x.shape[:2], -1)), cache


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
        self, carry: tuple[jax.Array, Cache | None], shared: Shared, layer: jax.Array
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


class Llama(CausalLM):
    """A causal language model (arXiv 2302.13971, 2407.21783; 2310.06825; 2407.10671, 2505.09388).

    Attributes:
      config: sizes and options; the other fields are those of `CausalLM`.
    """

    config: LlamaConfig

    def setup(self) -> None:
        """Embedding, layers, final norm, and a head unless it is tied to the embedding."""
        c = self.config
        self.embed_tokens = self.make_embedding(c.vocab_size)
        self.layers: Any = self.make_layers(LlamaLayer)
        self.norm = nn.RMSNorm(c.rms_norm_eps, self.dtype, self.param_dtype)
        if not c.tie_word_embeddings:
            self.lm_head = self.make_head()

    def run(
        self, input_ids: jax.Array, positions: jax.Array, shared: Shared, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        """The input of the head (B, T, D), and the updated cache; see `CausalLM.run`."""
        shared = shared._replace(rope=self.config.rope(positions))
        layers = jnp.arange(self.config.num_hidden_layers)
        (x, cache), _ = self.layers((self.embed_tokens(input_ids), cache), shared, layers)
        return self.norm(constrain_rows(x)), cache


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
