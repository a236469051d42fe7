"""The table of commands fits the functions that they run."""

import errno
import importlib
import inspect
import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from loraplus_jax._utils.atomic import temporary_directory
from loraplus_jax.cli import commands
from loraplus_jax.cli.commands import COMMANDS, main
from loraplus_jax.cli.parser import parse
from loraplus_jax.inference.combine import combine_runs
from loraplus_jax.inference.convert import convert
from loraplus_jax.inference.eval_tasks import evaluate_tasks
from loraplus_jax.inference.export import export_run
from loraplus_jax.inference.generate import generate_answers
from loraplus_jax.inference.predict import evaluate_run, predict_run
from loraplus_jax.inference.several_adapters import predict_several
from loraplus_jax.interop import combine_adapters
from loraplus_jax.interop.library_recipes import NAMES
from loraplus_jax.settings.recipes import RECIPES
from loraplus_jax.sweep.run import sweep
from loraplus_jax.training.list_runs import list_runs
from loraplus_jax.training.trainer import train

from ..messages import assert_mentions
from ..refusals import refusals

TARGETS = {
    "train": [train],
    "inspect": [],
    "sweep": [sweep],
    "plan": [],
    "eval": [evaluate_run, evaluate_tasks],
    "predict": [predict_run, predict_several],
    "generate": [generate_answers],
    "export": [export_run],
    "combine": [combine_runs, combine_adapters],
    "convert": [convert],
    "runs": [list_runs],
    "fetch": [],
    "recipes": [],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_is_a_parameter(name):
    parameters = set()
    for function in (COMMANDS[name].run, *TARGETS[name]):
        parameters |= inspect.signature(function).parameters.keys()
    parameters |= {"config", "overrides"} if COMMANDS[name].settings else set()
    arguments = COMMANDS[name].arguments
    assert {
        more.get("dest", argument.removeprefix("--")) for argument, more in arguments.items()
    } <= parameters
    rules = [more.get(rule, ()) for more in arguments.values() for rule in ("requires", "excludes")]
    assert {option.partition(" ")[0] for options in rules for option in options} <= arguments.keys()


def test_convert_knows_every_library():
    known = {*NAMES, "peft", "levanter", "loraplus"}
    assert set(COMMANDS["convert"].arguments["--from"]["choices"]) == known


def line(text):
    return lambda: parse(COMMANDS, text.split())


test_options_that_do_not_fit_each_other = refusals(
    (line("plan c.yaml --search"), "plan --search", "--topology"),
    (line("plan c.yaml --fits --topology h100:8"), "plan --fits", "--topology"),
    (line("plan c.yaml --fits --search"), "--fits", "--search"),
    (line("eval r --split test --data a.csv"), "eval --split", "--data"),
    (line("eval r --tasks boolq --data_root d --split test"), "--split", "--tasks"),
    (line("eval r --tasks boolq"), "--tasks", "--data_root"),
    (line("eval r --limit 3"), "--limit", "--tasks"),
    (line("predict r"), "predict RUN", "--text or --data"),
    (line("predict r --text a --data a.csv"), "--data", "--text"),
    (line("predict r --text a --use a"), "--use", "--adapter"),
    (line("predict r --data a.csv --adapter a=b --use a"), "--use", "--data"),
    (line("generate r"), "--prompt or --data"),
    (line("generate r --prompt a --data a.jsonl"), "--data", "--prompt"),
    (line("generate r --data a.jsonl --system a"), "--system", "--prompt"),
    (line("generate r --prompt a --adapter a=b --config c.yaml"), "--adapter", "--config"),
    (line("generate r --prompt a --seed 0"), "--seed", "--temperature"),
    (line("generate r --prompt a --top_p 0.5 --temperature 0"), "--top_p", "--temperature 0.0"),
    (line("generate r --prompt a --beams 2 --temperature 1"), "--beams", "--temperature"),
    (line("export r"), "--to or --push"),
    (line("export r --to d --public"), "--public", "--push"),
    (line("export r --to d --dequantized"), "--dequantized", "--merged"),
    (line("export r --to d --dtype float16"), "--dtype", "--merged or --format gguf"),
    (line("convert r --to peft --out d --dtype float16"), "--dtype", "--to merged or --to gguf", "--to peft"),
)


@pytest.mark.parametrize(
    "text",
    [
        "export r --to d --format gguf --dtype float16",
        "generate r --prompt a --seed 0 --temperature 1",
        "generate r --prompt a --beams 2 --temperature 0",
    ],
)
def test_options_that_fit_each_other(text):
    line(text)()


def test_help_shows_what_options_require_and_exclude(capsys):
    assert main(["convert", "--help"]) == 0
    assert "; requires --to merged or --to gguf" in " ".join(capsys.readouterr().out.split())


def test_a_setting_that_is_passed_twice_is_told_in_one_line(capsys, monkeypatch):
    monkeypatch.setitem(COMMANDS, "train", COMMANDS["train"]._replace(run=lambda **_: None))
    assert main(["train", "quickstart", "--output_dir", "a", "--output_dir=b\x1b\n"]) == 0
    assert_mentions(capsys.readouterr().err.removesuffix("\n"), "--output_dir", "twice", r"b\u001b\n", "a")
    assert main(["train", "quickstart", "--output_dir", "a", "--output_dir=a"]) == 0
    assert not capsys.readouterr().err


def test_recipes_are_listed_and_printed_as_they_are(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert main(["recipes", "quickstart"]) == 0
    assert capsys.readouterr().out.encode() == RECIPES["quickstart"].read_bytes()
    for words, told in {
        ("recipes", "quickstrat"): ["'quickstrat'", "'quickstart'", ".yaml"],
        ("inspect", "xyzzy"): ["'xyzzy'", *RECIPES, ".yaml"],
        ("inspect", "configs/quickstart.yaml"): ["not found", "the recipe of this name is quickstart"],
        ("inspect", "quickstart_sweep"): ["sweep", "loraplus sweep"],
    }.items():
        assert main([*words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert all(word in line for word in told)


@pytest.mark.parametrize(
    "run", [lambda: parse(COMMANDS, 3), lambda: jnp.zeros(2) @ jnp.zeros(3), lambda: main.missing]
)
def test_a_bug_is_not_told_as_invalid_input(monkeypatch, run):
    monkeypatch.setitem(COMMANDS, "fetch", COMMANDS["fetch"]._replace(run=run))
    with pytest.raises((TypeError, AttributeError)):
        main(["fetch"])


def fail_with(error):
    def fail(**_):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "limit", "code"),
    [
        (MemoryError(), None, 2),
        (RuntimeError("RESOURCE_EXHAUSTED: 4 GB"), None, 2),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), None, 2),
        (SystemError("returned NULL without setting an exception"), 2 * 10**9, 2),
        (RuntimeError("can't start new thread"), 2 * 10**9, 2),
        (SystemError("returned NULL without setting an exception"), None, None),
        (RuntimeError("another"), 2 * 10**9, None),
    ],
)
def test_memory_that_runs_out_is_one_line_whoever_says_so(monkeypatch, capsys, error, limit, code):
    monkeypatch.setattr(commands, "_address_limit", lambda: limit)
    monkeypatch.setitem(COMMANDS, "fetch", COMMANDS["fetch"]._replace(run=fail_with(error)))
    if code is None:
        with pytest.raises(type(error)):
            main(["fetch"])
        return
    assert main(["fetch"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert_mentions(line, "out of memory", "train.batch_size")
    assert ("2.00 GB of ulimit -v" in line) == (limit is not None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"),
    [("JAX_ENABLE_X64", "foo"), ("JAX_NUM_CPU_DEVICES", "x"), ("JAX_PLATFORMS", "foo")],
)
def test_an_option_of_jax_that_the_environment_sets_wrong_is_one_line(tmp_path, name, value):
    command = [sys.executable, "-m", "loraplus_jax.cli", "eval", str(tmp_path)]
    environment = os.environ | {name: value}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert_mentions(line.lower(), "loraplus: error", name.lower(), value)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("pydantic", ["pydantic", "pip install 'loraplus_jax[train]'"]),
        ("yaml", ["yaml", "pip install 'loraplus_jax[train]'"]),
        ("lm_eval", ["lm_eval", "pip install 'loraplus_jax[lm-eval]'"]),
        ("pyarrow", ["pyarrow", "pip install 'loraplus_jax[hub]'"]),
        ("jax.missing", ["No module named 'jax.missing'"]),
        ("loraplus_jax.missing", ["No module named 'loraplus_jax.missing'"]),
    ],
)
def test_a_missing_module_names_the_extra_that_installs_it(monkeypatch, capsys, module, words):
    if "." not in module:
        monkeypatch.setitem(sys.modules, module, None)
    run = partial(importlib.import_module, module)
    monkeypatch.setitem(COMMANDS, "fetch", COMMANDS["fetch"]._replace(run=run))
    assert main(["fetch"]) == 2
    error = capsys.readouterr().err
    assert_mentions(error, *words)
    assert ("pip install" in error) == (len(words) > 1)


