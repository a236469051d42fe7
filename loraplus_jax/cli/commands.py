"""The command line: `loraplus train | sweep | inspect | plan | eval | predict | generate | export | fetch`."""

import argparse
import contextlib
import errno
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from .._utils.atomic import to_json
from .._utils.validation import check_new_file, escape_controls, expand_path

DTYPES = ("float32", "bfloat16", "float16", "q8_0")
TRACEBACK = "LORAPLUS_TRACEBACK"
WITH_SETTINGS = ("train", "sweep", "inspect", "plan")
FLAGS = ("--fresh", "--search", "--help", "-h")
RUN_HELP = "finished run, adapter directory or merged model"
PEFT_CONFIG_HELP = "for a PEFT adapter: a training config with the same data and task"
ALLOW = "--allow_different"
ALLOW_HELP = (
    "part that may differ from what the run was made with, such as base.config or tokenizer; repeatable (an error "
    "names the part)"
)
OPTIONS = {"plan": ("--topology", "--json"), "train": (ALLOW,), "sweep": (ALLOW,)}
"""Options that take a value and are not settings, by command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command, prints errors as one line, and returns the exit code.

    The code is 0 on success, 1 if training fails, 2 for invalid input, and 128 plus the signal number if stopped. A
    stdout that cannot be written stops a command as SIGPIPE does.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not os.environ.get(TRACEBACK):
        # Orbax logs tracebacks of the errors that it raises, asyncio those of the reads that orbax abandons then.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    stdout, code = Output(sys.stdout), 0
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(Output(sys.stderr)):  # pyright: ignore
        try:
            if stdout.error is None:
                code = _run_command(arguments)
        except SystemExit:  # argparse has printed help
            pass
        finally:
            stdout.flush()
        if stdout.error is not None and not code:
            code = _report(stdout.problem, 128 + signal.SIGPIPE)
    return code


class Output:
    """A text stream that keeps the first error of a write in `error` and drops all output after it.

    Training checks `error` after every step, so that a broken pipe or a full disk stops it as a signal does.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        with contextlib.suppress(AttributeError):  # characters that the terminal lacks are escaped
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore
        self.error = None if stream else OSError(errno.EBADF, os.strerror(errno.EBADF))

    @property
    def problem(self) -> str:
        """The error as a phrase."""
        return f"cannot write to stdout ({self.error and self.error.strerror})"

    def write(self, text: str) -> int:
        """Writes text, unless an earlier write has failed."""
        self._attempt("write", text)
        return len(text)

    def flush(self) -> None:
        """Flushes the stream, unless an earlier write has failed."""
        self._attempt("flush")

    def _attempt(self, method: str, *arguments: str) -> None:
        if self.error is None:
            try:
                getattr(self._stream, method)(*arguments)
            except OSError as error:
                self.error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _run_command(arguments: list[str]) -> int:
    # The commands import optional packages, so that --help is fast and a missing package is named.
    try:
        options, overrides = _parse(arguments)
        if overrides and options.command not in WITH_SETTINGS:
            raise ValueError(f"{options.command} does not accept {' '.join(overrides)}")
        for name, value in vars(options).items():
            if isinstance(value, Path):
                setattr(options, name, expand_path(f"--{name}", value))
        options.run(options, overrides)
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get(TRACEBACK):
            raise
        is_missing = isinstance(error, ModuleNotFoundError)
        message = (
            f"{error.name} is not installed; run pip install 'loraplus_jax[train]'" if is_missing else error
        )
        return _report(f"error: {message}", 2)
    except (MemoryError, RuntimeError) as error:
        if os.environ.get(TRACEBACK) or not _is_out_of_memory(error):
            raise
        from ..training.memory import MEMORY_ADVICE

        return _report(f"error: out of memory; {MEMORY_ADVICE}", 2)
    except KeyboardInterrupt:
        return _report("interrupted", 130)
    return options.code


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Splits the arguments into options and settings; only commands with a config file take settings."""
    if not arguments or arguments[0] not in WITH_SETTINGS:
        return _parser().parse_known_args(arguments)
    command, *rest = arguments
    config = [rest.pop(0)] if rest and not rest[0].startswith("-") else []
    options, settings = [], []
    while rest:
        word = rest.pop(0)
        takes_value = word.partition("=")[0] in OPTIONS.get(command, ())
        (options if takes_value or word in FLAGS else settings).append(word)
        if takes_value and "=" not in word:
            options += rest[:1]
            del rest[:1]
    return _parser().parse_args([command, *config, *options]), settings


def _report(message: str, code: int) -> int:
    # Our messages indent the lines after the first; any other line break comes from the user's text.
    print("\n  ".join(map(escape_controls, f"loraplus: {message}".split("\n  "))), file=sys.stderr)
    return code


def _print(text: str) -> None:
    """Prints a result of several lines."""
    print("\n".join(map(escape_controls, text.split("\n"))))


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others; argparse would print every option before it."""

    def error(self, message: str) -> NoReturn:
        """Raises ValueError with the message of argparse, and where the options are listed."""
        raise ValueError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="loraplus",
        description="Fine-tune pretrained models with LoRA+.",
        epilog=f"Set {TRACEBACK}=1 to show tracebacks.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: object, text: str, **options: object) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, **options)  # pyright: ignore
        command.set_defaults(run=run, code=0)
        return command

    train = add("train", _train, "fine-tune and evaluate a model", add_help=False)
    inspect = add(
        "inspect", _inspect, "show trainable parameters and learning rates, without training", add_help=False
    )
    sweep = add(
        "sweep", _sweep, "tune lambda and the learning rates, and compare LoRA+ with LoRA", add_help=False
    )
    plan = add(
        "plan", _plan, "estimate memory and time of a training step, without weights or data", add_help=False
    )
    for command in (train, sweep, inspect, plan):
        command.add_argument("config", nargs="?")
        command.add_argument("-h", "--help", action="store_true")
    for command in (train, sweep):
        command.add_argument("--fresh", action="store_true")
        command.add_argument(ALLOW, action="append", default=[])
    plan.add_argument("--topology", metavar="NAME", help="TPU topology to compile for, such as v5e:16x16")
    plan.add_argument("--search", action="store_true", help="search for the fastest layout that fits")
    plan.add_argument("--json", metavar="FILE", type=Path, help="also write the plan to FILE as JSON")
    evaluate = add("eval", _eval, "evaluate a finished run or adapter")
    evaluate.add_argument(
        "run_directory",
        metavar="RUN",
        type=Path,
        help=f"{RUN_HELP}; with --tasks also a model without adapters",
    )
    evaluate.add_argument("--split", help="split to evaluate: train, validation or test (default: test)")
    evaluate.add_argument("--data", help="labelled file to evaluate instead of a split")
    _task_options(evaluate)
    evaluate.add_argument("--config", help=PEFT_CONFIG_HELP)
    predict = add(
        "predict",
        _predict,
        "predict classes or numbers for texts",
    )
    predict.add_argument("run_directory", metavar="RUN", type=Path, help=RUN_HELP)
    predict.add_argument("--text", action="append", default=[], help="text to predict for; repeatable")
    predict.add_argument("--data", help="file of texts, instead of --text")
    predict.add_argument(
        "--glue",
        type=Path,
        metavar="DIR",
        help="write the predictions for the test split of the run's GLUE task to DIR, as GLUE's server takes them",
    )
    predict.add_argument("--config", help=PEFT_CONFIG_HELP)
    predict.add_argument("--output", type=Path, help="new .jsonl file to write, instead of stdout")
    generate = add("generate", _generate, "answer prompts with a language model, fine-tuned or not")
    _generate_options(generate)
    export = add("export", _export, "export a run's adapter for PEFT, or the merged model")
    _export_options(export)
    for command in (evaluate, predict, generate, export):
        command.add_argument(ALLOW, action="append", default=[], metavar="PART", help=ALLOW_HELP)
    fetch = add("fetch", _fetch, "download a model or dataset by name; without a name, list all")
    fetch.add_argument("name", nargs="?", metavar="NAME", help="model or dataset to download")
    return parser


