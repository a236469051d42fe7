"""BERT, MiniLM (a BERT) and RoBERTa encoders, with a sequence classification or regression head.

Axes in the comments: B sequences, T tokens, D hidden, N heads, H = D / N.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..._utils.validation import check_choice
from ...step.sharding import Rules, constrain_rows
from ..activations import ACTIVATIONS
from ..attention_common import target_platform
from ..checkpoints.name_table import NameTable, embedding_rules, linear_rules, norm_rules
from ..part import Part, check_inputs
from .attention import text_attention, text_mask
from .config import BertConfig

Pooling = Literal["mean", "cls", "pooler"]
_Map = Callable[[jax.Array], jax.Array]


class BertPart(Part):
    """A module with BERT's norms and dropout."""

    @nn.nowrap
    def norm(self, name: str) -> nn.LayerNorm:
        """A LayerNorm."""
        return self.layer_norm(self.config.layer_norm_eps, name)

    @nn.nowrap
    def drop(self, x: jax.Array) -> jax.Array:
        """Applies hidden dropout if a `dropout` rng is given."""
        return _dropout(self, x, self.config.hidden_dropout_prob)


def _dropout(module: nn.Module, x: jax.Array, rate: float) -> jax.Array:
    return nn.Dropout(rate, deterministic=not module.has_rng("dropout"))(x)


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
        return self.drop(self.norm("norm")(x))


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
        if rate > 0.0 and self.has_rng("dropout"):
            mask = text_mask(segments)[:, None]
            y = _attend(query, key, value, mask, partial(_dropout, self, rate=rate))
        else:
            y = text_attention(query, key, value, segments)
        return self.dense(c.hidden_size, "out")(y.reshape(x.shape))


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, drop: _Map) -> jax.Array:
    # Written out, as `text_attention` has no dropout of the probabilities (B, N, T, T).
    scores = jnp.einsum("BTNH,BSNH->BNTS", query, key, preferred_element_type=jnp.float32)
    scores = scores / math.sqrt(query.shape[-1])
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = drop(jax.nn.softmax(scores, axis=-1)).astype(value.dtype)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, value)


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
        y = self.drop(BertAttention(*args, name="attention")(x, segments))
        x = self.norm("attention_norm")(x + y)
        y = self.drop(BertMLP(*args, name="mlp")(x))
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
            unroll=self.config.num_hidden_layers if unroll else 1,
        )
        return constrain_rows(layers(*args, name="layers")(x, segments)[0])


class BertForSequence(nn.Module):
    """An encoder with pooling and a linear head, for classification or regression.

    Attributes:
      config, dtype, param_dtype, unroll: as in `BertEncoder`.
      num_outputs: number of outputs of the head.
      pooling: `"mean"` over unmasked tokens, `"cls"` for the first token, `"pooler"` for BERT's own tanh layer
        on the first token.
      head_dropout: dropout rate before the head, active if a `dropout` rng is given.
    """

    config: BertConfig
    num_outputs: int
    pooling: Pooling = "mean"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    unroll: bool | None = None
    head_dropout: float = 0.1

    def setup(self) -> None:
        """Encoder, optional pooler, and head. The head is float32: bf16 would lose small updates of a new layer."""
        check_choice("pooling", self.pooling, get_args(Pooling))
        init = nn.initializers.normal(self.config.initializer_range)
        self.encoder = BertEncoder(self.config, self.dtype, self.param_dtype, self.unroll)
        if self.pooling == "pooler":
            self.pooler = nn.Dense(
                self.config.hidden_size, True, self.dtype, self.param_dtype, kernel_init=init
            )
        self.dropout = nn.Dropout(self.head_dropout)
        self.head = nn.Dense(self.num_outputs, dtype=jnp.float32, kernel_init=init)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        token_type_ids: jax.Array | None = None,
        texts: int | None = None,
    ) -> jax.Array:
        """The head's outputs.

        Args:
          input_ids, attention_mask, token_type_ids: as for `BertEncoder`.
          texts: S, the most texts in a row; None if every row is one text.

        Returns:
          float32 (B, num_outputs), or (B, S, num_outputs) with `texts`, of which those beyond the number of a row's
          texts are meaningless.
        """
        hidden = self.encode(input_ids, attention_mask, token_type_ids)
        if texts is not None:
            pooled = pool_texts(hidden, attention_mask, texts, first=self.pooling != "mean")
        else:
            pooled = masked_mean(hidden, attention_mask) if self.pooling == "mean" else hidden[:, 0]
        if self.pooling == "pooler":
            pooled = jnp.tanh(self.pooler(pooled))
        return self.head(self.dropout(pooled, deterministic=not self.has_rng("dropout")))

    def encode(
        self, input_ids: jax.Array, attention_mask: jax.Array, token_type_ids: jax.Array | None = None
    ) -> jax.Array:
        """The encoder's last hidden states, (B, T, D) in `dtype`."""
        return self.encoder(input_ids, attention_mask, token_type_ids)


def masked_mean(hidden: jax.Array, attention_mask: jax.Array) -> jax.Array:
    """Mean over unmasked tokens, float32 (B, D); zeros for a row without any.

    >>> masked_mean(jnp.array([[[1.0], [3.0], [9.0]]]), jnp.array([[1, 1, 0]]))
    Array([[2.]], dtype=float32)
    """
    keep = attention_mask.astype(bool)[:, :, None]
    total = jnp.sum(jnp.where(keep, hidden.astype(jnp.float32), 0.0), axis=1)
    return total / jnp.maximum(jnp.sum(keep, axis=1), 1)


def pool_texts(hidden: jax.Array, attention_mask: jax.Array, texts: int, *, first: bool) -> jax.Array:
    """The mean over the tokens of each text of a row, or the first token; zeros beyond the last text.

    Args:
      hidden: (B, T, D).
      attention_mask: int (B, T), the number of each token's text, from 1, and 0 at padding.
      texts: S, the most texts in a row.
      first: whether to take the first token instead of the mean.

    Returns:
      float32 (B, S, D).

    >>> hidden = jnp.array([[[1.0], [3.0], [9.0], [5.0]]])
    >>> pool_texts(hidden, jnp.array([[1, 1, 2, 0]]), 3, first=False).ravel()
    Array([2., 9., 0.], dtype=float32)
    """
    share = (attention_mask[:, None] == jnp.arange(1, texts + 1)[None, :, None]).astype(jnp.float32)
    if first:
        share *= jnp.cumsum(share, axis=2) == 1
    else:
        share /= jnp.maximum(jnp.sum(share, axis=2, keepdims=True), 1)
    # A product, whose gradient is one too: gathers of rows that are split over devices would move them. At full
    # precision, which an accelerator would not give a float32 product.
    return jnp.einsum("bst,btd->bsd", share, hidden.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


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


def name_table(pooling: Pooling = "mean") -> NameTable:
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
