"""How do tuned methods compare with tuned LoRA? The tables of docs/results.md, one command a table.

    python benchmarks/tables.py lambda --data DATA    # or methods, glue, repeat, batch, chat, commonsense, e2e

DATA holds `glue` (GLUE's own folders), `commonsense` (LLM-Adapters' folders) and `e2e` (E2E NLG's CSV files). A
table tunes its methods on equal budgets and compares them with tuned LoRA on other seeds. The same command resumes,
in --output_dir, where each study has a page with its tables. It writes results/tables/NAME.json.

--recipe takes another training config than the table's, and --only some of its studies. Any setting of
`loraplus sweep` is an option too, such as --train.steps 1000.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import RESULTS, arguments, machine, make_parser

from loraplus_jax._utils.atomic import to_json, write_text
from loraplus_jax._utils.json_files import MAX_ROWS_BYTES
from loraplus_jax._utils.records import read_record
from loraplus_jax._utils.yaml_files import read_yaml
from loraplus_jax.data.fetch import ASSETS, fetch
from loraplus_jax.settings.parsing import parse_settings, settings_from_json
from loraplus_jax.sweep.arms import Arm, SharedProgram
from loraplus_jax.sweep.report import REPORT
from loraplus_jax.sweep.run import sweep
from loraplus_jax.sweep.settings import SweepRun
from loraplus_jax.sweep.trial import Trial
from loraplus_jax.sweep.unit import unit_directory
from loraplus_jax.training.run_files import CONFIG, RESULT, read_summary
from loraplus_jax.training.signals import Stopped

REPOSITORY = Path(__file__).parents[1]


class Sample(NamedTuple):
    """At most `rows` rows of a file or a named data set, drawn at random among those of at most `characters`.

    With `spelled`, questions of LLM-Adapters are answered by the text of a choice instead of its number.
    """

    path: str
    rows: int | None = None
    characters: int | None = None
    spelled: bool = False


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


BFLOAT16 = {"model.dtype": "bfloat16"}
"""Faster on a CPU with bfloat16 instructions. The studies of CoLA compute in float32."""
FORGETTING = {"sweep.unrelated_text": Sample("wiki-demo", 60)}
"""The text on which every language study measures what a method forgets."""
MIDDLES = {
    "lora": 1.4e-3,
    "lora_plus": 7e-4,
    "lora_b": 1.4e-3,
    "dora": 1.4e-3,
    "adalora": 2.8e-3,
    "pissa": 3.5e-4,
    "riemannian": 1.4e-3,
    "lora_rite": 6e-4,
    "lora_muon": 0.03,  # the norm of a step of A B, on another scale than the rates of entries
    "full": 8e-5,
}
"""The middle of the rates of each method, around what short runs found best."""


def tuned(*methods: str, points: int) -> dict[str, Any]:
    """Each method's four rates, and more while its best is at the edge.

    All to the end, as halving at a quarter of the steps selects too high a rate.
    """
    rates = {
        name: [float(f"{MIDDLES[name] * factor:.3g}") for factor in (0.25, 0.63, 1.6, 4)] for name in methods
    }
    return {
        "sweep.method": "grid",
        "sweep.methods": list(methods),
        "sweep.learning_rates": rates.pop("lora_plus"),
        "sweep.method_learning_rates": rates,
        "sweep.lr_ratios": [4],
        "sweep.widen": 3,
        "sweep.report_seeds": 5,
        "sweep.curve_points": points,
    }


GLUE = {
    "data.max_length": 128,
    "data.validation_fraction": 0.1,
    "optimizer.warmup_steps": 20,
    "train.batch_size": 32,
    "train.eval_batch_size": 64,
    "train.steps": None,
    "train.epochs": 3.0,
    **tuned("lora", "lora_plus", "full", points=20),
}
"""Whole epochs, at GLUE's own batch size."""
SST2 = {"data.validation_fraction": 0.01, "data.limit": 10_000, "train.epochs": 1.0}
"""A seventh of its rows: with all, two cores would take about six hours for λ."""
QNLI = {
    **GLUE,
    **BFLOAT16,
    "data.text": "question",
    "data.text_pair": "sentence",
    "data.label": "label",
    "data.quoting": "none",
    "data.test_fraction": 0.2,
}
"""Its training file is large: a part of dev is held out instead."""
FIVE = {
    "sweep.learning_rates": [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3],
    "sweep.method_learning_rates": {},
    "sweep.methods": ["lora_plus"],
}
"""Five rates of LoRA+, and as many of LoRA over the same range of η_A and η_B."""
SMOLLM2 = {
    "train.steps": None,
    "train.epochs": 1.0,
    "train.prompt": None,
    **BFLOAT16,
    **tuned("lora", "lora_plus", points=4),
}
"""An epoch."""
HALF = {"data.limit": 440, "train.batch_size": 2}
"""Half of the instructions, in as many steps: with all, two cores would take four to six hours."""
METHODS = {
    **BFLOAT16,
    "optimizer.warmup_steps": 20,
    "train.steps": 300,
    "train.epochs": None,
    "train.batch_size": 16,
    "train.eval_batch_size": 64,
    **tuned(*MIDDLES, points=10),  # with 20, evaluating would take over twice as long as training
}
LAMBDA = {
    "train.steps": None,
    "train.epochs": 2.0,
    "sweep.method": "grid",
    # Of λ = 1; `lambdas` divides them by √λ, so that the product of both factors' rates is the same.
    "sweep.learning_rates": [2.5e-4, 7.1e-4, 2e-3],
    "sweep.method_learning_rates": {},
    "sweep.widen": 3,
    "sweep.lr_ratios": [2, 4, 8, 16, 32],
    "sweep.methods": ["lora", "lora_plus"],
    "sweep.report_seeds": 5,
    "sweep.curve_points": 10,
}
"""Every rate to the end, and more where the best is at the edge."""
LAMBDA_32 = {
    **LAMBDA,
    "lora.init": "lora_b",
    "sweep.lr_ratios": [32],
    "sweep.learning_rates": [4.42e-5, 1.26e-4, 3.54e-4],
    "sweep.method_learning_rates": {"lora": LAMBDA["sweep.learning_rates"]},
}
LAMBDA_CHAT = {
    **LAMBDA,
    **BFLOAT16,
    **HALF,
    "train.epochs": 1.0,
    "train.prompt": None,
    "sweep.learning_rates": [4e-4, 1e-3, 2.5e-3],
    "sweep.report_seeds": 3,
    "sweep.curve_points": 4,
}
STARTS = {
    "B zero": {"lora.init": "lora"},
    "A zero": {"lora.init": "lora_b", "sweep.lr_ratios": [*LAMBDA["sweep.lr_ratios"], 64, 128]},
}
"""Which factor is zero before the first step. With A zero a larger λ is better."""


