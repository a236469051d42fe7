"""GPT-2, without LoRA code.

transformers 5 has no Flax models any more, so the tests compare this file with its torch model
(`tests/golden/make_gpt2.py`). Modules within a layer have transformers' names.

Axes in the comments: B sequences, T tokens, D hidden, N heads, H = D / N.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ...step.sharding import Rules, constrain_rows
from ..activations import ACTIVATIONS
from ..checkpoints.name_table import (
    NameTable,
    conv1d_rules,
    embedding_rules,
    linear_rules,
    norm_rules,
    split_rules,
)
from ..choices import Attention
from ..decoder import Cache, CausalLM, Shared, attend, project
from ..part import Part
from .config import GPT2Config


class GPT2Attention(Part):
    """Multi-head attention; one matrix, `c_attn`, computes queries, keys and values, unless it is split."""

    attention: Attention = "auto"

    @nn.compact
    def __call__(
        self, x: jax.Array, shared: Shared, cache: Cache | None, layer: jax.Array
    ) -> tuple[jax.Array, Cache | None]:
        """(B, T, D) from (B, T, D), and the cache updated with this layer's keys and values."""
        c = self.config
        heads = (*x.shape[:2], c.num_attention_heads, c.head_dim)
        query, key, value = (part.reshape(heads) for part in project(x, c, "c_attn", self.dense))
        query = checkpoint_name(self._scaled(query, layer), "query")
        key, value = checkpoint_name(key, "key"), checkpoint_name(value, "value")
        y, cache = attend(query, key, value, shared, cache, layer, implementation=self.attention)
        return self.dense(c.hidden_size, "c_proj")(y.reshape(x.shape)), cache

    def _scaled(self, query: jax.Array, layer: jax.Array) -> jax.Array:
        """The queries, scaled where the scores of `attend`, q·k / sqrt(H), are not the config's."""
        c = self.config
        if not c.scale_attn_weights:
            query = query * math.sqrt(c.head_dim)
        if c.scale_attn_by_inverse_layer_idx:
            query = query / (layer + 1).astype(query.dtype)
        return query


class GPT2MLP(Part):
    """Two Dense layers with an activation between them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, T, D) from (B, T, D)."""
        c = self.config
        up = checkpoint_name(self.dense(c.intermediate_size, "c_fc")(x), "up")
        return self.dense(c.hidden_size, "c_proj")(ACTIVATIONS[c.activation_function](up))


class GPT2Layer(Part):
    """Attention and MLP, each with pre-norm and a residual connection; the body of an `nn.scan`."""

    attention: Attention = "auto"

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Cache | None], shared: Shared, layer: jax.Array
    ) -> tuple[tuple[jax.Array, Cache | None], None]:
        """Hidden states (B, T, D) and cache to the same; None is the scan's empty output."""
        x, cache = constrain_rows(carry[0]), carry[1]
        args = (self.config, self.dtype, self.param_dtype)
        y, cache = GPT2Attention(*args, attention=self.attention, name="attn")(
            self.layer_norm(self.config.layer_norm_epsilon, "ln_1")(x), shared, cache, layer
        )
        x = checkpoint_name(x + y, "attended")
        x = x + GPT2MLP(*args, name="mlp")(self.layer_norm(self.config.layer_norm_epsilon, "ln_2")(x))
        return (x, cache), None


class GPT2(CausalLM):
    """A causal language model with learned positions (Radford et al., 2019), without dropout.

    A position beyond the table gives NaN.

    Attributes:
      config: sizes and options; the other fields are those of `CausalLM`.
    """

    config: GPT2Config

    def setup(self) -> None:
        """Embeddings, layers, final norm, and a head unless it is tied to the embedding."""
        c = self.config
        self.embed_tokens = self.embed(c.vocab_size)
        self.embed_positions = self.embed(c.max_position_embeddings)
        self.layers: Any = self.make_layers(GPT2Layer)
        self.ln_f = self.layer_norm(c.layer_norm_epsilon)
        if not c.tie_word_embeddings:
            self.lm_head = self.dense(c.vocab_size, bias=False)

    def run(
        self, input_ids: jax.Array, positions: jax.Array, shared: Shared, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        """The input of the head (B, T, D), and the updated cache; see `CausalLM.run`."""
        x = self.embed_tokens(input_ids) + self.embed_positions(positions)
        layers = jnp.arange(self.config.num_hidden_layers)
        (x, cache), _ = self.layers((x, cache), shared, layers)
        return self.ln_f(constrain_rows(x)), cache


def name_table(config: GPT2Config) -> NameTable:
    """Maps the tensors of a Hugging Face checkpoint to a `GPT2`."""
    layer, layers = "h.{layer}", "layers"
    rules = [
        *embedding_rules("wte", "embed_tokens"),
        *embedding_rules("wpe", "embed_positions"),
        *norm_rules("ln_f", "ln_f"),
    ]
    for name in ("ln_1", "ln_2"):
        rules += norm_rules(f"{layer}.{name}", f"{layers}/{name}")
    for part, name in (("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj")):
        made = conv1d_rules(f"{layer}.{part}.{name}", f"{layers}/{part}/{name}")
        is_split = name in config.projections and not config.fused
        rules += split_rules(made, config.projections[name]) if is_split else made
    copies = ()
    if config.tie_word_embeddings:
        # Some files hold the embedding twice.
        copies = (("lm_head.weight", "wte.weight"),)
    else:
        rules += linear_rules("lm_head", "lm_head", bias=False)
    # Buffers of older files: causal masks.
    ignore = (r"h\.\d+\.attn\.(bias|masked_bias)",)
    return NameTable(rules=tuple(rules), renames=((r"^transformer\.", ""),), ignore=ignore, copies=copies)


SHARDING: Rules = (
    (r"embed_tokens/embedding", ("tensor", "fsdp")),
    (r"embed_positions/embedding", (None, "fsdp")),
    (r"lm_head/kernel", ("fsdp", "tensor")),
    (r"layers/(attn/[cqkv]_attn|mlp/c_fc)/kernel", (None, "fsdp", "tensor")),
    (r"layers/(attn/[cqkv]_attn|mlp/c_fc)/bias", (None, "tensor")),
    (r"layers/(attn|mlp)/c_proj/kernel", (None, "tensor", "fsdp")),
    (r".*", ()),  # replicated: norms, and biases added to unsharded features
)
"""Shards heads, MLP width and vocabulary over `"tensor"`, and hidden size over `"fsdp"`."""
