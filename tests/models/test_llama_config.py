"""Configs of published models, and what is rejected."""

import pytest

from loraplus_jax.models.llama_config import LlamaConfig

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
        ("gpt2", {}, "model_type is 'gpt2', must be one of llama, mistral, qwen2, qwen3"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads must be an int of 1 or more, got 0"),
        ("llama", {"hidden_size": "32"}, "hidden_size must be an int of 1 or more, got '32'"),
        ("llama", {"vocab_size": None}, "vocab_size is missing"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads"),
        ("llama", {"head_dim": 7}, "head_dim must be even"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', only 'silu' is supported"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is"),
        ("llama", {"rope_scaling": {"type": "linaer", "factor": 2.0}}, "got 'linaer'.*linear"),
        ("llama", {"rope_scaling": {"type": ["linear"]}}, "the type must be one of"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "linear needs factor"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": -1}}, "factor must be a positive number"),
        ("llama", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "must be above low_freq_factor"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "betta": 1}}, "does not take betta"),
        (
            "qwen2",
            {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1},
            "more than one kind of attention",
        ),
        ("qwen2", {"max_window_layers": "x"}, "max_window_layers must be"),
        ("qwen2", {"layer_types": 5}, "layer_types must be a list of names, got 5"),
    ],
)
def test_what_is_refused(kind, more, message):
    with pytest.raises(ValueError, match=message):
        config(kind, **more)