def glue(name: str, **settings: Any) -> Study:
    """A task of GLUE with MiniLM."""
    return Study(
        "quickstart_sweep.yaml", GLUE | {"data.path": f"glue/{name}"} | settings, {"data.root": "glue"}
    )


def commonsense(**files: Sample) -> Study:
    """A set of LLM-Adapters with SmolLM2-135M."""
    settings: dict[str, Any] = {
        "data.template": "model",
        "data.max_length": 256,
        "data.packing": True,
        "data.validation_fraction": 0.06,
        "train.batch_size": 2,
        "train.eval_batch_size": 8,
        "sweep.report_seeds": 3,
        "sweep.curve_points": 1,
    }
    if "path" in files:  # instead of the recipe's files
        settings |= {"data.train": None, "data.test": None}
    files = {f"data.{name}": file for name, file in files.items()}
    return Study("smollm2_commonsense.yaml", SMOLLM2 | settings, files | FORGETTING)


ARC_EASY = commonsense(
    train=Sample("commonsense/ARC-Easy/train.json", 1000, 200, True),
    test=Sample("commonsense/ARC-Easy/test.json", 200, 200, True),
)
STUDIES: dict[str, dict[str, Study]] = {
    "glue": {
        "CoLA": glue("cola", **FIVE | {"sweep.methods": ["lora_plus", "full"]}),
        "STS-B": glue("stsb", task="regression", **BFLOAT16),
        "MRPC": glue("mrpc", **BFLOAT16),
        "RTE": glue("rte", **BFLOAT16),
        "QNLI": Study("quickstart_sweep.yaml", QNLI, {"data.path": "glue/QNLI/dev.tsv"}),
        "SST-2": glue("sst2", **BFLOAT16 | SST2),
    },
    "chat": {"instructions": Study("smollm2_chat.yaml", SMOLLM2, FORGETTING)},
    "commonsense": {
        "ARC-Easy": ARC_EASY,
        # Only its test file is there: a part of it is held out.
        "PIQA": commonsense(path=Sample("commonsense/piqa/test.json", 1000, 200, True)),
        "BoolQ": commonsense(
            train=Sample("commonsense/boolq/train.json", 1000, 180),
            test=Sample("commonsense/boolq/test.json", 200, 180),
        ),
    },
    "e2e": {
        "E2E": Study(
            "smollm2_e2e.yaml",
            # A third of the rows of both files: with all, two cores would take about six hours.
            SMOLLM2 | {"data.limit": 1500, "generation.inputs": 200, "sweep.report_seeds": 3},
            {"data.train": "e2e/devset.csv", "data.test": "e2e/testset_w_refs.csv", **FORGETTING},
        )
    },
    # Does a verdict hold on a search seed and report seeds that it has not seen?
    "repeat": {
        "CoLA, A zero, seeds 100 to 105": glue("cola", seed=100, **LAMBDA_32),
        "CoLA, seeds 100 to 105": glue("cola", seed=100, **FIVE),
        "ARC-Easy, seeds 100 to 103": ARC_EASY._replace(settings={**ARC_EASY.settings, "seed": 100}),
    },
    # With the 32 rows of GLUE's CoLA: as many examples, so other numbers of steps.
    "batch": {
        f"CoLA, {rows} rows": glue(
            "cola",
            **FIVE
            | {
                "train.batch_size": rows,
                "optimizer.warmup_steps": 640 // rows,
                "sweep.learning_rates": [rate * (rows / 32) ** 0.5 for rate in FIVE["sweep.learning_rates"]],
            },
        )
        for rows in (8, 128)
    },
    "lambda": {
        f"{data}, {start}": study._replace(settings={**study.settings, **settings})
        for data, study in {
            "CoLA": glue("cola", **LAMBDA),
            "instructions": Study("smollm2_chat.yaml", LAMBDA_CHAT, FORGETTING),
            "SST-2": glue("sst2", **LAMBDA | BFLOAT16 | SST2),
        }.items()
        for start, settings in STARTS.items()
    },
    "methods": {
        "reviews": Study("quickstart_sweep.yaml", METHODS),
        # Without `full`, whose moments and weights take 1.6 GB a member, and `lora_b`, which `lambda` has.
        "instructions": Study(
            "smollm2_chat.yaml",
            SMOLLM2
            | HALF
            | tuned(*(name for name in MIDDLES if name not in ("full", "lora_b")), points=4)
            | {"sweep.report_seeds": 3},
            FORGETTING,
        ),
    },
}
"""By table."""


