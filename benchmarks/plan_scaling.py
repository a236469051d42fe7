"""What a step of a large model needs of a chip as the pod grows, by `loraplus plan`: no TPU is there.

    python benchmarks/plan_scaling.py                     # Llama-2-7B on 8, 64 and 256 chips v5e, a row a chip
    python benchmarks/plan_scaling.py llama3_70b@v5p:8x8x8
    python benchmarks/plan_scaling.py llama2_7b@v5e:2x4 --model.attention=xla
    python benchmarks/plan_scaling.py llama2_7b@v5e:1x1 --model.quantize=nf4 --mesh.data=1

Cases are MODEL@TOPOLOGY. Each is compiled three times, which takes minutes; its result goes to
results/plan_scaling.json at once, beside those of other cases.
"""

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import machine, read_json, table, write_json

from loraplus_jax.plan.hlo import Collective
from loraplus_jax.plan.plan import Plan, make_plan
from loraplus_jax.plan.render import format_plan
from loraplus_jax.settings.parsing import parse_settings

CONFIGS = Path(__file__).parent / "plan"
SCALING = ("llama2_7b@v5e:2x4", "llama2_7b@v5e:8x8", "llama2_7b@v5e:16x16")


def plan_of(model: str, topology: str, overrides: Sequence[str] = (), rows: int = 1) -> Plan:
    """A plan with so many rows a chip."""
    count = rows * math.prod(int(n) for n in topology.partition(":")[2].split("x"))
    sizes = [f"--train.batch_size={count}", f"--train.eval_batch_size={count}"]
    options = [f"--model.path={CONFIGS / model}", *sizes, *overrides]
    settings = parse_settings(CONFIGS / f"{model}.yaml", options)
    plan = make_plan(settings, topology)
    print(f"{format_plan(plan, settings)}\n", flush=True)
    return plan


def merge(collectives: Sequence[Collective]) -> list[dict[str, Any]]:
    """Equal collectives of different places in the model as one."""
    times: Counter[Collective] = Counter()
    for one in collectives:
        times[one._replace(where="", times=0)] += one.times
    return [one._asdict() | {"times": number} for one, number in times.items()]


def row(case: str, plan: dict[str, Any]) -> dict[str, str]:
    """A line of the table."""
    memory, roof = plan["memory"], plan["roofline"]
    work = plan["work"] or {"flops": math.nan, "bytes": math.nan}  # the programs that count it may not fit
    reduced = sum(c["times"] * c["bytes"] for c in plan["collectives"] if c["kind"] == "all-reduce")
    return {
        "case": case,
        "chips": str(plan["devices"]),
        "weights, GB": f"{memory['frozen weights'] / 1e9:.3f}",
        "adapters and optimizer, GB": f"{(memory['trained'] + memory['optimizer']) / 1e9:.3f}",
        "temporaries, GB": f"{memory['temporaries'] / 1e9:.3f}",
        "needed, GB": f"{plan['needed'] / 1e9:.3f}",
        "peak, GB": f"{plan['peak'] / 1e9:.3f}",
        "TFLOP": f"{work['flops'] / 1e12:.2f}",
        "bytes, GB": f"{work['bytes'] / 1e9:.1f}",
        "received, GB": f"{plan['received'] / 1e9:.2f}",
        "all-reduced, GB": f"{reduced / 1e9:.3f}",
        **{f"s, {name}": f"{roof.get(name, math.nan):.3f}" for name in ("compute", "memory", "network")},
        "compiled in, s": f"{plan['compile_seconds']:.0f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="MODEL@TOPOLOGY")
    options, overrides = parser.parse_known_args()
    plans = read_json("plan_scaling.json")
    for case in options.cases or SCALING:
        model, _, topology = case.partition("@")
        plan = plan_of(model, topology, overrides)
        kept = {"model": model, "collectives": merge(plan.collectives), "machine": machine()}
        plans[" ".join([case, *overrides])] = plan.to_json() | kept
        write_json("plan_scaling.json", plans)
    print(table([row(case, plan) for case, plan in plans.items()]))


if __name__ == "__main__":
    main()
