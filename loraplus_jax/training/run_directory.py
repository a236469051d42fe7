"""The output directory of a run: its lock, its files, and whether a run may start or resume there."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import jax
import orbax.checkpoint as ocp
from rich.console import Console

from .._utils.atomic import STAGING, add_path_to_errors, temporary_directory, write_text
from .._utils.field_types import check_schema
from .._utils.json_files import check_file, read_json, read_text
from .._utils.multihost import allgather, is_lead
from .._utils.records import DIGEST, read_record, write_record
from .._utils.validation import expand_path
from .._utils.yaml_files import to_yaml
from ..settings.parsing import settings_from_json
from ..settings.schema import PATH_FIELDS, STOP_FIELDS, Settings, hide_paths, split_settings
from ..step.checkpoint import (
    DamagedCheckpoint,
    Restored,
    check_directory_name,
    open_manager,
    restore_checkpoint,
)
from ..step.run_metadata import field_differences, numeric_options, package_versions
from ..step.train_step import TrainState
from .distributed import check_same_everywhere, raise_together
from .metrics_log import METRICS, PICTURE, SUMMARY, TEXTS
from .provenance import FORMAT, Origin, Record, check_allowed, check_record
from .run_files import (
    ADAPTER,
    CHECKPOINTS,
    CONFIG,
    FAILURE,
    IDENTITY,
    LOCK,
    OWNER,
    UNITS,
    TrainingFailed,
    has_progress,
    read_summary,
    resume_command,
    saved_settings,
    saved_steps,
)
from .xla import check_options, use_compilation_cache

DAMAGED = "damaged_checkpoints"
PER_PROCESS_PREFIXES = ("output_dir ", "distributed.")
"""Settings that depend on where a run is started; changes to them are not reported."""
DIFFERENCE_LABELS = ("in that run", "here")
"""Labels for the two values of a setting that differs between the existing run and this one."""


@contextmanager
def lock_directory(directory: Path, *, wait: float = 1.0) -> Iterator[Callable[[], None]]:
    """Locks the directory for this process; the operating system releases the lock when the process exits.

    Waits so many seconds for another process. By default only for `owner_pid`, which holds the lock for a moment.

    Yields a check to call before writing: it raises ValueError if the directory is no longer at its path.
    """
    with _lock(directory, wait):
        locked, owner = directory.stat(), directory / OWNER

        def check() -> None:
            # The lock is held on a file, which stays locked wherever it is moved.
            if not directory.exists() or not os.path.samestat(locked, directory.stat()):
                raise ValueError(
                    f"output_dir {directory} was renamed, deleted or replaced during the run; move it back, and "
                    "rerun the same command to resume"
                )

        try:
            write_text(owner, f"{os.getpid()}\n")
            yield check
        finally:
            with contextlib.suppress(OSError):
                owner.unlink()


@contextmanager
def _lock(directory: Path, wait: float = 1.0) -> Iterator[None]:
    lock, owner = filelock.FileLock(directory / LOCK), directory / OWNER
    for path in (directory / LOCK, owner):  # through a link another file would be written; a FIFO would block
        if os.path.lexists(path):
            check_file(path, links="none")
    try:
        lock.acquire(timeout=wait)
    except filelock.Timeout:
        pid = read_text(owner).strip() if owner.exists() else "unknown"
        raise ValueError(
            f"{directory} is in use by another run (pid {pid}); wait for it or choose another output_dir"
        ) from None
    try:
        yield
    finally:
        lock.release()


def check_directory(directory: Path, settings: Settings, *, fresh: bool) -> list[str]:
    """Checks that a run may start, or resume unless `fresh`, in a directory; returns the changed settings as text.

    Call it on one process only: it creates and removes test files. The class of the settings names those that may
    differ from the existing run.
    """
    for parent in (directory, *directory.parents):
        if os.path.lexists(parent) and not parent.is_dir():
            raise ValueError(f"output_dir {directory}: {parent} is a file or a broken link, not a directory")
    check_directory_name("output_dir", directory)
    try:  # permissions and the length of names alone do not tell
        existing = next(path for path in (directory, *directory.parents) if path.exists())
        with temporary_directory(existing) as probe:
            (probe / directory.relative_to(existing)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to output_dir {directory}: {error.strerror}") from None
    names = {path.name for path in directory.iterdir()} if directory.exists() else set()
    if {LOCK, OWNER} & names:
        with _lock(directory):  # in use? Known before the weights are loaded
            pass
    if all(name in (LOCK, OWNER) or name.endswith(STAGING) for name in names):
        return []
    if not (directory / CONFIG).is_file():
        raise ValueError(f"output_dir {directory} contains files that do not belong to a run; choose another")
    if fresh:
        if Path.cwd().is_relative_to(directory.resolve()):
            raise ValueError(
                f"output_dir {directory}: --fresh renames it, and this command runs in it; run it from elsewhere"
            )
        return []
    remedy = "choose another --output_dir, or start over with --fresh (the old run is renamed, not deleted)"
    if has_progress(directory):
        saved_record(directory)  # can it be read?
    old = saved_settings(directory, remedy)
    if ("sweep" in old) != ("sweep" in settings.to_json()):
        kind = "sweep" if "sweep" in old else "single run"
        raise ValueError(f"output_dir {directory} contains a {kind}; {remedy}")
    try:  # a setting that an earlier version did not have has its default
        old = settings_from_json(old, type(settings)).to_json()
    except ValueError as error:
        raise ValueError(
            f"output_dir {directory} contains a run of another version, {directory / CONFIG}: {error}; {remedy}"
        ) from None
    new = settings.to_json()
    (old_fixed, _), (fixed, _) = (
        split_settings(hide_paths(values), "", settings.resumable_fields) for values in (old, new)
    )
    if differences := field_differences(old_fixed, fixed, DIFFERENCE_LABELS):
        raise ValueError(
            f"output_dir {directory} contains a run with different settings: {'; '.join(differences)}; {remedy}"
        )
    changed = [
        text
        for text in field_differences(old, new, DIFFERENCE_LABELS)
        if not text.startswith(PER_PROCESS_PREFIXES)
    ]
    stops = tuple(name for name in STOP_FIELDS if name in settings.resumable_fields)
    summary = read_summary(directory)
    if summary is not None and not any(text.startswith(stops) for text in changed):
        field = "train.early_stopping" if summary.get("stopped_early") else "train.steps"
        # AdaLoRA's ranks follow from the number of steps.
        can_continue = stops and settings.optimizer.target_rank is None
        extend = f"raise {field} to continue it, " if can_continue else ""
        raise ValueError(f"the run in {directory} has finished (results in {SUMMARY}); {extend}{remedy}")
    if METRICS in names and not {CHECKPOINTS, UNITS} & names:
        raise ValueError(
            f"output_dir {directory} contains a run without its {CHECKPOINTS} directory; restore it, or {remedy}"
        )
    return changed


def describe_unfinished(directory: Path) -> str | None:
    """How far an unfinished run in a directory got, or None if there is no such run."""
    if not (directory / CONFIG).is_file() or read_summary(directory) is not None:
        return None
    done = max(saved_steps(directory), default=0)
    saved = saved_settings(directory, "restore it")
    steps = saved.get("train", {}).get("steps")  # or they count epochs
    progress = f"{done} of {steps} steps" if steps else f"step {done}"
    command = resume_command(directory, saved)
    return f"the run in {directory} has not finished ({progress}); resume it: {command}"


def write_config(directory: Path, settings: Settings) -> None:
    """Writes `config.yaml` atomically."""
    write_text(directory / CONFIG, to_yaml(settings.to_json()))


def archive_results(directory: Path) -> None:
    """Renames the results of a finished run, adding its last step, before the run resumes."""
    if (summary := read_summary(directory)) is None:
        return
    step = summary.get("steps")
    # The summary last: until then the run counts as finished, so after a crash this runs again.
    for path in (directory / name for name in (ADAPTER, PICTURE, TEXTS["after"], SUMMARY)):
        if path.exists():
            path.rename(first_free(path.with_stem(f"{path.stem}_step_{step}")))


def first_free(path: Path) -> Path:
    """The path itself if it is free, else the first free path with a number added."""
    numbered = (path.with_stem(f"{path.stem}.{number}") for number in range(1, 10**6))
    return path if not path.exists() else next(p for p in numbered if not p.exists())


def saved_record(directory: Path) -> dict[str, Any]:
    """What everything in a run's directory was made with: its `identity.json`.

    Raises:
      ValueError: it is missing or damaged, or of another format.
    """
    path = directory / IDENTITY
    if not path.exists():
        raise ValueError(f"{path} is missing; restore it, or start over with --fresh")
    if (found := read_json(path).get("format", 1)) != FORMAT:
        raise ValueError(
            f"{directory} has format {found!r:.80} of runs, this version reads {FORMAT}: export its adapter with "
            "the version that made it, or start over with --fresh"
        )
    return read_record(
        path, lambda content: check_schema(Record, content, path), remedy="start over with --fresh"
    )


def origins_of(record: Mapping[str, Any]) -> list[str | None]:
    """The digests of a directory's `identity.json`: those before differences were allowed, and the current one."""
    return [*(before["digest"] for before in record.get("allowed", ())), record.get(DIGEST)]


