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

STEPS = 60
# Every checkpoint is kept, so that a disk fills.
SETTINGS = (*ODD, *flags(f"--train.steps {STEPS} --train.eval_every 15 --train.keep 999"))
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
# The arrays of a save are written in the background, so "after" is in the middle of it.
KILLS = """
setup.load_params before 1
run_directory.open_manager after 1
trainer.evaluate after 1
trainer.save_checkpoint before 1
trainer.save_checkpoint 20 1
trainer.save_checkpoint after 2
run_directory.restore_checkpoint after 1
trainer.save_checkpoint 60 1
trainer.Trainer.finish before 1
trainer.save_adapter after 1
trainer.Trainer.write_summary before 1
"""


@pytest.mark.long
def test_a_run_killed_at_any_point_ends_as_if_never_killed(home, tmp_path):
    out = tmp_path / "out"
    arguments = train(home, out)[3:]
    for point in KILLS.split("\n")[1:-1]:
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

    def resize(self, kilobytes):
        options = ("-o", f"remount,size={kilobytes}k")
        subprocess.run(self.inside("mount", *options, str(self.place)), check=True)


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


def size_of(directory):
    """Kilobytes on a disk of pages of four."""
    return sum(4 * math.ceil(path.stat().st_size / 4096) for path in directory.rglob("*") if path.is_file())


def test_a_full_disk_and_a_signal_end_the_run_and_with_more_room_it_is_as_if_never_stopped(home, disk):
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
    log, written = out / "metrics.jsonl", (out / "metrics.jsonl").stat().st_mtime_ns

    def goes_on():
        last = int(re.findall(r'"step": (\d+)', log.read_text())[-1])
        return log.stat().st_mtime_ns != written and last > kept[-1]

    with started(*disk.inside(*train(home, place))) as process:
        wait_until(goes_on, process)
        process.terminate()
        code, stdout, stderr = ended(process)
    assert code == 143, stderr
    assert_mentions(stdout, f"step {kept[-1]} of {STEPS}")
    assert re.fullmatch(rf"loraplus: .*\bstep {saved_steps(out)[-1]} of {STEPS}\b.*\n", stderr), stderr
    assert not (out / "summary.json").exists()
    assert run(disk, home, place)[::2] == (0, "")
    assert result_of(out) == result_of(home.out)


def test_an_export_that_finds_no_room_names_its_directory_and_leaves_nothing(
    home, tmp_path, monkeypatch, capsys
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("loraplus_jax.inference.write_hf.write_safetensors", full)
    error = rejected(capsys, "export", home.out, "--merged", "--to", tmp_path / "to")
    assert_mentions(error, "No space left on device", tmp_path / "to")
    assert list(tmp_path.iterdir()) == []


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
