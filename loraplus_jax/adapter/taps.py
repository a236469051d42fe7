"""What a layer measures of its own update: the terms of LoRA+'s theory, as the gradient of a tap."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from .spec import FACTORS

TAP = "lora_tap"
"""Name of an optional leaf next to two factors; its gradient is the result of `update_squares`."""

PREVIOUS_FACTORS = tuple(f"{name}_before" for name in FACTORS)
"""Names of the leaves next to a tap that hold the factors of the previous step."""

TERMS = ("delta1", "delta2", "delta3", "z_a", "z_b")
"""The quantities that `update_squares` measures, in order."""


def update_squares(
    term: Callable[..., jax.Array],
    x: jax.Array,
    before: tuple[jax.Array, jax.Array],
    after: tuple[jax.Array, jax.Array],
    scale: jax.Array | float,
    batch_axes: int = 0,
) -> jax.Array:
    """Measures how an adapter's last step changed its layer's output for inputs x, and the size of its features.

    With A and B after the step, and the step dA and dB: delta1 = s (x dA) (B - dB), delta2 = s (x (A - dA)) dB,
    delta3 = s (x dA) dB. Their sum is the change of Z_B = s (x A) B; Z_A = x A (arXiv 2402.12354, section 4,
    without s there). x is held fixed: changes made by earlier layers are not counted.

    Args:
      term: `term(x, a, b, scale)`, the layer's low-rank term.
      x: the layer's inputs.
      before, after: A and B before and after the step.
      scale: s.
      batch_axes: number of leading batch axes of B.

    Returns:
      float32 `(6,)`: the mean squares over all elements in the order of `TERMS`, then 1, to count a layer's calls.
    """
    (a0, b0), (a, b) = before, after
    da, db = a - a0, b - b0
    rank, *outputs = b.shape[batch_axes:]
    width = math.prod(outputs)
    # With B an identity, padded with zeros to the output width, the term equals Z_A.
    identity = jnp.broadcast_to(jnp.eye(rank, width, dtype=b.dtype).reshape(rank, *outputs), b.shape)

    def mean_square(a: jax.Array, b: jax.Array, scale: jax.Array | float = scale) -> jax.Array:
        return jnp.mean(jnp.square(term(x, a, b, scale).astype(jnp.float32)))

    z_a = mean_square(a, identity, 1.0) * width / rank
    deltas = [mean_square(da, b0), mean_square(a0, db), mean_square(da, db)]
    return jnp.stack([*deltas, z_a, mean_square(a, b), jnp.ones(())])


# A parameter's gradient is the one way out of a model that every transform preserves, and sums over its uses: loops
# over layers, shared weights, rematerialization. Flax's sow needs a mutable collection in all of them.
@jax.custom_vjp
def inject_gradient(y: jax.Array, tap: jax.Array, value: jax.Array) -> jax.Array:
    """`y`, with `value` as the gradient of `tap`, which has its shape, in the backward pass."""
    return y


inject_gradient.defvjp(
    lambda y, tap, value: (y, value), lambda value, gradient: (gradient, value, jnp.zeros_like(value))
)
