"""What do the theory's terms cost? `train.theory_every: 10` against training without.

    python benchmarks/theory_overhead.py

The LoRA+ step of `overhead.py`, and the measurement of a quarter of its batch with all that the run does for it:
the copy of the adapters, the program, and the numbers on the host. One process, the two interleaved; the share is
the median over rounds of their times' ratio, over ten.
"""

import jax
import numpy as np
from common import interleaved, median_ratio, parse_options, report
from overhead import BATCH, RANK, TOKENS, make, random_batch

from loraplus_jax import make_mesh
from loraplus_jax.step import make_theory
from loraplus_jax.training.theory_metrics import copy_adapters, first_rows, to_metrics

EVERY = 10


def main() -> None:
    options = parse_options(__doc__, rounds=21)
    batch = random_batch()
    made = make("lora_plus", batch, RANK)
    rows = first_rows(batch, make_mesh(1), BATCH)
    states, adapters = [made.state], copy_adapters(made.state.trainable)
    theory = jax.jit(make_theory(made.loss_fn, made.specs))
    measure = theory.lower(made.state.trainable, adapters, made.frozen, rows).compile()

    def one_step() -> jax.Array:
        states[0], metrics = made.step(states[0], made.frozen, batch)
        return metrics["loss"]

    def one_measurement() -> dict[str, float]:
        before = copy_adapters(states[0].trainable)
        return to_metrics(measure(states[0].trainable, before, made.frozen, rows), made.specs)

    seconds = interleaved({"step": one_step, "theory": one_measurement}, options.rounds)
    flops = {"step": made.step.cost_analysis()["flops"], "theory": measure.cost_analysis()["flops"]}
    rows = [
        {"program": name, "GFLOP": f"{flops[name] / 1e9:.3f}", "seconds": f"{np.median(seconds[name]):.3f}"}
        for name in seconds
    ]
    rows[1][f"FLOPs at every {EVERY}th step"] = f"{flops['theory'] / flops['step'] / EVERY:.2%}"
    ratio = median_ratio(seconds["theory"], seconds["step"])
    rows[1][f"time at every {EVERY}th step"] = f"{ratio / EVERY:.2%}"
    report("theory_overhead", rows, batch=f"{BATCH} x {TOKENS} tokens", rounds=options.rounds)


if __name__ == "__main__":
    main()