def _task_options(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument(
        "--tasks",
        metavar="NAMES",
        help="instead of a split: boolq, piqa, social_iqa, hellaswag, winogrande, arc_easy, arc_challenge, "
        "openbookqa (files of LLM-Adapters) or mmlu; separated by commas",
    )
    evaluate.add_argument("--data_root", type=Path, metavar="DIR", help="directory with the files of --tasks")
    evaluate.add_argument(
        "--shots", type=int, help="solved examples before each question of mmlu (default: 5)"
    )
    evaluate.add_argument(
        "--limit", type=int, help="evaluate only so many questions of each task and subject"
    )
    evaluate.add_argument("--batch_size", type=int, help="sequences per batch of --tasks (default: 8)")
    evaluate.add_argument(
        "--template", help="chat template of a model: model, plain, completion or a file; a run uses its own"
    )
    evaluate.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="weight dtype of a model; a run uses its own"
    )
    evaluate.add_argument(
        "--output",
        type=Path,
        help="new file: .json for the results of --tasks (default: RUN/tasks.json), or .jsonl for the texts of a "
        "run of task generation",
    )


def _generate_options(generate: argparse.ArgumentParser) -> None:
    generate.add_argument("model", metavar="RUN|MODEL", help="finished run, adapter directory or model")
    generate.add_argument("--prompt", action="append", default=[], help="prompt to answer; repeatable")
    generate.add_argument("--data", help="file of conversations; regenerates the last answer of each")
    generate.add_argument("--system", help="system message before every --prompt")
    generate.add_argument(
        "--max_tokens",
        type=int,
        help="maximum tokens of an answer (default: 128; a run of task generation uses its own)",
    )
    generate.add_argument(
        "--beams",
        type=int,
        help="answer by beam search with this many beams; a run of task generation uses its own",
    )
    generate.add_argument(
        "--length_penalty",
        type=float,
        help="power of the length that divides log-probabilities; needs several beams (default: 1)",
    )
    generate.add_argument(
        "--no_repeat_ngram",
        type=int,
        help="no sequence of this many tokens appears twice in an answer (default: 0, all may)",
    )
    generate.add_argument(
        "--temperature", type=float, default=0.0, help="sampling temperature; 0 is greedy (default: 0)"
    )
    generate.add_argument(
        "--top_p", type=float, default=1.0, help="nucleus sampling probability (default: 1, all tokens)"
    )
    generate.add_argument("--seed", type=int, help="random seed for sampling (default: 0)")
    generate.add_argument("--batch_size", type=int, default=8, help="prompts per batch (default: 8)")
    generate.add_argument(
        "--template", help="chat template of a model: model, plain, completion or a file; a run uses its own"
    )
    generate.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="weight dtype of a model; a run uses its own"
    )
    generate.add_argument("--config", help=PEFT_CONFIG_HELP)
    generate.add_argument("--output", type=Path, help="new .jsonl file to write, instead of stdout")


