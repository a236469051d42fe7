"""Sizes and options of the Llama family, read from a `config.json`.

A table, `KINDS`, holds what the model types differ in; the model reads values and asks for no type.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, Strict
from pydantic.dataclasses import dataclass

from ..config import (
    CONFIG,
    MAX_LAYERS,
    MAX_SIZE,
    Activation,
    Deviation,
    Epsilon,
    HeadSize,
    Kind,
    Layers,
    ModelConfig,
    Number,
    Positions,
    Positive,
    Size,
    Switch,
    unsupported,
)
from ..rope import Angles, Rope, Scaling, make_rope, scaling_options

Theta = Annotated[Number, Field(gt=1, lt=1e15)]
Norms = tuple[str | None, str | None, str | None, str | None]
"""Names of a layer's norms: of attention's input and output, and of the MLP's; None where a type has none."""

# The names of these norms and of all other tensors in a GGUF file.
_GGUF_NORMS = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
_GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    **{f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"},
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaKind(Kind):
    """A row of `KINDS`.

    Attributes:
      norms: see `Norms`.
      qk_norm: what RMSNorm takes of queries and keys: each `"head"` or `"all"` heads at once; None without it.
      qkv_bias: whether queries, keys and values have biases; None if `attention_bias` says so.
      scaled_embedding: whether the embedding is multiplied by the square root of the hidden size.
      windows: whether layers have the sliding window: those that `layer_types` names, or all but every n-th if the
        type has a `sliding_window_pattern` n, or all.
      reads: options that transformers reads from the config; it ignores them for other types.
      activation: the config's name of the activation function.
      expert_size: the config's name of the width of an expert, in types whose MLP is a mixture of experts.
      renames: see `NameTable`; to the names of this table's other types.
      defaults: options that a file may leave out, as transformers' config class has them.
      gguf_options: the key in a GGUF file of options that only some types have.
    """

    norms: Norms = ("input_layernorm", None, "post_attention_layernorm", None)
    qk_norm: Literal["head", "all"] | None = None
    qkv_bias: bool | None = None
    scaled_embedding: bool = False
    windows: bool = False
    reads: tuple[str, ...] = ()
    activation: str = "hidden_act"
    expert_size: str | None = None
    renames: tuple[tuple[str, str], ...] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gguf_options: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        norms = {ours: name for ours, name in zip(_GGUF_NORMS, self.norms, strict=True) if name}
        object.__setattr__(self, "gguf_names", _GGUF_NAMES | norms)


_GEMMA = LlamaKind(
    architecture="Gemma2ForCausalLM",
    gguf="gemma2",
    norms=(
        *("input_layernorm", "post_attention_layernorm"),
        *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    norm_offset=1.0,
    scaled_embedding=True,
    windows=True,
    reads=("attention_bias", "layer_types", "query_pre_attn_scalar", "final_logit_softcapping"),
    activation="hidden_activation",
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
    gguf_options={
        "sliding_window_pattern": "attention.sliding_window_pattern",
        "rope_theta": "rope.freq_base",
        "rope_local_base_freq": "rope.freq_base_swa",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
)
_OLMO = LlamaKind(
    architecture="Olmo2ForCausalLM",
    gguf="olmo2",
    norms=(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    qk_norm="all",
    reads=("attention_bias",),
    defaults={"rms_norm_eps": 1e-5},
)
KINDS: Mapping[str, LlamaKind] = {
    "llama": LlamaKind(
        architecture="LlamaForCausalLM", gguf="llama", interleaved=True, reads=("attention_bias", "mlp_bias")
    ),
    # In a GGUF file, a Llama with a window.
    "mistral": LlamaKind(
        architecture="MistralForCausalLM",
        gguf="llama",
        interleaved=True,
        qkv_bias=False,
        windows=True,
        defaults={"sliding_window": 4096},
    ),
    "qwen2": LlamaKind(architecture="Qwen2ForCausalLM", gguf="qwen2", qkv_bias=True, reads=("layer_types",)),
    "qwen3": LlamaKind(
        architecture="Qwen3ForCausalLM",
        gguf="qwen3",
        qk_norm="head",
        reads=("attention_bias", "layer_types"),
        defaults={"head_dim": 128},
    ),
    "qwen3_moe": LlamaKind(
        architecture="Qwen3MoeForCausalLM",
        qk_norm="head",
        expert_size="moe_intermediate_size",
        reads=("attention_bias", "norm_topk_prob"),
        defaults={
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
        },
    ),
    "mixtral": LlamaKind(
        architecture="MixtralForCausalLM",
        qkv_bias=False,
        windows=True,
        expert_size="intermediate_size",
        # The names of the files are older than those in transformers.
        renames=(
            (r"\.block_sparse_moe\.", ".mlp."),
            *(
                (rf"(\.experts\.\d+)\.w{n}\.", rf"\1.{name}_proj.")
                for n, name in ((1, "gate"), (2, "down"), (3, "up"))
            ),
        ),
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_experts": 8, "num_experts_per_tok": 2},
    ),
    "gemma2": dataclasses.replace(
        _GEMMA,
        reads=(*_GEMMA.reads, "attn_logit_softcapping"),
        defaults={
            **_GEMMA.defaults,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window_pattern": 2,
        },
    ),
    "gemma3_text": dataclasses.replace(
        _GEMMA,
        architecture="Gemma3ForCausalLM",
        gguf="gemma3",
        qk_norm="head",
        reads=(*_GEMMA.reads, "rope_local_theta"),
        defaults={
            **_GEMMA.defaults,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "sliding_window_pattern": 6,
        },
    ),
    "olmo2": _OLMO,
    # Not in GGUF files, where llama.cpp takes YaRN's temperature twice.
    "olmo3": dataclasses.replace(
        _OLMO,
        architecture="Olmo3ForCausalLM",
        gguf=None,
        windows=True,
        reads=("attention_bias", "layer_types", "rope_local_theta"),
        defaults={
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
    ),
    "smollm3": LlamaKind(
        architecture="SmolLM3ForCausalLM",
        gguf="smollm3",
        interleaved=True,
        reads=("attention_bias", "mlp_bias", "layer_types", "no_rope_layers"),
        defaults={
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
        },
    ),
    "phi3": LlamaKind(
        architecture="Phi3ForCausalLM",
        qkv_bias=False,
        fused=True,
        windows=True,
        reads=("partial_rotary_factor",),
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    ),
}

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
    # Qwen's, which no released model sets.
    "use_sliding_window": (False,),
    # Of mixtures: layers without experts, noise and a second loss in training.
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
    "router_jitter_noise": (0.0, 0),
    "output_router_logits": (False,),
}
_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
# Fields that only some types read, see `LlamaKind.reads`.
_OPTIONAL = (
    *("attention_bias", "mlp_bias", "query_pre_attn_scalar", *_SOFTCAPS, "partial_rotary_factor"),
    "norm_topk_prob",
)
_EXPERTS = ("num_experts", "num_experts_per_tok")
# Options that a null switches off; elsewhere it stands for the default.
_NULLABLE = ("sliding_window", *_SOFTCAPS)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class LlamaConfig(ModelConfig):
    """A model's sizes and options, named as in Hugging Face's `config.json`.

    Attributes:
      model_type: one of `MODEL_TYPES`; `"llama"` includes SmolLM2, `"phi3"` Phi-4.
      num_key_value_heads: number of key heads, each shared by several query heads; by default that of query heads.
      head_dim: size of a head, by default `hidden_size / num_attention_heads`.
      max_position_embeddings: the longest sequence, in tokens, that the config states.
      hidden_act: name of the MLP's activation, one of `ACTIVATIONS`.
      rope_theta, rope_scaling: base of the rotary angles, and their scaling, one of `rope.Scaling` or its options.
      rope_local_theta: base of the angles in layers with a sliding window, unscaled; None for `rope_theta`.
      partial_rotary_factor: share of a head that is rotated.
      tie_word_embeddings: whether the head shares the embedding's weights.
      attention_bias: biases on the attention's output projection, and unless the type fixes them on q, k and v too.
      mlp_bias: biases in the MLP.
      sliding_window: attention window in tokens, including the token itself; None attends to all.
      full_layers: indices of layers without the sliding window, if there is one.
      unrotated_layers: indices of layers without rotary positions.
      query_pre_attn_scalar: attention scores are divided by its square root; None for `head_dim`.
      attn_logit_softcapping, final_logit_softcapping: bounds c of attention scores and of logits,
        `c * tanh(x / c)` (arXiv 2408.00118, section 2).
      num_experts: number of experts in each layer's mixture, each of `intermediate_size`; 0 for a dense MLP.
      num_experts_per_tok: number of experts that a token is sent to.
      norm_topk_prob: whether the shares of a token's experts are scaled to a sum of 1.
      initializer_range: standard deviation of initial weights.
      split_fused: whether the layers of `projections` are split into their parts where the type has them fused; not
        an option of a file.

    Raises:
      ValueError: a size is below 1 or does not divide another, or a name is unknown; lists all problems.
    """

    model_type: Literal[tuple(KINDS)] = "llama"  # pyright: ignore[reportInvalidTypeForm]
    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size = 0
    head_dim: HeadSize = 0
    intermediate_size: Size
    max_position_embeddings: Positions
    rms_norm_eps: Epsilon = 1e-6
    hidden_act: Activation = "silu"
    rope_theta: Theta = 10_000.0
    rope_scaling: Scaling | None = None
    rope_local_theta: Theta | None = None
    partial_rotary_factor: Annotated[Number, Field(gt=0, le=1)] = 1.0
    tie_word_embeddings: Switch = False
    attention_bias: Switch = False
    mlp_bias: Switch = False
    sliding_window: Positions | None = None
    full_layers: tuple[int, ...] = ()
    unrotated_layers: tuple[int, ...] = ()
    query_pre_attn_scalar: Positive | None = None
    attn_logit_softcapping: Positive | None = None
    final_logit_softcapping: Positive | None = None
    num_experts: Annotated[int, Strict(), Field(ge=0, le=1024)] = 0
    num_experts_per_tok: Size = 1
    norm_topk_prob: Switch = True
    initializer_range: Deviation = 0.02
    split_fused: Switch = False

    KINDS = KINDS
    MODEL_TYPES = tuple(KINDS)

    def __post_init__(self) -> None:
        # pydantic checks no defaults: 0 stands for what follows from other fields, which are valid here.
        heads, size = self.num_attention_heads, self.hidden_size // self.num_attention_heads
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or heads)
        object.__setattr__(self, "head_dim", self.head_dim or size)
        if problems := self._size_problems():
            raise ValueError("; ".join(problems))

    def _size_problems(self) -> list[str]:
        """One line per pair of sizes that do not fit."""
        problems = []
        heads, keys, rotary = self.num_attention_heads, self.num_key_value_heads, self.rotary_size
        if heads % keys:
            problems.append(f"num_key_value_heads must divide num_attention_heads, got {keys} and {heads}")
        if heads * self.head_dim > MAX_SIZE:
            problems.append(
                f"num_attention_heads x head_dim must be at most {MAX_SIZE}, got {heads * self.head_dim}"
            )
        if not rotary or rotary % 2:
            problems.append(
                "head_dim and partial_rotary_factor must give an even size, "
                f"got {self.head_dim} and {self.partial_rotary_factor}"
            )
        if self.num_experts and self.num_experts_per_tok > self.num_experts:
            problems.append(
                f"num_experts_per_tok must be at most num_experts, got {self.num_experts_per_tok} and "
                f"{self.num_experts}"
            )
        for name in ("factors", "short_factor", "long_factor"):
            divisors = getattr(self.rope_scaling, name, None)
            if divisors is not None and len(divisors) != rotary // 2:
                problems.append(f"rope_scaling: {name} must be {rotary // 2} numbers, got {len(divisors)}")
        return problems

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """See `ModelConfig.read`; of transformers 5 or older."""
        kind = KINDS[config["model_type"]]
        given = {key: value for key, value in config.items() if value is not None or key in _NULLABLE}
        entries = {key: value for key, value in {**kind.defaults, **given}.items() if value is not None}
        ignored = {"split_fused", "rope_scaling", *(name for name in _OPTIONAL if name not in kind.reads)}
        ignored |= set(_EXPERTS if kind.expert_size is None else ())
        values = {name: value for name, value in entries.items() if name not in ignored}
        values["hidden_act"] = entries.get(kind.activation, "silu")
        if kind.expert_size is not None:
            # transformers 5 calls the number of experts by Mixtral's name.
            values["num_experts"] = given.get("num_local_experts", entries["num_experts"])
            if kind.expert_size in entries:
                values["intermediate_size"] = entries[kind.expert_size]
        problems = unsupported(entries, {key: only for key, only in _ONLY.items() if key not in kind.reads})
        for fields in (_rope_fields, _layer_fields):
            try:
                values |= fields(kind, entries)
            except ValueError as error:
                problems.append(str(error))
        return values, problems

    @property
    def kind(self) -> LlamaKind:
        """What is the same in all models of this type."""
        return KINDS[self.model_type]

    @property
    def tensor_sizes(self) -> dict[str, int]:
        """See `ModelConfig.tensor_sizes`; a mixture is split by expert."""
        sizes = super().tensor_sizes
        if self.num_experts:
            sizes["num_experts"] = self.num_experts
            del sizes["intermediate_size"]
        return sizes

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
        stated = self.max_position_embeddings
        if self.rope_scaling is None or self.rope_local_theta is not None:
            return stated
        return self.rope_scaling.max_length(stated)

    def rope(self, positions: jax.Array, lengths: jax.Array | None = None) -> tuple[Rope, ...]:
        """Rotary embeddings of positions (B or 1, T), and those of the layers with a window if they differ.

        `lengths` (B,) are the tokens that the cache will hold of each row, if there is one.
        """
        angles = Angles(positions, lengths, self.rotary_size, self.rope_theta, self.max_position_embeddings)
        rope = make_rope(angles, self.rope_scaling)
        if self.rope_local_theta is None:
            return (rope,)
        return rope, make_rope(angles._replace(theta=self.rope_local_theta))

    def layer_rope(self, ropes: tuple[Rope, ...], layer: jax.Array) -> Rope:
        """Of the results of `rope`, the one of a layer."""
        rope, *local = ropes
        if local:
            rope = jax.tree.map(lambda x, y: jnp.where(self._is_local(layer), y, x), rope, local[0])
        if self.unrotated_layers:
            is_rotated = ~self._is_among(self.unrotated_layers, layer)
            rope = Rope(jnp.where(is_rotated, rope.cos, 1.0), jnp.where(is_rotated, rope.sin, 0.0))
        return rope

    def layer_window(self, layer: jax.Array) -> int | jax.Array | None:
        """A layer's sliding window; an array if not all layers have the same."""
        if not self.full_layers or self.sliding_window is None:
            return self.sliding_window
        return jnp.where(self._is_local(layer), self.sliding_window, np.iinfo(np.int32).max)

    def _is_local(self, layer: jax.Array) -> jax.Array:
        return ~self._is_among(self.full_layers, layer) & (self.sliding_window is not None)

    def _is_among(self, layers: tuple[int, ...], layer: jax.Array) -> jax.Array:
        # By a table: within the loop over layers, `layer` is traced.
        return jnp.array([n in layers for n in range(self.num_hidden_layers)])[layer]


def _rope_fields(kind: LlamaKind, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary fields from `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (older files).

    `rope_parameters` of a model with other angles in its layers with a window has both by the layers' type.
    """
    parameters = entries.get("rope_parameters", entries.get("rope_scaling", {}))
    local, older = {}, entries.get("rope_scaling", {})
    if isinstance(parameters, Mapping) and "full_attention" in parameters:
        parameters, local = parameters["full_attention"], parameters.get("sliding_attention") or {}
    if isinstance(older, Mapping) and "full_attention" in older:
        older = older["full_attention"]
    for value in (parameters, local, older):
        if not isinstance(value, Mapping):
            raise ValueError(f"rope_scaling must be a mapping, got {value!r:.80}")
    if scaling_options(local) is not None:
        raise ValueError(
            f"rope_parameters: sliding_attention must be of type default, got {dict(local)!r:.80}"
        )
    theta = parameters.get("rope_theta", entries.get("rope_theta", 10_000.0))
    original = {key: entries[key] for key in ("original_max_position_embeddings",) if key in kind.defaults}
    scaling = scaling_options({**parameters, **original})
    if older and scaling_options({**older, **original}) != scaling:
        raise ValueError("rope_parameters and rope_scaling differ: keep one of them in config.json")
    fields = {"rope_theta": theta, "rope_scaling": scaling, "rope_local_theta": None}
    if "rope_local_theta" in kind.reads:
        fields["rope_local_theta"] = local.get("rope_theta", entries.get("rope_local_base_freq", theta))
    if "partial_rotary_factor" in kind.reads:
        factor = entries.get("partial_rotary_factor", 1.0)
        fields["partial_rotary_factor"] = parameters.get("partial_rotary_factor", factor)
    return fields


def _layer_fields(kind: LlamaKind, entries: Mapping[str, Any]) -> dict[str, Any]:
    """The window, the layers without it, and those without rotary positions."""
    unrotated = _marked(kind, entries, "no_rope_layers", (0, 1), "no_rope_layer_interval")
    fields = {"sliding_window": None, "full_layers": (), "unrotated_layers": unrotated}
    known = ("full_attention", "sliding_attention") if kind.windows else ("full_attention",)
    full = _marked(kind, entries, "layer_types", known, "sliding_window_pattern")
    if not kind.windows or len(full) == entries.get("num_hidden_layers"):
        return fields
    window = entries.get("sliding_window")
    if window is None and "rope_local_theta" in kind.reads:
        raise ValueError(
            "sliding_window must be an int of at least 1 with layers of type sliding_attention, got None"
        )
    return fields if window is None else fields | {"sliding_window": window, "full_layers": full}


def _marked(
    kind: LlamaKind, entries: Mapping[str, Any], option: str, known: Sequence[Any], every: str
) -> tuple[int, ...]:
    """The layers to which a list gives the first of the known values; without a list every n-th, n from `every`."""
    layers = entries.get("num_hidden_layers")
    # pydantic says what is wrong with the number of layers.
    layers = layers if type(layers) is int and 0 < layers <= MAX_LAYERS else 0
    if option in kind.reads and option in entries:
        values = entries[option]
        if not isinstance(values, list) or len(values) != layers or not all(x in known for x in values):
            raise ValueError(
                f"{option} must be a list of {layers} values, each {' or '.join(map(str, known))}, "
                f"got {values!r:.80}"
            )
        return tuple(n for n, value in enumerate(values) if value == known[0])
    if every not in kind.defaults:
        return ()
    step = entries[every]
    if type(step) is not int or step < 1:
        raise ValueError(f"{every} must be an int of at least 1, got {step!r:.80}")
    return tuple(range(step - 1, layers, step))