def rename_run(directory: Path, console: Console) -> None:
    """Renames an existing run to the first free `DIRECTORY.N`, unless it is in use."""
    if (directory / CONFIG).exists():
        number = next(n for n in range(1, 10**6) if not directory.with_name(f"{directory.name}.{n}").exists())
        with _lock(directory):
            old = directory.rename(directory.with_name(f"{directory.name}.{number}"))
        console.print(f"renamed the old run to {old}")


@dataclasses.dataclass
class OutputDirectory:
    """The output directory of a run from `open_output_directory`, with its arguments: nothing is written before
    `claim`.

    Attributes:
      resumes: whether this run continues from something there.
      changed: the settings that changed since the run started, as text.
      check: raises ValueError if the claimed directory is no longer at its path; call it before writing. It does
        nothing on other processes than the lead.
      manager: the checkpoints, after `open_manager`.
      differences: those of base and data that were allowed there so far, as text, after `check_origin`; empty on
        other processes than the lead.
    """

    path: Path
    settings: Settings
    console: Console
    fresh: bool
    allow_different: Sequence[str]
    resumes: bool
    changed: Sequence[str]
    _stack: contextlib.ExitStack
    check: Callable[[], None] = lambda: None
    manager: ocp.CheckpointManager = dataclasses.field(init=False)
    differences: Sequence[str] = ()

    def claim(self) -> None:
        """Creates the directory, or takes over an existing run's, and locks it until the context ends.

        Every later OSError of the context names a path.
        """
        self._stack.enter_context(add_path_to_errors(self.path))
        with raise_together():
            if is_lead():
                if self.fresh:
                    rename_run(self.path, self.console)
                self.path.mkdir(parents=True, exist_ok=True)
                self.check = self._stack.enter_context(lock_directory(self.path))
                self._stack.enter_context(self._record_failure())
                if not (self.path / CONFIG).exists():
                    # Written first: it marks the directory as a run, however early the run is killed.
                    write_config(self.path, self.settings)
                if (self.path / SUMMARY).exists() and read_summary(self.path) is None:
                    self.console.print(
                        f"{self.path / SUMMARY} is empty or damaged: the run resumes and writes it again"
                    )
        lead = allgather(os.getpid())[0]
        # On a shared disk every process sees the pid that the lead process wrote. Otherwise orbax would wait, and
        # at last fail, for files that another process has written elsewhere.
        with raise_together():
            if not (self.path / OWNER).is_file() or (self.path / OWNER).read_text() != f"{lead}\n":
                raise ValueError(
                    f"output_dir {self.path} must be on a file system shared by all processes, but process "
                    f"{jax.process_index()} cannot see the files of process 0 there"
                )

    def check_origin(self, origin: Origin) -> None:
        """Compares base, data, settings and JAX's options with what is there was made with, or records them.

        Differences that are allowed are recorded, too.

        Raises:
          ValueError: they differ; the message says which of them `allow_different` may name.
        """
        with raise_together():
            if is_lead():
                # Another run may have saved something here while this one prepared.
                saved = saved_record(self.path) if self.resumes or has_progress(self.path) else {}
                settings, _ = split_settings(self.settings.to_json(), "", self.settings.resumable_fields)
                record = {"format": FORMAT, **origin, "settings": hide_paths(settings)}
                record["jax_config"] = numeric_options()
                record["base"] = origin["base"] or saved.get("base")
                try:
                    allowed = check_record(self.path, saved, record, allow=self.allow_different)
                except ValueError as error:
                    moved = [text for text in self.changed if text.startswith(PATH_FIELDS)]
                    if not moved:
                        raise
                    raise ValueError(
                        f"{error}. {'; '.join(moved)}: to train with these, choose another --output_dir, or start "
                        "over with --fresh"
                    ) from None
                record["allowed"] = saved.get("allowed", [])
                if allowed:
                    record["allowed"] += [{"digest": saved.get(DIGEST), "differences": allowed}]
                # Results hold the digest of this file, so it is rewritten only if something differs.
                if allowed or DIGEST not in saved:
                    write_record(self.path / IDENTITY, record)
                self.differences = [line for each in record["allowed"] for line in each["differences"]]
                self.resumes = True

    @contextmanager
    def _record_failure(self) -> Iterator[None]:
        """Keeps the message of a TrainingFailed in a file, which the next run here removes."""
        (self.path / FAILURE).unlink(missing_ok=True)
        try:
            yield
        except TrainingFailed as failure:
            with contextlib.suppress(OSError):  # a full disk does not hide why the training failed
                write_text(self.path / FAILURE, f"{failure}\n")
            raise

    def open_manager(self, **how: Any) -> None:
        """Opens the checkpoints with `train.keep` until the context ends; `how` as for `step.open_manager`."""
        manager = open_manager(self.path / CHECKPOINTS, keep=self.settings.train.keep, **how)
        self.manager = self._stack.enter_context(manager)

    def restore(
        self,
        like: TrainState,
        metadata: Mapping[str, Any],
        *,
        best: bool = False,
        remedy: str = "start over with --fresh",
    ) -> Restored | None:
        """Restores the newest readable checkpoint, or the one with the best metric; None if there is none.

        Moves a damaged checkpoint to `damaged_checkpoints/` and tries the next. The result is sharded as `like`,
        whose arrays are deleted before it is read.

        Raises:
          ValueError: the checkpoint is of another run, or the last one is damaged. It stays where it is, so that
            the run never starts over unasked; the message ends in the remedy.
        """
        manager, moved = self.manager, None
        while (step := allgather(manager.best_step() if best else manager.latest_step())[0]) is not None:
            for leaf in jax.tree.leaves((like.trainable, like.opt_state)):
                if isinstance(leaf, jax.Array):  # there may be no memory for two states
                    leaf.delete()
            try:
                return restore_checkpoint(manager, like, metadata=metadata, step=step)
            except DamagedCheckpoint as error:
                if list(manager.all_steps()) == [step]:
                    raise ValueError(
                        f"{error}; there is no other checkpoint: restore the original files (those of other "
                        f"checkpoints are in {DAMAGED}/), or {remedy}"
                    ) from None
                destination = first_free(self.path / DAMAGED / str(step))
                if is_lead():
                    destination.parent.mkdir(exist_ok=True)
                    (self.path / CHECKPOINTS / str(step)).rename(destination)
                allgather(None)  # a barrier: no process reloads before the move
                manager.reload()
                self.console.print(f"{error}; moved it to {destination}, using another checkpoint")
                moved = error
        if moved is not None:  # and the metrics of the others are damaged, too
            raise ValueError(f"{moved}; no other checkpoint has metrics to choose the best by; {remedy}")
        return None


