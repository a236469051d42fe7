"""The seven tables of docs/results.md, one command a table.

    python benchmarks/tables.py overhead
    python benchmarks/tables.py convergence
    python benchmarks/tables.py lambda
    python benchmarks/tables.py methods --data DATA
    python benchmarks/tables.py glue --data DATA
    python benchmarks/tables.py commonsense --data DATA
    python benchmarks/tables.py e2e --data DATA
    python benchmarks/tables.py page

DATA holds `glue` (GLUE's own folders), `commonsense` (LLM-Adapters' folders) and `e2e` (E2E NLG's CSV files). A
table tunes its methods on equal budgets and compares them with tuned LoRA on other seeds. The same command resumes,
in --output_dir. It writes results/tables/NAME.json, and docs/results.md from all tables; `page` does only that.

--recipe takes another training config than the table's, and --only some of its studies. Any setting of
`loraplus sweep` is an option too, such as --train.steps 1000.
"""

import argparse
import csv
import dataclasses
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import convergence
import overhead
from common import RESULTS, machine
from tables_page import write_page

from loraplus_jax._utils.atomic import to_json, write_text
from loraplus_jax._utils.json_files import read_json
from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.settings.yaml_files import read_yaml
from loraplus_jax.sweep.methods import compare_methods, compare_runs, method_run
from loraplus_jax.sweep.report import REPORT
from loraplus_jax.sweep.settings import SweepRun
from loraplus_jax.training.run_directory import CONFIG, read_summary
from loraplus_jax.training.signals import Stopped

REPOSITORY = Path(__file__).parents[1]
LAMBDAS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


class Sample(NamedTuple):
    """Rows of a file: at most `rows`, drawn at random among those of at most `characters`."""

    path: str
    rows: int | None = None
    characters: int | None = None


class Study(NamedTuple):
    """One comparison.

    Attributes:
      recipe: training config in configs/.
      settings: those that differ from the recipe, by dotted name.
      files: data settings that name a file in DATA.
    """

    recipe: str
    settings: Mapping[str, Any]
    files: Mapping[str, str | Sample] = {}


HALVING = {"sweep.rungs": [0.25], "sweep.keep": 0.5, "train.epochs": None}
"""Four settings a method: all for a quarter of the steps, two to the end."""
GLUE = {
    **HALVING,
    "data.validation_fraction": 0.1,
    "optimizer.warmup_steps": 10,
    "train.batch_size": 16,
    "train.eval_batch_size": 64,
    "train.steps": 100,
    "sweep.learning_rates": [2.5e-4, 5e-4, 1e-3, 2e-3],
    "sweep.lr_ratios": [4],
    "sweep.report_seeds": 5,
    "sweep.curve_points": 5,
    "sweep.methods": ["lora_plus", "full"],
}
SMOLLM2 = {
    **HALVING,
    "sweep.learning_rates": [1e-4, 2e-4, 4e-4, 8e-4],
    "sweep.lr_ratios": [4],
    "sweep.report_seeds": 3,
    "sweep.curve_points": 2,
    "sweep.methods": ["lora_plus"],
    "train.steps": 40,
}
ARC = {"train.batch_size": 2, "train.eval_batch_size": 2, "sweep.curve_points": 1}
METHODS = GLUE | {
    "optimizer.warmup_steps": 5,
    "train.steps": 40,
    "sweep.curve_points": 2,
    "sweep.methods": [
        *("lora_plus", "dora", "adalora", "pissa", "riemannian", "lora_rite", "lora_muon", "full"),
    ],
    # LoRA-Muon's rate is the norm of a step of A B, on another scale than the rates of entries.
    "sweep.method_learning_rates": {"lora_muon": [0.01, 0.03, 0.1, 0.3]},
}
LAMBDA_RATES = [2.5e-5, 1e-4, 4e-4, 1.6e-3, 6.4e-3]


def glue(name: str, length: int, **settings: Any) -> Study:
    """A task of GLUE with MiniLM."""
    own = {"data.path": f"glue/{name}", "data.max_length": length} | settings
    return Study("quickstart_sweep.yaml", GLUE | own, {"data.root": "glue"})


def commonsense(folder: str, length: int, characters: int, rows: int, **settings: Any) -> Study:
    """A set of LLM-Adapters with SmolLM2-135M, without its longest questions; tested on some of them."""
    train, test = (
        Sample(f"commonsense/{folder}/{split}.json", count, characters)
        for split, count in (("train", None), ("test", rows))
    )
    own = {"data.max_length": length} | settings
    return Study("smollm2_commonsense.yaml", SMOLLM2 | own, {"data.train": train, "data.test": test})


