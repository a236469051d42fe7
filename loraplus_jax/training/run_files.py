"""The files of a run's directory that commands without JAX read too: settings, summary, lock, failure."""

import itertools
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from .._utils.json_files import MAX_JSON_BYTES, check_file
from .._utils.records import read_record
from .._utils.validation import expand_path
from .._utils.yaml_files import read_yaml
from .metrics_log import SUMMARY

CONFIG, ADAPTER, LOCK, OWNER = "config.yaml", "adapter", ".lock", ".pid"
CHECKPOINTS, FAILURE = "checkpoints", "failure.txt"
UNITS = "units"
"""The directories of a sweep's units of work, each with checkpoints and a result of its own."""
RESULT = "result.json"
IDENTITY = "identity.json"
"""The record of base, data, settings and options of JAX that everything in the directory was made with."""
START = "start"
"""The directory of the adapter before the first step, with an init that takes it from the base."""


class TrainingFailed(Exception):
    """Training diverged and was aborted; earlier checkpoints are kept."""


def read_summary(directory: Path) -> dict[str, Any] | None:
    """The summary of a finished run, or None: an empty or damaged file does not mark a run as finished."""
    try:
        return read_record(directory / SUMMARY)
    except ValueError:
        return None


def saved_steps(directory: Path) -> list[int]:
    """The steps of the checkpoints in a run's directory; in a sweep's, those of all its units."""
    paths = (directory.glob(pattern) for pattern in (f"{CHECKPOINTS}/*", f"{UNITS}/*/{CHECKPOINTS}/*"))
    return [int(path.name) for path in itertools.chain(*paths) if path.name.isdigit()]


def has_progress(directory: Path) -> bool:
    """Whether a run or sweep has saved something that a resumed one continues from."""
    made = itertools.chain(directory.glob(START), directory.glob(f"{UNITS}/*/{RESULT}"))
    return bool(saved_steps(directory)) or any(made)


def saved_settings(directory: Path, remedy: str) -> dict[str, Any]:
    """The settings in a run's directory, unchecked; the remedy ends the message if there are none."""
    values = read_yaml(directory / CONFIG)
    if not isinstance(values, dict) or not isinstance(values.get("train", {}), dict):
        raise ValueError(f"{directory / CONFIG} contains no settings of a run; {remedy}")
    return values


def resume_command(directory: Path, config: Mapping[str, Any]) -> str:
    """The command that resumes a run; it names the directory if that was moved."""
    words = ["loraplus", "sweep" if "sweep" in config else "train", str(directory / CONFIG)]
    output_dir = config.get("output_dir", directory)
    if expand_path("output_dir", output_dir).absolute() != directory.absolute():
        words += ["--output_dir", str(directory)]
    return shlex.join(words)


def read_lines(path: Path) -> Iterator[str]:
    """Yields the whole lines of an untrusted file, none if it is missing; a kill may have cut the last one off."""
    if not os.path.lexists(path):
        return
    check_file(path)
    with path.open("rb") as file:
        while line := file.readline(MAX_JSON_BYTES):
            if line.endswith(b"\n"):
                yield line[:-1].decode()
            elif len(line) == MAX_JSON_BYTES:
                raise ValueError(f"{path} is damaged: a line is longer than {MAX_JSON_BYTES} bytes")


def owner_pid(directory: Path) -> str | None:
    """The pid of the process that is using a run's directory, or None.

    Raises:
      OSError: the lock cannot be opened, for example in another user's directory.
    """
    paths = lock, owner = directory / LOCK, directory / OWNER
    try:
        for path in paths:
            check_file(path, links="none")
        try:
            # Another `loraplus runs` may hold it for a moment.
            with filelock.FileLock(lock).acquire(timeout=0.1):
                return None  # a process that was killed left its pid
        except filelock.Timeout:
            return next(read_lines(owner), None)
    except ValueError:
        if all(map(os.path.lexists, paths)):
            raise
        return None  # the process has ended, or never was
