"""Does a sweep on Ray use its workers, and survive them?

    python benchmarks/ray_sweep.py time              # two local workers of one core each against one
    python benchmarks/ray_sweep.py kill --kills 20   # kill -9 of workers and of the driver, at random times
    python benchmarks/ray_sweep.py makespan          # 64 simulated workers; writes docs/sweep_makespan.png

`time` and `kill` need the extra ray. Both train a small random BERT on made-up texts and compare the bytes of
`report.json`. `time` also compares `sweep.methods` with four methods, whose report holds times of steps: they are
left out. `makespan` schedules a sweep of λ and 8 methods, of 16 settings with 3 comparisons each, in units of one
run, by the sweep's own stages: runs of ten minutes, and a minute when a worker turns to another method.
"""

import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from common import parse_options, report

sys.path.insert(0, str(Path(__file__).parents[1]))

SWEEP = (
    *("--sweep.learning_rates", "[2e-3,5e-3]", "--sweep.lr_ratios", "[2,4]", "--sweep.report_seeds", "4"),
    *("--sweep.rungs", "[0.25]", "--sweep.keep", "0.5", "--sweep.curve_points", "2"),
)
METHODS = ("--sweep.methods", "[lora_plus,rslora,riemannian]", "--sweep.control", "false")
RUNS = {"LoRA and LoRA+": SWEEP, "four methods": (*SWEEP, *METHODS)}
SIXTEEN = (
    *("--sweep.learning_rates", "[1e-4,2e-4,4e-4,8e-4]", "--sweep.lr_ratios", "[2,4,8,16]"),
    *("--sweep.rungs", "[0.125,0.375]", "--sweep.keep", "0.5", "--sweep.report_seeds", "8"),
)
EIGHT = ("lora", "lora_plus", "rslora", "dora", "orthogonal", "pissa", "olora", "riemannian")
RAY = ("--sweep.ray", "local", "--sweep.group_size", "1")
ENVIRONMENT = {"JAX_PLATFORMS": "cpu"}


