"""What holds exactly: lambda = 1 is LoRA, lambda is a factor on alpha, and B's rate is lambda times A's.

    python benchmarks/paper/exactness.py

A chain of adapted layers learns random targets. With Adam (epsilon near 0), B = 0 at the start, and neither weight
decay nor clipping, LoRA+ with ratio lambda is LoRA with alpha x lambda: B' = B / lambda goes the same way. The last
rows show how far each of these conditions carries it. Lambda is 10: a power of two would be exact in any case.
"""

import sys
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from shared import Check, finish

from loraplus_jax import LoRAPlusDense, lora_plus_adamw, make_schedule

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


def trained(
    tx: Any, steps: int, alpha: float = float(RANK), dtype: Any = jnp.float64
) -> dict[str, np.ndarray]:
    """The factors' products s A B of every layer after some steps from the same start."""
    chain, keys = Chain(alpha), jax.random.split(jax.random.key(0), 3)
    x, y = (jax.random.normal(key, (POINTS, WIDTH), dtype) for key in keys[:2])
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


def apart(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The largest relative difference of two layers' products."""
    return max(float(np.linalg.norm(one[name] - other[name]) / np.linalg.norm(other[name])) for name in one)


def as_alpha(steps: int, **options: Any) -> float:
    """How far LoRA+ with ratio lambda and LoRA with alpha x lambda are apart."""
    plus = trained(lora_plus_adamw(RATE, lr_ratio=LAMBDA, **options), steps)
    return apart(trained(lora_plus_adamw(RATE, lr_ratio=1.0, **options), steps, alpha=LAMBDA * RANK), plus)


def unlike_lora(steps: int) -> float:
    """How many values differ, bit for bit, between lambda = 1 and optax's AdamW."""
    one = trained(lora_plus_adamw(RATE, lr_ratio=1.0, weight_decay=0.01), steps, dtype=jnp.float32)
    other = trained(optax.adamw(RATE, weight_decay=0.01), steps, dtype=jnp.float32)
    return float(sum(np.sum(one[name] != other[name]) for name in one))


def schedules(steps: int = 50) -> Iterator[tuple[str, optax.Schedule]]:
    """Every named schedule, with warm-up and a floor where it can have one."""
    for name in ("constant", "linear", "cosine", "wsd"):
        floor = {} if name == "constant" else {"final_fraction": 0.1}
        yield name, make_schedule(name, RATE, steps, warmup_steps=5, **floor)


def ratio_error(steps: int = 50) -> float:
    """The largest relative error of eta_B / eta_A over all steps after the first of all schedules."""
    errors = []
    for _, schedule in schedules(steps):
        rates = lora_plus_adamw(schedule, lr_ratio=LAMBDA).rates
        for step in range(1, steps + 5):
            a, b = (float(rates(step)[role][0]) for role in ("a", "b"))
            errors.append(abs(b / a / LAMBDA - 1))
    return max(errors)


def largest_step(adapters: int) -> float:
    """The largest first step of any B over lambda times the rate, with so many adapters."""
    lora = {f"layer_{n}": {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((2, 3))} for n in range(adapters)}
    tx = lora_plus_adamw(RATE, lr_ratio=LAMBDA)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, lora), tx.init(lora), lora)
    steps = {role: max(float(jnp.max(jnp.abs(u[f"lora_{role}"]))) for u in updates.values()) for role in "ab"}
    return max(steps["b"] / LAMBDA, steps["a"]) / RATE


def checks(steps: int = 300) -> dict[str, Check]:
    """All of it; float64 is switched on inside."""
    with jax.enable_x64(True):
        found = {
            "values that differ between lambda = 1 and optax.adamw": Check(unlike_lora(steps), 0, 0),
            "lambda as alpha, epsilon 1e-30": Check(as_alpha(steps, eps=1e-30), 0, 1e-9),
            "lambda as alpha, epsilon 1e-8": Check(as_alpha(steps, eps=1e-8), 0, 1e-2),
            "lambda as alpha, weight decay 0.1": Check(
                as_alpha(steps, eps=1e-30, weight_decay=0.1), 1e-3, np.inf
            ),
            "lambda as alpha, clipped at 1e-3": Check(
                as_alpha(steps, eps=1e-8, max_grad_norm=1e-3), 1e-3, np.inf
            ),
        }
    found["relative error of eta_B / eta_A over every schedule"] = Check(ratio_error(), 0, 1e-6)
    for adapters in (1, 24, 500):
        found[f"largest step over its rate, {adapters} adapters"] = Check(largest_step(adapters), 0, 1 + 1e-5)
    return found


def main() -> int:
    found = checks()
    rows = [
        {"what": name, "found": f"{check.found:.3g}", "passed": check.passed} for name, check in found.items()
    ]
    return finish("exactness", rows, found)


if __name__ == "__main__":
    sys.exit(main())
