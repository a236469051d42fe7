"""The output directory of a run: who holds it, whether a run may start or resume there, and its files."""

import contextlib
import importlib.metadata
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import filelock
import jax
import orbax.checkpoint as ocp
import yaml
from rich.console import Console

from ..checkpoint import PACKAGES, field_differences
from ..json_files import read_json
from ..multihost import allgather, is_lead, is_lost_process
from ..settings.schema import RESUMABLE_FIELDS, STOP_FIELDS, Settings, split_settings
from ..settings.yaml_files import read_yaml
from .distributed import check_same_everywhere, raise_together
from .metrics_log import PICTURE, SUMMARY, partial_path, write_text

CONFIG, ADAPTER, LOCK, OWNER = "config.yaml", "adapter", ".lock", ".pid"
CHECKPOINTS, DAMAGED = "checkpoints", "damaged_checkpoints"
PER_PROCESS_PREFIXES = ("output_dir ", "distributed.")
"""Settings that say where a run is started, and not what it is."""
DIFFERENCE_LABELS = ("in that run", "here")
"""Of the two values of a difference between an older run and this one."""


@contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    """Holds the directory for this process; the operating system lets go of it when the process ends, however.

    Raises:
      ValueError: another process has a run in it; the message gives its pid.
    """
    lock, owner = _acquire_lock(directory), directory / OWNER
    try:
        owner.write_text(f"{os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            owner.unlink()
        lock.release()


def _acquire_lock(directory: Path) -> filelock.BaseFileLock:
    lock, owner = filelock.FileLock(directory / LOCK), directory / OWNER
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        pid = owner.read_text(encoding="utf-8").strip() if owner.exists() else "unknown"
        raise ValueError(
            f"a run with pid {pid} is at work in {directory}; wait for it or choose another"
        ) from None
    return lock


def _check_free(directory: Path) -> None:
    """Raises ValueError if a run is at work in the directory: said now, not when the weights are loaded."""
    if (directory / LOCK).exists():
        _acquire_lock(directory).release()


def _check_writable(directory: Path) -> None:
    """Raises ValueError unless files can be made in the directory: by trying, since rights do not tell all."""
    made = []
    try:
        for path in (*reversed(directory.parents), directory):
            if not path.exists():
                path.mkdir()
                made.append(path)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ValueError(f"output_dir {directory} cannot be written: {error.strerror}") from None
    finally:
        for path in reversed(made):
            with contextlib.suppress(OSError):  # not empty: another run has come first
                path.rmdir()


@contextmanager
def add_path_to_errors(directory: Path) -> Iterator[None]:
    """Gives the directory's name to an error of the system that has none, as a full disk's."""
    try:
        yield
    except OSError as error:
        if error.filename or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(directory)) from None


def check_directory(
    directory: Path,
    settings: Settings,
    *,
    fresh: bool,
    may_change: Sequence[str] = RESUMABLE_FIELDS,
    ends: tuple[str, ...] = STOP_FIELDS,
) -> list[str]:
    """Which settings have changed since the run that is in the directory was started, in words.

    Of several processes one asks: the files by which it tries the directory would confuse the others.

    Args:
      directory: `output_dir`.
      settings: of the run that wants to go on there.
      fresh: whether it starts over instead.
      may_change: which settings may differ.
      ends: which of them let a finished run go on.

    Raises:
      ValueError: the run may not start or go on there.
    """
    for parent in (directory, *directory.parents):
        if parent.exists() and not parent.is_dir():
            raise ValueError(f"output_dir {directory}: {parent} is a file")
    _check_writable(directory)
    _check_free(directory)
    names = {path.name for path in directory.iterdir()} if directory.exists() else set()
    if names <= {LOCK, OWNER, partial_path(directory / CONFIG).name}:
        return []
    if not (directory / CONFIG).is_file():
        raise ValueError(f"output_dir {directory} holds files that are not a run's; choose another directory")
    if fresh:
        return []
    other = "choose another --output_dir, or start over with --fresh (the old run is renamed, not deleted)"
    old = read_yaml(directory / CONFIG)
    if not isinstance(old, dict):
        raise ValueError(f"{directory / CONFIG} holds no settings; {other}")
    (old_same, old_free), (same, free) = (
        split_settings(v, "", may_change) for v in (old, settings.to_json())
    )
    if found := field_differences(old_same, same, DIFFERENCE_LABELS):
        raise ValueError(
            f"output_dir {directory} holds a run with other settings: {'; '.join(found)}; {other}"
        )
    changed = [
        text
        for text in field_differences(old_free, free, DIFFERENCE_LABELS)
        if not text.startswith(PER_PROCESS_PREFIXES)
    ]
    if (directory / SUMMARY).exists() and not any(text.startswith(ends) for text in changed):
        more = "it goes on with more train.steps, or " if ends else ""
        raise ValueError(f"the run in {directory} is finished, its results are in {SUMMARY}; {more}{other}")
    return changed


