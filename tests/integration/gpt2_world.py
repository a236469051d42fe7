"""A random GPT-2 with the tokenizer of the tiny language world, laid out as GPT-2's own directory."""

import json

from safetensors.numpy import save_file

from .. import tiny
from .language_world import HEADS, HIDDEN, INNER, LAYERS, POSITIONS, STOP, vocabulary, write_model

PRODUCTS = ("c_attn", "attn/c_proj", "c_fc", "mlp/c_proj")


def write_gpt2(directory):
    """Without a chat template, and with special tokens only as ids in `config.json`."""
    write_model(directory)
    tokens, _ = vocabulary()
    (directory / "tokenizer_config.json").write_text(json.dumps({"model_max_length": POSITIONS}))
    end = tokens.index(STOP)
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    sizes |= {"intermediate_size": INNER, "max_position_embeddings": POSITIONS, "vocab_size": len(tokens)}
    config = tiny.config("gpt2", bos_token_id=end, eos_token_id=end, **sizes)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = tiny.tensors(config, seed=2)
    # Large enough for the tied and frozen head to be sure of a token.
    tensors["transformer.wte.weight"] *= 2
    found = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    save_file(found, directory / "model.safetensors")
