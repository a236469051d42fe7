"""What does a sweep cost, and does successive halving find what the full grid finds?

    python benchmarks/sweep.py time       # a member's step against a single run's, interleaved
    python benchmarks/sweep.py cost       # the sweep of the quickstart: steps, and minutes by those times
    python benchmarks/sweep.py size       # a member's step and memory against the number of members
    python benchmarks/sweep.py halving    # halving against the grid on two small tasks
    python benchmarks/sweep.py halving --recount    # the same table from the losses kept, nothing is trained
    python benchmarks/sweep.py time --backend gpu   # also size; without the virtual devices

`time` trains 16 settings of the quickstart (4 rates x 4 lambdas, of which one is plain LoRA) as one program, on one
CPU device and on two virtual ones with one thread each, beside one single run. It counts the steps and evaluation
batches of sixteen single runs and of whole sweeps, and works out from the measured times what these take.

`cost` counts the same for `configs/quickstart_sweep.yaml` itself, and works out its minutes from the times that
`time` measured last; it trains nothing.

`size` trains 1 to 16 members of a shorter quickstart: one after another, all in parallel, and on two virtual CPU
devices with one thread each.

`halving` trains the same 16 settings of a shorter quickstart to the end and evaluates them at the rungs too.
Members do not depend on each other, so that these runs are those of the halving as well. A loss is noisy by the
standard deviation that the best setting has over the seeds. The grid's best loss on a seed is the luckiest of all,
so that what halving and grid choose on one seed is also compared on the others.
"""

import argparse
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from common import RESULTS, interleaved, median_ratio, report, table

from loraplus_jax import init_state
from loraplus_jax.data.batches import eval_batches, train_batches
from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.step import replicate, shard_batch
from loraplus_jax.sweep import population as populations
from loraplus_jax.sweep.device_slots import DeviceSlots
from loraplus_jax.sweep.halving import (
    best_trial,
    comparison_steps,
    curve_steps,
    member_steps,
    planned_members,
    split_at_rung,
)
from loraplus_jax.sweep.population import prepare_population
from loraplus_jax.sweep.settings import ARM_LABELS, METHODS, SweepRun, SweepSettings, Trial
from loraplus_jax.training.setup import prepare

CONFIG = Path(__file__).parents[1] / "configs/quickstart_sweep.yaml"
EXAMPLES = {"train": 7031, "validation": 1004, "test": 2008}
"""Of the quickstart."""
SIXTEEN = ("--sweep.lr_ratios", "[2,4,8]", "--sweep.lora_learning_rates", "[1.25e-4,2.5e-4,5e-4,1e-3]")
SMALL = (
    *("--train.steps", "120", "--train.batch_size", "16", "--data.max_length", "24"),
    *("--data.validation_fraction", "0.05", "--optimizer.warmup_steps", "8"),
)
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "eleven evaluations on each curve": {"curve_points": 10},
    "the last choice at a quarter of the steps": {"rungs": (0.125, 0.25), "keep": 0.25},
    "the choice at an eighth of the steps": {"keep": 0.0625},
}
"""Settings of the sweep that differ from the defaults."""
TWO_SEEDS = "with LoRA and LoRA+ on 2 other seeds"
OUTPUTS = {
    "the choice alone": 0,
    TWO_SEEDS: 4,
    "on 3": 6,
    "on 3, and the control": 9,
}
"""Members of the report."""
SIZES = (1, 2, 4, 8, 16)
DEVICES = {"one device": 1, "two devices of one thread": 2}
"""Virtual CPU devices that the members are split over."""
LOOKS = (1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 1)
TASKS = {
    "movie reviews, classes": (),
    "movie reviews, ratings": ("--task", "regression", "--data.label", "rating"),
}
"""Name to what is changed of the recipe."""


def use_backend(backend: str) -> dict[str, int]:
    """Makes JAX use it; returns the devices that the members are split over."""
    jax.config.update("jax_platforms", "cuda" if backend == "gpu" else "cpu")
    if backend == "gpu":
        return {"one device": 1}
    jax.config.update("jax_num_cpu_devices", max(DEVICES.values()))
    return DEVICES


def named(file: str, backend: str) -> str:
    """Name of a results file."""
    return file if backend == "cpu" else f"{file}_{backend}"


