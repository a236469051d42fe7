"""Which rates make A's and B's steps count at any width: slopes of delta1, delta2, Z_A and Z_B on the width.

    python benchmarks/paper/coordinate_check.py

One n -> n layer of rank 4: f(x) = v . tanh(B A Z) / n with Z = relu(W_in x), 16 points in 5 dimensions, Adam with
epsilon 1e-15, the third step, 3 seeds; W_in and v ~ N(0, 1). Init[1] draws A ~ N(0, 1/n) with B = 0, Init[2] draws
B ~ N(0, 1/r) with A = 0. A slope of 0 means that a term neither vanishes nor explodes with the width: of the
settings here, only eta_A = c/n with a constant eta_B has that in all four, for both inits (arXiv 2402.12354,
section 4).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from shared import parse_options, report, slope

from loraplus_jax import lora_plus_adamw
from loraplus_jax.adapter.lora import low_rank_output
from loraplus_jax.adapter.taps import TERMS, update_squares

WIDTHS = (256, 512, 1024, 2048, 4096)
DIMENSIONS, POINTS, RANK, STEP = 5, 16, 4, 3
SHOWN = ("delta1", "delta2", "z_a", "z_b")


class Setting(NamedTuple):
    """An init, how the rates follow the width, and the slopes that theory gives to `SHOWN`."""

    init: int
    label: str
    rate_a: Any
    rate_b: Any
    slopes: tuple[float, float, float, float]


SETTINGS = (
    Setting(1, "eta_A = 1/n, eta_B = .1", lambda n: 1 / n, lambda n: 0.1, (0, 0, 0, 0)),
    Setting(1, "eta = .3/sqrt(n)", lambda n: 0.3 * n**-0.5, lambda n: 0.3 * n**-0.5, (0, 0, 0.5, 0)),
    Setting(1, "eta = 1/n", lambda n: 1 / n, lambda n: 1 / n, (-1, -1, 0, -1)),
    Setting(2, "eta_A = 1/n, eta_B = .1", lambda n: 1 / n, lambda n: 0.1, (0, 0, 0, 0)),
    Setting(2, "eta = 1/n", lambda n: 1 / n, lambda n: 1 / n, (0, -1, 0, 0)),
    Setting(2, "eta = .3/sqrt(n)", lambda n: 0.3 * n**-0.5, lambda n: 0.3 * n**-0.5, (0.5, 0, 0.5, 0.5)),
)


def terms(width: int, init: int, rate_a: float, rate_b: float, seed: int) -> np.ndarray:
    """Root mean squares of `TERMS` at the last of `STEP` steps."""
    keys = jax.random.split(jax.random.key(seed), 4)
    x = jax.random.normal(keys[0], (POINTS, DIMENSIONS))
    z = jax.nn.relu(x @ jax.random.normal(keys[1], (DIMENSIONS, width)))
    v, y = jax.random.normal(keys[2], (width,)), jnp.sin(x.mean(axis=1))
    a = jax.random.normal(keys[3], (width, RANK)) / width**0.5
    b = jax.random.normal(keys[3], (RANK, width)) / RANK**0.5
    lora = {"lora_a": a if init == 1 else jnp.zeros_like(a), "lora_b": b if init == 2 else jnp.zeros_like(b)}

    def loss(lora: Any) -> jax.Array:
        return jnp.mean(
            (jnp.tanh(low_rank_output(z, lora["lora_a"], lora["lora_b"], 1.0)) @ v / width - y) ** 2
        )

    tx = lora_plus_adamw(rate_a, lr_ratio=rate_b / rate_a, eps=1e-15)
    state, before = tx.init(lora), lora
    for _ in range(STEP):
        updates, state = tx.update(jax.grad(loss)(lora), state, lora)
        before, lora = lora, optax.apply_updates(lora, updates)
    old, new = ((tree["lora_a"], tree["lora_b"]) for tree in (before, lora))
    return np.sqrt(np.asarray(update_squares(low_rank_output, z, old, new, 1.0))[: len(TERMS)])


def measure(setting: Setting, widths: tuple[int, ...], seeds: int = 3) -> dict[str, list[float]]:
    """Term to its values at the widths: the geometric mean over seeds."""
    found = []
    for n in widths:
        rates = setting.rate_a(n), setting.rate_b(n)
        logs = [np.log(terms(n, setting.init, *rates, seed)) for seed in range(seeds)]
        found.append(np.exp(np.mean(logs, axis=0)))
    return {name: [float(values[k]) for values in found] for k, name in enumerate(TERMS)}


def main() -> None:
    parse_options(__doc__)
    rows, kept = [], {}
    for setting in SETTINGS:
        values = kept[f"Init[{setting.init}], {setting.label}"] = measure(setting, WIDTHS)
        row = {"init": setting.init, "rates": setting.label}
        for name, theory in zip(SHOWN, setting.slopes, strict=True):
            row[f"{name} (theory)"] = f"{slope(WIDTHS, values[name]):+.2f} ({theory:g})"
        rows.append(row)
    report("paper/coordinate_check", rows, unprinted={"widths": WIDTHS, "terms": kept})


if __name__ == "__main__":
    main()
