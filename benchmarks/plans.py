"""What a step needs of GPUs and TPUs, by `loraplus plan`: none is there.

    python benchmarks/plans.py                                # five models on one GPU and on eight; an hour
    python benchmarks/plans.py llama31_8b/nf4@l4:1            # one case, beside those of earlier runs
    python benchmarks/plans.py llama2_7b@v5e:2x4 llama2_7b@v5e:8x8 llama2_7b@v5e:16x16
    python benchmarks/plans.py llama3_70b@v5p:8x8x8 --model.attention=blocked
    python benchmarks/plans.py --draw                         # only the table of GPUs and docs/plan_gpus.png
    python benchmarks/plans.py attention                      # attention and its gradient alone, on a TPU v5e

A case is MODEL[/QUANTIZE]@TOPOLOGY, with settings that hold for all. A device has one row of 2,048 tokens of a
language model, or 32 of 128 tokens of MiniLM. Compiling takes minutes; each plan goes at once to
results/plan_gpus.json, or plan_scaling.json for TPUs, and attention's table to plan_attention.json: one sequence,
32 heads of 128, bfloat16.
"""

import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from common import PLANS, machine, make_parser, read_json, report, table, write_json

from loraplus_jax.models.attention import causal_attention
from loraplus_jax.plan.devices import target_devices
from loraplus_jax.plan.hlo import Collective
from loraplus_jax.plan.kernel_costs import kernel_work
from loraplus_jax.plan.plan import make_plan
from loraplus_jax.plan.render import format_plan
from loraplus_jax.settings.parsing import parse_settings

MODELS = ("minilm", "smollm2_135m", "llama31_8b", "llama31_8b/nf4", "llama2_70b/nf4")
CASES = tuple(
    f"{model}@{gpu}:{n}" for model in MODELS for gpu in ("l4", "a100-80", "h100", "b200") for n in (1, 8)
)
PARTS = {
    "weights": ("frozen weights",),
    "adapters and optimizer": ("trained", "optimizer"),
    "temporaries": ("temporaries", "batch"),
    "kernel workspace": ("kernel workspace (estimate)",),
}


def plan(case: str, overrides: Sequence[str]) -> dict[str, Any]:
    """A plan of `loraplus plan`, which is printed."""
    name, _, topology = case.partition("@")
    model, _, quantize = name.partition("/")
    rows = 32 if model == "minilm" else 1
    count = rows * math.prod(int(n) for n in topology.partition(":")[2].split("x"))
    words = [f"--train.batch_size={count}", f"--train.eval_batch_size={count}"]
    words += [f"--model.quantize={quantize}"] if quantize else []
    words += [f"--model.path={PLANS / model}", *overrides]
    settings, start = parse_settings(PLANS / f"{model}.yaml", words), time.perf_counter()
    found = make_plan(settings, topology)
    print(f"{format_plan(found, settings)}\n", flush=True)
    kept = {"model": model, "collectives": merge(found.collectives), "machine": machine()}
    return found.to_json() | kept | {"seconds": round(time.perf_counter() - start, 1)}


def merge(collectives: Sequence[Collective]) -> list[dict[str, Any]]:
    """Equal collectives of different places in the model as one."""
    times: Counter[Collective] = Counter()
    for one in collectives:
        times[one._replace(where="", times=0)] += one.times
    return [one._asdict() | {"times": number} for one, number in times.items()]


def gigabytes(plan: dict[str, Any]) -> dict[str, float]:
    """GB by part of the memory."""
    return {part: sum(plan["memory"].get(name, 0) for name in names) / 1e9 for part, names in PARTS.items()}


