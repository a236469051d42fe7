"""What is at a path: a run, an adapter, a merged model or a base model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .._utils.json_files import check_link
from ..interop.adapter_directory import DESCRIPTION_FILE, read_adapter_json
from ..interop.peft_files import NOTES_FILE, OPTIONS, peft_notes
from .run_directory import describe_unfinished
from .run_files import ADAPTER, CONFIG, saved_settings

Kind = Literal["run", "loop", "peft", "merged", "gguf", "base"]
ADAPTERS: tuple[Kind, ...] = ("run", "loop", "peft")


class Place(NamedTuple):
    """What is at a path.

    Attributes:
      kind: `"run"`, a run of `loraplus train` or an adapter with its settings, in either format; `"loop"`, one that
        `save_adapter` wrote in a loop of one's own; `"peft"`, one of PEFT's without settings; `"merged"`, a model
        that `loraplus export` merged; `"gguf"`, an adapter that it wrote for llama.cpp; `"base"`, anything else: a
        base model or its name, or nothing.
      path: the path.
      directory: the adapter's directory; the path itself if there is no adapter.
      notes_file: the file of the metadata.
      notes: the metadata; empty if there is no file.
      name: the path as text, or the name of a base model, as in `model.path`.
    """

    kind: Kind
    path: Path
    directory: Path
    notes_file: Path
    notes: Mapping[str, Any]
    name: str

    @property
    def is_peft(self) -> bool:
        """Whether an adapter is in PEFT's format."""
        return self.notes_file.name == NOTES_FILE

    def require(self, *kinds: Kind) -> "Place":
        """Returns itself if it is of one of the kinds; otherwise the error says what it is.

        Raises:
          ValueError, FileNotFoundError: it is of another kind.
        """
        if self.kind in kinds:
            return self
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path} does not exist")
        if self.kind in ADAPTERS:
            raise ValueError(
                f"{self.directory} has no training settings; use a run or adapter from loraplus train"
            )
        if self.kind in ("merged", "gguf"):
            name = "merged model" if self.kind == "merged" else "GGUF adapter, for other programs"
            raise ValueError(f"{self.path} is a {name}; use the run or adapter that it was exported from")
        self.check_finished()
        if self.notes:
            raise ValueError(
                f"{self.path} is a model that loraplus convert merged, without training settings; use loraplus "
                "generate, or eval --tasks"
            )
        merged = f", nor a merged model ({NOTES_FILE})" if "merged" in kinds else ""
        raise FileNotFoundError(
            f"{self.path} contains no finished run, no adapter ({DESCRIPTION_FILE}) and no PEFT adapter "
            f"({OPTIONS}){merged}"
        )

    def check_finished(self) -> None:
        """Raises FileNotFoundError for an unfinished run, and for a sweep."""
        if (unfinished := describe_unfinished(self.path)) is not None:
            raise FileNotFoundError(unfinished)
        if (self.path / CONFIG).is_file() and "sweep" in saved_settings(self.path, "restore it"):
            raise FileNotFoundError(
                f"{self.path} is a sweep, which keeps no adapter; train its winner and use that run"
            )


def look(path: Path) -> Place:
    """Returns what is at a path; reads its metadata only.

    Raises:
      ValueError, FileNotFoundError: the metadata is damaged, or an adapter has no tensors.
    """
    check_link(path / ADAPTER)
    for directory in (path / ADAPTER, path):
        # By our own file: an adapter that we export for PEFT has PEFT's files only.
        is_ours = (directory / DESCRIPTION_FILE).is_file()
        if is_ours or (directory / OPTIONS).is_file():
            notes = read_adapter_json(directory) if is_ours else peft_notes(directory) or {}
            kind = "run" if {"settings", "task"} <= notes.keys() else "loop" if is_ours else "peft"
            file = directory / (DESCRIPTION_FILE if is_ours else NOTES_FILE)
            return Place(kind, path, directory, file, notes, str(path))
    notes = peft_notes(path) or {}
    # A model that `loraplus convert` merged has digests only.
    kind = "base" if not {"settings", "task"} <= notes.keys() else "merged" if "merged" in notes else "gguf"
    return Place(kind, path, path, path / NOTES_FILE, notes, str(path))
