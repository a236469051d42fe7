"""Path maps of models in other JAX libraries to transformers' names, for `save_peft` and `load_peft`."""

from .path_map import PathMap

TUNIX_LLAMA: PathMap = (
    ("layers/{layer}/attn/{name}", "model.layers.{layer}.self_attn.{name}"),
    ("layers/{layer}/mlp/{name}", "model.layers.{layer}.mlp.{name}"),
    ("lm_head", "lm_head"),
    ("embedder/input_embedding", "model.embed_tokens", "Embedding"),
)
"""tunix's Llama 3, Qwen 2 and Qwen 3."""

TUNIX_GEMMA: PathMap = (
    ("layers/{layer}/attn/q_einsum", "model.layers.{layer}.self_attn.q_proj"),
    ("layers/{layer}/attn/attn_vec_einsum", "model.layers.{layer}.self_attn.o_proj"),
    ("layers/{layer}/mlp/{name}", "model.layers.{layer}.mlp.{name}"),
)
"""tunix's Gemma. Its `kv_einsum` holds keys and values in one weight, of which PEFT has no adapter."""
