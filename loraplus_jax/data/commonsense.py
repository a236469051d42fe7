"""The commonsense tasks by name, from the files of LLM-Adapters (arXiv 2304.01933)."""

from pathlib import Path

from .multiple_choice import Question, read_questions

COMMONSENSE = {
    "boolq": "boolq",
    "piqa": "piqa",
    "social_iqa": "social_i_qa",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "openbookqa": "openbookqa",
}
"""Folder of each task in LLM-Adapters' data; it holds `test.json`."""


def read_commonsense(root: Path, name: str) -> list[Question]:
    """Reads the test questions of a task.

    Args:
      root: directory that holds the tasks' folders.
      name: a task of `COMMONSENSE`.

    Raises:
      ValueError: the task's file is missing or invalid, see `read_questions`.
    """
    path = root / COMMONSENSE[name] / "test.json"
    if not path.is_file():
        raise ValueError(f"{name} needs {COMMONSENSE[name]}/test.json, which {describe_root(root)} lacks")
    return read_questions(path)


def describe_root(root: Path) -> str:
    """Names a data root and the directories in it, for error messages."""
    listed = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())[:20])
    return f"--data_root {root} (with {listed or 'no directories'})"
