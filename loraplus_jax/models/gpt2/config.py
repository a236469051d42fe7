"""Sizes and options of GPT-2, read from a `config.json`."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from ..config import (
    CONFIG,
    Activation,
    Deviation,
    Epsilon,
    Kind,
    Layers,
    ModelConfig,
    Size,
    Switch,
    unsupported,
)

# Options that change what the model computes, each with its only supported value.
_ONLY = {"add_cross_attention": (False,), "pruned_heads": ({},), "quantization_config": (None,)}
# Our names of the sizes, and GPT-2's; transformers reads both.
NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
}
KINDS = {
    "gpt2": Kind(
        architecture="GPT2LMHeadModel",
        fused=True,
        gguf="gpt2",
        gguf_names={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        layers="transformer.h",
        # The weights of Conv1D, which Hugging Face has as (in, out).
        transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    )
}


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class GPT2Config(ModelConfig):
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

    model_type: Literal["gpt2"] = "gpt2"
    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    max_position_embeddings: Size
    intermediate_size: Size
    activation_function: Activation = "gelu_new"
    layer_norm_epsilon: Epsilon = 1e-5
    scale_attn_weights: Switch = True
    scale_attn_by_inverse_layer_idx: Switch = False
    tie_word_embeddings: Switch = True
    initializer_range: Deviation = 0.02
    split_fused: Switch = False

    KINDS = KINDS
    MODEL_TYPES = tuple(KINDS)
    NAMES = NAMES

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """See `ModelConfig.read`."""
        ours = {theirs: name for name, theirs in NAMES.items()} | {"split_fused": "ignored"}
        values = {ours.get(key, key): value for key, value in config.items() if value is not None}
        if isinstance(width := values.get("hidden_size"), int):
            values = {"intermediate_size": 4 * width} | values
        return values, unsupported(values, _ONLY)

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
