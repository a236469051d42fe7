"""BERT, MiniLM (a BERT) and RoBERTa encoders.

Axes in the comments: B sequences, T tokens, D hidden, N heads, H = D / N.
"""

from functools import partial
from typing import get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..._utils.validation import check_choice
from ...step.sharding import Rules, constrain_rows
from ..activations import ACTIVATIONS
from ..attention_common import target_platform
from ..checkpoints.name_table import NameTable, embedding_rules, linear_rules, norm_rules
from ..encoder import ForSequence, Pooling
from ..part import Part, check_inputs
from ..text_attention import text_attention
from .config import BertConfig


class BertPart(Part):
    """A module with BERT's norms and dropout."""

    @nn.nowrap
    def norm(self, name: str) -> nn.LayerNorm:
        """A LayerNorm."""
        return self.layer_norm(self.config.layer_norm_eps, name)

    @nn.nowrap
    def drop_hidden(self, x: jax.Array) -> jax.Array:
        """Applies hidden dropout if a `dropout` rng is given."""
        return self.drop(x, self.config.hidden_dropout_prob)


class BertEmbeddings(BertPart):
    """The normalized sum of word, position and token type embeddings."""

    @nn.compact
    def __call__(
        self, input_ids: jax.Array, attention_mask: jax.Array, token_type_ids: jax.Array | None
    ) -> jax.Array:
        """The first hidden states (B, T, D) for ids and mask (B, T)."""
        c = self.config
        types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        x = self.embed(c.vocab_size, "word")(input_ids) + self.embed(c.type_vocab_size, "token_type")(types)
        x = x + self.embed(c.max_position_embeddings, "position")(_positions(c, input_ids, attention_mask))
        return self.drop_hidden(self.norm("norm")(x))


