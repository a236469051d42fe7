"""Disks that fill up and directories that cannot be written, with the real command line on a small disk of its own.

The disk is a tmpfs in a mount namespace that a waiting process holds: no root is needed where the system lets users
have namespaces, and nothing stays mounted.
"""

import dataclasses
import errno
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from loraplus_jax.models.checkpoints import export

from ..messages import assert_mentions
from . import runs
from .runs import (
    assert_one_error,
    ended,
    finished_process,
    flags,
    rejected,
    saved_steps,
    started,
    train_command,
    wait_until,
)

pytestmark = pytest.mark.slow

ROOMY = 16_384
# Every checkpoint is kept, so that the disk fills; dropout, shuffling and accumulation are on.
SETTINGS = flags(
    "--train.steps 20 --train.eval_every 5 --train.log_every 3 --train.keep 999 --train.accumulate 2"
    " --model.dropout 0.1 --lora.dropout 0.1"
)


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
        enter = ("nsenter", "--target", str(self.holder), *flags("--user --mount --preserve-credentials"))
        return [*enter, *command]

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
    code, _, stderr = finished_process(*train_command(world, world.out, *SETTINGS))
    assert code == 0, stderr
    return world


def run(disk, world, out, *more, **environment):
    """The command line in the disk's namespace, to its own end."""
    return finished_process(*disk.inside(*train_command(world, out, *SETTINGS, *more)), **environment)


def assert_ends_well(disk, world, out, *more, **environment):
    code, stdout, stderr = run(disk, world, out, *more, **environment)
    assert code == 0, stderr
    return stdout + stderr


def result_of(out):
    return *runs.result_of(out), (out / "loss.png").read_bytes()


def arrays(out, step):
    """The bytes of every array in a checkpoint."""
    tree = ocp.StandardCheckpointer().restore((out / "checkpoints" / str(step) / "state").absolute())
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def size_of(directory):
    """Kilobytes on a disk of pages of four."""
    return sum(4 * math.ceil(path.stat().st_size / 4096) for path in directory.rglob("*") if path.is_file())


# the disk is full


