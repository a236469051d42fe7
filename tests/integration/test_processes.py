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

pytestmark = pytest.mark.slow

DEADLINE, STEPS = 300, 60
SETTINGS = (
    *("--train.steps", str(STEPS), "--train.eval_every", "20", "--train.log_every", "5"),
    *("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"),
)
# Its threads write into each other's lines.
GLOO = re.compile(r"^\[Gloo\]|connected peer ranks")
QUICK = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def start(world, out, devices, *more, cwd=None, **environment):
    """`loraplus train` in a process of its own, with so many devices."""
    command = [sys.executable, "-m", "loraplus_jax.cli", "train", str(world.config)]
    environment |= {**QUICK, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [*command, "--output_dir", str(out), *SETTINGS, *more], env=os.environ | environment, cwd=cwd, **pipes
    )


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
def two(world, out, *more, own=((), ()), cwd=(None, None), devices=4):
    """Two processes that train together; `own` are one's own flags, and `cwd` its working directory."""
    address = free_address()
    flags = [[*member(n, address), *more, *own[n]] for n in range(2)]
    with ending([start(world, out, devices, *flags[n], cwd=cwd[n]) for n in range(2)]) as pair:
        yield pair


def ended(process, within=DEADLINE):
    """Exit code, stdout and stderr without the lines of the library that joins the processes."""
    stdout, stderr = process.communicate(timeout=within)
    return process.returncode, *(
        "".join(x for x in text.splitlines(True) if not GLOO.search(x)) for text in (stdout, stderr)
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
    code, _, stderr = ended(start(home, tmp_path / "one", 8))
    assert code == 0, stderr
    (adapter, rows), (expected, expected_rows) = result(home.out), result(tmp_path / "one")
    assert [row["step"] for row in rows] == [row["step"] for row in expected_rows]
    losses = [[row["loss"] for row in found if "loss" in row] for found in (rows, expected_rows)]
    assert len(losses[0]) == STEPS // 5
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)
    assert max(float(np.abs(adapter[name] - expected[name]).max()) for name in adapter) < 1e-4
    files = {path.name for path in home.out.iterdir()}
    assert files == {path.name for path in (tmp_path / "one").iterdir()}


@pytest.mark.parametrize("lost", [long(0), 1])
def test_a_lost_process_ends_the_other_and_a_restart_resumes_to_bitwise_the_same(home, tmp_path, lost):
    out = tmp_path / "out"
    with two(home, out) as pair:
        wait_until(lambda: (out / "checkpoints/20/metadata").exists(), pair)
        pair[lost].send_signal(signal.SIGKILL)
        code, _, stderr = ended(pair[1 - lost], within=60)
    assert code not in (0, 2)
    assert re.search("another (one|task|process)", stderr), stderr
    assert not (out / "summary.json").exists()
    with two(home, out) as pair:
        ends = [ended(process) for process in pair]
    assert [end[0] for end in ends] == [0, 0], ends
    assert re.search(r"step \d+ of \d+", ends[0][1])
    (adapter, rows), (expected, expected_rows) = result(out), result(home.out)
    assert rows == expected_rows
    assert all(np.array_equal(adapter[name], expected[name]) for name in expected)


def lose_stdout(process):
    process.stdout.close()
    process.stdout = open(os.devnull)  # noqa: SIM115


def send_twice(number):
    """The second signal comes while the first one's save is agreed on or written."""

    def act(process):
        for _ in range(2):
            process.send_signal(number)
            time.sleep(0.05)

    return act


@pytest.mark.parametrize(
    ("at", "act", "codes"),
    [
        (1, send_twice(signal.SIGTERM), [143, 143]),
        long(1, send_twice(signal.SIGINT), [143, 130]),
        long(0, lose_stdout, [141, 143]),
    ],
)
def test_what_stops_one_process_stops_both_at_the_same_step(home, tmp_path, at, act, codes):
    out = tmp_path / "out"
    with two(home, out, "--train.steps", "5000") as pair:
        log = out / "metrics.jsonl"
        wait_until(lambda: log.exists() and '"loss"' in log.read_text(), pair)
        act(pair[at])
        ends = [ended(process) for process in pair]
    assert [end[0] for end in ends] == codes, ends
    lines = [next(x for x in end[2].splitlines() if x.startswith("loraplus:")) for end in ends]
    (step,) = {re.search(r"step (\d+) of 5000", line)[1] for line in lines}
    assert (out / "checkpoints" / step).is_dir()


