"""Greedy generation: tokens per second here and in transformers, with the same weights on the same cores.

    python benchmarks/generate.py                     # 2 CPU cores, float32, batch 1 and 8
    python benchmarks/generate.py --cases 1 --rounds 3 --layers 4 --name quick

SmolLM2-135M's shape with random weights, measured as in `step_time.py`; adapters (q, k, v, o; rank 8) are not
merged, and beside transformers' weights are PEFT's. A case is a batch size, with `+lora` for adapters. A step
generates one token for each prompt, which is the prefill, and then all tokens anew; the decode rate is the tokens
after the first over the time after the prefill. The texts are compared token for token.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from common import median_ratio, parse_options, report, use_backend
from processes import run_processes, smollm2


def rows_of(case: str, runs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """The table's lines of one case."""
    ours, rows = runs["here"], []
    batch, _, adapters = case.partition("+")
    for name, run in runs.items():
        row = {"batch": batch, "adapters": "unmerged" if adapters else "none", "run": name}
        if "failed" in run:
            rows.append({**row, "tokens/s": run["failed"]})
            continue
        texts, others = run["texts"][-1], ours["texts"][-1]
        rate = len(texts) * (len(texts[0]) - 1) / np.array(run["decode_s"])
        low, high = np.quantile(rate, [0.25, 0.75])
        numbers = {
            "tokens/s": f"{np.median(rate):.1f}",
            "quartiles": f"{low:.1f} to {high:.1f}",
            "ours / its": f"{median_ratio(run['decode_s'], ours['decode_s']):.2f}",
            "prefill, s": f"{np.median(run['prefill_s']):.3f}",
            "peak, MB": f"{run['peak_bytes'] / 1e6:,.0f}",
            "first step, s": f"{run['to_first_step_s']:.1f}",
            "equal tokens": f"{np.mean(np.equal(texts, others)):.3f}",
        }
        rows.append(row | numbers)
    return rows


def main() -> None:
    options = parse_options(
        __doc__, cases="1,8,1+lora,8+lora", prompt=64, new=64, rounds=7, layers=30, name="generate_cpu"
    )
    use_backend("cpu")
    rows, cases = [], {}
    with smollm2(options.layers, trained=True) as make_job:
        for case in options.cases.split(","):
            batch, _, adapters = case.partition("+")
            settings = {"new_tokens": options.new, "adapters": bool(adapters), "remat": "none"}
            job = make_job(f"{batch}x{options.prompt}", **settings)
            jobs = {name: job | {"implementation": f"generate_{name}"} for name in ("here", "transformers")}
            runs = run_processes(jobs, options.rounds, warmup=1)
            rows += rows_of(case, runs)
            cases[case] = {
                name: {key: value for key, value in run.items() if key not in ("texts", "first")}
                for name, run in runs.items()
            }
            report(options.name, rows, unprinted={"cases": cases}, settings=vars(options))


if __name__ == "__main__":
    main()
