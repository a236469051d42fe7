"""Training commands beside the peers' on the same real files, to the end of training and of evaluation.

    python benchmarks/end_to_end.py --data DATA                  # all cases, 3 rounds; hours of 2 CPU cores
    python benchmarks/end_to_end.py --data DATA --cases quickstart,cola --rounds 5
    python benchmarks/end_to_end.py --data DATA --rounds 1 --steps 10 --limit 64 --name quick    # a quick look

DATA holds `glue` (GLUE's own folders). Needs peft, transformers and accelerate; chat also trl. In
results/NAME.json, cases measured before on the same machine stay.

Ours is `loraplus train` with the case's config. Peers are PEFT's LoRA+ in transformers' Trainer, its batches padded
to their longest text, drawn at random or grouped by length; and in TRL's SFTTrainer, with its packing or without.
All have the same weights, examples, split, truncation, batch size, schedule and rates, in float32 without dropout;
the tokens of the training split are compared. All evaluate the test split, train, evaluate the validation split
every so many steps, and evaluate the test split at the end. A peer scores choices as scripts do, each with its
prompt, in batches by length. Packed batches hold more examples, so the other runs take more steps, to train on as
many.

Each run is a process of its own; a round does each once, in random order, and ratios are medians over the rounds'
own. Steps are timed by rows of the log, without the first; their ratio is of seconds per 1,000 tokens of text. Ours
has no compiled programs of an earlier run. Peak memory is the process's highest resident set.
"""

import functools
import importlib.metadata
import itertools
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from common import arguments, machine, median_ratio, parse_options, read_json, report, take_turns, use_cpu
from end_to_end_peer import fingerprint

from loraplus_jax import save_adapter
from loraplus_jax.data.fetch import resolve
from loraplus_jax.data.glue import load_glue
from loraplus_jax.data.labels import class_labels, label_names
from loraplus_jax.data.multiple_choice import Question
from loraplus_jax.data.splits import limit_splits, load_splits, split_files
from loraplus_jax.inference.export import export_run
from loraplus_jax.models.files import open_files
from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.settings.schema import Settings
from loraplus_jax.step.fingerprints import fingerprint as weights_fingerprint
from loraplus_jax.step.sharding import make_mesh
from loraplus_jax.tasks import causal_lm
from loraplus_jax.tasks.interface import TaskData
from loraplus_jax.training.setup import build_model, load_model, task_class

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "datasets")
COMMAND = """
import atexit, sys
sys.path[:0] = {paths}
from end_to_end_peer import peak_bytes
atexit.register(lambda: open({result!r}, "w").write(str(peak_bytes())))
from loraplus_jax.cli.__main__ import run
run()
"""
"""The command `loraplus`, which at its end writes its peak memory."""
ENVIRONMENT = {
    # A program compiled by an earlier run would make the first step look fast.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "JAX_PLATFORMS": "cpu",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
    "TOKENIZERS_PARALLELISM": "true",
}


class Peer(NamedTuple):
    """One of PEFT's runs.

    Attributes:
      packing: whether batches are packed rows; for encoders not looked at.
      by_length: whether it groups examples by length.
      by_row: whether its batch goes through the model row by row, by gradient accumulation: TRL joins packed rows
        to one, whose attention masks all pairs of tokens of different rows.
    """

    packing: bool = False
    by_length: bool = False
    by_row: bool = False


class Case(NamedTuple):
    """What is trained.

    Attributes:
      config: training config in configs/.
      settings: those that differ from it, by dotted name; `{data}` stands for DATA.
      peers: the runs beside ours, by name.
    """

    config: str
    settings: Mapping[str, Any]
    peers: Mapping[str, Peer]


ENCODERS = {"PEFT": Peer(), "PEFT, by length": Peer(by_length=True)}
TRL = {
    "PEFT, TRL's packing": Peer(packing=True),
    "PEFT, TRL's packing, by row": Peer(packing=True, by_row=True),
    "PEFT, TRL": Peer(),
    "PEFT, TRL, by length": Peer(by_length=True),
}
GLUE = {"data.root": "{data}/glue", "data.max_length": 128, "train.steps": 100}
SST2 = {"data.path": "glue/sst2", "data.validation_fraction": 0.01}
BOOLQ = {"data.train": None, "data.test": None, "data.path": "{data}/commonsense/boolq/test.json"}
BOOLQ |= {"data.limit": 128, "data.validation_fraction": 0.1, "train.eval_batch_size": 16}
BOOLQ |= {"train.epochs": None, "train.steps": 8, "train.eval_every": 8}
CASES = {
    "quickstart": Case("quickstart.yaml", {}, ENCODERS),
    "cola": Case("quickstart.yaml", GLUE | {"data.path": "glue/cola"}, ENCODERS),
    "sst2": Case("quickstart.yaml", GLUE | SST2, ENCODERS),
    "mrpc": Case("quickstart.yaml", GLUE | {"data.path": "glue/mrpc"}, ENCODERS),
    "chat": Case("smollm2_chat.yaml", {"train.prompt": None}, TRL),
    "boolq": Case("smollm2_commonsense.yaml", BOOLQ, {"PEFT, TRL, by length": Peer(by_length=True)}),
}