def test_a_module_that_another_package_lacks_is_not_told_as_ours(monkeypatch, capsys, tmp_path):
    (tmp_path / "stub_peft").mkdir()
    (tmp_path / "stub_peft/__init__.py").write_text("import stub_accelerate")
    monkeypatch.syspath_prepend(tmp_path)
    run = partial(importlib.import_module, "stub_peft")
    monkeypatch.setitem(COMMANDS, "fetch", COMMANDS["fetch"]._replace(run=run))
    assert main(["fetch"]) == 2
    error = capsys.readouterr().err
    assert_mentions(error, "No module named 'stub_accelerate'", "stub_peft")
    assert "pip install" not in error


def test_a_full_disk_that_a_library_tells_is_no_bug(monkeypatch, capsys):
    def fail(*_):
        # Raised by Python, not by this package; tensorstore gives a full disk the status of memory.
        int("RESOURCE_EXHAUSTED: Failed writing x: No space left on device [os_error_code='28']")

    monkeypatch.setitem(COMMANDS, "fetch", COMMANDS["fetch"]._replace(run=fail))
    assert main(["fetch"]) == 2
    assert "No space left on device" in capsys.readouterr().err


def test_a_very_long_line_of_an_error_is_shortened(capsys):
    assert main(["recipes", "x" * 10**6]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) < 2100
    assert "xxx" in line
    assert "quickstart" in line


