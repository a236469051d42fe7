"""Kills a training run again and again and compares what it ends with, bit for bit, to a run that was left alone.

    python benchmarks/kill.py --kills 45

A small random BERT on made-up texts, with dropout, shuffling and accumulation on; rows, evaluations and saves
fall on different steps. First come all the chosen points of `WALKS`, each of which must be met, then random times.
After each kill (kill -9) the same command is given again, and after a few the run is left to finish.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from common import parse_options, report

sys.path.insert(0, str(Path(__file__).parents[1]))

# Runs the command line with a trap: the process kills itself at the n-th call of a function, before it, after it,
# or so many milliseconds after it began.
TRAPPED = """
import os, signal, sys, threading
target, when, nth = sys.argv[1], sys.argv[2], int(sys.argv[3])
from loraplus_jax.cli import commands as cli
from loraplus_jax.training import metrics_log, run_directory
from loraplus_jax.training import setup, trainer
owner, name = target.rsplit(".", 1)
place = eval(owner)
original, calls = getattr(place, name), []
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
def trapped(*args, **kwargs):
    calls.append(1)
    met = len(calls) == nth
    if met and when == "before":
        kill()
    if met and when.endswith(" ms into"):
        threading.Timer(float(when.split()[0]) / 1000, kill).start()
    result = original(*args, **kwargs)
    if met and when == "after":
        kill()
    return result
setattr(place, name, trapped)
sys.exit(cli.main(sys.argv[4:]))
"""
# Each list is one run, killed at these points in turn: before, in and after start-up, rows, steps, evaluations,
# saves and the end. "After" trainer.save is in the middle of a save: the arrays are written in the background.
WALKS = [
    [
        ("setup.load_params", "before", 1),
        ("run_directory.open_manager", "before", 1),
        ("run_directory.open_manager", "after", 1),
        ("trainer.evaluate", "before", 1),
        ("trainer.evaluate", "after", 1),
        ("trainer.RunLog.write", "before", 1),
        ("trainer.save_checkpoint", "before", 1),
    ],
    [
        ("trainer.save_checkpoint", "after", 1),
        ("trainer.save_checkpoint", "after", 2),
        ("run_directory.restore_checkpoint", "after", 1),
        ("trainer.shard_batch", "after", 1),
        ("trainer.RunLog.write", "before", 2),
        ("trainer.RunLog.write", "after", 2),
        ("trainer.save_checkpoint", "after", 3),
    ],
    [
        ("trainer.save_checkpoint", "5 ms into", 2),
        ("trainer.save_checkpoint", "20 ms into", 2),
        ("trainer.save_checkpoint", "60 ms into", 2),
        ("trainer.evaluate", "before", 2),
        ("trainer.evaluate", "after", 2),
        ("trainer.RunLog.sync", "after", 1),
    ],
    [
        ("trainer.save_checkpoint", "after", 9),
        ("trainer.save_checkpoint", "before", 1),
        ("trainer.Trainer.finish", "before", 1),
        ("trainer.save_adapter", "before", 1),
        ("trainer.save_adapter", "after", 1),
        ("trainer.draw_loss", "before", 1),
        ("trainer.draw_loss", "after", 1),
        ("trainer.Trainer.write_summary", "before", 1),
    ],
]
# Small programs are kept and are compiled in a hurry: nearly all of a run's time is its start.
QUICK = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}


def make_world(directory: Path) -> Path:
    """A model, texts and a config; returns the config's path."""
    from tests.integration import conftest

    world = conftest.World(directory)
    world.model.mkdir()
    conftest._write_model(world.model)
    world.write_rows("texts.csv", conftest._texts(160))
    content = {
        "model": {"path": str(world.model), "dropout": 0.1},
        "data": {"path": str(world.data), "max_length": 12},
        "lora": {"target_modules": ["query", "value"], "rank": 4, "lr_ratio": 4, "dropout": 0.1},
        "optimizer": {"learning_rate": 5e-3, "max_grad_norm": 1.0, "weight_decay": 0.01},
        "train": {"steps": 60, "batch_size": 32, "accumulate": 2, "eval_every": 7, "log_every": 4},
        "output_dir": "unset",
    }
    world.config.write_text(yaml.safe_dump(content))
    return world.config


