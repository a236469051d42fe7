"""An encoder's sizes and options, read from Hugging Face's `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, Strict
from pydantic.dataclasses import dataclass

from ..config import CONFIG, Activation, Layers, ModelConfig, Share, Size, unsupported

_MODEL_TYPES = ("bert", "roberta", "xlm-roberta")
# Options that change what the model computes, each with its only supported value.
_ONLY = {
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "quantization_config": (None,),
}


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class BertConfig(ModelConfig):
    """An encoder's sizes and options, named as in Hugging Face's `config.json`.

    Attributes:
      model_type: `"bert"`, or `"roberta"` or `"xlm-roberta"`, whose positions start at `pad_token_id + 1`.
      max_position_embeddings: rows of the position table, including those that RoBERTa does not use.
      hidden_act: `"gelu"` is exact; `"gelu_new"` and `"gelu_pytorch_tanh"` are its tanh approximation.
      hidden_dropout_prob, attention_probs_dropout_prob: dropout rates, active if a `dropout` rng is given.
      initializer_range: standard deviation of initial weights.

    Raises:
      ValueError: a size is below 1, the heads do not divide the hidden size, a rate is outside [0, 1), or a
        name is unknown; lists all problems.
    """

    model_type: Literal[_MODEL_TYPES] = "bert"  # pyright: ignore[reportInvalidTypeForm]
    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    intermediate_size: Size
    max_position_embeddings: Size
    type_vocab_size: Size
    pad_token_id: Annotated[int, Strict(), Field(ge=0, lt=2**24)]
    hidden_act: Activation = "gelu"
    layer_norm_eps: Share = 1e-12
    hidden_dropout_prob: Share = 0.1
    attention_probs_dropout_prob: Share = 0.1
    initializer_range: Share = 0.02

    MODEL_TYPES = _MODEL_TYPES

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """See `ModelConfig.read`."""
        values = {key: value for key, value in config.items() if value is not None}
        return values, unsupported(values, _ONLY)

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens."""
        unused = 0 if self.model_type == "bert" else self.pad_token_id + 1
        return self.max_position_embeddings - unused

    def with_dropout(self, rate: float) -> Self:
        """The same with one rate everywhere."""
        return dataclasses.replace(self, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate)
