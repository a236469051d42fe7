"""Which method helps: each tuned on equal budgets and compared with tuned LoRA on other seeds, by `loraplus sweep`.

    python benchmarks/methods.py reviews                  # film reviews, MiniLM
    python benchmarks/methods.py stsb --root GLUE         # similarity of sentences, MiniLM; GLUE has its files
    python benchmarks/methods.py instructions             # Alpaca instructions, SmolLM2-135M, short
    python benchmarks/methods.py table

Eight settings a method, halving, five report seeds. A run is in --output_dir and resumes there; its report is
copied to `results/methods_TASK.json`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from common import RESULTS, machine, table

from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.sweep.methods import compare_methods
from loraplus_jax.sweep.settings import SweepRun

CONFIGS = Path(__file__).parents[1] / "configs"
METHODS = "[lora_plus,dora,adalora,pissa,riemannian,lora_rite,lora_muon,full]"
SEARCH = [
    *("--sweep.lr_ratios", "[4,16]", "--sweep.report_seeds", "5", "--sweep.methods", METHODS),
    *("--sweep.method_learning_rates", "{lora_muon: [1e-3,3e-3,1e-2,3e-2,0.1,0.3,1,3]}"),
]
"""Two ratios at four rates of LoRA+; LoRA-Muon's rate is the norm of a step of A B and has another scale."""
SHORT = [
    *("--train.steps", "60", "--train.batch_size", "16", "--train.eval_every", "10"),
    *("--optimizer.warmup_steps", "6"),
]
TASKS: dict[str, tuple[str, list[str]]] = {
    "reviews": (
        "quickstart_sweep.yaml",
        [*SHORT, "--data.max_length", "32", "--data.test_fraction", "0.1"],
    ),
    "instructions": (
        "smollm2_chat.yaml",
        [
            *("--train.steps", "20", "--train.batch_size", "1", "--train.eval_every", "10"),
            *("--train.prompt", "null", "--train.prompt_tokens", "64", "--optimizer.warmup_steps", "2"),
        ],
    ),
    "stsb": (
        "quickstart_sweep.yaml",
        [
            *(*SHORT, "--task", "regression", "--data.path", "glue/stsb", "--data.max_length", "48"),
            *("--train.eval_batch_size", "32"),
        ],
    ),
}


def run(task: str, directory: Path, root: str | None) -> None:
    """Runs or resumes a comparison, and keeps its report."""
    config, overrides = TASKS[task]
    given = [*overrides, *SEARCH, "--output_dir", str(directory / task)]
    if task == "instructions":  # the weights' moments of eight members do not fit
        given[given.index(METHODS)] = METHODS.replace(",full]", "]")
    if root is not None:
        given += ["--data.root", root]
    report = compare_methods(parse_settings(CONFIGS / config, given, SweepRun))
    path = RESULTS / f"methods_{task}.json"
    path.write_text(json.dumps(report | {"machine": machine()}, indent=1) + "\n")
    print(table(rows(report)))


def rows(report: dict[str, Any]) -> list[dict[str, str]]:
    """A line a method."""
    found = []
    for method in report["methods"].values():
        against, cost, chosen = method["against_lora"], method["cost"] or {}, method["chosen"] or {}
        found.append(
            {
                "method": method["label"],
                "rate": f"{chosen.get('learning_rate', 0):g}",
                "test loss": "-" if method["loss"] is None else f"{method['loss']:.4f}",
                "minus LoRA's": "" if against is None else interval(against["test_loss"], "+.4f"),
                report["protocol"]["metric"]: "-" if method["metric"] is None else f"{method['metric']:.4f}",
                "LoRA's steps / its own": "" if against is None else interval(against["steps_ratio"], ".2f"),
                "step, s": f"{cost['step_seconds']:.3f}" if cost else "-",
                "MB": f"{cost['bytes'] / 1e6:.0f}" if cost and cost["bytes"] else "-",
                "trained": f"{cost['trainable']:,}" if cost else "-",
                "diverged": str(method["diverged"]),
            }
        )
    return found


def interval(estimate: dict[str, Any], form: str) -> str:
    """A mean and its interval."""
    if estimate["low"] is None:
        return "-"
    mean, low, high = (format(estimate[name], form) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=[*TASKS, "table"])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/methods"))
    parser.add_argument("--root", help="directory of GLUE's files, for stsb")
    options = parser.parse_args()
    if options.task != "table":
        run(options.task, options.output_dir, options.root)
        return
    for path in sorted(RESULTS.glob("methods_*.json")):
        report = json.loads(path.read_text())
        print(f"{path.stem}: {report['verdict']}\n\n{table(rows(report))}\n")


if __name__ == "__main__":
    main()
