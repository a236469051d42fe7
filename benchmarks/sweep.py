"""What does a sweep cost?

    python benchmarks/sweep.py time       # a member's step against a single run's, interleaved
    python benchmarks/sweep.py cost       # the sweep of the quickstart: steps, and minutes by those times
    python benchmarks/sweep.py size       # a member's step and memory against the number of members

`time` trains 16 settings of the quickstart (4 rates x 4 lambdas, of which one is plain LoRA) as one program, on one
CPU device and on two virtual ones with one thread each, beside one single run.

`cost` counts the steps and evaluation batches of `configs/quickstart_sweep.yaml` and of as many single runs, and
works out their minutes from the times that `time` measured last; it trains nothing.

`size` trains 1 to 16 members of a shorter quickstart: one after another, all in parallel, and on two virtual CPU
devices with one thread each.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import Steps, interleaved, median_ratio, parse_options, read_json, report, table

from loraplus_jax import init_state
from loraplus_jax._utils.allocator import keep_memory, run_on_main_thread
from loraplus_jax.data.batches import eval_batches
from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.step import replicate, shard_batch
from loraplus_jax.sweep.arms import programs_of
from loraplus_jax.sweep.device_members import DeviceMembers
from loraplus_jax.sweep.halving import comparison_steps, curve_steps, member_steps, planned_members
from loraplus_jax.sweep.population import abstract_population, prepare_population
from loraplus_jax.sweep.settings import SweepRun
from loraplus_jax.tasks.interface import row_count
from loraplus_jax.training.setup import prepare

CONFIG = Path(__file__).parents[1] / "configs/quickstart_sweep.yaml"
RATES = "[1.25e-4,2.5e-4,5e-4,1e-3]"
SIXTEEN = (
    *("--sweep.lr_ratios", "[2,4,8]"),
    *("--sweep.learning_rates", RATES, "--sweep.lora_learning_rates", RATES),
)
SMALL = (
    *("--train.steps", "120", "--train.batch_size", "16", "--data.max_length", "24"),
    *("--data.validation_fraction", "0.05", "--optimizer.warmup_steps", "8"),
)
UNCACHED = ("--train.compilation_cache", "false")
OUTPUTS = {
    "the selection only": 0,
    "and LoRA and LoRA+ on 2 other seeds": 4,
    "on 3": 6,
    "on 3, and the control": 9,
}
"""Members of the report."""
SIZES = (1, 2, 4, 8, 16)
TWO = "two devices of one thread"
DEVICES = {"one device": 1, TWO: 2}
"""Virtual CPU devices that the members are split over."""


def population_step(members: DeviceMembers, batch: Any) -> Any:
    """A step of all members on one batch."""
    members.step([batch] * len(members.places))
    return members.stacked


@keep_memory()  # as a single run does
def timing(rounds: int) -> None:
    """Writes results/sweep_time.json."""
    run_on_main_thread()  # as the command does
    options = [*SIXTEEN, *UNCACHED, "--mesh.data"]
    run = parse_settings(CONFIG, [*options, "1"], SweepRun)
    single = prepare(run.settings_of(run.trials[-1], 0))
    data, frozen, count = single.data, replicate(single.mesh, single.parts.frozen), len(run.trials)
    rows_at_once = single.batches.eval_rows
    batch = single.batches.batch(0, 0)
    two_batches = {n: column[: 2 * rows_at_once] for n, column in data.splits["validation"].items()}
    state = replicate(single.mesh, init_state(single.parts.trainable, single.tx, jax.random.key(0)))
    step = Steps(lambda state: single.programs.step(state, frozen, shard_batch(batch, single.mesh)), state)

    def single_evaluation() -> Any:
        batches = [shard_batch(b, single.mesh) for b in eval_batches(two_batches, rows_at_once)]
        return [single.programs.evaluate(step.state.trainable, frozen, b) for b in batches]

    # By what is measured and who does it: a call, and how many steps or batches of a member it does.
    calls: dict[tuple[str, str], tuple[Callable[[], Any], int]] = {
        ("step", "single"): (lambda: [step() for _ in range(4)][-1], 4),
        ("evaluation batch", "single"): (single_evaluation, 2),
    }
    for name, devices in DEVICES.items():
        own = abstract_population(parse_settings(CONFIG, [*options, str(devices)], SweepRun))
        population = prepare_population(own, count)
        members = DeviceMembers(population, [population.first(trial, 0) for trial in run.trials])
        calls["step", name] = functools.partial(population_step, members, batch), count
        calls["evaluation batch", name] = functools.partial(members.evaluate, two_batches), 2 * count
    measured = interleaved({what: call for what, (call, _) in calls.items()}, rounds)
    seconds = {what: [value / calls[what][1] for value in values] for what, values in measured.items()}
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
        for name in DEVICES
    ]
    kept = {f"{what}, {name}": values for (what, name), values in seconds.items()}
    batches = {name: -(-row_count(data.splits[name]) // rows_at_once) for name in ("validation", "test")}
    report("sweep_time", rows, members=count, rounds=rounds, batches=batches, unprinted={"seconds": kept})


def single_count(run: SweepRun, steps: int, batches: Mapping[str, int]) -> tuple[int, int]:
    """Steps and evaluation batches of a single run of the recipe: the test split before and after training.

    `batches` are those of each split.
    """
    return steps, steps // run.train.eval_every * batches["validation"] + 2 * batches["test"]


def sweep_count(run: SweepRun, steps: int, members: int, batches: Mapping[str, int]) -> tuple[int, int]:
    """The same of a whole sweep with this many members in the report."""
    stops = comparison_steps(run.sweep, steps)
    settings = [len(arm.trials) for program in programs_of(run) for arm in program.arms if arm.trials]
    searched = planned_members(settings, len(run.seeds), stops, run.sweep.keep)
    points = len(curve_steps(steps, run.sweep.curve_points))
    evaluated = sum(searched) * batches["validation"] + members * points * batches["test"]
    return member_steps(searched, stops) + members * steps, evaluated


def costs() -> None:
    """Prints steps, evaluation batches and minutes of the quickstart's sweep, by what its report compares."""
    run = parse_settings(CONFIG, [], SweepRun)
    steps, single = run.train.steps or 0, f"{len(run.trials)} single runs"
    found = read_json("sweep_time.json")
    seconds = {name: float(np.median(values)) for name, values in found["seconds"].items()}
    members = len(run.arms) * len(run.report_seeds)
    outputs = {**OUTPUTS, f"on {len(run.report_seeds)}, and the control": members}
    batches = found["batches"]
    counts = {single: np.multiply(single_count(run, steps, batches), len(run.trials))}
    counts |= {output: sweep_count(run, steps, count, batches) for output, count in outputs.items()}
    rows = []
    for output, (trained, evaluated) in counts.items():
        row = {"output": output, "training steps": f"{trained:,}", "evaluation batches": f"{evaluated:,}"}
        for name in DEVICES:
            way = "single" if output == single else name
            total = trained * seconds[f"step, {way}"] + evaluated * seconds[f"evaluation batch, {way}"]
            row[f"minutes on {name}"] = f"{total / 60:.0f}"
        rows.append(row)
    print(table(rows))
    ran_on = found["machine"]
    print(f"{ran_on['cores']} cores of {ran_on['processor']}; a single run is on one device")


