"""What does a sweep cost, and does successive halving find what the full grid finds?

    python benchmarks/sweep.py time       # a member's step against a single run's, interleaved
    python benchmarks/sweep.py halving    # halving against the grid on two small tasks
    python benchmarks/sweep.py halving --recount    # the same table from the losses kept, nothing is trained

`time` trains 16 settings of the quickstart (4 rates x 4 lambdas, of which one is plain LoRA) as one program beside
one single run, and works out from the measured times what sixteen single runs and a whole sweep take.

`halving` trains the same 16 settings of a shorter quickstart to the end and looks at them at the rungs too. Members
do not depend on each other, so that these runs are those of the halving as well. A loss is noisy by the standard
deviation that the best setting has over the seeds. The grid's best loss on a seed is the luckiest of all, so that
what halving and grid choose on one seed is also compared on the others.
"""

import argparse
import dataclasses
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import RESULTS, interleaved, median_ratio, report

from loraplus_jax import init_state
from loraplus_jax.data.batches import eval_batches, train_batches
from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.sharding import replicate, shard_batch
from loraplus_jax.sweep import population as populations
from loraplus_jax.sweep.halving import (
    best_trial,
    comparison_steps,
    curve_every,
    member_steps,
    split_at_rung,
)
from loraplus_jax.sweep.population import prepare_population
from loraplus_jax.sweep.settings import ARM_LABELS, METHODS, SweepRun, SweepSettings, Trial
from loraplus_jax.sweep.slots import DeviceSlots
from loraplus_jax.training.setup import prepare

CONFIG = Path(__file__).parents[1] / "configs/quickstart_sweep.yaml"
SIXTEEN = ("--sweep.lr_ratios", "[2,4,8]", "--sweep.lora_learning_rates", "[1.25e-4,2.5e-4,5e-4,1e-3]")
SMALL = (
    *("--train.steps", "120", "--train.batch_size", "16", "--data.max_length", "24"),
    *("--data.validation_fraction", "0.05", "--optimizer.warmup_steps", "8"),
)
WAYS = {
    "halving as it is by default": (SweepSettings.rungs, SweepSettings.keep),
    "the last choice at a quarter of the steps": ((0.125, 0.25), 0.25),
}
"""Rungs and share kept."""
LOOKS = (1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 1)
TASKS = {
    "movie reviews, classes": (),
    "movie reviews, ratings": ("--task", "regression", "--data.label", "rating"),
}
"""Name to what is changed of the recipe."""


def timing(rounds: int) -> None:
    """Writes results/sweep_time.json."""
    run = parse_settings(
        CONFIG, [*SIXTEEN, "--mesh.data", "1", "--train.compilation_cache", "false"], SweepRun
    )
    compiled = count_compilations()
    start = time.perf_counter()
    population = prepare_population(run, len(run.trials))
    members = DeviceSlots(population, len(run.trials))
    members.fill({n: population.first(trial, 0) for n, trial in enumerate(run.trials)})
    prepared = time.perf_counter() - start
    assert compiled == {"step": 1, "evaluate": 1}, compiled
    start = time.perf_counter()
    single = prepare(run.settings_of(run.trials[-1], 0))
    single_prepared = time.perf_counter() - start
    key = jax.random.fold_in(jax.random.key(0), 1)
    states = [replicate(single.mesh, init_state(single.parts.trainable, single.tx, key))]
    batch = next(train_batches(population.data.splits["train"], batch_size=run.train.batch_size, seed=0))
    split = population.data.splits["validation"]
    held = {name: column[: 2 * run.train.eval_batch_size] for name, column in split.items()}
    frozen = replicate(single.mesh, single.parts.frozen)

    def population_step() -> Any:
        members.step(dict.fromkeys(range(len(run.trials)), batch))
        return members.chunks

    def single_steps() -> Any:
        for _ in range(4):
            states[0], _ = single.programs.step(states[0], frozen, shard_batch(batch, single.mesh))
        return states[0]

    def single_evaluation() -> Any:
        batches = eval_batches(held, run.train.eval_batch_size)
        return [
            single.programs.evaluate(states[0].trainable, frozen, shard_batch(b, single.mesh))
            for b in batches
        ]

    seconds = interleaved(
        {
            "population": population_step,
            "single": single_steps,
            "population evaluates": lambda: members.evaluate(held, run.train.eval_batch_size),
            "single evaluates": single_evaluation,
        },
        rounds,
    )
    count = len(run.trials)
    member = [value / count for value in seconds["population"]]
    alone = [value / 4 for value in seconds["single"]]
    look = [value / count / 2 for value in seconds["population evaluates"]]
    look_alone = [value / 2 for value in seconds["single evaluates"]]
    memory = population.programs.step.memory_analysis()
    base = sum(leaf.nbytes for leaf in jax.tree.leaves(population.parts.frozen))
    rows = [
        {
            "": name,
            "population, s a member": f"{np.median(ours):.3f}",
            "single, s": f"{np.median(theirs):.3f}",
            "ratio (median of rounds)": f"{median_ratio(ours, theirs):.3f}",
        }
        for name, ours, theirs in (("step", member, alone), ("evaluation batch", look, look_alone))
    ]
    costs = {
        "step": (float(np.median(alone)), median_ratio(member, alone)),
        "look": (float(np.median(look_alone)), median_ratio(look, look_alone)),
        "start": (single_prepared, prepared),
    }
    report(
        "sweep_time",
        rows,
        members=count,
        rounds=rounds,
        compilations=compiled,
        base_mb=round(base / 1e6, 1),
        arguments_mb=round(memory.argument_size_in_bytes / 1e6, 1),
        temporaries_mb=round(memory.temp_size_in_bytes / 1e6, 1),
        single_temporaries_mb=round(single.programs.step.memory_analysis().temp_size_in_bytes / 1e6, 1),
        answer=answers(run, population, costs),
        unprinted={"seconds": seconds},
    )