def settings_of(study: Study, options: argparse.Namespace, directory: Path) -> SweepRun:
    """The settings of a study; what it samples of a file lies in the directory."""
    values = dict(study.settings)
    for name, file in study.files.items():
        path = file.path if isinstance(file, Sample) else file
        source = fetch(path) if path in ASSETS else options.data / path
        values[name] = source if isinstance(file, str) else sample(source, file, directory / "data")
    recipe = options.recipe or REPOSITORY / "configs" / study.recipe
    words = [*arguments(values), *options.settings, "--output_dir", str(directory / "runs")]
    return parse_settings(recipe, words, SweepRun)


def sample(source: Path, wanted: Sample, directory: Path) -> Path:
    """Writes the rows of a .json or .jsonl file to a .jsonl file of the same name, and returns its path."""
    with source.open(encoding="utf-8-sig") as file:
        rows = json.load(file) if source.suffix == ".json" else [json.loads(line) for line in file]
    if wanted.spelled:
        rows = [spell(row) for row in rows]
    if wanted.characters is not None:
        rows = [
            row
            for row in rows
            if len(row["instruction"]) + max(map(len, row.get("choices", [""]))) <= wanted.characters
        ]
    if wanted.rows is not None:
        rows = random.Random(0).sample(rows, min(wanted.rows, len(rows)))
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / source.with_suffix(".jsonl").name
    write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def spell(row: Mapping[str, str]) -> dict[str, Any]:
    """A question of LLM-Adapters, "... question: Q", "Answer1: A Answer2: B", "Answer format", by its choices."""
    question, _, rest = row["instruction"].rpartition("Answer format")[0].partition("\n\n")
    choices = [choice.strip() for choice in re.split(r"(?:Answer|Solution)\d: ", rest)[1:]]
    number = int(row["answer"].removeprefix("answer").removeprefix("solution"))
    text = question.partition("question: ")[2]
    return {"instruction": text, "choices": choices, "answer": choices[number - 1]}


