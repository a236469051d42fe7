"""Sizes and options of the Llama family, read from a `config.json`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import jax

from .rope import Rope, Scaling, make_rope, parse_rope_scaling

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

# Options that change what the model computes, each with its supported values.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0.0, 0),
    "partial_rotary_factor": (1.0, 1),
    "pretraining_tp": (1, 2, 4, 8),  # splits matmuls without changing the result
    "quantization_config": (None,),
    "is_decoder": (True, False),
    "add_cross_attention": (False,),
}
_INT_FIELDS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_size", "max_position_embeddings"),
)


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """A model's sizes and options, named as in Hugging Face's `config.json`.

    Attributes:
      model_type: `"llama"` (also SmolLM2), `"mistral"`, `"qwen2"` or `"qwen3"`.
      num_key_value_heads: number of key heads, each shared by several query heads.
      head_dim: size of a head, not always `hidden_size / num_attention_heads`.
      max_position_embeddings: the longest sequence, in tokens, that the config states.
      rope_theta, rope_scaling: base of the rotary angles, and their scaling from `rope.parse_rope_scaling`.
      tie_word_embeddings: whether the head shares the embedding's weights.
      attention_bias: biases on the attention's output projection, and for llama and qwen3 on q, k and v too.
      mlp_bias: biases in the MLP.
      sliding_window: attention window in tokens, including the token itself; None attends to all.
      initializer_range: standard deviation of initial weights.

    Raises:
      ValueError: a size is below 1 or does not divide another, or a name is unknown; lists all problems.
    """

    model_type: str = "llama"
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: Scaling = ()
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if problems := [*_size_problems(self), *_option_problems(self)]:
            raise ValueError("LlamaConfig: " + "; ".join(problems))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Reads the fields that it needs from a `config.json` of transformers 5 or older.

        Raises:
          ValueError: the model type or an option is unsupported, or a size is missing or invalid.

        Example:
          >>> sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
          ...              intermediate_size=16, max_position_embeddings=64)
          >>> config = LlamaConfig.from_hf({"model_type": "mistral", "sliding_window": 4, **sizes})
          >>> config.head_dim, config.num_key_value_heads, config.sliding_window
          (4, 2, 4)
        """
        kind = config.get("model_type")
        if kind not in MODEL_TYPES:
            raise ValueError(f"config.json: model_type must be one of {', '.join(MODEL_TYPES)}, got {kind!r}")
        entries = {key: value for key, value in config.items() if value is not None}
        problems = [
            f"{key} is {entries[key]!r}, only {known[0]!r} is supported"
            for key, known in _ONLY.items()
            if entries.get(key, known[0]) not in known
        ]
        fields = [f for f in dataclasses.fields(cls) if f.name not in ("rope_theta", "rope_scaling")]
        derived = ("num_key_value_heads", "head_dim")
        required = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in derived]
        problems += [f"{name} is missing" for name in required if name not in entries]
        problems += [
            f"{name} must be an int of at least {int(name in _INT_FIELDS)}, got {entries[name]!r:.80}"
            for name in (*_INT_FIELDS, "max_window_layers")
            if name in entries and (type(entries[name]) is not int or entries[name] < (name in _INT_FIELDS))
        ]
        if problems:
            raise ValueError("config.json: " + "; ".join(problems))
        try:
            values = {f.name: entries[f.name] for f in fields if f.name in entries}
            return cls(
                **{
                    **values,
                    **_default_fields(entries),
                    **_rope_fields(entries),
                    "sliding_window": _sliding_window(entries, config),
                }
            )
        except (ValueError, TypeError, ZeroDivisionError) as error:
            raise ValueError(f"config.json: {error}") from None

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases: Qwen2 always, Mistral never."""
        if self.model_type in ("qwen2", "mistral"):
            return self.model_type == "qwen2"
        return self.attention_bias

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalized per head."""
        return self.model_type == "qwen3"

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens: as configured, or as extended by rotary scaling.

        Llama 3's configs state the extended length.
        """
        options = dict(self.rope_scaling)
        if options.get("rope_type") == "llama3":
            return self.max_position_embeddings
        original = options.get("original_max_position_embeddings", self.max_position_embeddings)
        return max(self.max_position_embeddings, int(original * options.get("factor", 1)))

    def rope(self, positions: jax.Array) -> Rope:
        """Rotary embeddings of positions (B or 1, T)."""
        return make_rope(
            positions,
            size=self.head_dim,
            theta=self.rope_theta,
            scaling=self.rope_scaling,
            max_positions=self.max_position_embeddings,
        )


def _default_fields(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of fields that some files omit."""
    heads = entries["num_attention_heads"]
    return {
        "num_key_value_heads": entries.get("num_key_value_heads", heads),
        "head_dim": entries.get(
            "head_dim", 128 if entries["model_type"] == "qwen3" else entries["hidden_size"] // heads
        ),
        # Only these families have the option; transformers ignores it in the others.
        "attention_bias": bool(entries.get("attention_bias")) and entries["model_type"] in ("llama", "qwen3"),
        "mlp_bias": bool(entries.get("mlp_bias")) and entries["model_type"] == "llama",
    }


