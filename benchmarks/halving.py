"""Does successive halving find what the full grid finds?

    python benchmarks/halving.py                 # two small tasks, three seeds
    python benchmarks/halving.py --recount       # the same table from the losses kept, nothing is trained
    python benchmarks/halving.py --recount --rungs 0.125,0.25 --keep 0.25

Trains 16 settings of a shorter quickstart to the end and evaluates them at the rungs too. Members do not depend
on each other, so that these runs are those of the halving as well. A loss is noisy by the standard deviation that
the best setting has over the seeds. The grid's best loss on a seed is the luckiest of all, so that what halving
and grid choose on one seed is also compared on the others.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from common import parse_options, read_json, report
from sweep import CONFIG, SIXTEEN, SMALL

from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.sweep.device_members import DeviceMembers
from loraplus_jax.sweep.halving import comparison_steps, member_steps, survivors
from loraplus_jax.sweep.population import abstract_population, prepare_population
from loraplus_jax.sweep.settings import SweepRun, SweepSettings
from loraplus_jax.sweep.trial import ARM_LABELS, METHODS, Trial

TASKS = {
    "movie reviews, classes": (),
    "movie reviews, ratings": ("--task", "regression", "--data.label", "rating"),
}
"""Name to settings that differ from the recipe's."""
EVALUATED = (1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 1)
"""Shares of the steps: more than the default's rungs, so that `--recount` can take others."""


def train(run: SweepRun) -> dict[str, dict[str, float]]:
    """The validation losses of all settings with all seeds, by step."""
    entries = [(trial, seed) for seed in run.seeds for trial in run.trials]
    population = prepare_population(abstract_population(run), len(entries))
    members = DeviceMembers(population, [population.first(*entry) for entry in entries])
    losses, data = {}, population.data.splits
    stops = {math.ceil(share * population.steps) for share in EVALUATED}
    for step in range(1, population.steps + 1):
        by_seed = {seed: population.batches.batch(seed, step - 1) for seed in run.seeds}
        members.step([by_seed[seed] for _, seed in entries])
        if step in stops:
            found = members.evaluate(data["validation"])
            losses[str(step)] = {key(*entry): v["loss"] for entry, v in zip(entries, found, strict=True)}
            print(f"step {step}", flush=True)
    return losses


def key(trial: Trial, seed: int) -> str:
    """A setting with a seed, as the results have it."""
    return f"{trial}, seed {seed}"


def compare(name: str, run: SweepRun, losses: dict[int, dict[str, float]], seed: int) -> dict[str, Any]:
    """One seed: the best setting of the grid, and the one that halving comes to."""
    steps, stops = max(losses), comparison_steps(run.sweep, max(losses))
    counts, halved, grid = dict.fromkeys(stops, 0), dict[str, Trial](), dict[str, Trial]()
    final = {trial: losses[steps][key(trial, seed)] for trial in run.trials}
    for arm in METHODS:
        left = [trial for trial in run.trials if trial.arm == arm]
        grid[arm] = min(left, key=final.__getitem__)
        for stop in stops:
            counts[stop] += len(left)
            left = survivors({trial: losses[stop][key(trial, seed)] for trial in left}, run.sweep.keep)
            if len(left) == 1:
                halved[arm], left = left[0], []
        halved |= {arm: min(left, key=final.__getitem__)} if left else {}
    row: dict[str, Any] = {"task": name, "seed": seed}
    for arm in METHODS:
        for way, chosen in (("grid", grid), ("halving", halved)):
            row[f"{ARM_LABELS[arm]}, {way}"] = f"{final[chosen[arm]]:.4f}"
    ours, best = (min(chosen.values(), key=final.__getitem__) for chosen in (halved, grid))
    others = [other for other in run.seeds if other != seed]
    elsewhere = [losses[steps][key(ours, s)] - losses[steps][key(best, s)] for s in others]
    noise = np.std([losses[steps][key(best, s)] for s in run.seeds], ddof=1)
    return row | {
        "best less grid's": f"{final[ours] - final[best]:+.4f}",
        "the same on the other seeds": f"{np.mean(elsewhere):+.4f}",
        "noise": f"{noise:.4f}",
        "member-steps / grid's": f"{member_steps([*counts.values()], stops) / (len(run.trials) * steps):.3f}",
    }


def main() -> None:
    default = SweepSettings()
    rungs = ",".join(map(str, default.rungs))
    options = parse_options(__doc__, seeds=3, rungs=rungs, keep=default.keep, recount=False)
    jax.config.update("jax_platforms", "cpu")
    changes = {"rungs": tuple(float(share) for share in options.rungs.split(",")), "keep": options.keep}
    kept, rows = read_json("sweep_halving.json").get("losses", {}) if options.recount else {}, []
    for name, settings in TASKS.items():
        run = parse_settings(CONFIG, [*SIXTEEN, *SMALL, *settings, "--mesh.data", "1"], SweepRun)
        sweep = dataclasses.replace(run.sweep, seeds=tuple(range(options.seeds)), **changes)
        run = dataclasses.replace(run, sweep=sweep)
        if not options.recount:
            kept[name] = train(run)
        losses = {int(step): found for step, found in kept[name].items()}
        rows += [compare(name, run, losses, seed) for seed in run.seeds]
    report("sweep_halving", rows, **changes, settings=len(run.trials), unprinted={"losses": kept})


if __name__ == "__main__":
    main()