def make_world(directory: Path, steps: int, hidden: int) -> Path:
    """A model, texts and a config; returns the config's path."""
    from tests.integration import conftest

    conftest.HIDDEN, conftest.INNER = hidden, 2 * hidden
    world = conftest.World(directory)
    world.model.mkdir()
    conftest._write_model(world.model)
    world.write_rows("texts.csv", conftest._texts(320))
    conftest._write_config(world, 32, {"max_length": 12}, ["query", "value", "up"])
    world.change_config("train", steps=steps, eval_every=max(1, steps // 8), log_every=steps)
    return world.config


def command(config: Path, out: Path, options: Sequence[str]) -> list[str]:
    start = [sys.executable, "-m", "loraplus_jax.cli", "sweep", str(config), "--output_dir", str(out)]
    return [*start, *options]


def environment(directory: Path) -> dict[str, str]:
    """A cache of programs of its own, warm after the first run."""
    root = str(Path(__file__).parents[1])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return os.environ | ENVIRONMENT | {"LORAPLUS_CACHE": str(directory / "cache"), "PYTHONPATH": paths}


def result(out: Path) -> Any:
    """The report without digest and, of methods, the times of steps."""
    content = json.loads((out / "report.json").read_text())
    for method in content.get("methods", {}).values():
        method["cost"].pop("step_seconds")
    return content | {"digest": None} if "methods" in content else (out / "report.json").read_bytes()


def run(directory: Path, options: Sequence[str], cores: int) -> tuple[float, Any]:
    """Seconds and result of a sweep on so many workers of one core each."""
    out = directory / "out"
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    subprocess.run(
        command(directory / "config.yaml", out, (*options, *RAY)),
        env=environment(directory),
        check=True,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, range(cores)),
    )
    return time.perf_counter() - began, result(out)


def timing(rounds: int, steps: int, hidden: int) -> None:
    """Writes results/ray_sweep_time.json."""
    rows, units = [], []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make_world(directory, steps, hidden)
        for label, options in RUNS.items():
            run(directory, options, 2)  # fills the cache
            found = {cores: [run(directory, options, cores) for _ in range(rounds)] for cores in (1, 2)}
            results = [each for runs in found.values() for _, each in runs]
            one, two = (statistics.median(seconds for seconds, _ in found[cores]) for cores in (1, 2))
            rows.append(
                {
                    "sweep": label,
                    "one worker, s": round(one, 1),
                    "two workers, s": round(two, 1),
                    "ratio": round(two / one, 3),
                    "equal reports": all(each == results[0] for each in results),
                }
            )
            units += [json.loads(path.read_text()) for path in (directory / "out").rglob("result.json")]
    whole = [unit["seconds"] for unit in units if len(unit["rows"]) > 1]
    report("ray_sweep_time", rows, steps=steps, run_seconds=round(statistics.median(whole), 2))


def workers_of(driver: int) -> list[psutil.Process]:
    """The processes that run a unit."""
    found = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(driver).children(recursive=True):
            with contextlib.suppress(psutil.Error, IndexError):
                if process.cmdline()[0].startswith("ray::run_on_worker"):
                    found.append(process)
    return found


def kill(kills: int, driver_kills: int, steps: int, hidden: int, seed: int) -> None:
    """Writes results/ray_sweep_kill.json."""
    random_times = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config = make_world(directory, steps, hidden)
        _, straight = run(directory, SWEEP, 2)
        out, counts, runs, equal = directory / "out", {"workers": 0, "driver": 0}, 0, 0
        while counts["workers"] < kills or counts["driver"] < driver_kills or runs == 0:
            shutil.rmtree(out, ignore_errors=True)
            code = None
            while code != 0:
                with subprocess.Popen(
                    command(config, out, (*SWEEP, *RAY)),
                    env=environment(directory),
                    stdout=subprocess.DEVNULL,
                ) as driver:
                    ends = time.monotonic() + random_times.uniform(15, 40)
                    while driver.poll() is None:
                        time.sleep(random_times.uniform(5, 20))
                        workers = workers_of(driver.pid)
                        if counts["driver"] < driver_kills and time.monotonic() > ends and workers:
                            driver.kill()
                            counts["driver"] += 1
                        elif counts["workers"] < kills and workers:
                            with contextlib.suppress(psutil.Error):
                                random_times.choice(workers).kill()
                                counts["workers"] += 1
                    code = driver.wait()
                if code not in (0, -9):
                    raise SystemExit(f"the sweep ended with exit code {code}")
            runs, equal = runs + 1, equal + (result(out) == straight)
            print(f"{runs} sweeps, {counts} kills, {equal} reports equal", flush=True)
    rows = [{"sweeps": runs, "workers killed": counts["workers"], "drivers killed": counts["driver"]}]
    report("ray_sweep_kill", [rows[0] | {"equal reports": equal}])


def makespan() -> None:
    """Writes results/ray_sweep_makespan.json and docs/sweep_makespan.png."""
    from loraplus_jax.settings.parsing import parse_settings
    from loraplus_jax.sweep.makespan import schedule
    from loraplus_jax.sweep.method_comparison import method_run
    from loraplus_jax.sweep.settings import SweepRun

    steps, seconds_of_run = 300, 600.0
    recipe = Path(__file__).parents[1] / "configs/quickstart_sweep.yaml"
    base = parse_settings(recipe, [*SIXTEEN, "--sweep.methods", f"[{','.join(EIGHT)}]"], SweepRun)
    one = parse_settings(recipe, SIXTEEN, SweepRun)
    cases = {
        "λ sweep: LoRA and LoRA+, 16 settings each": [one],
        "8 methods, 16 settings each": [method_run(base, name) for name in EIGHT],
    }

    def seconds(sweep: int, unit: Any) -> float:
        return (unit.stops[-1] - unit.start) / steps * len(unit.members) * seconds_of_run

    rows, found = [], {}
    for label, runs in cases.items():
        for preparation in (0.0, 60.0):
            for workers in (1, 8, 64):
                plan = schedule(runs, steps, 1, workers, seconds, preparation)
                found[label, preparation, workers] = plan
                rows.append(
                    {
                        "sweep": label,
                        "preparation, s": preparation,
                        "workers": workers,
                        "units": len(plan.spans),
                        "makespan, min": round(plan.makespan / 60, 1),
                        "longest chain, min": round(plan.chain / 60, 1),
                        "bound, min": round(plan.bound / 60, 1),
                        "makespan / bound": round(plan.makespan / plan.bound, 3),
                    }
                )
    draw({label: found[label, 60.0, 64] for label in cases})
    report("ray_sweep_makespan", rows, seconds_of_run=seconds_of_run, steps=steps)


def draw(plans: dict[str, Any]) -> None:
    """A bar for each unit, a line for each worker."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(plans), figsize=(11, 5), sharey=True)
    for axis, (label, plan) in zip(axes, plans.items(), strict=True):
        for span in plan.spans:
            color = plt.get_cmap("tab10")(span.sweep % 10)
            shade = 1.0 if span.unit.stage == "report" else 0.55 if span.unit.start else 0.3
            left, width = span.start / 60, (span.end - span.start) / 60
            axis.barh(span.worker, width, left=left, height=0.9, color=color, alpha=shade, linewidth=0)
        axis.axvline(plan.bound / 60, color="black", linestyle="--", label=f"bound {plan.bound / 60:.1f} min")
        axis.set_title(f"{label}: {plan.makespan / 60:.1f} min", fontsize=10)
        axis.set_xlabel("minutes")
        axis.legend(loc="upper right")
    axes[0].set_ylabel("worker")
    figure.tight_layout()
    path = Path(__file__).parents[1] / "docs/sweep_makespan.png"
    figure.savefig(path, dpi=110)
    print(path)


def main() -> None:
    what = ["time", "kill", "makespan"]
    options = parse_options(
        __doc__, what=what, rounds=1, kills=20, driver_kills=5, steps=1000, hidden=64, seed=0
    )
    if options.what == "time":
        timing(options.rounds, options.steps, options.hidden)
    elif options.what == "kill":
        kill(options.kills, options.driver_kills, options.steps, options.hidden, options.seed)
    else:
        makespan()


if __name__ == "__main__":
    main()