@pytest.mark.parametrize("number", [long(0), 1])
def test_a_start_that_nobody_joins_is_given_up_with_one_line(first_world, tmp_path, number):
    address = free_address()
    flags = (*member(number, address), "--distributed.start_timeout", "3")
    code, stdout, stderr = ended(start(first_world, tmp_path / "out", 1, *flags))
    assert (code, stdout) == (2, "")
    assert stderr.startswith("loraplus: error: ")
    assert_mentions(stderr, f"process {number} of 2", "distributed.coordinator", address, "3 s")
    assert stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_port_that_is_taken_is_named_with_one_line(first_world, tmp_path):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        address = f"localhost:{taken.getsockname()[1]}"
        code, stdout, stderr = ended(start(first_world, tmp_path / "out", 1, *member(0, address)))
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert_mentions(stderr, "distributed.coordinator", address, "Address already in use")


AUTO = ("--distributed.coordinator", "auto", "--distributed.lost_timeout", "10")
SRUN = """#!/bin/sh
export SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1 SLURM_NTASKS=2 SLURM_GPUS_ON_NODE=8
for n in 0 1; do SLURM_PROCID=$n SLURM_LOCALID=$n "$@" & done
wait
"""


@pytest.mark.long
def test_the_pages_slurm_file_trains_what_two_named_processes_do(home, tmp_path):
    """With an `srun` that starts two tasks here, and the virtual devices of `start`."""
    page = Path(__file__).parents[2].joinpath("docs/pods.md").read_text()
    script = re.search(r"```bash\n(#!/bin/bash\n#SBATCH .*?)```", page, flags=re.S)[1]
    assert re.search(r"ntasks-per-node=(\d+)", script)[1] == re.search(r"gpus-per-node=(\d+)", script)[1]
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "loraplus").write_text(f'#!/bin/sh\nexec {sys.executable} -m loraplus_jax.cli "$@"\n')
    for name in ("srun", "loraplus"):
        (tmp_path / name).chmod(0o755)
    settings = yaml.safe_load((home.out / "config.yaml").read_text())
    settings |= {"output_dir": str(tmp_path / "slurm"), "distributed": {"lost_timeout": 10}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    # JAX takes the coordinator's port from the job's number.
    environment = os.environ | QUICK | {"SLURM_JOB_ID": free_address().rpartition(":")[2]}
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
    (adapter, rows), (expected, expected_rows) = result(tmp_path / "slurm"), result(home.out)
    assert rows == expected_rows
    assert all(np.array_equal(adapter[name], expected[name]) for name in expected)


def test_an_environment_without_a_coordinator_is_rejected(first_world, tmp_path):
    code, _, stderr = ended(start(first_world, tmp_path / "out", 1, *AUTO))
    assert (code, stderr.count("\n")) == (2, 1)
    assert_mentions(stderr, "distributed.coordinator", "auto", "environment")


def unlike_settings(directories):
    return ["train.steps", 50, "process 0", 60, "process 1"], None


def broken_data(directories):
    path = directories[1] / "texts.csv"
    path.write_text(path.read_text() + '"unclosed')
    return ["process 1 of 2", "texts.csv"], ["texts.csv"]


def unlike_data(directories):
    path = directories[1] / "texts.csv"
    path.write_text("".join(path.read_text().splitlines(True)[:-3]))
    return ["processes", "data"], None


def unlike_config(directories):
    path = directories[1] / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_norm_eps": 1e-3}))
    return ["processes", "base.config.layer_norm_eps", "1e-12", "0.001"], None


def unlike_tokenizer(directories):
    path = directories[1] / "model/tokenizer.json"
    path.write_text(path.read_text().replace('"good"', '"fine"'))
    return ["processes", "tokenizer"], None


def unlike_weights(directories):
    """In one row, which only who reads the whole matrix meets."""
    path = directories[1] / "model/model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("intermediate.dense.weight"))
    tensors[name][1] += 1
    save_file(tensors, path)
    return ["processes", "base"], None


def unlike_split_weights(directories):
    """Of these each process reads its own part alone, and the last row is in one part."""
    path = directories[1] / "model/model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("intermediate.dense.weight"))
    tensors[name][-1] += 1
    save_file(tensors, path)
    return ["processes", "rows of the weights"], None


def unlike_trained(directories):
    unlike_weights(directories)
    return ["processes", "trained"], None


def leftover(directories):
    """An older run's settings on the disk of one host alone are not what process 0 writes."""
    (directories[1] / "out").mkdir(exist_ok=True)
    (directories[1] / "out/config.yaml").write_text("left: over\n")
    return (
        ["process 1 of 2", "output_dir out"],
        ["output_dir out"],
    )


OWN_FLAGS = {unlike_settings: (("--train.steps", "50"), ())}
MORE_FLAGS = {
    unlike_trained: ("--method", "full"),
    unlike_split_weights: ("--mesh.data", "1", "--mesh.fsdp", "8"),
    leftover: ("--output_dir", "out"),
}


@pytest.mark.parametrize(
    "change",
    [
        long(unlike_settings),
        long(broken_data),
        long(unlike_data),
        unlike_config,
        long(unlike_tokenizer),
        long(unlike_weights),
        long(unlike_split_weights),
        long(unlike_trained),
        long(leftover),
    ],
)
def test_every_process_raises_the_error_of_one(first_world, tmp_path, change):
    """Each finds the same paths in a directory of its own, as hosts with disks of their own do."""
    directories = [tmp_path / f"host{n}" for n in range(2)]
    for directory in directories:
        first_world.copy(directory)
    said, by_one = change(directories)
    out = tmp_path / "out"
    here = ("--model.path", "model", "--data.path", "texts.csv", "--mesh.data", "8")
    here += ("--mesh.fsdp", "1", "--mesh.tensor", "1")
    here += MORE_FLAGS.get(change, ())
    own = OWN_FLAGS.get(change, ((), ()))
    with two(first_world, out, *here, own=own, cwd=directories) as pair:
        ends = [ended(process) for process in pair]
    assert [end[0] for end in ends] == [2, 2], ends
    for (_, stdout, stderr), words in zip(ends, (said, by_one or said), strict=True):
        assert (stdout, stderr.count("\n")) == ("", 1), stderr
        assert_mentions(stderr, *words)
    assert not out.exists()


PACKED, DORA = ("--model.quantize", "nf4"), ("--lora.variant", "dora")
TWICE = ("--lora.rank", "8", "--lora.alpha", "32")
"""The adapter that a run with rank 4 saves if its start was taken off the base."""


# XLA's program for several virtual devices in each of several CPU processes hangs when it unpacks weights.
@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "then"),
    [
        (PACKED, PACKED),
        (DORA, DORA),
        (("--lora.init", "pissa", "--lora.rank", "4"), TWICE),
        (("--lora.init", "lora_ga", "--lora.rank", "4"), TWICE),
    ],
)
def test_two_processes_share_a_language_model_and_start_from_an_adapter(first_talk, tmp_path, kind, then):
    """Weights, adapters and their fingerprints lie over both; so do those of a second run from the first."""
    more = ("--train.steps", "10", "--train.eval_every", "5", "--mesh.data", "1", "--mesh.tensor", "1")
    found = {}
    for name, own in (
        ("first", kind),
        ("second", (*then, "--init_adapter", str(tmp_path / "first/adapter"))),
    ):
        flags = (*more, "--mesh.fsdp", "2", *own)
        with two(first_talk, tmp_path / name, *flags, devices=1) as pair:
            ends = [ended(process) for process in pair]
        assert [end[0] for end in ends] == [0, 0], ends
        assert ended(start(first_talk, tmp_path / f"{name} alone", 2, *flags))[0] == 0
        found[name] = result(tmp_path / name), result(tmp_path / f"{name} alone")
    for (adapter, rows), (expected, expected_rows) in found.values():
        losses = [[row["loss"] for row in r if "loss" in row] for r in (rows, expected_rows)]
        np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)
        assert max(float(np.abs(adapter[name] - expected[name]).max()) for name in adapter) < 1e-4
    first, second = (json.loads((tmp_path / name / "summary.json").read_text()) for name in found)
    assert abs(first["after"]["loss"] - second["before"]["loss"]) < 1e-6


