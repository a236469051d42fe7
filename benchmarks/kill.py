"""Kills a training run again and again and compares what it ends with, bit for bit, to a run that was left alone.

    python benchmarks/kill.py --kills 45

A small random BERT on made-up texts, with dropout, shuffling and accumulation on; rows, evaluations and saves
fall on different steps. Half of the kills (kill -9) come at chosen points, the other half at random times. After
each the same command is given again.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from common import report

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/integration"))

# Runs the command line with a trap: the process kills itself at the n-th call of a function, before or after it.
TRAPPED = """
import os, signal, sys
target, when, nth = sys.argv[1], sys.argv[2], int(sys.argv[3])
from loraplus_jax.train import cli, lifecycle, loop, prepare, report
owner, name = target.rsplit(".", 1)
place = eval(owner)
original, calls = getattr(place, name), []
def trapped(*args, **kwargs):
    calls.append(1)
    if len(calls) == nth and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*args, **kwargs)
    if len(calls) == nth and when == "after":
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(place, name, trapped)
sys.exit(cli.main(sys.argv[4:]))
"""
# "after" loop.save is in the middle of a save: the arrays are copied and being written in the background.
POINTS = [
    ("prepare.load_params", "before"),
    ("loop.open_manager", "after"),
    ("loop.restore", "after"),
    ("loop.evaluate", "before"),
    ("loop.evaluate", "after"),
    ("loop.save", "before"),
    ("loop.save", "after"),
    ("loop.RunLog.write", "before"),
    ("loop.RunLog.write", "after"),
    ("loop.place", "after"),
    ("loop.save_adapter", "before"),
    ("loop.save_adapter", "after"),
    ("loop.draw_loss", "before"),
    ("loop.Trainer.write_summary", "before"),
]


def make_world(directory: Path) -> Path:
    """A model, texts and a config; returns the config's path."""
    import conftest

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
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors) as process,
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=45)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    directory = Path(tempfile.mkdtemp(prefix="kill-"))
    config = make_world(directory)

    def arguments(name: str) -> list[str]:
        return ["train", str(config), "--output_dir", str(directory / name)]

    plain = [sys.executable, "-m", "loraplus_command"]
    run([*plain, *arguments("warm")])  # fills the compilation cache
    start = time.perf_counter()
    assert run([*plain, *arguments("straight")]) == 0
    whole = time.perf_counter() - start
    expected = end_state(directory / "straight")
    rows, kills, number = [], 0, 0
    while kills < options.kills:
        number += 1
        name, done, hits = f"run{number}", False, []
        for _ in range(6):  # so many attempts to kill one run, then it is left to finish
            if done := (directory / name / "summary.json").exists():
                break  # it was killed between its end and its exit
            if rng.random() < 0.5:
                (target, when), nth = rng.choice(POINTS), rng.choice((1, 2, 3, 5))
                command = [sys.executable, "-c", TRAPPED, target, when, str(nth), *arguments(name)]
                code, label = run(command), f"{when} {target} ({nth})"
            else:
                seconds = rng.uniform(0.2, 1.0) * whole
                code, label = run([*plain, *arguments(name)], seconds), f"at {seconds:.1f} s"
            if code == -9:
                kills += 1
                hits.append(label)
            elif code == 0:
                done = True
                break
            else:
                raise SystemExit(f"{name}: exit code {code} at {label}")
        code = 0 if done else run([*plain, *arguments(name)])
        found = end_state(directory / name) if code == 0 else {}
        odd = sorted(key for key in expected if found.get(key) != expected[key])
        rows.append(
            {
                "run": name,
                "kills": len(hits),
                "where": "; ".join(hits),
                "differs": ", ".join(odd) or "nothing",
            }
        )
        print(rows[-1], flush=True)
    same = sum(row["differs"] == "nothing" for row in rows)
    report("kill", rows, kills=kills, runs=len(rows), identical=same, straight_seconds=round(whole, 1))
    sys.exit(same != len(rows))


if __name__ == "__main__":
    main()
