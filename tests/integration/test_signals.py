"""SIGTERM, Ctrl-C and a second run in the same directory, on the real command line in a process of its own."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..marks import every, long
from ..messages import assert_mentions

pytestmark = pytest.mark.slow

DEADLINE = 300
STEPS = 200
# Rows, evaluations and stops fall on different steps; dropout, shuffling and accumulation are on.
SETTINGS = (
    *("--train.steps", str(STEPS), "--train.eval_every", "60", "--train.log_every", "4"),
    *("--train.accumulate", "2", "--model.dropout", "0.1", "--model.head_dropout", "0.1"),
    *("--lora.dropout", "0.1"),
)
# Small programs are kept too, and are compiled in a hurry.
QUICK = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}
CODES = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


@pytest.fixture(scope="module")
def home(first_world, tmp_path_factory, cache):
    """The world of this file, with a whole run in it that nothing interrupted."""
    world = first_world.copy(tmp_path_factory.mktemp("home"))
    code, _, errors = finished(world, world.out)
    assert code == 0, errors
    return world


@contextlib.contextmanager
def started(world, out, *more):
    """The command line at work; whatever happens, its process ends with the test."""
    command = [sys.executable, "-m", "loraplus_jax.cli", "train", str(world.config)]
    command += ["--output_dir", str(out), *SETTINGS, *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, **QUICK}, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def ended(process):
    """Exit code, stdout and stderr."""
    stdout, stderr = process.communicate(timeout=DEADLINE)
    return process.returncode, stdout, stderr


def finished(world, out, *more):
    with started(world, out, *more) as process:
        return ended(process)


def wait_until(condition, process):
    end = time.monotonic() + DEADLINE
    while not condition():
        assert process.poll() is None, ended(process)
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


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


def result(out):
    """All that must not depend on interruptions."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    return {
        "adapter": (out / "adapter/adapter.safetensors").read_bytes(),
        "rows": [{k: v for k, v in row.items() if k != "steps_per_second"} for row in rows],
        "summary": {**summary, "seconds": 0},
    }


def stopped_step(stderr):
    """The step of the one line that a stopped run prints."""
    found = re.fullmatch(rf"loraplus: .*\bstep (\d+) of {STEPS}\b.*\n", stderr)
    assert found, stderr
    return int(found[1])


@pytest.mark.parametrize(("number", "code"), [CODES[0], long(*CODES[1])])
def test_a_stopped_run_resumes_and_ends_as_if_never_stopped(home, tmp_path, number, code):
    out = tmp_path / "out"
    with started(home, out) as process:
        wait_until(lambda: trained_rows(out), process)
        process.send_signal(number)
        found, _, stderr = ended(process)
    assert found == code, stderr
    step = stopped_step(stderr)
    assert 0 < step < STEPS
    assert (out / "checkpoints" / str(step)).is_dir()
    assert not (out / "summary.json").exists()
    again, stdout, stderr = finished(home, out)
    assert (again, stderr) == (0, "")
    assert_mentions(stdout, f"step {step} of {STEPS}")
    assert result(out) == result(home.out)


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [long(*CODES[0]), CODES[1]])
@pytest.mark.parametrize("moment", every(2, ["jaxlib", "config.yaml", "metrics.jsonl"], 1))
def test_a_signal_before_the_first_step_leaves_no_traceback_and_nothing_in_the_way(
    home, tmp_path, moment, number, code
):
    out = tmp_path / "out"
    with started(home, out) as process:
        wait_until(lambda: has_come_to(moment, process, out), process)
        process.send_signal(number)
        found, _, stderr = ended(process)
    # With the log there is a loop, which does a step yet, or an evaluation, which is broken off.
    word = {signal.SIGINT: "interrupted", signal.SIGTERM: "SIGTERM"}[number]
    assert found == code, stderr
    assert re.fullmatch(rf"loraplus: .*({word}|step [01] of {STEPS}).*\n", stderr), stderr
    assert not (out / "summary.json").exists()
    again, _, stderr = finished(home, out, "--train.steps", "9")
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
    command = [sys.executable, "-c", BUSY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "busy\n"
            process.send_signal(number)
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == code
    assert re.fullmatch(r"loraplus: .*(interrupted|SIGTERM)\n", stderr)


@pytest.mark.long
def test_a_second_run_in_the_same_directory_is_rejected_and_the_first_undisturbed(home, tmp_path):
    out = tmp_path / "out"
    with started(home, out) as first:
        wait_until(lambda: trained_rows(out), first)
        first.send_signal(signal.SIGSTOP)  # so that it is still at work, however slow the second starts
        code, stdout, stderr = finished(home, out)
        first.send_signal(signal.SIGCONT)
        first_code, _, first_stderr = ended(first)
    assert (code, stdout) == (2, "")
    assert stderr.startswith("loraplus: error: ")
    assert stderr.count("\n") == 1
    assert_mentions(stderr, first.pid, out)
    assert (first_code, first_stderr) == (0, "")
    assert result(out) == result(home.out)
