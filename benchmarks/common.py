"""What benchmarks share: interleaved timing, a table on the screen, and a JSON file that says where it ran."""

import importlib.metadata
import json
import os
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

PACKAGES = ("loraplus_jax", "jax", "jaxlib", "flax", "optax")
RESULTS = Path(__file__).parent / "results"


def interleaved(runs: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[float]]:
    """Seconds of each run in each round, in a random order: what ran before a run changes its time."""
    names, order = list(runs), random.Random(0)
    seconds: dict[Any, list[float]] = {name: [] for name in names}
    for name in names:
        jax.block_until_ready(runs[name]())
    for _ in range(rounds):
        for name in order.sample(names, len(names)):
            start = time.perf_counter()
            jax.block_until_ready(runs[name]())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median over rounds of one run's time over another's in the same round."""
    return float(np.median(np.divide(over, under)))


def machine() -> dict[str, Any]:
    """Device, processor and versions."""
    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def processor() -> str:
    """Its name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine()
    )


def version(name: str) -> str:
    """Of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same columns as a Markdown table."""
    columns = list(rows[0])
    cells = [columns, ["---"] * len(columns), *([str(row[c]) for c in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def report(
    name: str, rows: Sequence[Mapping[str, Any]], *, unprinted: Mapping[str, Any] | None = None, **more: Any
) -> None:
    """Prints the table and writes `results/NAME.json`; `unprinted` goes into the file alone."""
    print(table(rows))
    for key, value in more.items():
        print(f"{key}: {value}")
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine(), "rows": list(rows), **more, **(unprinted or {})}
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
