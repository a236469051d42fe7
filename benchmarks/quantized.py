"""One training step on a packed base, beside the same step on a float32 one and beside qwix.

    python benchmarks/quantized.py                # SmolLM2-135M's shape, 8 x 64 tokens, 2 CPU cores, float32
    python benchmarks/quantized.py --layers 4     # a quick look

The runs are those of `step_time.py`: one process each, the same weights, factors and batch, a step of one followed
by a step of the next. All products of the layers are packed, and the tied embedding stays float32. Memory is the
highest resident set of a process from its start, loading included. Last, the gradients of all factors on the packed
base are compared with those on an array of the packed values.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import median_ratio, report, table
from step_time import environment, job_of
from step_time_model import SMOLLM2, write_model
from step_time_processes import Process, take_turns
from step_time_report import goal
from step_time_workers import _loss_sum, load_llama

RUNS = {
    "float32": {"implementation": "here"},
    "nf4": {"implementation": "here", "quantize": "nf4"},
    "int8": {"implementation": "here", "quantize": "int8"},
    "qwix nf4": {"implementation": "qwix", "quantize": "nf4"},
    "qwix int8": {"implementation": "qwix", "quantize": "int8"},
}
BITS_GOAL = {"nf4": 4.13, "int8": 8.1}
WEIGHTS_GOAL, MEMORY_GOAL, TIME_GOAL, GRADIENT_GOAL = 0.33, 0.80, 1.2, 1e-5


def measure(options: argparse.Namespace, job: Mapping[str, Any], directory: str) -> dict[str, dict[str, Any]]:
    """All runs by name; a note in place of one that cannot run here."""
    processes, runs = {}, {}
    try:
        for name, more in RUNS.items():
            python = options.qwix_python if name.startswith("qwix") else sys.executable
            process = Process(python, {**job, **more}, environment(options, directory))
            if why := process.failed or (process.missing and f"{process.missing} is not installed"):
                process.close()
                runs[name] = {"no run": why}
                print(f"{name}: {why}", flush=True)
            else:
                processes[name] = process
        take_turns(processes, options.warmup, float("inf"))
        for process in processes.values():
            process.start_again()
        take_turns(processes, options.rounds, float("inf"))
        for name, process in processes.items():
            runs[name] = {
                "seconds": process.seconds,
                "peak_bytes": process.ask("memory")["VmHWM"],
                "loss": process.replies[-1]["loss"],
                **process.ready["about"],
            }
    finally:
        for process in processes.values():
            process.close()
    return {name: runs[name] for name in RUNS}


def bits_and_gradients(job: Mapping[str, Any], kind: str) -> tuple[float, float]:
    """Bits of a packed value, and the largest difference of a factor's gradient, over its largest value."""
    from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora
    from loraplus_jax.quantization import is_packed

    base, params, batch = load_llama({**job, "quantize": kind})
    packed = [leaf for leaf in jax.tree.leaves(params, is_leaf=is_packed) if is_packed(leaf)]
    live = sum(part.addressable_data(0).nbytes for leaf in packed for part in leaf.parts.values())
    model = apply_lora_plus(
        base, LoRAPlusConfig(target_modules=("q_proj", "k_proj", "v_proj", "o_proj"), rank=8)
    )
    lora, _ = init_lora(model, jax.random.key(0), jax.ShapeDtypeStruct(batch.shape, batch.dtype))
    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda x: jnp.asarray(0.02 * rng.normal(size=x.shape), x.dtype), lora)

    @jax.jit
    def gradient(lora: Any, params: Any) -> Any:
        def loss(lora: Any) -> jax.Array:
            hidden = model.apply({"params": params, "lora": lora}, batch, method="hidden")
            total, count = _loss_sum(dict(job), hidden, params, batch)
            return total / count

        return jax.grad(loss)(lora)

    found = gradient(lora, params)
    values = jax.tree.map(lambda x: x.dequantize() if is_packed(x) else x, params, is_leaf=is_packed)
    expected = gradient(lora, values)
    worst = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()), found, expected)
    return 8 * live / sum(leaf.size for leaf in packed), max(jax.tree.leaves(worst))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--shape", default="8x64", help="batch x tokens")
    parser.add_argument(
        "--layers", type=int, default=SMOLLM2["num_hidden_layers"], help="fewer for a quick look"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2, help="rounds that do not count")
    parser.add_argument("--threads", type=int, default=2, help="of each process, on cpu")
    parser.add_argument("--qwix-python", default=sys.executable)
    parser.add_argument("--name", default=None, help="of the file in results/, for a quick look")
    options = parser.parse_args()
    options.dtype, options.compile = ("float32" if options.backend == "cpu" else "bfloat16"), "none"
    if options.backend == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    jax.config.update("jax_platforms", "cuda" if options.backend == "gpu" else "cpu")
    config = SMOLLM2 | {"num_hidden_layers": options.layers}
    ours = {"remat": "dots", "unroll": False, "attention": "auto", "loss": "chunked", "chunk": 128}
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory), config, 8)
        job = {**job_of(options, config, directory, options.shape), **ours}
        runs = measure(options, job, directory)
        checks = {kind: bits_and_gradients(job, kind) for kind in BITS_GOAL}
    wide, rows, goals = runs["float32"], [], []
    for name, run in runs.items():
        if "seconds" not in run:
            rows.append({"run": name, "step, s": run["no run"]} | dict.fromkeys(list(COLUMNS), "-"))
            continue
        ratios = [
            median_ratio(run["seconds"], wide["seconds"]),
            run["peak_bytes"] / wide["peak_bytes"],
            run["weights_bytes"] / wide["weights_bytes"],
        ]
        cells = [f"{ratio:.3f}" for ratio in ratios]
        sizes = [f"{run[key] / 1e6:,.0f}" for key in ("peak_bytes", "weights_bytes")]
        rows.append(
            {"run": name, "step, s": f"{np.median(run['seconds']):.3f}"}
            | dict(
                zip(
                    COLUMNS,
                    (cells[0], sizes[0], cells[1], sizes[1], cells[2], f"{run['loss']:.5f}"),
                    strict=True,
                )
            )
        )
        if name in BITS_GOAL:
            bits, gradient = checks[name]
            goals += [goal(f"{name} bits a value", bits, BITS_GOAL[name])]
            goals += [goal(f"{name} gradients, relative", gradient, GRADIENT_GOAL)]
            goals += [goal(f"{name} time / float32", ratios[0], TIME_GOAL)]
        if name == "nf4":
            goals += [goal("nf4 peak memory / float32", ratios[1], MEMORY_GOAL)]
            goals += [goal("nf4 weights / float32", ratios[2], WEIGHTS_GOAL)]
    report(
        options.name or f"quantized_{options.backend}",
        rows,
        shape=options.shape,
        unprinted={"runs": runs},
        goals=goals,
    )
    print(table(goals))


COLUMNS = ("time / float32", "peak, MB", "peak / float32", "weights, MB", "weights / float32", "last loss")

if __name__ == "__main__":
    main()