def test_a_command_removes_what_killed_ones_left_in_the_temporary_directory(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / ".other.partial").mkdir()
    with temporary_directory() as living:
        (tmp_path / ".loraplus-killed.partial/new").mkdir(parents=True)
        main(["recipes"])
        assert {*tmp_path.iterdir()} == {living, tmp_path / ".other.partial"}
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", list)
    assert main(["recipes"]) == 0


def test_the_version_which_no_other_command_reads(capsys, monkeypatch):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"loraplus_jax \S+, jax \S+, flax \S+, Python \S+\n", capsys.readouterr().out)
    monkeypatch.setattr("loraplus_jax.cli.parser.version", None)
    assert main(["recipes"]) == 0


@pytest.mark.parametrize(
    ("words", "function"),
    [
        ("predict run --text a", "inference.predict.predict_run"),
        ("predict run --text a --adapter b=run", "inference.several_adapters.predict_several"),
        ("eval run", "inference.predict.evaluate_run"),
        ("eval run --tasks mmlu --data_root root", "inference.eval_tasks.evaluate_tasks"),
        ("generate run --prompt a", "inference.generate.generate_answers"),
    ],
)
def test_what_a_command_compiles_is_kept_for_the_next(monkeypatch, tmp_path, no_own_cache, words, function):
    """In the cache that JAX is set to, if there is one."""

    def look(*_, **__):
        raise ValueError(jax.config.values["jax_compilation_cache_dir"])  # raised here, and so no input error

    monkeypatch.setattr(f"loraplus_jax.{function}", look)
    for own, used in ((None, str(tmp_path / "xla")), ("own", "own")):
        jax.config.update("jax_compilation_cache_dir", own)
        with pytest.raises(ValueError, match=f"^{re.escape(used)}$"):
            main(words.split())
        assert jax.config.values["jax_compilation_cache_dir"] == own
