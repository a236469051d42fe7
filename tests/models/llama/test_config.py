"""Configs of published models, and what is rejected."""

import json

import numpy as np
import pytest

from loraplus_jax.models.llama.config import LlamaConfig
from loraplus_jax.models.rope import LongRope

from ... import tiny
from ...refusals import refusals
from ..golden import GOLDEN, LLAMAS

SIZES = tiny.SIZES | {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LOCAL = {"full_attention": {}, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}
LONGROPE = LongRope(short_factor=(1.0,) * 4, long_factor=(2.0,) * 4, original_max_position_embeddings=4096)
SU = {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


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
        ("qwen2", {}, "qkv_bias", True),
        ("mistral", {"attention_bias": True}, "qkv_bias", False),
        ("llama", {"attention_bias": True}, "qkv_bias", True),
        ("gemma2", {"num_hidden_layers": 5}, "full_layers", (1, 3)),
        ("gemma2", {}, "attn_logit_softcapping", 50.0),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping", None),
        ("gemma2", {}, "tie_word_embeddings", True),
        ("gemma2", {"query_pre_attn_scalar": 144}, "attention_scale", 1 / 12),
        ("gemma3_text", {"num_hidden_layers": 13}, "full_layers", (5, 11)),
        ("gemma3_text", {}, "full_layers", ()),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping", None),
        ("gemma3_text", {"rope_local_base_freq": None, "head_dim": None}, "rope_local_theta", 1e4),
        ("gemma3_text", {"rope_local_base_freq": 500.0}, "rope_local_theta", 500.0),
        ("gemma3_text", {}, "rope_theta", 1e6),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "max_length", 128),
        ("olmo3", {"num_hidden_layers": 9}, "full_layers", (3, 7)),
        ("olmo3", {"rope_theta": 5e4}, "rope_local_theta", 5e4),
        ("olmo2", {"sliding_window": 16}, "sliding_window", None),
        ("smollm3", {"num_hidden_layers": 9}, "unrotated_layers", (3, 7)),
        ("smollm3", {"no_rope_layers": [0, 1]}, "unrotated_layers", (0,)),
        ("llama", {"no_rope_layers": [0, 1]}, "unrotated_layers", ()),
        ("qwen3_moe", {"moe_intermediate_size": None}, "intermediate_size", 768),
        ("qwen3_moe", {"num_local_experts": None, "num_experts": 9}, "num_experts", 9),
        ("qwen3_moe", {"num_local_experts": None, "num_experts_per_tok": None}, "num_experts", 128),
        ("qwen3_moe", {"norm_topk_prob": None}, "norm_topk_prob", False),
        ("mixtral", {"norm_topk_prob": False, "num_experts": 9}, "norm_topk_prob", True),
        ("mixtral", {"num_local_experts": None}, "num_experts", 8),
        ("mixtral", {}, "rope_theta", 1e6),
        ("llama", {"num_experts": 4, "num_experts_per_tok": 8}, "num_experts", 0),
        ("phi3", {"partial_rotary_factor": 0.5}, "rotary_size", 4),
        ("phi3", {"rope_scaling": SU}, "max_length", 128),
        ("phi3", {"rope_scaling": SU}, "rope_scaling", LONGROPE),
        ("llama", {}, "max_length", 128),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}, "max_length", 512),
        ("llama", {"rope_scaling": LLAMA3 | {"factor": 2.0}}, "max_length", 128),
        ("llama", {"rope_scaling": LLAMA3 | {"factor": 32.0}}, "max_length", 128),
        ("qwen2", {"rope_scaling": YARN | {"truncate": True}}, "max_length", 512),
    ],
)
def test_what_files_leave_out_is_as_transformers_has_it(kind, more, name, expected):
    assert getattr(config(kind, **more), name) == expected


def file(kind, **more):
    return lambda: config(kind, **more)