TALK = (
    "--train.steps",
    "10",
    "--train.eval_every",
    "5",
    "--mesh.data",
    "1",
    "--mesh.tensor",
    "1",
    "--mesh.fsdp",
    "8",
)


@pytest.mark.long
@pytest.mark.parametrize("when", ["preparing", long("training")])
def test_a_process_lost_at_any_time_is_called_lost(first_talk, tmp_path, when):
    out = tmp_path / "out"
    with two(first_talk, out, *TALK, "--train.steps", "5000") as pair:
        if when == "training":
            wait_until((out / "metrics.jsonl").exists, pair)
        else:
            time.sleep(8)
        pair[1].send_signal(signal.SIGKILL)
        code, _, stderr = ended(pair[0], within=60)
    assert code in (1, -signal.SIGABRT), stderr
    assert re.search("another (one|task|process)", stderr), stderr


@pytest.mark.long
def test_a_part_that_one_process_cannot_read_sets_the_checkpoint_aside_in_both(first_talk, tmp_path):
    import tensorstore

    out = tmp_path / "out"
    flags = (*TALK, "--mesh.fsdp", "2", "--lora.rank", "16")
    with two(first_talk, out, *flags, devices=1) as pair:
        ends = [ended(process) for process in pair]
    assert [end[0] for end in ends] == [0, 0], ends
    state = out / "checkpoints/10/state"
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{state}"}).result()
    # The second of two chunks, which process 1 reads alone.
    chunk = store.read(b"opt_state.1.mu.lora.layers.mlp.gate_proj.lora_a/0.1.0").result().value
    file = next(path for path in state.rglob("d/*") if chunk in path.read_bytes())
    content = file.read_bytes()
    file.write_bytes(content.replace(chunk, bytes(8) + chunk[8:]))
    with two(first_talk, out, *flags, "--train.steps", "12", devices=1) as pair:
        ends = [ended(process) for process in pair]
    assert [end[0] for end in ends] == [0, 0], ends
    assert (out / "damaged_checkpoints/10").is_dir()
    assert_mentions(ends[0][1], "step 5 of 12")


