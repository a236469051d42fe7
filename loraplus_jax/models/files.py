"""Opens a model's files."""

import os
from pathlib import Path

from .checkpoints.gguf.file import GgufFile
from .checkpoints.gguf.header import find
from .checkpoints.hub_directory import SINGLE_FILE, HubDirectory
from .checkpoints.model_files import ModelFiles


def open_files(path: str | Path) -> ModelFiles:
    """Opens a Hugging Face directory, a GGUF file, or a directory with one GGUF file and no safetensors.

    Raises:
      ValueError: the path is none of these; or the GGUF file is damaged or truncated, or one part of several.
      ImportError: gguf is not installed.
    """
    path = Path(path)
    if (file := find(path)) is not None:
        return GgufFile(path, file)
    if not os.path.isdir(path):
        raise ValueError(
            f"{path} is not a directory or GGUF file; pass a GGUF file, or a directory with config.json and "
            f"{SINGLE_FILE}"
        )
    return HubDirectory(path)
