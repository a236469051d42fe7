"""Disks that fill up and directories that cannot be written, with the real command line on a small disk of its own.

The disk is a tmpfs in a mount namespace that a waiting process holds: no root is needed where the system lets users
have namespaces, and nothing stays mounted.
"""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ..marks import long
from ..messages import assert_mentions

DEADLINE = 120
ROOMY = 16_384
# Every checkpoint is kept, so that the disk fills; dropout, shuffling and accumulation are on.
SETTINGS = (
    *("--train.steps", "20", "--train.eval_every", "5", "--train.log_every", "3", "--train.keep", "999"),
    *("--model.dropout", "0.1", "--lora.dropout", "0.1", "--train.accumulate", "2"),
)
# Small programs are kept too, and are compiled in a hurry.
QUICK = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}


@dataclasses.dataclass(frozen=True)
class Disk:
    """A tmpfs that only processes in the holder's namespace see at `place`."""

    place: Path
    holder: int

    @property
    def seen(self):
        """Where it is for this process."""
        return Path(f"/proc/{self.holder}/root{self.place}")

    def inside(self, *command):
        """The command line that runs another one in the namespace."""
        return [
            "nsenter",
            "--target",
            str(self.holder),
            "--user",
            "--mount",
            "--preserve-credentials",
            *command,
        ]

    def mount(self, *arguments):
        subprocess.run(self.inside("mount", *map(str, arguments)), check=True)

    def resize(self, kilobytes):
        self.mount("-o", f"remount,size={kilobytes}k", self.place)

    def leave_free(self, kilobytes):
        status = os.statvfs(self.seen)
        used = (status.f_blocks - status.f_bfree) * status.f_frsize // 1024
        self.resize(used + kilobytes)


@pytest.fixture
def disk(tmp_path):
    """An empty one with room."""
    if not shutil.which("unshare") or not shutil.which("nsenter"):
        pytest.skip("needs the commands unshare and nsenter, to mount a small disk")
    place = tmp_path / "disk"
    place.mkdir()
    script = f'mount -t tmpfs -o size={ROOMY}k none "$0" && echo mounted && exec sleep infinity'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as holder:
        try:
            if (line := holder.stdout.readline()) != "mounted\n":
                pytest.skip(f"a small disk cannot be mounted here: {line.strip()}")
            yield Disk(place, holder.pid)
        finally:
            holder.kill()


