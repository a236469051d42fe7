"""A training step of variant dora beside one of lora, here and in PEFT: compiled FLOPs, and time on two CPU cores.

    python benchmarks/dora.py
    python benchmarks/dora.py --layers 4 --rounds 5 --name quick_dora

SmolLM2-135M's shape with random weights, adapters on q, k, v and o, as `step_time.py` has them. Each step is a
process of its own; a step of one is followed by a step of the next, in turning order, and ratios are medians over
the rounds' own ratios. The losses of PEFT's steps and ours are compared: they agree only if all did the same.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import median_ratio, report
from step_time import compile_only, environment, job_of, run_of, start
from step_time_model import SMOLLM2, write_model
from step_time_processes import take_turns

from loraplus_jax.adapter.config import Variant

GOAL = 1.10
"""A step of dora costs at most so much of one of lora."""
VARIANTS: tuple[Variant, ...] = ("lora", "dora")
SETTINGS = {"remat": "dots", "unroll": False, "attention": "auto", "loss": "chunked", "chunk": 128}
# XLA counts the body of a loop once, so FLOPs are those of straight code.
STRAIGHT = {"remat": "none", "unroll": True, "attention": "xla", "loss": "chunked", "chunk": 10**9}


def measure(options: argparse.Namespace, directory: str, config: dict[str, Any]) -> dict[str, dict]:
    """All runs by implementation and variant."""
    job, processes, runs = job_of(options, config, directory, options.shape), {}, {}
    try:
        for implementation in ("here", "peft"):
            for variant in VARIANTS:
                told = {**job, **SETTINGS, "implementation": implementation, "variant": variant}
                process = start(sys.executable, told, environment(options, directory))
                if process.failed or process.missing:
                    raise SystemExit(process.failed or f"{process.missing} is not installed")
                processes[f"{implementation} {variant}"] = process
        take_turns(processes, options.warmup, float("inf"))
        starts = {name: process.ask("memory") for name, process in processes.items()}
        for process in processes.values():
            process.ask("forget")
            process.start_again()
        take_turns(processes, options.rounds, float("inf"))
        for name, process in processes.items():
            runs[name] = run_of(process, starts[name], process.ask("memory"))
    finally:
        for process in processes.values():
            process.close()
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", default="8x64", help="batch x tokens")
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=11)
    add("--warmup", type=int, default=2)
    add("--layers", type=int, default=SMOLLM2["num_hidden_layers"])
    add("--flops", action=argparse.BooleanOptionalAction, default=True)
    add("--name", default="dora", help="of the file in results/")
    options = parser.parse_args()
    options.backend, options.dtype, options.compile = "cpu", "float32", "none"
    options.python = sys.executable
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    config, flops = SMOLLM2 | {"num_hidden_layers": options.layers}, {}
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory), config, 8)
        if options.flops:
            job = job_of(options, config, directory, options.shape) | STRAIGHT
            flops = {name: compile_only(options, {**job, "variant": name})["flops"] for name in VARIANTS}
        runs = measure(options, directory, config)
    rows = []
    for implementation in ("here", "peft"):
        lora, dora = (runs[f"{implementation} {variant}"] for variant in VARIANTS)
        row = {"implementation": implementation}
        row["dora / lora, time"] = f"{median_ratio(dora['seconds'], lora['seconds']):.3f}"
        row["dora / lora, peak memory"] = f"{dora['peak_bytes'] / lora['peak_bytes']:.3f}"
        known = implementation == "here" and flops
        row["dora / lora, FLOPs"] = f"{flops['dora'] / flops['lora']:.3f}" if known else ""
        rows.append(row)
    for variant in VARIANTS:
        ours, theirs = (runs[f"{name} {variant}"]["last"]["loss"] for name in ("here", "peft"))
        if abs(ours - theirs) > 1e-3 * abs(theirs):
            raise SystemExit(f"{variant}: the losses differ, {ours} here and {theirs} in PEFT")
    report(options.name, rows, goal=GOAL, shape=options.shape, flops=flops, unprinted={"runs": runs})


if __name__ == "__main__":
    main()
