"""What arXiv 2402.12354 says of rates and widths, in toy models; and when LoRA+ is LoRA with a larger alpha.

    python benchmarks/paper.py coordinate_check          # docs/choosing_lambda.md has what all measured
    python benchmarks/paper.py best_rate
    python benchmarks/paper.py figure2                   # also draws docs/figure2.png
    python benchmarks/paper.py exactness
    python benchmarks/paper.py alpha_on_data --data DATA

Each writes results/paper/NAME.json.

coordinate_check  slopes of delta1, delta2, Z_A and Z_B on the width: one layer, f(x) = v . tanh(B A Z) / n with Z =
  relu(W_in x), the third step of Adam with epsilon 1e-15; W_in and v ~ N(0, 1). Init[1] draws A ~ N(0, 1/n) with B
  = 0, Init[2] draws B ~ N(0, 1/r) with A = 0. A slope of 0 means that a term neither vanishes nor explodes with the
  width: only eta_A = c/n with a constant eta_B has that in all four, for both inits (section 4).
best_rate  how the best single rate of A and B moves with the width: f(x) = v . relu((W + A B) relu(W_in x)) / n^p,
  40 steps of Adam; W ~ N(0, 1/n), W_in and v ~ N(0, 1), A ~ N(0, 1/n), B = 0. Theory has it fall as n^-1/2 for p =
  1 and n^-3/4 for p = 1/2, since A asks for 1/n and B for a constant.
figure2  the loss over a 17 x 17 grid of eta_A and eta_B after 10 and 200 steps of gradient descent: f(x) = W_out
  relu(B A relu(W_in x)) of width 100; W_in ~ N(0, 1), W_out and A ~ N(0, 1/n), B ~ N(0, 1); means over 3 draws of
  A and B. Where the optimum lies depends much on the rest, of which there are 5 draws.
exactness  LoRA+ with ratio lambda against LoRA with alpha x lambda: a chain of adapted layers in float64. With
  Adam, epsilon near 0, B = 0 at the start, no decay and no clipping, B' = B / lambda goes the same way. Lambda is
  10: a power of two would be exact in any case.
alpha_on_data  the same for MiniLM on CoLA in float32, in the losses of all steps. DATA holds `glue`.

Factors have rank 4, inputs 5 dimensions, targets are sin(mean x).
"""

import functools
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import arguments, parse_options, report

from loraplus_jax import LoRAPlusDense, lora_plus, lora_plus_adamw
from loraplus_jax.adapter.lora import low_rank_output
from loraplus_jax.adapter.taps import TERMS, update_squares
from loraplus_jax.training.metrics_log import pyplot, save_figure

DIMENSIONS, RANK = 5, 4


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """Of log value on log width, by least squares.

    >>> round(slope([1, 10, 100], [2.0, 0.2, 0.02]), 6)
    -1.0
    """
    return float(np.polyfit(np.log(widths), np.log(values), 1)[0])


def plain(values: np.ndarray) -> list[Any]:
    """Nested lists for JSON, which has no infinity: None stands for it."""
    return np.where(np.isfinite(values), values, None).tolist()


def descend(loss: Any, tx: Any, lora: Any, steps: int, state: Any = None) -> tuple[Any, Any]:
    """Factors and the optimizer's state after so many steps on all points."""

    def step(_: Any, carry: Any) -> Any:
        lora, state = carry
        updates, state = tx.update(jax.grad(loss)(lora), state, lora)
        return optax.apply_updates(lora, updates), state

    return jax.lax.fori_loop(0, steps, step, (lora, tx.init(lora) if state is None else state))


class Setting(NamedTuple):
    """An init, how the rates follow the width, and the slopes that theory gives to `SHOWN`."""

    init: int
    label: str
    rate_a: Any
    rate_b: Any
    slopes: tuple[float, float, float, float]


