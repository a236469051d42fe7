"""What does a training step of variant dora cost beside one of lora, here and in PEFT?

    python benchmarks/dora.py
    python benchmarks/dora.py --layers 4 --rounds 5 --name quick

SmolLM2-135M's shape with random weights and adapters on q, k, v and o, on two CPU cores, measured as in
`step_time.py`. The losses of PEFT's steps and ours are compared: they agree only if all did the same.
"""

import tempfile
from pathlib import Path

from common import parse_options, report, use_backend
from processes import make_job, run_processes, time_and_memory
from step_time import STRAIGHT, losses_differ
from step_time_model import SMOLLM2, write_model
from workers import here

VARIANTS = ("lora", "dora")


def main() -> None:
    layers = SMOLLM2["num_hidden_layers"]
    options = parse_options(__doc__, shape="8x64", rounds=11, layers=layers, name="dora")
    use_backend("cpu")
    with tempfile.TemporaryDirectory() as directory:
        config = SMOLLM2 | {"num_hidden_layers": options.layers}
        write_model(Path(directory), config, rank=8)
        job = make_job(directory, config, options.shape)
        flops = {name: here({**job, **STRAIGHT, "variant": name}).about["flops"] for name in VARIANTS}
        pairs = [(name, variant) for name in ("here", "peft") for variant in VARIANTS]
        jobs = {f"{n} {v}": {**job, "implementation": n, "variant": v} for n, v in pairs}
        runs = run_processes(jobs, options.rounds)
    if reasons := [run["failed"] for run in runs.values() if "failed" in run]:
        raise SystemExit(reasons[0])
    rows = []
    for name in ("here", "peft"):
        time, memory = time_and_memory(runs[f"{name} dora"], runs[f"{name} lora"])
        row = {"implementation": name, "dora / lora, time": f"{time:.3f}"}
        rows.append({**row, "dora / lora, peak memory": f"{memory:.3f}"})
    rows[0]["dora / lora, FLOPs"] = f"{flops['dora'] / flops['lora']:.3f}"
    report(options.name, rows, shape=options.shape, flops=flops, unprinted={"runs": runs})
    for variant in VARIANTS:
        if losses_differ({name: run for name, run in runs.items() if name.endswith(variant)}) > 1e-3:
            raise SystemExit(f"{variant}: the losses here and in PEFT differ")


if __name__ == "__main__":
    main()