def _export_options(export: argparse.ArgumentParser) -> None:
    export.add_argument("run_directory", metavar="RUN", type=Path, help="finished run or adapter directory")
    export.add_argument("--to", type=Path, required=True, metavar="DIR", help="new directory to write")
    export.add_argument(
        "--merged", action="store_true", help="write the full model, with the adapter merged into its weights"
    )
    export.add_argument(
        "--dequantized",
        action="store_true",
        help="merge into the weights as model.quantize packed them, instead of the original ones",
    )
    export.add_argument("--format", choices=("hf", "gguf"), help="format of a merged model (default: hf)")
    export.add_argument(
        "--dtype",
        choices=DTYPES,
        help="weight dtype of a merged model (default: the base model's for hf, float16 for gguf)",
    )
    export.add_argument(
        "--base_model",
        metavar="NAME",
        help="Hub id or path of the base in adapter_config.json (default: the run's model, as a local path)",
    )


def _train(options: argparse.Namespace, overrides: list[str]) -> None:
    if _show_help(options):
        return
    from ..settings.parsing import parse_settings
    from ..training.trainer import train

    _run(options, train, lambda: parse_settings(options.config, overrides))


def _sweep(options: argparse.Namespace, overrides: list[str]) -> None:
    from ..sweep.settings import SweepRun

    if _show_help(options, SweepRun):
        return
    from ..settings.parsing import parse_settings
    from ..sweep.methods import sweep_or_compare

    _run(options, sweep_or_compare, lambda: parse_settings(options.config, overrides, SweepRun))