SHOWN = ("delta1", "delta2", "z_a", "z_b")
SETTINGS = (
    Setting(1, "eta_A = 1/n, eta_B = .1", lambda n: 1 / n, lambda n: 0.1, (0, 0, 0, 0)),
    Setting(1, "eta = .3/sqrt(n)", lambda n: 0.3 * n**-0.5, lambda n: 0.3 * n**-0.5, (0, 0, 0.5, 0)),
    Setting(1, "eta = 1/n", lambda n: 1 / n, lambda n: 1 / n, (-1, -1, 0, -1)),
    Setting(2, "eta_A = 1/n, eta_B = .1", lambda n: 1 / n, lambda n: 0.1, (0, 0, 0, 0)),
    Setting(2, "eta = 1/n", lambda n: 1 / n, lambda n: 1 / n, (0, -1, 0, 0)),
    Setting(2, "eta = .3/sqrt(n)", lambda n: 0.3 * n**-0.5, lambda n: 0.3 * n**-0.5, (0.5, 0, 0.5, 0.5)),
)


def terms(width: int, init: int, rate_a: float, rate_b: float, seed: int) -> np.ndarray:
    """Root mean squares of `TERMS` at the third step."""
    keys = jax.random.split(jax.random.key(seed), 4)
    x = jax.random.normal(keys[0], (16, DIMENSIONS))
    z = jax.nn.relu(x @ jax.random.normal(keys[1], (DIMENSIONS, width)))
    v, y = jax.random.normal(keys[2], (width,)), jnp.sin(x.mean(axis=1))
    a = jax.random.normal(keys[3], (width, RANK)) / width**0.5
    b = jax.random.normal(keys[3], (RANK, width)) / RANK**0.5
    first = {"lora_a": a if init == 1 else jnp.zeros_like(a), "lora_b": b if init == 2 else jnp.zeros_like(b)}

    def loss(lora: Any) -> jax.Array:
        out = jnp.tanh(low_rank_output(z, lora["lora_a"], lora["lora_b"], 1.0)) @ v
        return jnp.mean((out / width - y) ** 2)

    tx = lora_plus_adamw(rate_a, lr_ratio=rate_b / rate_a, eps=1e-15)
    before, state = descend(loss, tx, first, 2)
    after, _ = descend(loss, tx, before, 1, state)
    old, new = ((tree["lora_a"], tree["lora_b"]) for tree in (before, after))
    return np.sqrt(np.asarray(update_squares(low_rank_output, z, old, new, 1.0))[: len(TERMS)])


def measure_terms(setting: Setting, widths: Sequence[int], seeds: int = 3) -> dict[str, list[float]]:
    """Term to its values at the widths: the geometric mean over seeds."""
    found = []
    for n in widths:
        rates = setting.rate_a(n), setting.rate_b(n)
        logs = [np.log(terms(n, setting.init, *rates, seed)) for seed in range(seeds)]
        found.append(np.exp(np.mean(logs, axis=0)))
    return {name: [float(values[k]) for values in found] for k, name in enumerate(TERMS)}


def coordinate_check(_: Any) -> None:
    rows, kept, widths = [], {}, (256, 512, 1024, 2048, 4096)
    for setting in SETTINGS:
        values = kept[f"Init[{setting.init}], {setting.label}"] = measure_terms(setting, widths)
        row = {"init": setting.init, "rates": setting.label}
        for name, theory in zip(SHOWN, setting.slopes, strict=True):
            row[f"{name} (theory)"] = f"{slope(widths, values[name]):+.2f} ({theory:g})"
        rows.append(row)
    report("paper/coordinate_check", rows, unprinted={"widths": widths, "terms": kept})


RATES = tuple(10 ** (-4 + k / 8) for k in range(33))
POWERS = {"1/n": (1.0, -0.5), "1/sqrt(n)": (0.5, -0.75)}


def final_losses(width: int, power: float, seed: int) -> np.ndarray:
    """The training loss after the last step for every rate; infinite where it diverged."""
    keys = jax.random.split(jax.random.key(seed), 5)
    x = jax.random.normal(keys[0], (128, DIMENSIONS))
    y = jnp.sin(x.mean(axis=1))
    z = jax.nn.relu(x @ jax.random.normal(keys[1], (DIMENSIONS, width)))
    base = z @ jax.random.normal(keys[2], (width, width)) / width**0.5  # frozen, so computed once
    v = jax.random.normal(keys[3], (width,))
    a = jax.random.normal(keys[4], (width, RANK)) / width**0.5
    first = {"lora_a": a, "lora_b": jnp.zeros((RANK, width))}

    def loss(lora: Any) -> jax.Array:
        hidden = jax.nn.relu(base + low_rank_output(z, lora["lora_a"], lora["lora_b"], 1.0))
        return jnp.mean((hidden @ v / width**power - y) ** 2)

    def final(rate: jax.Array) -> jax.Array:
        return loss(descend(loss, lora_plus_adamw(rate, lr_ratio=1.0), first, 40)[0])

    found = np.asarray(jax.jit(lambda rates: jax.lax.map(final, rates))(jnp.array(RATES)))
    return np.where(np.isfinite(found), found, np.inf)