STUDIES: dict[str, dict[str, Study]] = {
    "glue": {
        "MRPC": glue("mrpc", 64),
        "STS-B": glue("stsb", 40, task="regression"),
        "SST-2": glue("sst2", 40, **{"data.validation_fraction": 0.01}),
        "CoLA": glue("cola", 24, **{"train.batch_size": 32}),
        "RTE": glue("rte", 96),
    },
    "commonsense": {
        "BoolQ": commonsense("boolq", 64, 180, 120, **{"data.validation_fraction": 0.005}),
        "ARC-Easy": commonsense("ARC-Easy", 128, 280, 40, **ARC | {"data.validation_fraction": 0.03}),
        "ARC-Challenge": commonsense(
            "ARC-Challenge", 128, 280, 40, **ARC | {"data.validation_fraction": 0.1}
        ),
    },
    "e2e": {
        "E2E": Study(
            "smollm2_e2e.yaml",
            SMOLLM2
            | {
                "data.template": "plain",
                "data.packing": False,
                "data.max_length": 112,
                "data.validation_fraction": 0.01,
                "optimizer.schedule": "linear",
                "generation.inputs": 24,
                "sweep.curve_points": 1,
            },
            {"data.train": "e2e/devset.csv", "data.test": "e2e/testset_w_refs.csv"},
        )
    },
    "lambda": {
        "reviews": Study(
            "quickstart_sweep.yaml",
            {
                "data.max_length": 32,
                "data.test_fraction": 0.1,
                "optimizer.warmup_steps": 8,
                "optimizer.max_grad_norm": None,  # "unstable" must be possible
                "train.batch_size": 16,
                "train.eval_batch_size": 128,
                "train.steps": 80,
                "sweep.method": "grid",
                "sweep.seeds": [0, 1],
                "sweep.learning_rates": LAMBDA_RATES,
                "sweep.lr_ratios": [LAMBDAS[0]],
                "sweep.methods": ["lora", "lora_plus"],
                "sweep.method_learning_rates": {"lora": LAMBDA_RATES},
                "sweep.report_seeds": 5,
                "sweep.curve_points": 6,
            },
        )
    },
    "methods": {
        "reviews": Study(
            "quickstart_sweep.yaml",
            METHODS | {"data.max_length": 32, "data.validation_fraction": 0.04, "data.test_fraction": 0.05},
        ),
        "STS-B": glue("stsb", 40, task="regression", **METHODS | {"sweep.curve_points": 1}),
        "instructions": Study(
            "smollm2_chat.yaml",
            SMOLLM2
            | {
                "data.validation_fraction": 0.03,
                "data.test_fraction": 0.03,
                "optimizer.warmup_steps": 2,
                "train.batch_size": 1,
                "train.steps": 12,
                "train.prompt": None,
                "sweep.report_seeds": 5,
                "sweep.curve_points": 1,
                # Without `full`: its moments and weights take 1.6 GB a member.
                "sweep.methods": METHODS["sweep.methods"][:-1],
                "sweep.method_learning_rates": METHODS["sweep.method_learning_rates"],
            },
        ),
    },
}
"""The studies of the tables that compare tuned methods, cheapest first."""
STUDY_OPTIONS = ("data", "recipe", "only")
"""Options of the tables with studies."""


def settings_of(study: Study, options: argparse.Namespace, directory: Path) -> SweepRun:
    """The settings of a study; what it samples of a file lies in the directory."""
    values = {"lora.init": "he_uniform", **study.settings}  # as in the published tables
    for name, file in study.files.items():
        source = (options.data or Path("data")) / (file.path if isinstance(file, Sample) else file)
        values[name] = source if isinstance(file, str) else sample(source, file, directory / "data")
    given = [part for name, value in values.items() for part in (f"--{name}", option(value))]
    recipe = options.recipe or REPOSITORY / "configs" / study.recipe
    return parse_settings(
        recipe, [*given, *options.settings, "--output_dir", str(directory / "runs")], SweepRun
    )


def option(value: Any) -> str:
    """A value as on the command line."""
    return value if isinstance(value, str) else str(value) if isinstance(value, Path) else json.dumps(value)


