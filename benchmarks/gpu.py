"""What a GPU does, beside what a plan says of it: a script for a machine with one NVIDIA GPU, below ten minutes.

    python benchmarks/gpu.py                                # all parts
    python benchmarks/gpu.py --part plan                    # one of them
    BENCHMARK_RESULTS=/tmp/tiny python benchmarks/gpu.py --tiny     # the script itself, on a CPU

plan        memory and seconds of a step of SmolLM2-135M, Llama-3.1-8B in bfloat16 and as NF4: planned for this kind
            of GPU without it, by the compiler with it, and by the allocator and the clock
attention   causal attention and its gradient by each implementation that the device has
population  members of a sweep in one program, beside one member
peft        step_time.py --backend gpu: the same step by PEFT with torch.compile, in bfloat16
quantized   step_time.py --compare quantized

Weights are zeros and tokens are all the same: neither changes time or memory. Nothing is downloaded. Each case is a
process of its own, as an allocator reports its peak once. A case that the time (`--minutes`) leaves out says so.
"""

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# This process names the device in the results, and must leave its memory to the others.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from common import report

HERE = Path(__file__).parent
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 256}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
PLANS = {
    "SmolLM2-135M, 8 x 2,048": ("smollm2_135m", 8, ()),
    "Llama-3.1-8B, 4 x 2,048": ("llama31_8b", 4, ()),
    "Llama-3.1-8B NF4, 4 x 2,048": ("llama31_8b", 4, ("--model.quantize=nf4",)),
}
LENGTHS, STEPS, MEMBERS = (512, 2048, 8192), 10, (1, 4, 16)
TOKENS, TINY_TOKENS = 16384, 256
"""Tokens of a batch whose attention is timed."""


def settings_of(case: str, tiny: bool, directory: Path) -> Any:
    """The settings of a case of `PLANS`; tiny ones have a small model, and rows of 128 tokens."""
    from loraplus_jax.settings.parsing import parse_settings

    model, rows, words = PLANS[case]
    path, length = HERE / "plan" / model, []
    if tiny:
        config = json.loads((path / "config.json").read_text()) | TINY
        path, length = directory, ["--data.max_length=128"]
        (path / "config.json").write_text(json.dumps(config))
    sizes = [f"--train.batch_size={rows}", f"--train.eval_batch_size={rows}"]
    return parse_settings(HERE / "plan" / f"{model}.yaml", [f"--model.path={path}", *sizes, *length, *words])


def fill(shapes: Any) -> Any:
    """Zeros, and for a typed key a key."""

    def leaf(x: Any) -> Any:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key(0) if is_key else jnp.zeros(x.shape, x.dtype)

    return jax.tree.map(leaf, shapes)


def seconds_of(call: Callable[[], Any], steps: int = STEPS) -> float:
    """Median seconds of a call, after two."""
    taken = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - start)
    return float(np.median(taken[2:]))


def measure_step(case: str, tiny: bool) -> dict[str, Any]:
    """A step on the local device: what its compiler says, and what it takes."""
    from loraplus_jax.plan.plan import make_model
    from loraplus_jax.plan.programs import memory_sizes, plan_step
    from loraplus_jax.step.sharding import make_mesh

    with tempfile.TemporaryDirectory() as directory:
        settings = settings_of(case, tiny, Path(directory))
        device = jax.devices()[0]
        mesh = make_mesh(1, devices=[device])
        step = plan_step(settings, *make_model(settings), mesh)
    program = step.lowered.compile()
    _, needed, _ = memory_sizes(program, None, 0)
    state, frozen, batch = fill(step.state), fill(step.parts.frozen), fill(step.held["batch"][0])
    states = [state]

    def run() -> Any:
        # A step donates its state.
        states[0], metrics = program(states[0], frozen, batch)
        return metrics

    seconds = seconds_of(run)
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {"compiled": needed, "peak": peak, "seconds": seconds, "kind": device.device_kind}


def plan_without(case: str, tiny: bool, kind: str) -> dict[str, Any]:
    """The plan of a step for a kind of device, on the CPU platform; empty for a GPU that plans don't know."""
    from loraplus_jax.plan.devices import GPUS
    from loraplus_jax.plan.plan import make_plan

    names = [gpu.name for gpu in GPUS.values() if gpu.kind == kind]
    if not names and kind != "cpu":
        return {}
    topology = f"{names[0]}:1" if names else None
    with tempfile.TemporaryDirectory() as directory:
        plan = make_plan(settings_of(case, tiny, Path(directory)), topology)
    return {"needed": plan.needed, "peak": plan.peak, "roofline": max(plan.roofline.values(), default=None)}


def compare_plan(case: str, tiny: bool) -> dict[str, str]:
    """A line of the table of plans."""
    measured = in_process("measure_step", case, tiny)
    if "failed" in measured:
        return {"case": case, "failed": measured["failed"]}
    planned = in_process("plan_without", case, tiny, measured["kind"], JAX_PLATFORMS="cpu")
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