def _run(
    options: argparse.Namespace, training: Callable[..., object], settings: Callable[[], object]
) -> None:
    """Runs training; sets the exit code if it is stopped or fails."""
    from ..training.anomalies import TrainingFailed
    from ..training.distributed import LostProcess
    from ..training.signals import Stopped

    try:
        training(settings(), fresh=options.fresh, allow_different=options.allow_different)
    except Stopped as stop:
        problem = f"{sys.stdout.problem}; " if stop.signal_number == signal.SIGPIPE else ""  # pyright: ignore
        options.code = _report(f"{problem}{stop}", 128 + stop.signal_number)
    except TrainingFailed as failure:
        options.code = _report(f"training failed: {failure}", 1)
    except LostProcess as lost:
        options.code = _report(str(lost), 1)


def _inspect(options: argparse.Namespace, overrides: list[str]) -> None:
    from ..settings.parsing import parse_settings
    from ..training.inspect import inspect

    if not _show_help(options):
        _print(inspect(parse_settings(options.config, overrides)))


def _plan(options: argparse.Namespace, overrides: list[str]) -> None:
    if _show_help(options):
        return
    from ..plan.plan import make_plan
    from ..plan.text import format_plan, write_json
    from ..settings.parsing import parse_settings

    if options.json is not None:
        check_new_file("--json", options.json)
    settings = parse_settings(options.config, overrides)
    if options.search:
        _search(options, overrides, settings)
        return
    plan = make_plan(settings, options.topology)
    _print(format_plan(plan, settings))
    if options.json is not None:
        write_json(options.json, plan, settings)


def _search(options: argparse.Namespace, overrides: list[str], settings: Any) -> None:
    """Searches for the fastest layout; settings on the command line stay as they are."""
    from ..plan.search import Search
    from ..plan.text import explain_no_fit, format_plan, format_search, write_search
    from ..plan.tpu import tpu_devices

    if options.topology is None:
        raise ValueError("plan --search compares times at a chip's rates; pass --topology, such as v5e:16x16")
    fixed = {word.partition("=")[0].removeprefix("--") for word in overrides if word.startswith("--")}
    search = Search(settings, *tpu_devices(options.topology), fixed)
    search.run(lambda line: print(escape_controls(line), file=sys.stderr, flush=True))
    command = ["loraplus", "train", str(options.config), *overrides]
    _print(format_search(search, settings, command))
    if search.best is not None and search.best.plan is not None:
        _print(format_plan(search.best.plan, search.best.layout.apply(settings)))
    else:
        options.code = _report(f"error: {explain_no_fit(search)}", 2)
    if options.json is not None:
        write_search(options.json, search, settings, command)


def _show_help(options: argparse.Namespace, kind: type | None = None) -> bool:
    """Prints every setting for --help; returns whether it did. Raises ValueError without a config file."""
    from ..settings.parsing import format_help
    from ..settings.schema import Settings

    if options.help:
        print(format_help(kind or Settings, options.command))
    elif options.config is None:
        raise ValueError(f"{options.command} requires a config file: loraplus {options.command} CONFIG")
    return options.help


