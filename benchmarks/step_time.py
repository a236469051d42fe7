"""One training step of the same adapters on the same Llama: here, in PEFT on torch, in qwix, and in tunix.

    python benchmarks/step_time.py                                   # 2 CPU cores, float32
    python benchmarks/step_time.py --backend gpu                     # bfloat16, torch.compile for PEFT
    python benchmarks/step_time.py --depth                           # compile time at depth 4 against 32
    python benchmarks/step_time.py --profile                         # where a step's time goes
    python benchmarks/step_time.py --cost                            # time and memory by depth, length and rank
    python benchmarks/step_time.py --variants "none:;dots:remat=dots;plain:loss=plain"

SmolLM2-135M's shape with random weights, which all load from one file in Hugging Face's names, as they load the
adapters (q, k, v, o; rank 8) and take the same batch. Each implementation is a process of its own; a step of one is
followed by a step of the next, in turning order, and ratios are medians over the rounds' own ratios. The losses of
the first and the last step are compared: they are equal only if all did the same work.

Peak memory is the process's highest resident set (VmHWM) from its start on a CPU, and what the framework's
allocator reached on a GPU. No network is used. qwix and tunix are left out where they are not installed.

The runs: `here`; `no adapters`, the same model's loss and its gradient at the embedding's output; `qwix`, its
adapters on our model; `tunix`, its own Llama, loss and trainer with qwix's adapters; `peft`; and `matmul`, the
weights' products alone.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import interleaved, median_ratio, report, table
from step_time_model import SMOLLM2, ideal_flops, products, write_model
from step_time_processes import Process, take_turns
from step_time_report import DEPTH_GOAL, FLOPS_GOAL, goal, goals_of, losses_differ, rows_of
from step_time_workers import here

RANK, ALPHA, LR_RATIO, LEARNING_RATE, PEAK_SIZE = 8, 16, 4.0, 5e-4, 2048
PEERS = ("peft", "no adapters", "qwix", "tunix", "matmul")
OURS = {
    "remat": str,
    "unroll": lambda word: word == "true",
    "attention": str,
    "loss": str,
    "chunk": int,
}


def variants_of(text: str, defaults: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`"name:remat=dots,unroll=true;other:"` as settings of this package by name.

    >>> variants_of("a:chunk=64;b:", {"chunk": 512})
    {'a': {'chunk': 64}, 'b': {'chunk': 512}}
    """
    found = {}
    for part in filter(None, text.split(";")):
        name, _, settings = part.partition(":")
        found[name] = dict(defaults)
        for setting in filter(None, settings.split(",")):
            key, _, value = setting.partition("=")
            if key not in OURS:
                raise SystemExit(f"--variants: there is no setting {key!r}; there are {', '.join(OURS)}")
            found[name][key] = OURS[key](value)
    return found


def job_of(
    options: argparse.Namespace, config: Mapping[str, Any], directory: str, shape: str, rank: int = RANK
) -> dict[str, Any]:
    """What every worker is told; settings of this package come on top."""
    batch, tokens = map(int, shape.split("x"))
    ids = np.random.default_rng(1).integers(0, config["vocab_size"], (batch, tokens)).tolist()
    return {
        "directory": directory,
        "backend": options.backend,
        "dtype": options.dtype,
        "threads": options.threads,
        "compile": options.compile,
        "compile_only": False,
        "batch": batch,
        "tokens": tokens,
        "ids": ids,
        "layers": config["num_hidden_layers"],
        "rank": rank,
        "alpha": ALPHA,
        "lr": LEARNING_RATE,
        "lr_ratio": LR_RATIO,
        "products": list(products(config).values()),
        "peak_size": PEAK_SIZE,
    }


