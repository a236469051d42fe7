"""When is LoRA+ with ratio lambda LoRA with alpha x lambda?

    python benchmarks/paper/exactness.py

A chain of adapted layers learns random targets. With Adam (epsilon near 0), B = 0 at the start, and neither weight
decay nor clipping, B' = B / lambda goes the same way. The rows show how far each of these conditions carries it.
Lambda is 10: a power of two would be exact in any case.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from shared import parse_options, report

from loraplus_jax import LoRAPlusDense, lora_plus_adamw

WIDTH, RANK, POINTS, LAMBDA, RATE = 24, 4, 32, 10.0, 1e-3


class Chain(nn.Module):
    """Adapted layers with tanh between them."""

    alpha: float = float(RANK)
    depth: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for n in range(self.depth):
            layer = LoRAPlusDense(
                WIDTH,
                rank=RANK,
                alpha=self.alpha,
                init_factors="he_uniform",
                param_dtype=x.dtype,
                name=f"layer_{n}",
            )
            x = jnp.tanh(layer(x))
        return x


def train(tx: Any, steps: int, alpha: float = float(RANK)) -> dict[str, np.ndarray]:
    """The factors' products s A B of every layer after some steps from the same start."""
    chain, keys = Chain(alpha), jax.random.split(jax.random.key(0), 3)
    x, y = (jax.random.normal(key, (POINTS, WIDTH), jnp.float64) for key in keys[:2])
    variables = chain.init(keys[2], x)
    lora = variables["lora"]

    def loss(lora: Any) -> jax.Array:
        return jnp.mean((chain.apply({"params": variables["params"], "lora": lora}, x) - y) ** 2)

    def step(_: Any, carry: Any) -> Any:
        lora, state = carry
        updates, state = tx.update(jax.grad(loss)(lora), state, lora)
        return optax.apply_updates(lora, updates), state

    lora, _ = jax.jit(lambda lora: jax.lax.fori_loop(0, steps, step, (lora, tx.init(lora))))(lora)
    return {name: np.asarray(alpha / RANK * pair["lora_a"] @ pair["lora_b"]) for name, pair in lora.items()}


def difference(steps: int, **options: Any) -> float:
    """The largest relative difference of a layer's product, LoRA+ with lambda against LoRA with alpha x lambda."""
    with jax.enable_x64(True):
        plus = train(lora_plus_adamw(RATE, lr_ratio=LAMBDA, **options), steps)
        lora = train(lora_plus_adamw(RATE, lr_ratio=1.0, **options), steps, alpha=LAMBDA * RANK)
    return max(float(np.linalg.norm(lora[n] - plus[n]) / np.linalg.norm(plus[n])) for n in plus)


CASES = {
    "epsilon 1e-30": {"eps": 1e-30},
    "epsilon 1e-8": {"eps": 1e-8},
    "weight decay 0.1": {"eps": 1e-30, "weight_decay": 0.1},
    "clipped at 1e-3": {"eps": 1e-8, "max_grad_norm": 1e-3},
}


def main() -> None:
    options = parse_options(__doc__, steps=300)
    rows = [
        {"case": case, "relative difference": f"{difference(options.steps, **settings):.3g}"}
        for case, settings in CASES.items()
    ]
    report("paper/exactness", rows, steps=options.steps)


if __name__ == "__main__":
    main()
