"""A training step of the same adapters on the same Llama, beside other packages', on quantized weights, or as DoRA.

    python benchmarks/step_time.py                            # PEFT on torch, qwix and tunix; 2 CPU cores, float32
    python benchmarks/step_time.py --layers 4 --name quick    # a quick look, in a file of its own
    python benchmarks/step_time.py --backend gpu              # bfloat16, torch.compile for PEFT
    python benchmarks/step_time.py --compare quantized --shapes 8x64
    python benchmarks/step_time.py --compare dora --shapes 8x64

SmolLM2-135M's shape with random weights, which all load from one file in Hugging Face's names, as they load the
adapters (q, k, v, o; rank 8) and take the same batch. Each run is a process of its own; in a round each does a
step, in random order, and ratios are medians over the rounds' own ratios. The losses of the first and the last step
are compared: they are equal only if all did the same work.

Peak memory is the process's highest resident set (VmHWM) from its start on a CPU, and what the framework's
allocator reached on a GPU. No network is used. What is not installed is left out. With `quantized`, the weights
of all products of the layers are quantized; the tied embedding is not.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from common import parse_options, report, use_backend
from processes import peak_memory, run_processes, smollm2, time_and_memory
from step_time_model import SMOLLM2, ideal_flops
from workers import here

COMPARED: dict[str, dict[str, dict[str, str]]] = {
    "peers": {"here": {}, **{name: {"implementation": name} for name in ("peft", "qwix", "tunix")}},
    "quantized": {
        "float32": {},
        "nf4": {"quantize": "nf4"},
        "int8": {"quantize": "int8"},
        "qwix nf4": {"implementation": "qwix", "quantize": "nf4"},
        "qwix int8": {"implementation": "qwix", "quantize": "int8"},
    },
    "dora": {
        f"{name} {variant}": {"implementation": name, "variant": variant}
        for name in ("here", "peft")
        for variant in ("lora", "dora")
    },
}
"""By comparison and run, the settings of its job."""
STRAIGHT = {"unroll": True, "remat": "none", "attention": "xla", "chunk": 10**9}
"""Settings without a loop: XLA counts the body of a loop once."""


def baseline(compare: str, name: str) -> str:
    """The run whose time and memory a run's are divided by."""
    return {"peers": "peft", "quantized": "float32"}.get(compare, name.replace("dora", "lora"))


def rows_of(compare: str, shape: str, runs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """The table's lines."""
    rows = []
    for name, run in runs.items():
        row, base = {"shape": shape, "run": name}, baseline(compare, name)
        if "failed" in run:
            rows.append({**row, "step, s": run["failed"]})
            continue
        row["step, s"] = f"{np.median(run['seconds']):.4f}"
        row["peak, MB"] = f"{peak_memory(run) / 1e6:,.0f}"
        row["to first step, s"] = f"{run['to_first_step_s']:.1f}"
        row |= {"first loss": f"{run['first']['loss']:.6f}", "last loss": f"{run['loss'][-1]:.6f}"}
        if "weights_bytes" in run["about"]:
            row["weights, MB"] = f"{run['about']['weights_bytes'] / 1e6:,.0f}"
        if "seconds" in runs.get(base, {}):
            time, memory = time_and_memory(run, runs[base])
            label = {"peft": "PEFT"}.get(base, base)
            row |= {f"time / {label}": f"{time:.3f}", f"memory / {label}": f"{memory:.3f}"}
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
        compare=tuple(COMPARED),
        shapes="8x64,2x512",
        rounds=21,
        layers=30,
        name="",
    )
    use_backend(options.backend)
    on_gpu = options.backend == "gpu"
    settings: dict[str, Any] = {"backend": options.backend, "implementation": "here"}
    settings |= {"compile": "default", "chunk": 512} if on_gpu else {}
    name = f"{options.compare.replace('peers', 'step_time')}_{options.backend}"
    config, rows, kept = SMOLLM2 | {"num_hidden_layers": options.layers}, [], {}
    with smollm2(options.layers) as make_job:
        for shape in options.shapes.split(","):
            job = make_job(shape, **settings)
            jobs = {run: job | own for run, own in COMPARED[options.compare].items()}
            runs = run_processes(jobs, options.rounds)
            rows += rows_of(options.compare, shape, runs)
            notes = {"runs": runs}
            if options.compare != "quantized":
                # DoRA's losses are compared among themselves.
                same = "lora" if options.compare == "dora" else ""
                parts = [{n: r for n, r in runs.items() if (same in n) is equal} for equal in (True, False)]
                notes["losses_differ"] = max(losses_differ(part) for part in parts if part)
            if options.compare != "quantized" and not on_gpu:  # the count is the same there
                ideal = sum(ideal_flops(config, *map(int, shape.split("x")), rank=8).values())
                ours = {run: own for run, own in jobs.items() if own["implementation"] == "here"}
                flops = {run: here(own | STRAIGHT).about["flops"] / ideal for run, own in ours.items()}
                notes["flops_over_ideal"] = flops
            kept |= {f"{shape}, {key}": value for key, value in notes.items()}
            shown = {key: value for key, value in kept.items() if not key.endswith("runs")}
            report(options.name or name, rows, options=vars(options), **shown, unprinted=kept)
    differ = max((value for key, value in kept.items() if key.endswith("losses_differ")), default=0.0)
    if differ > {"peers": 1e-2 if on_gpu else 1e-4}.get(options.compare, 1e-3):
        raise SystemExit("the losses differ: these runs did not do the same work")


if __name__ == "__main__":
    main()