def time_attention(length: int, implementation: Any, tokens: int) -> dict[str, Any]:
    """Seconds of attention and its gradient: 32 heads of 128 with 8 of keys, bfloat16."""
    from loraplus_jax.models.attention import causal_attention

    rows = max(1, tokens // length)
    query = jnp.ones((rows, length, 32, 128), jnp.bfloat16)
    key = jnp.ones((rows, length, 8, 128), jnp.bfloat16)
    attend: Any = functools.partial(causal_attention, implementation=implementation)

    def total(*states: jax.Array) -> jax.Array:
        return jnp.sum(attend(*states).astype(jnp.float32))

    gradient = jax.jit(jax.grad(total, (0, 1, 2)))
    return {"seconds": seconds_of(lambda: gradient(query, key, key))}


def time_members(members: int, tiny: bool) -> dict[str, Any]:
    """Seconds of a step of so many LoRA+ members on one base, by vmap over state and batch."""
    from loraplus_jax.plan.plan import make_model
    from loraplus_jax.plan.programs import plan_step
    from loraplus_jax.step.sharding import make_mesh
    from loraplus_jax.step.train_step import make_step
    from loraplus_jax.training.optimizer import make_optimizer
    from loraplus_jax.training.setup import task_module

    with tempfile.TemporaryDirectory() as directory:
        settings = settings_of("SmolLM2-135M, 8 x 2,048", tiny, Path(directory))
        settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, max_length=128))
        base, data = make_model(settings)
        step = plan_step(settings, base, data, make_mesh(1, devices=jax.devices()[:1]))
    losses = task_module(settings).make_losses(settings, data.task, step.parts)
    tx = make_optimizer(settings.optimizer, settings.lr_ratio, 100, step.parts.specs)
    one, frozen = make_step(losses.train, tx), fill(step.parts.frozen)
    stack = functools.partial(jax.tree.map, lambda x: jnp.stack([x] * members))
    states, batch = [stack(fill(step.state))], stack(fill(step.held["batch"][0]))
    program = jax.jit(jax.vmap(one, in_axes=(0, None, 0)), donate_argnums=0)

    def run() -> Any:
        states[0], metrics = program(states[0], frozen, batch)
        return metrics

    return {"seconds": seconds_of(run)}


def device_kind() -> dict[str, Any]:
    return {"kind": jax.devices()[0].device_kind}


def seconds_left() -> float:
    """Seconds of the script's time that are left."""
    return max(0.0, float(os.environ[_END]) - time.time())


_END = "BENCHMARK_END"
"""Environment variable of the time at which no process may run any more."""


def in_process(function: str, *arguments: Any, **environment: str) -> dict[str, Any]:
    """What a function of this file returns in a process of its own; `failed` with the last line of its errors."""
    words = [sys.executable, __file__, "--call", json.dumps([function, *arguments])]
    options: Any = {"capture_output": True, "text": True, "env": os.environ | environment}
    try:
        run = subprocess.run(words, **options, timeout=seconds_left())
    except subprocess.TimeoutExpired:
        return {"failed": "no time left"}
    if run.returncode:
        return {"failed": (run.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    return json.loads(run.stdout.splitlines()[-1])


def plan_part(tiny: bool) -> list[dict[str, str]]:
    return [compare_plan(case, tiny) for case in PLANS]


def attention_part(tiny: bool) -> list[dict[str, str]]:
    rows = []
    names = ("xla", "blocked") if tiny else ("xla", "blocked", "cudnn")
    for length in (128,) if tiny else LENGTHS:
        row = {"tokens": f"{length:,}"}
        for name in names:
            found = in_process("time_attention", length, name, TINY_TOKENS if tiny else TOKENS)
            row[f"{name}, ms"] = found.get("failed") or f"{1e3 * found['seconds']:.2f}"
        rows.append(row)
    return rows


def population_part(tiny: bool) -> list[dict[str, str]]:
    rows, first = [], None
    for members in MEMBERS[:2] if tiny else MEMBERS:
        found = in_process("time_members", members, tiny)
        if "failed" in found:
            rows.append({"members": str(members), "failed": found["failed"]})
            continue
        each = found["seconds"] / members
        first = first or each
        rows.append(
            {
                "members": str(members),
                "ms per member": f"{1e3 * each:.2f}",
                "of one alone": f"{each / first:.2f}",
            }
        )
    return rows


PARTS: Mapping[str, Callable[[bool], list[dict[str, str]]]] = {
    "plan": plan_part,
    "attention": attention_part,
    "population": population_part,
}
OTHERS = {"peft": [], "quantized": ["--compare", "quantized"]}
"""Options of step_time.py, whose tables have files of their own."""
SIZES = {
    False: ["--backend", "gpu", "--layers", "12", "--rounds", "7"],
    True: ["--backend", "cpu", "--layers", "1", "--rounds", "1", "--shapes", "1x8"],
}
"""Its further options, by whether the size is tiny."""


def main(arguments: Sequence[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--part", choices=[*PARTS, *OTHERS])
    parser.add_argument("--tiny", action="store_true", help="small models on a CPU, to test the script")
    parser.add_argument("--minutes", type=float, default=10, help="time for all parts (default: 10)")
    parser.add_argument("--name", default="", help="name of the results' files")
    parser.add_argument("--call", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.call:
        function, *values = json.loads(options.call)
        print(json.dumps(globals()[function](*values)))
        return
    tiny, start = options.tiny, time.perf_counter()
    name = options.name or ("gpu_tiny" if tiny else "gpu")
    os.environ["JAX_PLATFORMS"] = "cpu" if tiny else "cuda"
    jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    os.environ[_END] = str(time.time() + 60 * options.minutes)
    if "failed" in (device := in_process("device_kind")):
        parser.error(f"no NVIDIA GPU: {device['failed']}; --tiny runs on a CPU")
    for part, make in PARTS.items():
        if options.part in (None, part):
            report(f"{name}_{part}", make(tiny), seconds=round(time.perf_counter() - start))
    for part, words in OTHERS.items():
        if options.part in (None, part):
            words = [str(HERE / "step_time.py"), "--name", f"{name}_{part}", *SIZES[tiny], *words]
            try:
                subprocess.run([sys.executable, *words], check=False, timeout=seconds_left())
            except subprocess.TimeoutExpired:
                print(f"{part}: no time left")


if __name__ == "__main__":
    main()