def timing(rounds: int, backend: str) -> None:
    """Writes results/sweep_time.json."""
    used = use_backend(backend)
    options = [*SIXTEEN, "--train.compilation_cache", "false", "--mesh.data"]
    run = parse_settings(CONFIG, [*options, "1"], SweepRun)
    count = len(run.trials)
    compiled = count_compilations()
    members, prepared = {}, {}
    for name, devices in used.items():
        start = time.perf_counter()
        population = prepare_population(parse_settings(CONFIG, [*options, str(devices)], SweepRun), count)
        members[name] = DeviceSlots(population, count)
        members[name].fill({n: population.first(trial, 0) for n, trial in enumerate(run.trials)})
        prepared[name] = time.perf_counter() - start
    if backend == "cpu":  # a GPU compiles several to measure the members at once
        assert compiled == dict.fromkeys(("step", "evaluate"), len(used)), compiled
    start = time.perf_counter()
    single = prepare(run.settings_of(run.trials[-1], 0))
    single_prepared = time.perf_counter() - start
    key = jax.random.fold_in(jax.random.key(0), 1)
    states = [replicate(single.mesh, init_state(single.parts.trainable, single.tx, key))]
    data, steps = single.data, next(iter(members.values())).population.steps
    batch = next(train_batches(data.splits["train"], batch_size=run.train.batch_size, seed=0))
    held = {
        name: column[: 2 * run.train.eval_batch_size] for name, column in data.splits["validation"].items()
    }
    frozen = replicate(single.mesh, single.parts.frozen)

    def population_step(slots: DeviceSlots) -> Any:
        slots.step(dict.fromkeys(range(count), batch))
        return slots.chunks

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

    calls: dict[Any, Callable[[], Any]] = {("step", "single"): single_steps}
    calls |= {("step", name): functools.partial(population_step, slots) for name, slots in members.items()}
    calls |= {("evaluation batch", "single"): single_evaluation}
    calls |= {
        ("evaluation batch", name): functools.partial(slots.evaluate, held) for name, slots in members.items()
    }
    in_one_call = {("step", "single"): 4, ("evaluation batch", "single"): 2}
    in_one_call |= {("step", name): count for name in members}
    in_one_call |= {("evaluation batch", name): 2 * count for name in members}
    seconds = {
        what: [value / in_one_call[what] for value in values]
        for what, values in interleaved(calls, rounds).items()
    }
    ratios = {what: median_ratio(values, seconds[what[0], "single"]) for what, values in seconds.items()}
    rows = [
        {
            "": what,
            "members on": name,
            "population, s a member": f"{np.median(seconds[what, name]):.3f}",
            "single, s": f"{np.median(seconds[what, 'single']):.3f}",
            "ratio (median of rounds)": f"{ratios[what, name]:.3f}",
        }
        for what in ("step", "evaluation batch")
        for name in members
    ]
    sixteen = single_count(run, steps, data.examples) * 16
    ways = {
        way: {name: sweep_count(run, changes, steps, data.examples, n) for name, n in OUTPUTS.items()}
        for way, changes in WAYS.items()
    }
    step, batch_time = (float(np.median(seconds[what, "single"])) for what in ("step", "evaluation batch"))
    total = sixteen.seconds(step, batch_time) + 16 * single_prepared

    def share(count: Count, name: str) -> float:
        found = count.seconds(step * ratios["step", name], batch_time * ratios["evaluation batch", name])
        return round((found + prepared[name]) / total, 3)

    memory = {name: slots.programs.step.memory_analysis() for name, slots in members.items()}
    report(
        named("sweep_time", backend),
        rows,
        members=count,
        rounds=rounds,
        compilations=compiled,
        base_mb=round(sum(leaf.nbytes for leaf in jax.tree.leaves(single.parts.frozen)) / 1e6, 1),
        temporaries_mb={
            name: round(found.temp_size_in_bytes * used[name] / 1e6, 1) for name, found in memory.items()
        },
        single_temporaries_mb=round(single.programs.step.memory_analysis().temp_size_in_bytes / 1e6, 1),
        single_start=round(single_prepared, 1),
        start={name: round(value, 1) for name, value in prepared.items()},
        counts={"sixteen single runs": sixteen} | ways,
        answer={
            name: {way: {out: share(c, name) for out, c in row.items()} for way, row in ways.items()}
            for name in members
        },
        unprinted={"seconds": {f"{what}, {name}": values for (what, name), values in seconds.items()}},
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


class Count(NamedTuple):
    """What runs take, however fast the machine."""

    steps: int
    evaluation_batches: int

    def __mul__(self, runs: int) -> "Count":
        return Count(self.steps * runs, self.evaluation_batches * runs)

    def seconds(self, step: float, batch: float) -> float:
        """Seconds, from those of a step and of an evaluation batch."""
        return self.steps * step + self.evaluation_batches * batch


def single_count(run: SweepRun, steps: int, examples: Mapping[str, int]) -> Count:
    """A single run of the recipe, which evaluates as it says: the test split before and after training."""
    validation, test = (-(-examples[name] // run.train.eval_batch_size) for name in ("validation", "test"))
    return Count(steps, steps // run.train.eval_every * validation + 2 * test)


def sweep_count(
    run: SweepRun, changes: Mapping[str, Any], steps: int, examples: Mapping[str, int], members: int
) -> Count:
    """A whole sweep, with settings that differ from the run's and this many members in the report."""
    sweep = dataclasses.replace(run.sweep, **changes)
    validation, test = (-(-examples[name] // run.train.eval_batch_size) for name in ("validation", "test"))
    stops = comparison_steps(sweep, steps)
    searched = planned_members(run.trials, len(run.seeds), stops, sweep.keep)
    points = len(curve_steps(steps, sweep.curve_points))
    return Count(
        member_steps(searched, stops) + members * steps,
        sum(searched) * validation + members * points * test,
    )


def costs() -> None:
    """Prints steps, evaluation batches and minutes of the quickstart's sweep, by what its report compares."""
    run = parse_settings(CONFIG, [], SweepRun)
    steps = run.train.steps or 0
    found = json.loads((RESULTS / "sweep_time.json").read_text())
    seconds = {name: float(np.median(values)) for name, values in found["seconds"].items()}
    members = len(run.arms) * len(run.report_seeds)
    outputs = {**OUTPUTS, f"on {len(run.report_seeds)}, and the control": members}
    counts = {output: sweep_count(run, {}, steps, EXAMPLES, count) for output, count in outputs.items()}
    singles = f"{len(run.trials)} single runs"
    counts = {singles: single_count(run, steps, EXAMPLES) * len(run.trials)} | counts
    rows = []
    for output, count in counts.items():
        row = {"output": output, "training steps": f"{count.steps:,}"}
        row["evaluation batches"] = f"{count.evaluation_batches:,}"
        for name in DEVICES:
            way = "single" if output == singles else name
            total = count.seconds(seconds[f"step, {way}"], seconds[f"evaluation batch, {way}"])
            row[f"minutes on {name}"] = f"{total / 60:.0f}"
        rows.append(row)
    print(table(rows))
    print(
        f"{found['machine']['cores']} cores of {found['machine']['processor']}; a single run is on one device"
    )


def sizes(rounds: int, backend: str) -> None:
    """Writes results/sweep_size.json."""
    used = use_backend(backend)
    options = [*SIXTEEN, *SMALL, "--train.compilation_cache", "false"]
    most = max(SIZES)
    ways: dict[str, Any] = {}
    several = [(name, devices, 1) for name, devices in used.items() if devices > 1]
    for name, devices, at_once in (("one after another", 1, 1), ("in parallel", 1, most), *several):
        run = parse_settings(CONFIG, [*options, "--mesh.data", str(devices)], SweepRun)
        population = prepare_population(run, most, at_once)
        for size in SIZES:
            members = DeviceSlots(population, most)
            members.fill({n: population.first(run.trials[n], 0) for n in range(size)})
            ways[name, size] = members
    split = parse_settings(CONFIG, options, SweepRun)
    data = next(iter(ways.values())).population.data.splits["train"]
    batch = next(train_batches(data, batch_size=split.train.batch_size, seed=0))

    def step(members: DeviceSlots) -> Callable[[], Any]:
        def call() -> Any:
            members.step(dict.fromkeys(members.member_ids, batch))
            return members.chunks

        return call

    seconds = interleaved({way: step(members) for way, members in ways.items()}, rounds)
    rows = [
        {
            "way": name,
            "members": size,
            "step_seconds_per_member": round(float(np.median(seconds[name, size])) / size, 4),
            "temporaries_mb": round(
                members.programs.step.memory_analysis().temp_size_in_bytes
                * members.population.mesh.size
                / 1e6,
                1,
            ),
        }
        for (name, size), members in ways.items()
    ]
    report(
        named("sweep_size", backend),
        rows,
        rounds=rounds,
        batch=[split.train.batch_size, split.data.max_length],
    )


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
            found = members.evaluate(population.data.splits["validation"])
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
    parser.add_argument("what", choices=("time", "cost", "size", "halving"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--backend", choices=("cpu", "gpu"), default="cpu", help="of time and size")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--task", choices=TASKS, help="of halving; all if not given")
    parser.add_argument("--rungs", type=float, nargs="+", default=SweepSettings.rungs, help="of halving")
    parser.add_argument("--keep", type=float, default=SweepSettings.keep, help="of halving")
    parser.add_argument("--recount", action="store_true", help="of halving: from the losses that were kept")
    options = parser.parse_args()
    tasks = [options.task] if options.task else list(TASKS)
    run = {
        "time": functools.partial(timing, options.rounds, options.backend),
        "cost": costs,
        "size": functools.partial(sizes, options.rounds, options.backend),
        "halving": functools.partial(
            halving, options.seeds, tasks, options.recount, tuple(options.rungs), options.keep
        ),
    }
    run[options.what]()


if __name__ == "__main__":
    main()
