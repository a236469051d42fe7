"""How the best single rate of LoRA moves with the width (arXiv 2402.12354, section 4).

    python benchmarks/paper/best_rate.py

f(x) = v . relu((W + A B) relu(W_in x)) / n^p learns sin(mean x) in 5 dimensions, from 128 points in 40 steps of
Adam on A and B alone, both with the same rate; W ~ N(0, 1/n), W_in and v ~ N(0, 1), A ~ N(0, 1/n), B = 0, rank 4.
The readout n^-1 or n^-1/2 sets how large a change of the features is needed. With one rate for both, theory has the
best one fall as n^-1/2 for p = 1 and n^-3/4 for p = 1/2, since A asks for 1/n and B for a constant.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from shared import parse_options, plain, report, slope

from loraplus_jax import lora_plus_adamw
from loraplus_jax.adapter.lora import low_rank_output

WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096)
POWERS = {"1/n": (1.0, -0.5), "1/sqrt(n)": (0.5, -0.75)}
RATES = tuple(10 ** (-4 + k / 8) for k in range(33))
DIMENSIONS, RANK = 5, 4


def final_losses(
    width: int, power: float, rates: tuple[float, ...], seed: int, steps: int, points: int
) -> np.ndarray:
    """The training loss after the last step for every rate; infinite where it diverged."""
    keys = jax.random.split(jax.random.key(seed), 5)
    x = jax.random.normal(keys[0], (points, DIMENSIONS))
    y = jnp.sin(x.mean(axis=1))
    z = jax.nn.relu(x @ jax.random.normal(keys[1], (DIMENSIONS, width)))
    base = z @ jax.random.normal(keys[2], (width, width)) / width**0.5  # frozen, so computed once
    v = jax.random.normal(keys[3], (width,))
    first = {
        "lora_a": jax.random.normal(keys[4], (width, RANK)) / width**0.5,
        "lora_b": jnp.zeros((RANK, width)),
    }

    def loss(lora: Any) -> jax.Array:
        hidden = jax.nn.relu(base + low_rank_output(z, lora["lora_a"], lora["lora_b"], 1.0))
        return jnp.mean((hidden @ v / width**power - y) ** 2)

    def final(rate: jax.Array) -> jax.Array:
        tx = lora_plus_adamw(rate, lr_ratio=1.0)

        def step(_: Any, carry: Any) -> Any:
            lora, state = carry
            updates, state = tx.update(jax.grad(loss)(lora), state, lora)
            return optax.apply_updates(lora, updates), state

        return loss(jax.lax.fori_loop(0, steps, step, (first, tx.init(first)))[0])

    found = np.asarray(jax.jit(lambda rates: jax.lax.map(final, rates))(jnp.array(rates)))
    return np.where(np.isfinite(found), found, np.inf)


def best_rate(losses: np.ndarray, rates: tuple[float, ...]) -> float:
    """Where a parabola through the best grid point and its neighbours, in logarithms, is lowest."""
    n = int(np.clip(np.argmin(losses), 1, len(rates) - 2))
    near = slice(n - 1, n + 2)
    if not np.all(np.isfinite(losses[near])):
        return rates[n]
    a, b, _ = np.polyfit(np.log(rates[near]), np.log(losses[near]), 2)
    return float(np.exp(-b / (2 * a))) if a > 0 else rates[n]


def best_rates(
    power: float, widths: tuple[int, ...], seeds: int = 3, steps: int = 40, points: int = 128
) -> tuple[list[float], list[np.ndarray]]:
    """For every width the best rate for the mean loss over seeds, and these losses."""
    losses = [
        np.mean([final_losses(n, power, RATES, seed, steps, points) for seed in range(seeds)], axis=0)
        for n in widths
    ]
    return [best_rate(values, RATES) for values in losses], losses


def main() -> None:
    parse_options(__doc__)
    rows, kept = [], {}
    for name, (power, theory) in POWERS.items():
        rates, losses = best_rates(power, WIDTHS)
        row = {"readout": name, **{f"n = {n}": f"{r:.3g}" for n, r in zip(WIDTHS, rates, strict=True)}}
        rows.append({**row, "slope": f"{slope(WIDTHS, rates):.2f}", "theory": theory})
        kept[name] = {str(n): plain(values) for n, values in zip(WIDTHS, losses, strict=True)}
    report("paper/best_rate", rows, unprinted={"rates": RATES, "losses": kept})


if __name__ == "__main__":
    main()
