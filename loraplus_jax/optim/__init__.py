"""Optimizers: LoRA+ as an optax transform, schedules, and diagnostics of each parameter's learning rate."""