def measure(
    options: argparse.Namespace, config: Mapping[str, Any], directory: str, shape: str, until: float
) -> dict:
    """All runs of one shape: a dict for each by name, and what else the machine did."""
    job, ours = job_of(options, config, directory, shape), options.ours
    first = next(iter(ours.values()))
    wanted = {
        "peft": (options.peft_python, {"implementation": "peft"}),
        **{name: (options.python, {"implementation": "here", **more}) for name, more in ours.items()},
        "no adapters": (options.python, {"implementation": "base", **first}),
        "qwix": (options.qwix_python, {"implementation": "qwix", **first}),
        "tunix": (options.tunix_python, {"implementation": "tunix"}),
        "matmul": (options.python, {"implementation": "matmul"}),
    }
    processes: dict[str, Process] = {}
    runs: dict[str, dict[str, Any]] = {}
    try:
        for name, (python, more) in wanted.items():
            if name in ours or name in options.peers:
                process = start(python, job | more, environment(options, directory))
                if why := process.failed or (process.missing and f"{process.missing} is not installed"):
                    process.close()
                    runs[name] = {"no run": why}
                    print(f"{shape} {name}: {why}", flush=True)
                else:
                    processes[name] = process
                    seconds = process.ready["to_first_step_s"]
                    print(f"{shape} {name}: first step after {seconds:.1f} s", flush=True)
        if not processes:
            return {"runs": runs}
        take_turns(processes, options.warmup, until)
        starts = {name: process.ask("memory") for name, process in processes.items()}
        for process in processes.values():
            process.ask("forget")
            process.start_again()
        others = take_turns(processes, options.rounds, until)
        for name, process in processes.items():
            runs[name] = run_of(process, starts[name], process.ask("memory"))
    finally:
        for process in processes.values():
            process.close()
    return {"runs": {name: runs[name] for name in wanted if name in runs}, **others}


def start(python: str, job: Mapping[str, Any], variables: Mapping[str, str]) -> Process:
    """A worker; where torch.compile fails, as it does without a C compiler, PEFT runs eagerly and says so."""
    process = Process(python, job, variables)
    if not process.failed or job["implementation"] != "peft" or job["compile"] == "none":
        return process
    why = process.failed
    process.close()
    process = Process(python, {**job, "compile": "none"}, variables)
    process.ready["eager"] = f"torch.compile failed: {why}"
    return process


def run_of(process: Process, start: Mapping[str, Any], end: Mapping[str, Any]) -> dict[str, Any]:
    """All that is known of one run, for the file."""
    return {
        **process.ready,
        "peak_bytes": max(start["VmHWM"], end["VmHWM"]),
        "steps_peak_bytes": end["VmHWM"],
        "anonymous_peak_bytes": process.anonymous,
        "device_peak_bytes": end["device"],
        "seconds": process.seconds,
        "last": process.replies[-1],
        "gflop_per_s": [reply.get("gflop_per_s") for reply in process.replies],
        "idle_share": process.idle_s / max(process.waited_s, 1e-9),
    }


def environment(options: argparse.Namespace, directory: str) -> dict[str, str]:
    """Variables of the workers: the platform, no network, and no compilation kept from an earlier run."""
    return {
        "JAX_PLATFORMS": "cuda" if options.backend == "gpu" else "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(Path(directory) / "inductor"),
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }


def compile_only(options: argparse.Namespace, job: Mapping[str, Any]) -> dict[str, Any]:
    """What the compiler says of a step of ours: seconds and FLOPs."""
    process = Process(
        options.python,
        {**job, "implementation": "here", "compile_only": True},
        environment(options, job["directory"]),
    )
    process.close()
    if process.missing or process.failed:
        raise SystemExit(process.failed or f"{options.python} lacks {process.missing}, which is needed here")
    return process.ready["about"]


def flops_of(
    options: argparse.Namespace, config: Mapping[str, Any], directory: str, shape: str
) -> dict[str, Any]:
    """Compiled over ideal FLOPs. Straight code, one chunk and no remat: XLA counts a loop's body once."""
    job = job_of(options, config, directory, shape)
    straight = {"unroll": True, "remat": "none", "attention": "xla", "loss": "chunked", "chunk": 10**9}
    ideal = ideal_flops(config, job["batch"], job["tokens"], RANK)
    compiled = compile_only(options, job | straight)["flops"]
    return {"ideal": ideal, "compiled": compiled, "ratio": compiled / sum(ideal.values())}


def compare(options: argparse.Namespace) -> bool:
    """The whole comparison, written after each shape; whether the losses agree."""
    rows, kept, goals, agree = [], {}, [], True
    end = time.perf_counter() + options.seconds
    with tempfile.TemporaryDirectory() as directory:
        config = SMOLLM2 | {"num_hidden_layers": options.layers}
        write_model(Path(directory), config, RANK)
        for number, shape in enumerate(options.shapes):
            if number and time.perf_counter() > end:
                print(f"{shape} is left out: the time is up")
                break
            flops = flops_of(options, config, directory, shape) if options.flops else None
            left = (end - time.perf_counter()) / (len(options.shapes) - number)
            kept[shape] = measure(options, config, directory, shape, time.perf_counter() + left)
            runs = kept[shape]["runs"]
            ideal = ideal_flops(config, *map(int, shape.split("x")), RANK)
            rows += rows_of(shape, runs, ideal)
            goals += goals_of(shape, options.backend, next(iter(options.ours)), runs, ideal)
            kept[shape]["losses_differ"] = losses_differ(runs)
            agree &= kept[shape]["losses_differ"] <= options.tolerance
            if flops:
                kept[shape]["flops"] = flops
                goals.append(goal(f"{shape} FLOPs / ideal", flops["ratio"], FLOPS_GOAL))
            write(options, rows, kept, goals)
    return agree


