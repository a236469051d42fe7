"""The Llama family: the models of `config.KINDS`, from Llama to OLMo; without LoRA code.

The config selects the model; what it varies by layer is an array or a value for each layer, not code.

transformers 5 has no Flax models any more, and no other package has these in Linen, so the tests compare this file
with transformers' torch models (`tests/golden/make_llama.py`).

Axes in the comments: B sequences, T tokens, D hidden, N heads, K key heads, H head size, L layers, S cache slots.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ...step.sharding import Rules, constrain_rows
from ..activations import ACTIVATIONS
from ..checkpoints.name_table import NameTable, Rule, embedding_rules, linear_rules, norm_rules, split_rules
from ..choices import Attention
from ..decoder import Cache, CausalLM, Shared, attend, project
from ..mixture import mix
from ..part import Part
from ..rope import apply_rope
from .config import LlamaConfig


class RMSNorm(nn.Module):
    """Divides by the root mean square of the last axis (arXiv 1910.07467); computes in at least float32.

    Attributes:
      epsilon: added to the mean square.
      offset: what is added to the parameter `scale`; 1 in Gemma, whose scales are stored as their distance from 1.
      dtype, param_dtype: dtype of the result and of the parameter.
    """

    epsilon: float
    offset: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., D) from (..., D)."""
        init = nn.initializers.constant(1 - self.offset)
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        # The offset is added in float32: beside a 1, bfloat16 would drop what a small scale has learned.
        scale = jnp.expand_dims(self.offset + scale.astype(jnp.float32), range(x.ndim - 1))
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * (inverse * scale)).astype(self.dtype)


class LlamaPart(Part):
    """A module with the family's norms."""

    @nn.nowrap
    def norm(self, name: str | None) -> Callable[[jax.Array], jax.Array]:
        """An RMSNorm, or the identity where the family has none."""
        if name is None:
            return lambda x: x
        c = self.config
        return RMSNorm(c.rms_norm_eps, c.kind.norm_offset, self.dtype, self.param_dtype, name=name)


class LlamaAttention(LlamaPart):
    """Grouped-query attention with rotary positions."""

    attention: Attention = "auto"

    @nn.compact
    def __call__(
        self, x: jax.Array, shared: Shared, cache: Cache | None, layer: jax.Array
    ) -> tuple[jax.Array, Cache | None]:
        """(B, T, D) from (B, T, D), and the cache updated with this layer's keys and values."""
        c = self.config
        dense = functools.partial(self.dense, bias=c.qkv_bias)
        query, key, value = project(x, c, "qkv_proj", dense)
        if c.kind.qk_norm == "all":
            query, key = self.norm("q_norm")(query), self.norm("k_norm")(key)
        query, key, value = (part.reshape(*x.shape[:2], -1, c.head_dim) for part in (query, key, value))
        if c.kind.qk_norm == "head":
            query, key = self.norm("q_norm")(query), self.norm("k_norm")(key)
        rope = c.layer_rope(shared.rope, layer)
        # The policy `dots` of `CausalLM` saves what has a name.
        query = checkpoint_name(apply_rope(query, rope), "query")
        key, value = checkpoint_name(apply_rope(key, rope), "key"), checkpoint_name(value, "value")
        y, cache = attend(
            query,
            key,
            value,
            shared,
            cache,
            layer,
            window=c.layer_window(layer),
            scale=c.attention_scale,
            softcap=c.attn_logit_softcapping,
            implementation=self.attention,
        )
        return self.dense(c.hidden_size, "o_proj", bias=c.attention_bias)(y.reshape(*x.shape[:2], -1)), cache


class LlamaMLP(LlamaPart):
    """A gated MLP, such as SwiGLU or GEGLU (arXiv 2002.05202)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, T, D) from (B, T, D)."""
        c = self.config
        gate, up = project(x, c, "gate_up_proj", functools.partial(self.dense, bias=c.mlp_bias))
        gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
        return self.dense(c.hidden_size, "down_proj", bias=c.mlp_bias)(ACTIVATIONS[c.hidden_act](gate) * up)