@contextmanager
def open_output_directory(
    settings: Settings,
    console: Console,
    *,
    fresh: bool = False,
    allow_different: Sequence[str] = (),
) -> Iterator[OutputDirectory]:
    """Checks that a run may start or resume in its output directory, and uses the compilation cache.

    Call it on every process. It writes nothing, so prepare the run before you call `claim`.

    Args:
      settings: the settings of the run, the same on all processes.
      console: where to print.
      fresh: whether to start over instead of resuming.
      allow_different: parts of the base model or data that may differ from those of what is there.
    """
    with raise_together():
        check_allowed(allow_different)
        check_options()
        path = expand_path("output_dir", settings.output_dir)
    values = settings.to_json()
    for name in ("coordinator", "process_id"):  # each process has its own
        del values["distributed"][name]
    # Other versions may compile other collectives, and processes then wait for each other forever.
    versions = package_versions()
    check_same_everywhere({**values, "--fresh": fresh, "packages": versions})
    changed, resumes = list[str](), False
    with raise_together():
        if is_lead():
            changed = check_directory(path, settings, fresh=fresh)
            resumes = not fresh and has_progress(path)
            if allow_different and settings.init_adapter is None and not resumes:
                raise ValueError(
                    f"--allow_different {allow_different[0]} has no effect: {path} has nothing to resume from, and "
                    "init_adapter is not set; leave it out"
                )
    changed = allgather(changed)[0]
    with contextlib.ExitStack() as stack:
        stack.enter_context(use_compilation_cache(console, is_on=settings.train.compilation_cache))
        yield OutputDirectory(path, settings, console, fresh, allow_different, resumes, changed, stack)