def sizes(rounds: int) -> None:
    """Writes results/sweep_size.json."""
    most, ways = max(SIZES), {}
    for name, devices, in_parallel in (("one after another", 1, 1), ("in parallel", 1, most), (TWO, 2, 1)):
        options = [*SIXTEEN, *SMALL, *UNCACHED, "--mesh.data", str(devices)]
        run = parse_settings(CONFIG, options, SweepRun)
        population = prepare_population(abstract_population(run), most, in_parallel)
        for size in SIZES:
            ways[name, size] = DeviceMembers(population, [population.first(t, 0) for t in run.trials[:size]])
    population = next(iter(ways.values())).population
    batch = population.batches.batch(0, 0)

    steps = {way: functools.partial(population_step, members, batch) for way, members in ways.items()}
    seconds = interleaved(steps, rounds)
    rows = []
    for (name, size), members in ways.items():
        memory = members.programs.step.largest.memory_analysis()
        temporaries = memory.temp_size_in_bytes * members.population.mesh.size
        row = {"way": name, "members": size}
        row["step_seconds_per_member"] = round(float(np.median(seconds[name, size])) / size, 4)
        rows.append({**row, "temporaries_mb": round(temporaries / 1e6, 1)})
    report("sweep_size", rows, rounds=rounds, batch=[run.train.batch_size, run.data.max_length])


def main() -> None:
    options = parse_options(__doc__, what=["time", "cost", "size"], rounds=9)
    if options.what == "cost":
        costs()
        return
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(DEVICES.values()))
    {"time": timing, "size": sizes}[options.what](options.rounds)


if __name__ == "__main__":
    main()
