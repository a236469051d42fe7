"""Implementations side by side, each in a process of its own that does a step whenever it is asked."""

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from common import median_ratio, take_turns
from step_time_model import SMOLLM2, write_model

ENVIRONMENT = {
    # A program compiled by an earlier run would make the first step look fast.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}


@contextlib.contextmanager
def smollm2(
    layers: int, rank: int = 8, *, trained: bool = False, **config: Any
) -> Iterator[Callable[..., dict[str, Any]]]:
    """Writes SmolLM2's shape with random weights; yields `make_job` for it, without directory and config."""
    config = SMOLLM2 | {"num_hidden_layers": layers} | config
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory), config, rank, trained=trained)
        yield functools.partial(make_job, directory, config, rank=rank)


def make_job(
    directory: str | Path, config: Mapping[str, Any], shape: str = "8x64", **settings: Any
) -> dict[str, Any]:
    """What a worker needs to know of a model in a directory, with a random batch of `shape` (batch x tokens)."""
    ids = np.random.default_rng(1).integers(0, config["vocab_size"], [int(n) for n in shape.split("x")])
    job = {
        "directory": str(directory),
        "backend": "cpu",
        "threads": 2,
        "compile": "none",
        "ids": ids.tolist(),
        "layers": config["num_hidden_layers"],
        "rank": 8,
        "alpha": 16,
        "lr": 5e-4,
        "lr_ratio": 4.0,
        "remat": "dots",
        "unroll": False,
        "attention": "auto",
        "chunk": 128,  # tokens whose logits exist at once: those of 128 stay in a core's cache
        **settings,
    }
    return {"dtype": "bfloat16" if job["backend"] == "gpu" else "float32", **job}


class Process:
    """A worker: `workers.py` with a job.

    Attributes:
      ready: its reply to the job, with the result of a first step, or why it `failed`.
    """

    def __init__(self, job: Mapping[str, Any]) -> None:
        start = time.perf_counter()
        platform = "cuda" if job["backend"] == "gpu" else "cpu"
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("workers.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT, "JAX_PLATFORMS": platform},
        )
        self.ready = self.ask(json.dumps(job))
        self.ready["to_first_step_s"] = time.perf_counter() - start

    def ask(self, line: str) -> dict[str, Any]:
        """Sends a line and waits for the reply."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        reply = self._process.stdout.readline()
        if not reply:
            raise SystemExit(f"a worker ended with status {self._process.wait()}; its error is above")
        return json.loads(reply)

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.communicate()


def run_processes(
    jobs: Mapping[str, Mapping[str, Any]], rounds: int, warmup: int = 2
) -> dict[str, dict[str, Any]]:
    """Lets the jobs take turns. The first must run; what others lack is not installed everywhere.

    Returns:
      By name, a worker's first reply, the lists of what its steps replied (`seconds` for all), and its peak memory;
      or `{"failed": why}`.
    """
    processes: dict[str, Process] = {}
    try:
        for name, job in jobs.items():
            processes[name] = Process(job)
            ready = processes[name].ready
            print(f"{name}: {ready.get('failed') or ready['to_first_step_s']}", flush=True)
            if "failed" in ready and len(processes) == 1:
                raise SystemExit(f"{name}: {ready['failed']}")
        live = {name: process for name, process in processes.items() if "failed" not in process.ready}
        steps = {name: lambda p=process: p.ask("step") for name, process in live.items()}
        replies = take_turns(steps, rounds, warmup)
        for name, process in live.items():
            process.ready |= {key: [reply[key] for reply in replies[name]] for key in replies[name][0]}
            process.ready |= process.ask("memory")
        return {name: process.ready for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.close()


def peak_memory(run: Mapping[str, Any]) -> int:
    """Bytes: of the accelerator if there is one, else of the process."""
    return run["device_peak_bytes"] or run["peak_bytes"]


def time_and_memory(run: Mapping[str, Any], against: Mapping[str, Any]) -> tuple[float, float]:
    """A run's time, the median of the rounds' own ratios, and its memory over another's."""
    return median_ratio(run["seconds"], against["seconds"]), peak_memory(run) / peak_memory(against)
