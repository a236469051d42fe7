"""Several processes on this machine, four virtual devices each, joined over loopback as the hosts of a pod are."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from ..marks import long
from ..messages import assert_mentions
from . import runs
from .runs import (
    DEADLINE,
    PIPES,
    assert_one_error,
    flags,
    rows_of,
    summary_of,
    tensors_of,
    train_command,
    wait_until,
)

pytestmark = pytest.mark.slow

STEPS = 48
SETTINGS = flags(
    f"--train.steps {STEPS} --train.eval_every 16 --train.log_every 4"
    " --mesh.data 2 --mesh.fsdp 2 --mesh.tensor 2"
)
# Its threads write into each other's lines, of which a number at the end or nothing may be left.
GLOO = re.compile(r"^\[Gloo\]|connected peer ranks|^[ :]*\d*$")
QUICK = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def start(world, out, devices, *more, cwd=None):
    """`loraplus train` in a process of its own, with so many devices."""
    return spawn(train_command(world, out, *SETTINGS, *more), devices, cwd=cwd)


def spawn(command, devices, **options):
    count = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return subprocess.Popen(command, env=os.environ | QUICK | count, **PIPES, **options)


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def member(number, address):
    """The flags of one of two processes."""
    flags = {"coordinator": address, "processes": 2, "process_id": number, "lost_timeout": 10}
    return [word for name, value in flags.items() for word in (f"--distributed.{name}", str(value))]


@contextlib.contextmanager
def ending(pair):
    """Whatever happens, the processes end with the test."""
    try:
        yield pair
    finally:
        for process in pair:
            process.kill()
            process.communicate()


@contextlib.contextmanager
def two(world, out, *more, cwd=(None, None), devices=4):
    """Two processes that train together, each in its working directory."""
    address = free_address()
    flags = [[*member(n, address), *more] for n in range(2)]
    with ending([start(world, out, devices, *flags[n], cwd=cwd[n]) for n in range(2)]) as pair:
        yield pair


def ended(process, within=DEADLINE):
    """Exit code, stdout and stderr without the lines of the library that joins the processes."""
    code, *texts = runs.ended(process, within)
    return code, *("".join(x for x in text.splitlines(True) if not GLOO.search(x)) for text in texts)


def result(out):
    return tensors_of(out), rows_of(out)


def assert_both_end_well(pair):
    ends = [ended(process) for process in pair]
    assert [end[0] for end in ends] == [0, 0], ends
    return ends


def assert_near(out, expected):
    """Two runs that compute the same by other programs."""
    (adapter, rows), (wanted, wanted_rows) = result(out), result(expected)
    assert [row["step"] for row in rows] == [row["step"] for row in wanted_rows]
    losses = [[row["loss"] for row in found if "loss" in row] for found in (rows, wanted_rows)]
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)
    assert max(float(np.abs(adapter[name] - wanted[name]).max()) for name in adapter) < 1e-4


def assert_equal(out, expected):
    (adapter, rows), (wanted, wanted_rows) = result(out), result(expected)
    assert rows == wanted_rows
    assert all(np.array_equal(adapter[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="module")
def home(first_world, tmp_path_factory, cache):
    """A world in which two processes have finished a run: stopped by a signal, then by the loss of one of them."""
    world = first_world.copy(tmp_path_factory.mktemp("processes"))
    log = world.out / "metrics.jsonl"
    with two(world, world.out) as pair:
        wait_until(lambda: log.exists() and '"loss"' in log.read_text(), *pair)
        for _ in range(2):  # the second comes while the first one's save is agreed on or written
            pair[1].send_signal(signal.SIGTERM)
            time.sleep(0.05)
        ends = [ended(process) for process in pair]
    assert [end[0] for end in ends] == [143, 143], ends
    lines = [next(x for x in end[2].splitlines() if x.startswith("loraplus:")) for end in ends]
    (step,) = {re.search(rf"step (\d+) of {STEPS}", line)[1] for line in lines}
    assert (world.out / "checkpoints" / step).is_dir()
    with two(world, world.out) as pair:
        wait_until((world.out / "checkpoints/32/metadata").exists, *pair)
        pair[1].send_signal(signal.SIGKILL)
        code, _, stderr = ended(pair[0], within=60)
    assert code not in (0, 2)
    assert re.search("another (one|task|process)", stderr), stderr
    assert not (world.out / "summary.json").exists()
    with two(world, world.out) as pair:
        ends = assert_both_end_well(pair)
    assert_mentions(ends[0][1], f"step 32 of {STEPS}", "after: ")
    assert "after: " not in ends[1][1]
    return world


def test_two_processes_stop_together_and_resume_to_what_one_learns(home, tmp_path, undrawn):
    one = home.trained(*SETTINGS, out=tmp_path / "one")
    assert_near(home.out, one)
    assert sum("loss" in row for row in rows_of(home.out)) == STEPS // 4
    assert {path.name for path in home.out.iterdir()} == {path.name for path in one.iterdir()} | {"loss.png"}


def test_a_start_that_nobody_joins_is_given_up_with_one_line(first_world, tmp_path):
    address = free_address()
    more = (*member(1, address), "--distributed.start_timeout", "3")
    ending = ended(start(first_world, tmp_path / "out", 1, *more))
    assert ending[1] == ""
    assert_one_error(ending, "process 1 of 2", "distributed.coordinator", address, "3 s")
    assert not (tmp_path / "out").exists()


SRUN = """#!/bin/sh
export SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1 SLURM_NTASKS=2 SLURM_GPUS_ON_NODE=8
for n in 0 1; do SLURM_PROCID=$n SLURM_LOCALID=$n "$@" & done
wait
"""


@pytest.mark.long
def test_the_slurm_file_trains_undisturbed_to_the_bits_of_the_disturbed_processes(home, tmp_path):
    """With an `srun` that starts two tasks here, and the virtual devices of `start`."""
    script = Path(__file__).parents[2].joinpath("examples/launch/train_slurm.sh").read_text()
    assert re.search(r"ntasks-per-node=(\d+)", script)[1] == re.search(r"gpus-per-node=(\d+)", script)[1]
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "loraplus").write_text(f'#!/bin/sh\nexec {sys.executable} -m loraplus_jax.cli "$@"\n')
    for name in ("srun", "loraplus"):
        (tmp_path / name).chmod(0o755)
    settings = yaml.safe_load((home.out / "config.yaml").read_text())
    settings |= {"distributed": {"lost_timeout": 10}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    # JAX takes the coordinator's port from the job's number.
    environment = (
        os.environ | QUICK | {"SLURM_JOB_ID": free_address().rpartition(":")[2], "HOME": str(tmp_path)}
    )
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    run = subprocess.run(
        ["bash", "-c", script],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert_mentions(run.stdout, "using 0 of 8 GPUs", f"{socket.gethostname()} 0 of 8")
    assert_equal(tmp_path / "runs/train", home.out)


def edit(name, change):
    """Changes a text file on one host."""
    return lambda directory: (directory / name).write_text(change((directory / name).read_text()))


def edit_last_row(directory):
    """Of a matrix, of which each process reads a part alone."""
    path = directory / "model/model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("intermediate.dense.weight"))
    tensors[name][-1] += 1
    save_file(tensors, path)


def leave_over(directory):
    """An older run's settings on the disk of one host alone are not what process 0 writes."""
    (directory / "out").mkdir(exist_ok=True)
    (directory / "out/config.yaml").write_text("left: over\n")