class Prepared(NamedTuple):
    """A case with its data.

    Attributes:
      case: the case.
      directory: where its files are.
      settings: settings of our run.
      options: these on the command line.
      job: what its peers have in common.
      examples_per_row: examples of a packed row, on average.
    """

    case: Case
    directory: Path
    settings: Settings
    options: list[str]
    job: dict[str, Any]
    examples_per_row: float


def options_of(case: Case, options: Any, **more: Any) -> list[str]:
    """The case's options of `loraplus train`; --steps and --limit replace its own unless 0."""
    data = str(Path(options.data).absolute())
    own = {k: v.replace("{data}", data) if isinstance(v, str) else v for k, v in case.settings.items()}
    if options.steps:
        own |= {"train.steps": options.steps, "optimizer.warmup_steps": options.steps // 10}
    if options.limit:
        own |= {"data.limit": options.limit}
    return arguments(own | more)


def settings_of(case: Case, options: Sequence[str]) -> Settings:
    """The settings of our run."""
    return parse_settings(ROOT / "configs" / case.config, options)


def examples_of(settings: Settings) -> tuple[dict[str, list[Any]], int]:
    """The splits as a peer reads them, and the number of classes, 0 for a language model."""
    if settings.is_language:
        reader, names = causal_lm.READERS[settings.task], settings.data.column_names
        splits = split_files(settings.data, lambda file: reader(resolve(file, "data"), names))
        splits, _ = limit_splits(splits, settings.data)
        return {
            name: [
                as_question(row) if isinstance(row, Question) and name != "train" else as_chat(row)
                for row in rows
            ]
            for name, rows in splits.items()
        }, 0
    read = functools.partial(resolve, kind="data")
    splits = load_glue(settings.data)[0] if settings.data.glue else load_splits(settings.data, read)
    names = label_names(splits)
    splits, _ = limit_splits(splits, settings.data)

    def triples(rows: Any) -> list[Any]:
        labels = class_labels(rows, names).tolist()
        return [(row.prompt, row.pair, label) for row, label in zip(rows, labels, strict=True)]

    return {name: triples(rows) for name, rows in splits.items()}, len(names)


def as_question(question: Question) -> dict[str, Any]:
    """A question whose choices are to be scored."""
    prompt = [{"role": "user", "content": question.prompt}]
    return {"prompt": prompt, "choices": question.choices, "answer": question.answer}


def as_chat(example: Any) -> dict[str, Any]:
    """A conversation, or a question with its answer, as messages for TRL."""
    if isinstance(example, Question):
        answer = {"role": "assistant", "content": example.choices[example.answer]}
        return {"prompt": as_question(example)["prompt"], "completion": [answer]}
    messages = [turn.message for turn in example.turns]
    if [message["role"] for message in messages].count("assistant") > 1:
        raise ValueError(f"{example.place}: one answer expected")
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def sequences(columns: Mapping[str, np.ndarray]) -> Iterator[list[int]]:
    """The texts' tokens, of an encoder's ragged columns or in padded or packed rows."""
    segments = columns.get("segment_ids", [np.ones(len(ids), int) for ids in columns["input_ids"]])
    for ids, row in zip(columns["input_ids"], segments, strict=True):
        for segment in range(1, row.max() + 1):
            yield ids[row == segment].tolist()


def count_tokens(settings: Settings, data: TaskData, steps: int) -> list[tuple[int, int]]:
    """Tokens of text, and with padding, of each batch that a run of ours trains on."""
    seed = settings.seed
    plan = data.task.plan_batches(settings.task_options, data, steps, (seed,), make_mesh(1))
    name = "segment_ids" if "segment_ids" in data.splits["train"] else "attention_mask"
    masks = [plan.batch(seed, step)[name] for step in range(steps)]
    return [(int((mask > 0).sum()), mask.size) for mask in masks]


def load(settings: Settings) -> TaskData:
    """The data of a run of ours."""
    return task_class(settings).load(settings.task_options, open_files(resolve(settings.model.path, "model")))


def prepare(case: Case, options: Any, directory: Path) -> Prepared:
    """Writes the examples and, from a GGUF file, the weights for transformers, which ours then reads too."""
    settings, more = settings_of(case, options_of(case, options)), {}
    if settings.is_language:
        more["model.path"] = str(as_directory(settings, directory / "model"))
    given = options_of(case, options, **more)
    settings = settings_of(case, given)
    model = resolve(settings.model.path, "model")
    examples, classes = examples_of(settings)
    (directory / "examples.json").write_text(json.dumps(examples))
    columns = load(settings).splits["train"]
    job = {
        "language": settings.is_language,
        "model": str(model),
        "examples": str(directory / "examples.json"),
        "classes": classes,
        "settings": settings.to_json(),
        "train": fingerprint(sequences(columns)),
    }
    if settings.is_language:
        job["template"] = causal_lm.tokenizer_and_template(settings.task_options, open_files(model), None)[
            1
        ].source
    per_row = len(examples["train"]) / len(columns["input_ids"]) if settings.data.packing else 1.0
    return Prepared(case, directory, settings, given, job, per_row)


def as_directory(settings: Settings, to: Path) -> Path:
    """Exports a language model to a directory that transformers loads: its weights with an adapter that is zero."""
    files = open_files(resolve(settings.model.path, "model"))
    task = causal_lm.LanguageTask(kind="instruction")
    parts = load_model(settings, files, build_model(settings, files, task, settings.applied))
    parts = parts._replace(trainable=jax.tree.map(np.zeros_like, parts.trainable))
    notes = {"settings": settings.to_json(), "task": task.notes(), "base": weights_fingerprint(parts.frozen)}
    save_adapter(to.parent / "zero/adapter", parts.trainable, parts.specs, settings.applied, **notes)
    export_run(to.parent / "zero", to, merged=True)
    return to


def measure(prepared: Prepared, name: str) -> dict[str, Any]:
    """Does a run in a process of its own and returns what was measured."""
    case, peer, train = prepared.case, prepared.case.peers.get(name), prepared.settings.train
    # Unpacked runs take more steps, to train on as many examples as ours.
    factor = prepared.examples_per_row if peer is not None and not peer.packing else 1.0
    steps = max(1, round((train.steps or 0) * factor))
    # At a row of the log, from which an evaluation's time counts.
    every = max(1, round(train.eval_every * factor / train.log_every)) * train.log_every
    with tempfile.TemporaryDirectory(dir=prepared.directory) as directory:
        result, out = Path(directory) / "result", f"{directory}/run"
        if peer is not None:
            job = prepared.job | {
                "directory": out,
                "result": str(result),
                "steps": steps,
                "eval_every": every,
            }
            job |= {"packing": peer.packing, "by_length": peer.by_length}
            job["accumulate"] = train.batch_size if peer.by_row else 1
            (Path(directory) / "job.json").write_text(json.dumps(job))
            script = Path(__file__).with_name("end_to_end_peer.py")
            started, seconds = execute([str(script), f"{directory}/job.json"])
            found = json.loads(result.read_text())
            if found["train"] != prepared.job["train"]:
                raise SystemExit(f"{name}: its training tokens are not ours")
            rows, peak, seconds = found["rows"], found["peak_bytes"], seconds - found["extra_s"]
        else:
            own = arguments({"train.steps": steps, "train.eval_every": every, "output_dir": out})
            code = COMMAND.format(paths=[str(ROOT), str(Path(__file__).parent)], result=str(result))
            config = str(ROOT / "configs" / case.config)
            started, seconds = execute(["-c", code, "train", config, *prepared.options, *own])
            tokens = count_tokens(prepared.settings, load(prepared.settings), steps)
            rows, peak = our_rows(read_events(Path(out) / "tensorboard"), tokens), int(result.read_text())
    found = {"command_s": seconds, "peak_bytes": peak, **summarize(rows, started)}
    print(f"{name}: {found}", flush=True)
    return found


def execute(command: list[str]) -> tuple[float, float]:
    """Runs a Python process; returns the time of its start, and its seconds."""
    options: dict[str, Any] = {"capture_output": True, "text": True, "env": os.environ | ENVIRONMENT}
    started = time.time()
    done = subprocess.run([sys.executable, *command], check=False, **options)
    seconds = time.time() - started
    if done.returncode:
        raise SystemExit(f"{done.stderr[-4000:]}\na run ended with status {done.returncode}")
    return started, seconds


def read_events(directory: Path) -> list[tuple[float, int, dict[str, float]]]:
    """(time, step, values) of the rows of TensorBoard events, which say when they were written."""
    from tensorboardX.proto.event_pb2 import Event

    rows = []
    for path in sorted(directory.iterdir()):
        content = path.read_bytes()
        while content:
            # Length, its checksum, the event, its checksum.
            (size,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            if values := {value.tag: value.simple_value for value in event.summary.value}:
                rows.append((event.wall_time, event.step, values))
    return rows


def our_rows(
    events: Sequence[tuple[float, int, Mapping[str, float]]], tokens: Sequence[tuple[int, int]]
) -> list[dict[str, Any]]:
    """Rows of a run as a peer writes them, from its events and the tokens of its batches."""
    rows, done = [], 0
    for wall, step, values in events:
        row: dict[str, Any] = {"step": step, "wall": wall}
        if (rate := values.get("train/steps_per_second")) is not None:
            text, size = (sum(n) for n in zip(*tokens[done:step], strict=True))
            row |= {"seconds": (step - done) / rate, "text": text, "size": size}
            done = step
        for split, prefix in (("validation", "eval"), ("before/test", "test")):
            if (loss := values.get(f"{split}/loss")) is not None:
                row["metrics"] = {f"{prefix}_loss": loss}
        rows.append(row)
    return rows


def summarize(rows: Sequence[Mapping[str, Any]], started: float) -> dict[str, float]:
    """What a run's rows say; those of step 0 are written before training.

    The first row of steps is left out where there are more, as a first step is slower than others.
    """
    trained = [row for row in rows if "seconds" in row]
    steps = trained[-1]["step"]
    evaluated = [
        (after.get("evaluation_s", after["wall"] - before["wall"]), after["metrics"]["eval_loss"])
        for before, after in itertools.pairwise(rows)
        if "eval_loss" in after.get("metrics", {})
    ]
    kept = trained[1:] or trained
    seconds, text, size = (sum(row[name] for row in kept) for name in ("seconds", "text", "size"))
    return {
        "ready_s": max(row["wall"] for row in rows if row["step"] == 0) - started,
        "steps": steps,
        "train_s": sum(row["seconds"] for row in trained),
        "step_s": seconds / (steps - trained[0]["step"] if len(trained) > 1 else steps),
        "token_s": seconds / text * 1000,
        "text": text / size,
        "tokens": sum(row["text"] for row in trained),
        "evaluation_s": float(np.median([seconds for seconds, _ in evaluated])),
        "loss_before": next(row["metrics"]["test_loss"] for row in rows if "metrics" in row),
        "loss": evaluated[-1][1],
    }


def rows_of(title: str, runs: Mapping[str, Sequence[Mapping[str, float]]]) -> list[dict[str, str]]:
    """The table's lines; each run is a list of what its rounds measured, ours first."""
    rows = []
    for name, rounds in runs.items():
        one = {key: float(np.median([values[key] for values in rounds])) for key in rounds[0]}
        rows.append(
            {
                "case": title,
                "run": name,
                "steps": f"{one['steps']:.0f}",
                "text, %": f"{100 * one['text']:.0f}",
                "step, s": f"{one['step_s']:.3f}",
                "1,000 tokens of text, s": f"{one['token_s']:.3f}",
                "here / it": f"{ratio(runs, name, 'token_s'):.2f}",
                "training, s": f"{one['train_s']:.1f}",
                "evaluation, s": f"{one['evaluation_s']:.1f}",
                "command, s": f"{one['command_s']:.1f}",
                "command, here / it": f"{ratio(runs, name, 'command_s'):.2f}",
                "peak, GB": f"{one['peak_bytes'] / 1e9:.2f}",
                "validation loss": f"{one['loss']:.4f}",
            }
        )
    return rows


def ratio(runs: Mapping[str, Sequence[Mapping[str, float]]], name: str, key: str) -> float:
    """Our run over a run."""
    ours, its = ([values[key] for values in rounds] for rounds in (next(iter(runs.values())), runs[name]))
    return median_ratio(ours, its)


def main() -> None:
    options = parse_options(
        __doc__, data="data", cases=",".join(CASES), rounds=3, steps=0, limit=0, name="end_to_end"
    )
    if unknown := [name for name in options.cases.split(",") if name not in CASES]:
        raise SystemExit(f"--cases must be of {', '.join(CASES)}, got {', '.join(unknown)}")
    use_cpu()
    saved = read_json(f"{options.name}.json")
    kept: dict[str, Any] = saved["runs"] if saved.get("machine") == machine() else {}
    installed = {one.name: one.version for one in importlib.metadata.distributions()}
    given = {name: value for name, value in vars(options).items() if name != "data"}  # of this machine
    for title in options.cases.split(","):
        with tempfile.TemporaryDirectory() as directory:
            prepared = prepare(CASES[title], options, Path(directory))
            names = ("here", *CASES[title].peers)
            runs = {name: functools.partial(measure, prepared, name) for name in names}
            kept[title] = take_turns(runs, options.rounds, warmup=0)
        ordered = {name: kept[name] for name in CASES if name in kept}
        report(
            options.name,
            [row for name, runs in ordered.items() for row in rows_of(name, runs)],
            versions={name: installed[name] for name in PACKAGES if name in installed},
            options=given,
            unprinted={"runs": ordered},
        )


if __name__ == "__main__":
    main()
