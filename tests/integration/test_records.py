"""What happens around a run ends in the same result or in an error: damage, signals, a lost stdout or directory."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from loraplus_jax.cli.commands import main
from loraplus_jax.tasks.encoder import EncoderTask
from loraplus_jax.training import trainer

from ..marks import diagonal, every, long, slow
from ..messages import assert_mentions
from .runs import ODD, PROMPT, at_step, flags, result_of, stopped, undisturbed

SETTINGS = (*ODD, *flags("--model.head_dropout 0 --train.keep 3 --train.early_stopping 9"))
STEP = 15
"""The step at which runs are disturbed; there are checkpoints of steps 6 and 12, of which the second is better."""


@pytest.fixture(scope="module")
def straight(first_world, tmp_path_factory, cache):
    return result_of(undisturbed(first_world, tmp_path_factory, SETTINGS))


# Damage between two starts: who spoils what, which exit code it has and what the user is told.


def change_metric(out):
    """The metric of the best checkpoint, so that another one would be chosen."""
    for step, value in ((12, 0.0), (6, 1.0)):
        path = out / f"checkpoints/{step}/metrics/metrics"
        path.write_text(re.sub(r'accuracy": [\d.]+', f'accuracy": {value}', path.read_text()))


def remove_metrics(out):
    for path in (out / "checkpoints").glob("*/metrics/metrics"):
        path.unlink()


def edit_log(change):
    return lambda out: (out / "metrics.jsonl").write_text(change((out / "metrics.jsonl").read_text()))


def change_row(text):
    return re.sub(r'(validation/accuracy": )[\d.]+', r"\g<1>0.99", text, count=1)


def drop_row(text):
    return "".join(text.splitlines(keepends=True)[1:])


DAMAGE = {
    "metrics changed": (change_metric, 0, ["metrics", "checkpoint", 12, "restored"]),
    "metrics removed": (remove_metrics, 0, ["metrics", "checkpoint", 12, "restored"]),
    "row changed": (edit_log(change_row), 2, ["metrics.jsonl", "changed", "--fresh"]),
    "row removed": (edit_log(drop_row), 2, ["metrics.jsonl", "changed", "--fresh"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", every(6, DAMAGE))
def test_damage_between_two_starts_ends_in_an_error_or_in_the_same_result(world, straight, capsys, damage):
    spoil, code, words = DAMAGE[damage]
    out = stopped(world, STEP, *SETTINGS, saved=True)
    rows = (out / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    spoil(out)
    assert world.train(*SETTINGS) == code
    printed = capsys.readouterr()
    assert_mentions(" ".join((printed.out + printed.err).split()), *words)
    if code:
        assert printed.err.count("\n") == 1
        (out / "metrics.jsonl").write_bytes(rows)
        assert world.train(*SETTINGS) == 0
    assert result_of(out) == straight


# What happens during a run.


def lose_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


LOST_STDOUT = {
    "closed": (lambda: None, "Bad file descriptor"),
    "broken pipe": (lose_pipe, "Broken pipe"),
    "full": (lambda: open("/dev/full", "w"), "No space left on device"),  # noqa: SIM115
}


@contextlib.contextmanager
def lost(how):
    """A stdout that cannot be written; yields the words of the error."""
    make, words = LOST_STDOUT[how]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stdout := make())
        yield words
    if stdout is not None:
        with contextlib.suppress(OSError):
            stdout.close()


@pytest.mark.parametrize("how", LOST_STDOUT)
@pytest.mark.parametrize("arguments", [["fetch"], ["--help"], ["train", "--help"]])
def test_a_command_that_cannot_print_says_so_in_one_line(capsys, how, arguments):
    with lost(how) as words:
        code = main(arguments)
    assert code == 141
    error = capsys.readouterr().err
    assert error.startswith("loraplus: ")
    assert error.count("\n") == 1
    assert_mentions(error, "stdout", words)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "command"), diagonal(LOST_STDOUT, ["eval", "predict", "generate"]))
def test_results_that_cannot_be_printed_are_one_line(finished, finished_talk, capsys, how, command):
    world = finished_talk if command == "generate" else finished
    more = {"eval": [], "predict": ["--text", "good"], "generate": ["--prompt", PROMPT, "--max_tokens", "8"]}
    with lost(how) as words:
        assert main([command, str(world.out), *more[command]]) == 141
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert_mentions(error, "stdout", words)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["broken pipe", long("full")])
def test_a_run_whose_stdout_is_lost_saves_and_resumes(world, straight, capsys, how):
    with lost(how) as words, contextlib.ExitStack() as stack:
        broken, sys.stdout = sys.stdout, io.StringIO()
        patch = stack.enter_context(pytest.MonkeyPatch.context())

        def lose():
            sys.stdout._stream = broken  # pyright: ignore
            print("a line")
            sys.stdout.flush()

        at_step(patch, STEP, lose, saved=True)
        assert world.train(*SETTINGS) == 141
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert_mentions(error, "stdout", words, f"step {STEP} of 20")
    assert (world.out / f"checkpoints/{STEP}").is_dir()
    assert world.train(*SETTINGS) == 0
    assert result_of(world.out) == straight


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, long(signal.SIGINT)])
def test_a_second_signal_does_not_lose_the_save_of_the_first(world, straight, capsys, number):
    """It comes while the first one's save is being written."""

    class Acted(Exception):
        pass

    def act(*_):
        raise Acted

    before = signal.signal(number, act)
    save = trainer.save_checkpoint
    try:
        with pytest.MonkeyPatch.context() as patch:

            def save_and_signal(*arguments, **keywords):
                save(*arguments, **keywords)
                signal.raise_signal(number)

            at_step(patch, STEP - 1, lambda: signal.raise_signal(number), saved=True)
            begin = lambda: patch.setattr(trainer, "save_checkpoint", save_and_signal)  # noqa: E731
            at_step(patch, STEP - 2, begin, saved=True)
            assert world.train(*SETTINGS) == 128 + number
    finally:
        signal.signal(number, before)
    assert_mentions(capsys.readouterr().err, f"step {STEP - 1} of 20")
    assert (world.out / f"checkpoints/{STEP - 1}").is_dir()
    assert world.train(*SETTINGS) == 0
    assert result_of(world.out) == straight


