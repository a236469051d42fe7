"""Sizes and options of GPT-2, read from a `config.json`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from ..activations import ACTIVATIONS

# Options that change what the model computes, each with its only supported value.
_ONLY = {"add_cross_attention": False, "pruned_heads": {}, "quantization_config": None}
# Our names of the sizes, and GPT-2's; transformers reads both.
NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
}
_INT_FIELDS = ("vocab_size", *NAMES)
_FLAGS = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings")


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """A model's sizes and options.

    Dropout is not among them: training runs without it, whatever the rates in `config.json` (`resid_pdrop`,
    `embd_pdrop`, `attn_pdrop`). Neither is `reorder_and_upcast_attn`, which changes only the precision of scores:
    they are always float32 here.

    Attributes:
      model_type: `"gpt2"`.
      max_position_embeddings: rows of the table of positions, and so the longest sequence in tokens.
      intermediate_size: width of the MLP; four times the hidden size if the file does not say.
      activation_function: name of the MLP's activation, one of `ACTIVATIONS`.
      scale_attn_weights: whether attention scores are divided by the square root of a head's size.
      scale_attn_by_inverse_layer_idx: whether they are also divided by the layer's number, from 1.
      tie_word_embeddings: whether the head shares the embedding's weights.
      split_fused: whether the layers of `projections` are split into their parts; not an option of a file.
      initializer_range: standard deviation of initial weights.

    Raises:
      ValueError: a size is below 1 or does not divide another, or a name is unknown; lists all problems.
    """

    model_type: str = "gpt2"
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    intermediate_size: int
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    split_fused: bool = False

    def __post_init__(self) -> None:
        if problems := _problems(self):
            raise ValueError("GPT2Config: " + "; ".join(problems))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Reads the fields that it needs from the contents of a `config.json`.

        Raises:
          ValueError: the model type or an option is unsupported, or a size is missing or invalid.

        Example:
          >>> sizes = dict(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=64, n_inner=None)
          >>> config = GPT2Config.from_hf({"model_type": "gpt2", **sizes})
          >>> config.hidden_size, config.intermediate_size, config.max_length
          (8, 32, 64)
        """
        if (kind := config.get("model_type")) != "gpt2":
            raise ValueError(f"config.json: model_type must be gpt2, got {kind!r}")
        ours = {theirs: name for name, theirs in NAMES.items()}
        entries = {ours.get(key, key): value for key, value in config.items() if value is not None}
        problems = [
            f"{key} is {entries[key]!r}, only {only!r} is supported"
            for key, only in _ONLY.items()
            if entries.get(key, only) != only
        ]
        fields = [f for f in dataclasses.fields(cls) if f.name != "split_fused"]
        required = [f.name for f in fields if f.default is dataclasses.MISSING]
        problems += [
            f"{NAMES.get(name, name)} is missing"
            for name in required
            if name not in entries and name != "intermediate_size"
        ]
        if problems:
            raise ValueError("config.json: " + "; ".join(problems))
        values = {f.name: entries[f.name] for f in fields if f.name in entries}
        width = entries["hidden_size"]
        values.setdefault("intermediate_size", 4 * width if isinstance(width, int) else None)
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"config.json: {error}") from None

    @property
    def fused(self) -> bool:
        """Whether one layer computes all parts of a projection."""
        return not self.split_fused

    @property
    def projections(self) -> dict[str, dict[str, int]]:
        """The parts of each fused layer, with their sizes."""
        return {"c_attn": dict.fromkeys(("q_attn", "k_attn", "v_attn"), self.hidden_size)}

    @property
    def num_key_value_heads(self) -> int:
        """Number of key heads: each query head has its own."""
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def final_logit_softcapping(self) -> None:
        """The bound of the logits: none."""
        return

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens."""
        return self.max_position_embeddings


def _problems(config: GPT2Config) -> list[str]:
    problems = [
        f"{NAMES.get(name, name)} must be an int of at least 1, got {size!r:.80}"
        for name in _INT_FIELDS
        if type(size := getattr(config, name)) is not int or size < 1
    ]
    if not problems and config.hidden_size % config.num_attention_heads:
        problems.append(
            f"n_head must divide n_embd, got {config.num_attention_heads} and {config.hidden_size}"
        )
    for name, allowed in (("model_type", ("gpt2",)), ("activation_function", tuple(ACTIVATIONS))):
        if getattr(config, name) not in allowed:
            problems.append(f"{name} must be one of {', '.join(allowed)}, got {getattr(config, name)!r:.80}")
    for name in _FLAGS:
        if not isinstance(getattr(config, name), bool):
            problems.append(f"{name} must be true or false, got {getattr(config, name)!r:.80}")
    for name, high in (("layer_norm_epsilon", 1.0), ("initializer_range", 1e3)):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < high:
            problems.append(f"{name} must be a number above 0 and below {high:g}, got {value!r:.80}")
    return problems
