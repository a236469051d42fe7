"""What does one training step on a packed base cost, beside the same step on a float32 one and beside qwix?

    python benchmarks/quantized.py                              # SmolLM2-135M's shape, 2 CPU cores, float32
    python benchmarks/quantized.py --layers 4 --name quick      # a quick look, in a file of its own

Measured as in `step_time.py`. All products of the layers are packed, and the tied embedding stays float32. Memory
is the highest resident set of a process from its start, loading included.
"""

import tempfile
from pathlib import Path

import numpy as np
from common import parse_options, report, use_backend
from processes import make_job, peak_memory, run_processes, time_and_memory
from step_time_model import SMOLLM2, write_model

RUNS = {
    "float32": {"implementation": "here"},
    "nf4": {"implementation": "here", "quantize": "nf4"},
    "int8": {"implementation": "here", "quantize": "int8"},
    "qwix nf4": {"implementation": "qwix", "quantize": "nf4"},
    "qwix int8": {"implementation": "qwix", "quantize": "int8"},
}


def main() -> None:
    layers = SMOLLM2["num_hidden_layers"]
    options = parse_options(__doc__, backend=("cpu", "gpu"), shape="8x64", rounds=15, layers=layers, name="")
    use_backend(options.backend)
    with tempfile.TemporaryDirectory() as directory:
        config = SMOLLM2 | {"num_hidden_layers": options.layers}
        write_model(Path(directory), config, rank=8)
        job = make_job(directory, config, options.shape, backend=options.backend)
        runs = run_processes({name: {**job, **settings} for name, settings in RUNS.items()}, options.rounds)
    wide, rows = runs["float32"], []
    for name, run in runs.items():
        if "failed" in run:
            rows.append({"run": name, "step, s": run["failed"]})
            continue
        time, memory = time_and_memory(run, wide)
        weights = run["about"]["weights_bytes"]
        rows.append(
            {
                "run": name,
                "step, s": f"{np.median(run['seconds']):.3f}",
                "time / float32": f"{time:.3f}",
                "peak, MB": f"{peak_memory(run) / 1e6:,.0f}",
                "peak / float32": f"{memory:.3f}",
                "weights, MB": f"{weights / 1e6:,.0f}",
                "weights / float32": f"{weights / wide['about']['weights_bytes']:.3f}",
                "last loss": f"{run['loss'][-1]:.5f}",
            }
        )
    name = options.name or f"quantized_{options.backend}"
    report(name, rows, shape=options.shape, unprinted={"runs": runs})


if __name__ == "__main__":
    main()