def with_epsilon(text):
    return json.dumps(json.loads(text) | {"layer_norm_eps": 1e-3})


@pytest.mark.parametrize(
    ("change", "words", "own_words", "more"),
    [
        (
            edit("model/config.json", with_epsilon),
            *(["processes", "base.config.layer_norm_eps", "1e-12", "0.001"], None, ""),
        ),
        long(edit("texts.csv", '{}"unclosed'.format), ["process 1 of 2", "texts.csv"], ["texts.csv"], ""),
        long(edit_last_row, ["processes", "rows of the weights"], None, "--mesh.data 1 --mesh.fsdp 8"),
        long(leave_over, ["process 1 of 2", "output_dir out"], ["output_dir out"], "--output_dir out"),
    ],
)
def test_every_process_raises_the_error_of_one(first_world, tmp_path, change, words, own_words, more):
    """Each finds the same paths in a directory of its own, as hosts with disks of their own do."""
    directories = [tmp_path / f"host{n}" for n in range(2)]
    for directory in directories:
        first_world.copy(directory)
    change(directories[1])
    out = tmp_path / "out"
    here = flags("--model.path model --data.path texts.csv --mesh.data 8 --mesh.fsdp 1 --mesh.tensor 1")
    with two(first_world, out, *here, *flags(more), cwd=directories) as pair:
        ends = [ended(process) for process in pair]
    for ending, said in zip(ends, (words, own_words or words), strict=True):
        assert ending[1] == ""
        assert_one_error(ending, *said)
    assert not out.exists()