def count_compilations() -> dict[str, int]:
    """How often each program of the population is compiled from now on."""
    counts = {"step": 0, "evaluate": 0}
    original = populations.map_members

    def counted(*arguments: Any, own_batch: bool, donate: bool) -> Any:
        counts["step" if own_batch else "evaluate"] += 1
        return original(*arguments, own_batch=own_batch, donate=donate)

    populations.map_members = counted
    return counts


def answers(
    run: SweepRun, population: Any, costs: dict[str, tuple[float, float]]
) -> dict[str, dict[str, float]]:
    """Wall time of sweeps over that of sixteen single runs of the same recipe, which evaluate as it says.

    Worked out from the measured times: steps, evaluations, and one start of a process, its compilations included.
    """
    size, steps = run.train.eval_batch_size, population.steps
    looks = {name: -(-population.data.examples[name] // size) for name in ("validation", "test")}
    (step, step_ratio), (look, look_ratio), (start, sweep_start) = costs.values()
    often = steps // run.train.eval_every
    single = start + steps * step + (often * looks["validation"] + 2 * looks["test"]) * look

    def searched(rungs: tuple[float, ...], keep: float) -> float:
        sweep = dataclasses.replace(run.sweep, rungs=rungs, keep=keep)
        left, counts = list(run.trials), []
        for _ in comparison_steps(sweep, steps):
            counts.append(len(left))
            # Which survive does not matter here, but how many do.
            _, left = split_at_rung({trial: float(n) for n, trial in enumerate(left)}, keep)
        taken = member_steps(counts, comparison_steps(sweep, steps)) * step * step_ratio
        return taken + sum(counts) * looks["validation"] * look * look_ratio + sweep_start

    def reported(members: int) -> float:
        # A curve begins before the first step, and its last point is the result.
        evaluations = (
            1 + math.ceil(steps / curve_every(run.train.eval_every, steps, run.sweep.curve_points))
        ) * looks["test"]
        return members * (steps * step * step_ratio + evaluations * look * look_ratio)

    whole = {
        "the choice alone": 0,
        "with LoRA and LoRA+ on 2 other seeds": 4,
        "on 3": 6,
        "on 3, and the control": 9,
    }
    return {
        how: {name: round((searched(*way) + reported(n)) / (16 * single), 3) for name, n in whole.items()}
        for how, way in WAYS.items()
    }


def halving(seeds: int, tasks: list[str], recount: bool, rungs: tuple[float, ...], keep: float) -> None:
    """Writes results/sweep_halving.json, with a row for each task and seed; rows of other tasks there are kept."""
    path = RESULTS / "sweep_halving.json"
    old = json.loads(path.read_text()) if path.exists() else {"rows": [], "losses": {}}
    rows = [row for row in old["rows"] if row["task"] not in tasks]
    kept = {name: losses for name, losses in old["losses"].items() if recount or name not in tasks}
    for name in tasks:
        run = parse_settings(CONFIG, [*SIXTEEN, *SMALL, *TASKS[name], "--mesh.data", "1"], SweepRun)
        sweep = dataclasses.replace(run.sweep, seeds=tuple(range(seeds)), rungs=rungs, keep=keep)
        run = dataclasses.replace(run, sweep=sweep)
        if not recount:
            kept[name] = {str(step): found for step, found in trained(run).items()}
        losses = {int(step): found for step, found in kept[name].items()}
        rows += [compared(name, run, losses, seed) for seed in run.seeds]
        steps = max(losses)
        report(
            "sweep_halving",
            rows,
            steps=steps,
            rungs=rungs,
            keep=keep,
            settings=len(run.trials),
            unprinted={"losses": kept},
        )


def trained(run: SweepRun) -> dict[int, dict[str, float]]:
    """The validation losses of all settings with all seeds at the rungs and at the end."""
    entries = [(trial, seed) for seed in run.seeds for trial in run.trials]
    population = prepare_population(run, len(entries))
    members, losses = DeviceSlots(population, len(entries)), {}
    members.fill({n: population.first(*entry) for n, entry in enumerate(entries)})
    batches = {
        seed: train_batches(population.data.splits["train"], batch_size=run.train.batch_size, seed=seed)
        for seed in run.seeds
    }
    # More than the rungs, so that others can be tried on the losses that are kept.
    stops = {math.ceil(share * population.steps) for share in LOOKS}
    for step in range(1, population.steps + 1):
        by_seed = {seed: next(stream) for seed, stream in batches.items()}
        members.step({n: by_seed[seed] for n, (_, seed) in enumerate(entries)})
        if step in stops:
            found = members.evaluate(population.data.splits["validation"], run.train.eval_batch_size)
            losses[step] = {key(*entries[n]): values["loss"] for n, values in found.items()}
            print(f"step {step}", flush=True)
    return losses


def key(trial: Trial, seed: int) -> str:
    """A setting with a seed, as the results have it."""
    return f"{trial}, seed {seed}"


def compared(name: str, run: SweepRun, losses: dict[int, dict[str, float]], seed: int) -> dict[str, Any]:
    """One seed: the best setting of the grid, and the one that halving comes to."""
    left, counts, steps = list(run.trials), [], max(losses)
    stops = comparison_steps(run.sweep, steps)
    selected: dict[str, Trial] = {}
    for stop in stops:
        counts.append(len(left))
        scores = {trial: losses[stop][key(trial, seed)] for trial in left}
        if stop == steps:
            best = {arm: best_trial(scores, arm) for arm in METHODS if arm not in selected}
            selected |= {arm: trial for arm, trial in best.items() if trial is not None}
        else:
            alone, left = split_at_rung(scores, run.sweep.keep)
            selected |= alone
    final = {trial: losses[steps][key(trial, seed)] for trial in run.trials}
    row: dict[str, Any] = {"task": name, "seed": seed}
    ours, theirs = [], []
    for arm in METHODS:
        grid, found = best_trial(final, arm), selected[arm]
        assert grid is not None
        ours.append(found)
        theirs.append(grid)
        row |= {
            f"{ARM_LABELS[arm]}, grid": f"{final[grid]:.4f}",
            f"{ARM_LABELS[arm]}, halving": f"{final[found]:.4f}",
        }
    chosen, best = (min(pair, key=final.__getitem__) for pair in (ours, theirs))
    others = [other for other in run.seeds if other != seed]
    elsewhere = [losses[steps][key(chosen, s)] - losses[steps][key(best, s)] for s in others]
    noise = np.std([losses[steps][key(best, s)] for s in run.seeds], ddof=1)
    return row | {
        "best less grid's": f"{final[chosen] - final[best]:+.4f}",
        "the same on the other seeds": f"{np.mean(elsewhere):+.4f}",
        "noise": f"{noise:.4f}",
        "member-steps / grid's": f"{member_steps(counts, stops) / (len(run.trials) * steps):.3f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("time", "halving"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--task", choices=TASKS, help="of halving; all if not given")
    parser.add_argument("--rungs", type=float, nargs="+", default=SweepSettings.rungs, help="of halving")
    parser.add_argument("--keep", type=float, default=SweepSettings.keep, help="of halving")
    parser.add_argument("--recount", action="store_true", help="of halving: from the losses that were kept")
    options = parser.parse_args()
    tasks = [options.task] if options.task else list(TASKS)
    run = {
        "time": functools.partial(timing, options.rounds),
        "halving": functools.partial(
            halving, options.seeds, tasks, options.recount, tuple(options.rungs), options.keep
        ),
    }
    run[options.what]()


if __name__ == "__main__":
    main()
