"""Optimizers: LoRA+ as an optax transform, schedules, and what an optimizer does to each parameter."""