def test_a_disk_that_fills_up_ends_the_run_and_more_room_finishes_it(home, disk):
    place, out = disk.place / "out", disk.seen / "out"
    disk.resize(size_of(home.out) // 2)
    ending = run(disk, home, place)
    kept = saved_steps(out)
    assert kept in ([5], [5, 10], [5, 10, 15])
    for step in kept:
        assert arrays(out, step) == arrays(home.out, step)
    assert not (out / "summary.json").exists()
    assert_one_error(ending, "No space left on device", place)
    disk.resize(ROOMY)
    assert_mentions(assert_ends_well(disk, home, place), f"step {kept[-1]} of 20")
    assert result_of(out) == result_of(home.out)


@pytest.mark.long
def test_a_disk_that_is_full_from_the_first_file_on(home, disk):
    """Room for no file, then for the config and the first rows, then for a part of the first checkpoint."""
    for kilobytes in (4, 8, 24):
        disk.resize(kilobytes)
        assert_one_error(run(disk, home, disk.place / "out"), "No space left on device", disk.place / "out")
    disk.resize(ROOMY)
    assert_ends_well(disk, home, disk.place / "out")
    assert result_of(disk.seen / "out") == result_of(home.out)


@pytest.mark.long
def test_a_disk_that_is_full_at_the_very_end(home, disk):
    """All steps are done; there is no room for the log, then for the adapter, then for the picture."""
    place, out = disk.place / "out", disk.seen / "out"
    shutil.copytree(home.out, out)
    shutil.rmtree(out / "adapter")
    for name in ("summary.json", "loss.png"):
        (out / name).unlink()
    for kilobytes in (0, 12, 48):
        disk.leave_free(kilobytes)
        assert_one_error(run(disk, home, place), "No space left on device", place)
        assert not (out / "summary.json").exists()
        assert saved_steps(out) == [5, 10, 15, 20]
    assert (out / "adapter/adapter.safetensors").exists()
    disk.resize(ROOMY)
    assert_ends_well(disk, home, place)
    assert result_of(out) == result_of(home.out)


def test_an_export_that_finds_no_room_names_its_directory_and_leaves_nothing(
    finished, tmp_path, monkeypatch, capsys
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "write_safetensors", full)
    error = rejected(capsys, "export", finished.out, "--merged", "--to", tmp_path / "to")
    assert_mentions(error, "No space left on device", tmp_path / "to")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_an_export_to_a_full_disk_names_it_and_leaves_nothing(home, disk):
    export = [sys.executable, "-m", "loraplus_jax.cli", "export", str(home.out)]
    for kilobytes in (4, 16):
        disk.resize(kilobytes)
        ending = finished_process(*disk.inside(*export, "--merged", "--to", str(disk.place / "to")))
        assert_one_error(ending, "No space left on device", disk.place / "to")
        assert list(disk.seen.iterdir()) == []


# the directory cannot be written


@pytest.mark.long
def test_a_directory_that_cannot_be_written_is_rejected_and_left_alone(home, disk):
    (disk.seen / "mine").mkdir()
    disk.mount("-o", "remount,ro", disk.place)
    for name in ("new", "mine"):
        ending = run(disk, home, disk.place / name)
        assert_one_error(ending, "Read-only file system", disk.place / name)
        assert ending[1] == ""
    assert list(disk.seen.rglob("*")) == [disk.seen / "mine"]


@pytest.mark.long
def test_a_directory_that_becomes_unwritable_ends_the_run_with_what_it_had(home, disk):
    """A read-only mount laid over the directory: files that are open stay writable, new ones cannot be made."""
    place, out = disk.place / "out", disk.seen / "out"
    with started(*disk.inside(*train_command(home, place, *SETTINGS, "--train.steps", "1000000"))) as process:
        wait_until((out / "checkpoints/5").exists, process)
        disk.mount("--bind", place, place)
        disk.mount("-o", "remount,bind,ro", place)
        ending = ended(process)
    kept = saved_steps(out)
    assert arrays(out, 5) == arrays(home.out, 5)
    assert_one_error(ending, "Read-only file system", place)
    disk.mount("-o", "remount,bind,rw", place)
    more = str(kept[-1] + 5)
    assert_mentions(assert_ends_well(disk, home, place, "--train.steps", more), f"step {kept[-1]} of {more}")


# the cache


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "problem"), [("ro", "Read-only file system"), ("size=16k", "No space left")]
)
def test_without_a_cache_that_can_be_written_the_run_is_the_same(home, disk, tmp_path, options, problem):
    disk.mount("-o", f"remount,{options}", disk.place)
    out = tmp_path / "out"
    text = assert_ends_well(disk, home, out, LORAPLUS_CACHE=str(disk.place / "cache"))
    assert result_of(out) == result_of(home.out)
    assert problem in text
    assert "Traceback" not in text


@pytest.mark.long
def test_a_cache_that_was_full_once_is_of_use_again(home, disk, tmp_path):
    disk.resize(16)
    cache = {"LORAPLUS_CACHE": str(disk.place / "cache")}
    assert_ends_well(disk, home, tmp_path / "first", **cache)
    disk.resize(ROOMY)
    assert_ends_well(disk, home, tmp_path / "second", **cache)
    code, _, stderr = run(disk, home, tmp_path / "third", **cache)
    assert (code, stderr) == (0, "")
    assert result_of(tmp_path / "third") == result_of(home.out)


# nothing is written anywhere else


def test_nothing_is_written_outside_the_output_directory_and_the_cache(home, tmp_path, monkeypatch):
    places = {name: tmp_path / name for name in ("home", "here", "temporary")}
    for place in places.values():
        place.mkdir()
    for name in [name for name in os.environ if name.startswith(("XDG_", "MPL"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(places["here"])
    before = {path for path in home.directory.rglob("*") if home.out not in path.parents}
    code, _, stderr = finished_process(
        *train_command(home, tmp_path / "out", *SETTINGS),
        HOME=str(places["home"]),
        TMPDIR=str(places["temporary"]),
    )
    assert (code, stderr) == (0, "")
    assert [str(path) for place in places.values() for path in place.rglob("*")] == []
    assert {path for path in home.directory.rglob("*") if home.out not in path.parents} == before
    assert {path.name for path in tmp_path.iterdir()} == {*places, "out"}


# what orbax's threads say once the run has ended


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
    code, _, stderr = finished_process(sys.executable, "-c", script)
    assert (code, stderr) == (2, "")
