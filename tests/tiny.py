"""A tiny model of each family: its config as Hugging Face has it, and weights by the table of its names."""

import json

import jax
import numpy as np
from safetensors.numpy import save_file

from loraplus_jax.adapter.tree import flatten
from loraplus_jax.models.checkpoints.name_table import expand, shape_in_file
from loraplus_jax.models.families import ENCODER_TYPES, encoder_of, family_of

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 24, "max_position_embeddings": 64}
NAMES_IN_GPT2 = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
NAMES_IN_GPT2 |= {"intermediate_size": "n_inner", "max_position_embeddings": "n_positions"}
ENCODER = {"type_vocab_size": 2, "pad_token_id": 0}
DECODER = {"num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
GEMMA = {"sliding_window": 6, "sliding_window_pattern": 2, "query_pre_attn_scalar": 12}
MIXTURE = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
OPTIONS = {
    "bert": ENCODER,
    "roberta": ENCODER | {"pad_token_id": 1},
    # A window of two tokens on either side in the second of two layers.
    "modernbert": {"local_attention": 4, "pad_token_id": 0},
    "gpt2": {"layer_norm_epsilon": 1e-5},
    "gemma2": DECODER | GEMMA | {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 9.0},
    "gemma3_text": DECODER | GEMMA,
    "qwen3_moe": DECODER | MIXTURE | {"moe_intermediate_size": 12, "norm_topk_prob": True},
    "mixtral": DECODER | MIXTURE,
    "phi3": DECODER | {"partial_rotary_factor": 0.5},
}


def config(kind="llama", **changes):
    """The content of a family's config.json; sizes by Llama's names, and None takes an option away."""
    content = {"model_type": kind, **SIZES, **OPTIONS.get(kind, DECODER), **changes}
    names = NAMES_IN_GPT2 if kind == "gpt2" else {}
    return {names.get(key, key): value for key, value in content.items() if value is not None}


def tensors(content, seed=0):
    """Random weights for a config, as its checkpoint names them; norms change nothing yet."""
    kind, rng, found = content["model_type"], np.random.default_rng(seed), {}
    ids = jax.ShapeDtypeStruct((1, 2), np.int32)
    if kind in ENCODER_TYPES:
        family = encoder_of(kind)
        ours = family.config.from_hf(content)
        model, table, inputs, prefix = family.model(ours, 2), family.name_table(ours), (ids, ids), ""
    else:
        family = family_of(kind)
        ours = family.config.from_hf(content)
        model, table, inputs, prefix = family.model(ours), family.name_table(ours), (ids,), family.prefix
    leaves = flatten(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"])
    for rule in table.rules:
        shape = shape_in_file(rule, leaves[rule.path])
        for name in expand(rule, leaves[rule.path]):
            value = rng.normal(size=shape) / np.sqrt(shape[-1])
            if rule.path.endswith("/scale"):
                value = np.full(shape, 0.0 if kind.startswith("gemma") else 1.0)
            found[name if name.startswith("lm_head") else f"{prefix}{name}"] = value.astype(np.float32)
    return found


def write(directory, kind="llama", **changes):
    """A directory of config and weights; returns it."""
    directory.mkdir(parents=True, exist_ok=True)
    content = config(kind, **changes)
    (directory / "config.json").write_text(json.dumps(content))
    save_file(tensors(content), directory / "model.safetensors")
    return directory
