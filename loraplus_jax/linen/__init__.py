"""LoRA+ for Flax Linen: adapters for existing models, and layers with built-in adapters."""