def _rope_fields(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary fields from `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (older files)."""
    parameters = entries.get("rope_parameters", entries.get("rope_scaling", {}))
    if not isinstance(parameters, Mapping):
        raise ValueError(f"rope_scaling must be a mapping, got {parameters!r:.80}")
    theta = parameters.get("rope_theta", entries.get("rope_theta", 10_000.0))
    return {"rope_theta": theta, "rope_scaling": parse_rope_scaling(parameters)}


def _sliding_window(entries: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
    """The window if all layers use it. Qwen models enable it by an option and exempt the first layers."""
    if entries["model_type"] == "llama":
        return None  # Llama ignores the option
    layer_types = entries.get("layer_types", [])
    if not isinstance(layer_types, list) or not all(isinstance(kind, str) for kind in layer_types):
        raise ValueError(f"layer_types must be a list of names, got {layer_types!r:.80}")
    # A Mistral file without the option has transformers' default; null means no window.
    window = config.get("sliding_window", 4096 if entries["model_type"] == "mistral" else None)
    if entries["model_type"].startswith("qwen") and not entries.get("use_sliding_window", False):
        return None
    layers, kinds = entries["num_hidden_layers"], set(layer_types)
    if not kinds and entries["model_type"].startswith("qwen") and window is not None:
        full_layers = min(entries.get("max_window_layers", layers), layers)
        kinds = {"full_attention"} if full_layers == layers else {"sliding_attention"}
        kinds |= {"full_attention"} if full_layers else set()
    if len(kinds) > 1:
        raise ValueError(f"all layers must use the same attention type, got {sorted(kinds)}")
    return None if kinds == {"full_attention"} else window


def _size_problems(config: LlamaConfig) -> list[str]:
    problems = [
        f"{name} must be an int of at least 1, got {getattr(config, name)!r}"
        for name in (*_INT_FIELDS, *(["sliding_window"] if config.sliding_window is not None else []))
        if not isinstance(getattr(config, name), int) or getattr(config, name) < 1
    ]
    if problems:
        return problems
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    if heads % keys:
        problems.append(f"num_key_value_heads must divide num_attention_heads, got {keys} and {heads}")
    if config.head_dim % 2:
        problems.append(f"head_dim must be even, got {config.head_dim}")
    if config.head_dim == 2 and dict(config.rope_scaling).get("rope_type") == "dynamic":
        problems.append("head_dim must be above 2 with dynamic rope_scaling, got 2")
    factors = dict(config.rope_scaling).get("factors")
    if factors is not None and len(factors) != config.head_dim // 2:
        problems.append(f"rope_scaling: factors must be {config.head_dim // 2} numbers, got {len(factors)}")
    return problems


def _option_problems(config: LlamaConfig) -> list[str]:
    problems = []
    if config.model_type not in MODEL_TYPES:
        problems.append(f"model_type must be one of {', '.join(MODEL_TYPES)}, got {config.model_type!r}")
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        if not isinstance(getattr(config, name), bool):
            problems.append(f"{name} must be true or false, got {getattr(config, name)!r}")
    bounds = {"rms_norm_eps": (0.0, 1.0), "initializer_range": (0.0, 1e3), "rope_theta": (1.0, 1e15)}
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
            problems.append(f"{name} must be a number above {low:g} and below {high:g}, got {value!r:.80}")
    return problems
