"""What benchmarks share: the command line, interleaved timing, tables, and JSON files."""

import argparse
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
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).parent / "results")
PLANS = Path(__file__).parent / "plan"
"""Configs of models."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Llama's layers that are adapted."""


def parse_options(
    doc: str | None, arguments: Sequence[str] | None = None, **options: Any
) -> argparse.Namespace:
    """The command line, by `make_parser`.

    >>> parse_options(None, ["size", "--rounds", "3"], what=["time", "size"], rounds=7)
    Namespace(what='size', rounds=3)
    """
    return make_parser(doc, **options).parse_args(arguments)


def make_parser(doc: str | None, **options: Any) -> argparse.ArgumentParser:
    """A parser of `--NAME VALUE` for each default, of its type.

    A list holds the choices of an argument without dashes.
    """
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=form, allow_abbrev=False)
    for name, value in options.items():
        if isinstance(value, list):
            parser.add_argument(name, choices=value)
        elif value is False:
            parser.add_argument(f"--{name}", action="store_true")
        else:
            parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default: {value}")
    return parser


def arguments(settings: Mapping[str, Any]) -> list[str]:
    """Settings, by dotted name, as on the command line."""
    as_is = (str, Path)
    pairs = ((name, str(v) if isinstance(v, as_is) else json.dumps(v)) for name, v in settings.items())
    return [part for name, value in pairs for part in (f"--{name}", value)]


def use_cpu(threads: int = 2) -> None:
    """Runs JAX on CPU cores, of this process and those that it starts `threads`."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    jax.config.update("jax_platforms", "cpu")


def take_turns(runs: Mapping[Any, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[Any, list[Any]]:
    """What each run returns in each round after the warm-up, in a random order.

    What ran before a run changes its time, and a machine's speed drifts: so neighbors are compared, in any order.
    """
    names, order = list(runs), random.Random(0)
    results: dict[Any, list[Any]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        for name in order.sample(names, len(names)):
            result = runs[name]()
            if number >= 0:
                results[name].append(result)
    return results


def timed(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """A run that returns the seconds until all of the call's arrays are there."""

    def run() -> float:
        start = clock()
        jax.block_until_ready(call())
        return clock() - start

    return run


def interleaved(calls: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[float]]:
    """Seconds of each call in each round."""
    return take_turns({name: timed(call) for name, call in calls.items()}, rounds)


class Steps:
    """A call that does the next step: a step donates its state, so the new one is kept here."""

    def __init__(self, step: Callable[..., tuple[Any, Any]], state: Any, *inputs: Any) -> None:
        self.step, self.state, self.inputs = step, state, inputs

    def __call__(self) -> tuple[Any, Any]:
        self.state, metrics = self.step(self.state, *self.inputs)
        return self.state, metrics


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
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def processor() -> str:
    """Its name, family and model; Python's own `platform.processor` is empty on Linux.

    A virtual machine may call processors of several generations by one name.
    """
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    # Of several cores the last; all are alike.
    values = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" not in values:
        return platform.machine()
    return f"{values['model name']}, family {values['cpu family']}, model {values['model']}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; a dash where a row lacks a column."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, ["---"] * len(columns), *([str(row.get(c, "-")) for c in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def report(
    name: str, rows: Sequence[Mapping[str, Any]], *, unprinted: Mapping[str, Any] | None = None, **more: Any
) -> None:
    """Prints the table and writes `results/NAME.json`; `unprinted` goes into the file only."""
    print(table(rows))
    for key, value in more.items():
        print(f"{key}: {value}")
    write_json(f"{name}.json", {"machine": machine(), "rows": list(rows), **more, **(unprinted or {})})


def write_json(name: str, content: Mapping[str, Any]) -> None:
    """Writes a file of `results/`."""
    path = RESULTS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(path)


def read_json(name: str) -> dict[str, Any]:
    """A file of `results/`; empty if it is not there."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else {}
