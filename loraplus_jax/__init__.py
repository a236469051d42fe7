"""LoRA+ for JAX and Flax (Hayou, Ghosh, Yu, ICML 2024, arXiv 2402.12354)."""
