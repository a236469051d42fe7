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
    ("layers/{layer}/attn/kv_einsum", "model.layers.{layer}.self_attn.{k_proj|v_proj}"),
    ("layers/{layer}/attn/qkv_einsum", "model.layers.{layer}.self_attn.{q_proj|k_proj|v_proj}"),
    ("layers/{layer}/attn/attn_vec_einsum", "model.layers.{layer}.self_attn.o_proj"),
    ("layers/{layer}/mlp/{name}", "model.layers.{layer}.mlp.{name}"),
    ("embedder/input_embedding", "model.embed_tokens", "TiedEmbedding"),
    ("embedder/input_embedding", "lm_head", "TiedHead"),
)
"""tunix's Gemma 1, 2 and 3, as transformers' `GemmaForCausalLM`, `Gemma2ForCausalLM` and `Gemma3ForCausalLM`.
Keys and values are one weight, and with as many heads for keys as for queries the queries too."""

GEMMA: PathMap = (
    ("layer_{layer}/attn/q_einsum/w", "model.layers.{layer}.self_attn.q_proj", "Linear"),
    ("layer_{layer}/attn/kv_einsum/w", "model.layers.{layer}.self_attn.{k_proj|v_proj}", "Linear"),
    ("layer_{layer}/attn/qkv_einsum/w", "model.layers.{layer}.self_attn.{q_proj|k_proj|v_proj}", "Linear"),
    ("layer_{layer}/attn/attn_vec_einsum/w", "model.layers.{layer}.self_attn.o_proj", "Linear"),
    ("layer_{layer}/mlp/gating_einsum", "model.layers.{layer}.mlp.{gate_proj|up_proj}", "Linear"),
    ("layer_{layer}/mlp/linear", "model.layers.{layer}.mlp.down_proj", "Linear"),
    ("embedder/input_embedding", "model.embed_tokens", "TiedEmbedding"),
    ("embedder/input_embedding", "lm_head", "TiedHead"),
)
"""The Linen models of the package gemma, with adapters of `gm.nn.LoRA` read by `specs_of`, or with ours from
`target_parameters`. The same classes of transformers as for `TUNIX_GEMMA`."""

BONSAI_QWEN3: PathMap = TUNIX_LLAMA[:3]
"""bonsai's Qwen 3. An adapter on its `embedder` would have no effect."""

BONSAI_GEMMA3: PathMap = (
    ("language_model/layers/{layer}/{block}/{name}", "model.language_model.layers.{layer}.{block}.{name}"),
    (
        "vision_tower/encoder/layers/{layer}/{block}/{name}",
        "model.vision_tower.encoder.layers.{layer}.{block}.{name}",
    ),
    ("embed_tokens/weight", "model.language_model.embed_tokens", "TiedEmbedding"),
    ("embed_tokens/weight", "lm_head", "TiedHead"),
)
"""bonsai's Gemma 3, text and images, with the names of transformers 5."""

BONSAI_VIT: PathMap = (
    ("layers/{layer}/attention/query", "vit.layers.{layer}.attention.q_proj"),
    ("layers/{layer}/attention/key", "vit.layers.{layer}.attention.k_proj"),
    ("layers/{layer}/attention/value", "vit.layers.{layer}.attention.v_proj"),
    ("layers/{layer}/attention/out", "vit.layers.{layer}.attention.o_proj"),
    ("layers/{layer}/linear1", "vit.layers.{layer}.mlp.fc1"),
    ("layers/{layer}/linear2", "vit.layers.{layer}.mlp.fc2"),
    ("pos_embeddings/projection", "vit.embeddings.patch_embeddings.projection"),
    ("classifier", "classifier"),
)
"""bonsai's ViT, with the names of transformers 5."""