def lowest_rate(losses: np.ndarray) -> float:
    """Where a parabola through the best grid point and its neighbours, in logarithms, is lowest."""
    n = int(np.clip(np.argmin(losses), 1, len(RATES) - 2))
    near = slice(n - 1, n + 2)
    if not np.all(np.isfinite(losses[near])):
        return RATES[n]
    a, b, _ = np.polyfit(np.log(RATES[near]), np.log(losses[near]), 2)
    return float(np.exp(-b / (2 * a))) if a > 0 else RATES[n]


def best_rate(_: Any) -> None:
    rows, kept, widths = [], {}, (64, 128, 256, 512, 1024, 2048, 4096)
    for name, (power, theory) in POWERS.items():
        losses = [np.mean([final_losses(n, power, seed) for seed in range(3)], axis=0) for n in widths]
        rates = [lowest_rate(values) for values in losses]
        row = {"readout": name, **{f"n = {n}": f"{r:.3g}" for n, r in zip(widths, rates, strict=True)}}
        rows.append({**row, "slope": f"{slope(widths, rates):.2f}", "theory": theory})
        kept[name] = {str(n): plain(values) for n, values in zip(widths, losses, strict=True)}
    report("paper/best_rate", rows, unprinted={"rates": RATES, "losses": kept})


GRID = tuple(1e-4 * 10 ** (k / 3) for k in range(17))
WIDTH = 100
LAYER = LoRAPlusDense(WIDTH, use_bias=False, rank=RANK, alpha=float(RANK))


