"""Sizes and options of the Llama family, read from a `config.json`.

A table, `KINDS`, holds what the model types differ in; the model reads values and asks for no type.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..config import ModelConfig
from ..rope import Rope, Scaling, make_rope, parse_rope_scaling


def _lower_layers(entries: Mapping[str, Any]) -> range:
    """Qwen's: those below `max_window_layers`, and all unless the window is switched on."""
    layers = entries["num_hidden_layers"]
    upper = min(entries.get("max_window_layers", layers), layers)
    return range(upper if entries.get("use_sliding_window", False) else layers)


def _every_nth_layer(entries: Mapping[str, Any]) -> range:
    """Gemma's: every n-th, n from `sliding_window_pattern`."""
    step = entries["sliding_window_pattern"]
    return range(step - 1, entries["num_hidden_layers"], step)


class Kind(NamedTuple):
    """What is the same in all models of a type.

    Attributes:
      qkv_bias: whether queries, keys and values have biases; None if `attention_bias` says so.
      qk_norm: whether queries and keys are normalized per head.
      fused: whether one matrix, `qkv_proj`, computes queries, keys and values, and another, `gate_up_proj`, both
        inputs of the MLP's product.
      post_norms: whether the outputs of attention and MLP are normalized too.
      norm_offset: what is added to the scales of RMSNorm.
      scaled_embedding: whether the embedding is multiplied by the square root of the hidden size.
      reads: options that transformers reads from the config; it ignores them for other types.
      full: the layers without the sliding window if `layer_types` does not say, from the options.
      activation: the config's name of the activation function.
      defaults: options that a file may leave out, as transformers' config class has them.
    """

    qkv_bias: bool | None = None
    qk_norm: bool = False
    fused: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    reads: tuple[str, ...] = ()
    full: Callable[[Mapping[str, Any]], Sequence[int]] = lambda entries: ()
    activation: str = "hidden_act"
    defaults: Mapping[str, Any] = {}


_GEMMA = Kind(
    post_norms=True,
    norm_offset=1.0,
    scaled_embedding=True,
    reads=("attention_bias", "layer_types", "query_pre_attn_scalar", "final_logit_softcapping"),
    full=_every_nth_layer,
    activation="hidden_activation",
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
)
_QWEN_WINDOW = {"sliding_window": 4096, "max_window_layers": 28}
KINDS: Mapping[str, Kind] = {
    "llama": Kind(
        reads=("attention_bias", "mlp_bias"), full=lambda entries: range(entries["num_hidden_layers"])
    ),
    "mistral": Kind(qkv_bias=False, defaults={"sliding_window": 4096}),
    "qwen2": Kind(qkv_bias=True, reads=("layer_types",), full=_lower_layers, defaults=_QWEN_WINDOW),
    "qwen3": Kind(
        qk_norm=True,
        reads=("attention_bias", "layer_types"),
        full=_lower_layers,
        defaults={"head_dim": 128, **_QWEN_WINDOW},
    ),
    "gemma2": _GEMMA._replace(
        reads=(*_GEMMA.reads, "attn_logit_softcapping"),
        defaults={
            **_GEMMA.defaults,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window_pattern": 2,
        },
    ),
    "gemma3_text": _GEMMA._replace(
        qk_norm=True,
        reads=(*_GEMMA.reads, "rope_local_theta"),
        defaults={
            **_GEMMA.defaults,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "sliding_window_pattern": 6,
        },
    ),
    "phi3": Kind(
        qkv_bias=False,
        fused=True,
        reads=("partial_rotary_factor",),
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    ),
}
MODEL_TYPES = tuple(KINDS)

