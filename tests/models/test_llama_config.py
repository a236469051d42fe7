"""Configs of published models, and what is rejected."""

import pytest

from loraplus_jax.models.llama_config import LlamaConfig

from ..messages import mentions

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def config(kind="llama", **more):
    return LlamaConfig.from_hf({"model_type": kind, **SIZES, **more})


def test_old_and_new_ways_to_say_the_same():
    old = config(rope_theta=5e5, rope_scaling=LLAMA3)
    assert old == config(rope_parameters={"rope_theta": 5e5, **LLAMA3})
    assert old.rope_theta == 5e5
    assert hash(old) == hash(config(rope_theta=5e5, rope_scaling=LLAMA3))


@pytest.mark.parametrize(
    ("kind", "more", "name", "expected"),
    [
        ("llama", {}, "head_dim", 8),
        ("qwen3", {}, "head_dim", 128),
        ("llama", {"num_key_value_heads": 2}, "num_key_value_heads", 2),
        ("llama", {}, "sliding_window", None),
        ("llama", {"sliding_window": 16}, "sliding_window", None),
        ("mistral", {}, "sliding_window", 4096),
        ("mistral", {"sliding_window": None}, "sliding_window", None),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": False}, "sliding_window", None),
        (
            "qwen2",
            {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0},
            "sliding_window",
            16,
        ),
        (
            "qwen2",
            {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2},
            "sliding_window",
            None,
        ),
        ("qwen2", {}, "qkv_bias", True),
        ("mistral", {"attention_bias": True}, "qkv_bias", False),
        ("llama", {"attention_bias": True}, "qkv_bias", True),
        ("qwen3", {}, "qk_norm", True),
        ("llama", {}, "max_length", 128),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}, "max_length", 512),
        ("llama", {"rope_scaling": LLAMA3 | {"factor": 2.0}}, "max_length", 128),
        ("llama", {"rope_scaling": LLAMA3 | {"factor": 32.0}}, "max_length", 128),
        (
            "qwen2",
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
            "max_length",
            512,
        ),
    ],
)
def test_what_files_leave_out_is_as_transformers_has_it(kind, more, name, expected):
    assert getattr(config(kind, **more), name) == expected


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("gpt2", {}, mentions("model_type", "'gpt2'", "llama", "mistral", "qwen2", "qwen3")),
        ("llama", {"num_attention_heads": 0}, mentions("num_attention_heads", 1, 0)),
        ("llama", {"hidden_size": "32"}, mentions("hidden_size", 1, "'32'")),
        ("llama", {"vocab_size": None}, mentions("vocab_size", "missing")),
        ("llama", {"num_key_value_heads": 3}, mentions("num_key_value_heads", "num_attention_heads", 3, 4)),
        ("llama", {"head_dim": 7}, mentions("head_dim", "even", 7)),
        ("llama", {"hidden_act": "gelu"}, mentions("hidden_act", "'gelu'", "'silu'")),
        ("llama", {"quantization_config": {"bits": 4}}, mentions("quantization_config", "bits")),
        ("llama", {"rope_scaling": {"type": "linaer", "factor": 2.0}}, mentions("'linaer'", "linear")),
        ("llama", {"rope_scaling": {"type": ["linear"]}}, mentions("['linear']", "linear", "llama3", "yarn")),
        ("llama", {"rope_scaling": {"type": "linear"}}, mentions("linear", "factor")),
        ("llama", {"rope_scaling": {"type": "linear", "factor": -1}}, mentions("factor", -1)),
        (
            "llama",
            {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
            mentions("high_freq_factor", "low_freq_factor"),
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0, "betta": 1}},
            mentions("linear", "betta"),
        ),
        (
            "qwen2",
            {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1},
            mentions("attention", "full_attention", "sliding_attention"),
        ),
        ("qwen2", {"max_window_layers": "x"}, mentions("max_window_layers", "'x'")),
        ("qwen2", {"layer_types": 5}, mentions("layer_types", 5)),
    ],
)
def test_unsupported_configs_are_rejected(kind, more, message):
    with pytest.raises(ValueError, match=message):
        config(kind, **more)
