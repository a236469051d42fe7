"""The commands of `loraplus`: what they run, and their arguments."""

import contextlib
import dis
import errno
import importlib.util
import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial, wraps
from importlib.metadata import requires
from pathlib import Path
from traceback import walk_tb
from typing import Any

from .._utils.atomic import remove_leftovers, to_json
from .._utils.output import Output, stdout_problem
from .._utils.validation import check_new_file, escape_controls
from .parser import TRACEBACK, Command, flag, load, parse, path, value


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command, prints errors as one line, and returns the exit code.

    The code is 0 on success, 1 if training fails, 2 for invalid input, and 128 plus the signal number if stopped. A
    stdout that cannot be written stops a command as SIGPIPE does. A bug raises.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not os.environ.get(TRACEBACK):
        # Orbax logs tracebacks of the errors that it raises, asyncio those of the reads that orbax abandons then.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    stdout, code = Output(sys.stdout), 0
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(Output(sys.stderr)):  # pyright: ignore
        try:
            if stdout_problem() is None:
                # Few commands need a directory for temporary files.
                with contextlib.suppress(OSError):
                    remove_leftovers(Path(tempfile.gettempdir()))
                code = _run_command(arguments)
        except SystemExit:  # argparse has printed help
            pass
        finally:
            stdout.flush()
        if (problem := stdout_problem()) is not None and not code:
            code = _report(problem, 128 + signal.SIGPIPE)
    return code


def _run_command(arguments: list[str]) -> int:
    try:
        command, keywords = parse(COMMANDS, arguments, lambda message: _report(message, 0))
        if command.uses_jax:
            load("_utils.allocator:run_on_main_thread")()
        result = command.run(**keywords)
        if isinstance(result, str):
            _print(result)
            return 0
        return result or 0
    except (ValueError, TypeError, OSError, ImportError, MemoryError, RuntimeError, SystemError) as error:
        if os.environ.get(TRACEBACK):
            raise
        if _is_out_of_memory(error):
            from ..training.memory import MEMORY_ADVICE

            limit = _address_limit()
            within = "" if limit is None else f" within the {limit / 1e9:.2f} GB of ulimit -v"
            return _report(f"error: out of memory{within}; {MEMORY_ADVICE}", 2)
        if not _is_input(error):
            raise
        message = _explain_missing(error) if isinstance(error, ModuleNotFoundError) else error
        return _report(f"error: {message}", 2)
    except KeyboardInterrupt:
        return _report("interrupted", 130)


def _explain_missing(error: ModuleNotFoundError) -> str:
    """Names the extra of this package that installs a missing module, or else the package that requires it."""
    package = (error.name or "").partition(".")[0]
    if not package or importlib.util.find_spec(package) is not None:  # which lacks a part, in another version
        return str(error)
    distribution = {"yaml": "pyyaml"}.get(package, package.lower().replace("_", "-"))
    needed = re.compile(rf"{re.escape(distribution)}\b(?!-).*; extra == ['\"](.+)['\"]")
    extras = [match[1] for text in requires("loraplus_jax") or () if (match := needed.fullmatch(text))]
    if extras := [extra for extra in extras if extra not in ("docs", "others", "test")]:
        return f"{error.name} is not installed; run pip install 'loraplus_jax[{extras[0]}]'"
    importers = [frame.f_globals["__name__"].partition(".")[0] for frame, _ in walk_tb(error.__traceback__)]
    importer = next(name for name in reversed(importers) if name != "importlib")
    return f"{error}" if importer == "loraplus_jax" else f"{error}, which {importer} requires; install it"


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, however the failing library reports it."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    # C code that gets no memory may raise nothing, which Python reports as a SystemError; threads and libraries
    # need some too. Without a limit, these are other errors.
    is_likely = isinstance(error, SystemError) or any(text in str(error) for text in _WITHOUT_MEMORY)
    # tensorstore reports a full disk with the same status.
    is_reported = "RESOURCE_EXHAUSTED" in str(error) and _SYSTEM_CODE not in str(error)
    return is_reported or (is_likely and _address_limit() is not None)


