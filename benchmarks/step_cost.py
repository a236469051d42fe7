"""How do step time, memory and compile time grow with depth, sequence length and rank?

    python benchmarks/step_cost.py

One of the three is varied at a time, and the cases of one sweep are interleaved in this process. The vocabulary is
smaller than SmolLM2's, so that the layers are what is measured.
"""

import numpy as np
from common import interleaved, parse_options, report, use_backend
from processes import smollm2
from workers import here

MIDDLE = {"layers": 4, "tokens": 128, "rank": 8}
VARIED = {"layers": (2, 4, 8), "tokens": (64, 128, 256, 512), "rank": (1, 8, 32, 128)}


def main() -> None:
    options = parse_options(__doc__, rounds=5, name="step_time_cost_cpu")
    use_backend("cpu")
    rows = []
    for varied, values in VARIED.items():
        cases, workers = [MIDDLE | {varied: value} for value in values], []
        for case in cases:
            with smollm2(case["layers"], case["rank"], vocab_size=4096) as make_job:
                workers.append(here(make_job(f"4x{case['tokens']}")))
        seconds = interleaved({n: worker.step for n, worker in enumerate(workers)}, options.rounds)
        for number, (case, worker) in enumerate(zip(cases, workers, strict=True)):
            about = worker.about
            found = {
                "step, s": round(float(np.median(seconds[number])), 4),
                "temporaries, MB": round(about["temp_bytes"] / 1e6, 1),
                "trace and compile, s": round(about["trace_s"] + about["compile_s"], 2),
            }
            rows.append({"varied": varied, **case, **found})
    report(options.name, rows, batch=4, vocabulary=4096)


if __name__ == "__main__":
    main()
