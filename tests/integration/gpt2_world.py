"""A random GPT-2 with the tokenizer of the tiny language world, laid out as GPT-2's own directory."""

import json

import numpy as np
from safetensors.numpy import save_file

from .language_world import HEADS, HIDDEN, INNER, LAYERS, POSITIONS, STOP, vocabulary, write_model

PRODUCTS = ("c_attn", "attn/c_proj", "c_fc", "mlp/c_proj")


def write_gpt2(directory):
    """Without a chat template, and with special tokens only as ids in `config.json`."""
    write_model(directory)
    tokens, _ = vocabulary()
    (directory / "tokenizer_config.json").write_text(json.dumps({"model_max_length": POSITIONS}))
    end = tokens.index(STOP)
    sizes = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS, "n_inner": INNER}
    config = (
        {"model_type": "gpt2", "vocab_size": len(tokens), "bos_token_id": end, "eos_token_id": end}
        | sizes
        | {"layer_norm_epsilon": 1e-5}
    )
    (directory / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(2)

    def norm(name):
        return {f"{name}.weight": np.ones(HIDDEN, np.float32), f"{name}.bias": np.zeros(HIDDEN, np.float32)}

    def conv1d(name, inner, outer):
        weight = rng.normal(size=(inner, outer)) / np.sqrt(inner)
        bias = 0.1 * rng.normal(size=outer)
        return {f"{name}.weight": weight.astype(np.float32), f"{name}.bias": bias.astype(np.float32)}

    # Large enough for the tied and frozen head to be sure of a token.
    found = {
        "wte.weight": (rng.normal(size=(len(tokens), HIDDEN)) / 3).astype(np.float32),
        "wpe.weight": (rng.normal(size=(POSITIONS, HIDDEN)) / 9).astype(np.float32),
        **norm("ln_f"),
    }
    for layer in (f"h.{i}" for i in range(LAYERS)):
        found |= norm(f"{layer}.ln_1") | norm(f"{layer}.ln_2")
        found |= conv1d(f"{layer}.attn.c_attn", HIDDEN, 3 * HIDDEN)
        found |= conv1d(f"{layer}.attn.c_proj", HIDDEN, HIDDEN)
        found |= conv1d(f"{layer}.mlp.c_fc", HIDDEN, INNER) | conv1d(f"{layer}.mlp.c_proj", INNER, HIDDEN)
    save_file(found, directory / "model.safetensors")