_SYSTEM_CODE = "os_error_code="
"""Part of tensorstore's ValueError for an error of the operating system."""
_WITHOUT_MEMORY = "can't start new thread", "failed to map segment"


def _address_limit() -> int | None:
    """The bytes that this process may map (`ulimit -v`), if they are limited."""
    try:
        import resource
    except ImportError:  # Windows has no limits
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def _is_input(error: Exception) -> bool:
    """Whether an error is about the input or the system; a bug is often a ValueError or TypeError too."""
    if isinstance(error, RuntimeError | SystemError):
        return "Unable to initialize backend" in str(error)  # of JAX_PLATFORMS, or of an accelerator
    if isinstance(error, OSError | ImportError) or _SYSTEM_CODE in str(error):
        return True
    # What is wrong with input, a `raise` of this package says. Python and libraries raise at other places.
    last: Any = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    operation, module = (
        dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]],
        last.tb_frame.f_globals["__name__"],
    )
    # JAX reads its options from environment variables.
    return operation == "RAISE_VARARGS" and module.startswith(("loraplus_jax.", "jax._src.config"))


_MAX_LINE = 2000


def _report(message: str, code: int) -> int:
    # Our messages indent the lines after the first; any other line break comes from the user's text. So does the
    # middle of a very long line, such as a name in a damaged file.
    lines = [
        line if len(line) <= _MAX_LINE else f"{line[: _MAX_LINE // 2]} ... {line[-_MAX_LINE // 2 :]}"
        for line in f"loraplus: {message}".split("\n  ")
    ]
    print("\n  ".join(map(escape_controls, lines)), file=sys.stderr)
    return code


def _print(text: str) -> None:
    """Prints a result of several lines."""
    print("\n".join(map(escape_controls, text.split("\n"))))


# The commands import what they need, so that --help is fast and a missing package is named.


def _run(training: str, settings: object, words: Sequence[str], **options: Any) -> int:
    """Runs training, a function as `module:function`; returns the exit code."""
    from ..training.anomalies import TrainingFailed
    from ..training.distributed import LostProcess
    from ..training.signals import Stopped

    try:
        load(training)(settings, **options)
    except Stopped as stop:
        problem = f"{stdout_problem()}; " if stop.signal_number == signal.SIGPIPE else ""
        return _report(f"{problem}{stop}", 128 + stop.signal_number)
    except TrainingFailed as failure:
        return _report(f"training failed: {failure}", 1)
    except LostProcess as lost:
        return _report(str(lost), 1)
    return 0


def _on_devices(command: Callable[..., str | None]) -> Callable[..., str | int | None]:
    """Runs a command on the devices of `settings`; of several processes, process 0 alone prints its result."""

    @wraps(command)
    def run(settings: Any, **options: Any) -> str | int | None:
        from .._utils.multihost import is_lead
        from ..training.console import LineConsole
        from ..training.distributed import LostProcess, check_same_everywhere, join_processes
        from ..training.xla import use_compilation_cache

        mesh = {axis: size for axis, size in vars(settings.mesh).items() if size is not None}
        options |= {"mesh": mesh} if mesh else {}
        try:
            cache = use_compilation_cache(LineConsole(stderr=True), is_on=True)
            with join_processes(settings.distributed), cache:
                check_same_everywhere({name: str(value) for name, value in options.items()})
                text = command(**options)
                return text if is_lead() else None
        except LostProcess as lost:
            return _report(str(lost), 1)

    return run


def _call(function: str, words: Sequence[str] = (), **options: Any) -> str | None:
    """Calls a function, `module:function`, that returns what to print."""
    return load(function)(**options)


def _plan(
    settings: Any,
    words: Sequence[str],
    topology: str | None = None,
    search: bool = False,
    fits: bool = False,
    json: Path | None = None,
) -> int:
    from ..plan.plan import make_plan
    from ..plan.render import format_plan, write_json

    if json is not None:
        check_new_file("--json", json)
    if fits:
        return _fits(settings, words, json)
    if search:
        assert topology is not None  # which it requires
        return _search(settings, words, topology, json)
    plan = make_plan(settings, topology)
    _print(format_plan(plan, settings))
    if json is not None:
        write_json(json, plan, settings)
    return 0


