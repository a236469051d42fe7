"""Several processes on this machine, four virtual devices each, joined over loopback as the hosts of a pod are."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

DEADLINE, STEPS = 300, 60
SETTINGS = (
    *("--train.steps", str(STEPS), "--train.eval_every", "20", "--train.log_every", "5"),
    *("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2", "--distributed.lost_timeout", "10"),
)
QUICK = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def start(world, out, devices, *more):
    """`loraplus train` in a process of its own, with so many devices."""
    command = [sys.executable, "-m", "loraplus_command", "train", str(world.config)]
    environment = os.environ | QUICK | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, "--output_dir", str(out), *SETTINGS, *more], env=environment, **pipes)


@contextlib.contextmanager
def two(world, out, *more):
    """Two processes that train together; whatever happens, they end with the test."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    where = ("--distributed.coordinator", address, "--distributed.processes", "2")
    pair = [start(world, out, 4, *where, "--distributed.process_id", str(n), *more) for n in range(2)]
    try:
        yield pair
    finally:
        for process in pair:
            process.kill()
            process.communicate()


def ended(process, within=DEADLINE):
    """Exit code, stdout and stderr without the lines of the library that joins the processes."""
    stdout, stderr = process.communicate(timeout=within)
    return process.returncode, *(
        "".join(x for x in text.splitlines(True) if "Gloo" not in x) for text in (stdout, stderr)
    )


def wait_until(condition, processes):
    end = time.monotonic() + DEADLINE
    while not condition():
        assert all(process.poll() is None for process in processes), [ended(p) for p in processes]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def result(out):
    """All that must not depend on interruptions."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    bare = [{k: v for k, v in row.items() if k != "steps_per_second"} for row in rows]
    return load_file(out / "adapter/adapter.safetensors"), bare


@pytest.fixture(scope="module")
def home(first_world, tmp_path_factory, cache):
    """A world in which two processes have finished a run."""
    world = first_world.copy(tmp_path_factory.mktemp("processes"))
    with two(world, world.out) as pair:
        for number, process in enumerate(pair):
            code, stdout, stderr = ended(process)
            assert code == 0, stderr
            assert ("after: " in stdout) == (number == 0)
    return world


def test_two_processes_learn_what_one_does(home, tmp_path):
    alone = start(home, tmp_path / "one", 8)
    assert ended(alone)[0] == 0
    (adapter, rows), (expected, expected_rows) = result(home.out), result(tmp_path / "one")
    assert [row["step"] for row in rows] == [row["step"] for row in expected_rows]
    losses = [[row["loss"] for row in found if "loss" in row] for found in (rows, expected_rows)]
    assert len(losses[0]) == STEPS // 5
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)
    assert max(float(np.abs(adapter[name] - expected[name]).max()) for name in adapter) < 1e-4
    files = {path.name for path in home.out.iterdir()}
    assert files == {path.name for path in (tmp_path / "one").iterdir()}


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_other_and_a_restart_goes_on_to_the_same_bits(home, tmp_path, lost):
    out = tmp_path / "out"
    with two(home, out) as pair:
        wait_until(lambda: (out / "checkpoints/20/metadata").exists(), pair)
        pair[lost].send_signal(signal.SIGKILL)
        code, _, stderr = ended(pair[1 - lost], within=60)
    assert code not in (0, 2)
    assert "cannot reach another one" in stderr or "another task died" in stderr, stderr
    assert not (out / "summary.json").exists()
    with two(home, out) as pair:
        ends = [ended(process) for process in pair]
    assert [end[0] for end in ends] == [0, 0], ends
    assert "going on from step" in ends[0][1]
    (adapter, rows), (expected, expected_rows) = result(out), result(home.out)
    assert rows == expected_rows
    assert all(np.array_equal(adapter[name], expected[name]) for name in expected)


def test_sigterm_at_one_process_stops_both_at_the_same_step(home, tmp_path):
    out = tmp_path / "out"
    with two(home, out, "--train.steps", "5000") as pair:
        log = out / "metrics.jsonl"
        wait_until(lambda: log.exists() and '"loss"' in log.read_text(), pair)
        pair[1].send_signal(signal.SIGTERM)
        ends = [ended(process) for process in pair]
    assert [end[0] for end in ends] == [143, 143], ends
    lines = [next(x for x in end[2].splitlines() if x.startswith("loraplus:")) for end in ends]
    assert lines[0] == lines[1]
    step = lines[0].split()[4]
    assert (out / "checkpoints" / step).is_dir()


@pytest.mark.parametrize("number", [0, 1])
def test_a_start_that_nobody_joins_is_given_up_with_one_line(first_world, tmp_path, number):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    where = ("--distributed.coordinator", address, "--distributed.processes", "2")
    process = start(
        first_world,
        tmp_path / "out",
        1,
        *where,
        "--distributed.process_id",
        str(number),
        "--distributed.start_timeout",
        "3",
    )
    code, stdout, stderr = ended(process)
    assert (code, stdout) == (2, "")
    message = (
        f"loraplus: error: process {number} of 2 found no others at distributed.coordinator {address} in 3 s"
    )
    assert stderr.startswith(message)
    assert stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