def sample(source: Path, wanted: Sample, directory: Path) -> Path:
    """Writes the rows of a .json or .csv file to a file of the same name, and returns its path."""
    with source.open(encoding="utf-8-sig", newline="") as file:
        rows = json.load(file) if source.suffix == ".json" else list(csv.DictReader(file))
    if wanted.characters is not None:
        rows = [row for row in rows if len(row["instruction"]) <= wanted.characters]
    if wanted.rows is not None:
        rows = random.Random(0).sample(rows, min(wanted.rows, len(rows)))
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / source.with_suffix(".jsonl").name
    write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def compare(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Runs or resumes the studies of a table; yields all that have finished, after each."""
    path = options.results / f"{name}.json"
    kept = json.loads(path.read_text())["studies"] if path.exists() else {}
    for title in only(options, STUDIES[name]):
        directory = options.output_dir / name / title
        run = settings_of(STUDIES[name][title], options, directory)
        done = Path(run.output_dir)
        if read_summary(done) is not None and read_yaml(done / CONFIG) == run.to_json():
            report = read_json(done / REPORT)
            # Where it ran, which need not be where its table is written.
            ran_on = kept.get(title, {}).get("machine") or machine()
        else:
            report = compare_lambdas(run) if name == "lambda" else compare_methods(run)
            ran_on = machine()
        protocol = report["protocol"] | {"batch": [run.train.batch_size, run.data.max_length], "data": title}
        if run.task == "generation":
            protocol["texts"] = run.generation.inputs
        kept[title] = report | {"protocol": protocol, "machine": ran_on}
        yield {"studies": {title: kept[title] for title in STUDIES[name] if title in kept}}


def only(options: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """The studies to run: all, or those of --only."""
    names = list(names)
    if unknown := [name for name in options.only or () if name not in names]:
        raise ValueError(f"--only must be of {', '.join(names)}, got {', '.join(unknown)}")
    return options.only or names


def compare_lambdas(run: SweepRun) -> dict[str, Any]:
    """Tunes each lambda on the same rates of A and compares it with lambda 1, which is plain LoRA."""
    runs, labels = {"lora": method_run(run, "lora")}, {"lora": "λ = 1 (LoRA)"}
    for ratio in LAMBDAS:
        name = f"lambda_{ratio:g}"
        one = dataclasses.replace(run, sweep=dataclasses.replace(run.sweep, lr_ratios=(ratio,)))
        place = str(Path(run.output_dir) / name)
        runs[name] = dataclasses.replace(method_run(one, "lora_plus"), output_dir=place)
        labels[name] = f"λ = {ratio:g}"
    return compare_runs(run, runs, labels)


def converge(_: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Runs what is missing of `convergence.py`."""
    minutes = math.inf if options.minutes is None else options.minutes
    for task in only(options, convergence.METHODS):
        convergence.run_missing(task, minutes, convergence.METHODS[task])
    yield {"machine": machine(), "studies": convergence.summary()}


def measure_overhead(*_: Any) -> Iterator[dict[str, Any]]:
    """Runs `overhead.py`."""
    yield {"machine": machine(), **overhead.measure()}


MAKE: dict[str, Callable[[str, argparse.Namespace], Iterator[dict[str, Any]]]] = {
    **dict.fromkeys(STUDIES, compare),
    "convergence": converge,
    "overhead": measure_overhead,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("name", choices=[*MAKE, "page"])
    parser.add_argument("--data", type=Path, metavar="DATA", help="default: data")
    parser.add_argument("--recipe", type=Path, metavar="CONFIG")
    parser.add_argument("--only", nargs="+", metavar="STUDY")
    parser.add_argument("--minutes", type=float, help="convergence: start no run after these")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/tables"))
    parser.add_argument("--results", type=Path, default=RESULTS / "tables", metavar="DIR")
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs", metavar="DIR")
    options, options.settings = parser.parse_known_args(arguments)
    takes = {"convergence": ("only", "minutes"), "overhead": (), "page": ()}.get(options.name, STUDY_OPTIONS)
    unused = [
        f"--{name}"
        for name in (*STUDY_OPTIONS, "minutes")
        if name not in takes and getattr(options, name) is not None
    ]
    unused += options.settings if options.name not in STUDIES else []
    if unused:
        parser.error(f"{options.name} does not take {' '.join(unused)}")
    try:
        for found in MAKE[options.name](options.name, options) if options.name != "page" else ():
            options.results.mkdir(parents=True, exist_ok=True)
            write_text(options.results / f"{options.name}.json", to_json(found, indent=1) + "\n")
            write_page(options.results, options.docs)
        write_page(options.results, options.docs)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except Stopped as stop:
        parser.exit(128 + stop.signal_number, f"{stop}\n")


if __name__ == "__main__":
    main()