def check_shared_disk(directory: Path) -> None:
    """Raises ValueError, in all processes, unless all of them see what the first one writes to the directory."""
    if jax.process_count() == 1:
        return
    (name, *_) = allgather(f".seen-{secrets.token_hex(8)}")
    with raise_together():
        if is_lead():
            (directory / name).touch()
    with raise_together():
        if not (directory / name).is_file():
            raise ValueError(
                f"output_dir {directory} must lie on a file system that all processes see, and process "
                f"{jax.process_index()} does not find there what process 0 has written"
            )
    if is_lead():
        (directory / name).unlink()


def changed_settings(directory: Path, settings: Settings, fresh: bool) -> list[str]:
    """`check_directory` by the first process, for all; they must have been started alike."""
    started = settings.to_json()
    for name in ("coordinator", "process_id"):  # each process has its own
        del started["distributed"][name]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    check_same_everywhere({**started, "--fresh": fresh, "packages": versions})
    changed: list[str] = []
    with raise_together():
        if is_lead():
            changed = check_directory(directory, settings, fresh=fresh)
    return allgather(changed)[0]


@contextmanager
def close_manager(manager: ocp.CheckpointManager) -> Iterator[ocp.CheckpointManager]:
    """Closes the manager at the end, except where it would wait for a lost process."""
    try:
        yield manager
    except BaseException as error:
        if not is_lost_process(error):
            manager.close()
        raise
    manager.close()


def write_config(directory: Path, settings: Settings) -> None:
    """`config.yaml`, whole or not at all."""
    write_text(directory / CONFIG, yaml.safe_dump(settings.to_json(), sort_keys=False))


def archive_results(directory: Path) -> None:
    """Renames what a finished run made, with its last step in the name, before the run goes on.

    The summary last: as long as it is there, the run counts as finished, and this is done again after a sudden end.
    """
    if not (directory / SUMMARY).exists():
        return
    step = read_json(directory / SUMMARY).get("steps")
    for path in (directory / ADAPTER, directory / PICTURE, directory / SUMMARY):
        if path.exists():
            path.rename(_first_free(path.with_stem(f"{path.stem}_step_{step}")))


def _first_free(path: Path) -> Path:
    """The path, or with the first number behind its name that makes it new."""
    numbered = (path.with_stem(f"{path.stem}.{number}") for number in range(1, 10**6))
    return path if not path.exists() else next(p for p in numbered if not p.exists())


def quarantine_checkpoint(directory: Path, manager: ocp.CheckpointManager, step: int) -> Path:
    """Moves a run's checkpoint that cannot be read out of the way; returns where to."""
    place = _first_free(directory / DAMAGED / str(step))
    if is_lead():
        place.parent.mkdir(exist_ok=True)
        (directory / CHECKPOINTS / str(step)).rename(place)
    allgather(None)  # no process looks before it is out of the way
    manager.reload()
    return place


def rename_run(directory: Path, console: Console) -> None:
    """Renames an older run, unless it is at work, to the first free `DIRECTORY.N`."""
    if (directory / CONFIG).exists():
        number = next(n for n in range(1, 10**6) if not directory.with_name(f"{directory.name}.{n}").exists())
        with lock_directory(directory):
            old = directory.rename(directory.with_name(f"{directory.name}.{number}"))
        console.print(f"the older run is now {old}")


@contextmanager
def claim_directory(directory: Path, settings: Settings, fresh: bool, console: Console) -> Iterator[None]:
    """The output directory, made or taken over, and held."""
    if fresh:
        rename_run(directory, console)
    directory.mkdir(parents=True, exist_ok=True)
    with lock_directory(directory):
        if not (directory / CONFIG).exists():
            # The first file of a run: by it the directory is known as one, however early the run is killed.
            write_config(directory, settings)
        yield
