"""ModernBERT (arXiv 2412.13663): rotary positions, windows in most layers, gated MLPs.

The layers have names of their own instead of a loop: they differ in their windows and rates, and the first has no
norm before its attention.

Axes in the comments: B rows, T tokens, D hidden, N heads, H = D / N.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from ...step.sharding import Rules, constrain_rows
from ..activations import ACTIVATIONS
from ..checkpoints.name_table import NameTable, Rule, embedding_rules, linear_rules, norm_rules, split_rules
from ..encoder import ForSequence, Pooling
from ..part import Part, check_inputs
from ..rope import Angles, Rope, apply_rope, make_rope
from ..text_attention import text_attention
from .config import ModernBertConfig


class ModernBertPart(Part):
    """A module with ModernBERT's norms."""

    @nn.nowrap
    def norm(self, name: str | None = None) -> nn.LayerNorm:
        """A LayerNorm."""
        return self.layer_norm(self.config.norm_eps, name, bias=self.config.norm_bias)


class ModernBertAttention(ModernBertPart):
    """Multi-head attention of every token to those of its text, or of a window of it."""

    window: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, segments: jax.Array, rope: Rope) -> jax.Array:
        """(B, T, D) from hidden states (B, T, D) and the number of each token's text, int (B, T)."""
        c = self.config
        heads = (*x.shape[:2], c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        query, key, value = (
            self.dense(c.hidden_size, n, bias=c.attention_bias)(x).reshape(heads)
            for n in ("query", "key", "value")
        )
        rate = c.attention_dropout
        drop = partial(self.drop, rate=rate) if rate > 0.0 and self.has_rng("dropout") else None
        rotated = apply_rope(query, rope), apply_rope(key, rope)
        y = text_attention(*rotated, value, segments, window=self.window, drop=drop)
        y = self.dense(c.hidden_size, "out", bias=c.attention_bias)(y.reshape(x.shape))
        return self.drop(y, rate)


class ModernBertMLP(ModernBertPart):
    """A gated MLP (arXiv 2002.05202)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, T, D) from (B, T, D)."""
        c = self.config
        up, gate = (self.dense(c.intermediate_size, n, bias=c.mlp_bias)(x) for n in ("up", "gate"))
        x = self.drop(ACTIVATIONS[c.hidden_activation](up) * gate, c.mlp_dropout)
        return self.dense(c.hidden_size, "down", bias=c.mlp_bias)(x)


class ModernBertLayer(ModernBertPart):
    """Attention and MLP, each with pre-norm and a residual connection.

    Attributes:
      number: the layer's number; the first has no norm before its attention.
    """

    number: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, segments: jax.Array, ropes: tuple[Rope, Rope]) -> jax.Array:
        """(B, T, D) from hidden states (B, T, D), texts (B, T) and both kinds of angles."""
        c, args = self.config, (self.config, self.dtype, self.param_dtype)
        x = constrain_rows(x)
        is_local = c.layer_types[self.number] == "sliding_attention"
        window = c.local_attention // 2 if is_local else None
        y = self.norm("attention_norm")(x) if self.number else x
        x = x + ModernBertAttention(*args, window, name="attention")(y, segments, ropes[is_local])
        return x + ModernBertMLP(*args, name="mlp")(self.norm("mlp_norm")(x))