class LlamaExpert(LlamaPart):
    """One linear layer of each expert: a kernel only, which `LlamaExperts` multiplies with."""

    @nn.compact
    def __call__(self, inputs: int, outputs: int) -> jax.Array:
        """The kernels (E, inputs, outputs)."""
        shape = (self.config.num_experts, inputs, outputs)
        init = nn.initializers.normal(self.config.initializer_range)
        return jnp.asarray(self.param("kernel", init, shape, self.param_dtype), self.dtype)


class LlamaExperts(LlamaPart):
    """The kernels of all experts, gate and up joined, as in transformers."""

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """(E, D, 2 I) and (E, I, D)."""
        c, args = self.config, (self.config, self.dtype, self.param_dtype)
        up = LlamaExpert(*args, name="gate_up_proj")(c.hidden_size, 2 * c.intermediate_size)
        return up, LlamaExpert(*args, name="down_proj")(c.intermediate_size, c.hidden_size)


class LlamaMixture(LlamaPart):
    """A mixture of gated MLPs, of which each token has some, chosen by a router (arXiv 2401.04088, section 2.1)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, T, D) from (B, T, D)."""
        c = self.config
        scores = self.dense(c.num_experts, "gate", bias=False)(x)
        shares, chosen = jax.lax.top_k(jax.nn.softmax(scores.astype(jnp.float32)), c.num_experts_per_tok)
        if c.norm_topk_prob:
            shares /= jnp.sum(shares, axis=-1, keepdims=True)
        kernels = LlamaExperts(c, self.dtype, self.param_dtype, name="experts")()
        return mix(x, shares.astype(x.dtype), chosen, *kernels, activation=ACTIVATIONS[c.hidden_act])


class LlamaLayer(LlamaPart):
    """Attention and MLP, each with norms and a residual connection; the body of an `nn.scan`."""

    attention: Attention = "auto"

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Cache | None], shared: Shared, layer: jax.Array
    ) -> tuple[tuple[jax.Array, Cache | None], None]:
        """Hidden states (B, T, D) and cache to the same; None is the scan's empty output."""
        x, cache = constrain_rows(carry[0]), carry[1]
        args = (self.config, self.dtype, self.param_dtype)
        before, after, before_mlp, after_mlp = map(self.norm, self.config.kind.norms)
        y, cache = LlamaAttention(*args, attention=self.attention, name="self_attn")(
            before(x), shared, cache, layer
        )
        x = checkpoint_name(x + after(y), "attended")
        mlp = LlamaMixture if self.config.num_experts else LlamaMLP
        x = x + after_mlp(mlp(*args, name="mlp")(before_mlp(x)))
        return (x, cache), None


