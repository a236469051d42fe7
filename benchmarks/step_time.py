"""One training step of the same adapters on the same Llama: here, in PEFT on torch, in qwix, and in tunix.

    python benchmarks/step_time.py                            # 2 CPU cores, float32
    python benchmarks/step_time.py --layers 4 --name quick    # a quick look, in a file of its own
    python benchmarks/step_time.py --backend gpu              # bfloat16, torch.compile for PEFT

SmolLM2-135M's shape with random weights, which all load from one file in Hugging Face's names, as they load the
adapters (q, k, v, o; rank 8) and take the same batch. Each implementation is a process of its own; in a round each
does a step, in random order, and ratios are medians over the rounds' own ratios. The losses of the first and the
last step are compared: they are equal only if all did the same work.

Peak memory is the process's highest resident set (VmHWM) from its start on a CPU, and what the framework's
allocator reached on a GPU. No network is used. What is not installed is left out.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from common import parse_options, report, use_backend
from processes import make_job, peak_memory, run_processes, time_and_memory
from step_time_model import SMOLLM2, ideal_flops, write_model
from workers import here

STRAIGHT = {"unroll": True, "remat": "none", "attention": "xla", "chunk": 10**9}
"""Settings without a loop: XLA counts the body of a loop once."""


def rows_of(shape: str, runs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """The table's lines."""
    rows = []
    for name, run in runs.items():
        row = {"shape": shape, "run": name}
        if "failed" in run:
            rows.append({**row, "step, s": run["failed"]})
            continue
        row["step, s"] = f"{np.median(run['seconds']):.4f}"
        row["peak, MB"] = f"{peak_memory(run) / 1e6:,.0f}"
        row["to first step, s"] = f"{run['to_first_step_s']:.1f}"
        row |= {"first loss": f"{run['first']['loss']:.6f}", "last loss": f"{run['loss'][-1]:.6f}"}
        if "seconds" in runs.get("peft", {}):
            time, memory = time_and_memory(run, runs["peft"])
            row |= {"time / PEFT": f"{time:.3f}", "memory / PEFT": f"{memory:.3f}"}
        rows.append(row)
    return rows


def losses_differ(runs: Mapping[str, Mapping[str, Any]]) -> float:
    """The largest relative difference of first or last losses between two runs; infinite if one is not finite."""
    pairs = [(run["first"]["loss"], run["loss"][-1]) for run in runs.values() if "loss" in run]
    if not np.all(np.isfinite(pairs)):
        return float("inf")
    return max((max(losses) - min(losses)) / min(losses) for losses in zip(*pairs, strict=True))


def main() -> None:
    options = parse_options(
        __doc__,
        backend=("cpu", "gpu"),
        shapes="8x64,2x512",
        peers="peft,qwix,tunix",
        rounds=21,
        layers=SMOLLM2["num_hidden_layers"],
        name="",
    )
    use_backend(options.backend)
    on_gpu = options.backend == "gpu"
    settings: dict[str, Any] = {"backend": options.backend}
    settings |= {"compile": "default", "chunk": 512} if on_gpu else {}
    config, rows, kept = SMOLLM2 | {"num_hidden_layers": options.layers}, [], {}
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory), config, rank=8)
        for shape in options.shapes.split(","):
            job = make_job(directory, config, shape, **settings)
            jobs = {name: {**job, "implementation": name} for name in ["here", *options.peers.split(",")]}
            if on_gpu:  # whether blocked attention, which is best on a CPU, is the best one there
                jobs["here, xla attention"] = {**jobs["here"], "attention": "xla"}
            runs = run_processes(jobs, options.rounds)
            rows += rows_of(shape, runs)
            kept[shape] = {"runs": runs, "losses_differ": losses_differ(runs)}
            if not on_gpu:  # the count is the same there
                ideal = sum(ideal_flops(config, *map(int, shape.split("x")), rank=8).values())
                kept[shape]["flops_over_ideal"] = here(job | STRAIGHT).about["flops"] / ideal
            name = options.name or f"step_time_{options.backend}"
            notes = {
                f"{shape}, {key}": value for shape, found in kept.items() for key, value in found.items()
            }
            shown = {key: value for key, value in notes.items() if not key.endswith("runs")}
            report(name, rows, options=vars(options), **shown, unprinted=notes)
    if max(found["losses_differ"] for found in kept.values()) > (1e-2 if on_gpu else 1e-4):
        raise SystemExit("the losses differ: these runs did not do the same work")


if __name__ == "__main__":
    main()
