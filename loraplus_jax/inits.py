"""Initializers of the two factors. One factor is always zero, so that an adapter starts as a no-op."""

import jax

from .config import Init

Initializer = jax.nn.initializers.Initializer
Axes = list[int] | range


def factor_inits(init: Init, rank: int, axes: str = "io") -> tuple[Initializer, Initializer]:
    """Returns the initializers of A `(in, r)` and B `(r, out)`, or of factors with more axes.

    `"lora"`: A ~ U(-sqrt(6/in), sqrt(6/in)), B = 0; Init[1] of arXiv 2402.12354, section 3.
    `"lora_b"`: A = 0, B ~ U(-sqrt(6/r), sqrt(6/r)); Init[2], with which the paper found lambda near 16.
    `"gaussian"`: A ~ N(0, 1/r^2), B = 0.

    Args:
      init: name of the initialization.
      rank: r.
      axes: the weight's axes, as in `AdapterSpec`; `in` is the product of its input axes.

    >>> a, b = factor_inits("lora", rank=2)
    >>> float(abs(b(jax.random.key(0), (2, 5))).max())
    0.0
    """
    zeros = jax.nn.initializers.zeros
    if init == "gaussian":
        return jax.nn.initializers.normal(1.0 / rank), zeros
    batch = [role for role in axes if role not in "io"]
    if init == "lora_b":
        size = len(batch)
        outputs = range(size + 1, size + 1 + axes.count("o"))
        return zeros, _he([size], outputs, range(size))
    roles = [role for role in axes if role != "o"]
    inputs = [n for n, role in enumerate(roles) if role == "i"]
    return _he(inputs, [len(roles)], [n for n, role in enumerate(roles) if role != "i"]), zeros


def _he(inputs: Axes, outputs: Axes, batch: Axes) -> Initializer:
    return jax.nn.initializers.he_uniform(list(inputs), list(outputs), batch_axis=list(batch))
