"""On how few TPU chips a model fits with a packed base, by `loraplus plan`: no TPU is there.

    python benchmarks/plan_packed.py                      # all cases; takes minutes
    python benchmarks/plan_packed.py llama2_7b/v5e/nf4

A case is MODEL/CHIP/WEIGHTS: its topologies are compiled in growing order, a row of 2,048 tokens a chip and the
weights split over all chips, until one fits. Results go to results/plan_packed.json as they are found.
"""

import argparse
import json
import math
from typing import Any

from common import RESULTS, machine, table
from plan_scaling import HERE

from loraplus_jax.plan.plan import make_plan
from loraplus_jax.settings.parsing import parse_settings

FILE = RESULTS / "plan_packed.json"
TOPOLOGIES = {
    "v5e": ("v5e:1x1", "v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8"),
    "v5p": ("v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4"),
}
KEPT = ("device", "mesh", "rows", "tokens", "memory", "needed", "fits", "work", "roofline", "compile_seconds")
CASES = [
    f"{model}/{chip}/{weights}"
    for model in ("llama2_7b", "llama3_70b")
    for chip in TOPOLOGIES
    for weights in ("bfloat16", "nf4")
]


def plan_of(model: str, topology: str, weights: str) -> dict[str, Any]:
    chips = math.prod(int(n) for n in topology.partition(":")[2].split("x"))
    overrides = [
        f"--model.path={HERE / 'plan' / model}",
        f"--model.quantize={'none' if weights == 'bfloat16' else weights}",
        f"--train.batch_size={chips}",
        f"--train.eval_batch_size={chips}",
        "--mesh.data=1",
    ]
    found = make_plan(parse_settings(HERE / "plan" / f"{model}.yaml", overrides), topology).to_json()
    plan = {name: found[name] for name in KEPT} | {"topology": topology, "machine": machine()}
    print(
        f"{model} {weights} {topology}: needs {plan['needed'] / 1e9:.1f} GB, fits: {plan['fits']}", flush=True
    )
    return plan


def row(case: str, plans: list[dict[str, Any]]) -> dict[str, str]:
    """A line of the table: the smallest slice that fits, and what the largest one that does not would need."""
    (model, _, weights), last = case.split("/"), plans[-1]
    small = ", ".join(f"{p['topology']} needs {p['needed'] / 1e9:.1f}" for p in plans[:-1][-1:])
    return {
        "model": model,
        "weights": weights,
        "smallest slice": last["topology"] if last["fits"] else "none",
        "weights, GB a chip": f"{last['memory']['frozen weights'] / 1e9:.2f}",
        "needed, GB a chip": f"{last['needed'] / 1e9:.1f}",
        "next smaller, GB a chip": small,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", default=CASES, metavar="MODEL/CHIP/WEIGHTS")
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    for case in parser.parse_args().cases:
        model, chip, weights = case.split("/")
        found[case] = []
        for topology in TOPOLOGIES[chip]:
            found[case].append(plan_of(model, topology, weights))
            if found[case][-1]["fits"]:
                break
        FILE.write_text(json.dumps(found, indent=1) + "\n")
    print(table([row(case, plans) for case, plans in found.items()]))


if __name__ == "__main__":
    main()
