"""The files of a run's directory that commands without JAX read too: settings, summary, lock, failure."""

from pathlib import Path
from typing import Any

import filelock

from .._utils.json_files import read_json, read_text
from ..settings.yaml_files import read_yaml
from .metrics_log import SUMMARY

CONFIG, ADAPTER, LOCK, OWNER = "config.yaml", "adapter", ".lock", ".pid"
CHECKPOINTS, FAILURE = "checkpoints", "failure.txt"


class TrainingFailed(Exception):
    """Training diverged and was aborted; earlier checkpoints are kept."""


def read_summary(directory: Path) -> dict[str, Any] | None:
    """The summary of a finished run, or None: an empty or damaged file does not mark a run as finished."""
    try:
        return read_json(directory / SUMMARY)
    except ValueError:
        return None


def saved_steps(directory: Path) -> list[int]:
    """The steps of the checkpoints in a run's directory."""
    return [int(path.name) for path in (directory / CHECKPOINTS).glob("*") if path.name.isdigit()]


def saved_settings(directory: Path, remedy: str) -> dict[str, Any]:
    """The settings in a run's directory, unchecked; the remedy ends the message if there are none."""
    values = read_yaml(directory / CONFIG)
    if not isinstance(values, dict) or not isinstance(values.get("train", {}), dict):
        raise ValueError(f"{directory / CONFIG} contains no settings of a run; {remedy}")
    return values


def owner_pid(directory: Path) -> str | None:
    """The pid of the process that is using a run's directory, or None."""
    if not (directory / OWNER).exists():
        return None
    try:
        with filelock.FileLock(directory / LOCK).acquire(timeout=0):
            return None  # a process that was killed left its pid
    except filelock.Timeout:
        return read_text(directory / OWNER).strip()