@pytest.mark.slow
@pytest.mark.parametrize("how", ["renamed", long("deleted"), long("replaced"), long("replaced by a copy")])
def test_a_directory_that_is_lost_under_a_run_ends_it_with_its_name(world, straight, capsys, how):
    moved = world.directory / "moved"

    def act():
        world.out.rename(moved)
        if how == "replaced":
            world.out.mkdir()
        elif how == "replaced by a copy":
            shutil.copytree(moved, world.out)
        elif how == "deleted":
            shutil.rmtree(moved)

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, STEP, act, saved=True)
        assert world.train(*SETTINGS) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert_mentions(error, "output_dir", world.out)
    assert not (world.out / f"checkpoints/{STEP}").exists()
    assert not (world.out / "adapter").exists()
    if how != "deleted":
        shutil.rmtree(world.out, ignore_errors=True)
        moved.rename(world.out)
        assert world.train(*SETTINGS) == 0
        assert result_of(world.out) == straight


def read_strictly(text):
    def reject(name):
        raise AssertionError(f"{name} in {text}")

    return json.loads(text, parse_constant=reject)


@pytest.mark.slow
def test_results_that_are_not_finite_are_null(world, capsys, monkeypatch):
    derived = EncoderTask.derived
    monkeypatch.setattr(
        EncoderTask, "derived", lambda self, values: derived(self, values) | {"odd": float("nan")}
    )
    out = world.trained(*SETTINGS)
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = read_strictly(line)
        assert all(value is None for name, value in row.items() if name.endswith("/odd"))
    summary = read_strictly((out / "summary.json").read_text())
    assert (summary["before"]["odd"], summary["after"]["odd"]) == (None, None)
    capsys.readouterr()
    assert main(["eval", str(out)]) == 0
    assert read_strictly(capsys.readouterr().out)["odd"] is None


NOISE = """
import asyncio, logging, sys, threading
from loraplus_jax.cli import __main__ as loraplus_command
import loraplus_jax.cli.commands as cli

class Late:
    def __del__(self):
        raise KeyError("destructor")

async def fail():
    raise KeyError("task")

async def abandon():
    asyncio.ensure_future(fail())
    await asyncio.sleep(0.01)

def noise():
    thread = threading.Thread(target=lambda: {}["thread"])
    thread.start()
    thread.join()
    Late()
    asyncio.run(abandon())
    try:
        {}["log"]
    except KeyError:
        logging.getLogger("absl").exception("saving failed")

cli.COMMANDS["fetch"] = cli.COMMANDS["fetch"]._replace(run=noise)
sys.argv = ["loraplus", "fetch"]
loraplus_command.run()
"""


@pytest.mark.parametrize("shown", [False, slow(True)])
def test_no_traceback_of_a_library_is_shown_unless_asked_for(shown):
    environment = os.environ | ({"LORAPLUS_TRACEBACK": "1"} if shown else {})
    command = [sys.executable, "-c", NOISE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    if shown:
        assert_mentions(
            done.stderr, *(f"KeyError: '{name}'" for name in ("thread", "destructor", "task", "log"))
        )
    else:
        assert done.stderr == ""