def row(case: str, plan: dict[str, Any]) -> dict[str, str]:
    """A line of the table."""
    work = plan["work"] or {"flops": math.nan, "bytes": math.nan}  # the programs that count it may not fit
    reduced = sum(c["times"] * c["bytes"] for c in plan["collectives"] if c["kind"] == "all-reduce")
    sizes = gigabytes(plan) | {"needed": plan["needed"] / 1e9, "available": plan.get("room", math.nan) / 1e9}
    sizes |= {"peak": plan["peak"] / 1e9, "accessed": work["bytes"] / 1e9}
    sizes |= {"received": plan["received"] / 1e9, "all-reduced": reduced / 1e9}
    return {
        "case": case,
        "fits": "yes" if plan["fits"] else "no",
        **{f"{part}, GB": f"{size:.2f}" for part, size in sizes.items()},
        "TFLOP": f"{work['flops'] / 1e12:.2f}",
        **{f"{name}, ms": f"{1e3 * seconds:.1f}" for name, seconds in plan["roofline"].items()},
        "planned in, s": f"{plan.get('seconds', math.nan):.0f}",
    }


def draw(plans: dict[str, Any], file: Path) -> None:
    """Bars of memory by part, beside what JAX reserves."""
    from loraplus_jax.training.metrics_log import pyplot, save_figure

    figure = pyplot().figure(figsize=(8, 0.3 * len(plans) + 1.2), layout="constrained")
    axes, names = figure.subplots(), list(plans)[::-1]
    left = [0.0] * len(names)
    for part in PARTS:
        sizes = [gigabytes(plans[name])[part] for name in names]
        axes.barh(names, sizes, left=left, label=part, height=0.6)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    rooms = [plans[name]["room"] / 1e9 for name in names]
    axes.plot(rooms, names, "k|", markersize=12, label="75 % of the GPU's memory")
    axes.set(xlabel="GB per GPU", xlim=(0, 80))  # of a B200, three quarters are more
    axes.margins(y=0.01)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    save_figure(figure, file)


def attention_row(length: int, implementation: Any, device: Any, chip: Any) -> dict[str, Any]:
    """What the gradient of an attention's summed outputs needs, by the compiler and by the kernels' own work."""

    def total(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
        found = causal_attention(query, key, value, segments, implementation=implementation)
        return jnp.sum(found.astype(jnp.float32))

    place = jax.sharding.SingleDeviceSharding(device)
    states = jax.ShapeDtypeStruct((1, length, 32, 128), jnp.bfloat16, sharding=place)
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=place)
    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    program: Any = gradient.lower(states, states, states, segments).compile()
    cost, kernels = program.cost_analysis(), kernel_work(program.as_text())
    flops, size = cost["flops"] + kernels.flops, cost["bytes accessed"] + kernels.bytes
    return {
        "tokens": length,
        "attention": implementation,
        "GFLOP": round(flops / 1e9, 1),
        "bytes accessed, MB": round(size / 1e6, 1),
        "temporaries, MB": round(program.memory_analysis().temp_size_in_bytes / 1e6, 1),
        "ms, compute": round(1e3 * flops / chip.flops, 3),
        "ms, memory": round(1e3 * size / chip.memory_rate, 3),
    }


def main() -> None:
    parser = make_parser(__doc__, draw=False)
    parser.add_argument("cases", nargs="*", metavar="CASE")
    options, overrides = parser.parse_known_args()
    if options.cases == ["attention"]:
        chip, (device,) = target_devices("v5e:1x1")
        lengths, names = (128, 256, 512, 1024, 2048, 4096), ("xla", "blocked", "splash")
        report("plan_attention", [attention_row(n, name, device, chip) for n in lengths for name in names])
        return
    plans: dict[str, Any] = {}
    for case in () if options.draw else options.cases or CASES:
        file = "plan_scaling.json" if "x" in case.partition(":")[2] else "plan_gpus.json"
        plans = read_json(file) | {" ".join([case, *overrides]): plan(case, overrides)}
        write_json(file, plans)
    plans = plans or read_json("plan_gpus.json")
    print(table([row(case, one) for case, one in plans.items()]))
    if options.draw:
        draw(plans, Path(__file__).parents[1] / "docs/plan_gpus.png")


if __name__ == "__main__":
    main()
