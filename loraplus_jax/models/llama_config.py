"""Sizes and options of the Llama family, read from a `config.json`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import jax

from .rope import Rope, Scaling, make_rope, parse_rope_scaling

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

# Options that change what the model computes, each with the values that the model here knows.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0.0, 0),
    "partial_rotary_factor": (1.0, 1),
    "pretraining_tp": (1, 2, 4, 8),  # how the products were split; their sum is the same
    "quantization_config": (None,),
    "is_decoder": (True, False),
    "add_cross_attention": (False,),
}
_WHOLE = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_size", "max_position_embeddings"),
)


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """A model's sizes and options, under the names that Hugging Face's `config.json` has for them.

    Attributes:
      model_type: `"llama"` (also SmolLM2), `"mistral"`, `"qwen2"` or `"qwen3"`.
      num_key_value_heads: key heads, each of which serves several query heads.
      head_dim: size of a head, not always `hidden_size / num_attention_heads`.
      max_position_embeddings: tokens of the longest sequence that the model is said to take.
      rope_theta, rope_scaling: base of the rotary angles, and their scaling as `rope.parse_rope_scaling` gives it.
      tie_word_embeddings: whether the head is the embedding.
      attention_bias: biases on the attention's output product, and for llama and qwen3 on its three inputs.
      mlp_bias: biases in the MLP.
      sliding_window: how many tokens a token sees, itself included; None for all.
      initializer_range: standard deviation of fresh weights.

    Raises:
      ValueError: a size is below 1 or does not divide another, or a name is unknown; all are listed.
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
        if problems := [*_bad_sizes(self), *_bad_options(self)]:
            raise ValueError("LlamaConfig: " + "; ".join(problems))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Takes what it needs from the contents of a `config.json`, of transformers before or after version 5.

        Raises:
          ValueError: another kind of model, a size missing, or an option that would change what is computed.

        Example:
          >>> sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
          ...              intermediate_size=16, max_position_embeddings=64)
          >>> config = LlamaConfig.from_hf({"model_type": "mistral", "sliding_window": 4, **sizes})
          >>> config.head_dim, config.num_key_value_heads, config.sliding_window
          (4, 2, 4)
        """
        kind = config.get("model_type")
        if kind not in MODEL_TYPES:
            raise ValueError(f"config.json: model_type is {kind!r}, must be one of {', '.join(MODEL_TYPES)}")
        given = {key: value for key, value in config.items() if value is not None}
        problems = [
            f"{key} is {given[key]!r}, only {known[0]!r} is supported"
            for key, known in _ONLY.items()
            if given.get(key, known[0]) not in known
        ]
        fields = [f for f in dataclasses.fields(cls) if f.name not in ("rope_theta", "rope_scaling")]
        derived = ("num_key_value_heads", "head_dim")
        required = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in derived]
        problems += [f"{name} is missing" for name in required if name not in given]
        problems += [
            f"{name} must be an int of 1 or more, got {given[name]!r:.80}"
            for name in (*_WHOLE, "max_window_layers")
            if name in given and (type(given[name]) is not int or given[name] < (name in _WHOLE))
        ]
        if problems:
            raise ValueError("config.json: " + "; ".join(problems))
        try:
            values = {f.name: given[f.name] for f in fields if f.name in given}
            return cls(
                **{
                    **values,
                    **_default_fields(given),
                    **_rope_fields(given),
                    "sliding_window": _sliding_window(given, config),
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
        """Whether queries and keys are normalised by head."""
        return self.model_type == "qwen3"

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens: what the config says, or what scaled rotary positions stretch it to.

        Llama 3's configs state the stretched length.
        """
        options = dict(self.rope_scaling)
        if options.get("rope_type") == "llama3":
            return self.max_position_embeddings
        original = options.get("original_max_position_embeddings", self.max_position_embeddings)
        return max(self.max_position_embeddings, int(original * options.get("factor", 1)))

    def rope(self, positions: jax.Array) -> Rope:
        """The rotations of positions (B or 1, T)."""
        return make_rope(
            positions,
            size=self.head_dim,
            theta=self.rope_theta,
            scaling=self.rope_scaling,
            max_positions=self.max_position_embeddings,
        )