class Llama(CausalLM):
    """A causal language model (arXiv 2302.13971, 2407.21783; 2310.06825; 2407.10671, 2505.09388; 2408.00118,
    2503.19786; 2404.14219; 2501.00656; 2401.04088).

    Attributes:
      config: sizes and options; the other fields are those of `CausalLM`.
    """

    config: LlamaConfig

    def setup(self) -> None:
        """Embedding, layers, final norm, and a head unless it is tied to the embedding."""
        c = self.config
        self.embed_tokens = self.embed(c.vocab_size)
        self.layers: Any = self.make_layers(LlamaLayer)
        self.norm = RMSNorm(c.rms_norm_eps, c.kind.norm_offset, self.dtype, self.param_dtype)
        if not c.tie_word_embeddings:
            self.lm_head = self.dense(c.vocab_size, bias=False)

    def run(
        self, input_ids: jax.Array, positions: jax.Array, shared: Shared, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        """The input of the head (B, T, D), and the updated cache; see `CausalLM.run`."""
        c, lengths = self.config, None
        if cache is not None:  # without the padding before a row's first token
            lengths = cache.segment_ids.shape[1] - jnp.argmax(cache.segment_ids > 0, axis=1)
        shared = shared._replace(rope=c.rope(positions, lengths))
        # The factor in the compute dtype, as in transformers: bfloat16 rounds it.
        x = self.embed_tokens(input_ids) * jnp.asarray(c.embedding_scale, self.dtype)
        (x, cache), _ = self.layers((x, cache), shared, jnp.arange(c.num_hidden_layers))
        return self.norm(constrain_rows(x)), cache


def name_table(config: LlamaConfig) -> NameTable:
    """Maps the tensors of a Hugging Face checkpoint to a `Llama`."""
    layer, layers = "layers.{layer}", "layers"
    rules: list[Rule] = [
        *embedding_rules("embed_tokens", "embed_tokens"),
        *norm_rules("norm", "norm", bias=False),
    ]
    for name in filter(None, config.kind.norms):
        rules += norm_rules(f"{layer}.{name}", f"{layers}/{name}", bias=False)
    for name in ("q_norm", "k_norm") if config.kind.qk_norm else ():
        rules += norm_rules(f"{layer}.self_attn.{name}", f"{layers}/self_attn/{name}", bias=False)

    def dense_rules(block: str, name: str, bias: bool) -> tuple[Rule, ...]:
        return linear_rules(f"{layer}.{block}.{name}", f"{layers}/{block}/{name}", bias=bias)

    rules += dense_rules("self_attn", "o_proj", config.attention_bias)
    projections = [("self_attn", "qkv_proj", config.qkv_bias)]
    if config.num_experts:
        for name, theirs, parameter in (
            ("gate", "gate", "gate.weight"),
            ("experts/gate_up_proj", "experts.{expert}.{gate_proj|up_proj}", "experts.gate_up_proj"),
            ("experts/down_proj", "experts.{expert}.down_proj", "experts.down_proj"),
        ):
            (rule,) = linear_rules(f"{layer}.mlp.{theirs}", f"{layers}/mlp/{name}", bias=False)
            rules.append(dataclasses.replace(rule, parameter=f"{layer}.mlp.{parameter}"))
    else:
        rules += dense_rules("mlp", "down_proj", config.mlp_bias)
        projections.append(("mlp", "gate_up_proj", config.mlp_bias))
    for block, name, bias in projections:
        parts = config.projections[name]
        for each in (name,) if config.kind.fused else parts:
            made = dense_rules(block, each, bias)
            rules += made if config.fused or each in parts else split_rules(made, parts)
    copies = ()
    if config.tie_word_embeddings:
        # Some files hold the embedding twice.
        copies = (("lm_head.weight", "embed_tokens.weight"),)
    else:
        rules += linear_rules("lm_head", "lm_head", bias=False)
    renames = ((r"^model\.", ""), *config.kind.renames)
    ignore = (r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"rotary_emb\.inv_freq")
    return NameTable(rules=tuple(rules), renames=renames, ignore=ignore, copies=copies)


SHARDING: Rules = (
    (r"embed_tokens/embedding", ("tensor", "fsdp")),
    (r"lm_head/kernel", ("fsdp", "tensor")),
    (r"layers/(self_attn/([qkv]|qkv)|mlp/(gate|up|gate_up))_proj/kernel", (None, "fsdp", "tensor")),
    (r"layers/(self_attn/([qkv]|qkv)|mlp/(gate|up|gate_up))_proj/bias", (None, "tensor")),
    (r"layers/(self_attn/o|mlp/down)_proj/kernel", (None, "tensor", "fsdp")),
    (r"layers/mlp/experts/gate_up_proj/kernel", (None, "tensor", "fsdp", None)),
    (r"layers/mlp/experts/down_proj/kernel", (None, "tensor", None, "fsdp")),
    (r".*", ()),  # replicated: norms, and biases added to unsharded features
)
"""Shards heads, MLP width or experts, and vocabulary over `"tensor"`, and hidden size over `"fsdp"`."""
