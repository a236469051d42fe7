"""Figure 2 of arXiv 2402.12354, again: the loss over a grid of eta_A and eta_B in a toy model.

    python benchmarks/paper/figure2.py

f(x) = W_out relu(B A relu(W_in x)) of width 100 and rank 4 learns sin(mean x) in 5 dimensions, from 1,000 points by
gradient descent on half the mean square, A and B alone: W_in ~ N(0, 1), W_out ~ N(0, 1/n), A ~ N(0, 1/n),
B ~ N(0, 1). A 17 x 17 grid of rates from 1e-4 to 21.5, the mean over 3 draws of A and B, after 10 and 200 steps.

Where the optimum lies, and how much better it is than the best equal rates, depends much on W_in, W_out and the
points: so there are 5 draws of these, and the table has them all. Writes docs/figure2.png.
"""

import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from shared import parse_options, plain, report

from loraplus_jax import LoRAPlusDense, lora_plus
from loraplus_jax.training.metrics_log import pyplot, save_figure

RATES = tuple(1e-4 * 10 ** (k / 3) for k in range(17))
DIMENSIONS, WIDTH, RANK = 5, 100, 4
LAYER = LoRAPlusDense(WIDTH, use_bias=False, rank=RANK, alpha=float(RANK))


def draw(world: jax.Array, seed: jax.Array, points: int) -> tuple[dict[str, Any], Any, Any]:
    """Factors by seed; by world fixed weights, and data `(x, y)`: a tenth more points, which are for the test."""
    key, normal = jax.random.key(world), jax.random.normal
    keys = (*jax.random.split(jax.random.fold_in(key, seed + 1)), *jax.random.split(key, 3))
    lora = {"lora_a": normal(keys[0], (WIDTH, RANK)) / WIDTH**0.5, "lora_b": normal(keys[1], (RANK, WIDTH))}
    fixed = normal(keys[2], (DIMENSIONS, WIDTH)), normal(keys[3], (WIDTH, 1)) / WIDTH**0.5
    x = normal(keys[4], (points + points // 10, DIMENSIONS))
    return lora, fixed, (x, jnp.sin(x.mean(axis=1, keepdims=True)))


def loss(lora: Any, fixed: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    inner, outer = fixed
    # There is no pretrained weight in this model: the base of the layer is zero.
    variables = {"params": {"kernel": jnp.zeros((WIDTH, WIDTH))}, "lora": lora}
    hidden: Any = LAYER.apply(variables, jax.nn.relu(x @ inner))
    return jnp.mean((jax.nn.relu(hidden) @ outer - y) ** 2) / 2


def train(cell: Any, steps: tuple[int, ...], points: int) -> jax.Array:
    """Train and test loss of `(world, seed, eta_A, eta_B)` after each number of steps: `(len(steps), 2)`."""
    world, seed, rate_a, rate_b = cell
    lora, fixed, (x, y) = draw(world, seed, points)
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
    rates: tuple[float, ...], steps: tuple[int, ...], *, worlds: int, seeds: int, points: int
) -> dict[int, dict[str, np.ndarray]]:
    """Steps to `"train"` and `"test"` loss over `(world, eta_A, eta_B)`; infinite if a seed diverged."""
    run = functools.partial(train, steps=steps, points=points)
    cells = list(itertools.product(range(worlds), range(seeds), rates, rates))
    columns = [jnp.array(column) for column in zip(*cells, strict=True)]
    found = jax.jit(lambda cells: jax.lax.map(run, cells, batch_size=len(rates)))(columns)
    values = np.asarray(found).reshape(worlds, seeds, len(rates), len(rates), len(steps), 2)
    means = np.where(np.isfinite(values), values, np.inf).mean(axis=1)
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


def draw_figure(losses: dict[int, dict[str, np.ndarray]]) -> None:
    """The median over worlds of how far a cell's training loss lies above its world's best."""
    figure = pyplot().figure(figsize=(10, 4), layout="constrained")
    for axes, (count, values) in zip(figure.subplots(1, len(losses)), losses.items(), strict=True):
        above = values["train"] / values["train"].min(axis=(1, 2), keepdims=True)
        shown = np.log10(np.clip(np.median(above, axis=0), 1, 30))
        image = axes.pcolormesh(RATES, RATES, shown, cmap="viridis_r")
        axes.plot(RATES, RATES, "w--", linewidth=1, label="equal rates")
        best = [optimum(one, RATES) for one in values["train"]]
        stars = [o["eta_B"] for o in best], [o["eta_A"] for o in best]
        axes.plot(*stars, "r*", markersize=14, label="best of a draw")
        equal = [o["equal rates"] for o in best]
        axes.plot(equal, equal, "wo", label="best equal rates")
        axes.set(xscale="log", yscale="log", xlabel="eta_B", ylabel="eta_A", title=f"step {count}")
        axes.legend(loc="lower left", framealpha=0.6)
        figure.colorbar(image, ax=axes, label="log10 of training loss over the best")
    save_figure(figure, Path(__file__).parents[2] / "docs/figure2.png")


def main() -> None:
    parse_options(__doc__)
    losses = grid(RATES, (10, 200), worlds=5, seeds=3, points=1000)
    rows = [
        {"step": count, "split": split, "draw": n} | {k: f"{v:.3g}" for k, v in optimum(one, RATES).items()}
        for count, parts in losses.items()
        for split, values in parts.items()
        for n, one in enumerate(values)
    ]
    draw_figure(losses)
    kept = {
        str(count): {name: plain(np.round(np.log10(values), 3)) for name, values in parts.items()}
        for count, parts in losses.items()
    }
    report("paper/figure2", rows, unprinted={"rates": RATES, "log10_losses": kept})


if __name__ == "__main__":
    main()