# Options that change what the model computes, each with its supported values.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "attention_dropout": (0.0, 0),
    "partial_rotary_factor": (1.0, 1),
    # Splits matmuls without changing the result.
    "pretraining_tp": (1, 2, 4, 8),
    "quantization_config": (None,),
    "is_decoder": (True, False),
    "add_cross_attention": (False,),
    "use_bidirectional_attention": (False,),
}
_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
# Fields that only some types read, see `Kind.reads`.
_OPTIONAL = ("attention_bias", "mlp_bias", "query_pre_attn_scalar", *_SOFTCAPS, "partial_rotary_factor")
# Options that a null switches off; elsewhere it stands for the default.
_NULLABLE = ("sliding_window", *_SOFTCAPS)
_INT_FIELDS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_size", "max_position_embeddings"),
)


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """A model's sizes and options, named as in Hugging Face's `config.json`.

    Attributes:
      model_type: one of `MODEL_TYPES`; `"llama"` includes SmolLM2, `"phi3"` Phi-4.
      num_key_value_heads: number of key heads, each shared by several query heads.
      head_dim: size of a head, not always `hidden_size / num_attention_heads`.
      max_position_embeddings: the longest sequence, in tokens, that the config states.
      hidden_act: name of the MLP's activation, one of `ACTIVATIONS`.
      rope_theta, rope_scaling: base of the rotary angles, and their scaling from `rope.parse_rope_scaling`.
      rope_local_theta: base of the angles in layers with a sliding window, unscaled; None for `rope_theta`.
      partial_rotary_factor: share of a head that is rotated.
      tie_word_embeddings: whether the head shares the embedding's weights.
      attention_bias: biases on the attention's output projection, and unless the type fixes them on q, k and v too.
      mlp_bias: biases in the MLP.
      sliding_window: attention window in tokens, including the token itself; None attends to all.
      full_layers: indices of layers without the sliding window, if there is one.
      query_pre_attn_scalar: attention scores are divided by its square root; None for `head_dim`.
      attn_logit_softcapping, final_logit_softcapping: bounds c of attention scores and of logits,
        `c * tanh(x / c)` (arXiv 2408.00118, section 2).
      initializer_range: standard deviation of initial weights.
      split_fused: whether the layers of `projections` are split into their parts where the type has them fused; not
        an option of a file.

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
    hidden_act: str = "silu"
    rope_theta: float = 10_000.0
    rope_scaling: Scaling = ()
    rope_local_theta: float | None = None
    partial_rotary_factor: float = 1.0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    full_layers: tuple[int, ...] = ()
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    initializer_range: float = 0.02
    split_fused: bool = False

    MODEL_TYPES = MODEL_TYPES
    BOUNDS = {  # noqa: RUF012
        **dict.fromkeys(("rope_theta", "rope_local_theta"), (1.0, 1e15)),
        **dict.fromkeys(("query_pre_attn_scalar", *_SOFTCAPS), (0.0, 1e9)),
        "rms_norm_eps": (0.0, 1.0),
        "initializer_range": (0.0, 1e3),
    }

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `ModelConfig.read`; of transformers 5 or older."""
        kind = KINDS[config["model_type"]]
        given = {key: value for key, value in config.items() if value is not None or key in _NULLABLE}
        entries = {key: value for key, value in {**kind.defaults, **given}.items() if value is not None}
        least = dict.fromkeys((*_INT_FIELDS, "sliding_window_pattern"), 1) | {"max_window_layers": 0}
        problems = [
            f"{name} must be an int of at least {low}, got {entries[name]!r:.80}"
            for name, low in least.items()
            if name in entries and (type(entries[name]) is not int or entries[name] < low)
        ]
        only = {key: known for key, known in _ONLY.items() if key not in kind.reads}
        values = cls.select(entries, only, optional=("num_key_value_heads", "head_dim"), problems=problems)
        # What other types ignore, and what follows from several options.
        ignored = {name for name in _OPTIONAL if name not in kind.reads}
        ignored |= {"rope_theta", "rope_scaling", "rope_local_theta"}
        ignored |= {"sliding_window", "full_layers", "hidden_act", "split_fused"}
        values = {name: value for name, value in values.items() if name not in ignored}
        heads = entries["num_attention_heads"]
        defaults = {
            "num_key_value_heads": entries.get("num_key_value_heads", heads),
            "head_dim": entries.get("head_dim", entries["hidden_size"] // heads),
            "hidden_act": entries.get(kind.activation, "silu"),
            **{
                name: bool(entries.get(name)) for name in ("attention_bias", "mlp_bias") if name in kind.reads
            },
        }
        return values | defaults | _rope_fields(entries) | _window_fields(entries)

    @property
    def kind(self) -> Kind:
        """What is the same in all models of this type."""
        return KINDS[self.model_type]

    @property
    def fused(self) -> bool:
        """Whether one layer computes all parts of a projection."""
        return self.kind.fused and not self.split_fused

    @property
    def projections(self) -> dict[str, dict[str, int]]:
        """The parts of each layer that may be fused, with their sizes."""
        keys = self.num_key_value_heads * self.head_dim
        return {
            "qkv_proj": {"q_proj": self.num_attention_heads * self.head_dim, "k_proj": keys, "v_proj": keys},
            "gate_up_proj": dict.fromkeys(("gate_proj", "up_proj"), self.intermediate_size),
        }

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases: Qwen2 always, Mistral never."""
        return self.attention_bias if self.kind.qkv_bias is None else self.kind.qkv_bias

    @property
    def norms(self) -> tuple[str, str | None, str, str | None]:
        """Names of a layer's norms: of attention's input and output, and of the MLP's."""
        if self.kind.post_norms:
            mlp = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
            return ("input_layernorm", "post_attention_layernorm", *mlp)
        return "input_layernorm", None, "post_attention_layernorm", None

    @property
    def embedding_scale(self) -> float:
        """Factor of the embedding at the input."""
        return math.sqrt(self.hidden_size) if self.kind.scaled_embedding else 1.0

    @property
    def attention_scale(self) -> float:
        """Factor of the attention scores."""
        return 1 / math.sqrt(self.query_pre_attn_scalar or self.head_dim)

    @property
    def rotary_size(self) -> int:
        """Entries of a head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens: as configured, or as extended by rotary scaling.

        Llama 3's, Phi-3's and Gemma 3's configs state the extended length.
        """
        options = dict(self.rope_scaling)
        if options.get("rope_type") in ("llama3", "longrope") or self.rope_local_theta is not None:
            return self.max_position_embeddings
        original = options.get("original_max_position_embeddings", self.max_position_embeddings)
        return max(self.max_position_embeddings, int(original * options.get("factor", 1)))

    def rope(self, positions: jax.Array, lengths: jax.Array | None = None) -> tuple[Rope, ...]:
        """Rotary embeddings of positions (B or 1, T), and those of the layers with a window if they differ.

        `lengths` (B,) are the tokens that the cache will hold of each row, if there is one.
        """
        options: Any = {
            "size": self.rotary_size,
            "max_positions": self.max_position_embeddings,
            "lengths": lengths,
        }
        rope = make_rope(positions, theta=self.rope_theta, scaling=self.rope_scaling, **options)
        if self.rope_local_theta is None:
            return (rope,)
        return rope, make_rope(positions, theta=self.rope_local_theta, scaling=(), **options)

    def layer_rope(self, ropes: tuple[Rope, ...], layer: jax.Array) -> Rope:
        """Of the results of `rope`, the one of a layer."""
        if len(ropes) == 1:
            return ropes[0]
        rope, local = ropes
        return jax.tree.map(lambda x, y: jnp.where(self._is_local(layer), y, x), rope, local)

    def layer_window(self, layer: jax.Array) -> int | jax.Array | None:
        """A layer's sliding window; an array if not all layers have the same."""
        if not self.full_layers or self.sliding_window is None:
            return self.sliding_window
        return jnp.where(self._is_local(layer), self.sliding_window, np.iinfo(np.int32).max)

    def _is_local(self, layer: jax.Array) -> jax.Array:
        # By a table: within the loop over layers, `layer` is traced.
        is_local = [n not in self.full_layers for n in range(self.num_hidden_layers)]
        return jnp.array(is_local)[layer] & (self.sliding_window is not None)

    def size_problems(self) -> list[str]:
        """See `ModelConfig.size_problems`."""
        problems = []
        heads, keys = self.num_attention_heads, self.num_key_value_heads
        if heads % keys:
            problems.append(f"num_key_value_heads must divide num_attention_heads, got {keys} and {heads}")
        factor = self.partial_rotary_factor
        size = self.rotary_size if isinstance(factor, int | float) and 0 < factor <= 1 else 0
        if not size or size % 2:
            problems.append(
                "head_dim and partial_rotary_factor, above 0 and at most 1, must give an even size, "
                f"got {self.head_dim} and {factor!r:.80}"
            )
        if size == 2 and dict(self.rope_scaling).get("rope_type") == "dynamic":
            problems.append("head_dim must be above 2 with dynamic rope_scaling, got 2")
        for name, value in self.rope_scaling:
            if isinstance(value, tuple) and len(value) != size // 2:
                problems.append(f"rope_scaling: {name} must be {size // 2} numbers, got {len(value)}")
        return problems


def _rope_fields(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary fields from `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (older files).

    `rope_parameters` of a model with other angles in its layers with a window has both by the layers' type.
    """
    kind = KINDS[entries["model_type"]]
    parameters = entries.get("rope_parameters", entries.get("rope_scaling", {}))
    local = {}
    if isinstance(parameters, Mapping) and "full_attention" in parameters:
        parameters, local = parameters["full_attention"], parameters.get("sliding_attention") or {}
    if not isinstance(parameters, Mapping) or not isinstance(local, Mapping):
        raise ValueError(f"rope_scaling must be a mapping, got {parameters!r:.80} {local!r:.80}")
    if parse_rope_scaling(local):
        raise ValueError(
            f"rope_parameters: sliding_attention must be of type default, got {dict(local)!r:.80}"
        )
    theta = parameters.get("rope_theta", entries.get("rope_theta", 10_000.0))
    original = {key: entries[key] for key in ("original_max_position_embeddings",) if key in kind.defaults}
    scaling, older = parse_rope_scaling({**parameters, **original}), entries.get("rope_scaling")
    if isinstance(older, Mapping) and "full_attention" in older:
        older = older["full_attention"]
    if isinstance(older, Mapping) and older and parse_rope_scaling({**older, **original}) != scaling:
        raise ValueError("rope_parameters and rope_scaling differ: keep one of them in config.json")
    fields = {"rope_theta": theta, "rope_scaling": scaling}
    if "rope_local_theta" in kind.reads:
        fields["rope_local_theta"] = local.get("rope_theta", entries["rope_local_base_freq"])
    if "partial_rotary_factor" in kind.reads:
        factor = entries.get("partial_rotary_factor", 1.0)
        fields["partial_rotary_factor"] = parameters.get("partial_rotary_factor", factor)
    return fields


def _window_fields(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The window, and the layers without it."""
    kind, layers = KINDS[entries["model_type"]], entries["num_hidden_layers"]
    window, full = entries.get("sliding_window"), kind.full(entries)
    if "layer_types" in kind.reads and "layer_types" in entries:
        names, known = entries["layer_types"], ("full_attention", "sliding_attention")
        if not isinstance(names, list) or len(names) != layers or not all(name in known for name in names):
            raise ValueError(
                f"layer_types must be a list of {layers} names, each {known[0]} or {known[1]}, got {names!r:.80}"
            )
        full = [n for n, name in enumerate(names) if name == known[0]]
    if len(full) == layers:
        return {}
    if window is None and "rope_local_theta" in kind.reads:
        raise ValueError(
            "sliding_window must be an int of at least 1 with layers of type sliding_attention, got None"
        )
    return {} if window is None else {"sliding_window": window, "full_layers": tuple(full)}
