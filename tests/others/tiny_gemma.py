"""A config of the package gemma, small enough to compile, with everything that Gemma 2 and 3 have."""

SIZES = {"num_embed": 32, "embed_dim": 16, "hidden_dim": 24, "num_heads": 4, "head_dim": 6, "num_kv_heads": 2}


def config_of(gm, kinds=("LOCAL_SLIDING", "GLOBAL"), **changes):
    """`gm` is the module `gemma.gm`, which not every environment has; `kinds` are the layers' attention types."""
    options = {
        "final_logit_softcap": None,
        "use_post_attn_norm": True,
        "use_post_ffw_norm": True,
        "use_qk_norm": True,
        "sliding_window_size": 3,
        "attention_types": tuple(gm.nn.AttentionType[kind] for kind in kinds),
    }
    return gm.nn.config.TransformerConfig(**SIZES | options | changes)
