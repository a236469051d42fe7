"""LoRA+ with ratio lambda against LoRA with alpha x lambda, on real data.

    python benchmarks/paper/alpha_on_data.py --data DATA

MiniLM trains on CoLA, both runs in the same order and at the same rate of A. `exactness.py` has the theory; here
is what float32 and each setting leave of it, in the losses of all steps. DATA holds `glue`.
Writes results/paper/alpha_on_data.json.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from shared import parse_options, report

RATE = 2.5e-4
PLAIN = {"optimizer.weight_decay": 0.0, "optimizer.max_grad_norm": "null", "optimizer.eps": 1e-30}
CASES: dict[str, tuple[float, dict[str, Any]]] = {
    "no decay, no clipping, epsilon 1e-30": (4, PLAIN),
    "the same, lambda no power of two": (10, PLAIN),
    "epsilon 1e-8": (4, PLAIN | {"optimizer.eps": 1e-8}),
    "gradients' norm clipped at 1": (4, PLAIN | {"optimizer.max_grad_norm": 1.0}),
    "weight decay 0.1": (4, PLAIN | {"optimizer.weight_decay": 0.1}),
    "A zero at the start": (4, PLAIN | {"lora.init": "lora_b"}),
}


def train(directory: Path, data: Path, steps: int, settings: dict[str, Any]) -> list[float]:
    """The loss of each step."""
    values: dict[str, Any] = {
        "data.root": data / "glue",
        "data.path": "glue/cola",
        "data.max_length": 64,
        "data.validation_fraction": 0.05,
        "lora.init": "lora",
        "optimizer.learning_rate": RATE,
        "optimizer.head_learning_rate": RATE,
        "optimizer.warmup_steps": 20,
        "train.batch_size": 32,
        "train.eval_batch_size": 64,
        "train.eval_every": steps,
        "train.log_every": 1,
        "train.select": "last",
        "train.steps": steps,
        "output_dir": directory,
        **settings,
    }
    options = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "loraplus_jax.cli", "train", "quickstart", *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def main() -> None:
    options = parse_options(__doc__, data="data", steps=300)
    rows = []
    for case, (ratio, settings) in CASES.items():
        with tempfile.TemporaryDirectory() as name:
            found = [
                train(Path(name) / method, Path(options.data).resolve(), options.steps, settings | own)
                for method, own in (
                    ("plus", {"method": "lora_plus", "lora.lr_ratio": ratio, "lora.alpha": 16.0}),
                    ("lora", {"method": "lora", "lora.alpha": 16.0 * ratio}),
                )
            ]
        plus, lora = found
        rows.append(
            {
                "case": case,
                "lambda": ratio,
                "loss of the last step, LoRA+": plus[-1],
                "loss of the last step, LoRA": lora[-1],
                "largest difference": f"{np.max(np.abs(np.subtract(plus, lora))):.3g}",
            }
        )
        print(rows[-1], flush=True)
    report("paper/alpha_on_data", rows, steps=options.steps, rate=RATE)


if __name__ == "__main__":
    main()