@pytest.fixture(scope="module")
def home(first_world, tmp_path_factory, cache):
    """The world of this file, with a whole run in it that nothing disturbed."""
    world = first_world.copy(tmp_path_factory.mktemp("home"))
    done = subprocess.run(command(world, world.out), env=environment(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return world


def environment(**changes):
    return {**os.environ, **QUICK, **changes}


def command(world, out, *more):
    start = [sys.executable, "-m", "loraplus_jax.cli", "train", str(world.config)]
    return [*start, "--output_dir", str(out), *SETTINGS, *more]


def run(disk, world, out, *more, **changes):
    """The command line in the disk's namespace, to its own end."""
    return subprocess.run(
        disk.inside(*command(world, out, *more)),
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


def result(out):
    """All that must not depend on what happened to a run."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    return {
        "adapter": (out / "adapter/adapter.safetensors").read_bytes(),
        "rows": [{k: v for k, v in row.items() if k != "steps_per_second"} for row in rows],
        "summary": {**summary, "seconds": 0},
        "picture": (out / "loss.png").read_bytes(),
    }


def saved_steps(out):
    return sorted(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())


def arrays(out, step):
    """The bytes of every array in a checkpoint."""
    tree = ocp.StandardCheckpointer().restore((out / "checkpoints" / str(step) / "state").absolute())
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def assert_ended_with_one_clear_line(done, *words):
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("loraplus: error: ")
    assert_mentions(lines[0], *words)


def wait_for(path, process):
    """Until the path is there; a process that has ended will not make it."""
    end = time.monotonic() + DEADLINE
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.01)


def size_of(directory):
    """Kilobytes on a disk of pages of four."""
    return sum(4 * math.ceil(path.stat().st_size / 4096) for path in directory.rglob("*") if path.is_file())


# the disk is full


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_run_and_more_room_finishes_it(home, disk):
    out = disk.seen / "out"
    disk.resize(size_of(home.out) // 2)
    done = run(disk, home, disk.place / "out")
    kept = saved_steps(out)
    assert kept in ([5], [5, 10], [5, 10, 15])
    for step in kept:
        assert arrays(out, step) == arrays(home.out, step)
    assert not (out / "summary.json").exists()
    assert_ended_with_one_clear_line(done, "No space left on device", disk.place / "out")
    disk.resize(ROOMY)
    again = run(disk, home, disk.place / "out")
    assert again.returncode == 0, again.stderr
    assert_mentions(again.stdout, f"step {kept[-1]} of 20")
    assert result(out) == result(home.out)


@pytest.mark.long
@pytest.mark.slow
def test_a_disk_that_is_full_from_the_first_file_on(home, disk):
    """Room for no file, then for the config and the first rows, then for a part of the first checkpoint."""
    for kilobytes in (4, 8, 24):
        disk.resize(kilobytes)
        done = run(disk, home, disk.place / "out")
        assert_ended_with_one_clear_line(done, "No space left on device", disk.place / "out")
    disk.resize(ROOMY)
    assert run(disk, home, disk.place / "out").returncode == 0
    assert result(disk.seen / "out") == result(home.out)


@pytest.mark.long
@pytest.mark.slow
def test_a_disk_that_is_full_at_the_very_end(home, disk):
    """All steps are done; there is no room for the log, then for the adapter, then for the picture."""
    out = disk.seen / "out"
    shutil.copytree(home.out, out)
    for name in ("adapter/adapter.json", "adapter/adapter.safetensors", "summary.json", "loss.png"):
        (out / name).unlink()
    (out / "adapter").rmdir()
    for kilobytes in (0, 12, 48):
        disk.leave_free(kilobytes)
        done = run(disk, home, disk.place / "out")
        assert_ended_with_one_clear_line(done, "No space left on device", disk.place / "out")
        assert not (out / "summary.json").exists()
        assert saved_steps(out) == [5, 10, 15, 20]
    assert (out / "adapter/adapter.safetensors").exists()
    disk.resize(ROOMY)
    assert run(disk, home, disk.place / "out").returncode == 0
    assert result(out) == result(home.out)


@pytest.mark.slow
def test_an_export_to_a_full_disk_names_it_and_leaves_nothing(home, disk):
    export = [sys.executable, "-m", "loraplus_jax.cli", "export", str(home.out)]
    for kilobytes in (4, 16):
        disk.resize(kilobytes)
        done = subprocess.run(
            disk.inside(*export, "--merged", "--to", str(disk.place / "to")),
            env=environment(),
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        assert_ended_with_one_clear_line(done, "No space left on device", disk.place / "to")
        assert list(disk.seen.iterdir()) == []


# the directory cannot be written


@pytest.mark.slow
def test_a_directory_that_cannot_be_written_is_rejected_and_left_alone(home, disk):
    (disk.seen / "mine").mkdir()
    disk.mount("-o", "remount,ro", disk.place)
    for name in ("new", "mine"):
        done = run(disk, home, disk.place / name)
        assert_ended_with_one_clear_line(done, "Read-only file system", disk.place / name)
        assert done.stdout == ""
    assert list(disk.seen.rglob("*")) == [disk.seen / "mine"]


@pytest.mark.long
@pytest.mark.slow
def test_a_directory_that_becomes_unwritable_ends_the_run_with_what_it_had(home, disk):
    """A read-only mount laid over the directory: files that are open stay writable, new ones cannot be made."""
    place, out = disk.place / "out", disk.seen / "out"
    endless = disk.inside(*command(home, place, "--train.steps", "1000000"))
    with subprocess.Popen(
        endless, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for(out / "checkpoints/5", process)
        disk.mount("--bind", place, place)
        disk.mount("-o", "remount,bind,ro", place)
        stdout, stderr = process.communicate(timeout=DEADLINE)
    kept = saved_steps(out)
    assert arrays(out, 5) == arrays(home.out, 5)
    done = subprocess.CompletedProcess(endless, process.returncode, stdout, stderr)
    assert_ended_with_one_clear_line(done, "Read-only file system", place)
    disk.mount("-o", "remount,bind,rw", place)
    again = run(disk, home, place, "--train.steps", str(kept[-1] + 5))
    assert again.returncode == 0, again.stderr
    assert_mentions(again.stdout, f"step {kept[-1]} of {kept[-1] + 5}")


# the cache


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "problem"), [long("ro", "Read-only file system"), long("size=16k", "No space left")]
)
def test_without_a_cache_that_can_be_written_the_run_is_the_same(home, disk, tmp_path, options, problem):
    disk.mount("-o", f"remount,{options}", disk.place)
    out = tmp_path / "out"
    done = run(disk, home, out, LORAPLUS_CACHE=str(disk.place / "cache"))
    assert done.returncode == 0, done.stderr
    assert result(out) == result(home.out)
    assert problem in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
@pytest.mark.slow
def test_a_cache_that_was_full_once_is_of_use_again(home, disk, tmp_path):
    disk.resize(16)
    cache = {"LORAPLUS_CACHE": str(disk.place / "cache")}
    assert run(disk, home, tmp_path / "first", **cache).returncode == 0
    disk.resize(ROOMY)
    assert run(disk, home, tmp_path / "second", **cache).returncode == 0
    third = run(disk, home, tmp_path / "third", **cache)
    assert (third.returncode, third.stderr) == (0, "")
    assert result(tmp_path / "third") == result(home.out)


# nothing is written anywhere else


@pytest.mark.slow
def test_nothing_is_written_outside_the_output_directory_and_the_cache(home, tmp_path):
    places = {name: tmp_path / name for name in ("home", "here", "temporary")}
    for place in places.values():
        place.mkdir()
    env = environment(HOME=str(places["home"]), TMPDIR=str(places["temporary"]))
    for name in [name for name in env if name.startswith(("XDG_", "MPL"))]:
        del env[name]
    before = {path for path in home.directory.rglob("*") if home.out not in path.parents}
    done = subprocess.run(
        command(home, tmp_path / "out"), env=env, cwd=places["here"], capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert [str(path) for place in places.values() for path in place.rglob("*")] == []
    assert {path for path in home.directory.rglob("*") if home.out not in path.parents} == before
    assert {path.name for path in tmp_path.iterdir()} == {*places, "out"}


# what orbax's threads say once the run has ended


@pytest.mark.slow
def test_writes_that_outlive_a_failed_save_print_nothing():
    """A write of tensorstore's that ends after its event loop raises where nobody can catch it."""
    script = """
import asyncio, sys, time, tensorstore
from loraplus_jax.cli import __main__ as loraplus_command
import loraplus_jax.cli.commands as cli

def main():
    loop, (promise, future) = asyncio.new_event_loop(), tensorstore.Promise.new()
    async def wait():
        await future
    task = loop.create_task(wait())
    loop.call_later(0.05, loop.stop)
    loop.run_forever()
    loop.close()
    promise.set_result(3)
    time.sleep(0.2)
    return 2

cli.main = main
loraplus_command.run()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "")