class ModernBertEncoder(ModernBertPart):
    """A ModernBERT encoder. Dropout is on when a `dropout` rng is given."""

    @nn.compact
    def __call__(
        self, input_ids: jax.Array, attention_mask: jax.Array, token_type_ids: jax.Array | None = None
    ) -> jax.Array:
        """Last hidden states (B, T, D); arguments and errors as for `BertEncoder`, without kinds of tokens."""
        c, args = self.config, (self.config, self.dtype, self.param_dtype)
        check_inputs(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        if (length := input_ids.shape[1]) > c.max_length:
            raise ValueError(
                f"input_ids has {length} tokens, the model takes at most {c.max_length}; truncate the input"
            )
        # Attention depends on the distance of two tokens, so the texts of a row need not begin at 0.
        size = c.hidden_size // c.num_attention_heads
        angles = Angles(jnp.arange(length)[None], None, size, 0.0, c.max_length)
        full, local = (make_rope(angles._replace(theta=theta)) for theta in c.rope_thetas)
        x = self.drop(self.norm("norm")(self.embed(c.vocab_size, "word")(input_ids)), c.embedding_dropout)
        segments = attention_mask.astype(jnp.int32)
        for number in range(c.num_hidden_layers):
            x = ModernBertLayer(*args, number, name=f"layers_{number}")(x, segments, (full, local))
        return constrain_rows(self.norm("final_norm")(x))


class ModernBertPooler(ModernBertPart):
    """The layers between pooled hidden states and head in transformers' `ModernBertForSequenceClassification`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., D) from (..., D)."""
        c = self.config
        x = self.dense(c.hidden_size, "dense", bias=c.classifier_bias)(x)
        return self.norm("norm")(ACTIVATIONS[c.classifier_activation](x))


class ModernBertForSequence(ForSequence):
    """A ModernBERT with a head; its pooler follows the first token or the mean, as the config says."""

    config: ModernBertConfig

    def setup(self) -> None:
        """Encoder, optional pooler, and head."""
        args = (self.config, self.dtype, self.param_dtype)
        self.encoder = ModernBertEncoder(*args)
        if self.pooling == "pooler":
            self.pooler = ModernBertPooler(*args)
        self.make_head()

    @property
    def takes_first(self) -> bool:
        """See `ForSequence`."""
        return (self.config.classifier_pooling if self.pooling == "pooler" else self.pooling) == "cls"

    def apply_pooler(self, pooled: jax.Array) -> jax.Array:
        """See `ForSequence`."""
        return self.pooler(pooled)


def name_table(config: ModernBertConfig, pooling: Pooling = "mean") -> NameTable:
    """Maps the tensors of a ModernBERT checkpoint to a `ModernBertForSequence`, except its `head`.

    The projections that a checkpoint fuses are layers of their own. Its pooler is loaded with `pooling="pooler"`
    and ignored otherwise.
    """
    c, norm = config, partial(norm_rules, bias=config.norm_bias)
    rules: list[Rule] = [
        *embedding_rules("embeddings.tok_embeddings", "encoder/word"),
        *norm("embeddings.norm", "encoder/norm"),
        *norm("final_norm", "encoder/final_norm"),
    ]
    qkv: dict[str, int] = {"query": c.hidden_size, "key": c.hidden_size, "value": c.hidden_size}
    wi: dict[str, int] = {"up": c.intermediate_size, "gate": c.intermediate_size}
    for number in range(c.num_hidden_layers):
        theirs, ours = f"layers.{number}", f"encoder/layers_{number}"
        rules += norm(f"{theirs}.attn_norm", f"{ours}/attention_norm") if number else ()
        rules += norm(f"{theirs}.mlp_norm", f"{ours}/mlp_norm")
        for block, name, fused, sizes, last, bias in (
            ("attention", "attn", "Wqkv", qkv, "out", c.attention_bias),
            ("mlp", "mlp", "Wi", wi, "down", c.mlp_bias),
        ):
            whole = linear_rules(f"{theirs}.{name}.{fused}", f"{ours}/{block}/{fused}", bias=bias)
            rules += split_rules(whole, sizes)
            rules += linear_rules(f"{theirs}.{name}.Wo", f"{ours}/{block}/{last}", bias=bias)
    if pooling == "pooler":
        rules += linear_rules("head.dense", "pooler/dense", bias=c.classifier_bias)
        rules += norm("head.norm", "pooler/norm")
    # The heads of pretraining and of other tasks.
    ignore = (r"(head|decoder|classifier)\..*",)
    return NameTable(rules=tuple(rules), renames=((r"^model\.", ""),), ignore=ignore)


SHARDING: Rules = (
    (r"encoder/word/embedding", ("tensor", "fsdp")),
    (r"encoder/layers_\d+/(attention/(query|key|value)|mlp/(up|gate))/kernel", ("fsdp", "tensor")),
    (r"encoder/layers_\d+/(attention/(query|key|value)|mlp/(up|gate))/bias", ("tensor",)),
    (r"encoder/layers_\d+/(attention/out|mlp/down)/kernel", ("tensor", "fsdp")),
    # Replicated: norms, pooler, head, and biases added to unsharded features.
    (r".*", ()),
)
"""Shards heads, MLP width and vocabulary over `"tensor"`, and hidden size over `"fsdp"`."""