def end_state(out: Path) -> dict[str, object]:
    """All that must be equal: adapter, metrics without times, every array of the newest checkpoint, results."""
    import orbax.checkpoint as ocp

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    newest = max(int(path.name) for path in (out / "checkpoints").iterdir())
    arrays = ocp.StandardCheckpointer().restore((out / "checkpoints" / str(newest) / "state").absolute())
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    return {
        "adapter": (out / "adapter/adapter.safetensors").read_bytes(),
        "metrics": [{k: v for k, v in row.items() if k != "steps_per_second"} for row in rows],
        "summary": {**summary, "seconds": 0},
        "checkpoint": newest,
        **{jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves},
    }


def run(command: list[str], seconds: float | None = None) -> int:
    """The exit code; negative is the signal. With `seconds` the process is killed by then."""
    environment = {**os.environ, **QUICK}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment) as process,
    ):
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if code not in (0, -9):
            errors.seek(0)
            print(errors.read()[-2000:])
        return code


def main() -> None:
    options = parse_options(__doc__, kills=45, seed=0)
    rng = random.Random(options.seed)
    directory = Path(tempfile.mkdtemp(prefix="kill-"))
    config = make_world(directory)
    plain = [sys.executable, "-m", "loraplus_jax.cli"]

    def arguments(name: str) -> list[str]:
        return ["train", str(config), "--output_dir", str(directory / name)]

    def killed_at_points(name: str, points: list[tuple[str, str, int]]) -> list[str]:
        for target, when, nth in points:
            code = run([sys.executable, "-c", TRAPPED, target, when, str(nth), *arguments(name)])
            if code != -9:
                raise SystemExit(f"{name}: exit code {code}, and never came to {when} {target} ({nth})")
        return [f"{when} {target} ({nth})" for target, when, nth in points]

    def killed_at_random(name: str) -> list[str]:
        hits = []
        while len(hits) < 4 and not (directory / name / "summary.json").exists():
            share = rng.uniform(0.2, 1.0)
            code = run([*plain, *arguments(name)], share * whole)
            if code not in (0, -9):
                raise SystemExit(f"{name}: exit code {code} at {share:.0%}")
            hits += [f"at {share:.0%} of a run's time"] if code == -9 else []
        return hits

    def finished(name: str, hits: list[str]) -> dict[str, object]:
        done = (directory / name / "summary.json").exists()  # it may be killed between its end and its exit
        code = 0 if done else run([*plain, *arguments(name)])
        found = end_state(directory / name) if code == 0 else {}
        odd = sorted(key for key in expected if found.get(key) != expected[key])
        row = {
            "run": name,
            "kills": len(hits),
            "where": "; ".join(hits),
            "differs": ", ".join(odd) or "nothing",
        }
        print(row, flush=True)
        return row

    run([*plain, *arguments("warm")])  # fills the compilation cache
    start = time.perf_counter()
    assert run([*plain, *arguments("straight")]) == 0
    whole = time.perf_counter() - start
    expected = end_state(directory / "straight")
    rows = []
    for number, points in enumerate(WALKS, 1):
        rows.append(finished(f"points{number}", killed_at_points(f"points{number}", points)))
    while (kills := sum(int(str(row["kills"])) for row in rows)) < options.kills:
        name = f"random{len(rows) + 1 - len(WALKS)}"
        rows.append(finished(name, killed_at_random(name)))
    same = sum(row["differs"] == "nothing" for row in rows)
    report("kill", rows, kills=kills, runs=len(rows), identical=same, points=sum(map(len, WALKS)))
    sys.exit(same != len(rows))


if __name__ == "__main__":
    main()
