"""The command line in a process of its own: signals, kill -9, disks that fill up, directories that are read-only.

A disk is a tmpfs in a mount namespace that a waiting process holds: no root is needed where the system lets users
have namespaces, and nothing stays mounted.
"""

import dataclasses
import errno
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loraplus_jax.models.checkpoints import export

from ..messages import assert_mentions
from . import runs
from .runs import (
    ODD,
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
from .test_disturbances import arrays

pytestmark = pytest.mark.slow

STEPS = 120
# Every checkpoint is kept, so that a disk fills.
SETTINGS = (*ODD, *flags(f"--train.steps {STEPS} --train.eval_every 30 --train.keep 999"))
CODES = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
ROOMY = 16_384
PLACES = {"HOME": "home", "TMPDIR": "temporary", "PWD": "here"}


@pytest.fixture(scope="module")
def home(first_world, tmp_path_factory, cache):
    """The world of this file, with a whole run in it that nothing disturbed."""
    directory = tmp_path_factory.mktemp("home")
    world = first_world.copy(directory / "world")
    places = {name: directory / place for name, place in PLACES.items()}
    for place in places.values():
        place.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("XDG_", "MPL"))]:
            patch.delenv(name)
        patch.chdir(places["PWD"])
        ending = finished_process(*train(world, world.out), **{name: str(x) for name, x in places.items()})
    assert ending[::2] == (0, "")
    return world


def train(world, out, *more):
    return train_command(world, out, *SETTINGS, *more)


def result_of(out):
    return *runs.result_of(out), (out / "loss.png").read_bytes()


def test_nothing_is_written_outside_the_output_directory_and_the_cache(home, first_world):
    around = home.directory.parent
    assert {path.name for path in around.iterdir()} == {"world", *PLACES.values()}
    assert [path for place in PLACES.values() for path in (around / place).rglob("*")] == []
    found = {
        path.relative_to(home.directory) for path in home.directory.rglob("*") if home.out not in path.parents
    }
    assert found - {Path("out")} == {
        path.relative_to(first_world.directory) for path in first_world.directory.rglob("*")
    }


# signals and kill -9


def trained_rows(out):
    """Whether metrics.jsonl shows steps."""
    return (out / "metrics.jsonl").exists() and '"loss"' in (out / "metrics.jsonl").read_text()


def stopped_step(stderr):
    """The step of the one line that a stopped run prints."""
    found = re.fullmatch(rf"loraplus: .*\bstep (\d+) of {STEPS}\b.*\n", stderr)
    assert found, stderr
    return int(found[1])


def test_a_stopped_run_resumes_and_ends_as_if_never_stopped(home, tmp_path):
    out = tmp_path / "out"
    with started(*train(home, out)) as process:
        wait_until(lambda: trained_rows(out), process)
        process.terminate()
        code, _, stderr = ended(process)
    assert code == 143, stderr
    step = stopped_step(stderr)
    assert 0 < step < STEPS
    assert (out / "checkpoints" / str(step)).is_dir()
    assert not (out / "summary.json").exists()
    again, stdout, stderr = finished_process(*train(home, out))
    assert (again, stderr) == (0, "")
    assert_mentions(stdout, f"step {step} of {STEPS}")
    assert result_of(out) == result_of(home.out)


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="shows what a process has loaded")
@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_signal_while_libraries_are_imported_leaves_no_traceback(home, tmp_path, number, code):
    out = tmp_path / "out"
    with started(*train(home, out)) as process:
        wait_until(lambda: "jaxlib" in Path(f"/proc/{process.pid}/maps").read_text(), process)
        process.send_signal(number)
        found, _, stderr = ended(process)
    assert found == code, stderr
    assert re.fullmatch(r"loraplus: .*(interrupted|SIGTERM).*\n", stderr), stderr
    assert not out.exists()


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


# disks


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


def run(disk, world, out, *more, **environment):
    """The command line in the disk's namespace, to its own end."""
    return finished_process(*disk.inside(*train(world, out, *more)), **environment)


def assert_ends_well(disk, world, out, *more, **environment):
    code, stdout, stderr = run(disk, world, out, *more, **environment)
    assert code == 0, stderr
    return stdout + stderr


def size_of(directory):
    """Kilobytes on a disk of pages of four."""
    return sum(4 * math.ceil(path.stat().st_size / 4096) for path in directory.rglob("*") if path.is_file())


def test_a_disk_that_fills_up_ends_the_run_and_more_room_finishes_it(home, disk):
    place, out = disk.place / "out", disk.seen / "out"
    disk.resize(size_of(home.out) // 2)
    ending = run(disk, home, place)
    kept, all_steps = saved_steps(out), saved_steps(home.out)
    assert kept
    assert kept == all_steps[: len(kept)] != all_steps
    for step in kept:
        assert arrays(out / f"checkpoints/{step}") == arrays(home.out / f"checkpoints/{step}")
    assert not (out / "summary.json").exists()
    assert_one_error(ending, "No space left on device", place)
    disk.resize(ROOMY)
    assert_mentions(assert_ends_well(disk, home, place), f"step {kept[-1]} of {STEPS}")
    assert result_of(out) == result_of(home.out)


@pytest.mark.long
def test_a_disk_that_is_full_from_the_first_file_on_and_again_at_the_very_end(home, disk):
    """Room for no file, then for the config and first rows, then for a part of the first checkpoint; when all steps
    are done, none for the log, then for the adapter, then for the picture."""
    place, out = disk.place / "out", disk.seen / "out"
    for kilobytes in (4, 8, 24):
        disk.resize(kilobytes)
        assert_one_error(run(disk, home, place), "No space left on device", place)
    disk.resize(ROOMY)
    assert_ends_well(disk, home, place)
    shutil.rmtree(out / "adapter")
    for name in ("summary.json", "loss.png"):
        (out / name).unlink()
    for kilobytes in (0, 12, 48):
        disk.leave_free(kilobytes)
        assert_one_error(run(disk, home, place), "No space left on device", place)
        assert not (out / "summary.json").exists()
        assert saved_steps(out) == saved_steps(home.out)
    disk.resize(ROOMY)
    assert_ends_well(disk, home, place)
    assert result_of(out) == result_of(home.out)


def test_an_export_that_finds_no_room_names_its_directory_and_leaves_nothing(
    home, tmp_path, monkeypatch, capsys
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "write_safetensors", full)
    error = rejected(capsys, "export", home.out, "--merged", "--to", tmp_path / "to")
    assert_mentions(error, "No space left on device", tmp_path / "to")
    assert list(tmp_path.iterdir()) == []


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


# what libraries say


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


@pytest.mark.parametrize("shown", [False, True])
def test_no_traceback_of_a_library_is_shown_unless_asked_for(shown):
    environment = {"LORAPLUS_TRACEBACK": "1"} if shown else {}
    code, stdout, stderr = finished_process(sys.executable, "-c", NOISE, **environment)
    assert (code, stdout) == (0, "")
    if shown:
        assert_mentions(stderr, *(f"KeyError: '{name}'" for name in ("thread", "destructor", "task", "log")))
    else:
        assert stderr == ""


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
