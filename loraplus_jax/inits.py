"""Initial values of the two factors. One of the two is always zero, so that an adapter starts as a no-op."""

import jax

from .config import Init

Initializer = jax.nn.initializers.Initializer


def factor_inits(init: Init, rank: int) -> tuple[Initializer, Initializer]:
    """Initializers of A `(in, r)` and B `(r, out)`.

    `"lora"`: A ~ U(-sqrt(6/in), sqrt(6/in)), B = 0; Init[1] of arXiv 2402.12354, section 3.
    `"lora_b"`: A = 0, B ~ U(-sqrt(6/r), sqrt(6/r)); Init[2], with which the paper found lambda near 16.
    `"gaussian"`: A ~ N(0, 1/r^2), B = 0.

    >>> a, b = factor_inits("lora", rank=2)
    >>> float(abs(b(jax.random.key(0), (2, 5))).max())
    0.0
    """
    zeros, he = jax.nn.initializers.zeros, jax.nn.initializers.he_uniform()
    return {
        "lora": (he, zeros),
        "lora_b": (zeros, he),
        "gaussian": (jax.nn.initializers.normal(1.0 / rank), zeros),
    }[init]
