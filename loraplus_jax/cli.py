"""The command line: `loraplus train | sweep | inspect | plan | eval | predict | generate | export | fetch`."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16", "q8_0")
TRACEBACK = "LORAPLUS_TRACEBACK"
WITH_SETTINGS, FLAGS = ("train", "sweep", "inspect", "plan"), ("--fresh", "--help", "-h")
OPTIONS = {"plan": ("--topology", "--json")}
"""Options with a value that are no settings, by command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, or 2 after a clear message for input that cannot be used."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Orbax logs what it raises, with tracebacks.
    logging.getLogger("absl").setLevel(logging.ERROR if os.environ.get(TRACEBACK) else logging.CRITICAL)
    # Optional packages are imported by the commands, so that --help is quick and a missing one is named.
    options, overrides = _parse(arguments)
    try:
        if overrides and options.command not in WITH_SETTINGS:
            raise ValueError(f"{options.command} does not take {' '.join(overrides)}")
        options.run(options, overrides)
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get(TRACEBACK):
            raise
        missing = isinstance(error, ModuleNotFoundError)
        hint = f"{error.name} is not installed: pip install 'loraplus_jax[train]'" if missing else error
        return _report(f"error: {hint}", 2)
    except (MemoryError, RuntimeError) as error:
        if os.environ.get(TRACEBACK) or not _out_of_memory(error):
            raise
        from .training.memory import MEMORY_ADVICE

        return _report(f"error: out of memory; {MEMORY_ADVICE}", 2)
    except KeyboardInterrupt:
        return _report("interrupted", 130)
    return options.code


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options, and for commands with settings the arguments that are settings, a config file before them."""
    if not arguments or arguments[0] not in WITH_SETTINGS:
        return _parser().parse_known_args(arguments)
    command, *rest = arguments
    config = [rest.pop(0)] if rest and not rest[0].startswith("-") else []
    own, settings = [], []
    while rest:
        word = rest.pop(0)
        is_option = word.partition("=")[0] in OPTIONS.get(command, ())
        (own if is_option or word in FLAGS else settings).append(word)
        if is_option and "=" not in word:
            own += rest[:1]
            del rest[:1]
    return _parser().parse_args([command, *config, *own]), settings


def _report(message: str, code: int) -> int:
    print(f"loraplus: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loraplus",
        description="Fine-tunes pretrained models with LoRA+.",
        epilog=f"{TRACEBACK}=1 shows tracebacks",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: object, text: str, **options: object) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, **options)  # pyright: ignore
        command.set_defaults(run=run, code=0)
        return command

    train = add("train", _train, "train as a config file says", add_help=False)
    inspect = add("inspect", _inspect, "show what would be trained, without training", add_help=False)
    sweep = add("sweep", _sweep, "find out which lambda helps, and whether one does", add_help=False)
    plan = add("plan", _plan, "say what a step needs, without weights or data", add_help=False)
    for command in (train, sweep, inspect, plan):
        command.add_argument("config", nargs="?")
        command.add_argument("-h", "--help", action="store_true")
    for command in (train, sweep):
        command.add_argument("--fresh", action="store_true")
    plan.add_argument("--topology", metavar="NAME", help="TPUs to compile for, such as v5e:16x16")
    plan.add_argument("--json", metavar="FILE", type=Path, help="a new file for all that was found")
    evaluate = add("eval", _eval, "evaluate a finished run or an adapter directory")
    evaluate.add_argument("run_directory", metavar="RUN", type=Path)
    evaluate.add_argument("--split", help="train, validation or test (default)")
    evaluate.add_argument("--data", help="another labelled file, instead of a split")
    evaluate.add_argument("--config", help="of a run like it, for an adapter that PEFT made")
    predict = add("predict", _predict, "predict for texts, with a finished run or an adapter directory")
    predict.add_argument("run_directory", metavar="RUN", type=Path)
    predict.add_argument("--text", action="append", default=[], help="a text; may be given several times")
    predict.add_argument("--data", help="a file with texts, instead of --text")
    predict.add_argument("--config", help="of a run like it, for an adapter that PEFT made")
    predict.add_argument("--output", type=Path, help="a new .jsonl file, instead of the screen")
    generate = add("generate", _generate, "answer prompts with a language model, tuned or as it is")
    _generate_options(generate)
    export = add("export", _export, "write a run's adapter for PEFT, or with --merged a whole model")
    _export_options(export)
    fetch = add("fetch", _fetch, "fetch a model or data set by name; without a name, list them")
    fetch.add_argument("name", nargs="?", metavar="NAME")
    return parser


def _generate_options(generate: argparse.ArgumentParser) -> None:
    generate.add_argument("place", metavar="RUN|MODEL", help="a run, an adapter directory, or a model")
    generate.add_argument(
        "--prompt", action="append", default=[], help="a prompt; may be given several times"
    )
    generate.add_argument("--data", help="a file of conversations, whose last answers are made anew")
    generate.add_argument("--system", help="a text that stands before every --prompt")
    generate.add_argument("--max_tokens", type=int, default=128, help="of an answer (default 128)")
    generate.add_argument(
        "--temperature", type=float, default=0.0, help="0, the default, is the likeliest token"
    )
    generate.add_argument(
        "--top_p", type=float, default=1.0, help="share of probability drawn from (default 1)"
    )
    generate.add_argument("--seed", type=int, help="of draws (default 0)")
    generate.add_argument("--batch_size", type=int, default=8, help="prompts answered at once (default 8)")
    generate.add_argument("--template", help="model, plain or a file; a run has its own")
    generate.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of a model's weights; a run has its own"
    )
    generate.add_argument("--config", help="of a run like it, for an adapter that PEFT made")
    generate.add_argument("--output", type=Path, help="a new .jsonl file, instead of the screen")


def _export_options(export: argparse.ArgumentParser) -> None:
    export.add_argument("place", metavar="RUN", type=Path, help="a run or an adapter directory")
    export.add_argument("--to", type=Path, required=True, metavar="DIR", help="a new directory")
    export.add_argument(
        "--merged", action="store_true", help="the whole model with the adapter in its weights"
    )
    export.add_argument("--format", choices=("hf", "gguf"), help="of a merged model (default hf)")
    export.add_argument("--dtype", choices=DTYPES, help="of a merged model's weights; by default the base's")


def _train(options: argparse.Namespace, overrides: list[str]) -> None:
    if _show_help(options):
        return
    from .settings.parsing import parse_settings
    from .training.trainer import train

    _run(options, lambda: train(parse_settings(options.config, overrides), fresh=options.fresh))


def _sweep(options: argparse.Namespace, overrides: list[str]) -> None:
    from .sweep.settings import SweepRun

    if _show_help(options, SweepRun):
        return
    from .settings.parsing import parse_settings
    from .sweep.run import sweep

    _run(options, lambda: sweep(parse_settings(options.config, overrides, SweepRun), fresh=options.fresh))


def _run(options: argparse.Namespace, training: Callable[[], object]) -> None:
    """Runs what may be stopped or fail, and sets the exit code."""
    from .training.anomalies import TrainingFailed
    from .training.distributed import LostProcess
    from .training.signals import Stopped

    try:
        training()
    except Stopped as stop:
        options.code = _report(str(stop), 128 + stop.signal_number)
    except TrainingFailed as failure:
        options.code = _report(f"training failed: {failure}", 1)
    except LostProcess as lost:
        options.code = _report(str(lost), 1)


def _inspect(options: argparse.Namespace, overrides: list[str]) -> None:
    from .settings.parsing import parse_settings
    from .training.inspect import inspect

    if not _show_help(options):
        print(inspect(parse_settings(options.config, overrides)))


def _plan(options: argparse.Namespace, overrides: list[str]) -> None:
    if _show_help(options):
        return
    from .plan.plan import make_plan
    from .plan.text import check_new, format_plan, write_json
    from .settings.parsing import parse_settings

    if options.json is not None:
        check_new(options.json)
    settings = parse_settings(options.config, overrides)
    plan = make_plan(settings, options.topology)
    print(format_plan(plan, settings))
    if options.json is not None:
        write_json(options.json, plan, settings)


def _show_help(options: argparse.Namespace, kind: type | None = None) -> bool:
    """Prints every setting, for --help; a missing config is an error."""
    from .settings.parsing import format_help
    from .settings.schema import Settings

    if options.help:
        print(format_help(kind or Settings, options.command))
    elif options.config is None:
        raise ValueError(f"{options.command} needs a config file: loraplus {options.command} CONFIG")
    return options.help


def _eval(options: argparse.Namespace, _: list[str]) -> None:
    from .inference.predict import evaluate_run

    given = {name: getattr(options, name) for name in ("split", "data", "config")}
    print(json.dumps(evaluate_run(options.run_directory, **given), indent=1))


def _predict(options: argparse.Namespace, _: list[str]) -> None:
    from .inference.predict import check_output, predict_run, write_predictions

    if options.output is not None:
        check_output(options.output)
    if bool(options.text) == bool(options.data):
        raise ValueError("predict needs --text or --data, one of the two")
    found = predict_run(options.run_directory, texts=options.text, data=options.data, config=options.config)
    if options.output is not None:
        write_predictions(options.output, found)
    else:
        for row in found:
            print(json.dumps(row, ensure_ascii=False))


def _generate(options: argparse.Namespace, _: list[str]) -> None:
    from .inference.generate import generate_answers
    from .inference.predict import check_output, write_predictions

    if options.output is not None:
        check_output(options.output)
    names = (
        "data",
        "system",
        "max_tokens",
        "temperature",
        "top_p",
        "seed",
        "batch_size",
        "template",
        "dtype",
        "config",
    )
    given = {name: getattr(options, name) for name in names}
    found = generate_answers(options.place, prompts=options.prompt, **given)
    if options.output is not None:
        write_predictions(options.output, found)
    else:
        for row in found:
            print(f"> {row['prompt']}\n{row['answer']}\n")


def _export(options: argparse.Namespace, _: list[str]) -> None:
    from .inference.export import export_run

    given = {name: getattr(options, name) for name in ("merged", "format", "dtype")}
    print(export_run(options.place, options.to, **given))


def _fetch(options: argparse.Namespace, _: list[str]) -> None:
    from .data.fetch import ASSETS, fetch

    if options.name is None:
        for name, asset in ASSETS.items():
            print(f"{name:16} {asset.kind:6} {asset.about}")
    else:
        print(fetch(options.name))


def _out_of_memory(error: BaseException) -> bool:
    """XLA says so in the text of its error, a RuntimeError."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
