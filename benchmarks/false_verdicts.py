"""How often does a sweep's report find a difference between methods that do not differ?

    python benchmarks/false_verdicts.py

Simulates the report of sweeps in which all methods have the same distribution of test losses, and gives it to the
code that decides, `sweep.statistics`, for LoRA+ against LoRA and for several methods. The loss of a run falls along
one curve to its final loss. Seeds share a part of their noise, as runs of one seed do in a sweep. Writes
results/false_verdicts.json.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from common import parse_options, report

from loraplus_jax.sweep.statistics import (
    CONFIDENCE,
    REPORT_CONFIDENCE,
    compare_arms,
    decisive,
    lower_loss_arm,
    report_runs,
)

STEPS, POINTS = 400, 20
NOISE: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
    "heavy tails (Student, 3)": lambda rng, shape: rng.standard_t(3, shape),
}


def rows_of(arms: int, seeds: int, noise: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    """The report's rows: curves of one shape, with noise of the seed, of the run and of each evaluation."""
    draw = NOISE[noise]
    of_seed, of_run = 0.02 * draw(rng, (1, seeds)), 0.01 * draw(rng, (arms, seeds))
    speed = 1 + 0.05 * draw(rng, (arms, seeds))
    steps = np.linspace(0, STEPS, POINTS + 1).astype(int)
    falling = np.exp(-steps / (STEPS / 4) * np.clip(speed, 0.5, 2)[..., None])
    losses = (
        0.4 + (of_seed + of_run)[..., None] + 0.3 * falling + 0.002 * draw(rng, (arms, seeds, POINTS + 1))
    )
    return [
        {"stage": "report", "arm": arm, "trial": [], "seed": seed, "step": int(step), "split": "test"}
        | {"loss": float(losses[arm, seed, point]), "accuracy": 0.0}
        for arm in range(arms)
        for seed in range(seeds)
        for point, step in enumerate(steps)
    ]


def two_arms(seeds: int, noise: str, rng: np.random.Generator) -> tuple[bool, bool, bool]:
    """Whether a sweep of LoRA+ and LoRA prefers one by its test loss, by anything, and with 95 % an interval."""
    rows = [row | {"arm": ("lora", "lora_plus")[row["arm"]]} for row in rows_of(2, seeds, noise, rng)]
    runs, pair = report_runs(rows, STEPS, None), ("lora_plus", "lora", "accuracy")
    found = compare_arms(runs, *pair, REPORT_CONFIDENCE)
    uncorrected = decisive(compare_arms(runs, *pair, CONFIDENCE)) is not None
    return lower_loss_arm(found) is not None, decisive(found) is not None, uncorrected


def several(methods: int, seeds: int, noise: str, rng: np.random.Generator) -> bool:
    """Whether a comparison finds one of the methods better or worse than LoRA."""
    rows, confidence = rows_of(methods + 1, seeds, noise, rng), 1 - (1 - CONFIDENCE) / methods
    for arm in range(1, methods + 1):
        runs = report_runs([row for row in rows if row["arm"] in (0, arm)], STEPS, None, (0, arm))  # type: ignore[arg-type]
        if lower_loss_arm(compare_arms(runs, arm, 0, "accuracy", confidence)) is not None:  # type: ignore[arg-type]
            return True
    return False


def main() -> None:
    options = parse_options(__doc__, sweeps=1000, seed=0)
    rng, rows = np.random.default_rng(options.seed), []
    for noise in NOISE:
        for seeds in (3, 5, 8):
            found = np.mean([two_arms(seeds, noise, rng) for _ in range(options.sweeps)], axis=0)
            of_methods = np.mean([several(8, seeds, noise, rng) for _ in range(options.sweeps)])
            rows.append(
                {
                    "noise": noise,
                    "seeds": seeds,
                    "LoRA+ or LoRA, by loss, %": round(100 * found[0], 1),
                    "by loss or steps, %": round(100 * found[1], 1),
                    "with intervals of 95 % each, %": round(100 * found[2], 1),
                    "8 methods, %": round(100 * of_methods, 1),
                }
            )
    report("false_verdicts", rows, sweeps=options.sweeps)


if __name__ == "__main__":
    main()
