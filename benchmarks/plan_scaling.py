"""What a step of a large model needs of a chip as the pod grows, by `loraplus plan`: no TPU is there.

    python benchmarks/plan_scaling.py                     # Llama-2-7B on 8, 64 and 256 chips v5e, a row a chip
    python benchmarks/plan_scaling.py llama3_70b@v5p:8x8x8
    python benchmarks/plan_scaling.py llama2_7b@v5e:2x4 --model.attention=xla
    python benchmarks/plan_scaling.py --draw              # table and picture from the results that there are

Cases are MODEL@TOPOLOGY. Each is compiled three times, which takes minutes; its result goes to
results/plan_scaling.json at once, beside those of other cases.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, machine, table

from loraplus_jax.plan.hlo import Collective
from loraplus_jax.plan.plan import make_plan
from loraplus_jax.plan.text import format_plan
from loraplus_jax.settings.parsing import parse_settings

HERE = Path(__file__).parent
FILE = RESULTS / "plan_scaling.json"
PICTURE = HERE.parent / "docs" / "plan_scaling.png"
SCALING = ("llama2_7b@v5e:2x4", "llama2_7b@v5e:8x8", "llama2_7b@v5e:16x16")


def run(case: str, overrides: list[str]) -> dict[str, Any]:
    """The plan of a case, with as many rows as there are chips."""
    model, _, topology = case.partition("@")
    chips = math.prod(int(n) for n in topology.partition(":")[2].split("x"))
    rows = [f"--train.batch_size={chips}", f"--train.eval_batch_size={chips}"]
    path = [f"--model.path={HERE / 'plan' / model}"]
    settings = parse_settings(HERE / "plan" / f"{model}.yaml", [*path, *rows, *overrides])
    plan = make_plan(settings, topology)
    print(f"{format_plan(plan, settings)}\n")
    return plan.to_json() | {"model": model, "collectives": merged(plan.collectives), "machine": machine()}


def merged(found: Sequence[Collective]) -> list[dict[str, Any]]:
    """Equal collectives of different places in the model as one."""
    times: Counter[Collective] = Counter()
    for one in found:
        times[one._replace(where="", times=0)] += one.times
    return [one._asdict() | {"times": number} for one, number in times.items()]


def row(case: str, plan: dict[str, Any]) -> dict[str, str]:
    """A line of the table."""
    memory, roof = plan["memory"], plan["roofline"]
    reduced = sum(c["times"] * c["bytes"] for c in plan["collectives"] if c["kind"] == "all-reduce")
    return {
        "case": case,
        "chips": str(plan["devices"]),
        "weights, GB": f"{memory['frozen weights'] / 1e9:.3f}",
        "adapters and optimizer, GB": f"{(memory['trained'] + memory['optimizer']) / 1e9:.3f}",
        "temporaries, GB": f"{memory['temporaries'] / 1e9:.3f}",
        "needed, GB": f"{plan['needed'] / 1e9:.3f}",
        "peak, GB": f"{plan['peak'] / 1e9:.3f}",
        "TFLOP": f"{plan['work']['flops'] / 1e12:.2f}",
        "bytes, GB": f"{plan['work']['bytes'] / 1e9:.1f}",
        "received, GB": f"{plan['received'] / 1e9:.2f}",
        "all-reduced, GB": f"{reduced / 1e9:.3f}",
        "s, compute": f"{roof['compute']:.3f}",
        "s, memory": f"{roof['memory']:.3f}",
        "s, network": f"{roof['network']:.3f}",
        "compiled in, s": f"{plan['compile_seconds']:.0f}",
    }


def draw(plans: list[dict[str, Any]]) -> None:
    """Memory by what it is for, and work and exchange relative to the largest pod, against the number of chips."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    chips = [str(plan["devices"]) for plan in plans]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    bottom = [0.0] * len(plans)
    for name in ("frozen weights", "trained", "optimizer", "temporaries"):
        sizes = [plan["memory"][name] / 1e9 for plan in plans]
        left.bar(chips, sizes, bottom=bottom, label=name)
        bottom = [low + size for low, size in zip(bottom, sizes, strict=True)]
    left.set(xlabel="chips v5e", ylabel="GB of a chip (16 there)", title="Llama-2-7B, 1 x 2048 tokens a chip")
    left.legend()
    last = plans[-1]
    for name, value in (
        ("FLOPs", lambda plan: plan["work"]["flops"]),
        ("bytes accessed", lambda plan: plan["work"]["bytes"]),
        ("bytes received", lambda plan: plan["received"]),
        ("memory needed", lambda plan: plan["needed"]),
    ):
        right.plot(chips, [value(plan) / value(last) for plan in plans], marker="o", label=name)
    right.set(xlabel="chips v5e", ylabel=f"a chip's share, relative to {chips[-1]} chips", ylim=(0, None))
    right.legend()
    figure.savefig(PICTURE, dpi=110)
    print(PICTURE.name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="MODEL@TOPOLOGY")
    parser.add_argument("--draw", action="store_true", help="run nothing")
    options, overrides = parser.parse_known_args()
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    for case in () if options.draw else options.cases or SCALING:
        found[" ".join([case, *overrides])] = run(case, overrides)
        FILE.write_text(json.dumps(found, indent=1) + "\n")
    print(table([row(case, plan) for case, plan in found.items()]))
    scaling = [found[case] for case in SCALING if case in found]
    if len(scaling) > 1:
        draw(scaling)


if __name__ == "__main__":
    main()