def _default_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes that older files leave out."""
    heads = given["num_attention_heads"]
    return {
        "num_key_value_heads": given.get("num_key_value_heads", heads),
        "head_dim": given.get(
            "head_dim", 128 if given["model_type"] == "qwen3" else given["hidden_size"] // heads
        ),
        # Only these two families have the option: the others' code does not look at it.
        "attention_bias": bool(given.get("attention_bias")) and given["model_type"] in ("llama", "qwen3"),
        "mlp_bias": bool(given.get("mlp_bias")) and given["model_type"] == "llama",
    }


def _rope_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of older files."""
    parameters = given.get("rope_parameters", given.get("rope_scaling", {}))
    if not isinstance(parameters, Mapping):
        raise ValueError(f"rope_scaling must be a mapping, got {parameters!r:.80}")
    theta = parameters.get("rope_theta", given.get("rope_theta", 10_000.0))
    return {"rope_theta": theta, "rope_scaling": parse_rope_scaling(parameters)}


def _sliding_window(given: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
    """The window where all layers have it; Qwen's switch it on by an option and leave the first layers out."""
    if given["model_type"] == "llama":
        return None  # Llama's code does not look at it
    listed = given.get("layer_types", [])
    if not isinstance(listed, list) or not all(isinstance(kind, str) for kind in listed):
        raise ValueError(f"layer_types must be a list of names, got {listed!r:.80}")
    # A Mistral file that does not name it has transformers' default, one that says null has none.
    window = config.get("sliding_window", 4096 if given["model_type"] == "mistral" else None)
    if given["model_type"].startswith("qwen") and not given.get("use_sliding_window", False):
        return None
    layers, kinds = given["num_hidden_layers"], set(listed)
    if not kinds and given["model_type"].startswith("qwen") and window is not None:
        full_layers = min(given.get("max_window_layers", layers), layers)
        kinds = {"full_attention"} if full_layers == layers else {"sliding_attention"}
        kinds |= {"full_attention"} if full_layers else set()
    if len(kinds) > 1:
        raise ValueError(f"layers of more than one kind of attention are not supported: {sorted(kinds)}")
    return None if kinds == {"full_attention"} else window


def _bad_sizes(config: LlamaConfig) -> list[str]:
    bad = [
        f"{name} must be an int of 1 or more, got {getattr(config, name)!r}"
        for name in (*_WHOLE, *(["sliding_window"] if config.sliding_window is not None else []))
        if not isinstance(getattr(config, name), int) or getattr(config, name) < 1
    ]
    if bad:
        return bad
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    if heads % keys:
        bad.append(f"num_key_value_heads must divide num_attention_heads, got {keys} and {heads}")
    if config.head_dim % 2:
        bad.append(f"head_dim must be even, got {config.head_dim}")
    factors = dict(config.rope_scaling).get("factors")
    if factors is not None and len(factors) != config.head_dim // 2:
        bad.append(f"rope_scaling: factors must be {config.head_dim // 2} numbers, got {len(factors)}")
    return bad


def _bad_options(config: LlamaConfig) -> list[str]:
    bad = []
    if config.model_type not in MODEL_TYPES:
        bad.append(f"model_type must be one of {', '.join(MODEL_TYPES)}, got {config.model_type!r}")
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        if not isinstance(getattr(config, name), bool):
            bad.append(f"{name} must be true or false, got {getattr(config, name)!r}")
    for name, most in (("rms_norm_eps", 1.0), ("initializer_range", 1e3), ("rope_theta", 1e15)):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < most:
            bad.append(f"{name} must be a positive number below {most:g}, got {value!r}")
    return bad