def grid_losses(cell: Any, steps: Sequence[int], points: int) -> jax.Array:
    """Train and test loss of `(world, seed, eta_A, eta_B)` after each number of steps: `(len(steps), 2)`."""
    world, seed, rate_a, rate_b = cell
    key, normal = jax.random.key(world), jax.random.normal
    keys = (*jax.random.split(jax.random.fold_in(key, seed + 1)), *jax.random.split(key, 3))
    lora = {"lora_a": normal(keys[0], (WIDTH, RANK)) / WIDTH**0.5, "lora_b": normal(keys[1], (RANK, WIDTH))}
    inner, outer = normal(keys[2], (DIMENSIONS, WIDTH)), normal(keys[3], (WIDTH, 1)) / WIDTH**0.5
    x = normal(keys[4], (points + points // 10, DIMENSIONS))  # a tenth more, for the test
    y = jnp.sin(x.mean(axis=1, keepdims=True))

    def loss(lora: Any, part: slice) -> jax.Array:
        # There is no pretrained weight in this model: the base of the layer is zero.
        variables = {"params": {"kernel": jnp.zeros((WIDTH, WIDTH))}, "lora": lora}
        hidden: Any = LAYER.apply(variables, jax.nn.relu(x[part] @ inner))
        return jnp.mean((jax.nn.relu(hidden) @ outer - y[part]) ** 2) / 2

    tx = lora_plus(optax.sgd(rate_a), lr_ratio=rate_b / rate_a)
    found, done, state = [], 0, tx.init(lora)
    for count in steps:
        lora, state = descend(lambda lora: loss(lora, slice(points)), tx, lora, count - done, state)
        done = count
        found.append(jnp.stack([loss(lora, slice(points)), loss(lora, slice(points, None))]))
    return jnp.stack(found)


def grid(
    rates: Sequence[float], steps: Sequence[int], *, worlds: int, seeds: int, points: int
) -> dict[int, dict[str, np.ndarray]]:
    """Steps to `"train"` and `"test"` loss over `(world, eta_A, eta_B)`; infinite if a seed diverged."""
    run = functools.partial(grid_losses, steps=steps, points=points)
    cells = list(itertools.product(range(worlds), range(seeds), rates, rates))
    columns = [jnp.array(column) for column in zip(*cells, strict=True)]
    found = jax.jit(lambda cells: jax.lax.map(run, cells, batch_size=len(rates)))(columns)
    values = np.asarray(found).reshape(worlds, seeds, len(rates), len(rates), len(steps), 2)
    means = np.where(np.isfinite(values), values, np.inf).mean(axis=1)
    return {count: {"train": means[..., n, 0], "test": means[..., n, 1]} for n, count in enumerate(steps)}


def optimum(losses: np.ndarray, rates: Sequence[float]) -> dict[str, float]:
    """The best cell and the best on the diagonal, where both rates are the same."""
    a, b = np.unravel_index(np.argmin(losses), losses.shape)
    equal = int(np.argmin(np.diag(losses)))
    best, alone = float(losses[a, b]), float(losses[equal, equal])
    found = {"eta_A": rates[a], "eta_B": rates[b], "loss": best, "equal rates": rates[equal]}
    return found | {"their loss": alone, "gap": alone / best - 1}


def draw_grid(losses: dict[int, dict[str, np.ndarray]]) -> None:
    """The median over worlds of how far a cell's training loss lies above its world's best."""
    figure = pyplot().figure(figsize=(10, 4), layout="constrained")
    for axes, (count, values) in zip(figure.subplots(1, len(losses)), losses.items(), strict=True):
        above = values["train"] / values["train"].min(axis=(1, 2), keepdims=True)
        shown = np.log10(np.clip(np.median(above, axis=0), 1, 30))
        image = axes.pcolormesh(GRID, GRID, shown, cmap="viridis_r")
        axes.plot(GRID, GRID, "w--", linewidth=1, label="equal rates")
        best = [optimum(one, GRID) for one in values["train"]]
        stars = [o["eta_B"] for o in best], [o["eta_A"] for o in best]
        axes.plot(*stars, "r*", markersize=14, label="best of a draw")
        equal = [o["equal rates"] for o in best]
        axes.plot(equal, equal, "wo", label="best equal rates")
        axes.set(xscale="log", yscale="log", xlabel="eta_B", ylabel="eta_A", title=f"step {count}")
        axes.legend(loc="lower left", framealpha=0.6)
        figure.colorbar(image, ax=axes, label="log10 of training loss over the best")
    save_figure(figure, Path(__file__).parents[1] / "docs/figure2.png")


def figure2(_: Any) -> None:
    losses = grid(GRID, (10, 200), worlds=5, seeds=3, points=1000)
    rows = [
        {"step": count, "split": split, "draw": n} | {k: f"{v:.3g}" for k, v in optimum(one, GRID).items()}
        for count, parts in losses.items()
        for split, values in parts.items()
        for n, one in enumerate(values)
    ]
    draw_grid(losses)
    kept = {
        str(count): {name: plain(np.round(np.log10(values), 3)) for name, values in parts.items()}
        for count, parts in losses.items()
    }
    report("paper/figure2", rows, unprinted={"rates": GRID, "log10_losses": kept})


class Chain(nn.Module):
    """Adapted layers with tanh between them."""

    alpha: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        options: dict[str, Any] = {"rank": RANK, "init_factors": "he_uniform", "param_dtype": x.dtype}
        for n in range(2):
            x = jnp.tanh(LoRAPlusDense(24, alpha=self.alpha, name=f"layer_{n}", **options)(x))
        return x


LAMBDA = 10.0
EXACT = {
    "epsilon 1e-30": {"eps": 1e-30},
    "epsilon 1e-8": {"eps": 1e-8},
    "weight decay 0.1": {"eps": 1e-30, "weight_decay": 0.1},
    "clipped at 1e-3": {"eps": 1e-8, "max_grad_norm": 1e-3},
}


def chain_products(steps: int, lr_ratio: float, alpha: float, **options: Any) -> dict[str, np.ndarray]:
    """The factors' products s A B of every layer after some steps from the same start."""
    chain, keys = Chain(alpha), jax.random.split(jax.random.key(0), 3)
    x, y = (jax.random.normal(key, (32, 24), jnp.float64) for key in keys[:2])
    variables = chain.init(keys[2], x)

    def loss(lora: Any) -> jax.Array:
        return jnp.mean((chain.apply({"params": variables["params"], "lora": lora}, x) - y) ** 2)  # type: ignore[operator]

    tx = lora_plus_adamw(1e-3, lr_ratio=lr_ratio, **options)
    lora, _ = jax.jit(lambda lora: descend(loss, tx, lora, steps))(variables["lora"])
    return {name: np.asarray(alpha / RANK * pair["lora_a"] @ pair["lora_b"]) for name, pair in lora.items()}


def exactness(options: Any) -> None:
    rows = []
    for case, settings in EXACT.items():
        # LoRA+ with lambda against LoRA with alpha x lambda.
        with jax.enable_x64(True):
            plus = chain_products(options.steps, LAMBDA, RANK, **settings)
            lora = chain_products(options.steps, 1.0, LAMBDA * RANK, **settings)
        largest = max(np.linalg.norm(lora[n] - plus[n]) / np.linalg.norm(plus[n]) for n in plus)
        rows.append({"case": case, "relative difference": f"{largest:.3g}"})
    report("paper/exactness", rows, steps=options.steps)


PLAIN = {"optimizer.weight_decay": 0.0, "optimizer.max_grad_norm": None, "optimizer.eps": 1e-30}
ON_DATA: dict[str, tuple[float, dict[str, Any]]] = {
    "no decay, no clipping, epsilon 1e-30": (4, PLAIN),
    "the same, lambda no power of two": (10, PLAIN),
    "epsilon 1e-8": (4, PLAIN | {"optimizer.eps": 1e-8}),
    "gradients' norm clipped at 1": (4, PLAIN | {"optimizer.max_grad_norm": 1.0}),
    "weight decay 0.1": (4, PLAIN | {"optimizer.weight_decay": 0.1}),
    "A zero at the start": (4, PLAIN | {"lora.init": "lora_b"}),
}
COLA = {
    "data.path": "glue/cola",
    "data.max_length": 64,
    "data.validation_fraction": 0.05,
    "lora.init": "lora",
    "optimizer.learning_rate": 2.5e-4,
    "optimizer.head_learning_rate": 2.5e-4,
    "optimizer.warmup_steps": 20,
    "train.batch_size": 32,
    "train.eval_batch_size": 64,
    "train.log_every": 1,
    "train.select": "last",
}


def losses_of_run(options: Any, settings: dict[str, Any]) -> np.ndarray:
    """The loss of each step of `loraplus train`."""
    with tempfile.TemporaryDirectory() as out:
        own = {"data.root": Path(options.data).resolve() / "glue", "output_dir": out}
        own |= {"train.steps": options.steps, "train.eval_every": options.steps}
        command = [sys.executable, "-m", "loraplus_jax.cli", "train", "quickstart"]
        subprocess.run(
            [*command, *arguments({**COLA, **own, **settings})], check=True, stdout=subprocess.DEVNULL
        )
        rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return np.array([row["loss"] for row in rows if "loss" in row])


def alpha_on_data(options: Any) -> None:
    rows = []
    for case, (ratio, settings) in ON_DATA.items():
        plus = losses_of_run(
            options, settings | {"method": "lora_plus", "lora.lr_ratio": ratio, "lora.alpha": 16.0}
        )
        lora = losses_of_run(options, settings | {"method": "lora", "lora.alpha": 16.0 * ratio})
        largest = f"{np.max(np.abs(plus - lora)):.3g}"
        row = {"case": case, "lambda": ratio, "loss of the last step, LoRA+": float(plus[-1])}
        rows.append(row | {"loss of the last step, LoRA": float(lora[-1]), "largest difference": largest})
        print(rows[-1], flush=True)
    report("paper/alpha_on_data", rows, steps=options.steps, rate=COLA["optimizer.learning_rate"])


FIGURES = {f.__name__: f for f in (coordinate_check, best_rate, figure2, exactness, alpha_on_data)}


def main() -> None:
    options = parse_options(__doc__, what=list(FIGURES), data="data", steps=300)
    FIGURES[options.what](options)


if __name__ == "__main__":
    main()
