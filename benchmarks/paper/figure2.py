"""Figure 2 of arXiv 2402.12354, again: the loss over a grid of eta_A and eta_B in a toy model.

    python benchmarks/paper/figure2.py

f(x) = W_out relu(B A relu(W_in x)) of width 100 and rank 4 learns sin(mean x) in 5 dimensions, from 1,000 points by
gradient descent on the mean square, A and B alone: W_in ~ N(0, 1), W_out ~ N(0, 1/n), A ~ N(0, 1/n), B ~ N(0, 1). A
17 x 17 grid of rates from 1e-4 to 21.5, the mean over 3 seeds, after 10 and after 200 steps.
"""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from shared import Check, figure, finish, save

from loraplus_jax import LoRAPlusDense, lora_plus

RATES = tuple(1e-4 * 10 ** (k / 3) for k in range(17))
DIMENSIONS, WIDTH, RANK = 5, 100, 4
LAYER = LoRAPlusDense(WIDTH, use_bias=False, rank=RANK, alpha=float(RANK))


def draw(seed: jax.Array, points: int) -> tuple[dict[str, Any], Any, Any]:
    """Factors, fixed weights, and data `(x, y)` of 1.1 times as many points, the last tenth to test on."""
    keys = jax.random.split(jax.random.key(seed), 5)
    normal = jax.random.normal
    lora = {
        "lora_a": normal(keys[0], (WIDTH, RANK)) / WIDTH**0.5,
        "lora_b": normal(keys[1], (RANK, WIDTH)),
    }
    fixed = normal(keys[2], (DIMENSIONS, WIDTH)), normal(keys[3], (WIDTH, 1)) / WIDTH**0.5
    x = normal(keys[4], (points + points // 10, DIMENSIONS))
    return lora, fixed, (x, jnp.sin(x.mean(axis=1, keepdims=True)))


def loss(lora: Any, fixed: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    inner, outer = fixed
    # There is no pretrained weight in this model: the base of the layer is zero.
    variables = {"params": {"kernel": jnp.zeros((WIDTH, WIDTH))}, "lora": lora}
    hidden: Any = LAYER.apply(variables, jax.nn.relu(x @ inner))
    return jnp.mean((jax.nn.relu(hidden) @ outer - y) ** 2)


def trained(
    seed: jax.Array, rate_a: jax.Array, rate_b: jax.Array, steps: tuple[int, ...], points: int
) -> jax.Array:
    """Train and test loss after each of the numbers of steps: `(len(steps), 2)`."""
    lora, fixed, (x, y) = draw(seed, points)
    tx = lora_plus(optax.sgd(rate_a), lr_ratio=rate_b / rate_a)
    descend = jax.grad(lambda lora: loss(lora, fixed, x[:points], y[:points]))

    def step(_: Any, carry: Any) -> Any:
        lora, state = carry
        updates, state = tx.update(descend(lora), state, lora)
        return optax.apply_updates(lora, updates), state

    found, done, carry = [], 0, (lora, tx.init(lora))
    for count in steps:
        carry = jax.lax.fori_loop(done, count, step, carry)
        done = count
        parts = (slice(None, points), slice(points, None))
        found.append(jnp.stack([loss(carry[0], fixed, x[part], y[part]) for part in parts]))
    return jnp.stack(found)


def grid(
    rates: tuple[float, ...], steps: tuple[int, ...], seeds: int, points: int
) -> dict[int, dict[str, np.ndarray]]:
    """Steps to `"train"` and `"test"` loss over the grid `(eta_A, eta_B)`, the mean over seeds; infinite if diverged."""
    run = functools.partial(trained, steps=steps, points=points)
    cells = [(s, a, b) for s in range(seeds) for a in rates for b in rates]
    columns = [jnp.array([cell[n] for cell in cells]) for n in range(3)]
    found = jax.jit(lambda *cells: jax.lax.map(lambda c: run(*c), cells, batch_size=len(rates)))(*columns)
    values = np.asarray(found).reshape(seeds, len(rates), len(rates), len(steps), 2)
    means = np.where(np.isfinite(values), values, np.inf).mean(axis=0)
    names = ("train", "test")
    return {count: {name: means[..., n, k] for k, name in enumerate(names)} for n, count in enumerate(steps)}


def optimum(losses: np.ndarray, rates: tuple[float, ...]) -> dict[str, float]:
    """The best cell and the best on the diagonal, where both rates are the same."""
    a, b = np.unravel_index(np.argmin(losses), losses.shape)
    equal = int(np.argmin(np.diag(losses)))
    best, alone = losses[a, b], losses[equal, equal]
    return {
        "eta_A": rates[a],
        "eta_B": rates[b],
        "loss": float(best),
        "equal rates": rates[equal],
        "their loss": float(alone),
        "gap": float(alone / best - 1),
    }


def checks(found: dict[int, dict[str, float]]) -> dict[str, Check]:
    """The ranges: the optimum off the diagonal, above it, and worth it."""
    early, late = found
    result = {}
    for count, best in found.items():
        result[f"best equal rate, step {count}"] = Check(best["equal rates"], 0.99e-2, 4.65e-2)
        result[f"eta_B / eta_A of the best, step {count}"] = Check(best["eta_B"] / best["eta_A"], 2.0, np.inf)
    result[f"gap, step {early}"] = Check(found[early]["gap"], 0.5, np.inf)
    result[f"gap, step {late}"] = Check(found[late]["gap"], 0.05, np.inf)
    return result


def picture(losses: dict[int, dict[str, np.ndarray]], found: dict[int, dict[str, float]]) -> None:
    drawn, axes = figure(len(losses))
    for place, (count, values) in zip(axes, losses.items(), strict=True):
        shown = np.log10(np.clip(values["train"], None, 10 * np.median(values["train"].min(axis=0))))
        image = place.pcolormesh(RATES, RATES, shown, cmap="viridis_r")
        place.plot(RATES, RATES, "w--", linewidth=1, label="equal rates")
        best = found[count]
        place.plot(best["eta_B"], best["eta_A"], "r*", markersize=14, label="best")
        place.plot(best["equal rates"], best["equal rates"], "wo", label="best equal rates")
        place.set(xscale="log", yscale="log", xlabel="eta_B", ylabel="eta_A", title=f"step {count}")
        drawn.colorbar(image, ax=place, label="log10 of the training loss")
    axes[0].legend(loc="lower left", framealpha=0.6)
    save(drawn, "figure2")


def main() -> int:
    losses = grid(RATES, (10, 200), seeds=3, points=1000)
    rows = [
        {"step": count, "split": split} | {k: f"{v:.3g}" for k, v in optimum(values, RATES).items()}
        for count, parts in losses.items()
        for split, values in parts.items()
    ]
    found = {count: optimum(parts["train"], RATES) for count, parts in losses.items()}
    picture(losses, found)
    kept = {str(count): {name: v.tolist() for name, v in parts.items()} for count, parts in losses.items()}
    return finish("figure2", rows, checks(found), rates=RATES, losses=kept)


if __name__ == "__main__":
    sys.exit(main())
