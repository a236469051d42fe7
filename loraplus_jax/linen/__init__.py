"""LoRA+ for Flax Linen: layers with an adapter of their own, and adapters on models as they are."""
