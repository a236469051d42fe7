"""The output directory of a run: its lock, its files, and whether a run may start or resume there."""

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

from ..checkpoint import PACKAGES, DamagedCheckpoint, check_directory_name, field_differences
from ..json_files import read_json
from ..multihost import allgather, is_lead, is_lost_process
from ..settings.schema import RESUMABLE_FIELDS, STOP_FIELDS, Settings, split_settings
from ..settings.yaml_files import read_yaml
from .distributed import check_same_everywhere, raise_together
from .metrics_log import PICTURE, SUMMARY, partial_path, write_text

CONFIG, ADAPTER, LOCK, OWNER = "config.yaml", "adapter", ".lock", ".pid"
CHECKPOINTS, DAMAGED = "checkpoints", "damaged_checkpoints"
PER_PROCESS_PREFIXES = ("output_dir ", "distributed.")
"""Settings that depend on where a run is started; changes to them are not reported."""
DIFFERENCE_LABELS = ("in that run", "here")
"""Labels for the two values of a setting that differs between the existing run and this one."""


@contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    """Locks the directory for this process; the operating system releases the lock when the process exits.

    Raises:
      ValueError: another process has locked it; the message gives its pid.
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
            f"{directory} is in use by another run (pid {pid}); wait for it or choose another output_dir"
        ) from None
    return lock


def _check_not_locked(directory: Path) -> None:
    """Raises ValueError if another run uses the directory; checked early, before the weights are loaded."""
    if (directory / LOCK).exists():
        _acquire_lock(directory).release()


def _check_writable(directory: Path) -> None:
    """Raises ValueError if the directory is not writable. It tries, since permissions are not conclusive."""
    created = []
    try:
        for path in (*reversed(directory.parents), directory):
            if not path.exists():
                path.mkdir()
                created.append(path)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to output_dir {directory}: {error.strerror}") from None
    finally:
        for path in reversed(created):
            with contextlib.suppress(OSError):  # not empty: another run has started there
                path.rmdir()


@contextmanager
def add_path_to_errors(directory: Path) -> Iterator[None]:
    """Adds the directory to system errors without a file name, such as a full disk."""
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
    """Checks that a run may start or resume in a directory; returns the changed settings as text.

    Call it on one process only: it creates and removes test files.

    Args:
      directory: `output_dir`.
      settings: the settings of the run.
      fresh: whether to start over instead of resuming.
      may_change: the settings that may differ from the existing run.
      ends: the settings that, if changed, resume a finished run.

    Raises:
      ValueError: the run may not start or resume there.
    """
    for parent in (directory, *directory.parents):
        if os.path.lexists(parent) and not parent.is_dir():
            raise ValueError(f"output_dir {directory}: {parent} is a file or a broken link, not a directory")
    check_directory_name("output_dir", directory)
    _check_writable(directory)
    _check_not_locked(directory)
    names = {path.name for path in directory.iterdir()} if directory.exists() else set()
    if names <= {LOCK, OWNER, partial_path(directory / CONFIG).name}:
        return []
    if not (directory / CONFIG).is_file():
        raise ValueError(f"output_dir {directory} contains files that do not belong to a run; choose another")
    if fresh:
        return []
    remedy = "choose another --output_dir, or start over with --fresh (the old run is renamed, not deleted)"
    old = read_yaml(directory / CONFIG)
    if not isinstance(old, dict):
        raise ValueError(f"{directory / CONFIG} contains no settings; {remedy}")
    if ("sweep" in old) != ("sweep" in settings.to_json()):
        kind = "sweep" if "sweep" in old else "single run"
        raise ValueError(f"output_dir {directory} contains a {kind}; {remedy}")
    (old_fixed, old_free), (fixed, free) = (
        split_settings(v, "", may_change) for v in (old, settings.to_json())
    )
    if differences := field_differences(old_fixed, fixed, DIFFERENCE_LABELS):
        raise ValueError(
            f"output_dir {directory} contains a run with different settings: {'; '.join(differences)}; {remedy}"
        )
    changed = [
        text
        for text in field_differences(old_free, free, DIFFERENCE_LABELS)
        if not text.startswith(PER_PROCESS_PREFIXES)
    ]
    if (directory / SUMMARY).exists() and not any(text.startswith(ends) for text in changed):
        extend = "raise train.steps to continue it, " if ends else ""
        raise ValueError(f"the run in {directory} has finished (results in {SUMMARY}); {extend}{remedy}")
    return changed


def describe_unfinished(directory: Path) -> str | None:
    """How far an unfinished run in a directory got, or None if there is no such run.

    The number of steps is known here only if the settings give it.
    """
    if not (directory / CONFIG).is_file() or (directory / SUMMARY).exists():
        return None
    saved = [int(path.name) for path in (directory / CHECKPOINTS).glob("*") if path.name.isdigit()]
    steps = (read_yaml(directory / CONFIG).get("train") or {}).get("steps")
    progress = f"{max(saved, default=0)} of {steps} steps" if steps else f"step {max(saved, default=0)}"
    return f"the run in {directory} has not finished ({progress}); rerun the train command to resume"


def check_shared_disk(directory: Path) -> None:
    """Raises ValueError on every process unless all see what the lead process writes to the directory."""
    if jax.process_count() == 1:
        return
    (name, *_) = allgather(f".seen-{secrets.token_hex(8)}")
    with raise_together():
        if is_lead():
            (directory / name).touch()
    with raise_together():
        if not (directory / name).is_file():
            raise ValueError(
                f"output_dir {directory} must be on a file system shared by all processes, but process "
                f"{jax.process_index()} cannot see the files of process 0 there"
            )
    if is_lead():
        (directory / name).unlink()


def changed_settings(directory: Path, settings: Settings, fresh: bool) -> list[str]:
    """Runs `check_directory` on the lead process, after checking that all processes have the same settings."""
    values = settings.to_json()
    for name in ("coordinator", "process_id"):  # each process has its own
        del values["distributed"][name]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    check_same_everywhere({**values, "--fresh": fresh, "packages": versions})
    changed: list[str] = []
    with raise_together():
        if is_lead():
            changed = check_directory(directory, settings, fresh=fresh)
    return allgather(changed)[0]


@contextmanager
def close_manager(manager: ocp.CheckpointManager) -> Iterator[ocp.CheckpointManager]:
    """Closes the manager on exit, unless that would wait for a lost process."""
    try:
        yield manager
    except BaseException as error:
        if not is_lost_process(error):
            manager.close()
        raise
    manager.close()


def write_config(directory: Path, settings: Settings) -> None:
    """Writes `config.yaml` atomically."""
    write_text(directory / CONFIG, yaml.safe_dump(settings.to_json(), sort_keys=False))


def archive_results(directory: Path) -> None:
    """Renames the results of a finished run, adding its last step, before the run resumes.

    Renames the summary last: until then the run counts as finished, so after a crash this runs again.
    """
    if not (directory / SUMMARY).exists():
        return
    step = read_json(directory / SUMMARY).get("steps")
    for path in (directory / ADAPTER, directory / PICTURE, directory / SUMMARY):
        if path.exists():
            path.rename(_first_free(path.with_stem(f"{path.stem}_step_{step}")))


def _first_free(path: Path) -> Path:
    """The path itself if it is free, else the first free path with a number added."""
    numbered = (path.with_stem(f"{path.stem}.{number}") for number in range(1, 10**6))
    return path if not path.exists() else next(p for p in numbered if not p.exists())


def quarantine_checkpoint(
    directory: Path, manager: ocp.CheckpointManager, step: int, error: DamagedCheckpoint
) -> Path:
    """Moves an unreadable checkpoint of a run out of the way; returns its new path.

    Raises:
      ValueError: it is the last one; it stays where it is, so that the run never starts over unasked.
    """
    if list(manager.all_steps()) == [step]:
        raise ValueError(
            f"{error}; the run has no other checkpoint: restore the original files (those of other checkpoints "
            f"are in {DAMAGED}/), or start over with --fresh"
        )
    destination = _first_free(directory / DAMAGED / str(step))
    if is_lead():
        destination.parent.mkdir(exist_ok=True)
        (directory / CHECKPOINTS / str(step)).rename(destination)
    allgather(None)  # a barrier: no process reloads before the move
    manager.reload()
    return destination


def rename_run(directory: Path, console: Console) -> None:
    """Renames an existing run to the first free `DIRECTORY.N`, unless it is in use."""
    if (directory / CONFIG).exists():
        number = next(n for n in range(1, 10**6) if not directory.with_name(f"{directory.name}.{n}").exists())
        with lock_directory(directory):
            old = directory.rename(directory.with_name(f"{directory.name}.{number}"))
        console.print(f"renamed the old run to {old}")


@contextmanager
def claim_directory(directory: Path, settings: Settings, fresh: bool, console: Console) -> Iterator[None]:
    """Creates the output directory, or takes over an existing run's, and locks it."""
    if fresh:
        rename_run(directory, console)
    directory.mkdir(parents=True, exist_ok=True)
    with lock_directory(directory):
        if not (directory / CONFIG).exists():
            # Written first: it marks the directory as a run, however early the run is killed.
            write_config(directory, settings)
        yield