test_unsupported_configs = refusals(
    (file("gpt2"), "model_type", "'gpt2'", "llama", "mistral", "qwen2", "qwen3"),
    (file("llama", num_attention_heads=0), "num_attention_heads", 1, 0),
    (file("llama", hidden_size="32"), "hidden_size", "integer", "'32'"),
    (file("llama", vocab_size=None), "vocab_size", "missing"),
    (file("llama", num_key_value_heads=3), "num_key_value_heads", "num_attention_heads", 3, 4),
    (file("llama", head_dim=7), "head_dim", "even", 7),
    (file("llama", hidden_act="mish"), "hidden_act", "'mish'", "silu", "gelu_pytorch_tanh"),
    (file("llama", partial_rotary_factor=0.5), "partial_rotary_factor", 0.5),
    (file("phi3", partial_rotary_factor=0.4), "partial_rotary_factor", 0.4, "even"),
    (file("phi3", partial_rotary_factor="half"), "partial_rotary_factor", "'half'"),
    (file("phi3", rope_scaling=SU | {"short_factor": [1.0]}), "short_factor", 4, 1),
    (file("phi3", rope_scaling=SU | {"long_factor": 2}), "long_factor", "tuple", 2),
    (file("gemma3_text", sliding_window=None), "sliding_window", "sliding_attention"),
    (file("gemma3_text", sliding_window_pattern=0), "sliding_window_pattern", 0),
    (file("gemma3_text", use_bidirectional_attention=True), "use_bidirectional_attention"),
    (file("gemma3_text", rope_parameters=LOCAL), "sliding_attention", "linear"),
    (
        file("llama", rope_parameters={"rope_type": "default"}, rope_scaling=LLAMA3),
        *("rope_parameters", "rope_scaling"),
    ),
    (file("gemma2", final_logit_softcapping=-1), "final_logit_softcapping", -1),
    (file("gemma2", layer_types=["chunked_attention"] * 2), "layer_types", "full_attention"),
    (file("llama", quantization_config={"bits": 4}), "quantization_config", "bits"),
    (file("llama", rope_scaling={"type": ["linear"]}), "['linear']", "linear", "llama3", "yarn"),
    (file("llama", rope_scaling={"type": "liner", "factor": 2}), "'liner'", "linear"),
    (file("llama", rope_scaling={"type": "dynamic", "factor": 2}), "'dynamic'", "linear"),
    (file("llama", rope_scaling={"type": "linear"}), "linear.factor", "missing"),
    (file("llama", rope_scaling={"type": "linear", "factor": 0}), "factor", 0),
    (file("llama", rope_scaling={"type": "linear", "factor": "two"}), "factor", "'two'"),
    (file("llama", rope_scaling=YARN | {"mscale": 1.0}), "yarn.mscale", "not supported"),
    (file("llama", rope_scaling=YARN | {"truncate": False}), "yarn.truncate", True, False),
    (file("llama", rope_scaling=YARN | {"beta_fast": 1e-308}), "yarn.beta_fast", 1e-308),
    (file("llama", rope_scaling={"rope_type": "llama3", "factor": 8}), "llama3.low_freq_factor"),
    (file("qwen2", use_sliding_window=True), "use_sliding_window", True),
    (
        file("llama", hidden_size=None, hidden_act=5, use_sliding_window=1, sliding_window_pattern=0),
        *("use_sliding_window", "hidden_size", "missing", "hidden_act", 5),
    ),
    (file("gemma2", vocab_size=0, sliding_window_pattern=0), "sliding_window_pattern", "vocab_size"),
    (
        file("llama", rope_scaling=LLAMA3 | {"high_freq_factor": 1.0}),
        *("high_freq_factor", "low_freq_factor"),
    ),
    (
        file("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[0], output_router_logits=True),
        *("decoder_sparse_step", "mlp_only_layers", "output_router_logits"),
    ),
    (file("qwen3_moe", num_experts_per_tok=5, num_experts=4), "num_experts_per_tok", "num_experts", 5, 4),
    (file("mixtral", num_local_experts=10**6), "num_experts", 1024),
    (file("mixtral", router_jitter_noise=0.1), "router_jitter_noise", 0.1),
    (file("mixtral", intermediate_size=None), "intermediate_size", "missing"),
    (file("smollm3", no_rope_layers=[1]), "no_rope_layers", 2, [1]),
    (file("smollm3", no_rope_layer_interval=0), "no_rope_layer_interval", 0),
    (file("qwen2", layer_types=5), "layer_types", 5),
)


@pytest.mark.parametrize("name", LLAMAS)
def test_old_and_new_config_files_mean_the_same(name):
    new = json.loads(str(np.load(GOLDEN / f"llama_{name}.npz")["config"]))
    rope = new["rope_parameters"]
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "layer_types")}
    if "full_attention" in rope:
        old["rope_local_base_freq"], rope = rope["sliding_attention"]["rope_theta"], rope["full_attention"]
    old["rope_theta"] = rope["rope_theta"]
    old["partial_rotary_factor"] = rope.get("partial_rotary_factor")
    left_out = ("rope_theta", "rope_type", "partial_rotary_factor", "original_max_position_embeddings")
    is_phi3 = new["model_type"] == "phi3"  # its old files have the original length outside
    rest = {key: value for key, value in rope.items() if key not in left_out[: 4 if is_phi3 else 3]}
    old["rope_scaling"] = {"type": rope["rope_type"], **rest} if rest else None
    assert LlamaConfig.from_hf(old) == LlamaConfig.from_hf(new)
