"""Writes gpt2_*.npz, one for each shape of `CASES`, with transformers as the reference; see make_llama.py.

    pip install torch transformers safetensors numpy
    python tests/golden/make_gpt2.py

Made with torch 2.13.0 and transformers 5.24.0.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import make_llama

SIZES = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
SCALED = {"n_layer": 3, "n_head": 2, "n_inner": 40, "activation_function": "gelu"}
SCALED |= {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}
UNTIED = {"n_embd": 24, "n_head": 3, "tie_word_embeddings": False, "activation_function": "relu"}
UNTIED |= {"scale_attn_weights": False, "layer_norm_epsilon": 1e-3}
CASES = {"tied": {}, "scaled": SCALED, "untied": UNTIED}


def main() -> None:
    for name in sys.argv[1:] or CASES:
        make_llama.write(f"gpt2_{name}", make(CASES[name]))


def make(changes, seed=0):
    """A model with random weights, in which biases and norms show in the outputs too."""
    import transformers as tf

    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = tf.GPT2Config(**(SIZES | {"initializer_range": 0.3} | ends | changes))
    return make_llama.randomized(config, seed)


if __name__ == "__main__":
    main()
