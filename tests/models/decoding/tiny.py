"""A model so small that all of its sequences can be scored."""

from loraplus_jax.models.llama.config import LlamaConfig

from ... import tiny

WORDS = 13
SIZES = {"vocab_size": WORDS, "hidden_size": 8, "head_dim": 4, "intermediate_size": 12}
CONFIG = LlamaConfig.from_hf(tiny.config(**SIZES, initializer_range=1.0))
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]
