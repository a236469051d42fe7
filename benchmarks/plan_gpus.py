"""What a step of five models needs of one GPU and of eight, by `loraplus plan`: no GPU is there.

    python benchmarks/plan_gpus.py                            # all cases, an hour on two busy cores
    python benchmarks/plan_gpus.py llama31_8b@h100:8          # one case, beside those of earlier runs
    python benchmarks/plan_gpus.py llama31_8b/nf4@l4:1
    python benchmarks/plan_gpus.py --draw                     # only the table and docs/plan_gpus.png

Cases are MODEL[/QUANTIZE]@TOPOLOGY. A GPU has one row of 2,048 tokens of a language model, or 32 of 128 tokens of
MiniLM. Each result goes to results/plan_gpus.json at once.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from common import machine, read_json, table, write_json
from plan_scaling import merge, plan_of

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


def gigabytes(plan: dict[str, Any]) -> dict[str, float]:
    """GB by part of the memory."""
    return {part: sum(plan["memory"][name] for name in names) / 1e9 for part, names in PARTS.items()}


def row(case: str, plan: dict[str, Any]) -> dict[str, str]:
    """A line of the table."""
    model, _, topology = case.partition("@")
    times = {name: f"{1e3 * seconds:.1f}" for name, seconds in plan["roofline"].items()}
    return {
        "model": model,
        "GPUs": topology,
        **{f"{part}, GB": f"{size:.2f}" for part, size in gigabytes(plan).items()},
        "needed, GB": f"{plan['needed'] / 1e9:.2f}",
        "available, GB": f"{plan['room'] / 1e9:.2f}",
        "fits": "yes" if plan["fits"] else "no",
        "TFLOP": f"{plan['work']['flops'] / 1e12:.2f}",
        "received, GB": f"{plan['received'] / 1e9:.2f}",
        **{f"{name}, ms": value for name, value in times.items()},
        "planned in, s": f"{plan['seconds']:.0f}",
    }


def draw(plans: dict[str, Any], file: Path) -> None:
    """Bars of memory by part, beside what JAX reserves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.3 * len(plans) + 1.2), layout="constrained")
    names = list(plans)[::-1]
    left = [0.0] * len(names)
    for part in PARTS:
        sizes = [gigabytes(plans[name])[part] for name in names]
        axes.barh(names, sizes, left=left, label=part, height=0.6)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    rooms = [plans[name]["room"] / 1e9 for name in names]
    axes.plot(rooms, names, "k|", markersize=12, label="75 % of the GPU's memory")
    axes.set_xlabel("GB per GPU")
    axes.margins(y=0.01)
    axes.set_xlim(0, 80)  # of a B200, three quarters are more
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(file, dpi=110)
    print(file)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    plans = read_json("plan_gpus.json")
    for case in () if options.draw else options.cases or CASES:
        name, _, topology = case.partition("@")
        model, _, quantize = name.partition("/")
        start = time.perf_counter()
        words = [f"--model.quantize={quantize}"] if quantize else []
        plan = plan_of(model, topology, words, rows=32 if model == "minilm" else 1)
        kept = {"model": model, "collectives": merge(plan.collectives), "machine": machine()}
        plans[case] = plan.to_json() | kept | {"seconds": round(time.perf_counter() - start, 1)}
        write_json("plan_gpus.json", plans)
    print(table([row(case, plan) for case, plan in plans.items()]))
    draw(plans, Path(__file__).parents[1] / "docs/plan_gpus.png")


if __name__ == "__main__":
    main()
