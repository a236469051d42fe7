"""How do step time, memory and compile time grow with depth, sequence length and rank?

    python benchmarks/step_cost.py

One of the three is varied at a time, and the cases of one sweep are interleaved in this process. The vocabulary is
smaller than SmolLM2's, so that the layers are what is measured.
"""

import tempfile
from pathlib import Path

import numpy as np
from common import interleaved, parse_options, report, use_backend
from processes import make_job
from step_time_model import SMOLLM2, write_model
from workers import here

MIDDLE = {"layers": 4, "tokens": 128, "rank": 8}
VARIED = {"layers": (2, 4, 8), "tokens": (64, 128, 256, 512), "rank": (1, 8, 32, 128)}


def main() -> None:
    options = parse_options(__doc__, backend=("cpu", "gpu"), rounds=5, name="")
    use_backend(options.backend)
    rows = []
    for varied, values in VARIED.items():
        cases, workers = [MIDDLE | {varied: value} for value in values], []
        for case in cases:
            config = SMOLLM2 | {"num_hidden_layers": case["layers"], "vocab_size": 4096}
            with tempfile.TemporaryDirectory() as directory:
                write_model(Path(directory), config, case["rank"])
                sizes = {"rank": case["rank"], "backend": options.backend}
                workers.append(here(make_job(directory, config, f"4x{case['tokens']}", **sizes)))
        seconds = interleaved({n: worker.step for n, worker in enumerate(workers)}, options.rounds)
        for number, (case, worker) in enumerate(zip(cases, workers, strict=True)):
            about = worker.about
            found = {
                "step, s": round(float(np.median(seconds[number])), 4),
                "temporaries, MB": round(about["temp_bytes"] / 1e6, 1),
                "trace and compile, s": round(about["trace_s"] + about["compile_s"], 2),
            }
            rows.append({"varied": varied, **case, **found})
    report(options.name or f"step_time_cost_{options.backend}", rows, batch=4, vocabulary=4096)


if __name__ == "__main__":
    main()
