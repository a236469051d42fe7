"""Sweeps: compare LoRA+ with LoRA on the user's task at equal budgets, and select lambda."""