def _positions(config: BertConfig, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
    """Position ids (B, T), counted anew in each text of a row; RoBERTa's padding has the position `pad_token_id`.

    RoBERTa's follow from the ids, not from the attention mask, as in transformers and fairseq's `make_positions`.
    """
    is_token = jnp.ones_like(input_ids)
    if config.model_type != "bert":
        is_token = (input_ids != config.pad_token_id).astype(jnp.int32)
    count = jnp.cumsum(is_token, axis=1)
    # Only the second and later texts begin anew, so that a plain mask, with padding anywhere, changes no position.
    before = jnp.pad(attention_mask, ((0, 0), (1, 0)))[:, :-1]
    begins = (attention_mask != before) & (attention_mask > 1)
    count -= jax.lax.cummax(jnp.where(begins, count - is_token, 0), axis=1)
    return count - 1 if config.model_type == "bert" else count * is_token + config.pad_token_id


class BertAttention(BertPart):
    """Multi-head attention from every token to all tokens of its text."""

    @nn.compact
    def __call__(self, x: jax.Array, segments: jax.Array) -> jax.Array:
        """(B, T, D) from hidden states (B, T, D) and the number of each token's text, int (B, T)."""
        c = self.config
        heads = (*x.shape[:2], c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        query, key, value = (
            self.dense(c.hidden_size, n)(x).reshape(heads) for n in ("query", "key", "value")
        )
        rate = c.attention_probs_dropout_prob
        drop = partial(self.drop, rate=rate) if rate > 0.0 and self.has_rng("dropout") else None
        y = text_attention(query, key, value, segments, drop=drop)
        return self.dense(c.hidden_size, "out")(y.reshape(x.shape))


class BertMLP(BertPart):
    """Two Dense layers with an activation between them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, T, D) from (B, T, D)."""
        x = ACTIVATIONS[self.config.hidden_act](self.dense(self.config.intermediate_size, "up")(x))
        return self.dense(self.config.hidden_size, "down")(x)


class BertLayer(BertPart):
    """Attention and MLP, each with a residual connection and post-norm; the body of an `nn.scan`."""

    @nn.compact
    def __call__(self, x: jax.Array, segments: jax.Array) -> tuple[jax.Array, None]:
        """Hidden states (B, T, D) to hidden states; None is the scan's empty output."""
        x = constrain_rows(x)
        args = (self.config, self.dtype, self.param_dtype)
        y = self.drop_hidden(BertAttention(*args, name="attention")(x, segments))
        x = self.norm("attention_norm")(x + y)
        y = self.drop_hidden(BertMLP(*args, name="mlp")(x))
        return self.norm("mlp_norm")(x + y), None


class BertEncoder(BertPart):
    """A BERT or RoBERTa encoder (arXiv 1810.04805, 1907.11692). Dropout is on when a `dropout` rng is given.

    Attributes:
      config, dtype, param_dtype: see `Part`.
      unroll: unroll the loop over layers (same stacked parameters), so that XLA's cost analysis counts every
        layer, not just one. None unrolls it on CPUs only, where a loop copies all that the backward pass needs.
    """

    unroll: bool | None = None

    @nn.compact
    def __call__(
        self, input_ids: jax.Array, attention_mask: jax.Array, token_type_ids: jax.Array | None = None
    ) -> jax.Array:
        """Last hidden states.

        Args:
          input_ids: int32 (B, T). An id outside the vocabulary gives NaN.
          attention_mask: bool or int (B, T), zero on padding. A row may hold several texts, one after the other,
            with the number of its text, from 1, at each token; a token attends to the tokens of its own text only.
          token_type_ids: int32 (B, T), zeros by default.

        Returns:
          (B, T, D) in `dtype`; values at padding are finite but meaningless.

        Raises:
          ValueError: T exceeds the model's maximum length, or shapes differ.
        """
        check_inputs(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        if (length := input_ids.shape[1]) > (limit := self.config.max_length):
            raise ValueError(
                f"input_ids has {length} tokens, the model takes at most {limit}; truncate the input"
            )
        args = (self.config, self.dtype, self.param_dtype)
        segments = attention_mask.astype(jnp.int32)
        x = BertEmbeddings(*args, name="embeddings")(input_ids, segments, token_type_ids)
        unroll = target_platform() == "cpu" if self.unroll is None else self.unroll
        layers = nn.scan(
            BertLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=self.config.num_hidden_layers,
            # init runs at most once, and a loop over one layer is faster to trace and to compile.
            unroll=self.config.num_hidden_layers if unroll and not self.is_initializing() else 1,
        )
        return constrain_rows(layers(*args, name="layers")(x, segments)[0])


class BertForSequence(ForSequence):
    """A BERT or RoBERTa with a head; its pooler is a dense layer with tanh on the first token."""

    config: BertConfig
    unroll: bool | None = None

    def setup(self) -> None:
        """Encoder, optional pooler, and head."""
        self.encoder = BertEncoder(self.config, self.dtype, self.param_dtype, self.unroll)
        if self.pooling == "pooler":
            init = nn.initializers.normal(self.config.initializer_range)
            self.pooler = nn.Dense(
                self.config.hidden_size, True, self.dtype, self.param_dtype, kernel_init=init
            )
        self.make_head()

    def apply_pooler(self, pooled: jax.Array) -> jax.Array:
        """See `ForSequence`."""
        return jnp.tanh(self.pooler(pooled))


_LAYER, _LAYERS = "encoder.layer.{layer}", "encoder/layers"
_RULES = (
    *embedding_rules("embeddings.word_embeddings", "encoder/embeddings/word"),
    *embedding_rules("embeddings.position_embeddings", "encoder/embeddings/position"),
    *embedding_rules("embeddings.token_type_embeddings", "encoder/embeddings/token_type"),
    *norm_rules("embeddings.LayerNorm", "encoder/embeddings/norm"),
    *linear_rules(f"{_LAYER}.attention.self.query", f"{_LAYERS}/attention/query"),
    *linear_rules(f"{_LAYER}.attention.self.key", f"{_LAYERS}/attention/key"),
    *linear_rules(f"{_LAYER}.attention.self.value", f"{_LAYERS}/attention/value"),
    *linear_rules(f"{_LAYER}.attention.output.dense", f"{_LAYERS}/attention/out"),
    *norm_rules(f"{_LAYER}.attention.output.LayerNorm", f"{_LAYERS}/attention_norm"),
    *linear_rules(f"{_LAYER}.intermediate.dense", f"{_LAYERS}/mlp/up"),
    *linear_rules(f"{_LAYER}.output.dense", f"{_LAYERS}/mlp/down"),
    *norm_rules(f"{_LAYER}.output.LayerNorm", f"{_LAYERS}/mlp_norm"),
)
# The base model has no prefix; the oldest BERT files call the norms' weight and bias gamma and beta.
_RENAMES = ((r"^(bert|roberta)\.", ""), (r"Norm\.gamma$", "Norm.weight"), (r"Norm\.beta$", "Norm.bias"))
# A buffer of older files, and the heads of pretraining and of other tasks.
_IGNORE = (r"embeddings\.position_ids", r"(pooler|cls|lm_head|classifier|qa_outputs)\..*")


def name_table(config: BertConfig, pooling: Pooling = "mean") -> NameTable:
    """Maps the tensors of a BERT or RoBERTa checkpoint to a `BertForSequence`, except its `head`.

    The checkpoint's pooler is loaded with `pooling="pooler"` and ignored otherwise.
    """
    check_choice("pooling", pooling, get_args(Pooling))
    rules = (*_RULES, *linear_rules("pooler.dense", "pooler")) if pooling == "pooler" else _RULES
    return NameTable(rules=rules, renames=_RENAMES, ignore=_IGNORE)


SHARDING: Rules = (
    (r"encoder/embeddings/word/embedding", ("tensor", "fsdp")),
    (r"encoder/embeddings/position/embedding", (None, "fsdp")),
    (r"encoder/layers/(attention/(query|key|value)|mlp/up)/kernel", (None, "fsdp", "tensor")),
    (r"encoder/layers/(attention/(query|key|value)|mlp/up)/bias", (None, "tensor")),
    (r"encoder/layers/(attention/out|mlp/down)/kernel", (None, "tensor", "fsdp")),
    # Replicated: norms, token types, pooler, head, and biases added to unsharded features.
    (r".*", ()),
)
"""Shards heads, MLP width and vocabulary over `"tensor"`, and hidden size over `"fsdp"`."""
