"""An encoder's sizes and options, read from Hugging Face's `config.json`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from ..activations import ACTIVATIONS

_MODEL_TYPES = ("bert", "roberta", "xlm-roberta")
# Options that change what the model computes, each with its only supported value.
_ONLY = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
    "quantization_config": None,
}


@dataclass(frozen=True, kw_only=True)
class BertConfig:
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

    model_type: str = "bert"
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    pad_token_id: int
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if problems := [*_size_problems(self), *_option_problems(self)]:
            raise ValueError("BertConfig: " + "; ".join(problems))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Reads the fields that it needs from the contents of a `config.json`.

        Raises:
          ValueError: the model type or an option is unsupported, or a size is missing or invalid.

        Example:
          >>> sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
          ...              intermediate_size=16, max_position_embeddings=4, type_vocab_size=2, pad_token_id=0)
          >>> config = BertConfig.from_hf({"model_type": "bert", "hidden_act": "relu", **sizes})
          >>> config.hidden_act, config.max_length
          ('relu', 4)
        """
        kind = config.get("model_type")
        if kind not in _MODEL_TYPES:
            raise ValueError(
                f"config.json: model_type must be one of {', '.join(_MODEL_TYPES)}, got {kind!r}"
            )
        entries = {key: value for key, value in config.items() if value is not None}
        unsupported = {key: only for key, only in _ONLY.items() if entries.get(key, only) != only}
        problems = [
            f"{key} is {entries[key]!r}, only {only!r} is supported" for key, only in unsupported.items()
        ]
        fields = dataclasses.fields(cls)
        required = [f.name for f in fields if f.default is dataclasses.MISSING]
        problems += [f"{name} is missing" for name in required if name not in entries]
        if problems:
            raise ValueError("config.json: " + "; ".join(problems))
        try:
            return cls(**{f.name: entries[f.name] for f in fields if f.name in entries})
        except (ValueError, TypeError) as error:
            raise ValueError(f"config.json: {error}") from None

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens."""
        unused = 0 if self.model_type == "bert" else self.pad_token_id + 1
        return self.max_position_embeddings - unused


def _size_problems(config: BertConfig) -> list[str]:
    sizes = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.type is int}
    minimum = dict.fromkeys(sizes, 1) | {"pad_token_id": 0}
    problems = [
        f"{name} must be an int of at least {minimum[name]}, got {size!r}"
        for name, size in sizes.items()
        if not isinstance(size, int) or size < minimum[name]
    ]
    if not problems and config.hidden_size % config.num_attention_heads:
        heads = config.num_attention_heads
        problems.append(f"num_attention_heads must divide hidden_size, got {heads} and {config.hidden_size}")
    return problems


def _option_problems(config: BertConfig) -> list[str]:
    problems = []
    for name, allowed in (("model_type", _MODEL_TYPES), ("hidden_act", tuple(ACTIVATIONS))):
        if getattr(config, name) not in allowed:
            problems.append(f"{name} must be one of {', '.join(allowed)}, got {getattr(config, name)!r}")
    for name in (
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "layer_norm_eps",
        "initializer_range",
    ):
        value = getattr(config, name)
        if not isinstance(value, int | float) or not 0.0 <= value < 1.0:
            problems.append(f"{name} must be a number in [0, 1), got {value!r}")
    return problems
