"""LoRA+ for JAX and Flax: low-rank adapters whose output factor B learns lambda times faster than A.

The method is from Hayou, Ghosh and Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models", ICML 2024,
arXiv 2402.12354. Five lines adapt any Flax Linen model with LoRA+:

    config = LoRAPlusConfig(target_modules=["query", "value"], lr_ratio=4.0)
    model = apply_lora_plus(model, config)
    lora, specs = init_lora(model, key, inputs)
    tx = lora_plus_adamw(1e-4, lr_ratio=config.lr_ratio)
    outputs = model.apply({"params": params, "lora": lora}, inputs)
"""

import lazy_loader

# A name of the stub is imported on its first use, so that the command line answers --help before JAX is imported.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
