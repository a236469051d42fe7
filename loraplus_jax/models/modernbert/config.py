"""The sizes and options of a ModernBERT, read from Hugging Face's `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic.dataclasses import dataclass

from ..config import (
    CONFIG,
    Activation,
    Epsilon,
    Layers,
    ModelConfig,
    Positions,
    Positive,
    Share,
    Size,
    Switch,
)
from ..config import unsupported as unsupported_options
from ..rope import scaling_options

LayerType = Literal["full_attention", "sliding_attention"]
_ONLY = {"quantization_config": (None,), "is_decoder": (False,)}
_THETAS = {
    "full_attention": ("global_rope_theta", 160_000.0),
    "sliding_attention": ("local_rope_theta", 10_000.0),
}
"""By the type of a layer, the name of the base of its angles in files of transformers 4, and its default."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ModernBertConfig(ModelConfig):
    """The sizes and options of a ModernBERT, named as in Hugging Face's `config.json`.

    Attributes:
      layer_types: by layer, whether its tokens attend to the whole text or to a window.
      local_attention: the window: a token attends to half as many on either side.
      rope_thetas: bases of the rotary angles in layers with full attention and with a window.
      embedding_dropout, attention_dropout, mlp_dropout: dropout rates, active if a `dropout` rng is given.
      classifier_pooling, classifier_bias, classifier_activation: of the model's own pooler.
      initializer_range: standard deviation of initial weights.

    Raises:
      ValueError: as for `BertConfig`.
    """

    model_type: Literal["modernbert"] = "modernbert"
    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    intermediate_size: Size
    max_position_embeddings: Positions = 8192
    layer_types: tuple[LayerType, ...]
    local_attention: Size = 128
    rope_thetas: tuple[Positive, Positive] = (160_000.0, 10_000.0)
    hidden_activation: Activation = "gelu"
    norm_eps: Epsilon = 1e-5
    norm_bias: Switch = False
    attention_bias: Switch = False
    mlp_bias: Switch = False
    embedding_dropout: Share = 0.0
    attention_dropout: Share = 0.0
    mlp_dropout: Share = 0.0
    classifier_pooling: Literal["cls", "mean"] = "cls"
    classifier_bias: Switch = False
    classifier_activation: Activation = "gelu"
    initializer_range: Share = 0.02

    MODEL_TYPES = ("modernbert",)
    type_vocab_size: ClassVar[int] = 1
    """Kinds of tokens, which the model does not tell apart."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(
                "hidden_size and num_attention_heads must give heads of an even size, "
                f"got {self.hidden_size} and {self.num_attention_heads}"
            )
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types must have {self.num_hidden_layers} entries, got {len(self.layer_types)}"
            )

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """See `ModelConfig.read`; of transformers 5 or older."""
        values = {key: value for key, value in config.items() if value is not None}
        problems = unsupported_options(values, _ONLY)
        every, layers = values.get("global_attn_every_n_layers", 3), values.get("num_hidden_layers")
        if "layer_types" not in values and isinstance(every, int) and isinstance(layers, int):
            kinds = ("full_attention", "sliding_attention")
            # Bounded, as files of others may state any number.
            values["layer_types"] = [kinds[n % max(every, 1) > 0] for n in range(min(layers, 1000))]
        thetas, parameters = [], values.get("rope_parameters", {})
        for kind, (name, default) in _THETAS.items():
            options = parameters.get(kind) if isinstance(parameters, Mapping) else parameters
            options = options or values.get("rope_scaling") or {}
            if not isinstance(options, Mapping) or scaling_options(options) is not None:
                problems.append(f"rope_parameters: {kind} must be of type default, got {options!r:.80}")
                options = {}
            thetas.append(options.get("rope_theta", values.get(name, default)))
        return values | {"rope_thetas": tuple(thetas)}, problems

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens."""
        return self.max_position_embeddings

    def with_dropout(self, rate: float) -> Self:
        """The same with one rate everywhere."""
        return dataclasses.replace(self, embedding_dropout=rate, attention_dropout=rate, mlp_dropout=rate)