def write(options: argparse.Namespace, rows: list, kept: Mapping[str, Any], goals: list) -> None:
    """The table so far, on the screen and in the file."""
    notes = {shape: {k: v for k, v in found.items() if k != "runs"} for shape, found in kept.items()}
    report(
        options.name or f"step_time_{options.backend}",
        rows,
        unprinted={"runs": {shape: found["runs"] for shape, found in kept.items()}},
        settings={
            "threads": options.threads,
            "dtype": options.dtype,
            "compile": options.compile,
            "ours": options.ours,
            "rounds": options.rounds,
            "share of peak": "FLOPs of weights, attention (all pairs of tokens) and adapters per second, over "
            f"those of a product of matrices of {PEAK_SIZE} x {PEAK_SIZE}",
        },
        **notes,
        goals=goals,
    )
    if goals:
        print(table(goals))


def depth(options: argparse.Namespace) -> bool:
    """Compile time of the scanned step at two depths of the same width, each time in a new process."""
    seconds: dict[int, list[float]] = {4: [], 32: []}
    shape = options.shapes[0]
    for _ in range(options.rounds):
        for layers in seconds:
            with tempfile.TemporaryDirectory() as directory:
                config = SMOLLM2 | {"num_hidden_layers": layers}
                write_model(Path(directory), config, RANK)
                job = job_of(options, config, directory, shape) | next(iter(options.ours.values()))
                about = compile_only(options, job)
            seconds[layers].append(about["trace_s"] + about["compile_s"])
    ratio = median_ratio(seconds[32], seconds[4])
    rows = [{"layers": n, "trace and compile, s": f"{np.median(found):.2f}"} for n, found in seconds.items()]
    goals = [goal("compile time, 32 layers / 4", ratio, DEPTH_GOAL)]
    report(
        options.name or f"step_time_depth_{options.backend}", rows, shape=shape, seconds=seconds, goals=goals
    )
    return True


def profile(options: argparse.Namespace) -> bool:
    """Seconds of a step by component, here and without adapters: the medians over rounds of traced steps."""
    ours, profiles, rows = next(iter(options.ours.values())), {}, []
    with tempfile.TemporaryDirectory() as directory:
        config = SMOLLM2 | {"num_hidden_layers": options.layers}
        write_model(Path(directory), config, RANK)
        for shape in options.shapes:
            job, profiles[shape] = job_of(options, config, directory, shape) | ours, {}
            for name, implementation in (("here", "here"), ("no adapters", "base")):
                process = start(
                    options.python, job | {"implementation": implementation}, environment(options, directory)
                )
                try:
                    for _ in range(options.warmup):
                        process.ask("step")
                    found = [process.ask("profile")["components"] for _ in range(options.rounds)]
                finally:
                    process.close()
                names = sorted(set().union(*found))
                profiles[shape][name] = {
                    n: float(np.median([each.get(n, 0.0) for each in found])) for n in names
                }
    for name in sorted({n for runs in profiles.values() for found in runs.values() for n in found}):
        columns = {f"{shape} {run}": runs[run] for shape, runs in profiles.items() for run in runs}
        rows.append(
            {"component": name} | {key: f"{found.get(name, 0):.4f}" for key, found in columns.items()}
        )
    report(options.name or f"step_time_profile_{options.backend}", rows, unprinted={"seconds": profiles})
    return True


def cost(options: argparse.Namespace) -> bool:
    """Step time and the compiler's memory by depth, sequence length and rank, each against one middle case.

    The cases of one sweep take turns, in this process. A smaller vocabulary than SmolLM2's, so that the layers are
    what is measured.
    """
    middle = {"layers": 4, "tokens": 128, "rank": 8}
    sweeps = {"layers": (2, 4, 8), "tokens": (64, 128, 256, 512), "rank": (1, 8, 32, 128)}
    rows, ours = [], next(iter(options.ours.values()))
    for varied, values in sweeps.items():
        workers = {}
        for case in (middle | {varied: value} for value in values):
            config = SMOLLM2 | {"num_hidden_layers": case["layers"], "vocab_size": 4096}
            with tempfile.TemporaryDirectory() as directory:
                write_model(Path(directory), config, case["rank"])
                job = job_of(options, config, directory, f"4x{case['tokens']}", case["rank"])
                workers[case[varied]] = here(job | ours)
        seconds = interleaved({value: worker.step for value, worker in workers.items()}, options.rounds)
        for value, worker in workers.items():
            about = worker.about
            rows.append(
                {"varied": varied}
                | middle
                | {
                    varied: value,
                    "step, s": round(float(np.median(seconds[value])), 4),
                    "temporaries, MB": round(about["temp_bytes"] / 1e6, 1),
                    "trace and compile, s": round(about["trace_s"] + about["compile_s"], 2),
                }
            )
    report(options.name or f"step_time_cost_{options.backend}", rows, batch=4, vocabulary=4096)
    return True


