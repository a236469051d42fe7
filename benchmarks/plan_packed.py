"""On how few TPU chips a model fits with a packed base, by `loraplus plan`: no TPU is there.

    python benchmarks/plan_packed.py                      # all cases; takes minutes
    python benchmarks/plan_packed.py llama2_7b/v5e/nf4

A case is MODEL/CHIP/WEIGHTS: its topologies are compiled in growing order, a row of 2,048 tokens a chip and the
weights split over all chips, until one fits. Results go to results/plan_packed.json as they are found.
"""

import itertools
import sys
from typing import Any

from common import machine, read_json, table, write_json
from plan_scaling import plan_of

TOPOLOGIES = {
    "v5e": ("v5e:1x1", "v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8"),
    "v5p": ("v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4"),
}
KEPT = ("device", "mesh", "rows", "tokens", "memory", "needed", "fits", "work", "roofline", "compile_seconds")
CASES = map("/".join, itertools.product(("llama2_7b", "llama3_70b"), TOPOLOGIES, ("bfloat16", "nf4")))


def row(case: str, plans: list[dict[str, Any]]) -> dict[str, str]:
    """A line of the table: the smallest slice that fits, and what the largest one that does not would need."""
    (model, _, weights), last = case.split("/"), plans[-1]
    return {
        "model": model,
        "weights": weights,
        "smallest slice": last["topology"] if last["fits"] else "none",
        "weights, GB a chip": f"{last['memory']['frozen weights'] / 1e9:.2f}",
        "needed, GB a chip": f"{last['needed'] / 1e9:.1f}",
        "next smaller, GB a chip": ", ".join(
            f"{p['topology']} {p['needed'] / 1e9:.1f}" for p in plans[-2:-1]
        ),
    }


def main() -> None:
    plans = read_json("plan_packed.json")
    for case in sys.argv[1:] or CASES:
        model, chip, weights = case.split("/")
        quantize, plans[case] = "none" if weights == "bfloat16" else weights, []
        for topology in TOPOLOGIES[chip]:
            plan = plan_of(model, topology, [f"--model.quantize={quantize}", "--mesh.data=1"]).to_json()
            kept = {name: plan[name] for name in KEPT}
            plans[case].append(kept | {"topology": topology, "machine": machine()})
            if plan["fits"]:
                break
        write_json("plan_packed.json", plans)
    print(table([row(case, found) for case, found in plans.items()]))


if __name__ == "__main__":
    main()
