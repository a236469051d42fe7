"""Signals, kill -9 and a second run in the same directory, on the real command line in a process of its own."""

import re
import signal
import sys
from pathlib import Path

import pytest

from ..marks import every, long
from ..messages import assert_mentions
from .runs import (
    ODD,
    assert_one_error,
    ended,
    finished_process,
    flags,
    result_of,
    started,
    train_command,
    wait_until,
)

pytestmark = pytest.mark.slow

STEPS = 200
SETTINGS = (*ODD, *flags(f"--train.steps {STEPS} --train.eval_every 60"))
CODES = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


@pytest.fixture(scope="module")
def home(first_world, tmp_path_factory, cache):
    """The world of this file, with a whole run in it that nothing interrupted."""
    world = first_world.copy(tmp_path_factory.mktemp("home"))
    code, _, stderr = finished_process(*train(world, world.out))
    assert code == 0, stderr
    return world


def train(world, out, *more):
    return train_command(world, out, *SETTINGS, *more)


def has_come_to(moment, process, out):
    """Whether a library is loaded, or a file of the run is there."""
    if moment != "jaxlib":
        return (out / moment).exists()
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc, to see what a process has loaded")
    return moment in Path(f"/proc/{process.pid}/maps").read_text()


def trained_rows(out):
    """Whether metrics.jsonl shows steps."""
    return (out / "metrics.jsonl").exists() and '"loss"' in (out / "metrics.jsonl").read_text()


def stopped_step(stderr):
    """The step of the one line that a stopped run prints."""
    found = re.fullmatch(rf"loraplus: .*\bstep (\d+) of {STEPS}\b.*\n", stderr)
    assert found, stderr
    return int(found[1])


@pytest.mark.parametrize(("number", "code"), [CODES[0], long(*CODES[1])])
def test_a_stopped_run_resumes_and_ends_as_if_never_stopped(home, tmp_path, number, code):
    out = tmp_path / "out"
    with started(*train(home, out)) as process:
        wait_until(lambda: trained_rows(out), process)
        process.send_signal(number)
        found, _, stderr = ended(process)
    assert found == code, stderr
    step = stopped_step(stderr)
    assert 0 < step < STEPS
    assert (out / "checkpoints" / str(step)).is_dir()
    assert not (out / "summary.json").exists()
    again, stdout, stderr = finished_process(*train(home, out))
    assert (again, stderr) == (0, "")
    assert_mentions(stdout, f"step {step} of {STEPS}")
    assert result_of(out) == result_of(home.out)


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [long(*CODES[0]), CODES[1]])
@pytest.mark.parametrize("moment", every(2, ["jaxlib", "config.yaml", "metrics.jsonl"], 1))
def test_a_signal_before_the_first_step_leaves_no_traceback_and_nothing_in_the_way(
    home, tmp_path, moment, number, code
):
    out = tmp_path / "out"
    with started(*train(home, out)) as process:
        wait_until(lambda: has_come_to(moment, process, out), process)
        process.send_signal(number)
        found, _, stderr = ended(process)
    # With the log there is a loop, which does a step yet, or an evaluation, which is broken off.
    word = {signal.SIGINT: "interrupted", signal.SIGTERM: "SIGTERM"}[number]
    assert found == code, stderr
    assert re.fullmatch(rf"loraplus: .*({word}|step [01] of {STEPS}).*\n", stderr), stderr
    assert not (out / "summary.json").exists()
    again, _, stderr = finished_process(*train(home, out, "--train.steps", "9"))
    assert (again, stderr) == (0, "")


BUSY = """
import hashlib
from loraplus_jax.cli import __main__ as loraplus_command
loraplus_command.listen()
print("busy", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_signal_does_not_wait_for_a_compilation(number, code):
    # Like one, this call takes minutes, lets other threads run, and no handler.
    with started(sys.executable, "-c", BUSY) as process:
        assert process.stdout.readline() == "busy\n"
        process.send_signal(number)
        _, _, stderr = ended(process, within=60)
    assert process.returncode == code
    assert re.fullmatch(r"loraplus: .*(interrupted|SIGTERM)\n", stderr)


TRAPPED = """
import os, signal, sys, threading
from loraplus_jax.cli import commands
from loraplus_jax.training import run_directory, setup, trainer
place, when, number = sys.argv[1:4]
owner, name = place.rsplit(".", 1)
original, left = getattr(eval(owner), name), int(number)
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
def trapped(*args, **kwargs):
    global left
    left -= 1
    if left == 0 and when != "after":
        kill() if when == "before" else threading.Timer(float(when) / 1000, kill).start()
    result = original(*args, **kwargs)
    if left == 0 and when == "after":
        kill()
    return result
setattr(eval(owner), name, trapped)
sys.exit(commands.main(sys.argv[4:]))
"""
"""The command, which kills itself at the n-th call of a function: before it, after it, or milliseconds into it."""
KILLS = {
    "start": ["setup.load_params before 1", "run_directory.open_manager after 1", "trainer.evaluate after 1"],
    # The arrays of a save are written in the background, so "after" is in the middle of it.
    "save": [
        "trainer.RunLog.write before 2",
        "trainer.save_checkpoint before 1",
        "trainer.save_checkpoint 20 1",
        "trainer.save_checkpoint after 2",
        "run_directory.restore_checkpoint after 1",
        "trainer.save_checkpoint 60 1",
        "trainer.shard_batch after 1",
    ],
    "end": [
        "trainer.Trainer.finish before 1",
        "trainer.save_adapter before 1",
        "trainer.save_adapter after 1",
        "trainer.draw_loss after 1",
        "trainer.Trainer.write_summary before 1",
    ],
}


@pytest.mark.long
@pytest.mark.parametrize("part", KILLS)
def test_a_run_killed_at_any_point_ends_as_if_never_killed(home, tmp_path, part):
    out = tmp_path / "out"
    arguments = train(home, out)[3:]
    for point in KILLS[part]:
        code, _, stderr = finished_process(sys.executable, "-c", TRAPPED, *point.split(), *arguments)
        assert code == -signal.SIGKILL, (point, stderr)
    code, _, stderr = finished_process(*train(home, out))
    assert code == 0, stderr
    assert result_of(out) == result_of(home.out)


@pytest.mark.long
def test_a_second_run_in_the_same_directory_is_rejected_and_the_first_undisturbed(home, tmp_path):
    out = tmp_path / "out"
    with started(*train(home, out)) as first:
        wait_until(lambda: trained_rows(out), first)
        first.send_signal(signal.SIGSTOP)  # so that it is still at work, however slow the second starts
        second = finished_process(*train(home, out))
        first.send_signal(signal.SIGCONT)
        code, _, stderr = ended(first)
    assert second[1] == ""
    assert_one_error(second, first.pid, out)
    assert (code, stderr) == (0, "")
    assert result_of(out) == result_of(home.out)
