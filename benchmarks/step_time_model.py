"""The model of `step_time.py`: SmolLM2-135M's shape, random weights as files, and the FLOPs of an ideal step."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.041666666666666664,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")


def products(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(in, out) of every frozen matrix that a token is multiplied with, by name; the embedding only as the head."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "q_proj": (width, query),
        "k_proj": (width, key),
        "v_proj": (width, key),
        "o_proj": (query, width),
        "gate_proj": (width, inner),
        "up_proj": (width, inner),
        "down_proj": (inner, width),
    }
    layers = range(config["num_hidden_layers"])
    return {f"{i}.{name}": shape for i in layers for name, shape in layer.items()} | {
        "lm_head": (width, config["vocab_size"])
    }


def ideal_flops(config: Mapping[str, Any], batch: int, tokens: int, rank: int) -> dict[str, float]:
    """What a step cannot do without; a multiplication and an addition count as two.

    weights: 4 N T, for N weights and T tokens: 2 forward, 2 backward to the input, none for gradients of weights.
    attention: 12 B t^2 D L, for scores and values forward (4) and backward (8); all t^2 pairs are counted, as
      `jax.nn.dot_product_attention` computes them. Blocked attention skips up to half of them.
    adapters: 6 n T, for n adapter weights: 2 forward, 2 backward to the input, 2 for their own gradient.
    """
    shapes, total = products(config), batch * tokens
    adapted = [shape for name, shape in shapes.items() if name.split(".")[-1] in ADAPTED]
    width = config["num_attention_heads"] * config["head_dim"]
    return {
        "weights": 4.0 * sum(rows * columns for rows, columns in shapes.values()) * total,
        "attention": 12.0 * batch * tokens**2 * width * config["num_hidden_layers"],
        "adapters": 6.0 * sum(rank * (rows + columns) for rows, columns in adapted) * total,
    }


def write_model(
    directory: Path, config: Mapping[str, Any], rank: int, seed: int = 0, *, trained: bool = False
) -> None:
    """`config.json`, `model.safetensors`, and `adapter.safetensors` in PEFT's names; random, float32.

    B is zero, or random as well if `trained`.
    """
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    width = config["hidden_size"]

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) * np.float32(config["initializer_range"])

    weights = {"model.embed_tokens.weight": normal(config["vocab_size"], width)}
    weights["model.norm.weight"] = np.ones(width, np.float32)
    adapter = {}
    for name, (rows, columns) in products(config).items():
        if name == "lm_head":
            continue
        layer, kind = name.split(".")
        path = f"model.layers.{layer}.{'self_attn' if kind in ADAPTED else 'mlp'}.{kind}"
        weights[f"{path}.weight"] = normal(columns, rows)
        if kind in ADAPTED:
            bound = 1.0 / np.sqrt(rows)  # as PEFT draws it
            a = rng.uniform(-bound, bound, (rank, rows)).astype(np.float32)
            b = normal(columns, rank) if trained else np.zeros((columns, rank), np.float32)
            adapter[f"base_model.model.{path}.lora_A.weight"] = a
            adapter[f"base_model.model.{path}.lora_B.weight"] = b
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{norm}.weight"] = np.ones(width, np.float32)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    save_file(adapter, directory / "adapter.safetensors", {"format": "pt"})