def _search(settings: Any, words: Sequence[str], topology: str, json: Path | None) -> int:
    from ..plan.devices import restore_targets, target_devices
    from ..plan.render import explain_no_fit, format_plan, format_search, write_search
    from ..plan.search import Search

    # The search leaves a setting on the command line unchanged.
    fixed = {word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")}
    with restore_targets():
        search, code = Search(settings, *target_devices(topology), fixed), 0
        search.run(_show_progress)
    command = ["loraplus", "train", *words]
    _print(format_search(search, settings, command))
    if search.best is not None and search.best.plan is not None:
        _print(format_plan(search.best.plan, search.best.layout.apply(settings)))
    else:
        code = _report(f"error: {explain_no_fit(search)}", 2)
    if json is not None:
        write_search(json, search, settings, command)
    # Ctrl-C asks for the best so far; who sends another signal wants an end.
    return code if search.received in (None, signal.SIGINT) else 128 + search.received


def _fits(settings: Any, words: Sequence[str], json: Path | None) -> int:
    from ..plan.fits import find_fits
    from ..plan.render import format_fits, write_fits

    if mesh := [word.partition("=")[0] for word in words if word.startswith("--mesh.")]:
        raise ValueError(f"plan --fits has meshes of its own; remove {', '.join(mesh)}")
    fits = find_fits(settings, _show_progress)
    _print(format_fits(fits, settings))
    if json is not None:
        write_fits(json, fits)
    return 0


def _show_progress(line: str) -> None:
    print(escape_controls(line), file=sys.stderr, flush=True)


@_on_devices
def _eval(directory: Path, tasks: str | None = None, **options: Any) -> str:
    if tasks is None:
        return to_json(load("inference.predict:evaluate_run")(directory, **options), indent=1)
    names = [name.strip() for name in tasks.split(",")]
    results, file = load("inference.eval_tasks:evaluate_tasks")(str(directory), names, **options)
    return f"{results}\nwritten to {file}"


@_on_devices
def _predict(directory: Path, output: Path | None = None, **options: Any) -> str | None:
    from ..inference.predict import predict_run

    predict = load("inference.several_adapters:predict_several") if "adapters" in options else predict_run
    return _write(lambda: predict(directory, **options), output, partial(to_json, ensure_ascii=False))


@_on_devices
def _generate(model: str, output: Path | None = None, **options: Any) -> str | None:
    from ..inference.generate import generate_answers

    head = "{adapter}> " if "adapters" in options else "> "
    return _write(
        lambda: generate_answers(model, **options), output, f"{head}{{prompt}}\n{{answer}}\n".format_map
    )


def _write(
    rows: Callable[[], Sequence[Any]], output: Path | None, format_row: Callable[[Any], str]
) -> str | None:
    """Writes rows to a file, which is checked before they are computed, or returns what to print of them."""
    from ..inference.predict import check_output, write_predictions
    from ..training.distributed import raise_together

    if output is None:
        return "\n".join(map(format_row, rows()))
    with raise_together():
        check_output(output)
    return write_predictions(output, rows())


def _fetch(name: str | None = None) -> str:
    from ..data.fetch import ASSETS, fetch

    if name is not None:
        return str(fetch(name))
    return "\n".join(f"{known:16} {asset.kind:6} {asset.about}" for known, asset in ASSETS.items())


def _recipes(name: str | None = None) -> str:
    from ..settings.recipes import list_recipes, read_recipe

    return list_recipes() if name is None else read_recipe(name).removesuffix("\n")


ALLOW = {
    "--allow_different": value(
        "part that may differ from what the run or adapter was made with, such as base.config or tokenizer; "
        "repeatable (an error names the part)",
        action="append",
        metavar="PART",
    )
}
ADAPTER = ALLOW | {"--config": value("for a PEFT adapter: a training config with the same data and task")}
SEVERAL = {
    "--adapter": value(
        "one of several adapters over one base: the name that requests use, and a run or adapter directory; "
        "repeatable. The first argument is then the base, or a run that gives the settings; each row of --data "
        "names its adapter in the column adapter",
        action="append",
        dest="adapters",
        metavar="NAME=DIR",
        excludes=("--config",),
    ),
    "--use": value(
        "adapter for all texts on the command line; repeatable (default: every --adapter)",
        action="append",
        metavar="NAME",
        requires=("--adapter",),
        excludes=("--data",),
    ),
}
RUN = value("finished run, adapter directory or merged model", path, metavar="RUN")
MODEL = {
    "--template": value("chat template of a model: model, plain, completion or a file; a run uses its own"),
    "--dtype": value("weight dtype of a model; a run uses its own", choices=("float32", "bfloat16")),
}
OUTPUT = {"--output": value("new .jsonl file to write, instead of stdout", path)}
# Settings are no arguments of argparse: their row is only for the usage and the help.
SETTINGS = {
    "config": value("YAML file of settings, or the name of a recipe", metavar="CONFIG"),
    "overrides": value(
        "settings that replace the file's", nargs="*", default=(), metavar="--section.field VALUE"
    ),
}
TRAINING = SETTINGS | {
    "--fresh": flag("start over; an existing run in output_dir is renamed, not deleted"),
    **ALLOW,
}
TASKS = {
    "--data_root": value("directory with the tasks' files", path, metavar="DIR"),
    "--shots": value("solved examples before each question of mmlu (default: 5)", int),
    "--limit": value("evaluate only so many questions of each task and subject", int),
    "--batch_size": value("sequences per batch (default: 8)", int),
    **MODEL,
}
PLAN = SETTINGS | {
    "--topology": value(
        "GPUs or TPUs to compile for: GPU:COUNT, GPU:HOSTSxCOUNT or TPU:SHAPE, such as h100:8, h100:2x8 or "
        "v5e:16x16; GPU may be a YAML file",
        metavar="NAME",
    ),
    "--search": flag(
        "search for mesh, micro-batches and remat of a fast step that fits, and print the command; settings on the "
        "command line stay fixed",
        requires=("--topology",),
        excludes=("--fits",),
    ),
    "--fits": flag(
        "instead of one plan, say on which GPUs the step fits: all known ones, 1, 2, 4 or 8 of them, with weights "
        "as they are and as nf4",
        excludes=("--topology",),
    ),
    "--json": value("also write the plan to FILE as JSON; FILE must not exist", path, metavar="FILE"),
}
EVAL = {
    "directory": {**RUN, "help": f"{RUN['help']}; with --tasks also a model without adapters"},
    "--split": value(
        "split to evaluate: train, validation or test (default: test)", excludes=("--data", "--tasks")
    ),
    "--data": value("labelled file to evaluate instead of a split", metavar="FILE", excludes=("--tasks",)),
    "--tasks": value(
        "instead of a split: boolq, piqa, social_iqa, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa "
        "(files of LLM-Adapters) or mmlu; separated by commas",
        metavar="NAMES",
        requires=("--data_root",),
    ),
    **{name: {**option, "requires": ("--tasks",)} for name, option in TASKS.items()},
    "--output": value(
        "new file: .json for the results of --tasks (default: RUN/tasks.json), or .jsonl for the texts of a run "
        "of task generation",
        path,
    ),
    **ADAPTER,
}
PREDICT = {
    "directory": {**RUN, "requires": ("--text", "--data")},
    "--text": value("text to predict for; repeatable", action="append", dest="texts"),
    "--data": value("file of texts", metavar="FILE", excludes=("--text",)),
    **SEVERAL,
    **OUTPUT,
    **ADAPTER,
}
GENERATE = {
    "model": value(
        "finished run, adapter directory or model", metavar="RUN|MODEL", requires=("--prompt", "--data")
    ),
    "--prompt": value("prompt to answer; repeatable", action="append", dest="prompts"),
    "--data": value(
        "file of conversations; answers the last question of each", metavar="FILE", excludes=("--prompt",)
    ),
    "--system": value("system message before every --prompt", requires=("--prompt",)),
    "--max_tokens": value(
        "maximum tokens of an answer (default: 128; a run of task generation has its own)", int
    ),
    "--beams": value(
        "beams of a beam search (default: 1; a run of task generation has its own)",
        int,
        excludes=("--temperature",),
    ),
    "--length_penalty": value(
        "power of the length that divides log-probabilities; needs --beams (default: 1)",
        float,
        excludes=("--temperature",),
    ),
    "--no_repeat_ngram": value(
        "tokens of a sequence that must not appear twice in an answer (default: 0, any may)",
        int,
        excludes=("--temperature",),
    ),
    "--temperature": value("sampling temperature; 0 is greedy (default: 0)", float),
    "--top_p": value(
        "nucleus sampling probability (default: 1, all tokens)", float, requires=("--temperature",)
    ),
    "--seed": value("random seed for sampling (default: 0)", int, requires=("--temperature",)),
    "--batch_size": value("prompts per batch (default: 8)", int),
    **SEVERAL,
    **MODEL,
    **OUTPUT,
    **ADAPTER,
}
EXPORT = {
    "place": value("finished run or adapter directory", path, metavar="RUN", requires=("--to", "--push")),
    "--to": value("new directory to write", path, metavar="DIR"),
    "--push": value(
        "upload the export and a model card to this repository on the Hugging Face Hub; a new one is private",
        metavar="ORG/NAME",
    ),
    "--public": flag("make a new repository public", requires=("--push",)),
    "--merged": flag("write the full model, with the adapter merged into its weights"),
    "--dequantized": flag(
        "merge into the weights as model.quantize packed them, not the original ones", requires=("--merged",)
    ),
    "--format": value(
        "format of the full model, or of the adapter: hf for PEFT (default), gguf for llama.cpp's --lora",
        choices=("hf", "gguf"),
    ),
    "--dtype": value(
        "weight dtype of a merged model or GGUF adapter (default: the base model's for hf, float16 for gguf)",
        choices=("float32", "bfloat16", "float16", "q8_0"),
        requires=("--merged", "--format gguf"),
    ),
    "--base_model": value(
        "Hub id or path of the base in adapter_config.json and the model card; with --push always a Hub id "
        "(default: the run's model, which is a local path unless the run names a Hub id)",
        metavar="NAME",
    ),
    **ALLOW,
}
COMBINE = {
    "adapters": value(
        "finished runs or adapter directories of one base, each with its weight after = (default: 1), such as "
        "runs/a=0.7 runs/b=-0.3",
        nargs="+",
        metavar="RUN[=WEIGHT]",
    ),
    "--how": value(
        "cat is the exact weighted sum, and svd its closest adapter of a lower rank; the others combine factors of "
        "equal ranks, as PEFT does",
        choices=("linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"),
        required=True,
    ),
    "--out": value("new adapter directory to write", path, required=True, metavar="DIR"),
    "--density": value(
        "share of entries that ties, dare_* and magnitude_prune keep, above 0 and at most 1", float
    ),
    "--majority_sign_method": value(
        "for ties and dare_ties: the sign of the sum, or the sign of more adapters (default: total)",
        choices=("total", "frequency"),
    ),
    "--svd_rank": value("rank of the result of svd (default: the largest of the adapters)", int),
    "--seed": value("random seed of dare_linear and dare_ties (default: 0)", int),
    **ADAPTER,
}
CONVERT = {
    "source": value(
        "run, adapter directory, PEFT directory, orbax checkpoint, or safetensors or npz file or directory",
        path,
        metavar="SOURCE",
    ),
    "--to": value(
        "format to write: a PEFT directory, llama.cpp's adapter file, an adapter directory of this package, or the "
        "base with the adapter merged in",
        choices=("peft", "gguf", "loraplus", "merged"),
        required=True,
    ),
    "--out": value("new directory to write", path, metavar="DIR", required=True),
    "--base": value(
        "base model: a directory, a GGUF file or a Hub id (default: the one that a run or PEFT adapter names)"
    ),
    "--from": value(
        "library of SOURCE, where its names fit several",
        choices=(
            "qwix",
            "gemma",
            "openpi",
            "maxtext",
            "easydel",
            "nnx",
            "keras",
            "peft",
            "levanter",
            "loraplus",
        ),
        dest="library",
    ),
    "--scale": value("scale of A B, for a library whose files lack it", float),
    "--alpha": value("the same as alpha of a scale alpha / rank", float),
    "--path_map": value(
        'JSON file {"rules": [[ours, theirs], ...]} for names of your own', path, metavar="FILE"
    ),
    "--leave_out": value(
        "regular expression for the whole path of tensors in SOURCE to leave out; repeatable; otherwise a tensor "
        "without a place is an error",
        action="append",
        metavar="REGEX",
    ),
    "--dtype": value(
        "dtype of a merged model's weights (default: the base's) or of a GGUF adapter (default: float16)",
        choices=("float32", "bfloat16", "float16", "q8_0"),
        requires=("--to merged", "--to gguf"),
    ),
    "--no_verify": flag("do not compare the outputs of the model before and after"),
    **ALLOW,
}
RECIPES = {"name": value("recipe to print", nargs="?", metavar="NAME")}
RUNS = {
    "directory": value(
        "directory of runs, or a run (default: runs)",
        path,
        nargs="?",
        default=Path("runs"),  # argparse would pass its own default through `path`
        metavar="DIRECTORY",
    ),
    "--json": flag("print a JSON object a line"),
}
FETCH = {"name": value("model or dataset to download", nargs="?", metavar="NAME")}
_train, _sweep = (
    partial(_run, "training.trainer:train"),
    partial(_run, "sweep.run:sweep"),
)
_inspect, _export = partial(_call, "training.inspect:inspect"), partial(_call, "inference.export:export_run")
_combine = partial(_call, "inference.combine:combine_runs")
_convert = partial(_call, "inference.convert:convert")
_runs = partial(_call, "training.list_runs:list_runs")
_SETTINGS, _SWEEP = "settings.schema:Settings", "sweep.settings:SweepRun"
_DEVICES = "settings.schema:DeviceSettings"
COMMANDS = {
    "train": Command("fine-tune and evaluate a model", _train, TRAINING, _SETTINGS),
    "inspect": Command(
        "show what a config would train and at which rates; or rank, targets and base of an adapter",
        _inspect,
        SETTINGS | {"config": {**SETTINGS["config"], "help": f"{SETTINGS['config']['help']}; or an adapter"}},
        _SETTINGS,
        opens=partial(_call, "inference.inspect_adapter:inspect_adapter"),
    ),
    "sweep": Command(
        "tune lambda and the learning rates, and compare LoRA+ with LoRA", _sweep, TRAINING, _SWEEP
    ),
    "plan": Command(
        "estimate memory and time of a training step, without weights or data",
        _plan,
        PLAN,
        _SETTINGS,
    ),
    "eval": Command("evaluate a finished run or adapter", _eval, EVAL, _DEVICES),
    "predict": Command("predict classes or numbers for texts", _predict, PREDICT, _DEVICES),
    "generate": Command(
        "answer prompts with a language model, fine-tuned or not", _generate, GENERATE, _DEVICES
    ),
    "export": Command("export a run's adapter for PEFT or llama.cpp, or the merged model", _export, EXPORT),
    "combine": Command("combine several adapters of one base into one", _combine, COMBINE),
    "convert": Command(
        "convert an adapter of this or another library, and check that it computes the same",
        _convert,
        CONVERT,
    ),
    "runs": Command("list runs with their state, result and how to resume them", _runs, RUNS, uses_jax=False),
    "fetch": Command(
        "download a model or dataset by name; without a name, list all", _fetch, FETCH, uses_jax=False
    ),
    "recipes": Command(
        "list the recipes, or print one to start a config from", _recipes, RECIPES, uses_jax=False
    ),
}
"""Every command: the parser, the help and the reference come from this table."""
