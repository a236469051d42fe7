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

BONSAI_QWEN3: PathMap = TUNIX_LLAMA[:3]
"""bonsai's Qwen 3. An adapter on its `embedder` would have no effect."""

BONSAI_GEMMA3: PathMap = (
    ("language_model/layers/{layer}/{block}/{name}", "model.language_model.layers.{layer}.{block}.{name}"),
    (
        "vision_tower/encoder/layers/{layer}/{block}/{name}",
        "model.vision_tower.vision_model.encoder.layers.{layer}.{block}.{name}",
    ),
    ("embed_tokens/weight", "model.language_model.embed_tokens", "TiedEmbedding"),
)
"""bonsai's Gemma 3, text and images."""

BONSAI_VIT: PathMap = (
    ("layers/{layer}/attention/out", "vit.encoder.layer.{layer}.attention.output.dense"),
    ("layers/{layer}/attention/{name}", "vit.encoder.layer.{layer}.attention.attention.{name}"),
    ("layers/{layer}/linear1", "vit.encoder.layer.{layer}.intermediate.dense"),
    ("layers/{layer}/linear2", "vit.encoder.layer.{layer}.output.dense"),
    ("pos_embeddings/projection", "vit.embeddings.patch_embeddings.projection"),
    ("classifier", "classifier"),
)
"""bonsai's ViT."""