@pytest.mark.long
def test_a_fault_of_one_process_ends_both_at_once(first_talk, tmp_path):
    out = tmp_path / "out"
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import sys\nfrom loraplus_jax.training import trainer\n"
        "from loraplus_jax.cli import __main__ as loraplus_command\n"
        "def look(self, step):\n    raise KeyError('a fault')\n"
        "trainer.Trainer.log_row = look\nsys.argv[0] = 'loraplus'\nloraplus_command.run()\n"
    )
    address = free_address()
    command = [
        sys.executable,
        str(broken),
        "train",
        str(first_talk.config),
        "--output_dir",
        str(out),
        *SETTINGS,
    ]
    flags = [[*TALK, *member(n, address)] for n in range(2)]
    environment = os.environ | QUICK | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pair = [
        start(first_talk, out, 4, *flags[0]),
        subprocess.Popen([*command, *flags[1]], env=environment, **pipes),
    ]
    with ending(pair):
        ends = [ended(process, within=120) for process in pair]
    assert ends[1][0] == 1
    assert "KeyError: 'a fault'" in ends[1][2]
    assert ends[0][0] in (1, -signal.SIGABRT), ends[0]


@pytest.mark.long
def test_processes_with_unequal_devices_are_rejected(first_talk, tmp_path):
    address = free_address()
    pair = [start(first_talk, tmp_path / "out", 4 - 2 * n, *member(n, address)) for n in range(2)]
    with ending(pair):
        ends = [ended(process) for process in pair]
    for code, _, stderr in ends:
        assert code == 2
        assert_mentions(stderr, "devices", "process 0", 4, "process 1", 2)