def compare(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Runs or resumes the studies of a table; yields all that have finished, after each."""
    path = options.results / f"{name}.json"
    kept = json.loads(path.read_text())["studies"] if path.exists() else {}
    studies = STUDIES[name]
    if unknown := [title for title in options.only or () if title not in studies]:
        raise ValueError(f"--only must be of {'; '.join(studies)}; got {'; '.join(unknown)}")
    for title in options.only or studies:
        run = settings_of(studies[title], options, options.output_dir / name / title)
        done = Path(run.output_dir)
        # Parsed, so that a setting that a finished study of an earlier version lacks has its default.
        if read_summary(done) is not None and settings_from_json(read_yaml(done / CONFIG), SweepRun) == run:
            report = by_method(read_record(done / REPORT, limit=MAX_ROWS_BYTES))
            # Where it ran, which need not be where its table is written.
            old = kept.get(title, {})
            ran_on = old["machine"] if old.get("methods") == report["methods"] else machine()
        else:
            report = by_method(sweep(run, programs=[lambdas(run)] if name == "lambda" else None))
            ran_on = machine()
        protocol = report["protocol"] | {"batch": [run.train.batch_size, run.data.max_length], "data": title}
        protocol["dtype"] = run.model.dtype
        # Those of all its units, also of those that an earlier command ran.
        units = done.glob(f"**/{unit_directory(Path(), '*') / RESULT}")
        seconds = [read_record(unit, limit=MAX_ROWS_BYTES)["seconds"] for unit in units]
        protocol["hours"] = sum(seconds) / 3600
        if run.task == "generation":
            protocol["texts"] = run.generation.inputs
        if run.sweep.unrelated_text:
            protocol["unrelated_text"] = Path(run.sweep.unrelated_text).name
        kept[title] = report | {"protocol": protocol, "machine": ran_on}
        yield {title: kept[title] for title in studies if title in kept}


def by_method(report: Mapping[str, Any]) -> dict[str, Any]:
    """A sweep's report with all that is of one method together, as those of earlier versions have it."""
    if "comparisons" not in report:
        return {name: report[name] for name in ("verdict", "protocol", "methods")}
    # Each setting at its last comparison.
    search = {(row["arm"], *(row[name] for name in Trial._fields)): row for row in report["search"]}
    report = {**report, "search": list(search.values())}
    protocol, differences = report["protocol"], {row["first"]: row for row in report["comparisons"]}
    methods = {
        name: method
        | {part: [row for row in report[part] if row["arm"] == name] for part in ("search", "runs")}
        | {"chosen": report["chosen"].get(name), "settings": protocol["settings"][name]}
        | {"against_lora": differences.get(name)}
        for name, method in report["methods"].items()
    }
    return {"verdict": report["verdict"], "protocol": protocol, "methods": methods}


def lambdas(run: SweepRun) -> SharedProgram:
    """Each λ with its rates of η_A, beside λ = 1, which is plain LoRA."""
    arms = []
    for ratio in (1.0, *run.sweep.lr_ratios):
        rates = (float(f"{rate / ratio**0.5:.3g}") for rate in run.sweep.learning_rates or ())
        trials = tuple(Trial(rate, ratio, run.lora.alpha, run.lora.rank) for rate in rates)
        name, label = ("lora", "λ = 1 (LoRA)") if ratio == 1 else (f"lambda_{ratio:g}", f"λ = {ratio:g}")
        arms.append(Arm(name, label, trials))
    return SharedProgram(run, tuple(arms))


def main(arguments: Sequence[str] | None = None) -> None:
    paths = {"data": Path("data"), "output_dir": Path("runs/tables"), "results": RESULTS / "tables"}
    parser = make_parser(__doc__, name=list(STUDIES), **paths)
    parser.add_argument("--recipe", type=Path, metavar="CONFIG")
    parser.add_argument("--only", nargs="+", metavar="STUDY")
    options, options.settings = parser.parse_known_args(arguments)
    try:
        for studies in compare(options.name, options):
            options.results.mkdir(parents=True, exist_ok=True)
            content = to_json({"studies": studies}, indent=1) + "\n"
            write_text(options.results / f"{options.name}.json", content)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except Stopped as stop:
        parser.exit(128 + stop.signal_number, f"{stop}\n")


if __name__ == "__main__":
    main()
