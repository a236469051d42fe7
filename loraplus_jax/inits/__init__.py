"""Initial values of A and B: random, from weights, from gradients, from the error of quantization."""

# Eager: some functions have their module's name, and a later import of the module would take it from them.
from .from_weights import as_difference, lora_ga, olora, pissa
from .loftq import loftq
from .random import factor_inits

__all__ = [
    "as_difference",
    "factor_inits",
    "loftq",
    "lora_ga",
    "olora",
    "pissa",
]
