"""Greedy generation: tokens per second here and in transformers, with the same weights on the same cores.

    python benchmarks/generate.py                     # 2 CPU cores, float32, batch 1 and 8
    python benchmarks/generate.py --cases 1 --rounds 3 --layers 4 --name generate_quick

SmolLM2-135M's shape with random weights, which all load from one file; adapters (q, k, v, o; rank 8) are not
merged, and beside transformers' weights are PEFT's. Each implementation is a process of its own. A step generates
one token for each prompt, which is the prefill, and then all tokens anew; the decode rate is the tokens after the
first over the time after the prefill. A step of one implementation is followed by a step of the next, in turning
order, and ratios are medians over the rounds' own ratios. The texts are compared token for token. "compiled" is
transformers with a static cache and torch.compile, which needs a C compiler.

Peak memory is the process's highest resident set (VmHWM), compilation included. "First step" includes imports,
loading and compilation. No network is used.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import report, table
from step_time_model import SMOLLM2, write_model
from step_time_processes import Process, take_turns
from step_time_report import goal

RANK, ALPHA, GOAL = 8, 16, round(1 / 1.5, 3)
WORKERS = Path(__file__).with_name("generate_workers.py")
PEERS = {
    "transformers": {"implementation": "transformers", "compile": False},
    "compiled": {"implementation": "transformers", "compile": True},
}


def job_of(options: argparse.Namespace, directory: str, case: str) -> dict[str, Any]:
    """What every worker is told, for a case such as `8` or `8+lora`: prompts, and whether to use adapters."""
    batch, _, adapters = case.partition("+")
    ids = np.random.default_rng(1).integers(0, SMOLLM2["vocab_size"], (int(batch), options.prompt)).tolist()
    return {
        "directory": directory,
        "dtype": "float32",
        "threads": options.threads,
        "ids": ids,
        "new_tokens": options.new,
        "layers": options.layers,
        "adapters": bool(adapters),
        "rank": RANK,
        "alpha": ALPHA,
        "compile_only": False,
        "unroll": False,
        "remat": "none",
        "attention": "auto",
    }


def measure(options: argparse.Namespace, directory: str, case: str) -> dict[str, Any]:
    """All runs of one case by name, and what else the machine did."""
    job, processes = job_of(options, directory, case), {}
    wanted = {"here": {"implementation": "here"}, **{name: PEERS[name] for name in options.peers.split(",")}}
    runs: dict[str, dict[str, Any]] = {}
    variables = {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(Path(directory) / "inductor"),
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
    }
    try:
        for name, more in wanted.items():
            process = Process(sys.executable, job | more, variables, WORKERS)
            if why := process.failed or process.missing:
                process.close()
                if name == "here":
                    raise SystemExit(why)
                runs[name] = {"no run": why}
                print(f"{case} {name}: {why}", flush=True)
            else:
                processes[name] = process
                print(f"{case} {name}: first step after {process.ready['to_first_step_s']:.1f} s", flush=True)
        take_turns(processes, 1, float("inf"))
        for process in processes.values():
            process.start_again()
        others = take_turns(processes, options.rounds, float("inf"))
        for name, process in processes.items():
            replies = process.replies
            runs[name] = {
                "to_first_step_s": process.ready["to_first_step_s"],
                "versions": process.ready["versions"],
                "about": process.ready["about"],
                "prefill_s": [reply["prefill_s"] for reply in replies],
                "decode_s": [reply["all_s"] - reply["prefill_s"] for reply in replies],
                "texts": replies[-1]["texts"],
                "peak_bytes": process.ask("memory")["VmHWM"],
            }
    finally:
        for process in processes.values():
            process.close()
    return {"runs": {name: runs[name] for name in wanted}, **others}


def rows_of(case: str, runs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """The table's lines of one case."""
    ours, rows = runs["here"], []
    batch, _, adapters = case.partition("+")
    for name, run in runs.items():
        row = {"batch": batch, "adapters": "unmerged" if adapters else "none", "run": name}
        if "no run" in run:
            rows.append(row | dict.fromkeys(COLUMNS, "-") | {"tokens/s": run["no run"]})
            continue
        decoded = len(run["texts"]) * (len(run["texts"][0]) - 1)
        rate = decoded / np.array(run["decode_s"])
        low, high = np.quantile(rate, [0.25, 0.75])
        rows.append(
            row
            | {
                "tokens/s": f"{np.median(rate):.1f}",
                "quartiles": f"{low:.1f} to {high:.1f}",
                "ours / its": f"{rate_ratio(ours, run):.2f}",
                "prefill, s": f"{np.median(run['prefill_s']):.3f}",
                "peak, MB": f"{run['peak_bytes'] / 1e6:,.0f}",
                "first step, s": f"{run['to_first_step_s']:.1f}",
                "equal tokens": f"{np.mean(np.equal(run['texts'], ours['texts'])):.3f}",
            }
        )
    return rows


COLUMNS = ("tokens/s", "quartiles", "ours / its", "prefill, s", "peak, MB", "first step, s", "equal tokens")


def rate_ratio(ours: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Our tokens per second over another's: the median over rounds."""
    return float(np.median(np.divide(other["decode_s"], ours["decode_s"])))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cases", default="1,8,1+lora,8+lora", help="batch sizes, with +lora for adapters")
    add("--prompt", type=int, default=64, help="tokens of each prompt")
    add("--new", type=int, default=64, help="tokens to generate")
    add("--threads", type=int, default=2, help="cores of each process")
    add("--rounds", type=int, default=7)
    add("--layers", type=int, default=SMOLLM2["num_hidden_layers"], help="fewer for a quick look")
    add("--peers", default="transformers,compiled", help="what to run beside this package")
    add("--name", default="generate_cpu", help="of the file in results/")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    rows, cases, goals = [], {}, []
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory), SMOLLM2 | {"num_hidden_layers": options.layers}, RANK, trained=True)
        for case in options.cases.split(","):
            cases[case] = measure(options, directory, case)
            runs = cases[case]["runs"]
            rows += rows_of(case, runs)
            if "decode_s" in runs["transformers"]:
                ratio = rate_ratio(runs["transformers"], runs["here"])
                goals.append(goal(f"{case} decode time, ours / transformers", ratio, GOAL))
            for run in runs.values():
                run.pop("texts", None)
            report(options.name, rows, unprinted={"cases": cases}, settings=vars(options), goals=goals)
    print(table(goals))


if __name__ == "__main__":
    main()