def parse() -> argparse.Namespace:
    """The command line; `ours` are the settings of this package by name, the first of which the goals are for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--backend", choices=("cpu", "gpu"), default="cpu")
    add("--shapes", default="8x64,2x512", help="batch x tokens")
    add("--dtype", choices=("float32", "bfloat16"), help="float32 on cpu, bfloat16 on gpu")
    add("--threads", type=int, default=2, help="of each process, on cpu")
    add("--rounds", type=int, help="21 on cpu, 60 on gpu; with --depth 3, with --profile and --cost 5")
    add("--warmup", type=int, default=2, help="rounds that do not count, after the first step")
    add("--seconds", type=float, help="no further rounds past so many; 500 on gpu, else no limit")
    add("--python", default=sys.executable, help="interpreter for this package")
    add("--peft-python", default=sys.executable)
    add("--qwix-python", default=sys.executable)
    add("--tunix-python", default=sys.executable)
    add("--peers", default=",".join(PEERS), help="what to run beside this package")
    add("--compile", help="torch.compile's mode for PEFT, or none: default on gpu, none on cpu")
    add("--remat", choices=("none", "dots", "full"), default="dots")
    add("--unroll", action="store_true")
    add("--attention", choices=("auto", "xla", "blocked"), default="auto")
    add("--loss", choices=("chunked", "plain"), default="chunked")
    add(
        "--chunk",
        type=int,
        help="tokens whose logits exist at once; 128 on cpu, where they fit its cache, 512 on gpu",
    )
    add(
        "--variants",
        default="",
        help="name:remat=dots,unroll=true;other: ... instead of one run of this package",
    )
    add("--layers", type=int, default=SMOLLM2["num_hidden_layers"], help="fewer for a quick look")
    add(
        "--flops",
        action=argparse.BooleanOptionalAction,
        help="whether to compile a step for its FLOPs: on cpu; the count is the same on gpu",
    )
    add("--name", help="of the file in results/, for a quick look that should not replace the full one")
    add("--depth", action="store_true", help="compile time at depth 4 and 32 instead")
    add("--profile", action="store_true", help="seconds by component instead")
    add("--cost", action="store_true", help="time and memory by depth, length and rank instead")
    options = parser.parse_args()
    if wrong := [
        shape for shape in options.shapes.split(",") if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape)
    ]:
        parser.error(f"--shapes: {wrong[0]!r} is not batch x tokens, such as 8x64")
    if wrong := [name for name in options.peers.split(",") if name and name not in PEERS]:
        parser.error(f"--peers: there is no {wrong[0]!r}; there are {', '.join(PEERS)}")
    on_gpu = options.backend == "gpu"
    options.shapes, options.peers = options.shapes.split(","), options.peers.split(",")
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    options.compile = options.compile or ("default" if on_gpu else "none")
    options.chunk = options.chunk or (512 if on_gpu else 128)
    options.seconds = options.seconds or (500.0 if on_gpu else float("inf"))
    short = 3 if options.depth else 5 if options.profile or options.cost else None
    options.rounds = options.rounds or short or (60 if on_gpu else 21)
    options.flops = not on_gpu if options.flops is None else options.flops
    options.tolerance = 1e-4 if options.dtype == "float32" else 1e-2
    defaults = {name: getattr(options, name) for name in OURS}
    # On a GPU nothing was measured yet: one run shows whether blocked attention is the better one there too.
    attention = {"xla attention": {**defaults, "attention": "xla"}} if on_gpu else {}
    options.ours = variants_of(options.variants, defaults) or {"here": defaults, **attention}
    return options


def main() -> None:
    options = parse()
    if options.backend == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    jax.config.update("jax_platforms", "cuda" if options.backend == "gpu" else "cpu")
    measures = {depth: options.depth, profile: options.profile, cost: options.cost}
    if not next((measure for measure, wanted in measures.items() if wanted), compare)(options):
        raise SystemExit("the losses differ: these runs did not do the same work")


if __name__ == "__main__":
    main()
