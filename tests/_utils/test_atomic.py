"""Files and directories are replaced as a whole, after they are on disk; JSON holds no NaN."""

import contextlib
import errno
import json
import math
import os
import signal
import subprocess
import sys

import pytest

from loraplus_jax._utils.atomic import atomic_write, temporary_directory, to_json, write_text

from ..messages import mentions


def write_file(path, content):
    path.write_text(content)


def write_directory(path, content):
    path.mkdir()
    (path / "a.txt").write_text(content)


def content_of(path):
    return (path / "a.txt" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("write", [write_file, write_directory])
@pytest.mark.parametrize("failure", ["block", "fsync", "replace"])
def test_what_is_written_appears_completely_or_not_at_all(tmp_path, monkeypatch, write, failure):
    path = tmp_path / "target"
    for content in ("old", "newer"):
        with atomic_write(path) as written:
            write(written, content)
            assert not path.exists() or content_of(path) == "old"
    assert content_of(path) == "newer"

    def interrupt(*_):
        raise KeyboardInterrupt

    if failure != "block":
        monkeypatch.setattr(f"os.{failure}", interrupt)
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as written:  # noqa: PT012
        write(written, "half")
        if failure == "block":
            interrupt()
    assert content_of(path) == "newer"
    monkeypatch.undo()
    write_text(tmp_path / "b.json", "n\N{SNOWMAN}w")
    assert (tmp_path / "b.json").read_text(encoding="utf-8") == "n\N{SNOWMAN}w"
    assert {p.name for p in tmp_path.iterdir()} == {"target", "b.json"}


@pytest.mark.parametrize("write", [write_file, write_directory])
def test_all_of_it_is_on_disk_before_it_is_renamed(tmp_path, monkeypatch, write):
    done = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor):
        done.append(os.stat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", noted_fsync)
    monkeypatch.setattr("os.replace", lambda *paths: (done.append("renamed"), replace(*paths)))
    with atomic_write(tmp_path / "target") as written:
        write(written, "x")
    files = [tmp_path / "target", *(tmp_path / "target").rglob("*")]
    assert {path.stat().st_ino for path in files} == set(done[: done.index("renamed")])
    assert done[done.index("renamed") + 1 :] == [tmp_path.stat().st_ino]


@pytest.mark.parametrize("existing", ["file", "directory", "dangling link", "made meanwhile"])
def test_what_must_be_new_replaces_nothing(tmp_path, existing):
    path = tmp_path / "target"
    make = {
        "file": lambda: path.write_text("mine"),
        "directory": path.mkdir,
        "dangling link": lambda: path.symlink_to("nowhere"),
    }.get(existing)
    if make is not None:
        make()
    with pytest.raises(ValueError, match=mentions(path, "exists")), atomic_write(path, new=True) as written:  # noqa: PT012
        path.write_text("mine")
        written.write_text("x")
    assert os.path.lexists(path)
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


WRITE = """
import pathlib, sys
from loraplus_jax.cli import __main__ as loraplus_command
loraplus_command.listen()
from loraplus_jax._utils.atomic import atomic_write, temporary_directory
with atomic_write(pathlib.Path(sys.argv[1])) as written, temporary_directory() as temporary:
    written.mkdir()
    (temporary / "a").write_bytes(bytes(9999))
    print("writes", flush=True)
    while True:
        (written / str(len(list(written.iterdir())))).write_bytes(bytes(9999))
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)],
)
def test_a_process_that_is_ended_leaves_nothing_or_the_next_removes_it(
    tmp_path, tmp_path_factory, monkeypatch, number, code
):
    system = tmp_path_factory.mktemp("system")
    monkeypatch.setenv("TMPDIR", str(system))
    monkeypatch.setattr("tempfile.tempdir", None)
    command = [sys.executable, "-c", WRITE, str(tmp_path / "target")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    is_ignored = signal.getsignal(number) == signal.SIG_IGN  # under nohup, and so in what it starts
    if is_ignored:
        signal.signal(number, signal.SIG_DFL)
    with subprocess.Popen(command, **pipes) as process:
        if is_ignored:
            signal.signal(number, signal.SIG_IGN)
        assert process.stdout.readline() == "writes\n"
        write_text(tmp_path / "other", "x")  # while the first is at work
        assert len(list(tmp_path.iterdir())) == 2
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors.count("\n") == (number != signal.SIGKILL), errors
    left = [*(p for p in tmp_path.iterdir() if p.name != "other"), *system.iterdir()]
    assert len(left) == 2 * (number == signal.SIGKILL)
    write_text(tmp_path / "other", "x")
    with temporary_directory() as temporary:
        assert [*system.iterdir()] == [temporary]
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize("trap", ["link", "owner"])
def test_a_directory_of_another_user_is_not_taken_for_a_leftover(tmp_path, monkeypatch, trap):
    private, system = tmp_path / "private", tmp_path / "system"
    (private / "replaced").mkdir(parents=True)
    (private / "replaced/mine").write_text("mine")
    system.mkdir()
    if trap == "link":
        (system / ".loraplus-x.partial").symlink_to(private)
    else:
        private.rename(private := system / ".loraplus-x.partial")
        other = os.geteuid() + 1
        monkeypatch.setattr("os.geteuid", lambda: other)
    with temporary_directory(system):
        pass
    assert (private / "replaced/mine").read_text() == "mine"
    assert [p.name for p in system.iterdir()] == [".loraplus-x.partial"]


def test_what_a_killed_process_was_about_to_replace_comes_back(tmp_path):
    for name in ("moved", "written_again"):
        replaced = tmp_path / f".loraplus-{name}.partial/replaced"
        replaced.mkdir(parents=True)
        write_directory(replaced / name, "old")
    write_directory(tmp_path / "written_again", "new")
    (tmp_path / ".other.partial").mkdir()
    write_text(tmp_path / "a", "x")
    assert {p.name for p in tmp_path.iterdir()} == {"a", "moved", "written_again", ".other.partial"}
    assert [content_of(tmp_path / name) for name in ("moved", "written_again")] == ["old", "new"]


def test_a_full_disk_names_the_path_that_the_caller_knows(tmp_path):
    path = tmp_path / "target"
    for names in ((), (str(tmp_path / ".loraplus-x.partial/new/a"),)):
        with pytest.raises(OSError, match=mentions("No space", path)) as raised, atomic_write(path):
            raise OSError(errno.ENOSPC, "No space left on device", *names)
        assert raised.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_names_a_hidden_file_names_the_path_that_the_caller_knows(tmp_path):
    path = tmp_path / "target"
    for hidden, named in (("", path), ("a.gguf", path / "a.gguf")):
        with pytest.raises(ValueError, match=mentions(named)) as raised, atomic_write(path) as written:
            raise ValueError(f"{written / hidden} is damaged")
        assert ".partial" not in str(raised.value)


def test_a_failure_leaves_no_parents(tmp_path):
    path = tmp_path / "a" / "b" / "c"
    with contextlib.suppress(KeyboardInterrupt), atomic_write(path, new=True) as written:
        written.mkdir()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    write_text(path, "x", new=True)
    assert path.read_text() == "x"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_null(value):
    tree = {"a": value, "b": [1.5, value, {"c": (value, "NaN", True, None)}]}
    assert json.loads(to_json(tree)) == {"a": None, "b": [1.5, None, {"c": [None, "NaN", True, None]}]}
    assert to_json({"é": 1}, indent=1, ensure_ascii=False) == '{\n "é": 1\n}'
