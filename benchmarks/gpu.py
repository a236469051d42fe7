"""What a GPU does, beside what a plan says of it: for a machine with one NVIDIA GPU, a few minutes.

    python benchmarks/gpu.py
    BENCHMARK_RESULTS=/tmp/tiny python benchmarks/gpu.py --tiny     # the script itself, on a CPU

Memory and seconds of a step of SmolLM2-135M, Llama-3.1-8B in bfloat16 and as NF4: planned for this kind of GPU
without it, by the compiler with it, and by the allocator and the clock. Weights are zeros and tokens are all the
same: neither changes time or memory. Each case is a process of its own, as an allocator reports its peak once.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# This process names the device in the results, and must leave its memory to the others.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from common import PLANS, Steps, parse_options, report, timed

from loraplus_jax.plan.devices import GPUS
from loraplus_jax.plan.plan import make_model, make_plan
from loraplus_jax.plan.programs import memory_sizes, plan_step
from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.step.sharding import make_mesh

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 256}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
CASES = {
    "SmolLM2-135M, 8 x 2,048": ("smollm2_135m", 8, ()),
    "Llama-3.1-8B, 4 x 2,048": ("llama31_8b", 4, ()),
    "Llama-3.1-8B NF4, 4 x 2,048": ("llama31_8b", 4, ("--model.quantize=nf4",)),
}


def settings_of(case: str, tiny: bool, directory: Path) -> Any:
    """The settings of a case; tiny ones have a small model, and rows of 128 tokens."""
    model, rows, words = CASES[case]
    content, length = json.loads((PLANS / model / "config.json").read_text()), []
    if tiny:
        content, length = content | SMALL, ["--data.max_length=128"]
    (directory / "config.json").write_text(json.dumps(content))
    sizes = [f"--train.batch_size={rows}", f"--train.eval_batch_size={rows}"]
    return parse_settings(PLANS / f"{model}.yaml", [f"--model.path={directory}", *sizes, *length, *words])


def measure(case: str, tiny: bool) -> dict[str, Any]:
    """A step on the local device: what its compiler says, and what it takes."""
    with tempfile.TemporaryDirectory() as directory:
        settings = settings_of(case, tiny, Path(directory))
        step = plan_step(settings, *make_model(settings), make_mesh(1, devices=jax.devices()[:1]))
    program = step.lowered.compile()

    def zeros(x: Any) -> Any:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key(0) if is_key else jnp.zeros(x.shape, x.dtype)

    run = timed(
        Steps(program, *jax.tree.map(zeros, (step.run.state, step.parts.frozen, step.held["batch"][0])))
    )
    seconds, device = [run() for _ in range(12)], jax.devices()[0]
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    found = {"compiled": memory_sizes(program, None, 0)[1], "peak": peak, "kind": device.device_kind}
    return found | {"seconds": float(np.median(seconds[2:]))}


def plan(case: str, tiny: bool, kind: str) -> dict[str, Any]:
    """The plan of a step for a kind of device, on the CPU platform; empty for a GPU that plans don't know."""
    names = [gpu.name for gpu in GPUS.values() if gpu.kind == kind]
    if not names and kind != "cpu":
        return {}
    with tempfile.TemporaryDirectory() as directory:
        found = make_plan(settings_of(case, tiny, Path(directory)), f"{names[0]}:1" if names else None)
    return {"needed": found.needed, "roofline": max(found.roofline.values(), default=None)}


def in_process(function: str, *arguments: Any, platform: str) -> dict[str, Any]:
    """What a function of this file returns in a process of its own; `failed` with the last line of its errors."""
    words = [sys.executable, __file__, "--call", json.dumps([function, *arguments])]
    environment = os.environ | {"JAX_PLATFORMS": platform}
    run = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    if run.returncode:
        return {"failed": (run.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    return json.loads(run.stdout.splitlines()[-1])


def row(case: str, tiny: bool, platform: str) -> dict[str, str]:
    """A line of the table."""
    measured = in_process("measure", case, tiny, platform=platform)
    if "failed" in measured:
        return {"case": case, "failed": measured["failed"]}
    planned = in_process("plan", case, tiny, measured["kind"], platform="cpu")
    size = lambda value: "-" if value is None else f"{value / 1e9:.2f}"  # noqa: E731
    roofline = planned.get("roofline")
    return {
        "case": case,
        "planned, GB": size(planned.get("needed")),
        "compiled, GB": size(measured["compiled"]),
        "allocator's peak, GB": size(measured["peak"]),
        "roofline, s": "-" if roofline is None else f"{roofline:.3f}",
        "step, s": f"{measured['seconds']:.3f}",
    }


def main() -> None:
    options = parse_options(__doc__, tiny=False, call="")
    if options.call:
        function, *values = json.loads(options.call)
        print(json.dumps({"measure": measure, "plan": plan}[function](*values)))
        return
    platform = "cpu" if options.tiny else "cuda"
    if options.tiny:
        jax.config.update("jax_platforms", platform)
    try:
        jax.devices(platform)
    except RuntimeError as error:
        raise SystemExit(f"no NVIDIA GPU: {error}; --tiny runs on a CPU") from error
    report("gpu_tiny" if options.tiny else "gpu", [row(case, options.tiny, platform) for case in CASES])


if __name__ == "__main__":
    main()
