"""GPT-2's options, and what is rejected."""

import dataclasses

import pytest

from loraplus_jax.models.gpt2.config import GPT2Config

from ...messages import mentions
from ...refusals import refusals

FILE = {"model_type": "gpt2", "vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 64}


def test_transformers_other_names_of_sizes_mean_the_same():
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    config = GPT2Config.from_hf({"model_type": "gpt2", "vocab_size": 9} | sizes)
    assert config == GPT2Config.from_hf(FILE)
    assert (config.intermediate_size, config.head_dim, config.num_key_value_heads) == (32, 4, 2)
    assert GPT2Config.from_hf(FILE | {"n_inner": 24}).intermediate_size == 24
    assert GPT2Config.from_hf(FILE | {"split_fused": True}) == config  # no option of a file
    with pytest.raises(ValueError, match=mentions("model_type", "'gpt2'", "'gptj'")):
        dataclasses.replace(config, model_type="gptj")


def file(**changes):
    return lambda: GPT2Config.from_hf(FILE | changes)


test_unsupported_configs = refusals(
    (file(n_embd=None), "n_embd", "missing"),
    (file(n_head=3), "n_head", 3, "n_embd", 8),
    (file(n_layer=0), "n_layer", 1, 0),
    (file(n_embd="8"), "n_embd", "'8'"),
    (file(n_positions=2.0), "n_positions", 2.0),
    (file(activation_function="mish"), "activation_function", "gelu_new", "tanh", "'mish'"),
    (file(scale_attn_weights="yes"), "scale_attn_weights", "boolean", "'yes'"),
    (file(layer_norm_epsilon=0), "layer_norm_epsilon", 0),
    (file(add_cross_attention=True), "add_cross_attention", True, False),
    (file(quantization_config={"bits": 4}), "quantization_config"),
    (file(model_type="gptj"), "model_type", "gpt2", "'gptj'"),
)
