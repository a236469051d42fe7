"""A model so small that all of its sequences can be scored."""

from loraplus_jax.models.llama.config import LlamaConfig

WORDS = 13
CONFIG = LlamaConfig(
    vocab_size=WORDS,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    intermediate_size=12,
    max_position_embeddings=64,
    initializer_range=1.0,
)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]
