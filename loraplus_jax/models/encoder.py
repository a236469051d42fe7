"""What encoders share: pooling of the hidden states of one or several texts a row, and a head.

Axes in the comments: B rows, T tokens, D hidden, S texts in a row.
"""

from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from .._utils.validation import check_choice

Pooling = Literal["mean", "cls", "pooler"]


class ForSequence(nn.Module):
    """Base class of encoders with pooling and a linear head, for classification or regression.

    In its `setup` a family makes `encoder` and what `apply_pooler` needs, and calls `make_head`.

    Attributes:
      config: sizes and options.
      num_outputs: number of outputs of the head.
      pooling: `"mean"` over unmasked tokens, `"cls"` for the first token, `"pooler"` for the model's own layer.
      dtype: compute dtype of the encoder.
      param_dtype: dtype of the encoder's parameters.
      head_dropout: dropout rate before the head, active if a `dropout` rng is given.
    """

    config: Any
    num_outputs: int
    pooling: Pooling = "mean"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    head_dropout: float = 0.1

    def make_head(self) -> None:
        """The head, which is float32: bf16 would lose small updates of a new layer."""
        check_choice("pooling", self.pooling, get_args(Pooling))
        init = nn.initializers.normal(self.config.initializer_range)
        self.dropout = nn.Dropout(self.head_dropout)
        self.head = nn.Dense(self.num_outputs, dtype=jnp.float32, kernel_init=init)

    @property
    def takes_first(self) -> bool:
        """Whether pooling takes the first token instead of the mean."""
        return self.pooling != "mean"

    def apply_pooler(self, pooled: jax.Array) -> jax.Array:
        """The pooler's own layers, on (..., D)."""
        raise NotImplementedError

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        token_type_ids: jax.Array | None = None,
        texts: int | None = None,
    ) -> jax.Array:
        """The head's outputs.

        Args:
          input_ids, attention_mask, token_type_ids: of the encoder.
          texts: S, the most texts in a row; None if every row is one text.

        Returns:
          float32 (B, num_outputs), or (B, S, num_outputs) with `texts`, of which those beyond the number of a row's
          texts are meaningless.
        """
        hidden = self.encode(input_ids, attention_mask, token_type_ids)
        if texts is not None:
            pooled = pool_texts(hidden, attention_mask, texts, first=self.takes_first)
        else:
            pooled = hidden[:, 0] if self.takes_first else masked_mean(hidden, attention_mask)
        if self.pooling == "pooler":
            pooled = self.apply_pooler(pooled)
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