def _eval(options: argparse.Namespace, _: list[str]) -> None:
    shared = {name: getattr(options, name) for name in ("output", "config", "allow_different")}
    splits = {name: getattr(options, name) for name in ("split", "data")}
    names = ("data_root", "shots", "limit", "batch_size", "template", "dtype")
    only_tasks = {name: getattr(options, name) for name in names}
    excluded = only_tasks if options.tasks is None else splits
    if given := [f"--{name}" for name, value in excluded.items() if value is not None]:
        relation = "requires" if options.tasks is None else "cannot be combined with"
        raise ValueError(f"eval {given[0]} {relation} --tasks")
    if options.tasks is None:
        from ..inference.predict import check_output, evaluate_run

        if options.output is not None:
            check_output(options.output)
        _print(to_json(evaluate_run(options.run_directory, **splits, **shared), indent=1))
        return
    from ..inference.eval_tasks import evaluate_tasks

    root = only_tasks.pop("data_root")
    if root is None:
        raise ValueError("eval --tasks requires --data_root, the directory with the tasks' files")
    keywords = {name: value for name, value in only_tasks.items() if value is not None}
    results, file = evaluate_tasks(
        str(options.run_directory),
        [name.strip() for name in options.tasks.split(",")],
        root,
        **keywords,
        **shared,
    )
    _print(f"{results}\nwritten to {file}")


def _predict(options: argparse.Namespace, _: list[str]) -> None:
    from ..inference.predict import check_output, predict_run, write_predictions, write_submissions

    if sum(map(bool, (options.text, options.data, options.glue))) != 1:
        raise ValueError("predict requires exactly one of --text, --data or --glue")
    if options.glue is not None:
        if options.output is not None:
            raise ValueError("predict --glue DIR names its files itself; remove --output")
        keywords = {name: getattr(options, name) for name in ("config", "allow_different")}
        for path in write_submissions(options.run_directory, options.glue, **keywords):
            _print(str(path))
        return
    if options.output is not None:
        check_output(options.output)
    rows = predict_run(
        options.run_directory,
        texts=options.text,
        data=options.data,
        config=options.config,
        allow_different=options.allow_different,
    )
    if options.output is not None:
        write_predictions(options.output, rows)
    else:
        for row in rows:
            _print(to_json(row, ensure_ascii=False))


def _generate(options: argparse.Namespace, _: list[str]) -> None:
    from ..inference.generate import generate_answers
    from ..inference.predict import check_output, write_predictions

    if options.output is not None:
        check_output(options.output)
    names = (
        "data",
        "system",
        "max_tokens",
        "beams",
        "length_penalty",
        "no_repeat_ngram",
        "temperature",
        "top_p",
        "seed",
        "batch_size",
        "template",
        "dtype",
        "config",
        "allow_different",
    )
    keywords = {name: getattr(options, name) for name in names}
    rows = generate_answers(options.model, prompts=options.prompt, **keywords)
    if options.output is not None:
        write_predictions(options.output, rows)
    else:
        for row in rows:
            _print(f"> {row['prompt']}\n{row['answer']}\n")


def _export(options: argparse.Namespace, _: list[str]) -> None:
    from ..inference.export import export_run

    names = ("merged", "dequantized", "format", "dtype", "base_model", "allow_different")
    keywords = {name: getattr(options, name) for name in names}
    _print(export_run(options.run_directory, options.to, **keywords))


def _fetch(options: argparse.Namespace, _: list[str]) -> None:
    from ..data.fetch import ASSETS, fetch

    if options.name is None:
        for name, asset in ASSETS.items():
            print(f"{name:16} {asset.kind:6} {asset.about}")
    else:
        print(fetch(options.name))


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; XLA raises a RuntimeError whose text says so."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