TALK = flags("--train.steps 10 --train.eval_every 5 --mesh.data 1 --mesh.tensor 1 --mesh.fsdp 8")
START = ("--lora.init", "lora_ga", "--lora.rank", "4")
TWICE = ("--lora.rank", "8", "--lora.alpha", "32")
"""The adapter that a run with rank 4 saves if its start was taken off the base."""


@pytest.mark.long
def test_two_processes_share_a_language_model_and_start_from_an_adapter(first_talk, tmp_path):
    """Weights, adapters and their fingerprints lie over both; so do those of a second run from the first."""
    ends = {}
    init_adapter = ("--init_adapter", str(tmp_path / "first/adapter"))
    for name, own in {"first": START, "second": (*TWICE, *init_adapter)}.items():
        more = (*TALK, "--mesh.fsdp", "2", *own)
        with two(first_talk, tmp_path / name, *more, devices=1) as pair:
            assert_both_end_well(pair)
        assert ended(start(first_talk, tmp_path / f"{name} alone", 2, *more))[0] == 0
        assert_near(tmp_path / name, tmp_path / f"{name} alone")
        ends[name] = summary_of(tmp_path / name)
    assert abs(ends["first"]["after"]["loss"] - ends["second"]["before"]["loss"]) < 1e-6


@pytest.mark.long
def test_a_part_that_one_process_cannot_read_sets_the_checkpoint_aside_in_both(first_talk, tmp_path):
    import tensorstore

    out = tmp_path / "out"
    more = (*TALK, "--mesh.fsdp", "2", "--lora.rank", "16")
    with two(first_talk, out, *more, devices=1) as pair:
        assert_both_end_well(pair)
    state = out / "checkpoints/10/state"
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{state}"}).result()
    # The second of two chunks, which process 1 reads alone.
    chunk = store.read(b"opt_state.1.mu.lora.layers.mlp.gate_proj.lora_a/0.1.0").result().value
    file = next(path for path in state.rglob("d/*") if chunk in path.read_bytes())
    content = file.read_bytes()
    file.write_bytes(content.replace(chunk, bytes(8) + chunk[8:]))
    with two(first_talk, out, *more, "--train.steps", "12", devices=1) as pair:
        ends = assert_both_end_well(pair)
    assert (out / "damaged_checkpoints/10").is_dir()
    assert_mentions(ends[0][1], "step 5 of 12")


@pytest.mark.long
def test_processes_with_unequal_devices_are_rejected(first_talk, tmp_path):
    address = free_address()
    pair = [start(first_talk, tmp_path / "out", 4 - 2 * n, *member(n, address)) for n in range(2)]
    with ending(pair):
        ends = [ended(process) for process in pair]
    for code, _, stderr in ends:
        assert code == 2
        assert_mentions(stderr, "devices", "process 0", 4, "process 1", 2)
